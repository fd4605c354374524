"""Energy distance, forward and backward: ours against geomloss, in turn, on the same sets.

usage: python benchmarks/losses.py [repeats] [--require ENERGY]

Both compute the same value and gradient, geomloss's V-statistic, which is asserted first; where sets have masks,
geomloss gets them as weights. The unbiased rows are ours with its default statistic beside geomloss's one. Everything
runs with the threads that torch takes (OMP_NUM_THREADS), and again with one.
The last line is one JSON object; a ratio above 1 means that ours costs less. `energy` is the ratio for one set of 512
cells and 2,000 genes; with --require the exit code is 1 when it is below that number.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import geomloss
import torch

from esm_perturb.models.losses import energy_distance

CASES = {  # sets, cells, genes, masks, unbiased
    "1x512x2000": (1, 512, 2000, False, False),
    "1x512x2000 unbiased": (1, 512, 2000, False, True),
    "1x512x2000 masks": (1, 512, 2000, True, False),
    "8x64x2000": (8, 64, 2000, False, False),
    "8x64x2000 unbiased": (8, 64, 2000, False, True),
    "8x64x2000 masks": (8, 64, 2000, True, False),
}
LARGE = (8, 512, 2000)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def losses(mask: torch.Tensor | None, unbiased: bool) -> dict[str, Loss]:
    """Both sides' energy distance of predicted and real sets."""
    peer = geomloss.SamplesLoss("energy", blur=0.05, backend="tensorized")
    weights = None if mask is None else mask / mask.sum(1, keepdim=True)
    return {
        "ours": lambda x, y: energy_distance(x, y, mask, unbiased=unbiased),
        "geomloss": peer if mask is None else lambda x, y: peer(weights, x, weights, y),
    }


def sets(
    n_sets: int, n_cells: int, n_genes: int, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Predicted and real sets, and a mask that leaves out a quarter of the last set."""
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.rand(n_sets, n_cells, n_genes, generator=generator) for _ in range(2))
    mask = torch.ones(n_sets, n_cells, dtype=torch.bool)
    mask[-1, n_cells * 3 // 4 :] = False
    return 1.1 * predicted, target, mask if masked else None


def value_and_gradient(loss: Loss, predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward and backward pass."""
    predicted.requires_grad_().grad = None
    value = loss(predicted, target)
    value.sum().backward()
    return value.detach(), predicted.grad


def check_equal(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> dict[str, float]:
    """Both sides give one value and gradient, to 1e-4 of the typical distance and of the largest slope."""
    found = {side: value_and_gradient(loss, predicted, target) for side, loss in losses(mask, unbiased=False).items()}
    (value, gradient), (their_value, their_gradient) = found.values()
    difference = float((value - their_value).abs().max())
    slope = float((gradient - their_gradient).abs().max() / their_gradient.abs().max())
    if not (difference < 1e-4 and slope < 1e-3):
        raise SystemExit(f"the sides differ: value by {difference:.1e}, gradient by {slope:.1e} of its largest element")
    return {"value differs by": difference, "gradient differs by, of its largest": slope}


def in_turn(sides: dict[str, Loss], predicted: torch.Tensor, target: torch.Tensor, repeats: int) -> dict[str, dict]:
    """Milliseconds on the clock and of processor time; the sides alternate, and swap who begins."""
    spent: dict[str, dict[str, list[float]]] = {side: {"clock": [], "processor": []} for side in sides}
    for repeat in range(-2, repeats):  # the first two warm up
        for side in sorted(sides, reverse=bool(repeat % 2)):
            began, worked = time.perf_counter(), time.process_time()
            value_and_gradient(sides[side], predicted, target)
            if repeat >= 0:
                spent[side]["clock"].append(1000 * (time.perf_counter() - began))
                spent[side]["processor"].append(1000 * (time.process_time() - worked))
    return spent


def compare(case: str, threads: int, repeats: int) -> tuple[float, dict]:
    """Ratio of the medians of one case, and its figures."""
    n_sets, n_cells, n_genes, masked, unbiased = CASES[case]
    torch.set_num_threads(threads)
    predicted, target, mask = sets(n_sets, n_cells, n_genes, masked)
    label = f"{case}, {threads} thread{'s' if threads > 1 else ''}"
    figures = (
        {}
        if unbiased
        else {f"{label}, {k}": float(f"{v:.1e}") for k, v in check_equal(predicted, target, mask).items()}
    )
    spent = in_turn(losses(mask, unbiased), predicted, target, repeats)
    for side, times in spent.items():
        figures[f"{label}, {side} ms"] = round(statistics.median(times["clock"]), 2)
        figures[f"{label}, {side} ms, fastest to slowest"] = [round(f(times["clock"]), 2) for f in (min, max)]
    ratio, processor = (
        round(statistics.median(spent["geomloss"][key]) / statistics.median(spent["ours"][key]), 3)
        for key in ("clock", "processor")
    )
    print(f"{label}: ratio {ratio}, of processor time {processor}", file=sys.stderr)
    return ratio, figures | {f"{label}, ratio": ratio, f"{label}, ratio of processor time": processor}


def memory(key: str) -> float:
    """MB of this process: `VmRSS` now or `VmHWM` at most."""
    return float(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def peak(side: str) -> None:
    """Print the MB that a pass over large sets takes beyond its inputs; for a process of its own."""
    predicted, target, _ = sets(*LARGE, masked=False)
    loss = losses(None, unbiased=False)[side]
    value_and_gradient(loss, predicted[:1, :2].clone(), target[:1, :2])
    before = memory("VmRSS")
    value_and_gradient(loss, predicted, target)
    print(memory("VmHWM") - before)


def peaks() -> dict[str, int]:
    """What `peak` prints for both sides."""
    figures = {}
    for side in ("ours", "geomloss") if Path("/proc/self/status").is_file() else ():
        command = [sys.executable, __file__, "--peak", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[f"{'x'.join(map(str, LARGE))}, {side} peak MB beyond the inputs"] = round(float(done.stdout))
    return figures


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description="Energy distance, forward and backward: ours against geomloss.")
    parser.add_argument("repeats", nargs="?", type=int, default=15)
    parser.add_argument("--require", type=float, metavar="ENERGY", help="exit 1 below this ratio")
    parser.add_argument("--peak", choices=("ours", "geomloss"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        peak(chosen.peak)
        return
    usual = torch.get_num_threads()
    ratios, figures = {}, {}
    for threads in sorted({usual, 1}, reverse=True):
        for case in CASES:
            ratio, more = compare(case, threads, chosen.repeats)
            figures |= more
            if threads == usual:
                ratios[f"energy {case}"] = ratio
    ratios["energy"] = ratios["energy 1x512x2000"]
    figures |= peaks()
    environment = {
        "torch": torch.__version__,
        "geomloss": geomloss.__version__,
        "threads": usual,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "repeats": chosen.repeats,
    }
    print(json.dumps({"name": "losses", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require and not ratios["energy"] >= chosen.require:
        raise SystemExit(f"energy: ratio {ratios['energy']}, required {chosen.require}")


if __name__ == "__main__":
    main()
