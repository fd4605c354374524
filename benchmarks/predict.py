"""Prediction: ours against arc-state 0.11.1's `state tx predict --predict-only`, in turn, on the same cells and sizes.

usage: python benchmarks/predict.py [repeats] [--require]

PEERS names a folder that holds `venv/bin/state`, `runs/small` (a run of hidden size 328 on sets of 64, with
`checkpoints/final.ckpt`) and `data/lognorm/synth.h5ad` (16,400 cells x 2,000 genes). Without it such cells are
generated and ours is timed alone. The run is copied first: predicting writes into it.

Both predict 10 perturbations of 200 cells each and the controls, 2,200 cells, from the cell type's controls in obsm's
X_hvg, and write an .h5ad. Our model has random weights and the peer's sizes, which cost what trained ones cost.
`predict` compares cells a second once model and cells are loaded, until the predictions stand in an AnnData: of the
peer its loop over the test set, which reads cells as it goes; of ours the whole call of `predict`, choice of controls
included. `whole_process` compares seconds from the start of a process to its end. The last line is one JSON object; a
ratio above 1 means that ours costs less. Among the figures, `ratio of processor time` tells more than `predict` where
other work slows the machine down and OMP_NUM_THREADS is 1.
With --require the exit code is 1 when a ratio is missed or was not measured.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

N_GENES, N_CELLS = 2000, 200
TESTED = ["non-targeting", *(f"GENE{i:04d}" for i in range(30, 40))]
CELL_TYPE = "ct1"
AT_LEAST = {"predict": 3.0, "whole_process": 1.0}
LOOP = ("Generating predictions on test set", "Clipped adata_pred")


def save_model(path: Path) -> None:
    """A checkpoint of the peer's sizes with random weights."""
    import numpy as np

    from esm_perturb.core.config import ModelKwargs
    from esm_perturb.models.encoders import build_encoder
    from esm_perturb.models.state_transition import StateTransition

    sizes = {"hidden_dim": 328, "cell_set_len": 64, "n_encoder_layers": 4, "n_decoder_layers": 4, "n_layers": 4}
    heads = {"n_heads": 4, "head_dim": 82, "intermediate_size": 1312, "use_basal_projection": False}
    model = ModelKwargs(**sizes, **heads, esm_encoder_layers=4)
    vectors = np.random.default_rng(0).normal(size=(len(TESTED) - 1, 5120)).astype(np.float32)
    options = {"genes": TESTED[1:], "train_genes": TESTED[1:], "modalities": ["unspecified"], "control": TESTED[0]}
    encoder = build_encoder(("esm",), vectors=vectors, model=model, seed=0, **options)
    genes = [f"GENE{i:04d}" for i in range(N_GENES)]
    about = {"scale": "log1p", "data": {"embed_key": "X_hvg"}}
    StateTransition(model, genes, encoder, nonnegative=True).save(path, about)


def generate(path: Path) -> None:
    """Cells like the peer's: 2 cell types x (40 perturbations and control) x 200."""
    import anndata
    import numpy as np
    import pandas as pd

    names = ["non-targeting", *(f"GENE{i:04d}" for i in range(40))]
    obs = pd.DataFrame({"gene": np.tile(np.repeat(names, 200), 2), "cell_type": np.repeat(["ct0", "ct1"], 8200)})
    obs["gem_group"] = "b0"
    obs.index = "cell" + obs.index.astype(str)
    X = np.log1p(np.random.default_rng(0).poisson(0.5, (len(obs), N_GENES)) * 1.7).astype(np.float32)
    cells = anndata.AnnData(X, obs.astype("category"), pd.DataFrame(index=[f"GENE{i:04d}" for i in range(N_GENES)]))
    cells.obsm["X_hvg"] = X
    cells.write_h5ad(path)


def work(checkpoint: str, cells: str, output: str) -> None:
    """A process of ours: load, predict, write; prints cells a second of the call."""
    import anndata

    from esm_perturb.models.predict import predict
    from esm_perturb.models.state_transition import StateTransition

    model, adata = StateTransition.load(checkpoint), anndata.read_h5ad(cells)
    began, worked = time.perf_counter(), time.process_time()
    predicted = predict(model, adata, TESTED, cell_types=CELL_TYPE, n_cells=N_CELLS, seed=0)
    spent = {"seconds": time.perf_counter() - began, "processor": time.process_time() - worked}
    predicted.write_h5ad(output)
    print(json.dumps({"cells": predicted.n_obs} | spent), flush=True)


def processor_seconds(process: int) -> float:
    """Processor time that a process has spent; 0 where the system does not tell."""
    status = Path(f"/proc/{process}/stat")
    if not status.is_file():
        return 0.0
    fields = status.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(command: list[str], read: Callable[[str, float, float], None]) -> float:
    """Seconds that a command runs; `read` is given each of its lines, and the time and processor time until then."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    began, lines = time.perf_counter(), []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        for line in process.stdout:
            lines.append(line)
            read(line, time.perf_counter() - began, processor_seconds(process.pid))
    if process.returncode:
        raise SystemExit(f"a side's process ended with code {process.returncode}: {''.join(lines[-20:])}")
    return time.perf_counter() - began


def report(n_cells: int, seconds: float, processor: float, process: float) -> dict[str, float]:
    """What is compared of one run."""
    rates = {"cells/s": n_cells / seconds, "cells/s of processor time": n_cells / max(processor, 1e-9)}
    return {"cells": n_cells} | rates | {"process s": process}


def ours(checkpoint: Path, cells: Path, output: Path) -> dict[str, float]:
    """One run of ours."""
    said: list[dict] = []
    command = [sys.executable, __file__, "--work", str(checkpoint), str(cells), str(output)]
    seconds = timed(command, lambda line, *_: said.append(json.loads(line)) if line.startswith("{") else None)
    return report(said[0]["cells"], said[0]["seconds"], said[0]["processor"], seconds)


def peers(run: Path, state: Path) -> dict[str, float]:
    """One run of the peer's; what it says when it begins and has an AnnData tells how long that took."""
    import h5py

    marks: dict[str, tuple[float, float]] = {}

    def read(line: str, *now: float) -> None:
        marks.update({mark: now for mark in LOOP if mark in line})

    command = [str(state), "tx", "predict", "--output-dir", str(run), "--checkpoint", "final.ckpt", "--predict-only"]
    seconds, (output,) = timed(command, read), run.glob("eval_final.ckpt/adata_pred.h5ad")
    with h5py.File(output, "r") as file:
        n_cells, n_genes = file["X"].shape
    if n_genes != N_GENES:
        raise SystemExit(f"the peer predicted {n_genes} genes, not {N_GENES}")
    loop = [end - start for start, end in zip(marks[LOOP[0]], marks[LOOP[1]], strict=True)]
    return report(n_cells, *loop, seconds)


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description="Prediction: ours against arc-state.")
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--require", action="store_true", help="exit 1 when a ratio that was promised is missed")
    parser.add_argument("--work", nargs=3, metavar=("CHECKPOINT", "CELLS", "OUTPUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(*chosen.work)
        return
    import torch

    place = Path(os.environ.get("PEERS") or "peers")
    state, run, cells = place / "venv/bin/state", place / "runs/small", place / "data/lognorm/synth.h5ad"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides: dict[str, Callable[[], dict[str, float]]] = {}
        if not cells.is_file():
            cells = folder / "cells.h5ad"
            generate(cells)
        save_model(folder / "model.ckpt")
        sides["ours"] = lambda: ours(folder / "model.ckpt", cells, folder / "predicted.h5ad")
        if state.is_file() and (run / "checkpoints" / "final.ckpt").is_file():
            shutil.copytree(run, folder / "small", ignore=shutil.ignore_patterns("eval_*", "best.ckpt", "last.ckpt"))
            sides["arc-state"] = lambda: peers(folder / "small", state)
        else:
            print(f"no {state} or no {run}: ours alone", file=sys.stderr)
        reports: dict[str, list[dict]] = {side: [] for side in sides}
        for repeat in range(chosen.repeats):
            for side, measure in sides.items():
                reports[side].append(measure())
                print(f"{repeat + 1}/{chosen.repeats} {side}: {reports[side][-1]}", file=sys.stderr)
    if len({report["cells"] for of_side in reports.values() for report in of_side}) > 1:
        raise SystemExit(f"the sides predicted different numbers of cells: {json.dumps(reports)}")
    figures, ratios = {}, {}
    for side, of_side in reports.items():
        for key in ("cells/s", "cells/s of processor time", "process s"):
            values = [report[key] for report in of_side]
            figures[f"{side}, {key}"] = round(statistics.median(values), 2)
            figures[f"{side}, {key}, least to most"] = [round(min(values), 2), round(max(values), 2)]
    if "arc-state" in reports:
        ratios["predict"] = round(figures["ours, cells/s"] / figures["arc-state, cells/s"], 2)
        key = "cells/s of processor time"
        figures["ratio of processor time"] = round(figures[f"ours, {key}"] / figures[f"arc-state, {key}"], 2)
        ratios["whole_process"] = round(figures["arc-state, process s"] / figures["ours, process s"], 2)
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "repeats": chosen.repeats,
    }
    print(json.dumps({"name": "predict", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require:
        missed = [
            f"{key}: {ratios.get(key)}, at least {least}"
            for key, least in AT_LEAST.items()
            if not ratios.get(key, 0) >= least
        ]
        if missed:
            raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
