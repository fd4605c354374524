"""Protein diffusion: losses against sums by hand, bounds against exact likelihoods, killed runs resumed."""

import json
import math
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

from esm_perturb.core.config import InputError, to_dict
from esm_perturb.core.files import write_yaml
from esm_perturb.proteins import diffusion as diffusion_module
from esm_perturb.proteins.denoiser import Denoiser
from esm_perturb.proteins.diffusion import main, train_diffusion
from esm_perturb.proteins.diffusion_config import protein_config, read_protein_config
from esm_perturb.proteins.diffusion_data import TokenStore, split_proteins, tokenise
from esm_perturb.proteins.diffusion_losses import bound_nats, masked_cross_entropy, score_entropy, token_losses
from esm_perturb.proteins.diffusion_model import DiffusionModel, LengthPrior, length_prior
from esm_perturb.proteins.forward_process import MASK, PAD, add_noise, encode_proteins, posterior_from_score
from esm_perturb.proteins.noise import NOISE_SCHEDULES, noise_schedule
from esm_perturb.proteins.protein_sets import shared_words

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "proteins"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
PAIRS = (("absorbing", "subs"), ("absorbing", "score"), ("uniform", "score"))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are rounded differently by more threads; the launched processes have one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fasta(tmp_path_factory) -> Path:
    """Two hundred proteins of a made-up grammar."""
    rng = np.random.default_rng(0)
    words = ["MKT", "AYIA", "KQRQ", "ISF", "VKSH", "GLEE", "DPNW"]
    proteins = sorted({"".join(rng.choice(words, size=rng.integers(4, 9))) for _ in range(200)})
    path = tmp_path_factory.mktemp("proteins") / "made_up.fasta"
    path.write_text("".join(f">p{i}\n{protein}\n" for i, protein in enumerate(proteins)))
    return path


def make_config(fasta: Path, output_dir: Path, *, training=None, data=None, model=None, diffusion=None, sampling=None):
    """A run of a second."""
    settings = {"max_steps": 30, "val_freq": 10, "batch_size": 8, "threads": 1, "warmup_steps": 5, "accelerator": "cpu"}
    return protein_config(
        {
            "output_dir": str(output_dir),
            "data": {"files": [str(fasta)], "min_length": 5, "max_length": 40, "clusters": "none"} | (data or {}),
            "model": {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "dropout": 0.1} | (model or {}),
            "diffusion": {"val_times": 2} | (diffusion or {}),
            "training": settings | {"precision": "32-true"} | (training or {}),
            "sampling": sampling or {"sample_interval": 0},
        }
    )


def random_model(process: str, parameterization: str, noise: str = "loglinear") -> DiffusionModel:
    """A model whose weights are large enough to say something."""
    torch.manual_seed(0)
    network = Denoiser(16, 2, 2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kinds = {"process": process, "parameterization": parameterization, "noise": noise_schedule(noise)}
    return DiffusionModel(network, **kinds, length_prior=length_prior([5, 7]), max_length=20).eval()


# Losses and bounds


def test_masked_cross_entropy_by_hand():
    """Log-linear: nats of the true residue over t, at masked tokens only, whatever eps is."""
    t = torch.tensor([0.25], dtype=torch.float64)
    posterior = torch.full((1, 3, 20), 0.5 / 19, dtype=torch.float64)
    posterior[..., 2] = 0.5
    clean, noisy = torch.tensor([[2, 3, PAD]]), torch.tensor([[MASK, MASK, PAD]])
    for eps in (1e-3, 0.2):
        schedule = noise_schedule("loglinear", eps=eps)
        loss = masked_cross_entropy(posterior.log(), clean, noisy, schedule.sigma(t), schedule.rate(t))
        torch.testing.assert_close(loss, torch.tensor([[math.log(2) / 0.25, math.log(38) / 0.25, 0.0]]).double())
    unmasked = masked_cross_entropy(posterior.log(), clean, clean, schedule.sigma(t), schedule.rate(t))
    assert not unmasked.any()


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("token", [4, 9, MASK])
def test_score_entropy_by_double_loop(process, token):
    """The sum over transitions, written out with q(y | x0) from a matrix exponential."""
    if (process == "absorbing") != (token == MASK):
        pytest.skip("absorbing tokens without a mask cost nothing, and uniform ones have none")
    sigma, rate, clean = 0.7, 1.3, 4
    n = 21 if process == "absorbing" else 20
    if process == "absorbing":
        generator = -torch.eye(n)
        generator[:, MASK] += 1
    else:
        generator = torch.full((n, n), 1 / 20) - torch.eye(n)
    forward = torch.linalg.matrix_exp(sigma * generator.double())[clean]
    torch.manual_seed(0)
    log_score = torch.randn(20, dtype=torch.float64)
    expected = 0.0
    for y in range(20):
        if y != token:
            ratio = float(forward[y] / forward[token])
            entropy = math.exp(log_score[y]) - ratio * float(log_score[y])
            entropy += ratio * (math.log(ratio) - 1) if ratio > 1e-12 else 0.0
            expected += rate * float(generator[y, token]) * entropy
    found = score_entropy(
        log_score[None, None],
        torch.tensor([[clean]]),
        torch.tensor([[token]]),
        torch.tensor([sigma], dtype=torch.float64),
        torch.tensor([rate], dtype=torch.float64),
        process,
    )
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_score_entropy_is_least_at_the_truth(process):
    """Its gradient vanishes at the true ratio, and only there."""
    sigma, rate = torch.tensor([0.7], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    noisy = torch.tensor([[MASK if process == "absorbing" else 9]])
    if process == "absorbing":
        ratio = torch.full((20,), 1e-9, dtype=torch.float64)
        ratio[4] = 1 / math.expm1(0.7)
    else:
        ratio = torch.ones(20, dtype=torch.float64)
        ratio[4] = 1 + 20 / math.expm1(0.7)
    score = ratio.log()[None, None].requires_grad_()
    loss = score_entropy(score, torch.tensor([[4]]), noisy, sigma, rate, process).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(score.grad.abs().max()) < 1e-6


class Chain:
    """The exact model of two-letter proteins of three residues, by summing over all of them."""

    def __init__(self, process: str, noise: str):
        self.process, self.noise = process, noise_schedule(noise)
        self.parameterization = "subs" if process == "absorbing" else "score"
        letters = torch.tensor([2, 11])
        self.proteins = letters[torch.cartesian_prod(*[torch.arange(2)] * 3)]
        steps = (self.proteins[:, 1:] == self.proteins[:, :-1]).double()
        self.weights = (0.9 * steps + 0.1 * (1 - steps)).prod(-1) / 2

    def likelihood(self, noisy: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """q(noisy token i | x0 = protein k), (n, n_proteins, 3)."""
        same = (noisy[:, None] == self.proteins[None]).double()
        alpha = alpha.double()[:, None, None]
        if self.process == "absorbing":
            return torch.where((noisy == MASK)[:, None], 1 - alpha, alpha * same)
        return alpha * same + (1 - alpha) / 20

    def log_score(self, tokens, lengths, t):
        alpha = self.noise.alpha(t)
        scores = []
        for place in range(3):
            each = []
            for residue in range(20):
                changed = tokens.clone()
                changed[:, place] = residue
                each.append((self.likelihood(changed, alpha).prod(-1) * self.weights).sum(-1))
            each = torch.stack(each, dim=-1)
            scores.append(torch.log(each / each.gather(-1, tokens[:, [place]])))
        return torch.stack(scores, dim=1)

    def denoise(self, tokens, lengths, t):
        joint = self.likelihood(tokens, self.noise.alpha(t)).prod(-1) * self.weights
        posterior = joint / joint.sum(-1, keepdim=True)
        hot = torch.nn.functional.one_hot(self.proteins, 20).double()
        return torch.einsum("nk,kle->nle", posterior, hot).clamp(min=1e-300).log()


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("noise", NOISE_SCHEDULES)
def test_bound_of_the_exact_model_is_the_likelihood(process, noise):
    """Residues that depend on one another: the exact score gives the negative log-likelihood, not only a bound."""
    model = Chain(process, noise)
    chosen = torch.tensor([0, 2] * 2000)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((4000,), 3)
    bound = bound_nats(model, model.proteins[chosen], lengths, n_times=16, generator=generator)
    for protein in (0, 2):
        mean, error = bound[chosen == protein].mean(), bound[chosen == protein].std() / math.sqrt(2000)
        assert abs(float(mean + model.weights[protein].log())) < max(5 * float(error), 0.01)


def test_score_gives_back_the_posterior():
    """The documented formula against sums over all proteins."""
    model = Chain("uniform", "loglinear")
    tokens = torch.tensor([[2, 5, 11], [2, 2, 2], [11, 0, 19]])
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    lengths = torch.full((3,), 3)
    found = posterior_from_score(model.log_score(tokens, lengths, t), tokens, model.noise.alpha(t), "uniform")
    torch.testing.assert_close(found.exp(), model.denoise(tokens, lengths, t).exp(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("process", "parameterization"), PAIRS)
@pytest.mark.parametrize("noise", NOISE_SCHEDULES)
def test_gradients_are_finite_at_the_ends_of_time(process, parameterization, noise):
    model = random_model(process, parameterization, noise)
    tokens, lengths = encode_proteins(["MKTVRQERLK", "ACDEF"])
    for t in (1e-3, 1.0):
        times = torch.full((2,), t, dtype=torch.float64)
        loss = token_losses(model, tokens, lengths, times, generator=torch.Generator().manual_seed(0)).sum()
        model.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# The model


@pytest.mark.parametrize(("process", "parameterization"), PAIRS)
def test_a_protein_is_denoised_alike_alone_and_in_a_batch(process, parameterization):
    model = random_model(process, parameterization)
    tokens, lengths = encode_proteins(["MKTVRQERLK", "ACDEFGHIKLMNPQRSTVWY"])
    t = torch.tensor([0.6, 0.3], dtype=torch.float64)
    noisy = add_noise(tokens, model.noise.alpha(t), process, generator=torch.Generator().manual_seed(0))
    both = model.denoise(noisy, lengths, t)
    alone = model.denoise(noisy[:1, :10], lengths[:1], t[:1])
    torch.testing.assert_close(both[:1, :10], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.exp().sum(-1), torch.ones(2, 20), atol=1e-5, rtol=0)


def test_places_of_an_all_masked_protein_differ():
    """Rotary positions know distances only; what is added at the ends tells the first residue from the tenth."""
    model = random_model("absorbing", "subs")
    posterior = model.denoise(torch.full((1, 20), MASK), torch.tensor([20]), torch.ones(1))
    assert (posterior[0, 0] - posterior[0, 10]).abs().max() > 1e-2


def test_saved_models_hold_no_pickle_and_damage_is_said(tmp_path):
    model = random_model("uniform", "score", "geometric")
    assert isinstance(model.length_prior, LengthPrior)
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = DiffusionModel.load(tmp_path)
    assert again.noise == model.noise
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        DiffusionModel.load(tmp_path)


# Data


def test_inputs_of_every_form_give_the_same_run(fasta, tmp_path):
    """FASTA, JSONL and a tokenised folder hold the same proteins, so they train to the same weights."""
    sequences = [line for line in fasta.read_text().splitlines() if not line.startswith(">")]
    lines = tmp_path / "same.jsonl"
    lines.write_text("".join(json.dumps({"sequence": sequence}) + "\n" for sequence in sequences))
    stores = [tokenise([fasta]), tokenise([lines]), tokenise([fasta], tmp_path / "store")]
    assert isinstance(stores[2].tokens, np.memmap)
    for store in stores[1:]:
        assert np.array_equal(store.tokens, stores[0].tokens) and np.array_equal(store.offsets, stores[0].offsets)
    config = make_config(tmp_path / "store", tmp_path / "run", training={"max_steps": 10})
    train_diffusion(config)
    train_diffusion(make_config(fasta, tmp_path / "other", training={"max_steps": 10}))
    assert_same_weights(tmp_path / "run", tmp_path / "other")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real proteins in shared/data/proteins")
def test_real_proteins_are_counted_and_their_relatives_kept_apart():
    store = tokenise([SHARED / "ecoli_proteome.fasta.gz"])
    kept = {key: store.record[key] for key in ("empty", "other residues", "nucleotides", "duplicates", "kept")}
    assert sum(kept.values()) == store.record["read"] > 4000
    splits = split_proteins(store, protein_config({}).data, seed=0)
    train, test = ([store.sequence(i) for i in part] for part in (splits.train, splits.test))
    assert (shared_words(train, test) < 2).all()
    assert len(splits.train) > 0.7 * len(store)


def test_a_damaged_store_is_refused(fasta, tmp_path):
    tokenise([fasta], tmp_path / "store")
    record = json.loads((tmp_path / "store" / "record.json").read_text())
    (tmp_path / "store" / "record.json").write_text(json.dumps(record | {"alphabet": "LAGVSERTIDPKQNFYMHWC"}))
    with pytest.raises(InputError, match="has the alphabet"):
        TokenStore.open(tmp_path / "store")


# Runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def start_and_kill(config, path: Path, n_processes: int = 1) -> None:
    """Start a run on its own and kill it, without warning, when it has written `last.ckpt`."""
    write_yaml(path, to_dict(config))
    checkpoint = Path(config.output_dir) / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-m", "esm_perturb.proteins.diffusion", "--config", str(path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert checkpoint.exists() and process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("val_freq", [10, 22])
def test_a_killed_run_goes_on_bitwise(fasta, tmp_path, val_freq):
    """In mid-epoch, and exactly at an epoch's end (22 batches)."""
    steps = {"max_steps": 44, "val_freq": val_freq}
    killed = make_config(fasta, tmp_path / "killed", training=steps)
    start_and_kill(killed, tmp_path / "killed.yaml")
    resumed = train_diffusion(killed)
    assert 0 < resumed["resumed_from_step"] < 44
    whole = train_diffusion(make_config(fasta, tmp_path / "whole", training=steps))
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert resumed["best"] == whole["best"] and resumed["test"] == whole["test"]
    timings = ["steps_per_second", "residues_per_second"]
    tables = [pd.read_csv(tmp_path / run / "metrics.csv").drop(columns=timings) for run in ("killed", "whole")]
    pd.testing.assert_frame_equal(*tables)
    best = [DiffusionModel.load(tmp_path / run / "checkpoints" / "best").state_dict() for run in ("killed", "whole")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_two_processes_agree_and_see_different_proteins(fasta, tmp_path):
    """gloo: one set of weights, and a bound that does not depend on who scored which protein."""
    config = make_config(fasta, tmp_path / "run", training={"n_processes": 2, "max_steps": 20, "batch_size": 4})
    write_yaml(tmp_path / "run.yaml", to_dict(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "esm_perturb.proteins.diffusion", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert summary["steps"] == 20 and math.isfinite(summary["best"]["val_loss"])
    with pytest.raises(InputError, match="n_processes x training.n_nodes is 2, but this process was started alone"):
        train_diffusion(config)


@pytest.mark.parametrize(("process", "parameterization"), PAIRS)
def test_every_kind_of_diffusion_learns(fasta, tmp_path, process, parameterization):
    """The bound falls below what composition alone gives."""
    kinds = {"process": process, "parameterization": parameterization, "noise": "cosine", "val_times": 8}
    steps = {"max_steps": 100, "val_freq": 50, "lr": 5e-3, "ema_decay": 0.9, "batch_size": 32}
    sizes = {"hidden_dim": 32, "dropout": 0.0}
    summary = train_diffusion(make_config(fasta, tmp_path / "run", training=steps, diffusion=kinds, model=sizes))
    assert summary["best"]["val_loss"] < summary["test_composition"] - 0.1


def test_samples_come_during_training_and_leave_no_trace(fasta, tmp_path):
    """A run with sampling ends with bitwise the weights of one without."""
    sampling = {"sample_interval": 5, "min_steps_before_sampling": 5, "eval_batch_size": 2, "eval_steps": 4}
    sampling |= {"calculate_esm_perplexity": False}
    for name, block in (("with", sampling), ("without", {"sample_interval": 0})):
        train_diffusion(make_config(fasta, tmp_path / name, training={"max_steps": 10}, sampling=block))
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert list((tmp_path / "with" / "samples").iterdir()) and not (tmp_path / "without" / "samples").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"diffusion": {"noise": "cosine"}}, "diffusion.noise differs"),
        ({"training": {"seed": 7}}, "differs"),
        ({"data": {"max_length": 30}}, "data.max_length differs"),
    ],
)
def test_another_run_in_the_folder_is_refused(fasta, tmp_path, change, said):
    train_diffusion(make_config(fasta, tmp_path / "run", training={"max_steps": 10}))
    with pytest.raises(InputError, match=said):
        train_diffusion(make_config(fasta, tmp_path / "run", **change))


def test_exit_codes_and_messages(fasta, tmp_path, capsys, monkeypatch):
    write_yaml(tmp_path / "bad.yaml", {"output_dir": str(tmp_path / "run"), "data": {"files": ["/nowhere.fasta"]}})
    assert main(["--config", str(tmp_path / "bad.yaml")]) == 2
    assert "input error: Protein file '/nowhere.fasta' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    diverging = {"lr": 1e38, "gradient_clip_val": 1e30, "warmup_steps": 0}
    write_yaml(tmp_path / "lr.yaml", to_dict(make_config(fasta, tmp_path / "lr", training=diverging)))
    assert main(["--config", str(tmp_path / "lr.yaml")]) == 1
    assert "lower training.lr" in capsys.readouterr().err
    write_yaml(tmp_path / "good.yaml", to_dict(make_config(fasta, tmp_path / "good")))

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(diffusion_module, "new_model", run_out)
    assert main(["--config", str(tmp_path / "good.yaml")]) == 1
    assert "training.batch_size=8" in capsys.readouterr().err


def test_the_shipped_configuration_holds_the_defaults():
    assert read_protein_config(ROOT / "configs" / "config_protein.yaml") == protein_config({})
