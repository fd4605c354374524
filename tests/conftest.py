"""Shared and slow things made once: a small screen on disk, and one training run on it."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import yaml

from esm_perturb.cells.simulate import SimulationConfig, simulate, write_simulation
from esm_perturb.proteins.embeddings import GeneEmbeddings

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

# Random cases find bugs at a desk; an automatic run must not depend on the draw, nor on how busy the machine is.
hypothesis.settings.register_profile("desk", deadline=None)
hypothesis.settings.register_profile("automatic", deadline=None, derandomize=True)
hypothesis.settings.load_profile("automatic" if os.environ.get("CI") else "desk")


@pytest.fixture(scope="session")
def shell():
    """Run a tool of this environment, as a user would from a terminal."""

    def run(tool: str, *words: object, cwd: Path, temporary: Path | None = None) -> subprocess.CompletedProcess:
        environment = {**os.environ, **ENVIRONMENT} | ({"TMPDIR": str(temporary)} if temporary else {})
        command = [str(Path(sys.executable).parent / tool), *map(str, words)]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a small screen, random gene embeddings, and `run.yaml` that trains on them in a second."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"n_families": 4, "genes_per_family": 6, "held_out_per_family": 2, "n_readout_genes": 40}
    screen = simulate(SimulationConfig(**sizes, cells_per_perturbation=16, controls_per_cell_type=60, seed=1))
    write_simulation(screen, folder)
    vectors = np.random.default_rng(0).normal(size=(len(screen.families), 16)).astype(np.float32)
    GeneEmbeddings(list(screen.families), vectors).save(folder / "genes.pt")
    sizes = {"hidden_dim": 16, "cell_set_len": 16, "n_layers": 1, "n_heads": 2, "dropout": 0.1}
    run = {
        "name": "tiny",
        "data": {"kwargs": {"toml_config_path": str(folder / "split.toml")}},
        "model": {"kwargs": sizes | {"esm_embeddings_path": str(folder / "genes.pt")}},
        "training": {"max_steps": 20, "val_freq": 5, "accelerator": "cpu", "seed": 3},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="session")
def trained(tiny, shell, tmp_path_factory) -> Path:
    """The folder of `esm-perturb train` on the small screen. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "train"
    done = shell("esm-perturb", "train", "--config", tiny / "run.yaml", "--output_dir", folder, cwd=tiny)
    assert done.returncode == 0, done.stderr
    return folder
