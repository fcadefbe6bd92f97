"""Published weights of feature networks -> the files that the evaluation reads. Nothing is downloaded.

    python scripts/convert_weights.py NAME FILE [--out FOLDER] [--allow-unpinned]

| NAME         | FILE                              | from                                           | for              |
|--------------|-----------------------------------|------------------------------------------------|------------------|
| sscd         | sscd_disc_mixup.torchscript.pt    | github.com/facebookresearch/sscd-copy-detection | sscd, copy_sscd  |
| inception    | pt_inception-2015-12-05-6726825d.pth | github.com/mseitzer/pytorch-fid (releases)   | fid, kid, prdc   |
| clip_rn50    | RN50.pt                           | github.com/openai/CLIP                         | clip_iqa         |
| clip_vit_l14 | ViT-L-14.pt                       | github.com/openai/CLIP                         | aesthetic        |
| aesthetic    | sac+logos+ava1-l14-linearMSE.pth  | github.com/christophschuhmann/improved-aesthetic-predictor | aesthetic |

Writes FOLDER/NAME.safetensors and FOLDER/NAME.json; FOLDER is $JAXUNLEARN_WEIGHTS if --out is not given. The fingerprint
of FILE is checked first. A file whose fingerprint is not known (sscd_disc_mixup.torchvision.pt has none that was ever
published) needs --allow-unpinned here, and its name in eval.weights.allow_unpinned when it is used.

Neither torch nor any code in FILE is run: the tensors are read from the archive. Only if the names in a file of SSCD are
not those of torchvision, torch runs the file once on a drawn image, to prove that the tensors were matched rightly. The
same FILE gives the same bytes. Exit codes: 0 done, 2 refused, with one line for every problem.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS, FOLDER_VARIABLE, save_weights
from jaxunlearn.io.hashing import file_sha256
from jaxunlearn.io.torch_pickle import read_any_torch_file
from jaxunlearn.metrics.resize import sscd_inputs
from jaxunlearn.models.features import clip_prompts, clip_resnet, clip_vit, inception, sscd
from jaxunlearn.registry import look_up

Tensors = dict[str, np.ndarray]
AGREEMENT = 1e-4
"""Largest difference of two unit descriptors of SSCD that run the same weights."""


def convert_sscd(state: Mapping[str, np.ndarray], path: pathlib.Path) -> Tensors:
    """SSCD under torchvision's names, or under others if the file itself proves the order of its tensors.

    Raises:
      ValueError: other tensors, or torch is needed and missing, or the descriptors disagree.
    """
    try:
        return sscd.to_flat(sscd.from_state_dict(state))
    except ValueError as error:
        try:
            params = sscd.from_state_dict(sscd.by_order(state))
        except ValueError:
            raise error from None
    difference = _descriptor_difference(path, params)
    if difference > AGREEMENT:
        raise ValueError(
            f"{path.name}: its tensors have other names than torchvision's, and in their order they give other descriptors "
            f"(difference {difference:.1e}); convert sscd_disc_mixup.torchvision.pt"
        )
    return sscd.to_flat(params)


def _descriptor_difference(path: pathlib.Path, params) -> float:
    """Largest difference between the descriptors of the TorchScript file and of the parameters, on one drawn image."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path.name}: its tensors have other names than torchvision's; to prove which is which, torch must run the "
            "file: pip install torch, or convert sscd_disc_mixup.torchvision.pt"
        ) from None
    image = np.random.RandomState(0).randint(0, 256, (1, 320, 320, 3)).astype(np.uint8)
    inputs = sscd_inputs(image)
    normalised = ((inputs - np.float32(sscd.MEAN)) / np.float32(sscd.STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        theirs = torch.jit.load(str(path), map_location="cpu").eval()(torch.from_numpy(normalised.copy())).numpy()
    return float(np.abs(np.asarray(sscd.embed(params, inputs)) - theirs).max())


def convert_inception(state: Mapping[str, np.ndarray], path: pathlib.Path) -> Tensors:
    """The FID's Inception-V3.

    Raises:
      ValueError: other tensors.
    """
    del path
    return inception.to_flat(inception.from_state_dict(state))


def convert_clip_rn50(
    state: Mapping[str, np.ndarray],
    path: pathlib.Path,
    config: clip_resnet.CLIPResNetConfig = clip_resnet.RN50,
    text_head_dim: int = clip_prompts.HEAD_DIM,
) -> Tensors:
    """The image tower of CLIP RN50, and the text vectors of CLIP-IQA's prompts as ``prompts`` [2,dims].

    Raises:
      ValueError: other tensors.
    """
    del path
    prompts = clip_prompts.prompt_vectors(state, text_head_dim)
    return clip_resnet.to_flat(clip_resnet.from_state_dict(state, config)) | {"prompts": prompts}


def convert_clip_vit_l14(
    state: Mapping[str, np.ndarray], path: pathlib.Path, config: clip_vit.CLIPViTConfig = clip_vit.VIT_L14
) -> Tensors:
    """The image tower of CLIP ViT-L/14.

    Raises:
      ValueError: other tensors.
    """
    del path
    return clip_vit.to_flat(clip_vit.from_state_dict(state, config))


def convert_aesthetic(state: Mapping[str, np.ndarray], path: pathlib.Path) -> Tensors:
    """The aesthetic predictor as one affine map: its five linear layers have nothing between them at inference.

    Raises:
      ValueError: tensors other than weights and biases of consecutive layers from 768 numbers to 1.
    """
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"layers\.(\d+)\.(weight|bias)", name)
        if match is None:
            raise ValueError(f"{path.name}: unexpected: {name} {tensor.shape}; is it the right file?")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor.astype(np.float64)
    weight, bias = np.eye(clip_vit.VIT_L14.dims), np.zeros(clip_vit.VIT_L14.dims)
    for index, layer in sorted(layers.items()):
        shapes = {name: tensor.shape for name, tensor in layer.items()}
        rows = shapes.get("bias", (0,))[0]
        if shapes != {"weight": (rows, len(bias)), "bias": (rows,)}:
            raise ValueError(f"{path.name}: layer {index} has the shapes {shapes} after {len(bias)} numbers")
        weight, bias = layer["weight"] @ weight, layer["weight"] @ bias + layer["bias"]
    if len(bias) != 1:
        raise ValueError(f"{path.name}: the layers end in {len(bias)} numbers, not in one score")
    return {"weight": weight[0].astype(np.float32), "bias": bias.astype(np.float32)}


CONVERTERS: dict[str, Callable[..., Tensors]] = {
    "sscd": convert_sscd,
    "inception": convert_inception,
    "clip_rn50": convert_clip_rn50,
    "clip_vit_l14": convert_clip_vit_l14,
    "aesthetic": convert_aesthetic,
}
"""Name in FEATURE_WEIGHTS -> conversion of a state dict."""


def narrow(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Float16 for those tensors that hold float16 values only, as most of CLIP's do: half the size, the same numbers."""
    out = {}
    for name, values in tensors.items():
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        out[name] = half if np.array_equal(half.astype(np.float32), values) else values
    return out


def convert(name: str, file: str, out: str | None, allow_unpinned: bool) -> None:
    """Converts one file and prints both fingerprints.

    Raises:
      ValueError: an unknown name, an unknown file, or one that does not hold the network.
      OSError: a file cannot be read or written.
    """
    source = look_up("weights", name, FEATURE_WEIGHTS)
    folder = out or os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise ValueError(f"no folder to write to; give --out FOLDER, or set {FOLDER_VARIABLE}")
    path = pathlib.Path(file).expanduser()
    digest = file_sha256(path)
    known = {item.sha256: item for item in source.files if item.sha256 is not None}
    print(f"source    {path.name} sha256 {digest}")
    if digest not in known and not allow_unpinned:
        wanted = "; ".join(f"{item.name} {sha256}" for sha256, item in known.items())
        raise ValueError(
            f"{path.name}: is none of the known files ({wanted}); copy it again from {source.home}, or say that you trust "
            "it with --allow-unpinned"
        )
    tensors = narrow(CONVERTERS[name](read_any_torch_file(path), path))
    written, converted = save_weights(folder, name, tensors, path.name, digest)
    print(f"converted {written} sha256 {converted}")
    print(f"          {len(tensors)} arrays, {sum(values.size for values in tensors.values())} numbers")
    if digest not in known:
        print(f"note: the source is not pinned; using it needs --eval.weights.allow_unpinned={name}")


def main(argv: list[str] | None = None) -> int:
    """Runs the conversion; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=", ".join(CONVERTERS))
    parser.add_argument("file", metavar="FILE", help="the published file")
    parser.add_argument("--out", metavar="FOLDER", help=f"where to write; default ${FOLDER_VARIABLE}")
    parser.add_argument("--allow-unpinned", action="store_true", help="take a file whose fingerprint is not known")
    args = parser.parse_args(argv)
    try:
        convert(args.name, args.file, args.out, args.allow_unpinned)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
