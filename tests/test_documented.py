"""The commands of the requirements, as a user types them in the folder of a screen, on a model of one layer."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from esm_perturb.core.files import project_root, read_yaml
from esm_perturb.models.state_transition import StateTransition
from esm_perturb.proteins.embeddings import GeneEmbeddings

SHORT = ("training.max_steps=2", "training.val_freq=2")
SMALL = ("model.kwargs.n_layers=1", "training.accelerator=cpu")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A folder with `my_screen.h5ad`, `genes.pt` and the example TOML, edited as its comments say."""
    folder = tmp_path_factory.mktemp("documented")
    cells = anndata.read_h5ad(tiny / "cells.h5ad")
    genes = sorted(set(cells.obs["gene"]) - {"non-targeting"})
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({cells.obs["cell_type"].iloc[0]: "K562"})
    cells.obsm["X_uce"] = np.random.default_rng(0).normal(size=(cells.n_obs, 24)).astype(np.float32)
    cells.write_h5ad(folder / "my_screen.h5ad")
    GeneEmbeddings.load(tiny / "genes.pt").save(folder / "genes.pt")
    text = (project_root() / "configs" / "esm_genetic_example.toml").read_text()
    for example, gene in zip(("GENE1", "GENE2", "GENE3", "GENE4"), genes, strict=False):
        text = text.replace(example, gene)
    text = text.replace("# [embeddings]", "[embeddings]").replace("# human", "human")
    (folder / "esm_genetic_example.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def train(folder, shell):
    """Run `esm-perturb train` with some words in that folder; its run folder's name comes first."""

    def run(place: str, *words: str) -> Path:
        done = shell("esm-perturb", "train", *words, *SMALL, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder / place

    return run


@pytest.fixture(scope="module")
def first(train) -> Path:
    """`train --config … --output_dir … --batch_size 16 --max_steps … --lr 1e-4 --use_wandb`."""
    flags = ("--output_dir", "./my_output", "--batch_size", "16", "--max_steps", "2", "--lr", "1e-4", "--use_wandb")
    project = ("--wandb_project", "my-esm-project")
    return train("my_output", "--config", "esm_genetic_example.toml", *flags, *project)


def test_flags_reach_the_run(first):
    config = read_yaml(first / "config.yaml")
    training = config["training"]
    assert (training["batch_size"], training["max_steps"], training["lr"]) == (16, 2, 1e-4)
    assert config["model"]["kwargs"]["hidden_dim"] == 696
    assert Path(config["model"]["kwargs"]["esm_embeddings_path"]).name == "genes.pt"
    assert config["wandb"] == {"use_wandb": True, "wandb_project": "my-esm-project", "mode": "online"}
    assert list((first / "wandb").glob("offline-run-*")), "WANDB_MODE=offline is not heeded"
    assert {path.name for path in (first / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_fine_tuning_by_the_documented_command(first, folder, train):
    """The second run starts from the first one's weights: shapes are reported, and most of them are equal."""
    words = ("--config", "esm_genetic_example.toml", "model.kwargs.init_from=./my_output/checkpoints/best.ckpt")
    tuned = train("reports/train", *words, *SHORT, "training.lr=1e-9")
    one, two = (StateTransition.load(run / "checkpoints" / "best.ckpt").state_dict() for run in (first, tuned))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=0)
    record = json.loads((tuned / "training.json").read_text())["record"]["init_from"]
    assert record["file"].endswith("my_output/checkpoints/best.ckpt")


def test_overrides(train):
    words = ("model.kwargs.hidden_dim=1024", "model.kwargs.esm_encoder_layers=3", "training.val_freq=1000")
    run = train("wide", "--config", "esm_genetic_example.toml", *words, "training.max_steps=1", "output_dir=wide")
    config = read_yaml(run / "config.yaml")
    assert config["training"]["val_freq"] == 1000
    model = StateTransition.load(run / "checkpoints" / "best.ckpt")
    assert model.settings.hidden_dim == 1024
    assert len([layer for layer in model.pert_encoder.parts["esm"].network if hasattr(layer, "weight")]) == 3


def test_the_standard_command_line(folder, train):
    """State's own spelling: everything is an override, the model is chosen by name, cells are embeddings."""
    words = ("data.kwargs.toml_config_path=esm_genetic_example.toml", "data.kwargs.embed_key=X_uce", "model=esm_state")
    embeddings = "model.kwargs.esm_embeddings_path=genes.pt"
    run = train("esm_output", *words, embeddings, f"output_dir={folder}/esm_output", *SHORT)
    model = StateTransition.load(run / "checkpoints" / "best.ckpt")
    assert model.gene_names[0] == "X_uce_0" and len(model.gene_names) == 24
    assert len(model.output_names) == 40


def test_genes_and_compounds_train_together_and_are_evaluated(folder, train, shell):
    """SMILES and doses come from columns; the report does without ridge, which has no features of compounds."""
    pytest.importorskip("rdkit", reason="fingerprints need rdkit")
    cells = anndata.read_h5ad(folder / "my_screen.h5ad")
    genes = sorted(set(cells.obs["gene"]) - {"non-targeting"})
    drugs = dict(
        zip(genes[-4:], ("CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "CCO", "c1ccccc1O"), strict=True)
    )
    obs = cells.obs.copy()
    obs["smiles"] = obs["gene"].astype(str).map(drugs).fillna("")
    is_drug = (obs["smiles"] != "").to_numpy()
    obs["dose"] = np.where(is_drug, np.where(np.arange(len(obs)) % 2, 0.1, 10.0), np.nan)
    obs["modality"] = np.where(is_drug, "compound", "CRISPRi")
    cells.obs = obs
    cells.write_h5ad(folder / "mixed.h5ad")
    text = (folder / "esm_genetic_example.toml").read_text().replace("my_screen.h5ad", "mixed.h5ad")
    (folder / "mixed.toml").write_text(text.replace(f'"{genes[3]}"', f'"{genes[-1]}"'))
    columns = [f"data.kwargs.{name}_col={name}" for name in ("smiles", "dose", "modality")]
    run = train(
        "mixed", "--config", "mixed.toml", "--pert_encoder", "esm+fingerprint", "output_dir=mixed", *columns, *SHORT
    )
    model = StateTransition.load(run / "checkpoints" / "best.ckpt")
    labels = model.pert_encoder.labels
    assert (labels.modalities, labels.doses) == (["CRISPRi", "compound"], [0.1, 10.0])
    done = shell("esm-perturb", "evaluate", "--run_dir", "mixed", "--output_dir", "judged", cwd=folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "judged" / "metrics.json").read_text())["summary"]
    assert next(iter(summary)) == "esm+fingerprint"
    assert {"no_change", "mean_response", "oracle_mean", "seen_elsewhere"} <= set(summary)
    assert not {"ridge", "knn"} & set(summary)  # compounds have no protein
