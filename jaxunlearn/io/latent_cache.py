"""What a latent diffusion model is trained on, encoded once: images as mean and standard deviation, texts as embeddings.

Both are kept in a folder under the hash of everything that made them, so that a second run (another method, another seed)
finds them there: ``latents-<hash>.safetensors`` and ``texts-<hash>.safetensors``, each with a small JSON file beside it that
says in words what it holds. The JSON is for people; what is checked on reading is the safetensors file itself, whose header
carries the hash and the digest of its content.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxunlearn.io.batches import stream_id
from jaxunlearn.io.manifest import write_json

if TYPE_CHECKING:
    from jaxunlearn.io.diffusers import DiffusersModel

FORMAT = 1
"""Version of the files. A change of the encoding or of the layout raises it, and everything is encoded again."""

_CHUNK = 8  # batches between two calls of `poll`


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Encoded images; those with equal pixels share a row.

    Attributes:
      mean: float32 [M, h, w, z], of the encoder's Gaussian, times the scaling factor.
      std: float32 [M, h, w, z], its standard deviation, times the scaling factor.
      row: int64 [N], image -> its row.
    """

    mean: np.ndarray
    std: np.ndarray
    row: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, z) of one image."""
        return self.mean.shape[1:]

    def draw(self, images: np.ndarray, rows: np.ndarray, *, seed: int, stream: str, step: int) -> np.ndarray:
        """``mean + std * noise`` of images, with noise that depends on (seed, stream, step, row) alone.

        Args:
          images: [B], positions of images.
          rows: [B], their rows in the global batch, so that several processes draw what one would.
          seed, stream, step: see :func:`jaxunlearn.io.batches.batch_indices`.

        Returns:
          float32 [B, h, w, z].
        """
        chosen = self.row[images]
        noise = normal_rows(seed, stream, step, rows, self.shape)
        return self.mean[chosen] + self.std[chosen] * noise


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Embedded texts.

    Attributes:
      texts: K different texts.
      embeddings: float32 [K, tokens, D].
    """

    texts: tuple[str, ...]
    embeddings: np.ndarray

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [B], positions of the given texts in ``embeddings``.

        Raises:
          KeyError: a text that was not embedded.
        """
        return np.array([self._where[text] for text in texts], np.int64)

    @functools.cached_property
    def _where(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCache:
    """A folder of encoded images and texts.

    Attributes:
      folder: made when something is written.
      writes: whether results are stored; one of several processes that share the folder does.
      batch_size: images or texts that are encoded at a time.
      say: prints a line.
      poll: called now and then while images are encoded; what it raises ends the encoding.
    """

    folder: pathlib.Path
    writes: bool = True
    batch_size: int = 8
    say: Callable[[str], None] = print
    poll: Callable[[], None] = lambda: None

    def latents(self, model: DiffusersModel, images: np.ndarray, digests: np.ndarray) -> Latents:
        """Mean and standard deviation of images, from the folder or encoded.

        Args:
          model: one with a ``vae``.
          images: uint8 [N, H, W, C].
          digests: uint8 [N, 32], SHA-256 of their pixels, see :func:`jaxunlearn.io.duplicates.pixel_digests`.
        """
        # Sorted by content, so that neither the order of the images nor copies of them change what is stored.
        contents = np.ascontiguousarray(digests).view("V32").reshape(-1)
        _, first, row = np.unique(contents, return_index=True, return_inverse=True)
        made_of = {
            "images": hashlib.sha256(np.ascontiguousarray(digests[first])).hexdigest(),
            "shape": [len(first), *images.shape[1:]],
            "autoencoder": _component_hash(model.vae),
        }

        def encode() -> dict[str, np.ndarray]:
            space = model.latent_space(self.batch_size)
            shape = (len(first), *space.latent_shape(images.shape[1:]))
            out = {name: np.empty(shape, np.float32) for name in ("mean", "std")}
            for start in range(0, len(first), _CHUNK * self.batch_size):
                self.poll()
                part = slice(start, start + _CHUNK * self.batch_size)
                out["mean"][part], out["std"][part] = space.encode(images[first[part]])
            return out

        arrays = self._stored("latents", f"{len(images)} images", made_of, ("mean", "std"), encode)
        return Latents(arrays["mean"], arrays["std"], row.reshape(-1))

    def texts(self, model: DiffusersModel, texts: Sequence[str]) -> Texts:
        """Embeddings of texts, from the folder or embedded.

        Args:
          model: one with a ``text_encoder`` and a ``tokenizer``.
          texts: any texts; each different one is embedded once.
        """
        different = tuple(sorted(set(texts)))
        made_of = {
            "texts": hashlib.sha256(json.dumps(different).encode()).hexdigest(),
            "count": len(different),
            # What the tokenizer's files do to these texts; the files themselves may differ in ways that do not matter.
            "tokens": hashlib.sha256(np.ascontiguousarray(model.tokenizer(different), np.int32)).hexdigest(),
            "text_encoder": _component_hash(model.text_encoder),
        }

        def embed() -> dict[str, np.ndarray]:
            self.poll()
            return {"embeddings": np.ascontiguousarray(model.text(self.batch_size).embed(different), np.float32)}

        name = f"{len(different)} different text{'s' if len(different) != 1 else ''}"
        return Texts(different, self._stored("texts", name, made_of, ("embeddings",), embed)["embeddings"])

    def _stored(
        self,
        kind: str,
        what: str,
        made_of: Mapping[str, Any],
        names: tuple[str, ...],
        make: Callable[[], dict[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """The arrays of that hash: read, or made and written."""
        key = hashlib.sha256(json.dumps({"format": FORMAT, "kind": kind, **made_of}).encode()).hexdigest()
        path = self.folder / f"{kind}-{key[:32]}.safetensors"
        if path.is_file():
            try:
                arrays = _read(path, key, names)
                self.say(f"{kind}: {what} from the cache")
                return arrays
            except ValueError as error:
                self.say(f"{kind}: {path} is damaged ({error}) and made again")
        started = time.monotonic()
        arrays = make()
        if self.writes:
            _write(path, key, arrays)
            shapes = {name: list(array.shape) for name, array in arrays.items()}
            write_json(path.with_suffix(".json"), {"format": FORMAT, "kind": kind, **made_of, "arrays": shapes})
        self.say(f"{kind}: {what} encoded in {time.monotonic() - started:.0f} s")
        return arrays


def normal_rows(seed: int, stream: str, step: int, rows: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, a pure function of (seed, stream, step, row): float32 [len(rows), *shape].

    Raw Philox output goes through the transformation of Box and Muller (1958), because NumPy promises that the raw stream
    of a bit generator never changes, but not that the methods of ``Generator`` do not.

    >>> print(normal_rows(0, "keep", 3, [0, 1], (2,)).round(3))
    [[ 1.362  0.557]
     [-0.341 -0.869]]
    """
    out = np.empty((len(rows), *shape), np.float32)
    for i, row in enumerate(rows):
        entropy = [int(seed), stream_id(stream), int(step), int(row)]
        raw = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(out[i].size)
        radius = np.sqrt(-2 * np.log(((raw >> np.uint64(32)) + 0.5) / 2**32))
        angle = (raw & np.uint64(0xFFFFFFFF)) * (2 * np.pi / 2**32)
        out[i] = (radius * np.cos(angle)).reshape(shape)
    return out


def _component_hash(component: Any) -> str:
    """Of the configuration and the weights of a component."""
    config = json.dumps(component.config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{component.sha256}\0{config}".encode()).hexdigest()


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


def _write(path: pathlib.Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Atomically: to a temporary file beside it, which then takes its name. Raises OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        save_file(arrays, temporary, metadata={"key": key, "digest": _digest(arrays)})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: pathlib.Path, key: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Raises ValueError where the file is not exactly what was written under this key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                raise ValueError("it was made of something else")
            if set(file.keys()) != set(names):
                raise ValueError(f"it holds {sorted(file.keys())}")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if metadata.get("digest") != _digest(arrays):
        raise ValueError("its content has changed")
    return arrays
