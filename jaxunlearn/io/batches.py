"""Which images form the batch of a step: pure functions of (seed, stream, step), with no iterator and no state.

An endless sequence is formed by one permutation of the population after the other; the batch of step s is its positions
``s * batch_size ... (s + 1) * batch_size - 1``. So every image appears once per epoch, a batch may span epochs, a
population smaller than the batch is repeated evenly, and a resumed run goes on exactly, on any number of processes.
"""

from __future__ import annotations

import functools
import operator
import zlib

import numpy as np

_BLOCK = 4096  # about as many positions are permuted at once, so that tiny populations do not cost a generator an epoch


def stream_id(stream: str) -> int:
    """A name such as ``"keep"`` -> 32-bit number, the same in every process and version (CRC-32)."""
    if not isinstance(stream, str) or not stream:
        raise ValueError(f"stream is {stream!r}; allowed: a non-empty name such as 'keep', 'forget', 'base'")
    return zlib.crc32(stream.encode("utf-8"))


@functools.lru_cache(maxsize=16)
def _permutations(seed: int, stream: int, population: int, block: int) -> np.ndarray:
    """int64 [epochs, population]: the permutations of a block of successive epochs, read-only.

    Raw Philox output is sorted instead of calling ``Generator.permutation``: NumPy promises that the raw stream of a bit
    generator never changes, but not that the methods of ``Generator`` do not.
    """
    epochs = max(1, _BLOCK // population)
    bits = np.random.Philox(np.random.SeedSequence([seed, stream, population, block]))
    raw = bits.random_raw(epochs * population).reshape(epochs, population)
    order = np.argsort(raw, axis=1, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, stream: str, step: int, population: int, batch_size: int) -> np.ndarray:
    """Positions (in the population) of the global batch of one step.

    Args:
      seed: seed of the run, at least 0.
      stream: name of the use, ``"keep"``, ``"forget"`` or ``"base"``; streams are independent of each other.
      step: 0, 1, 2, ...; the step that the batch is for.
      population: number of images to draw from, for example ``len(split.keep)``.
      batch_size: rows of the global batch; may be larger than the population.

    Returns:
      int64 [batch_size] in ``0 .. population - 1``; use it as ``split.keep[batch_indices(...)]``.

    Raises:
      ValueError: a number out of its range.

    >>> batch_indices(0, "keep", step=0, population=5, batch_size=3).tolist()
    [4, 0, 1]
    """
    seed, step = _whole("seed", seed, 0), _whole("step", step, 0)
    population, batch_size = _whole("population", population, 1), _whole("batch_size", batch_size, 1)
    stream_number = stream_id(stream)
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epoch, offset = np.divmod(positions, population)
    block, row = np.divmod(epoch, max(1, _BLOCK // population))
    out = np.empty(batch_size, np.int64)
    for b in range(int(block[0]), int(block[-1]) + 1):
        here = block == b
        out[here] = _permutations(seed, stream_number, population, b)[row[here], offset[here]]
    return out


def rows_of_process(indices: np.ndarray, process: int, num_processes: int) -> np.ndarray:
    """The rows of a global batch that one process gathers: contiguous, of equal number, in process order.

    Args:
      indices: [batch_size], the global batch.
      process: 0 .. num_processes - 1.
      num_processes: must divide the batch.

    Returns:
      [batch_size / num_processes]; over all processes they are disjoint and complete.

    Raises:
      ValueError: the batch cannot be divided evenly, or no such process.

    >>> rows_of_process(np.arange(6), process=1, num_processes=3).tolist()
    [2, 3]
    """
    process, num_processes = _whole("process", process, 0), _whole("num_processes", num_processes, 1)
    if process >= num_processes:
        raise ValueError(f"process is {process}; allowed: 0 to {num_processes - 1}")
    if len(indices) % num_processes:
        raise ValueError(
            f"batch of {len(indices)} rows cannot be divided by {num_processes} processes; fix: choose a multiple of "
            f"{num_processes}, for example {num_processes * max(1, len(indices) // num_processes)}"
        )
    rows = len(indices) // num_processes
    return indices[process * rows : (process + 1) * rows]


def _whole(name: str, value: int, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; allowed: a whole number, at least {low}") from None
    if isinstance(value, bool | np.bool_) or number < low:
        raise ValueError(f"{name} is {value!r}; allowed: a whole number, at least {low}")
    return number
