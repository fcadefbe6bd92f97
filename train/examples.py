"""What a batch is made of: pixels, or latents with the noise of the autoencoder; and the texts that condition them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn.images import to_model
from jaxunlearn.io.batches import batch_indices, rows_of_process
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.io.latent_cache import LatentCache, Latents, Texts
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.objectives.neighbours import nearest
from jaxunlearn.types import Batch, Example
from train.distributed import barrier
from train.log import say


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The images of a run in the form in which a model takes them.

    Attributes:
      split: the images and their division.
      latents: the encoded images, or None for a model of pixels.
      sample: whether latents are drawn anew each time an image is used; else they are the means.
      texts: the embedded texts, or None for a model without text.
      captions: the text of every image of the split, or None for a model without text.
    """

    split: Split
    latents: Latents | None = None
    sample: bool = True
    texts: Texts | None = None
    captions: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what the model works on: (H, W, C) of the images or (h, w, z) of their latents."""
        return self.split.images.shape[1:] if self.latents is None else self.latents.shape

    def take(self, images: np.ndarray, *, seed: int, stream: str, step: int, whole: bool = False) -> Example:
        """This process's rows of a global batch.

        Args:
          images: [B], positions in the split: the global batch.
          seed, stream, step: what the noise of drawn latents depends on, beside the row.
          whole: take all rows, whatever process this is.
        """
        rows = np.arange(len(images))
        if not whole:
            rows = rows_of_process(rows, jax.process_index(), jax.process_count())
        mine = images[rows]
        x0 = self._x0(mine, rows, seed=seed, stream=stream, step=step)
        return Example(x0, self.condition([self.captions[i] for i in mine]) if self.texts is not None else None)

    def take_images(self, images: np.ndarray, *, seed: int, stream: str, step: int) -> np.ndarray:
        """As :meth:`take`, for [B] or [B,K] positions and without conditions: [B,H,W,C] or [B,K,H,W,C]."""
        count = images[0].size
        rows = rows_of_process(np.arange(len(images)), jax.process_index(), jax.process_count())
        flat = (rows[:, None] * count + np.arange(count)).reshape(-1)
        x0 = self._x0(images[rows].reshape(-1), flat, seed=seed, stream=stream, step=step)
        return x0.reshape(len(rows), *images.shape[1:], *x0.shape[1:])

    def _x0(self, images: np.ndarray, rows: np.ndarray, *, seed: int, stream: str, step: int) -> np.ndarray:
        if self.latents is None:
            return self.split.images[images]
        if self.sample:
            return self.latents.draw(images, rows, seed=seed, stream=f"latents/{stream}", step=step)
        return self.latents.mean[self.latents.row[images]]

    def points(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, ...]: where images lie in the model's space, pixels in [-1, 1] or means of latents."""
        if self.latents is None:
            return np.asarray(to_model(self.split.images[images]))
        return self.latents.mean[self.latents.row[images]]

    def condition(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [B, tokens, D], the embeddings of texts."""
        return self.texts.embeddings[self.texts.rows(texts)]


def training_rows(
    examples: Examples, population: np.ndarray, *, seed: int, stage: str, batch_size: int
) -> Callable[[int], Batch]:
    """``step -> Batch`` for training on one population of images."""

    def rows(step: int) -> Batch:
        images = population[batch_indices(seed, stage, step, len(population), batch_size)]
        return Batch(examples.take(images, seed=seed, stream=stage, step=step))

    return rows


def unlearning_rows(
    examples: Examples,
    *,
    seed: int,
    batch_size: int,
    extra: Mapping[str, np.ndarray] | None = None,
    lam: np.ndarray | None = None,
) -> Callable[[int], Batch]:
    """``step -> Batch`` of as many keep as forget images.

    Args:
      examples: the images.
      seed: of the run.
      batch_size: rows of the global batch.
      extra: name -> [F] or [F,K], further images of every forget image: positions in the split.
      lam: float32 [steps], for objectives that read ``batch.extra["lam"]``: the value of each step.
    """
    parts = {"keep": examples.split.keep, "forget": examples.split.forget}

    def rows(step: int) -> Batch:
        at = {name: batch_indices(seed, name, step, len(part), batch_size) for name, part in parts.items()}
        chosen = {
            name: examples.take(part[at[name]], seed=seed, stream=name, step=step) for name, part in parts.items()
        }
        further = {
            name: examples.take_images(table[at["forget"]], seed=seed, stream=name, step=step)
            for name, table in (extra or {}).items()
        }
        if lam is not None:
            further["lam"] = np.full(len(chosen["keep"].x0), lam[step], np.float32)
        return Batch(**chosen, extra=further)

    return rows


def extra_images(unlearn: ConfigDict, examples: Examples, wanted: Collection[str], seed: int) -> dict[str, np.ndarray]:
    """The further images that an objective asks for, as positions in the split.

    Args:
      unlearn: ``config.unlearn``.
      examples: the images.
      wanted: names among ``neighbours`` (the nearest keep images, [F,K]) and ``surrogate`` (a keep image for every forget
        image, chosen by the seed, [F]).
      seed: of the run.

    Raises:
      ValueError: keep images that are copies of forget images, or too few of them.
    """
    keep, forget = examples.split.keep, examples.split.forget
    found = {}
    if "neighbours" in wanted:
        chosen = unlearn.neighbours
        near = nearest(examples.points(forget), examples.points(keep), chosen.k, copy_rms=chosen.copy_rms)
        found["neighbours"] = keep[near.index]
    if "surrogate" in wanted:
        found["surrogate"] = keep[batch_indices(seed, "surrogate", 0, len(keep), len(forget))]
    return found


def captions_of_stage(config: ConfigDict, split: Split, stage: str) -> tuple[str, ...]:
    """The text that conditions each image of the split in a stage; "" for images that the stage does not train on."""
    if stage == "unlearn" and config.unlearn.prompt is not None:
        return (config.unlearn.prompt,) * len(split.images)
    if split.captions is None:
        return ("",) * len(split.images)
    held_out = set(split.held_out.tolist())
    return tuple("" if i in held_out else text for i, text in enumerate(split.captions))


def grid_texts(config: ConfigDict, split: Split) -> list[str]:
    """The prompts of a sample grid: the prompt or the forget captions in its first half, keep captions in the rest."""

    def different(images: np.ndarray) -> list[str]:
        return list(dict.fromkeys(split.captions[i] for i in images)) if split.captions is not None else []

    count, prompt = config.log.sample_count, config.unlearn.prompt
    first = [prompt] if prompt is not None else different(split.forget)
    second = different(split.keep) or first
    half = (count + 1) // 2
    return [first[i % len(first)] for i in range(half)] + [second[i % len(second)] for i in range(count - half)]


def texts_of_stage(config: ConfigDict, split: Split, stage: str) -> list[str]:
    """Every different text that a stage needs, the empty one of the guidance included."""
    return sorted({"", *captions_of_stage(config, split, stage), *grid_texts(config, split)})


def cache_folder(config: ConfigDict, workdir: Workdir) -> pathlib.Path:
    """Where encoded images and texts are kept."""
    return workdir.cache if config.latents.cache is None else pathlib.Path(config.latents.cache).expanduser()


def encoded_examples(
    config: ConfigDict, workdir: Workdir, split: Split, model: DiffusersModel, stage: str, poll: Callable[[], None]
) -> Examples:
    """The images of a stage as the model takes them: from the cache, or encoded and written there.

    Of several processes the first one encodes and writes; the others then read. One that does not find the files, because
    the folder lies on another host, encodes for itself.

    Args:
      config: the configuration.
      workdir: the work directory.
      split: the images.
      model: the model of the stage.
      stage: its name.
      poll: called now and then while images are encoded; what it raises ends the encoding.
    """

    def make(writes: bool) -> Examples:
        cache = LatentCache(
            cache_folder(config, workdir), writes=writes, batch_size=config.latents.batch_size, say=say, poll=poll
        )
        latents = cache.latents(model, split.images, split.digests) if model.is_latent else None
        texts = captions = None
        if model.takes_text:
            texts = cache.texts(model, texts_of_stage(config, split, stage))
            captions = captions_of_stage(config, split, stage)
        return Examples(split, latents, config.latents.sample, texts, captions)

    if not (model.is_latent or model.takes_text):
        return Examples(split)
    first = jax.process_index() == 0
    examples = make(writes=True) if first else None
    barrier(f"{stage}: encoded")
    return examples if first else make(writes=False)


def abstract_examples(config: ConfigDict, split: Split, model: DiffusersModel) -> Examples:
    """Stand-ins of the right shapes for a dry run: nothing is encoded, and arrays of zeros that take no memory."""
    latents = texts = captions = None
    if model.is_latent:
        zeros = np.broadcast_to(np.float32(0), (1, *model.vae.config.latent_shape(split.images.shape[1:])))
        latents = Latents(zeros, zeros, np.zeros(len(split.images), np.int64))
    if model.takes_text:
        captions = captions_of_stage(config, split, "unlearn")
        different = tuple(sorted({"", *captions}))
        shape = (len(different), model.tokenizer.model_max_length, model.text_encoder.config.hidden_size)
        texts = Texts(different, np.broadcast_to(np.float32(0), shape))
    return Examples(split, latents, config.latents.sample, texts, captions)
