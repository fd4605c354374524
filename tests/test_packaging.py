"""The package from the outside: how light it is, which way its dependencies point, and the files that come with it."""

import ast
import importlib
import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esm_perturb.cells.split_file import read_split_toml
from esm_perturb.core.config import RunConfig, to_dict
from esm_perturb.core.resolve import resolve_config
from esm_perturb.proteins.diffusion_config import ProteinConfig, read_protein_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "esm_perturb"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))

HEAVY = {
    "torch",
    "pytorch_lightning",
    "transformers",
    "anndata",
    "scanpy",
    "cell_eval",
    "wandb",
    "matplotlib",
    "papermill",
}
MAY_IMPORT = {
    "core": {"core"},
    "proteins": {"core", "proteins"},
    "cells": {"core", "cells"},
    "models": {"core", "proteins", "cells", "models"},
    "evaluation": {"core", "proteins", "cells", "models", "evaluation"},
    "workflow": {"core", "proteins", "cells", "models", "evaluation", "workflow"},
}


def python(code: str) -> tuple[str, float]:
    """Output and seconds of a fresh interpreter, started outside the repository."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(sys.prefix), capture_output=True, text=True, check=True
    )
    return done.stdout, time.perf_counter() - began


@pytest.mark.parametrize("module", ["esm_perturb", "esm_perturb.core.config", "esm_perturb.workflow.cli"])
def test_import_loads_nothing_heavy(module):
    loaded, _ = python(f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert "esm_perturb" in loaded.split()
    assert HEAVY & set(loaded.split()) == set()


def test_import_takes_less_than_half_a_second():
    """The whole interpreter, the best of three: a busy machine slows some of them."""
    assert min(python("import esm_perturb")[1] for _ in range(3)) < 0.5


def imported_rooms(path: Path) -> set[str]:
    """Folders of this package that a module imports, anywhere in its code."""
    here = ("esm_perturb", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("esm_perturb.")}
    return found & set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_dependencies_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0]
    assert imported_rooms(path) <= MAY_IMPORT[room]


def test_the_search_for_imports_finds_them():
    """Both spellings of an import, and those inside functions; otherwise the test above could not fail."""
    assert imported_rooms(PACKAGE / "models" / "preparation.py") >= {"core", "cells", "proteins"}
    assert "evaluation" in imported_rooms(PACKAGE / "workflow" / "runs.py")
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_public_name_exists_and_is_explained(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert module.__doc__ and module.__all__
    public = [getattr(module, name) for name in module.__all__]
    made_here = [thing for thing in public if inspect.isclass(thing) or inspect.isfunction(thing)]
    assert [thing.__name__ for thing in made_here if not thing.__doc__] == []


# ---- configs/


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.y*ml")), ids=lambda path: path.name)
def test_every_run_configuration_resolves(path):
    if path.stem == "config_protein":  # its file spells the defaults out
        assert to_dict(read_protein_config(path)) == to_dict(ProteinConfig())
        return
    config = resolve_config(config=path)
    assert config.name == path.stem
    assert to_dict(config) != to_dict(RunConfig(name=path.stem)) or path.stem == "esm_state"


def test_the_documented_model_is_the_default():
    """`configs/esm_state.yaml` spells the defaults out; a changed default would make it lie."""
    assert to_dict(resolve_config(config=ROOT / "configs" / "esm_state.yaml")) == to_dict(RunConfig())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_split_file_is_read(path):
    spec = read_split_toml(path)
    held_out = [name for split in spec.fewshot.values() for names in split.values() for name in names]
    assert set(spec.training) == set(spec.datasets) and held_out
    assert resolve_config(config=path).data.kwargs.toml_config_path == str(path)


def test_a_model_and_a_split_file_together():
    files = ("esm_state.yaml", "esm_genetic_example.toml")
    config = resolve_config(config=",".join(str(ROOT / "configs" / name) for name in files))
    assert config.model.kwargs.hidden_dim == 696
    assert Path(config.data.kwargs.toml_config_path).name == "esm_genetic_example.toml"
