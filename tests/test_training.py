"""Whole training runs: killed and resumed, on two processes, refused, and repeated."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from esm_perturb.cells.simulate import SimulationConfig, simulate, write_simulation
from esm_perturb.core.config import InputError, RunConfig, from_dict, to_dict
from esm_perturb.core.files import write_yaml
from esm_perturb.models.state_transition import StateTransition
from esm_perturb.models.training import build_model, main, prepare, train
from esm_perturb.proteins.embeddings import GeneEmbeddings

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
MODULE = "esm_perturb.models.training"
BATCHES_PER_EPOCH = 9


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are rounded differently by more threads; the launched processes have one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small screen with embeddings."""
    folder = tmp_path_factory.mktemp("screen")
    sizes = {"n_families": 4, "genes_per_family": 6, "held_out_per_family": 1, "n_readout_genes": 40}
    screen = simulate(SimulationConfig(**sizes, cells_per_perturbation=20, controls_per_cell_type=80))
    write_simulation(screen, folder)
    vectors = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    GeneEmbeddings(list(screen.families), vectors).save(folder / "embeddings.pt")
    return folder


def make_config(folder: Path, output_dir: Path, *, data=None, model=None, training=None, **rest) -> RunConfig:
    model = {"hidden_dim": 16, "cell_set_len": 16, "n_layers": 1, "n_heads": 2} | (model or {})
    training = {"batch_size": 8, "lr": 1e-3, "max_steps": 30, "val_freq": 10, "accelerator": "cpu"} | (training or {})
    values = {
        "output_dir": str(output_dir),
        "data": {"kwargs": {"toml_config_path": str(folder / "split.toml")} | (data or {})},
        "model": {"kwargs": {"esm_embeddings_path": str(folder / "embeddings.pt")} | model},
        "training": training,
    }
    return from_dict(RunConfig, values | rest)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def kill_after_first_checkpoint(config: RunConfig, path: Path) -> None:
    """Start a run on its own and kill it, without warning, when it has written `last.ckpt`."""
    write_yaml(path, to_dict(config))
    checkpoint = Path(config.output_dir) / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-m", MODULE, "--config", str(path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert checkpoint.exists() and process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("val_freq", [7, BATCHES_PER_EPOCH], ids=["in the middle of an epoch", "at its end"])
def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path, val_freq):
    training = {"val_freq": val_freq, "max_steps": 12 * val_freq, "lr_schedule": "cosine", "warmup_steps": 5}
    config = make_config(folder, tmp_path / "killed", training=training)
    from esm_perturb.cells.data_module import PerturbationDataModule

    ready = prepare(config)
    data = PerturbationDataModule(
        ready.store, ready.splits, data=config.data.kwargs, cell_set_len=16, batch_size=8, seed=0
    )
    assert len(data.loader("train").batch_sampler) == BATCHES_PER_EPOCH
    kill_after_first_checkpoint(config, tmp_path / "config.yaml")
    assert not (tmp_path / "killed" / "training.json").exists()
    resumed = train(config)
    assert 0 < resumed["resumed_from_step"] < config.training.max_steps
    whole = train(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert resumed["best"] == whole["best"]
    tables = [
        pd.read_csv(tmp_path / run / "metrics.csv").drop(columns="steps_per_second") for run in ("killed", "whole")
    ]
    pd.testing.assert_frame_equal(*tables)


def test_resume_with_workers_and_accumulation_equals_uninterrupted(folder, tmp_path):
    """Workers fetch ahead and a step spans two batches; the longer run goes on from the shorter one."""
    training = {"accumulate_grad_batches": 2, "val_freq": 6, "max_steps": 6}
    short = make_config(folder, tmp_path / "two", data={"num_workers": 1}, training=training)
    train(short)
    longer = {"accumulate_grad_batches": 2, "val_freq": 6, "max_steps": 14}
    resumed = train(make_config(folder, tmp_path / "two", data={"num_workers": 1}, training=longer))
    assert resumed["resumed_from_step"] == 6
    train(make_config(folder, tmp_path / "one", training=longer))
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_the_model_starts_from_training_cells_only(folder, tmp_path):
    """Test and validation cells may hold anything: the untrained model stays the same."""
    config = make_config(folder, tmp_path)
    ready = prepare(config)
    before = build_model(config, ready).state_dict()
    changed = ready.store.X.toarray()
    for split in ("val", "test"):
        changed[ready.splits.indices(split)] += 1.0
    store = dataclasses.replace(ready.store, X=csr_matrix(changed))
    after = build_model(config, dataclasses.replace(ready, store=store)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed[ready.splits.control_indices("train")] += 1.0
    store = dataclasses.replace(ready.store, X=csr_matrix(changed))
    moved = build_model(config, dataclasses.replace(ready, store=store)).state_dict()
    assert any(not torch.equal(before[name], moved[name]) for name in before)


def test_validation_is_without_dropout(folder, tmp_path):
    """The validation loss in the table is that of the saved best model in evaluation mode, whatever the dropout."""
    from esm_perturb.cells.data_module import PerturbationDataModule
    from esm_perturb.models.losses import set_loss

    config = make_config(folder, tmp_path / "run", model={"dropout": 0.5}, training={"max_steps": 10, "val_freq": 10})
    train(config)
    ready = prepare(config)
    options = {"cell_set_len": 16, "batch_size": 8, "seed": config.training.seed}
    data = PerturbationDataModule(ready.store, ready.splits, data=config.data.kwargs, **options)
    model, loss = StateTransition.load(tmp_path / "run" / "checkpoints" / "best.ckpt"), set_loss("energy")
    losses = []
    with torch.no_grad():
        for batch in data.loader("val"):
            predicted = model(batch["control"], batch["perturbation"], batch["modality"], batch["mask"])
            losses += loss(predicted, batch["perturbed"], batch["mask"]).tolist()
    reported = pd.read_csv(tmp_path / "run" / "metrics.csv")["val_loss"].dropna().iloc[-1]
    assert reported == pytest.approx(np.mean(losses), rel=1e-4)


def launch(config: RunConfig, path: Path, n_processes: int) -> subprocess.CompletedProcess:
    write_yaml(path, to_dict(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    command += ["-m", MODULE, "--config", str(path)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)


def test_two_processes(folder, tmp_path):
    config = make_config(folder, tmp_path / "run", training={"n_processes": 2})
    done = launch(config, tmp_path / "config.yaml", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("best checkpoint") == 1
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert summary["steps"] == 30
    measured = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert measured["step"].tolist() == [10, 20, 30]
    assert measured["train_loss"].iloc[-1] < measured["train_loss"].iloc[0]
    StateTransition.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    with pytest.raises(InputError, match="started alone"):
        train(config)
    with pytest.raises(InputError, match="number of processes differs"):
        train(dataclasses.replace(config, training=dataclasses.replace(config.training, n_processes=1)))


def test_bad_input_ends_with_code_2_one_sentence_and_no_files(folder, tmp_path):
    config = make_config(folder, tmp_path / "run", model={"esm_embeddings_path": str(tmp_path / "none.pt")})
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    command = [sys.executable, "-m", MODULE, "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("input error: ") and done.stderr.count("\n") == 1
    assert "none.pt" in done.stderr and "--esm_embeddings_path" in done.stderr
    assert not (tmp_path / "run").exists()


BAD = {
    "misspelt test gene": ({}, ("FAM01_0", "FAM01-0"), "did you mean"),
    "misspelt cell type": ({}, ("line_A", "line_a"), "line_A"),
    "wrong control": ({"data": {"control_pert": "ctrl"}}, None, "non-targeting"),
    "missing column": ({"data": {"pert_col": "perturbation"}}, None, "perturbation"),
    "unknown loss": ({"model": {"distributional_loss": "energie"}}, None, "energy"),
    "option without effect": ({"model": {"distributional_loss": "mse", "blur": 0.1}}, None, "no effect"),
    "odd size": ({"model": {"hidden_dim": 17}}, None, "even"),
    "absent start": ({"model": {"init_from": "/nowhere/best.ckpt"}}, None, "does not exist"),
    "negative head": ({"model": {"head_dim": -8}}, None, "head_dim"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, capsys, name):
    change, edit, expected = BAD[name]
    config = make_config(folder, tmp_path / "run", **change)
    if edit:
        toml = (folder / "split.toml").read_text()
        assert edit[0] in toml
        spoilt = folder / f"spoilt_{edit[1]}.toml"
        spoilt.write_text(toml.replace(*edit))
        config = dataclasses.replace(make_config(folder, tmp_path / "run", data={"toml_config_path": str(spoilt)}))
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    assert main(["--config", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_bits_and_another_does_not(folder, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        train(make_config(folder, tmp_path / name, training={"seed": seed, "max_steps": 10}))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(weights(tmp_path / name)["model.project_out.0.weight"] for name in "ac"))


def test_without_validation_the_last_model_is_the_best_and_says_so(folder, tmp_path):
    summary = train(make_config(folder, tmp_path / "run", data={"val_fraction": 0.0}, training={"max_steps": 15}))
    assert "last step" in summary["best_is"] and summary["best"] == {"step": 15}
    best = StateTransition.load(tmp_path / "run" / "checkpoints" / "best.ckpt").state_dict()
    assert all(
        torch.equal(best[name.removeprefix("model.")], value) for name, value in weights(tmp_path / "run").items()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"precision": "bf16-mixed"}},
        {"model": {"pert_encoder": "shuffled"}},
        {"model": {"use_esm_for_pert": False, "esm_embeddings_path": ""}},
        {"model": {"distributional_loss": "sinkhorn", "blur": "auto"}},
        {"model": {"distributional_loss": "mse"}},
        {"model": {"standardize_embeddings": False, "predict_residual": False, "unbiased": False}},
        {"data": {"pad": "resample", "basal_mapping_strategy": "batch", "share_controls": True}},
    ],
    ids=lambda change: str(next(iter(change.values())))[1:40],
)
def test_each_choice_trains(folder, tmp_path, change):
    summary = train(make_config(folder, tmp_path / "run", **change))
    assert np.isfinite(summary["last"]["train_loss"])
    measured = pd.read_csv(tmp_path / "run" / "metrics.csv")["train_loss"]
    assert measured.iloc[-1] < measured.iloc[0]


def test_init_from_starts_where_the_other_run_ended(folder, tmp_path):
    first = train(make_config(folder, tmp_path / "first", training={"max_steps": 60, "val_freq": 60}))
    start = {"init_from": str(tmp_path / "first" / "checkpoints" / "best.ckpt")}
    second = train(make_config(folder, tmp_path / "second", model=start, training={"max_steps": 10}))
    cold = pd.read_csv(tmp_path / "first" / "metrics.csv")["train_loss"].iloc[0]
    assert second["last"]["train_loss"] < 0.5 * cold
    assert second["last"]["train_loss"] < 1.5 * first["last"]["train_loss"]


def test_divergence_is_said_in_one_sentence(folder, tmp_path, capsys):
    config = make_config(folder, tmp_path / "run", training={"lr": 1e30, "gradient_clip_val": 1e30})
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    assert main(["--config", str(tmp_path / "config.yaml")]) == 1
    assert "lower training.lr" in capsys.readouterr().err


def test_wandb_offline(folder, tmp_path):
    pytest.importorskip("wandb")
    config = make_config(
        folder, tmp_path / "run", training={"max_steps": 10}, wandb={"use_wandb": True, "mode": "offline"}
    )
    train(config)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
