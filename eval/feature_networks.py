"""Weights of feature networks, as the evaluation's settings say where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxunlearn.io.feature_weights import MissingWeights, Weights, load_weights


def weights_for(settings: Mapping[str, Any], name: str) -> Weights:
    """The weights ``name`` from ``weights.folder``, else the environment's; unpinned ones if ``allow_unpinned`` names them.

    Raises:
      MissingWeights: the file is not there.
      ValueError: it is damaged, or was made from another file than the public one.
    """
    options = settings["weights"]
    return load_weights(name, options["folder"], allow_unpinned=name in options["allow_unpinned"])


def refusal(error: ValueError) -> tuple[str, str]:
    """Why a network cannot be used, and the status of its metrics: absent weights are "not_run", all else is "failed"."""
    return str(error), "not_run" if isinstance(error, MissingWeights) else "failed"
