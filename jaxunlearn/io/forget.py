"""Opens a data set and divides it: what is kept, what is to be forgotten, what is never trained on.

The rules, in their order:

1. The set is read, ``plant.copies`` copies of one picture are appended ("planted/0000", ...). Their text is
   ``plant.caption``; every image without a text of its own takes ``caption``.
2. The forget set is the union of what ``forget`` names: the planted copies, ``indices`` (positions in the whole source,
   before ``limit``), the names in the text file ``files``, and the pictures in ``folder``, found by their decoded pixels.
   A picture of the folder that the data does not hold becomes an additional forget image at the end of the array, and is
   listed as unmatched.
3. Every exact copy of a forget image is a forget image too, whether it was named or not.
4. Held out is a fixed random choice of ``held_out_fraction`` of the images that exist only once and are not planted, less
   those in the forget set. So no held-out picture has a copy in the training set, and naming a forget set does not move an
   image from training to held-out: a base model that was trained without one has not seen it. (Only where the forget set
   takes every image of the choice, the next one in its random order is held out.)
5. Everything else is kept. Kept and held-out images closer than ``near_duplicate_rms`` to a forget image are reported,
   moved to the forget set, or refused (``near_duplicates``).
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import pathlib
from collections.abc import Mapping

import numpy as np

from jaxunlearn.io.data_problems import DEFAULTS, READER_OPTIONS, data_problems, with_defaults
from jaxunlearn.io.datasets import DATASETS, ImageSet
from jaxunlearn.io.duplicates import (
    NearDuplicates,
    content_groups,
    find_near_duplicates,
    no_near_duplicates,
    pixel_digests,
)
from jaxunlearn.io.pictures import PictureFile, decode, decode_all, fit, list_pictures

__all__ = ["DEFAULTS", "Split", "data_problems", "open_split"]


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class Split:
    """A data set, divided. Index arrays are int64, sorted and disjoint; they are positions in ``images``.

    Attributes:
      images: uint8 [N, H, W, C]: the set, then the planted copies, then unmatched forget images.
      labels: int32 [N] or None; -1 for planted and unmatched images, whose class is not known.
      names: N names.
      keep: the training set without the forget set (X \\ A).
      forget: the forget set (A); empty if none was asked for.
      held_out: images that no stage trains on.
      near_duplicates: kept or held-out images (with policy "forget": by now forget images) that are close to a forget
        image.
      unmatched: names of forget images that the data does not hold.
      exact_copies: forget images that were not named but have the same pixels as one that was.
      planted: positions of the planted copies.
      files: where the files are, or None where an image has no file of its own.
      source: where the images came from.
      class_names: names of the labels, or None.
      captions: N texts, "" where an image has none; None if there is no text at all.
      near_duplicate_rms, near_duplicate_policy: the settings of the search; ``searched``: images compared.
      held_out_fraction, seed: how ``held_out`` was chosen.
      digests: uint8 [N, 32], SHA-256 of the pixels; computed if not given.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]
    keep: np.ndarray
    forget: np.ndarray
    held_out: np.ndarray
    near_duplicates: NearDuplicates = dataclasses.field(default_factory=no_near_duplicates)
    unmatched: tuple[str, ...] = ()
    exact_copies: np.ndarray = dataclasses.field(default_factory=_none)
    planted: np.ndarray = dataclasses.field(default_factory=_none)
    files: tuple[PictureFile | None, ...] | None = None
    source: str = ""
    class_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    near_duplicate_rms: float = 0.0
    near_duplicate_policy: str = "report"
    searched: int = 0
    held_out_fraction: float = 0.0
    seed: int = 0
    digests: np.ndarray | None = None

    def __post_init__(self):
        if self.digests is None:
            object.__setattr__(self, "digests", pixel_digests(self.images))

    @property
    def train(self) -> np.ndarray:
        """What a base model is trained on (X): keep and forget together, sorted; not the unmatched, which X never held."""
        unmatched = np.flatnonzero(np.isin(self.names, self.unmatched)) if self.unmatched else _none()
        return np.setdiff1d(np.concatenate([self.keep, self.forget]), unmatched)


def open_split(data: Mapping, seed: int) -> Split:
    """Reads and divides a data set by the rules of this module; a pure function of the files, ``data`` and ``seed``.

    Args:
      data: the ``data`` section, see :data:`jaxunlearn.io.data_problems.DEFAULTS`; keys may be left out.
      seed: chooses the held-out images; at least 0.

    Raises:
      ValueError: any problem of the section (all are listed), unreadable data, unknown names or indices (all are listed),
        near duplicates with policy "error", or a division that leaves nothing to keep or to hold out.
    """
    problems = data_problems(data)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        problems.append(f"seed: {seed!r}; allowed: a whole number, 0 or more; fix: 0")
    if problems:
        raise ValueError("\n".join(problems))
    data = with_defaults(data)
    base = DATASETS[data["name"]](**{k: data[k] for k in READER_OPTIONS if data[k] is not None})
    plant, rule = data["plant"], data["forget"]
    count, shape = len(base.images), base.images.shape[1:]

    images, names, files = [base.images], list(base.names), list(base.files or (None,) * count)
    if plant["copies"]:
        picture, file = _plant_picture(plant["image"], shape)
        images.append(np.repeat(picture[None], plant["copies"], axis=0))
        names += [f"planted/{i:04d}" for i in range(plant["copies"])]
        files += [file] * plant["copies"]
    planted = np.arange(count, len(names))
    digests = np.concatenate([pixel_digests(part) for part in images])

    chosen: set[int] = set(planted.tolist() if rule["planted"] else ())
    chosen.update(_from_indices(rule["indices"], base, data["limit"]))
    if rule["files"] is not None:
        chosen.update(_from_files(rule["files"], base, data))
    unmatched: list[str] = []
    if rule["folder"] is not None:
        found, extra = _from_folder(rule["folder"], shape, data["size"], digests)
        chosen.update(found)
        for name, _, file in extra:
            chosen.add(len(names))
            unmatched.append(name)
            names.append(name)
            files.append(file)
        if extra:
            images.append(np.stack([picture for _, picture, _ in extra]))
            digests = np.concatenate([digests, pixel_digests(images[-1])])

    pixels = np.concatenate(images) if len(images) > 1 else images[0]
    labels = base.labels
    if labels is not None:
        labels = np.concatenate([labels, np.full(len(pixels) - count, -1, np.int32)])
    _check_names(names)

    groups = content_groups(digests)
    named = np.array(sorted(chosen), np.int64)
    in_forget = np.isin(groups, groups[named])
    exact = np.setdiff1d(np.flatnonzero(in_forget), named)
    held = _held_out(groups, in_forget, count, data["held_out_fraction"], seed)
    near, searched = _near_duplicates(pixels, groups, in_forget, data, names)
    if data["near_duplicates"] == "forget":
        in_forget[near.index] = True
        held = held[~in_forget[held]]
        if data["held_out_fraction"] > 0 and not len(held):
            raise ValueError(
                "data.near_duplicates: 'forget' moves every held-out image; fix: a larger held_out_fraction"
            )
    in_keep = ~in_forget
    in_keep[held] = False
    if not in_keep.any():
        raise ValueError(
            f"data: nothing is left to keep of {len(pixels)} images ({int(in_forget.sum())} forget, {len(held)} held "
            "out); allowed: at least one; fix: name fewer forget images, or lower data.held_out_fraction"
        )
    return Split(
        images=pixels,
        labels=labels,
        names=tuple(names),
        keep=np.flatnonzero(in_keep),
        forget=np.flatnonzero(in_forget),
        held_out=held,
        near_duplicates=near,
        unmatched=tuple(unmatched),
        exact_copies=exact,
        planted=planted,
        files=tuple(files) if any(f is not None for f in files) else None,
        source=base.source,
        class_names=base.class_names,
        captions=_captions(base, data, len(planted), len(names)),
        near_duplicate_rms=float(data["near_duplicate_rms"]),
        near_duplicate_policy=data["near_duplicates"],
        searched=searched,
        held_out_fraction=float(data["held_out_fraction"]),
        seed=int(seed),
        digests=digests,
    )


def _captions(base: ImageSet, data: dict, copies: int, total: int) -> tuple[str, ...] | None:
    """Texts of the set, of the planted copies and of the unmatched forget images, in this order; None if none is given."""
    own, general, planted = base.captions, data["caption"], data["plant"]["caption"]
    if own is None and general is None and (planted is None or not copies):
        return None
    general = (general or "").strip()
    texts = [text or general for text in own or ("",) * len(base.images)]
    texts += [(planted or "").strip() or general] * copies
    return tuple(texts + [general] * (total - len(texts)))


def _plant_picture(image: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, PictureFile | None]:
    """The picture to plant, in the shape of the data, and its file."""
    if str(image).startswith("sample:"):
        from sklearn.datasets import load_sample_image

        return fit(load_sample_image(str(image).removeprefix("sample:") + ".jpg"), shape[:2], shape[2]), None
    file = PictureFile(str(image))
    return decode(file.read(), str(image), shape[:2], shape[2]), file


def _from_indices(indices, base: ImageSet, limit: int | None) -> list[int]:
    """Positions in the whole source -> positions in the (possibly thinned) array."""
    wanted = [] if indices is None else [int(i) for i in indices]
    outside = [i for i in wanted if i >= base.available]
    if outside:
        raise ValueError(
            f"data.forget.indices: {outside[:10]} of {len(outside)} are outside the data; allowed: 0 to "
            f"{base.available - 1}; fix: remove them"
        )
    where = {int(p): i for i, p in enumerate(base.positions)}
    dropped = [i for i in wanted if i not in where]
    if dropped:
        raise ValueError(
            f"data.forget.indices: {dropped[:10]} of {len(dropped)} are left out by data.limit={limit}; allowed: "
            "indices of images that are used; fix: data.limit=None"
        )
    return [where[i] for i in wanted]


def _from_files(path: str, base: ImageSet, data: dict) -> list[int]:
    """Positions of the images that a text file names: full names, or base names that occur once."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.forget.files: {path!r} is not UTF-8 text ({error}); fix: one name per line") from error
    lines = [line.strip() for line in text.splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not wanted:
        raise ValueError(f"data.forget.files: {path!r} names no image; allowed: one name per line; fix: add names")
    full = {name: i for i, name in enumerate(base.names)}
    short: dict[str, list[int]] = {}
    for i, name in enumerate(base.names):
        short.setdefault(name.rsplit("/", 1)[-1], []).append(i)
    root = str(data["path"] or "").rstrip("/") + "/"
    found, unknown = [], []
    for line in wanted:
        spellings = [line, line.removeprefix("./"), line.removeprefix(root), line.replace("\\", "/")]
        name = next((s for s in spellings if s in full), None)
        same = short.get(line, [])
        if name is not None:
            found.append(full[name])
        elif len(same) == 1:
            found.append(same[0])
        elif same:
            unknown.append(f"  {line!r}: {len(same)} images have this name, for example {base.names[same[0]]!r}")
        else:
            close = difflib.get_close_matches(line, full, n=1) or difflib.get_close_matches(line, short, n=1)
            unknown.append(f"  {line!r}: no such image" + (f"; did you mean {close[0]!r}?" if close else ""))
    if unknown:
        limit = "" if data["limit"] is None else f" (data.limit={data['limit']} leaves images out)"
        raise ValueError(
            f"data.forget.files: {len(unknown)} of {len(wanted)} names in {str(path)!r} select no image{limit}; allowed: "
            f"names such as {base.names[0]!r}; fix these lines:\n" + "\n".join(unknown)
        )
    return found


def _from_folder(path: str, shape: tuple[int, int, int], size: int | None, digests: np.ndarray):
    """Positions with the pixels of the folder's pictures, and (name, image, file) of pictures that are not there."""
    files = list_pictures(path)
    pictures = decode_all(files, size, shape[2])
    wrong = [f"{name!r} {p.shape[:2]}" for name, p in zip(files, pictures) if p.shape != shape]
    if wrong:
        raise ValueError(
            f"data.forget.folder: {len(wrong)} pictures do not have the data's size {shape[:2]}, for example "
            f"{', '.join(wrong[:2])} (height, width); allowed: the same size; fix: set data.size, which applies to both"
        )
    where: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        where.setdefault(digest.tobytes(), []).append(i)
    found: list[int] = []
    extra = []
    for (name, file), picture, digest in zip(files.items(), pictures, pixel_digests(pictures)):
        if digest.tobytes() in where:
            found += where[digest.tobytes()]
        else:
            extra.append((f"unmatched/{name}", picture, file))
    return found, extra


def _check_names(names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("data: names that begin with 'planted/' or 'unmatched/' are reserved; fix: rename that folder")


def _held_out(groups: np.ndarray, in_forget: np.ndarray, count: int, fraction: float, seed: int) -> np.ndarray:
    """Rule 4 of the module. groups, in_forget: [N]; the first ``count`` images are the data set."""
    if fraction == 0:
        return _none()
    raw = np.random.Philox(np.random.SeedSequence([int(seed), 0x68656C64])).random_raw(count)
    order = np.argsort(raw, kind="stable")
    single = np.bincount(groups)[groups] == 1
    order = order[single[order]]
    wanted = max(1, round(fraction * count))
    held = [i for i in order[:wanted] if not in_forget[i]] or [i for i in order[wanted:] if not in_forget[i]][:1]
    if not held:
        raise ValueError(
            f"data.held_out_fraction: {fraction}, but every one of the {count} images has an exact copy or is to be "
            "forgotten; allowed: data with other images, or 0; fix: data.held_out_fraction=0"
        )
    return np.sort(np.array(held, np.int64))


def _near_duplicates(pixels, groups, in_forget, data, names) -> tuple[NearDuplicates, int]:
    """Searches keep and held-out; with policy "forget" also for images near to those that were found, until none is."""
    rms, policy = float(data["near_duplicate_rms"]), data["near_duplicates"]
    if rms == 0 or not in_forget.any():
        return no_near_duplicates(), 0
    candidates = np.flatnonzero(~in_forget)
    searched = len(candidates)
    targets = np.flatnonzero(in_forget)
    parts = []
    while len(targets) and len(candidates):
        targets = targets[np.unique(groups[targets], return_index=True)[1]]  # one of each set of copies is enough
        near = find_near_duplicates(pixels, candidates, targets, rms)
        parts.append(near)
        if policy != "forget":
            break
        candidates, targets = np.setdiff1d(candidates, near.index), near.index
    index = np.concatenate([p.index for p in parts]) if parts else _none()
    if not len(index):
        return no_near_duplicates(), searched
    order = np.argsort(index)
    near = NearDuplicates(
        index[order],
        np.concatenate([p.nearest for p in parts])[order],
        np.concatenate([p.rms for p in parts])[order],
    )
    if policy == "error":
        lines = [f"  {names[i]!r} is {r:.4f} from {names[j]!r}" for i, j, r in zip(near.index, near.nearest, near.rms)]
        raise ValueError(
            f"data.near_duplicates: {len(near)} images outside the forget set are within rms {rms} of it; allowed: none "
            "with policy 'error'; fix: data.near_duplicates='forget' moves them to the forget set, 'report' keeps them:\n"
            + "\n".join(lines[:10])
        )
    return near, searched
