"""Joining the processes of a run. Must happen before anything touches a device."""

from __future__ import annotations

import os
from typing import Any

import jax

from train.log import say


def several_processes(mode: str, num_processes: int | None, environment=os.environ) -> bool:
    """Whether this process is one of several: asked for, or seen in the environment of SLURM, Open MPI or a TPU pod."""
    if mode != "auto":
        return mode == "on"
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if num_processes is not None:
        return num_processes > 1
    if all(name in environment for name in slurm):
        return int(environment["SLURM_NTASKS"]) > 1
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
    return len([name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]) > 1


def join(mode: str, coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Calls ``jax.distributed.initialize`` where there are several processes, and says who this one is.

    Raises:
      ValueError: only some of the three values that belong together were given.
    """
    given = [v is not None for v in (coordinator_address, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator_address, --num_processes and --process_id belong together: give all or none")
    if several_processes(mode, num_processes):
        where = f" at {coordinator_address}" if coordinator_address else ""
        say(f"waiting for all processes{where}; start the same command on every one of them")
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
        say(
            f"process {jax.process_index()}/{jax.process_count()}, "
            f"{jax.local_device_count()} of {jax.device_count()} devices here"
        )


def barrier(name: str) -> None:
    """Waits until every process is here; nothing for a single one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_first(tree: Any) -> Any:
    """The arrays of process 0, in every process; of a single one they are returned as they are."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def from_first_text(text: str) -> str:
    """The text of process 0, in every process; of a single one it is returned as it is."""
    if jax.process_count() == 1:
        return text
    import numpy as np

    own = np.frombuffer(text.encode(), np.uint8)
    length = int(from_first(np.int32(len(own))))
    # All processes must bring arrays of one shape; only the first one's content counts.
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(own))] = own[:length]
    return bytes(np.asarray(from_first(padded))).decode()
