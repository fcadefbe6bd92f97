"""Image sets as arrays: one reader per source, all in :data:`DATASETS`.

Every reader takes keyword options and returns an :class:`ImageSet` of uint8 images; the model's range [-1, 1] is made on
the device (:func:`jaxunlearn.images.to_model`). Options common to all readers:

* ``size``: side of the square that every image is cropped (centre) and resized to; None keeps the stored size;
* ``channels``: 1 (grey) or 3 (RGB); None keeps what is stored;
* ``limit``: at most this many images, evenly spaced over the set, so that sorted classes stay represented.

Nothing is downloaded, no file is changed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from jaxunlearn.io.captions import captions_of, find_metadata, has_texts, read_captions
from jaxunlearn.io.idx import read_idx
from jaxunlearn.io.pictures import PictureFile, decode_all, fit, list_pictures, stack_equal
from jaxunlearn.registry import unknown_name


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Attributes:
      images: uint8 [N, H, W, C], C 1 or 3.
      labels: int32 [N], or None.
      names: N different names; relative file paths for folders.
      source: where they came from, for people.
      files: N places of the files behind the images, or None where there is not one file per image.
      positions: int64 [N], position of each image in the whole source, which ``limit`` may have thinned out.
      available: number of images in the whole source.
      class_names: names of the labels, or None.
      captions: N texts, "" where an image has none; None where the source holds no texts.

    Raises:
      ValueError: the parts do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]
    source: str
    files: tuple[PictureFile | None, ...] | None = None
    positions: np.ndarray | None = None
    available: int | None = None
    class_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None

    def __post_init__(self):
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(
                f"{self.source}: images are {self.images.dtype} {shape}; allowed: uint8 [N, H, W, C] with N, H, W at "
                "least 1 and C 1 or 3"
            )
        count = shape[0]
        for name in ("labels", "names", "files", "positions", "captions"):
            part = getattr(self, name)
            if part is not None and len(part) != count:
                raise ValueError(f"{self.source}: {len(part)} {name} for {count} images; allowed: one per image")
        if len(set(self.names)) != count:
            seen: set[str] = set()
            twice = next(n for n in self.names if n in seen or seen.add(n))
            raise ValueError(f"{self.source}: the name {twice!r} appears twice; allowed: different names")
        if self.positions is None:
            object.__setattr__(self, "positions", np.arange(count))
        if self.available is None:
            object.__setattr__(self, "available", count)


def thinned(available: int, limit: int | None) -> np.ndarray:
    """int64 positions of at most ``limit`` images out of ``available``, evenly spaced from the first on.

    >>> thinned(10, 4).tolist()
    [0, 2, 5, 7]
    """
    if limit is None or limit >= available:
        return np.arange(available)
    return np.arange(limit) * available // limit


def _from_arrays(images, labels, names, source, size, channels, limit, class_names=None) -> ImageSet:
    """Common end of the readers of arrays: thin out, fit, wrap. images uint8 [N, H, W, C]."""
    chosen = thinned(len(images), limit)
    target = None if size is None else (size, size)
    picked = images[chosen]
    if (target is not None and picked.shape[1:3] != target) or channels not in (None, picked.shape[3]):
        picked = np.stack([fit(image, target, channels) for image in picked])
    return ImageSet(
        images=np.ascontiguousarray(picked),
        labels=None if labels is None else labels[chosen].astype(np.int32),
        names=tuple(names[i] for i in chosen),
        source=source,
        positions=chosen,
        available=len(images),
        class_names=class_names,
    )


def digits(*, size: int | None = None, channels: int | None = None, limit: int | None = None) -> ImageSet:
    """scikit-learn's ``load_digits``: 1797 grey 8x8 digits, labels 0..9; its values 0..16 become ``round(v * 255 / 16)``.

    Names are ``digits/0000`` ... ``digits/1796``.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    names = [f"digits/{i:04d}" for i in range(len(images))]
    classes = tuple(str(c) for c in data.target_names)
    return _from_arrays(images, data.target, names, "scikit-learn digits", size, channels, limit, classes)


def folder(
    *,
    path: str,
    captions: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> ImageSet:
    """A tree of picture files, or the same in a .zip file (also ``x.zip/train``), sorted by name.

    Args:
      path: the folder or archive.
      captions: a .jsonl file of texts, see :mod:`jaxunlearn.io.captions`; None: ``metadata.jsonl`` in the folder, if it is
        there and holds texts.
      size: see the module; needed where the pictures have different shapes.
      channels: see the module; None: 1 where all pictures are grey, else 3.
      limit: see the module; only the chosen files are read.

    Returns:
      An ImageSet whose names are paths relative to ``path``. Where every file lies exactly one folder below a common
      root, the name of that folder is the class: labels number the sorted class names. Otherwise labels are None.
      Captions are those of the chosen files.

    Raises:
      ValueError: no picture, unreadable pictures (they are named), different shapes without ``size``, or captions that
        cannot be read or belong to no picture.
    """
    files = list_pictures(path)
    all_names = list(files)
    chosen = thinned(len(all_names), limit)
    texts = _folder_captions(path, captions, all_names)
    names = [all_names[i] for i in chosen]
    picked = {name: files[name] for name in names}
    images = stack_equal(decode_all(picked, size, channels), names, f"folder {str(path)!r}")
    classes = _classes(all_names)
    class_names = None if classes is None else tuple(sorted(set(classes)))
    labels = None
    if classes is not None:
        number = {name: i for i, name in enumerate(class_names)}
        labels = np.array([number[classes[i]] for i in chosen], np.int32)
    return ImageSet(
        images,
        labels,
        tuple(names),
        f"folder {path}",
        files=tuple(picked.values()),
        positions=chosen,
        available=len(all_names),
        class_names=class_names,
        captions=None if texts is None else tuple(texts[i] for i in chosen),
    )


def _folder_captions(path: str, captions: str | None, names: list[str]) -> tuple[str, ...] | None:
    """The texts of all files of a folder, or None where there is no file of texts."""
    if captions is None:
        captions = find_metadata(path)
        if captions is None or not has_texts(captions):
            return None
    return captions_of(names, read_captions(captions), captions)


def _classes(names: list[str]) -> list[str] | None:
    """Class of each file: its folder, if all files are exactly one folder below their common root; else None."""
    parts = [name.split("/") for name in names]
    while min(len(p) for p in parts) > 2 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [p[0] for p in parts] if all(len(p) == 2 for p in parts) else None


def idx(
    *,
    path: str,
    labels_path: str | None = None,
    split: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> ImageSet:
    """MNIST's idx files, plain or .gz.

    Args:
      path: the file of images, or a folder with ``train-images-idx3-ubyte[.gz]`` or ``t10k-images-idx3-ubyte[.gz]``.
      labels_path: the file of labels; None: the file beside it with ``labels-idx1`` in its name, or no labels.
      split: "train" or "test", which of the two in a folder; None: train where both are there.
      size, channels, limit: see the module.

    Raises:
      ValueError: missing or damaged files, or different numbers of images and labels.
    """
    file = _idx_file(pathlib.Path(path), split)
    images = read_idx(file, 3)[..., None]
    labels_file = pathlib.Path(labels_path) if labels_path is not None else _idx_labels(file)
    labels = None if labels_file is None else read_idx(labels_file, 1)
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"{str(file)!r} has {len(images)} images, {str(labels_file)!r} has {len(labels)} labels; allowed: equal "
            "numbers; fix: name the matching file in data.labels_path"
        )
    stem = file.name.split("-")[0].split(".")[0]
    names = [f"{stem}/{i:05d}" for i in range(len(images))]
    return _from_arrays(images, labels, names, f"idx {file}", size, channels, limit)


def _idx_file(path: pathlib.Path, split: str | None) -> pathlib.Path:
    if path.is_file():
        return path
    prefixes = {None: ("train", "t10k"), "train": ("train",), "test": ("t10k",)}.get(split)
    if prefixes is None:
        raise ValueError(f"idx: split is {split!r}; allowed: 'train', 'test' or None")
    wanted = [f"{prefix}-images-idx3-ubyte{gz}" for prefix in prefixes for gz in ("", ".gz")]
    for name in wanted:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"idx: {str(path)!r} is neither a file nor a folder with one of {wanted}; fix: check data.path")


def _idx_labels(images_file: pathlib.Path) -> pathlib.Path | None:
    name = images_file.name.replace("images", "labels").replace("idx3", "idx1")
    if name == images_file.name:
        return None
    plain = name.removesuffix(".gz")
    return next(
        (images_file.with_name(n) for n in (name, plain, plain + ".gz") if images_file.with_name(n).is_file()), None
    )


def npz(*, path: str, size: int | None = None, channels: int | None = None, limit: int | None = None) -> ImageSet:
    """A NumPy .npz file with ``images`` uint8 [N, H, W] or [N, H, W, C], optionally ``labels`` [N] and ``names`` [N].

    Pickled objects are refused. Without ``names`` the images are called ``<file stem>/00000`` and so on.

    Raises:
      ValueError: unreadable file, missing or unknown arrays, or a type or shape that is not allowed.
    """
    where = f"npz file {str(path)!r}"
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = list(file.files)
            arrays = {name: file[name] for name in found if name in ("images", "labels", "names")}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{where} cannot be read ({error}); allowed: np.savez(path, images=uint8 [N,H,W] or [N,H,W,C], labels=int "
            "[N]) without pickled objects; fix: write it so"
        ) from error
    if "images" not in arrays:
        raise ValueError(f"{where} has no array 'images' (it has {found}); fix: np.savez(path, images=..., labels=...)")
    images = arrays["images"]
    if np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{where}: images are {images.dtype}; allowed: uint8 in 0..255, because the range of floats is not known; "
            "fix: save np.round(x * 255).astype(np.uint8) for x in [0, 1], np.round((x + 1) * 127.5).astype(np.uint8) for "
            "x in [-1, 1]"
        )
    if images.dtype != np.uint8:
        raise ValueError(f"{where}: images are {images.dtype}; allowed: uint8 in 0..255; fix: images.astype(np.uint8)")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        hint = "images.transpose(0, 2, 3, 1)" if images.ndim == 4 and images.shape[1] in (1, 3) else "images[..., :3]"
        raise ValueError(
            f"{where}: images have shape {images.shape}; allowed: [N, H, W] or channels-last [N, H, W, C] with C 1 or 3; "
            f"fix: for example {hint}"
        )
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(
            f"{where}: labels are {labels.dtype} {labels.shape}; allowed: whole numbers of shape ({len(images)},)"
        )
    names = arrays.get("names")
    if names is not None and (names.shape != (len(images),) or names.dtype.kind != "U"):
        raise ValueError(f"{where}: names are {names.dtype} {names.shape}; allowed: text of shape ({len(images)},)")
    stem = pathlib.Path(path).stem
    texts = [f"{stem}/{i:05d}" for i in range(len(images))] if names is None else [str(n) for n in names]
    return _from_arrays(images, labels, texts, f"npz {path}", size, channels, limit)


_TFDS_CONDITIONS = (
    "the tfds reader needs three things: (1) a set that is already prepared in the folder data.path, the one with "
    "dataset_info.json; (2) written with file_format='array_record'; (3) the packages of "
    "pip install tensorflow-datasets importlib_resources array_record"
)


def tfds(
    *,
    path: str,
    split: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> ImageSet:
    """A prepared TensorFlow Datasets folder in array_record format, read without TensorFlow and without a network.

    Args:
      path: the version folder of the set (it holds ``dataset_info.json``).
      split: name of the split, None for "train".
      size, channels, limit: see the module; images of one shape unless ``size`` is given.

    Returns:
      An ImageSet. The image is the feature "image", else the only feature of uint8 [H, W, C]; the label is the feature
      "label", if there is one.

    Raises:
      ValueError: one of the three conditions is not met (all are named), or the features do not fit.
    """
    where = pathlib.Path(path)
    info_file = where / "dataset_info.json"
    if not info_file.is_file():
        raise ValueError(f"tfds: {str(path)!r} has no dataset_info.json; {_TFDS_CONDITIONS}")
    file_format = json.loads(info_file.read_text()).get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise ValueError(f"tfds: the set in {str(path)!r} is in format {file_format!r}; {_TFDS_CONDITIONS}")
    packages = ("tensorflow_datasets", "importlib_resources", "array_record")
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ValueError(f"tfds: {missing} cannot be imported; {_TFDS_CONDITIONS}")
    import tensorflow_datasets

    _hide_gpus_from_tensorflow()
    builder = tensorflow_datasets.builder_from_directory(str(where))
    split = split or "train"
    if split not in builder.info.splits:
        raise ValueError(f"tfds: no split {split!r} in {str(path)!r}; allowed: {sorted(builder.info.splits)}")
    features = builder.info.features
    candidates = [k for k, f in features.items() if f.np_dtype == np.uint8 and f.shape and len(f.shape) == 3]
    key = "image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None
    if key is None:
        raise ValueError(f"tfds: {str(path)!r} has the features {list(features)}; allowed: one image (uint8 [H, W, C])")
    data = builder.as_data_source(split=split)
    chosen = thinned(len(data), limit)
    rows = [data[int(i)] for i in chosen]
    names = [f"{builder.name}/{split}/{i:05d}" for i in chosen]
    target = None if size is None else (size, size)
    images = stack_equal([fit(np.asarray(r[key]), target, channels) for r in rows], names, f"tfds {str(path)!r}")
    labels = np.array([r["label"] for r in rows], np.int32) if "label" in features else None
    classes = getattr(features["label"], "names", None) if "label" in features else None
    class_names = tuple(classes) if classes else None
    return ImageSet(images, labels, tuple(names), f"tfds {path}", None, chosen, len(data), class_names)


def _hide_gpus_from_tensorflow() -> None:
    """Where the caller has TensorFlow loaded, it would take the accelerator memory that JAX needs."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None:
        tensorflow.config.set_visible_devices([], "GPU")


DATASETS: dict[str, Callable[..., ImageSet]] = {
    "digits": digits,
    "folder": folder,
    "idx": idx,
    "npz": npz,
    "tfds": tfds,
}
"""Name -> reader. A new source is one function with keyword options and one line here."""


def unknown_dataset(name: object) -> str:
    """The sentence for a name that is not in :data:`DATASETS`.

    >>> unknown_dataset("digit")
    "unknown dataset 'digit'; did you mean 'digits'? known: digits, folder, idx, npz, tfds"
    """
    return unknown_name("dataset", name, DATASETS)


def options_of(name: str) -> dict[str, bool]:
    """Options of a reader -> whether it must be given.

    >>> options_of("folder")
    {'path': True, 'captions': False, 'size': False, 'channels': False, 'limit': False}
    """
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in parameters}
