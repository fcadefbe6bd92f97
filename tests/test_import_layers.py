"""Who may import whom, read from the sources; and what a plain `import jaxunlearn` loads."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "jaxunlearn"

# The core, from the bottom up. A module may import from rows above its own, and from its own row.
LAYERS = [
    {"types", "registry"},
    {"schedule", "images", "dft"},
    {"timesteps", "frequency"},
    {"errors", "spectrum", "responsibility"},
    {"score_matching", "predictors", "guidance"},
    {"objectives", "combine", "guards", "masks", "forgetting", "selection"},
    {"methods"},
    {"step"},
    {"parallel"},
]
CORE = set().union(*LAYERS)
NEVER_AT_IMPORT = ("flax", "orbax", "tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "torch", "PIL")
NEVER_AT_IMPORT += ("safetensors", "tokenizers", "transformers", "huggingface_hub", "diffrax")


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """``(absolute module or name, whether at the top level)`` of every import, `if TYPE_CHECKING` blocks left out."""
    found = []

    def visit(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                # `from jaxunlearn import combine` imports jaxunlearn.combine.
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            visit(child, top and not inner)

    visit(ast.parse(path.read_text()), True)
    return found


def own(name: str) -> str | None:
    """The part of jaxunlearn that an imported name belongs to, None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "jaxunlearn" and len(parts) > 1 else None


def core_files() -> list[pathlib.Path]:
    return [p for p in sources(PACKAGE) if own(module_name(p)) in CORE]


def layer_of(part: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if part in row)


def test_the_core_is_where_it_is_expected():
    assert {own(module_name(p)) for p in core_files()} == CORE


@pytest.mark.parametrize("path", core_files(), ids=module_name)
def test_core_modules_import_only_downwards_and_only_jax_numpy_optax(path):
    part = own(module_name(path))
    for name, top in imports(path):
        root = name.split(".")[0]
        if root == "jaxunlearn":
            assert own(name) in CORE, f"{part} imports {name}"
            assert layer_of(own(name)) <= layer_of(part), f"{part} imports {name} from above"
        elif root in ("flax", "equinox"):
            assert part == "predictors", f"{part} imports {name}"
            assert not top, f"{part} imports {name} at the top level"
        else:
            assert root in {"jax", "numpy", "optax"} | sys.stdlib_module_names, f"{part} imports {name}"


def test_only_parallel_knows_devices():
    for path in core_files():
        if own(module_name(path)) == "parallel":
            continue
        for name, _ in imports(path):
            assert not name.startswith(("jax.sharding", "jax.experimental.shard_map")), f"{path.name} imports {name}"
        text = path.read_text()
        for word in ("jax.devices(", "shard_map(", "jax.pmap(", "device_put("):
            assert word not in text, f"{path.name} uses {word}"


def test_the_step_knows_no_objective():
    """Only the Protocol: no import of objectives, methods or the registry of combiners."""
    names = {own(name) for name, _ in imports(PACKAGE / "step.py")}
    assert not names & {"objectives", "methods", "timesteps", "frequency", "errors"}


@pytest.mark.parametrize("part", ["sampling", "pndm", "likelihood", "metrics"])
def test_measuring_parts_do_not_know_training(part):
    files = [p for p in sources(PACKAGE) if own(module_name(p)) == part]
    for path in files:
        for name, _ in imports(path):
            assert own(name) not in ("objectives", "combine", "methods", "step", "parallel"), f"{path} imports {name}"


def test_launchers_and_library_keep_their_order():
    for folder, forbidden in (
        ("jaxunlearn", {"train", "eval", "tests"}),
        ("train", {"eval", "tests"}),
        ("eval", {"train", "tests"}),
    ):
        for path in sources(REPOSITORY / folder):
            for name, _ in imports(path):
                assert name.split(".")[0] not in forbidden, f"{path} imports {name}"


def test_heavy_packages_are_imported_inside_functions():
    """flax belongs to models/ and orbax to io/; the rest of the list is never imported at the top level of the library."""
    for path in sources(PACKAGE):
        part = own(module_name(path))
        for name, top in imports(path):
            root = name.split(".")[0]
            if root not in NEVER_AT_IMPORT:
                continue
            assert not top or (root == "flax" and part == "models"), f"{path} imports {name} at the top level"
            if root == "orbax":
                assert part == "io", f"{path} imports {name}"
            if root == "diffrax":
                assert part == "likelihood", f"{path} imports {name}"
            if root in ("tensorflow", "tensorflow_datasets"):
                assert path.name == "datasets.py", f"{path} imports {name}"


def test_importing_the_library_loads_no_heavy_package():
    watched = (*NEVER_AT_IMPORT, "diffusers", "ml_collections", "equinox")
    program = (
        "import sys, warnings; warnings.simplefilter('error'); import jaxunlearn; "
        f"print([m for m in {watched!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_library_starts_no_backend():
    program = "import jaxunlearn; import jax._src.xla_bridge as bridge; print(bool(bridge._backends))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
