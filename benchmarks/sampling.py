"""Sampling speed: residues a second, and what is saved by not asking the network where nothing changes."""

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from esm_perturb.proteins import sampling
from esm_perturb.proteins.denoiser import Denoiser
from esm_perturb.proteins.diffusion_model import DiffusionModel, length_prior
from esm_perturb.proteins.noise import noise_schedule
from esm_perturb.proteins.rank_streams import rank_generator

# length, sequences, steps, process, predictor
CASES = {
    "10x100, 100 steps, euler": (100, 10, 100, "absorbing", "euler"),
    "10x100, 400 steps, euler": (100, 10, 400, "absorbing", "euler"),
    "10x100, 400 steps, analytic": (100, 10, 400, "absorbing", "analytic"),
    "10x100, first hitting": (100, 10, 0, "absorbing", "first_hitting"),
    "10x100, 400 steps, uniform, euler": (100, 10, 400, "uniform", "euler"),
}


class AskEverySequence(sampling._Sampler):
    """The same sampler without the saving: every sequence passes through the network at every step."""

    def posterior(self, rows, t):
        everyone = torch.arange(len(self.tokens), device=self.tokens.device)
        wanted = torch.isin(everyone, rows)
        at = t[0] if len(t) else torch.tensor(0.5)  # unused answers: the time does not matter
        for part, p in super().posterior(everyone, at.expand(len(everyone))):
            kept = wanted[part]
            if kept.any():
                yield part[kept], p[kept]


def untrained(process: str, length: int, hidden_dim: int, device: str) -> DiffusionModel:
    """A network of the default depth; its weights do not matter for speed."""
    torch.manual_seed(0)
    network = Denoiser(hidden_dim=hidden_dim, n_layers=4, n_heads=4, dropout=0.0, time_conditioning=True)
    parameterization = "subs" if process == "absorbing" else "score"
    settings = {"process": process, "parameterization": parameterization, "noise": noise_schedule("loglinear")}
    return DiffusionModel(network, **settings, length_prior=length_prior([length]), max_length=length).to(device)


def drawn(model: DiffusionModel, sampler: type, case: tuple) -> tuple[float, sampling.Samples]:
    """Seconds, and what was drawn."""
    length, n, steps, _, predictor = case
    usual, sampling._Sampler = sampling._Sampler, sampler
    try:
        began = time.perf_counter()
        options = {"steps": steps or 1, "predictor": predictor, "lengths": [length] * n}
        result = sampling.sample(model, n, generator=rank_generator(0, 0, 0), **options)
        return time.perf_counter() - began, result
    finally:
        sampling._Sampler = usual


def measure(name: str, repeats: int, hidden_dim: int, device: str) -> tuple[float | None, dict]:
    """Ratio of the time without the saving to the time with it (None where there are no steps to save), and figures."""
    case = CASES[name]
    length, n, steps, process, _ = case
    model = untrained(process, length, hidden_dim, device)
    sides = {"ours": sampling._Sampler} | ({"every step": AskEverySequence} if steps else {})
    spent: dict[str, list[float]] = {side: [] for side in sides}
    results = {}
    for repeat in range(-1, repeats):
        for side in sorted(sides, reverse=bool(repeat % 2)):
            seconds, results[side] = drawn(model, sides[side], case)
            if repeat >= 0:
                spent[side].append(seconds)
    medians = {side: statistics.median(times) for side, times in spent.items()}
    ours = results["ours"]
    figures = {f"{name}, residues/s": round(length * n / medians["ours"])}
    figures[f"{name}, sequences through the network"] = ours.n_network_rows
    if not steps:
        return None, figures
    if ours.sequences != results["every step"].sequences:
        raise SystemExit(f"{name}: other proteins are drawn without the saving")
    figures[f"{name}, without the saving"] = results["every step"].n_network_rows
    figures[f"{name}, residues/s without the saving"] = round(length * n / medians["every step"])
    ratio = round(medians["every step"] / medians["ours"], 2)
    print(f"{name}: ratio {ratio}, {figures[f'{name}, residues/s']} residues/s", file=sys.stderr)
    return ratio, figures


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(
        description="Sampling with and without a network call for every sequence and step."
    )
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--hidden_dim", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--require", type=float, metavar="RATIO", help="exit 1 when 400 Euler steps save less")
    chosen = parser.parse_args()
    ratios, figures = {}, {}
    for name in CASES:
        ratio, more = measure(name, chosen.repeats, chosen.hidden_dim, chosen.device)
        figures |= more
        if ratio is not None:
            ratios[name] = ratio
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": chosen.device,
        "hidden_dim": chosen.hidden_dim,
        "repeats": chosen.repeats,
    }
    print(json.dumps({"name": "sampling", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require and not ratios["10x100, 400 steps, euler"] >= chosen.require:
        raise SystemExit(f"sampling: ratio {ratios['10x100, 400 steps, euler']}, required {chosen.require}")


if __name__ == "__main__":
    main()
