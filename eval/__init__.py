"""``python -m eval.main --workdir DIR``: measures a finished run and writes its report. Uses only ``jaxunlearn``."""
