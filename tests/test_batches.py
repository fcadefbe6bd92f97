"""The stateless index sampler: a pure function, every image once an epoch, the same on any number of processes."""

import subprocess
import sys

import numpy as np
import pytest

from jaxunlearn.io.batches import batch_indices, rows_of_process, stream_id


def sequence(steps, population, batch, seed=0, stream="keep"):
    return np.concatenate([batch_indices(seed, stream, s, population, batch) for s in range(steps)])


@pytest.mark.parametrize(("population", "batch"), [(1, 7), (5, 3), (7, 7), (10, 4), (3, 128), (5000, 999)])
def test_every_epoch_shows_every_image_once(population, batch):
    epochs = 6
    steps = -(-population * epochs // batch)
    drawn = sequence(steps, population, batch)[: population * epochs].reshape(epochs, population)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(population), (epochs, 1)))
    assert drawn.dtype == np.int64
    if population > 4:
        assert not np.array_equal(drawn[0], drawn[1]), "a new permutation every epoch"


def test_pure_function_of_its_arguments_whatever_was_asked_before():
    direct = batch_indices(3, "forget", 1000, 37, 16)
    for step in (0, 5, 999):
        batch_indices(3, "forget", step, 37, 16)
    np.testing.assert_array_equal(direct, batch_indices(3, "forget", 1000, 37, 16))
    direct[:] = -1  # the caller's array is its own
    assert (batch_indices(3, "forget", 1000, 37, 16) >= 0).all()


def test_seeds_streams_and_populations_are_independent():
    variants = [(0, "keep", 100), (1, "keep", 100), (0, "forget", 100), (0, "base", 100)]
    drawn = [batch_indices(seed, stream, 0, n, 100) for seed, stream, n in variants]
    for i in range(len(drawn)):
        for j in range(i):
            assert np.mean(drawn[i] == drawn[j]) < 0.1
    assert np.mean(batch_indices(0, "keep", 0, 101, 50) == batch_indices(0, "keep", 0, 100, 50)) < 0.2


def test_first_places_are_uniform():
    first = np.array([batch_indices(seed, "keep", 0, 8, 1)[0] for seed in range(2000)])
    counts = np.bincount(first, minlength=8)
    chi2 = np.sum((counts - 250.0) ** 2 / 250.0)
    assert chi2 < 30  # 7 degrees of freedom: p < 1e-4 beyond


def test_golden_values():
    """Pinned: a change would break the resume of every run that is under way."""
    assert stream_id("keep") == 3_421_521_931
    assert stream_id("forget") == 3_074_503_181
    assert batch_indices(0, "keep", 0, 1000, 8).tolist() == [599, 190, 65, 951, 149, 411, 171, 743]
    assert batch_indices(7, "forget", 12_345, 101, 8).tolist() == [63, 59, 23, 37, 61, 4, 80, 48]
    assert batch_indices(2**40, "base", 10**9, 60_000, 4).tolist() == [30977, 15671, 9652, 52012]


def test_same_in_another_process():
    code = "from jaxunlearn.io.batches import batch_indices as b; print(b(5, 'keep', 77, 1234, 6).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(batch_indices(5, "keep", 77, 1234, 6).tolist())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_processes_are_disjoint_and_complete(processes):
    batch = batch_indices(0, "keep", 9, 50, 16)
    rows = [rows_of_process(batch, p, processes) for p in range(processes)]
    assert {len(r) for r in rows} == {16 // processes}
    np.testing.assert_array_equal(np.concatenate(rows), batch)


def test_bad_arguments():
    with pytest.raises(ValueError, match="population is 0; allowed"):
        batch_indices(0, "keep", 0, 0, 4)
    with pytest.raises(ValueError, match="step is -1; allowed"):
        batch_indices(0, "keep", -1, 4, 4)
    with pytest.raises(ValueError, match="batch_size is 2.5; allowed"):
        batch_indices(0, "keep", 0, 4, 2.5)
    with pytest.raises(ValueError, match="seed is True; allowed"):
        batch_indices(True, "keep", 0, 4, 4)
    with pytest.raises(ValueError, match="stream is ''; allowed"):
        batch_indices(0, "", 0, 4, 4)
    with pytest.raises(ValueError, match="10 rows cannot be divided by 4 processes.*for example 8"):
        rows_of_process(np.arange(10), 0, 4)
    with pytest.raises(ValueError, match="process is 2; allowed: 0 to 1"):
        rows_of_process(np.arange(10), 2, 2)
