"""How many timesteps there are, as far as that is known when a configuration is checked."""

from __future__ import annotations

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxunlearn.schedule import Schedule


class Steps(NamedTuple):
    """The number of timesteps.

    Attributes:
      most: T; infinite where the user's model has yet to be loaded.
      text: the same for messages.
    """

    most: float
    text: str

    @property
    def known(self) -> bool:
        """Whether T is known."""
        return math.isfinite(self.most)


def steps_of(config: ConfigDict, schedule: Schedule | None = None) -> Steps:
    """T of the user's model where its noise schedule is given; else of ``config.scheduler``, if that is what counts."""
    if schedule is None and config.base.path is not None:
        return Steps(math.inf, "T")
    most = config.scheduler.get("num_train_timesteps", 1000) if schedule is None else schedule.num_steps
    return Steps(most, str(most))
