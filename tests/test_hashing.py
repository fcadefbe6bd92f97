"""Fingerprints, against the definition written out."""

from __future__ import annotations

import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxunlearn.io.hashing import file_sha256, tree_sha256


def test_tree_sha256():
    tree = {"b_1": {"scale": np.arange(3, dtype=np.float32)}, "a": {"kernel": np.ones((2, 1), np.float32)}}
    leaf = hashlib.sha256(b"a.kernel\0float32\0" + b"2,1\0" + np.ones(2, "<f4").tobytes()).digest()
    other = hashlib.sha256(b"b_1.scale\0float32\0" + b"3\0" + np.arange(3, dtype="<f4").tobytes()).digest()
    assert tree_sha256(tree) == hashlib.sha256(leaf + other).hexdigest()
    assert tree_sha256(dict(reversed(tree.items()))) == tree_sha256(tree)
    assert tree_sha256(jax.tree.map(jax.numpy.asarray, tree)) == tree_sha256(tree)
    assert tree_sha256(jax.tree.map(lambda x: x.astype(x.dtype.newbyteorder(">")), tree)) == tree_sha256(tree)
    assert tree_sha256(jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tree)) != tree_sha256(tree)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")
    wide = {"w": np.arange(8, dtype=np.float32)}
    sharded = jax.device_put(wide, jax.NamedSharding(mesh, jax.P("d")))
    assert tree_sha256(sharded) == tree_sha256(wide)
    changed = {"w": wide["w"].copy()}
    changed["w"].view(np.uint32)[3] ^= 1
    assert tree_sha256(changed) != tree_sha256(wide)
    strided = {"w": np.arange(16, dtype=np.float32)[::2] / 2}
    assert tree_sha256(strided) == tree_sha256(wide)
    with pytest.raises(ValueError, match="contains a dot"):
        tree_sha256({"a.b": np.zeros(1)})


def test_file_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
