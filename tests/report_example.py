"""A small unlearning report with real models, pictures and a key, made without an evaluation."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from eval.records import entry, missing
from jaxunlearn.io import diffusers
from jaxunlearn.io.forget import Split
from jaxunlearn.io.hashing import file_sha256, tree_sha256
from jaxunlearn.io.manifest import commitment, keep_manifest, load_or_create_key
from jaxunlearn.io.pictures import PictureFile
from jaxunlearn.io.report import NOTICE, TITLE, canonical_sha256, write_report
from jaxunlearn.io.report_checks import alphas_sha256
from jaxunlearn.metrics.statistics import Interval, clopper_pearson, clopper_pearson_upper
from jaxunlearn.metrics.verdicts import THRESHOLDS, judge, overall
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d import UNet2DConfig

UNET = UNet2DConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=2,
    add_attention=False,
)


class Example(NamedTuple):
    """A report on disk with everything that it can be checked against."""

    root: pathlib.Path
    path: pathlib.Path
    report: dict
    key: bytes

    @property
    def flags(self) -> list[str]:
        """The whole command line of a check."""
        root = self.root
        pairs = {"model": "models/unlearned", "base": "models/base", "forget": "forget", "key": "commitment.key"}
        return [str(self.path), *(f"--{name}={root / below}" for name, below in pairs.items())]


def rate(count: int, n: int = 4000):
    """An entry of ``copy_rate``."""
    protocol = {"count": count, "upper_one_sided": clopper_pearson_upper(count, n).high}
    return entry("copy_rate", count / n, n=n, ci=clopper_pearson(count, n), protocol=protocol)


def column(*, copies=0, loss_forget=0.5, loss_keep=0.3, fd=5.0, injection=0.4):
    """Entries of one model."""
    interval = Interval(loss_keep - 0.01, loss_keep + 0.01, 0.95, "Student t")
    return [
        rate(copies),
        entry("injection_distance", injection, n=1, protocol={"t": 5}),
        entry("loss_forget", loss_forget, n=1, protocol={"t": 5}),
        entry("loss_keep", loss_keep, n=50, ci=interval, protocol={"t": 5}),
        entry("fd_pixel", fd, n=4000),
        missing("fd_classifier", "the data has no labels, so no classifier can be trained"),
    ]


def make_columns(retrained: int = 0, **after):
    """Before, after, so many retrained models, control."""
    columns = {"before": column(copies=200, loss_forget=0.1, injection=0.01), "after": column(**after)}
    for i in range(retrained):
        columns["retrained" if not i else f"retrained_{i + 1}"] = column(
            loss_forget=0.5 + 0.01 * i, injection=0.4 + 0.01 * i
        )
    return {**columns, "control": []}


def make_report(root: pathlib.Path, *, retrained: int = 0, columns=None, seed: int = 0, **changes) -> Example:
    """Models, pictures, key and report below ``root``."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    (root / "forget").mkdir(parents=True)
    names, files = [f"{i}.png" for i in range(12)], [None] * 12
    for i in (0, 1):
        Image.fromarray(images[i, :, :, 0]).save(root / "forget" / names[i])
        files[i] = PictureFile(str(root / "forget" / names[i]))
    split = Split(images, None, tuple(names), np.arange(2, 10), np.arange(2), np.arange(10, 12), files=tuple(files))
    key, kept = load_or_create_key(root), keep_manifest(split)
    models = {}
    for place, name in enumerate(["base", "unlearned", *(f"retrained{i or ''}" for i in range(retrained))]):
        folder = root / "models" / name
        scheduler = {"num_train_timesteps": 50, "beta_end": 0.2}
        model = diffusers.new(UNET, init_params(UNET, seed * 10 + place), scheduler)
        diffusers.save(folder, model)
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        models[name] = {
            "path": f"models/{name}",
            "format": "diffusers",
            "variant": None,
            "tree_sha256": tree_sha256(model.params),
            "params": model.num_params,
            "ema": False,
            "files": [
                {"path": p.relative_to(folder).as_posix(), "sha256": file_sha256(p), "bytes": p.stat().st_size}
                for p in found
            ],
        }
    (root / "report.html").write_text("<p>a page")
    columns = make_columns(retrained) if columns is None else columns
    references = [name for name in columns if name.startswith("retrained")]
    judged = judge(columns, {})
    config = {"method": "siss", "lam": 0.5}
    report = {
        "schema_version": 1,
        "title": TITLE,
        "notice": NOTICE,
        "report_id": "00000000-0000-0000-0000-000000000000",
        "request_id": None,
        "created_utc": "2026-01-01T00:00:00+00:00",
        "headline": "A headline.",
        "tool": {"name": "jaxunlearn", "version": "0", "git": None, "packages": {}, "python": "3", "devices": "cpu"},
        "request": dict.fromkeys(("received_utc", "completed_utc", "operator", "basis")),
        "config_sha256": "0" * 64,
        "base_model": models["base"],
        "result_model": models["unlearned"],
        "schedule": {"T": 50, "alphas_cumprod_sha256": alphas_sha256(model.schedule.alphas_cumprod)},
        "lineage": [{"copy": "model", "path": "models/base", "action": "kept", "reason": "the original"}],
        "forget_set": {**commitment(split, key), "unique": 2, "size": [8, 8, 1], "share_of_training_set": 0.2},
        "keep_set": {
            "rule": "all the others",
            "n": 8,
            "source": "random",
            "hash_of_hashes": kept["hash_of_hashes"],
            "disjoint": kept["disjoint"],
            "access": "full",
        },
        "held_out_set": {"n": 2, "hash_of_hashes": kept["held_out"]["hash_of_hashes"]},
        "method": {
            "name": "siss",
            "objective": "siss",
            "combiner": "relative_norm",
            "config": config,
            "config_sha256": canonical_sha256(config),
            "steps": 10,
            "stop_rule": "a fixed number of steps",
            "collapse": None,
            "seed": seed,
            "precision": "float32",
            "wall_s": 1.0,
        },
        "selection": None,
        "reference": {
            "kind": "retrained" if references else "none",
            "models": [
                {**models["base"], "model": name, "seed": i, "steps": 10, "same_recipe": True}
                for i, name in enumerate(references)
            ],
        },
        "autoencoder": None,
        "text": None,
        "calibration": {},
        "settings": {"num_samples": 4000, "sampler": "ddim", "sampling_steps": 5, "loss_t": [5]},
        "evaluation": {
            "preset": None,
            "before": columns["before"],
            "after": columns["after"],
            "reference": [{"model": name, **item} for name in references for item in columns[name]],
            "control": columns["control"],
            "failed": {},
        },
        "robustness": {"relearn": {"status": "not_run", "reason": "no"}, "benign": None},
        "thresholds": THRESHOLDS,
        "verdicts": judged,
        "overall": overall(judged, bool(references)),
        "not_tested": ["Relearning."],
        "limitations": ["It is an example."],
        "timings_seconds": {"total": 1.0},
        "files": {"report.html": file_sha256(root / "report.html")},
        "record_sha256": "",
        "signature": None,
        **changes,
    }
    path = root / "unlearning_report.json"
    write_report(path, report)
    import json

    return Example(root, path, json.loads(path.read_text()), key)
