"""Whole training runs: killed and resumed, on several processes and machines, refused, and repeated."""

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from esm_perturb.cells.data_module import PerturbationDataModule
from esm_perturb.cells.simulate import SimulationConfig, simulate, write_simulation
from esm_perturb.core.config import InputError, RunConfig, from_dict, to_dict
from esm_perturb.core.files import write_yaml
from esm_perturb.core.launch import KilledError, launch
from esm_perturb.models import training as training_module
from esm_perturb.models.losses import set_loss
from esm_perturb.models.preparation import build_model, prepare
from esm_perturb.models.state_transition import StateTransition
from esm_perturb.models.task import PerturbationTask, compile_parts
from esm_perturb.models.training import main, train
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
    """A small screen with embeddings of its genes, and of its cells (`X_rotated`)."""
    folder = tmp_path_factory.mktemp("screen")
    sizes = {"n_families": 4, "genes_per_family": 6, "held_out_per_family": 1, "n_readout_genes": 40}
    screen = simulate(SimulationConfig(**sizes, cells_per_perturbation=20, controls_per_cell_type=80))
    write_simulation(screen, folder)
    vectors = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    GeneEmbeddings(list(screen.families), vectors).save(folder / "embeddings.pt")
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(cells.n_vars, 12)))[0]
    cells.obsm["X_rotated"] = (np.log1p(cells.X.toarray()) @ rotation).astype(np.float32)
    cells.write_h5ad(folder / "cells.h5ad")
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


def data_module(config: RunConfig) -> PerturbationDataModule:
    """The run's data module."""
    ready = prepare(config)
    sizes = {"cell_set_len": config.model.kwargs.cell_set_len, "batch_size": config.training.batch_size}
    options = {"data": config.data.kwargs, "targets": ready.targets, "seed": config.training.seed}
    return PerturbationDataModule(ready.store, ready.splits, **options, **sizes)


def assert_resumed_equals_uninterrupted(config: RunConfig, whole_folder: Path) -> None:
    """Go on with a killed run, and do the same run in one go."""
    killed = Path(config.output_dir)
    assert not (killed / "training.json").exists()
    resumed = train(config)
    assert 0 < resumed["resumed_from_step"] < config.training.max_steps
    whole = train(dataclasses.replace(config, output_dir=str(whole_folder)))
    assert_same_weights(killed, whole_folder)
    assert resumed["best"] == whole["best"]
    for name in ("best.ckpt", "last.ckpt"):
        assert_equal_content(*(torch.load(run / "checkpoints" / name) for run in (killed, whole_folder)))
    tables = [pd.read_csv(run / "metrics.csv").drop(columns="steps_per_second") for run in (killed, whole_folder)]
    pd.testing.assert_frame_equal(*tables)


def assert_equal_content(one, two, place="") -> None:
    """Nested plain data and tensors are equal to the bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            assert_equal_content(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, list):
        assert_equal_content(dict(enumerate(one)), dict(enumerate(two)), place)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), place
    elif not place.endswith("steps_per_second") and "/loops/" not in place:  # Lightning's counters begin anew
        assert one == two, place


EVERYTHING = {
    "data": {"embed_key": "X_rotated", "basal_mapping_strategy": "batch"},
    "model": {
        "batch_encoder": True,
        "use_batch_token": True,
        "confidence_token": True,
        "regularization": 0.1,
        "dropout": 0.2,
    },
    "training": {"ema_decay": 0.95, "early_stopping": 1000, "accumulate_grad_batches": 2, "monitor": "val_loss"},
}


def run_of_everything(folder: Path, output_dir: Path, *, at_epoch_end: bool) -> RunConfig:
    """Four validations, in the middle of epochs or at their ends."""
    length = len(data_module(make_config(folder, output_dir, **EVERYTHING)).loader("train").batch_sampler)
    steps = -(-length // 2)  # the last step of an epoch of odd length takes one batch
    val_freq = steps if at_epoch_end else steps - 1
    schedule = {"val_freq": val_freq, "max_steps": 4 * val_freq, "lr_schedule": "cosine", "warmup_steps": 5}
    return make_config(folder, output_dir, **EVERYTHING | {"training": EVERYTHING["training"] | schedule})


def break_off(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run that breaks off at a step."""
    training_step = PerturbationTask.training_step

    def broken(self, batch, batch_idx):
        if self.global_step == step:
            raise KeyError("the power is gone")
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="power"):
        patch.setattr(PerturbationTask, "training_step", broken)
        train(config)


def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path):
    """With all parts of the model, averaged weights, accumulation, a schedule and early stopping."""
    config = run_of_everything(folder, tmp_path / "killed", at_epoch_end=False)
    kill_after_first_checkpoint(config, tmp_path / "config.yaml")
    assert_resumed_equals_uninterrupted(config, tmp_path / "whole")


def test_broken_off_after_an_epoch_and_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch):
    config = run_of_everything(folder, tmp_path / "killed", at_epoch_end=True)
    break_off(config, config.training.val_freq + 1, monkeypatch)
    assert_resumed_equals_uninterrupted(config, tmp_path / "whole")


@pytest.mark.parametrize("val_freq", [7, BATCHES_PER_EPOCH], ids=["in the middle of an epoch", "at its end"])
def test_plain_run_broken_off_and_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch, val_freq):
    training = {"val_freq": val_freq, "max_steps": 3 * val_freq, "lr_schedule": "cosine", "warmup_steps": 5}
    config = make_config(folder, tmp_path / "killed", training=training)
    assert len(data_module(config).loader("train").batch_sampler) == BATCHES_PER_EPOCH
    break_off(config, val_freq + 3, monkeypatch)
    assert_resumed_equals_uninterrupted(config, tmp_path / "whole")


def test_early_stopping_ends_survives_a_restart_and_may_be_extended(folder, tmp_path, monkeypatch):
    training = {"lr": 1e-30, "val_freq": 5, "max_steps": 1000, "early_stopping": 2, "monitor": "val_loss"}
    config = make_config(folder, tmp_path / "run", training=training)
    summary = train(config)
    assert (summary["steps"], summary["stopped_early"], summary["best"]["step"]) == (15, True, 5)
    assert summary["best_is"] == "the lowest val_loss"
    assert train(config) == summary
    (tmp_path / "run" / "training.json").unlink()  # killed between its last checkpoint and its summary
    again = train(config)
    assert (again["steps"], again["stopped_early"], again["best"]) == (15, True, summary["best"])
    patient = make_config(folder, tmp_path / "run", training=training | {"early_stopping": 3})
    assert train(patient)["steps"] == 20


def test_every_term_of_the_loss_is_logged_and_reaches_its_part_of_the_model(folder, tmp_path):
    config = make_config(folder, tmp_path / "run", **EVERYTHING | {"training": {"max_steps": 30, "val_freq": 10}})
    start = build_model(config, prepare(config)).state_dict()
    train(config)
    measured = pd.read_csv(tmp_path / "run" / "metrics.csv")
    terms = [f"train_{name}" for name in ("cells", "genes", "confidence", "batch", "change")]
    np.testing.assert_allclose(measured[terms].sum(axis=1), measured["train_loss"], rtol=1e-4)
    assert (measured[terms].iloc[-1] > 0).all()
    for term in ("train_cells", "train_genes", "train_batch"):
        assert measured[term].iloc[-1] < measured[term].iloc[0]
    end = weights(tmp_path / "run")
    unmoved = [name for name in start if f"model.{name}" in end and torch.equal(start[name], end[f"model.{name}"])]
    assert not unmoved
    best = StateTransition.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert best.output_names == prepare(config).targets.gene_names and best.batch_names


def test_batch_token_needs_sets_of_one_batch(folder, tmp_path):
    with pytest.raises(InputError, match="basal_mapping_strategy"):
        prepare(make_config(folder, tmp_path, model={"use_batch_token": True}))
    with pytest.raises(InputError, match="batch_col"):
        prepare(make_config(folder, tmp_path, model={"batch_encoder": True}, data={"batch_col": None}))


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
    config = make_config(folder, tmp_path / "run", model={"dropout": 0.5}, training={"max_steps": 10, "val_freq": 10})
    train(config)
    model, loss = StateTransition.load(tmp_path / "run" / "checkpoints" / "best.ckpt"), set_loss("energy")
    losses = []
    with torch.no_grad():
        for batch in data_module(config).loader("val"):
            predicted = model(batch["control"], batch["perturbation"], batch["modality"], batch["mask"]).cells
            losses += loss(predicted, batch["perturbed"], batch["mask"]).tolist()
    reported = pd.read_csv(tmp_path / "run" / "metrics.csv")["val_loss"].dropna().iloc[-1]
    assert reported == pytest.approx(np.mean(losses), rel=1e-4)


def run_module(config: RunConfig, path: Path, n_processes: int) -> subprocess.CompletedProcess:
    write_yaml(path, to_dict(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    command += ["-m", MODULE, "--config", str(path)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)


def test_two_processes(folder, tmp_path):
    config = make_config(folder, tmp_path / "run", training={"n_processes": 2})
    done = run_module(config, tmp_path / "config.yaml", 2)
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


def train_on_two(configs: list[RunConfig], *, machines: int) -> list[dict]:
    """Train one run after the other on two processes; summaries. Forked, so that nothing is imported again."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    port = str(20_000 + os.getpid() % 10_000)

    def work(rank: int) -> None:
        local = rank if machines == 1 else 0
        places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2 // machines}
        places |= {"GROUP_RANK": rank - local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()})
        torch.set_num_threads(1)
        for config in configs:
            summary = train(config)
            if rank == 0:
                results.put(json.dumps(summary, default=str))

    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads(results.get()) for _ in configs]


def curve(run: Path) -> pd.DataFrame:
    """What was measured that does not depend on the clock."""
    return pd.read_csv(run / "metrics.csv").drop(columns="steps_per_second")


def test_two_processes_with_half_the_sets_have_the_curve_of_one(folder, tmp_path):
    """On one machine and on two; the model held by each, or sharded between them, also after a restart."""
    same = {"model": {"dropout": 0.0}, "data": {"val_fraction": 0.2}}
    training = {"max_steps": 24, "val_freq": 4, "batch_size": 10, "ema_decay": 0.9, "early_stopping": 100}
    alone = make_config(folder, tmp_path / "one", training=training, **same)
    sampler = data_module(alone).loader("train").batch_sampler
    assert any(len(batch) % 2 for batch in sampler)  # the processes' shares differ
    train(alone)

    def on_two(name, machines, **settings):
        places = {"batch_size": 5, "n_processes": 2 // machines, "n_nodes": machines}
        return make_config(folder, tmp_path / name, training=training | places | settings, **same)

    summaries = train_on_two([on_two("machines", 2)], machines=2)
    sharded = {"strategy": "fsdp"}
    configs = [on_two("two", 1), on_two("fsdp", 1, max_steps=12, **sharded), on_two("fsdp", 1, **sharded)]
    summaries += train_on_two(configs, machines=1)
    assert summaries[-1]["resumed_from_step"] == 12
    for name in ("machines", "two", "fsdp"):
        pd.testing.assert_frame_equal(curve(tmp_path / name), curve(tmp_path / "one"), rtol=2e-3, atol=1e-4)
        best = [StateTransition.load(tmp_path / run / "checkpoints" / "best.ckpt") for run in (name, "one")]
        assert best[0].extra["best"]["step"] == best[1].extra["best"]["step"]
        for weight, expected in zip(*(model.state_dict().values() for model in best), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-2, atol=1e-4)


def test_processes_end_early_together(folder, tmp_path):
    training = {"lr": 1e-30, "val_freq": 5, "max_steps": 1000, "early_stopping": 2, "n_processes": 2}
    config = make_config(folder, tmp_path / "run", training=training)
    assert train_on_two([config], machines=1)[0]["steps"] == 15


SAYS_WHERE = """
import os, sys
from esm_perturb.core.processes import join_slurm, rank, world
join_slurm()
sys.stdout.write(f"{rank()} of {world()} on {os.environ['GROUP_RANK']}, meeting at {os.environ['MASTER_ADDR']}\\n")
"""
SRUN = """#!{python}
import os, subprocess, sys
options = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith("--") and "=" in word)
nodes, tasks = int(options["nodes"]), int(options["ntasks"])
command, each, started = sys.argv[sys.argv.index({python!r}) :], tasks // nodes, []
step = {{"STEP_NUM_TASKS": tasks, "STEP_TASKS_PER_NODE": f"{{each}}(x{{nodes}})", "STEP_NODELIST": "gpu[07-08]"}}
for task in range(tasks):
    places = step | {{"PROCID": task, "LOCALID": task % each, "NODEID": task // each}}
    environment = {{f"SLURM_{{name}}": str(value) for name, value in places.items()}}
    started.append(subprocess.Popen(command, env=os.environ | environment))
sys.exit(max(process.wait() for process in started))
"""


@pytest.fixture
def says_where(tmp_path, monkeypatch):
    """A module that says which process of how many it is."""
    (tmp_path / "says_where.py").write_text(SAYS_WHERE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "says_where"


def test_slurm_tasks_find_their_places(says_where, tmp_path, monkeypatch):
    """With a stand-in for `srun` that sets what SLURM sets."""
    (tmp_path / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    heard = io.StringIO()
    launch(says_where, n_processes=1, n_nodes=2, sink=heard)
    assert sorted(heard.getvalue().splitlines()) == [f"{i} of (2, 1) on {i}, meeting at gpu07" for i in range(2)]


def test_two_machines_meet(says_where, monkeypatch):
    """Two launchers on one machine, each told that it is one of two."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(31_000 + os.getpid() % 10_000))
    heard = [io.StringIO(), io.StringIO()]
    settings = {"n_processes": 1, "n_nodes": 2}
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(launch, says_where, sink=sink, **settings) for sink in heard]
        [job.result(timeout=120) for job in jobs]
    lines = sorted(line for sink in heard for line in sink.getvalue().splitlines() if " of (" in line)
    assert [line.split(",")[0] for line in lines] == ["0 of (2", "1 of (2"]
    assert all("Start this on the other 1 machines" in sink.getvalue() for sink in heard)


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
    "misspelt test gene": ({}, ("FAM01-0", "FAM01_0"), "did you mean"),
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
        {"training": {"precision": "bf16-mixed", "monitor": "val_loss"}},
        {"model": {"pert_encoder": "shuffled"}},
        {"model": {"pert_encoder": "random+onehot", "distributional_loss": "energy+0.1*mse"}},
        {"data": {"output_space": "all"}, "model": {"mmd_num_chunks": 2, "detach_decoder": True}},
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
    assert second["record"]["init_from"]["file"] == start["init_from"]
    best = StateTransition.load(tmp_path / "second" / "checkpoints" / "best.ckpt")
    assert best.extra["init_from"]["not simply copied"] == []


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("numpy"), None])
def test_out_of_memory_ends_with_the_remedies(folder, tmp_path, capsys, monkeypatch, error):
    """Simulated, and (None) a model that no machine holds."""
    config = make_config(folder, tmp_path / "run", model={} if error else {"intermediate_size": 2**52})
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    if error:

        def run_out(*_):
            raise error

        monkeypatch.setattr(training_module, "build_model", run_out)
    assert main(["--config", str(tmp_path / "config.yaml")]) == 1
    said = capsys.readouterr().err
    for remedy in ("--batch_size 4", "cell_set_len=256", "hidden_dim=512", "accumulate_grad_batches=2"):
        assert remedy in said
    assert said.count("\n") == 1


def test_other_errors_are_not_called_out_of_memory(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("expected all tensors on one device")

    config = make_config(folder, tmp_path / "run")
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    monkeypatch.setattr(training_module, "build_model", fail)
    with pytest.raises(RuntimeError, match="one device"):
        main(["--config", str(tmp_path / "config.yaml")])


def test_last_checkpoint_holds_no_frozen_features(folder, tmp_path):
    train(make_config(folder, tmp_path / "run", training={"max_steps": 10}))
    model = StateTransition.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert set(weights(tmp_path / "run")) == {f"model.{name}" for name, _ in model.named_parameters()}
    assert any("vectors" in name for name in model.state_dict())


def test_wandb_disabled_by_its_own_variable(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(make_config(folder, tmp_path / "run", training={"max_steps": 10}, wandb={"use_wandb": True}))
    assert not (tmp_path / "run" / "wandb").exists()


def test_compiled_parts_keep_the_names_of_weights(folder, tmp_path):
    """All parts but the encoder of perturbations, whose input is names."""
    config = make_config(folder, tmp_path)
    model = build_model(config, prepare(config))
    names = list(model.state_dict())
    compile_parts(model)
    assert list(model.state_dict()) == names
    compiled = {name for name, part in model.named_children() if part._compiled_call_impl is not None}
    assert compiled == {name for name, _ in model.named_children()} - {"pert_encoder"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_compiled_training_has_the_curve_of_the_plain_one(folder, tmp_path):
    for name in ("plain", "compiled"):
        training = {"max_steps": 10, "compile": name == "compiled"}
        train(make_config(folder, tmp_path / name, model={"dropout": 0.0}, training=training))
    pd.testing.assert_frame_equal(curve(tmp_path / "compiled"), curve(tmp_path / "plain"), rtol=1e-3)


def test_early_stopping_without_validation_sets_is_refused(folder, tmp_path):
    config = make_config(folder, tmp_path / "run", data={"val_fraction": 0.0}, training={"early_stopping": 3})
    with pytest.raises(InputError, match="needs validation sets"):
        train(config)
    assert not (tmp_path / "run").exists()


def changed_cells(store, rows: np.ndarray):
    """The store with other expression in some rows."""
    X = store.rows(np.arange(len(store)))
    X[rows] += 1.0
    return dataclasses.replace(store, X=csr_matrix(X))


def test_decoder_and_batches_start_from_training_cells_only(folder, tmp_path):
    """Neither the cells nor the batches of validation and test reach the untrained model."""
    config = make_config(
        folder, tmp_path, data={"embed_key": "X_rotated"}, model={"batch_encoder": True, "gene_decoder_bool": True}
    )
    ready = prepare(config)
    held_out = np.concatenate([ready.splits.indices(split) for split in ("val", "test")])
    before = build_model(config, ready)
    obs = ready.store.obs.copy()
    batch = obs["batch"].astype(str).to_numpy()
    batch[held_out] = "seen in the test only"
    obs["batch"] = pd.Categorical(batch)
    for rows, same in ((held_out, True), (ready.splits.control_indices("train"), False)):
        stores = {name: changed_cells(getattr(ready, name), rows) for name in ("store", "targets")}
        stores["store"] = dataclasses.replace(stores["store"], obs=obs)
        after = build_model(config, dataclasses.replace(ready, **stores))
        if same:
            assert after.batch_names == before.batch_names
        weights_of = [model.state_dict() for model in (before, after)]
        assert all(torch.equal(weights_of[0][name], weights_of[1][name]) for name in weights_of[0]) is same


def test_doses_and_modalities_of_the_test_are_not_fitted(folder, tmp_path):
    """A dose that only test cells have changes nothing; a modality that only they have is refused."""
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    test = set(cells.obs["gene"].astype(str)[prepare(make_config(folder, tmp_path)).splits.perturbed_indices("test")])
    is_test, is_control = cells.obs["gene"].isin(test), cells.obs["gene"] == "non-targeting"
    models = []
    for dose in (1.0, 1e6):
        doses = np.where(np.arange(cells.n_obs) % 2, 1.0, 10.0)
        cells.obs["dose"] = np.where(is_control, np.nan, np.where(is_test, dose, doses))
        cells.obs["how"] = "KO"
        (tmp_path / str(dose)).mkdir()
        cells.write_h5ad(tmp_path / str(dose) / "cells.h5ad")
        (tmp_path / str(dose) / "split.toml").write_text((folder / "split.toml").read_text())
        data = {"toml_config_path": str(tmp_path / str(dose) / "split.toml"), "dose_col": "dose", "modality_col": "how"}
        config = make_config(folder, tmp_path, data=data)
        models.append(build_model(config, prepare(config)))
    first, second = (model.state_dict() for model in models)
    assert models[0].pert_encoder.labels.doses == models[1].pert_encoder.labels.doses == [1.0, 10.0]
    assert all(torch.equal(first[name], second[name]) for name in first)
    cells.obs["how"] = np.where(is_test, "CRISPRi", "KO")
    cells.write_h5ad(tmp_path / "1000000.0" / "cells.h5ad")
    with pytest.raises(InputError, match="'CRISPRi' occurs in the split 'test' but in no training cell"):
        prepare(config)


def test_gradients_are_clipped(folder, tmp_path):
    """The first moments of Adam after one step hold a tenth of the gradient that it was given."""
    norms = []
    for norm in (1e-2, 1e6):
        config = make_config(folder, tmp_path / str(norm), training={"max_steps": 1, "gradient_clip_val": norm})
        train(config)
        state = torch.load(tmp_path / str(norm) / "checkpoints" / "last.ckpt", weights_only=True)
        moments = [entry["exp_avg"] / 0.1 for entry in state["optimizer_states"][0]["state"].values()]
        norms.append(float(torch.cat([moment.flatten() for moment in moments]).norm()))
    assert norms[0] == pytest.approx(1e-2, rel=1e-3)
    assert norms[1] > 0.1


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        ({"output_space": "embedding"}, {}, "embed_key"),
        ({"embed_key": "X_rotated", "output_space": "all"}, {"gene_decoder_bool": False}, "gene_decoder_bool"),
        ({}, {"mmd_num_chunks": 41}, "mmd_num_chunks is 41, but cells have 40"),
    ],
)
def test_options_that_fit_no_data_are_refused(folder, tmp_path, data, model, said):
    with pytest.raises(InputError, match=said):
        prepare(make_config(folder, tmp_path / "run", data=data, model=model))
    assert not (tmp_path / "run").exists()


NOT_SHARED = """
import sys
from pathlib import Path
import pytorch_lightning as pl
from esm_perturb.core.config import InputError
from esm_perturb.core.processes import rank
from esm_perturb.core.trainer import check_shared_folder
strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
trainer = pl.Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy=strategy, logger=False, max_steps=1)
strategy.setup_environment()
for folder, shared in (("same", True), (f"machine{rank()}", False)):
    try:
        check_shared_folder(trainer, Path(sys.argv[1]) / folder)
    except InputError as error:
        assert not shared and "same folder on all machines" in str(error)
    else:
        assert shared
"""


def test_machines_without_a_shared_folder_are_told_at_the_start(tmp_path):
    """Two processes, told that each is a machine of its own."""
    (tmp_path / "not_shared.py").write_text(NOT_SHARED)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(32_000 + os.getpid() % 10_000), "WORLD_SIZE": "2"}
    command = [sys.executable, str(tmp_path / "not_shared.py"), str(tmp_path)]
    places = [{"RANK": str(i), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(i)} for i in range(2)]
    jobs = [subprocess.Popen(command, env=ENVIRONMENT | meeting | place) for place in places]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert not list((tmp_path / "same").iterdir())


def test_a_killed_process_is_named_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(KilledError, match="killed .signal 9., most often for lack of memory; the same command goes on"):
        launch("dies", sink=io.StringIO())
