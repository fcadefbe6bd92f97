"""Reads a whole pipeline folder and reports all of its problems together."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxunlearn.io.components import COMPANIONS, UNETS, Component, config_of, read_params, stem_of
from jaxunlearn.io.diffusers_export import Source
from jaxunlearn.io.json_files import read_object
from jaxunlearn.io.pipeline_index import PipelineIndex, read_index
from jaxunlearn.io.schedulers import read_scheduler
from jaxunlearn.io.weights import inspect_weights, variants_in
from jaxunlearn.types import PyTree


def read_pipeline(
    root: pathlib.Path, variant: str | None, default_scheduler: Mapping[str, Any] | None, companions: bool
) -> dict[str, Any]:
    """The fields of a :class:`jaxunlearn.io.diffusers.DiffusersModel`; see :func:`jaxunlearn.io.diffusers.load`.

    Raises:
      ValueError: one line for every problem of every component.
    """
    reader = _Reader(root, variant)
    fields = reader.fields(default_scheduler, companions)
    if fields is None:
        count = f"{len(reader.problems)} problem{'s' if len(reader.problems) > 1 else ''}"
        raise ValueError(f"{root} cannot be loaded ({count}):\n" + "\n".join(reader.problems))
    return fields


class _Reader:
    """Reads one folder and collects all of its problems."""

    def __init__(self, root: pathlib.Path, variant: str | None):
        self.root, self.variant = root, variant
        self.problems: list[str] = []
        self.notes: list[str] = []

    def fields(self, default_scheduler: Mapping[str, Any] | None, companions: bool) -> dict[str, Any] | None:
        """The fields of the model; None if there are problems."""
        has_index = os.path.lexists(self.root / "model_index.json")
        content = self.collect("", read_object, self.root, "model_index.json") if has_index else None
        index = PipelineIndex()
        if content is not None or not has_index:
            index = self.collect("model_index.json", read_index, self.root, content) or index
        folders = _unet_folders(self.root)
        if not folders:
            self.problems.append(
                "config.json: neither the folder nor its unet/ has one; give a folder that diffusers' save_pretrained"
                " wrote"
            )
        found = {folder: self.described(folder, UNETS, index.unet, self.variant) for folder in folders}
        self.same_architecture(found)
        scheduler_json, read = self.scheduler(index, default_scheduler)
        others = [name for name in COMPANIONS if companions and name in index.parts]
        described = {name: self.described(name, (COMPANIONS[name],), None, self.best_variant(name)) for name in others}
        tokenizer = None
        if companions and "tokenizer" in index.parts:
            tokenizer = self.tokenizer()
        elif "text_encoder" in others:
            self.problems.append("tokenizer: is not there, but the text encoder needs it; copy it as well")
        unet = next(iter(found.values()), None)
        self.fits(unet and unet[0], {name: config for name, (config, _) in described.items()}, tokenizer)
        params = {name: self.params(name, *pair) for name, pair in described.items()}
        unet_params = self.params(folders[0], *unet) if folders else None
        if self.problems:
            return None

        if len(folders) == 2:
            self.notes.append("the weights are those of unet_ema; an export writes them into unet_ema and unet")
        self.notes += read.notes
        files = {folder: pair[1] for folder, pair in found.items()}
        names = [name for name in _json_names(folders) if (self.root / name).is_file()]
        json_files = {name: (self.root / name).read_bytes() for name in names}
        source = Source(self.root.resolve(), self.variant, files, json_files, index.parts)
        parts = {name: Component(name, described[name][0], params[name], described[name][1]) for name in others}
        return dict(
            config=unet[0],
            params=unet_params,
            schedule=read.schedule,
            sampler=read.sampler,
            prediction_type=read.prediction_type,
            scheduler_json=scheduler_json,
            source=source,
            notes=tuple(self.notes),
            vae=parts.get("vae"),
            text_encoder=parts.get("text_encoder"),
            tokenizer=tokenizer,
        )

    def collect(self, where: str, function: Any, *args: Any) -> Any:
        """``function(*args)``; its ValueError becomes lines of ``problems``, and the result None."""
        prefix = f"{where}: " if where else ""
        try:
            return function(*args)
        except ValueError as error:
            self.problems.extend(f"{prefix}{line}" for line in str(error).splitlines())
            return None

    def described(self, folder: str, allowed: tuple[str, ...], default: str | None, variant: str | None) -> tuple:
        """Config and weight files of a component, each None after a problem."""
        name = f"{folder}/config.json".lstrip("/")
        content = self.collect("", read_object, self.root, name)
        config = None if content is None else self.collect(name, config_of, content, allowed, default)
        return config, self.collect(folder, inspect_weights, self.root / folder, variant, stem_of(folder))

    def params(self, folder: str, config: Any, files: Any) -> PyTree:
        """Parameters of a component, None after a problem."""
        if config is None or files is None:
            return None
        if files.pickled:
            self.notes.append(
                f"{folder or 'unet'}: the weights were read from pickled files ({next(iter(files.metadata))})"
            )
        return self.collect(folder, read_params, self.root / folder, files, config)

    def best_variant(self, name: str) -> str | None:
        """The variant of a companion: the one asked for if it is there, else the plain files."""
        folder = self.root / name
        present = variants_in((file.name for file in folder.iterdir()), stem_of(name)) if folder.is_dir() else []
        if self.variant is None or self.variant in present or "" not in present:
            return self.variant
        self.notes.append(f"{name}: has no variant {self.variant!r}; its plain weights were read")
        return None

    def tokenizer(self) -> Any:
        from jaxunlearn.io.tokenizer import load_tokenizer

        return self.collect("tokenizer", load_tokenizer, self.root / "tokenizer")

    def same_architecture(self, found: Mapping[str, tuple]) -> None:
        """``unet`` and ``unet_ema`` must be the same model."""
        configs, files = ([pair[i] for pair in found.values()] for i in (0, 1))
        if len(found) == 2 and None not in configs and configs[0] != configs[1]:
            self.problems.append(
                "unet_ema/config.json: another architecture than unet/config.json; remove one of the folders"
            )
        if len(found) == 2 and None not in files and set(files[0].weight_map) != set(files[1].weight_map):
            self.problems.append("unet_ema: other tensor names than in unet; remove one of the folders")

    def fits(self, unet: Any, companions: Mapping[str, Any], tokenizer: Any) -> None:
        """Each component must give what the next one takes: token ids, text embeddings, latents."""
        vae, text = companions.get("vae"), companions.get("text_encoder")
        if tokenizer is not None and text is not None:
            for key, limit in (("model_max_length", text.max_position_embeddings), ("vocab_size", text.vocab_size)):
                if getattr(tokenizer, key) > limit:
                    self.problems.append(
                        f"tokenizer: {key}: {getattr(tokenizer, key)} is not supported; allowed: at most {limit}, which the"
                        " text encoder takes; copy both from one model"
                    )
        if vae is not None and unet is not None:
            for key in ("in_channels", "out_channels"):
                if getattr(unet, key) != vae.latent_channels:
                    self.problems.append(
                        f"unet/config.json: {key}: {getattr(unet, key)} is not supported; allowed: {vae.latent_channels},"
                        " the latent_channels of the vae; use a model without further inputs, or its own vae"
                    )
        width = getattr(unet, "cross_attention_dim", None)
        if text is not None and type(width) is int and width != text.hidden_size:
            self.problems.append(
                f"unet/config.json: cross_attention_dim: {width} is not supported; allowed: {text.hidden_size}, the"
                " hidden_size of the text encoder; use the text encoder that the model was trained with"
            )

    def scheduler(self, index: PipelineIndex, given: Mapping[str, Any] | None) -> tuple[Any, Any]:
        """The scheduler's JSON and what it says."""
        names = ("scheduler/scheduler_config.json", "scheduler_config.json")
        places = [name for name in names if (self.root / name).is_file()]
        if not places and given is None:
            self.problems.append(
                "scheduler_config.json: is not there; give the scheduler's keys"
                " (load(path, default_scheduler={...}); {} takes diffusers' defaults)"
            )
            return None, None
        content = self.collect("", read_object, self.root, places[0]) if places else dict(given)
        if content is None:
            return None, None
        # DDIMPipeline converts whatever scheduler it finds.
        class_name = "DDIMScheduler" if index.pipeline == "DDIMPipeline" else index.scheduler
        where = places[0] if places else "scheduler"
        return content, self.collect(where, read_scheduler, content, class_name, index.pipeline)


def _unet_folders(root: pathlib.Path) -> list[str]:
    """Folders of the UNet below root ("" is root itself), the one to read first."""
    nested = [name for name in ("unet_ema", "unet") if (root / name / "config.json").is_file()]
    if nested or (root / "unet").is_dir():
        return nested or ["unet"]
    return [""] if (root / "config.json").is_file() else []


def _json_names(folders: list[str]) -> list[str]:
    """The JSON files that say what the model is."""
    schedulers = ["scheduler/scheduler_config.json", "scheduler_config.json"]
    return ["model_index.json", *schedulers, *(f"{folder}/config.json".lstrip("/") for folder in folders)]
