"""A training step of the model alone: ours against arc-state 0.11.1, in turn, on batches of the same shape.

usage: python benchmarks/step.py [repeats] [--small] [--precision auto] [--compile] [--require FULL_SIZE]

Forward, loss, backward, clipping of the gradient and the optimizer's step, on random cells that are in memory already:
hidden 696, sets of 512 (the sizes of State's tahoe_llama_62089464), or with --small hidden 328, sets of 64; 8 sets a
step, 2,000 genes, embeddings of 5,120 numbers. Each side trains as it does by itself: ours with its unbiased energy
distance, AdamW and `training.precision` (auto: bfloat16 where the processor multiplies it), the peer with geomloss,
Adam and float32 at matmul precision "medium". Both have as many trainable parameters, which is asserted. Where both
compute in float32 and matrix products run near the processor's peak, as on AVX2, there is little to gain: ours saves
the perturbations' encoding cell by cell, 5 % of the peer's operations at full size and 14 % at the small one.
PEERS names a folder whose `venv/bin/python` has arc-state; without it ours is timed alone. Each side works in a process
of its own, and the two take turns. The last line is one JSON object; a ratio above 1 means that ours costs less. With
--require the exit code is 1 when the ratio is below that number, or was not measured.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

N_GENES, N_FEATURES, N_SETS, CONTROL = 2000, 5120, 8, "non-targeting"
# hidden, cells in a set, blocks, heads, size of a head, feed-forward, basal projection, steps a turn
SIZES = {
    "full_size": (696, 512, 8, 12, 58, 2784, True, 1),
    "small": (328, 64, 4, 4, 82, 1312, False, 10),
}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # bfloat16, dense


def our_step(
    size: str, device: str, precision: str, compiled: bool
) -> tuple[torch.nn.Module, Callable[[], float], str]:
    """Our model, a function that trains it by one step, and the precision it chose."""
    import numpy as np

    from esm_perturb.core.config import ModelKwargs, TrainingConfig
    from esm_perturb.core.processes import keep_freed_memory, resolve_precision
    from esm_perturb.models.encoders import build_encoder
    from esm_perturb.models.losses import set_loss
    from esm_perturb.models.state_transition import StateTransition
    from esm_perturb.models.task import build_optimizer

    hidden, set_len, n_layers, n_heads, head_dim, feed_forward, projection, _ = SIZES[size]
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "head_dim": head_dim, "intermediate_size": feed_forward}
    layers = dict.fromkeys(("n_encoder_layers", "n_decoder_layers", "esm_encoder_layers"), 4)
    settings = ModelKwargs(hidden_dim=hidden, cell_set_len=set_len, use_basal_projection=projection, **sizes, **layers)
    training = TrainingConfig(precision=precision)
    genes = [f"GENE{i}" for i in range(40)]
    vectors = np.random.default_rng(0).normal(size=(len(genes), N_FEATURES)).astype(np.float32)
    made = {"train_genes": genes, "modalities": ["unspecified"], "control": CONTROL, "model": settings, "seed": 0}
    encoder = build_encoder(("esm",), genes=genes, vectors=vectors, **made)
    model = StateTransition(settings, [f"G{i}" for i in range(N_GENES)], encoder, nonnegative=True).to(device)
    if compiled:
        model.respond = torch.compile(model.respond)
    if device == "cpu":
        keep_freed_memory()  # as training does
    loss, optimizer, precision = set_loss("energy"), build_optimizer(model, training), resolve_precision(training)
    control, perturbed = (torch.rand(N_SETS, set_len, N_GENES, device=device) for _ in range(2))

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            predicted = model(control, genes[:N_SETS], ["unspecified"] * N_SETS).cells
            value = loss(predicted, perturbed, None).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return model, step, precision


def peer_step(size: str, device: str) -> tuple[torch.nn.Module, Callable[[], float], str]:
    """The peer's model, a function that trains it by one step, and its precision."""
    from contextlib import redirect_stdout

    from state.tx.models.state_transition import StateTransitionPerturbationModel

    torch.set_float32_matmul_precision("medium")
    hidden, set_len, n_layers, n_heads, head_dim, feed_forward, projection, _ = SIZES[size]
    backbone = {
        "bidirectional_attention": True,
        "max_position_embeddings": set_len,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "head_dim": head_dim,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    with redirect_stdout(io.StringIO()):
        model = StateTransitionPerturbationModel(
            input_dim=N_GENES,
            output_dim=N_GENES,
            gene_dim=N_GENES,
            hvg_dim=N_GENES,
            pert_dim=N_FEATURES,
            batch_dim=4,
            hidden_dim=hidden,
            cell_set_len=set_len,
            n_encoder_layers=4,
            n_decoder_layers=4,
            predict_residual=True,
            distributional_loss="energy",
            use_basal_projection=projection,
            gene_decoder_bool=False,
            embed_key="X_hvg",
            output_space="gene",
            basal_mapping_strategy="random",
            control_pert=CONTROL,
            gene_names=[f"G{i}" for i in range(N_GENES)],
            lr=3e-4,
            transformer_backbone_key="llama",
            transformer_backbone_kwargs=backbone,
        ).to(device)
    model.log = lambda *_, **__: None
    optimizer = model.configure_optimizers()
    n_cells = N_SETS * set_len
    vectors = torch.randn(N_SETS, 1, N_FEATURES, device=device).expand(-1, set_len, -1).reshape(n_cells, N_FEATURES)
    control, perturbed = (torch.rand(n_cells, N_GENES, device=device) for _ in range(2))
    batch = {"ctrl_cell_emb": control, "pert_cell_emb": perturbed, "pert_emb": vectors}
    batch["batch"] = torch.zeros(n_cells, dtype=torch.long, device=device)

    def step() -> float:
        value = model.training_step(batch, 0)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return model, step, "32-true, matmul precision medium"


def flops(model: torch.nn.Module, size: str) -> float:
    """Floating-point operations of one of our steps: six per weight and cell, and attention; encoder's left out."""
    hidden, set_len, n_layers, n_heads, head_dim, *_ = SIZES[size]
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "pert_encoder" not in name)
    return N_SETS * set_len * (6 * weights + 12 * n_layers * n_heads * head_dim * set_len)


def work(side: str, size: str, precision: str, compiled: bool) -> None:
    """A process of one side: at each line of input, so many steps, and a line of what they took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    made = our_step(size, device, precision, compiled) if side == "ours" else peer_step(size, device)
    model, step, precision = made
    first, second = step(), step()  # allocations, compilation
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    about = {"trainable": trainable, "flops": flops(model, size) if side == "ours" else None, "precision": precision}
    print("ready", json.dumps(about | {"losses": [first, second]}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()  # ends in float(loss), which waits for the forward pass
        if device == "cuda":
            torch.cuda.synchronize()
        print("took", time.perf_counter() - began, flush=True)


class Side:
    """One side's process."""

    def __init__(self, python: str, arguments: list[str]) -> None:
        command = [python, __file__, "--work", *arguments]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.about = json.loads(self._answer("ready"))

    def _answer(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(f"{word} "):
                return line.removeprefix(f"{word} ")
        raise SystemExit(f"a side's process ended with code {self.process.wait()}: {' '.join(self.process.args)}")

    def turn(self, n_steps: int) -> float:
        """Seconds of one of so many steps."""
        print(n_steps, file=self.process.stdin, flush=True)
        return float(self._answer("took")) / n_steps

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def in_turn(sides: dict[str, Side], n_steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a step of processes that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side.turn(n_steps))
            print(f"{repeat + 1}/{repeats} {name}: {seconds[name][-1]:.3f} s a step", file=sys.stderr)
    for side in sides.values():
        side.close()
    return seconds


def main() -> None:
    """Time both sides in turn and print medians, spread and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repeats", nargs="?", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--precision", default="auto", choices=("auto", "32-true", "bf16-mixed"))
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--require", type=float, metavar="RATIO")
    parser.add_argument("--work", choices=("ours", "arc-state"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    size = "small" if chosen.small else "full_size"
    if chosen.work:
        work(chosen.work, size, chosen.precision, chosen.compile)
        return
    python = Path(os.environ.get("PEERS", "")) / "venv" / "bin" / "python"
    pythons = {"ours": sys.executable} | ({"arc-state": str(python)} if os.environ.get("PEERS") else {})
    if "arc-state" not in pythons:
        print("PEERS is not set: ours alone", file=sys.stderr)
    options = ["--precision", chosen.precision]
    options += ["--small"] * chosen.small + ["--compile"] * chosen.compile
    sides = {name: Side(path, [name, *options]) for name, path in pythons.items()}
    about = {name: side.about for name, side in sides.items()}
    if len({each["trainable"] for each in about.values()}) > 1:
        raise SystemExit(f"the models differ in trainable parameters: {json.dumps(about)}")
    set_len, n_steps = SIZES[size][1], SIZES[size][-1] * (20 if torch.cuda.is_available() else 1)
    seconds = in_turn(sides, n_steps, chosen.repeats)
    medians = {name: statistics.median(every) for name, every in seconds.items()}
    ratio = round(medians["arc-state"] / medians["ours"], 2) if "arc-state" in medians else None
    figures: dict[str, object] = {"trainable parameters": about["ours"]["trainable"]}
    for name, every in seconds.items():
        figures[f"{name}, s a step"] = round(medians[name], 4)
        figures[f"{name}, fastest to slowest"] = [round(min(every), 4), round(max(every), 4)]
        figures[f"{name}, cells_per_s"] = round(N_SETS * set_len / medians[name])
        figures[f"{name}, precision"] = about[name]["precision"]
    rate = about["ours"]["flops"] / medians["ours"] / 1e12
    figures["ours, TFLOP/s"] = round(rate, 3)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for card, peak in PEAK_TFLOPS.items():
        if card in name:
            figures["ours, share of the peak"] = round(rate / peak, 3)
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": name or torch.backends.cpu.get_cpu_capability(),
        "compiled": chosen.compile,
        "repeats": chosen.repeats,
    }
    ratios = {} if ratio is None else {size: ratio}
    print(json.dumps({"name": "step", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require is not None and (ratio is None or ratio < chosen.require):
        raise SystemExit(f"the ratio is {ratio}, wanted is {chosen.require}")


if __name__ == "__main__":
    main()
