"""Models between diffusers folders and Flax parameter trees, and a check of the numbers against torch.

    python scripts/convert_diffusers.py to-jax FOLDER OUT [--variant fp16]
    python scripts/convert_diffusers.py to-diffusers JAX_FOLDER SOURCE_FOLDER OUT
    python scripts/convert_diffusers.py --check FOLDER

to-jax writes OUT/unet, and OUT/vae and OUT/text_encoder where the pipeline has them; in each a copy of config.json and
params.safetensors: the float32 parameter tree, paths joined by "/". Neither torch nor diffusers is needed. Three lines read
them back:

    params = flax.traverse_util.unflatten_dict(safetensors.numpy.load_file("OUT/unet/params.safetensors"), sep="/")
    config = UNet2DConditionConfig.from_dict(json.load(open("OUT/unet/config.json")))
    eps = UNet2DCondition(config).apply({"params": params}, x_t, t, text)   # UNet2D(config).apply(..., x_t, t) without text

(the classes are those of jaxunlearn.models.unet2d_condition and unet2d, autoencoder_kl, clip_text). x_t is [B,H,W,C].

to-diffusers writes a folder like SOURCE_FOLDER whose weights are those of JAX_FOLDER, in the dtypes, names and files of the
source. Components that are not in JAX_FOLDER, or are there unchanged, are copied byte for byte.

--check runs every component here and in torch (diffusers, transformers) on the same random inputs, and prints the largest
difference. A component passes if it is at most 2e-5 of the output's largest value, or of 1 where that is larger.

FOLDER may be hf://owner/name, see the README. Exit codes: 0 done (--check: all pass), 1 a component fails the check, 2
refused, with one line for every problem. Nothing is ever overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import sys
import uuid

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxunlearn.io import diffusers as folders
from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.io.safetensors_header import read_header
from jaxunlearn.io.weights import DTYPES, save_tensors
from jaxunlearn.models.architectures import architecture_of

NAMES = ("unet", "vae", "text_encoder")
PARAMS = "params.safetensors"
TOLERANCE = 2e-5


def parts_of(model: folders.DiffusersModel) -> dict[str, tuple]:
    """Component -> (config, parameters, its folder, its weight files)."""
    unet = next(iter(model.source.unets))
    parts = {"unet": (model.config, model.params, model.source.path / unet, model.source.unets[unet])}
    for part in (model.vae, model.text_encoder):
        if part is not None:
            parts[part.name] = (part.config, part.params, model.source.path / part.name, part.files)
    return parts


def to_jax(source: str, out: str, variant: str | None) -> None:
    """Writes the parameter trees of a folder.

    Raises:
      ValueError: the folder cannot be loaded, or ``out`` exists.
    """
    target = _new_path(out)
    model = folders.load(source, variant, default_scheduler={})
    if target.resolve().is_relative_to(model.source.path):
        raise ValueError(f"{target} lies inside {model.source.path}, which is never written to; give another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        for name, (_, params, folder, _) in parts_of(model).items():
            (partial / name).mkdir(parents=True)
            shutil.copyfile(folder / "config.json", partial / name / "config.json")
            leaves = jax.tree_util.tree_flatten_with_path(params)[0]
            tensors = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
            save_tensors(partial / name / PARAMS, tensors, None)
            print(f"{name}: {len(tensors)} arrays, {sum(leaf.size for leaf in tensors.values())} parameters")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _say(model.notes)


def to_diffusers(trees: str, source: str, out: str, variant: str | None) -> None:
    """Writes a folder like ``source`` with the parameters of ``trees``.

    Raises:
      ValueError: one line for every problem with one of the folders, or ``out`` exists.
    """
    _new_path(out)
    root = pathlib.Path(trees)
    found = [name for name in NAMES if (root / name / PARAMS).is_file()]
    if not found:
        raise ValueError(f"{root} holds no {' or '.join(f'{name}/{PARAMS}' for name in NAMES)}; make it with to-jax")
    model = folders.load(source, variant, default_scheduler={})
    problems = []
    for name in found:
        try:
            model = _with_tree(model, name, _read_tree(root / name / PARAMS))
        except ValueError as error:
            problems += [f"{name}/{PARAMS}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ValueError("\n".join(problems))
    _say([*model.notes, *folders.save(out, model)])


def _read_tree(path: pathlib.Path) -> dict:
    """The nested tree of a file with paths as names, float32."""
    from safetensors.numpy import load_file

    entries, _ = read_header(path)
    wrong = [f"{name} is {entry.dtype}; allowed: {', '.join(DTYPES)}" for name, entry in entries.items()]
    wrong = [line for line, entry in zip(wrong, entries.values()) if entry.dtype not in DTYPES]
    if wrong:
        raise ValueError("\n".join(wrong))
    tree: dict = {}
    for name, values in load_file(path).items():
        *above, last = name.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: a part of this path is an array; give the tree that to-jax writes")
        if last in node:
            raise ValueError(f"{name}: is an array and a part of other paths; give the tree that to-jax writes")
        node[last] = np.asarray(values, np.float32)
    return tree


def _with_tree(model: folders.DiffusersModel, name: str, tree: dict) -> folders.DiffusersModel:
    if name == "unet":
        return model.with_params(tree)
    part = getattr(model, name)
    if part is None:
        raise ValueError("the source folder has no such component; remove it, or give its own source")
    changed = part.with_params(tree)
    return model if tree_sha256(tree) == part.sha256 else dataclasses.replace(model, **{name: changed})


def check(source: str, variant: str | None) -> bool:
    """Prints the table of parity; whether every component passes.

    Raises:
      ValueError: the folder cannot be loaded, or a package is missing.
    """
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--check needs {', '.join(missing)}; install them: pip install 'jaxunlearn[parity]'")
    model = folders.load(source, variant, default_scheduler={})
    print(f"{'component':14}{'tensors':>9}{'parameters':>14}{'difference':>13}{'scale':>10}{'relative':>11}  result")
    passed = True
    for name, (config, params, folder, files) in parts_of(model).items():
        variant_read = (
            variant if any(f".{variant}." in file or f".{variant}-" in file for file in files.metadata) else None
        )
        pairs = _outputs(name, config, params, folder, variant_read)
        scale = max(max(1.0, float(np.abs(theirs).max())) for _, theirs in pairs)
        difference = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
        relative = max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs)
        good = relative <= TOLERANCE
        passed &= good
        leaves = jax.tree.leaves(params)
        count = sum(leaf.size for leaf in leaves)
        numbers = f"{len(leaves):9}{count:14}{difference:13.2e}{scale:10.3g}{relative:11.2e}"
        print(f"{name:14}{numbers}  {'pass' if good else 'FAIL'}")
    return passed


def _outputs(name: str, config, params, folder: pathlib.Path, variant: str | None) -> list[tuple]:
    """Pairs (ours, theirs) of a component's outputs for the same inputs, channels last."""
    import torch

    rng = np.random.default_rng(0)
    module = architecture_of(config).module(config)

    def ours(*args, method=None):
        run = jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=method))
        with jax.default_matmul_precision("highest"):
            return jax.tree.map(np.asarray, run(params, *args))

    def torch_image(x):
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())

    def image(tensor):
        return tensor.numpy().transpose(0, 2, 3, 1)

    theirs = _torch_model(name, config, folder, variant)
    with torch.no_grad():
        if name == "text_encoder":
            ids = rng.integers(0, config.vocab_size, (2, config.max_position_embeddings)).astype(np.int32)
            return [(ours(ids), theirs(torch.from_numpy(ids).long()).last_hidden_state.numpy())]
        size = config.size_divisor * max(2, 8 // config.size_divisor)
        x = rng.standard_normal((2, size, size, config.in_channels)).astype(np.float32)
        if name == "vae":
            moments = ours(x, method=module.encode)
            wanted = theirs.encode(torch_image(x)).latent_dist
            z = rng.standard_normal((2, 4, 4, config.latent_channels)).astype(np.float32)
            decoded = ours(z, method=module.decode), image(theirs.decode(torch_image(z)).sample)
            return [*zip(moments, (image(wanted.mean), image(wanted.logvar))), decoded]
        t = np.array([3, 700])
        args, more = [], {}
        if hasattr(config, "cross_attention_dim"):
            args = [rng.standard_normal((2, 7, config.cross_attention_dim)).astype(np.float32)]
        if config.has_classes:
            labels = rng.integers(0, config.num_class_embeds or 10, 2)
            identity = config.class_embed_type == "identity"
            labels = rng.standard_normal((2, config.time_dim)).astype(np.float32) if identity else labels
            more = {"class_labels": torch.from_numpy(labels)}
        wanted = theirs(torch_image(x), torch.from_numpy(t), *map(torch.from_numpy, args), **more).sample
        return [(ours(x, t, *args, *(labels for _ in more)), image(wanted))]


def _torch_model(name: str, config, folder: pathlib.Path, variant: str | None):
    """The same component in torch, float32."""
    import diffusers
    import torch
    import transformers

    names = {"vae": diffusers.AutoencoderKL, "text_encoder": transformers.CLIPTextModel}
    unet = diffusers.UNet2DConditionModel if hasattr(config, "cross_attention_dim") else diffusers.UNet2DModel
    return names.get(name, unet).from_pretrained(folder, variant=variant).to(torch.float32).eval()


def _new_path(out: str) -> pathlib.Path:
    target = pathlib.Path(out).expanduser()
    if os.path.lexists(target):
        raise ValueError(f"{target} exists already; nothing is overwritten: give another path or move it away")
    return target


def _say(notes) -> None:
    for note in notes:
        print(f"note: {note}")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="FOLDER", help="compare a folder's components with torch")
    parser.add_argument("--variant", help="of the weight files, for example fp16")
    commands = parser.add_subparsers(dest="command", metavar="to-jax | to-diffusers")
    forth = commands.add_parser("to-jax", help="diffusers folder -> parameter trees")
    back = commands.add_parser("to-diffusers", help="parameter trees -> diffusers folder")
    for command, names in ((forth, ("FOLDER", "OUT")), (back, ("JAX_FOLDER", "SOURCE_FOLDER", "OUT"))):
        for name in names:
            command.add_argument(name)
        command.add_argument("--variant", default=argparse.SUPPRESS, help="of the weight files, for example fp16")
    args = parser.parse_args(argv)
    if (args.command is None) == (args.check is None):
        parser.error("give one of to-jax, to-diffusers, --check FOLDER; --help explains them")
    try:
        if args.check is not None:
            return 0 if check(args.check, args.variant) else 1
        if args.command == "to-jax":
            to_jax(args.FOLDER, args.OUT, args.variant)
        else:
            to_diffusers(args.JAX_FOLDER, args.SOURCE_FOLDER, args.OUT, args.variant)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
