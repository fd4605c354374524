"""Energy distance, forward and backward: ours against geomloss, in turn, on the same sets.

usage: python benchmarks/losses.py [repeats]
The last line is one JSON object; a ratio above 1 means that ours costs less.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import geomloss
import torch

from esm_perturb.models.losses import energy_distance

SHAPES = {"1x512x2000": (1, 512, 2000), "8x64x2000": (8, 64, 2000)}


def cost(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], predicted: torch.Tensor, target: torch.Tensor
) -> float:
    """Seconds of one forward and backward pass."""
    predicted = predicted.clone().requires_grad_()
    began = time.perf_counter()
    loss(predicted, target).sum().backward()
    return time.perf_counter() - began


def main() -> None:
    """Time both losses in turn and print the medians and their ratio."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    peer = geomloss.SamplesLoss(loss="energy", backend="tensorized")
    losses = {"ours": lambda x, y: energy_distance(x, y, unbiased=False), "geomloss": peer}
    ratios, figures = {}, {}
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        predicted, target = (torch.rand(shape, generator=generator) for _ in range(2))
        values = {key: loss(predicted, target) for key, loss in losses.items()}
        torch.testing.assert_close(values["ours"], values["geomloss"], atol=1e-3, rtol=1e-3)
        times: dict[str, list[float]] = {key: [] for key in losses}
        for repeat in range(repeats + 2):
            for key, loss in losses.items():
                seconds = cost(loss, predicted, target)
                if repeat >= 2:
                    times[key].append(seconds)
        medians = {key: statistics.median(seconds) for key, seconds in times.items()}
        ratios[f"energy {name}"] = round(medians["geomloss"] / medians["ours"], 3)
        figures |= {f"{key} {name} ms": round(1000 * median, 2) for key, median in medians.items()}
        figures |= {
            f"{key} {name} ms, fastest to slowest": [round(1000 * f(t), 2) for f in (min, max)]
            for key, t in times.items()
        }
    ratios["energy"] = ratios["energy 1x512x2000"]
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps({"name": "losses", "ratios": ratios, "figures": figures, "environment": environment}))


if __name__ == "__main__":
    main()
