"""The files that go to State's own trainer: a table of gene embeddings and a split, both unchanged."""

import os
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from esm_perturb.cells.split_file import read_split_toml
from esm_perturb.proteins.embeddings import GeneEmbeddings
from esm_perturb.workflow.cli import main

STATE = Path(os.environ.get("PEERS", "")) / "venv" / "bin" / "state"
pytestmark = pytest.mark.skipif(
    not (os.environ.get("PEERS") and STATE.is_file()),
    reason="set PEERS to a folder that holds venv/bin/state (arc-state 0.11.1)",
)
CELL_SET_LEN = 8


@pytest.fixture(scope="module")
def state_files(tiny, tmp_path_factory) -> Path:
    """The small screen with dense `X_hvg`, a `.pt` table by `GeneEmbeddings`, a TOML by `esm-perturb split`."""
    folder = tmp_path_factory.mktemp("for_state")
    adata = anndata.read_h5ad(tiny / "cells.h5ad")
    adata.obsm["X_hvg"] = np.asarray(adata.X.todense(), dtype=np.float32)
    adata.write_h5ad(folder / "cells.h5ad")
    (folder / "split.toml").write_text((tiny / "split.toml").read_text())
    genes = sorted(set(adata.obs["gene"]) - {"non-targeting"})
    vectors = np.random.default_rng(0).normal(size=(len(genes), 12)).astype(np.float32)
    GeneEmbeddings(genes, vectors, {"model": "a test"}).save(folder / "genes.pt")
    main(["split", "random", "--config", str(folder / "split.toml"), "--output", str(folder / "drawn.toml")])
    return folder


@pytest.fixture(scope="module")
def run_dir(state_files) -> Path:
    """A run of two steps of `state tx train` on these files."""
    settings = {
        "data.kwargs.toml_config_path": state_files / "drawn.toml",
        "data.kwargs.perturbation_features_file": state_files / "genes.pt",
        "data.kwargs.embed_key": "X_hvg",
        "data.kwargs.output_space": "gene",
        "data.kwargs.num_workers": 0,
        "data.kwargs.pin_memory": "false",
        "data.kwargs.pert_col": "gene",
        "data.kwargs.cell_type_key": "cell_type",
        "data.kwargs.batch_col": "gem_group",
        "data.kwargs.control_pert": "non-targeting",
        "model": "state_sm",
        "model.kwargs.cell_set_len": CELL_SET_LEN,
        "model.kwargs.hidden_dim": 32,
        "model.kwargs.transformer_backbone_kwargs.intermediate_size": 64,
        "model.kwargs.transformer_backbone_kwargs.num_attention_heads": 2,
        "model.kwargs.transformer_backbone_kwargs.num_key_value_heads": 2,
        "model.kwargs.transformer_backbone_kwargs.head_dim": 16,
        "training.batch_size": 4,
        "training.max_steps": 2,
        "training.val_freq": 2,
        "training.ckpt_every_n_steps": 2,
        "use_wandb": "false",
        "overwrite": "true",
        "output_dir": state_files / "runs",
        "name": "ours",
    }
    run_state("tx", "train", *(f"{name}={value}" for name, value in settings.items()))
    return state_files / "runs" / "ours"


def run_state(*words: object) -> None:
    """Run the peer's command to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    command = [str(STATE), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_state_reads_our_embeddings_as_they_are(state_files, run_dir):
    """Every gene has our vector in the run's table; only the control, which has no protein, has zeros."""
    names_of_numpy = [np._core.multiarray.scalar, np.dtype, np.dtypes.StrDType]
    with torch.serialization.safe_globals(names_of_numpy):
        theirs = torch.load(run_dir / "pert_onehot_map.pt", weights_only=True)
    ours = GeneEmbeddings.load(state_files / "genes.pt")
    for name, vector in zip(ours.names, ours.vectors, strict=True):
        np.testing.assert_array_equal(theirs.pop(name).numpy(), vector)
    assert list(theirs) == ["non-targeting"] and not theirs["non-targeting"].any()
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()


def test_state_holds_out_what_our_split_holds_out(state_files, run_dir):
    """State predicts just the test perturbations of our file, in the cell types that it names."""
    run_state("tx", "predict", "--output-dir", run_dir, "--checkpoint", "last.ckpt", "--predict-only")
    predicted = anndata.read_h5ad(next(run_dir.rglob("adata_pred.h5ad"))).obs
    found = set(zip(predicted["cell_type"], predicted["gene"], strict=True))
    held_out = {
        (cell_type, name)
        for (_, cell_type), lists in read_split_toml(state_files / "drawn.toml").fewshot.items()
        for name in lists["test"]
    }
    assert held_out and {pair for pair in found if pair[1] != "non-targeting"} == held_out
