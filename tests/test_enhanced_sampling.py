"""Samples while training: the configuration, different sequences on every rank, and their perplexity."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from esm_perturb.core.averaging import WeightAverage
from esm_perturb.core.config import InputError, TrainingConfig, WandbConfig
from esm_perturb.core.trainer import MetricsFile, build_trainer, wandb_logger
from esm_perturb.proteins.denoiser import Denoiser
from esm_perturb.proteins.diffusion_config import DiffusionConfig, SamplingConfig, read_protein_config
from esm_perturb.proteins.diffusion_model import DiffusionModel, length_prior
from esm_perturb.proteins.diffusion_task import DiffusionTask
from esm_perturb.proteins.exact_denoiser import ExactDenoiser
from esm_perturb.proteins.noise import noise_schedule
from esm_perturb.proteins.perplexity import calculate_esm_perplexity
from esm_perturb.proteins.sampling_callback import (
    COLUMNS,
    SampleDuringTraining,
    draw_on_ranks,
    gather,
    read_samples,
    sample_rows,
)

ROOT = Path(__file__).parents[1]
PROTEIN = "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG"
QUICK = SamplingConfig(
    sample_interval=2, min_steps_before_sampling=4, eval_batch_size=3, eval_steps=8, esm_model="mini_esm2"
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- 1. the configuration ----


def test_documented_settings_are_loaded():
    documented = {
        "sample_interval": 100,
        "min_steps_before_sampling": 100,
        "eval_batch_size": 10,
        "eval_max_length": 512,
        "eval_steps": 100,
        "predictor": "euler",
        "save_to_file": True,
        "calculate_esm_perplexity": True,
        "esm_model": "esm2_t6_8M_UR50D",
        "esm_batch_size": 4,
    }
    for config in (read_protein_config(), read_protein_config(ROOT / "configs" / "config_protein.yaml")):
        found = dataclasses.asdict(config.sampling)
        assert {key: found[key] for key in documented} == documented
        assert set(found) - set(documented) == {"seed_scheme"}
    changed = read_protein_config(overrides=["sampling.eval_batch_size=4", "sampling.predictor=analytic"])
    assert (changed.sampling.eval_batch_size, changed.sampling.predictor) == (4, "analytic")
    with pytest.raises(InputError, match="sampling.eval_batchsize"):
        read_protein_config(overrides=["sampling.eval_batchsize=4"])


# ---- 2. ranks ----


def forked(n: int, work, *arguments) -> list:
    """What `work(rank, …)` returns on each of `n` processes that talk by gloo; all of them must end well."""
    context = multiprocessing.get_context("fork")
    results, port = context.SimpleQueue(), str(20_000 + (os.getpid() * 7 + random.randrange(5000)) % 20_000)

    def run(rank: int) -> None:
        places = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "GROUP_RANK": 0}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()})
        torch.set_num_threads(1)
        results.put(json.dumps([rank, work(rank, *arguments)]))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    exits = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exits == [0] * n  # None: a deadlock
    return [value for _, value in sorted(json.loads(results.get()) for _ in range(n))]


class OutOfMemory(ExactDenoiser):
    """Has no memory left."""

    def denoise(self, tokens, lengths, t):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def draw(rank: int, n: int, proteins: list[str], fails: int) -> dict:
    """Draw and gather as the callback does, with an oracle."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=n)
    model = (OutOfMemory if rank == fails else ExactDenoiser)(proteins)
    sequences, repeated, failure = draw_on_ranks(model, QUICK, seed=1, step=100, rank=rank)
    scores = {"perplexities": [math.nan] * len(sequences), "reasons": [""] * len(sequences)}
    place = {"step": 100, "epoch": 0, "rank": rank}
    everyone = gather(sample_rows(place, sequences, **scores, repeated=repeated, failure=failure))
    torch.distributed.destroy_process_group()
    return {"sequences": sequences, "status": [row["status"] for rows in everyone for row in rows]}


@pytest.mark.parametrize("n, fails", [(2, -1), (2, 1), (4, -1), (4, 0)])
def test_ranks_draw_different_sequences_and_one_may_fail(n, fails):
    proteins = ["".join(np.random.default_rng(i).choice(list("ACDEFGHIKL"), 12)) for i in range(40)]
    results = forked(n, draw, n, proteins, fails)
    drawn = [sequence for result in results for sequence in result["sequences"]]
    assert len(drawn) == len(set(drawn)) == 3 * (n - (fails >= 0))
    assert all(result["status"] == results[0]["status"] for result in results)
    assert results[0]["status"].count("failed: out of memory") == (fails >= 0)
    if fails < 0:
        again = draw_on_ranks(ExactDenoiser(proteins), QUICK, seed=1, step=100, rank=n - 1)[0]
        assert again == results[-1]["sequences"]  # the same (seed, step, rank)


def test_sequences_that_several_ranks_draw_are_drawn_again():
    """12 sequences of one residue on 4 ranks; 13 exist, so all ranks together need nearly all of them."""
    results = forked(4, draw, 4, list("ACDEFGHIKLMNP"), -1)
    statuses = results[0]["status"]
    drawn = [sequence for result in results for sequence in result["sequences"]]
    assert len(set(drawn)) == 12 - statuses.count("duplicate") and len(set(drawn)) >= 9
    assert forked(2, draw, 2, ["A", "C"], -1)[0]["status"].count("duplicate") == 4  # two exist, six are wanted


# ---- training ----


def network() -> DiffusionModel:
    torch.manual_seed(0)
    net = Denoiser(hidden_dim=16, n_layers=1, n_heads=2, dropout=0.2, time_conditioning=True)
    settings = {"process": "absorbing", "parameterization": "subs", "noise": noise_schedule("loglinear")}
    return DiffusionModel(net, **settings, length_prior=length_prior([30, 40]), max_length=48)


class Batches(torch.utils.data.Dataset):
    """Random proteins, ready as batches."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, 20, (4, 40), generator=torch.Generator().manual_seed(index))
        return tokens, torch.full((4,), 40)


def fit(
    folder: Path, sampling: SamplingConfig | None, *, steps: int = 6, loggers=(), accumulate: int = 1
) -> DiffusionTask:
    """Train a small model; sampling happens after steps 4 and 6."""
    training = TrainingConfig(
        max_steps=steps, lr=1e-2, accelerator="cpu", precision="32-true", accumulate_grad_batches=accumulate
    )
    callbacks = [WeightAverage(0.9)]
    callbacks += [] if sampling is None else [SampleDuringTraining(sampling, 42, folder / "samples")]
    metrics = MetricsFile(folder / "metrics.csv")
    trainer = build_trainer(training, loggers=[metrics, *loggers], callbacks=callbacks)
    task = DiffusionTask(network(), DiffusionConfig(), training)
    trainer.fit(task, torch.utils.data.DataLoader(Batches(), batch_size=None))
    return task


def same_weights(one: DiffusionTask, two: DiffusionTask) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_ends_with_the_same_weights(tmp_path, capsys, accumulate):
    with_samples = fit(tmp_path / "with", QUICK, accumulate=accumulate)
    said = capsys.readouterr().out.splitlines()
    assert same_weights(with_samples, fit(tmp_path / "without", None, accumulate=accumulate))
    table = read_samples(tmp_path / "with" / "samples")
    assert table.columns.tolist() == COLUMNS and table["step"].tolist() == [4] * 3 + [6] * 3
    assert (table["status"] == "ok").all() and table["length"].isin([30, 40]).all() and table["sequence"].is_unique
    assert said[:4] == [
        "Rank 0: Sampling 3 sequences (step 4)",
        "Rank 0: Calculating ESM perplexity for 3 sequences...",
        f"Rank 0: ESM perplexity calculated. Mean: {table['perplexity'][:3].mean():.2f}",
        "Rank 0: Generated 3 sequences at step 4:",
    ]
    assert said[4] == f"  Rank 0 Sample 1: {table['sequence'][0]} (ESM PPL: {table['perplexity'][0]:.2f})"
    expected = calculate_esm_perplexity(table["sequence"][:3].tolist(), "mini_esm2", seed=42)
    np.testing.assert_allclose(table["perplexity"][:3], expected, rtol=1e-4)


def test_averaged_weights_are_sampled(tmp_path, monkeypatch):
    from esm_perturb.proteins import sampling_callback

    seen = []

    def record(model, sampling, **options):
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return [], [], "recorded"

    monkeypatch.setattr(sampling_callback, "draw_on_ranks", record)
    task = fit(tmp_path, QUICK)
    average = next(c for c in task.trainer.callbacks if isinstance(c, WeightAverage)).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], average.values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[-1], task.parameters(), strict=True))


def train_on_ranks(rank: int, folder: str, fails: int) -> dict:
    """Two fits by Lightning's DDP, with samples and without; on one rank the evaluator fails."""
    place = Path(folder)
    model = "no/such/folder" if rank == fails else "mini_esm2"
    with_samples = fit(place / "with", dataclasses.replace(QUICK, esm_model=model))
    same = same_weights(with_samples, fit(place / "without", None))
    torch.distributed.destroy_process_group()
    return {"same": same}


@pytest.mark.parametrize("fails", [-1, 1])
def test_two_processes_train_and_sample(tmp_path, fails):
    assert forked(2, train_on_ranks, str(tmp_path), fails) == [{"same": True}] * 2
    table = read_samples(tmp_path / "with" / "samples")
    assert table.groupby(["step", "rank"]).size().to_dict() == {(4, 0): 3, (4, 1): 3, (6, 0): 3, (6, 1): 3}
    assert table["sequence"].is_unique and len(list((tmp_path / "with" / "samples").iterdir())) == 2
    assert table["perplexity"].isna().tolist() == (table["rank"] == fails).tolist()
    logged = pd.read_csv(tmp_path / "with" / "metrics.csv").set_index("step").loc[4]
    first = table[(table["step"] == 4) & table["perplexity"].notna()]
    for name, value in (("mean", first["perplexity"].mean()), ("std", first["perplexity"].std(ddof=0))):
        assert logged[f"samples/esm_perplexity_{name}"] == pytest.approx(value, rel=1e-4)
    assert ("samples/rank1/esm_perplexity_mean" in logged) == (fails < 0) and logged["samples/count"] == 6


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of an offline run: after 7 bytes, LevelDB's log format (32 KiB blocks; checksum, length, part)."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, part = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline_holds_the_documented_keys(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = WandbConfig(use_wandb=True, mode="offline")
    logger = wandb_logger(config, output_dir=tmp_path, run_name="test", settings={})
    fit(tmp_path, QUICK, steps=4, loggers=[logger])
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    (row,) = [row for row in rows if "samples/step" in row]
    table = read_samples(tmp_path / "samples")
    assert row["samples/sequences"].splitlines()[0].startswith(f"Rank 0 Sample 1: {table['sequence'][0]} (ESM PPL: ")
    assert {key: row[f"samples/{key}"] for key in ("step", "epoch", "count", "rank")} == {
        "step": 4, "epoch": 0, "count": 3, "rank": 0,
    }  # fmt: skip
    perplexity = table["perplexity"].to_numpy()
    for name in ("mean", "std", "min", "max"):
        assert row[f"samples/esm_perplexity_{name}"] == pytest.approx(getattr(np, name)(perplexity), rel=1e-6)
    assert row["samples/rank0/esm_perplexity_mean"] == pytest.approx(perplexity.mean(), rel=1e-6)


@pytest.mark.parametrize("broken", ["draw", "score", "write"])
def test_a_failure_costs_samples_and_not_the_training(tmp_path, capsys, monkeypatch, broken):
    from esm_perturb.proteins import sampling_callback

    def fail(*_, **__):
        raise OSError("disk is full") if broken == "write" else torch.OutOfMemoryError("CUDA out of memory.")

    if broken == "score":
        monkeypatch.setattr(sampling_callback.ESMEvaluator, "score", fail)
    else:
        monkeypatch.setattr(sampling_callback, {"draw": "sample", "write": "write_samples"}[broken], fail)
    with_samples = fit(tmp_path / "with", QUICK)
    said = capsys.readouterr().out
    assert said.count("training goes on") == 2 and ("disk is full" if broken == "write" else "out of memory") in said
    assert same_weights(with_samples, fit(tmp_path / "without", None))


def test_lengths_beyond_the_model_are_cut_to_it_and_impossible_ones_refused(tmp_path):
    fit(tmp_path, dataclasses.replace(QUICK, eval_max_length=10_000), steps=4)
    assert read_samples(tmp_path / "samples")["length"].max() <= 48
    with pytest.raises(InputError, match="1 to 20 residues"):
        fit(tmp_path, dataclasses.replace(QUICK, eval_max_length=20))


# ---- 3. the evaluator ----


def test_the_documented_example():
    """As documented, with a model that needs no download."""
    sequences = [PROTEIN]
    perplexities = calculate_esm_perplexity(
        sequences=sequences, model_name="mini_esm2", batch_size=4, mask_fraction=0.15, seed=42
    )
    assert len(perplexities) == 1 and 1 < perplexities[0] < 33


def test_perplexity_of_varied_sequences():
    """One value for each, in order; a real protein surprises less than residues at random, and nothing is dropped."""
    rng = np.random.default_rng(0)
    shuffled = ["".join(rng.permutation(list(PROTEIN))) for _ in range(8)]
    varied = [PROTEIN, "ACDEFGHIKLMNPQRSTVWY" * 3, "A" * 60, "M", "", "MK1TV", *shuffled]
    values = calculate_esm_perplexity(varied, "mini_esm2", batch_size=3)
    assert len(values) == len(varied)
    assert [math.isnan(value) for value in values[:6]] == [False, False, False, False, True, True]
    assert all(1 <= value < 1000 for value in values[:4])
    assert values[0] == pytest.approx(calculate_esm_perplexity([PROTEIN], "mini_esm2")[0], rel=1e-4)
