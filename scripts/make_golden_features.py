"""Writes ``tests/golden/features_*.npz`` and ``resize.npz``: what torch and PIL make of small inputs.

    python scripts/make_golden_features.py          (needs torch and pillow, from the root of the repository)

The networks are the plain torch ones of ``tests/torch_features.py`` in narrow form; their weights are not stored but
drawn by :func:`state` from the legacy generator of numpy, whose stream never changes. Of resized images a crop, the mean
and the mean square of every channel are stored.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Mapping

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

SSCD_TINY = dict(blocks=(1, 2, 1, 1), width=4, dims=8)
SSCD_SHAPE, INCEPTION_SHAPE = (2, 48, 40, 3), (2, 83, 75, 3)
INCEPTION_DIVISOR = 16
RESIZED_FROM = (28, 32, 256, 512)


def state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights and statistics for torch names and shapes: kernels keep the size of activations, variances are positive."""
    rng = np.random.RandomState(seed)
    out = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if len(shape) > 1:
            value = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var"):
            value = rng.uniform(0.7, 1.5, shape)
        elif name.endswith("weight"):
            value = rng.uniform(0.6, 1.2, shape)
        else:
            value = 0.2 * rng.standard_normal(shape)
        out[name] = value.astype(np.float32)
    return out


def network_input(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Two unlike inputs [2,H,W,3], float32 in about [-1.5, 1.5]: noise, and a ramp with less noise."""
    rng = np.random.RandomState(seed)
    x = rng.uniform(-1.5, 1.5, shape)
    x[1] = 0.3 * x[1] + np.linspace(-1.2, 1.2, shape[2])[:, None] * np.array([1.0, -0.5, 0.2])
    return x.astype(np.float32)


def picture(size: int) -> np.ndarray:
    """A uint8 picture [size,size,3] with coarse and fine parts, different in every channel."""
    y, x = np.mgrid[0:size, 0:size] / size
    rng = np.random.RandomState(size)
    waves = [np.sin(2 * np.pi * ((2 + c) * x + 3 * y)) + np.sin(2 * np.pi * (size / 5) * (x - c * y)) for c in range(3)]
    noise = rng.uniform(-0.5, 0.5, (size, size, 3))
    return np.clip(127.5 + 70 * np.stack(waves, -1) + 60 * noise, 0, 255).astype(np.uint8)


def crop(resized: np.ndarray) -> dict[str, np.ndarray]:
    """What is stored of a resized picture [H,W,3]: a corner, a piece of the middle, statistics of the channels."""
    wide = resized.astype(np.float64)
    middle = resized.shape[0] // 2
    return {
        "corner": resized[:6, :6].astype(np.float32),
        "middle": resized[middle : middle + 6, -6:].astype(np.float32),
        "mean": wide.mean((0, 1)),
        "square": (wide**2).mean((0, 1)),
    }


def resized(size: int) -> dict[str, np.ndarray]:
    """The picture of this size as other programs resize it, in 0..255."""
    import torch
    from PIL import Image
    from torch.nn import functional as F

    image = picture(size)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].to(torch.float64)

    def interpolate(**options):
        out = F.interpolate(tensor, size=(299, 299), mode="bilinear", align_corners=False, **options)
        return out[0].permute(1, 2, 0).numpy()

    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    clean = [np.asarray(p.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for p in planes]
    pil = Image.fromarray(image)
    return {
        "clean": np.stack(clean, -1),
        "tf1": tensorflow1(image),
        "half_pixel": interpolate(),
        "antialias": interpolate(antialias=True),
        "short288": np.asarray(pil.resize((288, 288), Image.Resampling.BILINEAR)),
        "square320": np.asarray(pil.resize((320, 320), Image.Resampling.BILINEAR)),
    }


def tensorflow1(image: np.ndarray, out: int = 299) -> np.ndarray:
    """Bilinear without half pixels, pixel by pixel: output i reads at ``i * in / out``."""
    size = len(image)
    result = np.empty((out, out, 3))
    for i in range(out):
        y = i * size / out
        y0, y1 = int(y), min(int(y) + 1, size - 1)
        for j in range(out):
            x = j * size / out
            x0, x1 = int(x), min(int(x) + 1, size - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            result[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return result


def main() -> None:
    """Runs torch and PIL and writes the three files."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.torch_features import TorchInception, TorchSSCD

    def prepared(model, seed):
        values = state({k: v.shape for k, v in model.state_dict().items() if v.ndim}, seed)
        model.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()}, strict=False)
        return model.eval().to(torch.float64)

    def run(model, shape, seed):
        x = network_input(shape, seed)
        with torch.no_grad():
            return model(torch.from_numpy(x).permute(0, 3, 1, 2).to(torch.float64))

    out = run(prepared(TorchSSCD(**SSCD_TINY), 1), SSCD_SHAPE, 11)
    np.savez_compressed(GOLDEN / "features_sscd.npz", out=out.numpy(), torch=torch.__version__)
    out = run(prepared(TorchInception(INCEPTION_DIVISOR), 2), INCEPTION_SHAPE, 12)
    np.savez_compressed(
        GOLDEN / "features_inception.npz",
        features=out[0].numpy(),
        logits=out[1].numpy()[:, ::40],
        torch=torch.__version__,
    )
    arrays = {}
    for size in RESIZED_FROM:
        for convention, values in resized(size).items():
            arrays |= {f"{convention}/{size}/{name}": value for name, value in crop(values).items()}
    np.savez_compressed(GOLDEN / "resize.npz", **arrays)


if __name__ == "__main__":
    main()
