"""Process-wide settings of a program (not of the library): where compiled code is cached, and CPU compiler flags.

Only launchers call this, before the first array is made. Importing it changes nothing.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
"""Switches off a library fusion of XLA's CPU backend that slows convolutional steps down; absent from some versions."""


def cache_directory() -> pathlib.Path:
    """``$XDG_CACHE_HOME/jaxunlearn`` or ``~/.cache/jaxunlearn``."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxunlearn"


def set_up() -> None:
    """Switches on the persistent compilation cache and, on CPU, the flags that help there.

    A GPU's memory is taken as it is needed, not three quarters of it at once: the evaluation is another process on it.
    The user's own environment always wins: ``JAX_COMPILATION_CACHE_DIR``, ``XLA_FLAGS`` and
    ``XLA_PYTHON_CLIENT_PREALLOCATE`` are left alone where set.
    """
    import jax

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    if "XLA_FLAGS" not in os.environ and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and _knows_cpu_flag():
        os.environ["XLA_FLAGS"] = CPU_FLAG
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _knows_cpu_flag() -> bool:
    """Whether this jaxlib accepts CPU_FLAG. An unknown flag aborts the process, so a child tries it; asked once a version."""
    import jaxlib

    answers_file = cache_directory() / "xla_cpu_flags.json"
    try:
        answers = json.loads(answers_file.read_text())
    except (OSError, ValueError):
        answers = {}
    if jaxlib.__version__ not in answers:
        environment = {**os.environ, "XLA_FLAGS": CPU_FLAG, "JAX_PLATFORMS": "cpu"}
        child = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, check=False
        )
        answers[jaxlib.__version__] = child.returncode == 0
        try:
            answers_file.parent.mkdir(parents=True, exist_ok=True)
            temporary = answers_file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(answers))
            temporary.replace(answers_file)
        except OSError:
            pass  # A read-only home only means that the question is asked again next time.
    return answers[jaxlib.__version__]
