"""A training run as a whole process: ours against arc-state 0.11.1, in turn, on the same cells and the same model.

usage: python benchmarks/train.py [repeats] [--steps 100] [--quality] [--require]

Both train a state-transition model of hidden size 328 (4 layers, 4 heads of 82, feed-forward 1312, encoders and decoder
of 4 layers) on sets of 64 of 16,400 cells x 2,000 genes with perturbation features of 5,120 numbers: 8 sets a step,
Adam at 1e-4, float32 (ours: bfloat16 products where the processor has them), one validation at the last step. PEERS
names a folder whose `venv/bin/state` is arc-state and whose `data/` holds `lognorm/synth.h5ad`, `lognorm_fewshot.toml`
and `pert_features_5120.pt`; without it data of that shape are generated and ours is timed alone.

Each run is a process of its own, `python -m esm_perturb.models.training` and `state tx train`, attached to a terminal.
Its steps per second are read from its progress bar: from when the first tenth of the steps is done, so that start-up
does not count, to the last step. Memory is the sum over the process and its children, sampled ten times a second. A set
of both sides holds at most 64 cells; the peer fills up the last set of a perturbation to 64 by repeating cells, ours
cuts 200 cells into four sets of 50: cells per second are given of real cells, and of those that pass through the model.

With --quality both sides also train with three seeds, ours with the peer's loss (biased energy distance) and with its
own (unbiased). One evaluator scores their predictions of the test perturbations from the same control cells, in sets of
at most 64: the biased energy distance between all predicted and all real cells of a perturbation, and the Pearson
correlation of predicted and real mean change, averaged over perturbations.

The last line is one JSON object; a ratio above 1 means that ours costs less. With --require the exit code is 1 when a
number that was promised is missed or was not measured.
"""

import argparse
import fcntl
import json
import os
import platform
import pty
import re
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import numpy as np
import psutil

BATCH_SIZE, SET_LEN, SEEDS = 8, 64, (42, 43, 44)
REAL_CELLS = 50  # of 200 cells in four sets, on both sides
AT_LEAST = {"steps": 2.5, "memory": 1.25, "last_checkpoint": 1.25, "best_checkpoint": 2.0}
PEER_MODEL = {
    "cell_set_len": SET_LEN,
    "hidden_dim": 328,
    "transformer_backbone_kwargs.intermediate_size": 1312,
    "transformer_backbone_kwargs.num_attention_heads": 4,
    "transformer_backbone_kwargs.num_key_value_heads": 4,
    "transformer_backbone_kwargs.head_dim": 82,
}
PEER_DATA = {
    "embed_key": "X_hvg",
    "output_space": "gene",
    "num_workers": 0,
    "pin_memory": "false",
    "pert_col": "gene",
    "cell_type_key": "cell_type",
    "batch_col": "gem_group",
    "control_pert": "non-targeting",
}
OUR_MODEL = {
    "hidden_dim": 328,
    "cell_set_len": SET_LEN,
    "n_layers": 4,
    "n_heads": 4,
    "head_dim": 82,
    "intermediate_size": 1312,
    "n_encoder_layers": 4,
    "n_decoder_layers": 4,
    "esm_encoder_layers": 4,
    "use_basal_projection": False,
}


def generate(folder: Path) -> None:
    """Cells, split file and perturbation features where no peer has them."""
    import torch
    from loader import generate as generate_cells

    toml = generate_cells(folder)
    toml.rename(folder / "lognorm_fewshot.toml")
    names = ["non-targeting", *(f"GENE{i:04d}" for i in range(40))]
    features = torch.randn(len(names), 5120, generator=torch.Generator().manual_seed(0))
    torch.save({name: row.clone() for name, row in zip(names, features, strict=True)}, folder / "pert_features_5120.pt")


def our_command(data: Path, output: Path, steps: int, seed: int, **model: object) -> list[str]:
    """The command that trains ours, whose configuration it writes."""
    from esm_perturb.core.files import write_yaml

    cells = {"toml_config_path": str(data / "lognorm_fewshot.toml"), "embed_key": "X_hvg", "share_controls": True}
    run = {"batch_size": BATCH_SIZE, "lr": 1e-4, "max_steps": steps, "val_freq": steps, "seed": seed}
    embeddings = {"esm_embeddings_path": str(data / "pert_features_5120.pt")}
    config = {
        "output_dir": str(output),
        "data": {"kwargs": cells},
        "model": {"name": "state_sm", "kwargs": OUR_MODEL | embeddings | model},
        "training": run | {"accelerator": "cpu", "precision": "auto"},
    }
    write_yaml(output.with_suffix(".yaml"), config)
    return [sys.executable, "-m", "esm_perturb.models.training", "--config", str(output.with_suffix(".yaml"))]


def peer_command(peers: Path, data: Path, output: Path, steps: int, seed: int) -> list[str]:
    """The command that trains the peer."""
    settings = {f"model.kwargs.{key}": value for key, value in PEER_MODEL.items()}
    settings |= {f"data.kwargs.{key}": value for key, value in PEER_DATA.items()}
    settings |= {
        "data.kwargs.toml_config_path": data / "lognorm_fewshot.toml",
        "data.kwargs.perturbation_features_file": data / "pert_features_5120.pt",
        "training.batch_size": BATCH_SIZE,
        "training.max_steps": steps,
        "training.val_freq": steps,
        "training.ckpt_every_n_steps": steps,
        "training.train_seed": seed,
        "use_wandb": "false",
        "overwrite": "true",
        "output_dir": output.parent,
        "name": output.name,
    }
    program = [str(peers / "venv" / "bin" / "state"), "tx", "train", "model=state_sm"]
    return [*program, *(f"{key}={value}" for key, value in settings.items())]


# ours counts all steps (training: 12%|… | 12/100 [), the peer those of an epoch (Epoch 1/-2 ━━━ 12/35 0:00:05)
_BAR = re.compile(r"(?:Epoch (\d+)/-?\d+|training:) [^\r\n]*?(\d+)/(\d+) ")


class Watch:
    """What a process in a terminal shows of its progress, and the memory that it takes with its children."""

    def __init__(self, command: list[str]):
        self.seen, self.peak, self.epoch_length = [], 0, 0
        self.terminal, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
        self.began, self.text = time.perf_counter(), ""
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=inside, stderr=inside, env=environment
        )
        os.close(inside)

    def run(self) -> dict:
        """Follow the process to its end."""
        told = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            self._read(0.1)
            try:
                tree = [told, *told.children(recursive=True)]
                self.peak = max(self.peak, sum(process.memory_info().rss for process in tree))
            except psutil.Error:
                pass  # it has just ended
        self._read(0.0)
        os.close(self.terminal)
        if self.process.returncode:
            raise SystemExit(f"{' '.join(self.process.args)} ended with code {self.process.returncode}:\n{self.text}")
        return {"seconds": time.perf_counter() - self.began, "peak_bytes": self.peak, **self._rate()}

    def _read(self, patience: float) -> None:
        """Take what is shown and note when which step was."""
        while select.select([self.terminal], [], [], patience)[0]:
            try:
                shown = os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                return
            self.text = (self.text + shown)[-4000:]
            if bars := _BAR.findall(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text)):
                epoch, step, length = (int(number or 0) for number in bars[-1])
                self.epoch_length = self.epoch_length or length
                step += epoch * self.epoch_length
                if not self.seen or step > self.seen[-1][0]:
                    self.seen.append((step, time.perf_counter()))
            patience = 0.0

    def _rate(self) -> dict:
        """Steps per second after the first tenth of them, and the seconds before that."""
        last, end = self.seen[-1]
        first, start = next(((step, clock) for step, clock in self.seen if step >= last / 10), self.seen[0])
        return {"steps_per_second": (last - first) / (end - start), "start_up_seconds": start - self.began}


def checkpoint_bytes(output: Path) -> dict:
    """Sizes of the checkpoints of a run."""
    return {f"{name}_bytes": (output / "checkpoints" / f"{name}.ckpt").stat().st_size for name in ("last", "best")}


def one_run(side: str, command: list[str], output: Path) -> dict:
    """Train once."""
    report = Watch(command).run() | checkpoint_bytes(output)
    rate, memory = report["steps_per_second"], report["peak_bytes"] / 1e9
    print(f"{side}: {rate:.2f} steps/s, {report['seconds']:.1f} s in all, {memory:.2f} GB", file=sys.stderr)
    return report


def median(reports: list[dict], key: str) -> float:
    """Of one number over a side's runs."""
    return statistics.median(report[key] for report in reports)


# ---- quality


def peer_predictions(peers: Path, output: Path) -> tuple:
    """The peer's predicted and real test cells, AnnData; each names the control cell that it was predicted from."""
    import anndata

    command = [str(peers / "venv" / "bin" / "state"), "tx", "predict", "--output-dir", str(output)]
    command += ["--checkpoint", "final.ckpt", "--predict-only"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = output / "eval_final.ckpt"
    return tuple(anndata.read_h5ad(folder / f"adata_{kind}.h5ad") for kind in ("pred", "real"))


def our_predictions(checkpoint: Path, asked, cells) -> np.ndarray:
    """Our predictions of the cells that the peer was asked for, from the control cells that it used."""
    from esm_perturb.cells.store import Condition
    from esm_perturb.models.state_transition import StateTransition, predict_cells

    model = StateTransition.load(checkpoint)
    (modality,) = model.pert_encoder.labels.modalities
    controls = np.asarray(cells.obsm["X_hvg"][cells.obs_names.get_indexer(asked.obs["ctrl_cell_barcode"])])
    out = np.empty_like(controls, dtype=np.float32)
    for name in asked.obs["gene"].unique():
        rows = np.flatnonzero(asked.obs["gene"] == name)
        out[rows] = predict_cells(model, Condition("synth", "ct1", name, modality), controls[rows], max_set=SET_LEN)
    return out


def score(predicted: np.ndarray, asked, real: np.ndarray, control_mean: np.ndarray) -> dict[str, float]:
    """Biased energy distance, and Pearson correlation of mean changes; means over test perturbations."""
    import torch

    from esm_perturb.models.losses import energy_distance

    distances, correlations = [], []
    for name in asked.obs["gene"].unique():
        if name == PEER_DATA["control_pert"]:
            continue
        rows = np.flatnonzero(asked.obs["gene"] == name)
        x, y = (torch.from_numpy(np.asarray(cells[rows], dtype=np.float32))[None] for cells in (predicted, real))
        distances.append(float(energy_distance(x, y, unbiased=False)))
        changes = [cells[0].mean(0).numpy() - control_mean for cells in (x, y)]
        correlations.append(float(np.corrcoef(*changes)[0, 1]))
    return {"energy_distance": float(np.mean(distances)), "pearson_delta": float(np.mean(correlations))}


def quality(peers: Path, data: Path, folder: Path, steps: int) -> dict:
    """Scores of three seeds of each side: mean and standard deviation."""
    import anndata

    cells = anndata.read_h5ad(data / "lognorm" / "synth.h5ad")
    is_control = (cells.obs["gene"] == PEER_DATA["control_pert"]) & (cells.obs["cell_type"] == "ct1")
    control_mean = np.asarray(cells.obsm["X_hvg"][is_control.to_numpy()]).mean(0)
    scores: dict[str, list[dict]] = {"arc-state": [], "ours, biased loss": [], "ours, unbiased loss": []}
    for seed in SEEDS:
        output = folder / f"quality_peer_{seed}"
        one_run(f"arc-state, seed {seed}", peer_command(peers, data, output, steps, seed), output)
        asked, real = peer_predictions(peers, output)
        truth = np.asarray(real.X)
        scores["arc-state"].append(score(np.asarray(asked.X), asked, truth, control_mean))
        for loss, unbiased in (("biased", False), ("unbiased", True)):
            output = folder / f"quality_{loss}_{seed}"
            one_run(f"ours, {loss}, seed {seed}", our_command(data, output, steps, seed, unbiased=unbiased), output)
            predicted = our_predictions(output / "checkpoints" / "best.ckpt", asked, cells)
            scores[f"ours, {loss} loss"].append(score(predicted, asked, truth, control_mean))
    scores["the control cells themselves"] = [
        score(
            np.asarray(cells.obsm["X_hvg"][cells.obs_names.get_indexer(asked.obs["ctrl_cell_barcode"])]),
            asked,
            truth,
            control_mean,
        )
    ]
    figures = {}
    for side, runs in scores.items():
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            figures[f"{key}, {side}"] = [round(statistics.mean(values), 4), round(spread, 4)]
            print(f"{key}, {side}: {values}", file=sys.stderr)
    return figures


# ----


def summarise(reports: dict[str, list[dict]]) -> tuple[dict, dict]:
    """Ratios and figures of all runs."""
    figures: dict[str, object] = {}
    through = {"ours": BATCH_SIZE * REAL_CELLS, "arc-state": BATCH_SIZE * SET_LEN}
    for side, runs in reports.items():
        rates = [run["steps_per_second"] for run in runs]
        rate = statistics.median(rates)
        figures |= {
            f"{side}, steps/s": round(rate, 2),
            f"{side}, steps/s, slowest to fastest": [round(min(rates), 2), round(max(rates), 2)],
            f"{side}, real cells/s": round(rate * BATCH_SIZE * REAL_CELLS),
            f"{side}, cells through the model/s": round(rate * through[side]),
            f"{side}, whole process s": round(median(runs, "seconds"), 1),
            f"{side}, start-up s": round(median(runs, "start_up_seconds"), 1),
            f"{side}, peak memory GB": round(median(runs, "peak_bytes") / 1e9, 3),
            f"{side}, last.ckpt MB": round(median(runs, "last_bytes") / 1e6, 1),
            f"{side}, best.ckpt MB": round(median(runs, "best_bytes") / 1e6, 1),
        }
    if "arc-state" not in reports:
        return {}, figures
    ours, peer = reports["ours"], reports["arc-state"]
    costs = {"memory": "peak_bytes", "last_checkpoint": "last_bytes", "best_checkpoint": "best_bytes"}
    ratios = {"steps": median(ours, "steps_per_second") / median(peer, "steps_per_second")}
    ratios |= {name: median(peer, key) / median(ours, key) for name, key in costs.items()}
    ratios["whole_process"] = median(peer, "seconds") / median(ours, "seconds")
    return {name: round(ratio, 3) for name, ratio in ratios.items()}, figures


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description="A whole training run: ours against arc-state.")
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--quality", action="store_true", help="also compare what three seeds have learned")
    parser.add_argument("--require", action="store_true", help="exit 1 when a number that was promised is missed")
    chosen = parser.parse_args()
    import torch

    from esm_perturb.core.config import TrainingConfig
    from esm_perturb.core.processes import resolve_precision

    peers = Path(os.environ.get("PEERS") or "peers").absolute()
    data, has_peer = peers / "data", (peers / "venv" / "bin" / "state").is_file()
    reports: dict[str, list[dict]] = {"ours": []} | ({"arc-state": []} if has_peer else {})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not has_peer:
            print(f"no arc-state in {peers}: ours alone", file=sys.stderr)
            data = folder
            generate(data)
        for repeat in range(chosen.repeats):
            for side in reports:
                output = folder / f"{side}_{repeat}"
                started = (data, output, chosen.steps, SEEDS[0])
                command = our_command(*started) if side == "ours" else peer_command(peers, *started)
                reports[side].append(one_run(f"{repeat + 1}/{chosen.repeats} {side}", command, output))
        ratios, figures = summarise(reports)
        if chosen.quality and has_peer:
            figures |= quality(peers, data, folder, chosen.steps)
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "our precision": resolve_precision(TrainingConfig(accelerator="cpu")),
        "steps": chosen.steps,
        "repeats": chosen.repeats,
    }
    print(json.dumps({"name": "train", "ratios": ratios, "figures": figures, "environment": environment}))
    missed = [
        f"{name}: {ratios.get(name)}, required {least}"
        for name, least in AT_LEAST.items()
        if not ratios.get(name, 0) >= least
    ]
    if chosen.require and missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
