"""A whole evaluation with its report: ours against cell-eval 0.8.2, in turn, on the same cells.

usage: python benchmarks/evaluate.py [repeats] [--methods 4] [--require]

16,400 cells x 2,000 genes: two cell types of 40 perturbations and control, 200 cells each, log1p values at a fixed
target sum. Both sides are processes of their own that begin with files and end with files: `cell-eval run --profile
full` on one method's predictions with two threads, and `evaluate` with everything it measures (cell-eval's full
profile, our own metrics, intervals) and `build_report` for n methods. Compared are n times the one and once the other.
Memory is the sum over a process and its children, sampled twenty times a second.

PEERS names a folder whose `venv/bin/cell-eval` is the peer and whose `data/lognorm/synth.h5ad` holds the cells; where
it has `runs/small/pred_x.h5ad`, these are the first method's predictions. The others are drawn from the controls and
moved by a part of the real response. Without PEERS, cells of that shape are generated and the peer is the cell-eval
that is installed here. Growth is measured on 40 perturbations against 80: the first cell type alone against both.

The last line is one JSON object; a ratio above 1 means that ours costs less. With --require the exit code is 1 when a
number that was promised is missed.
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
from pathlib import Path

import numpy as np
import psutil

CONTROL = "non-targeting"
AT_LEAST = {"cell_eval": 1.0, "linearity": 0.9}
AT_MOST_GB = 2.0


def generate(path: Path) -> None:
    """Cells of the shape that the peers' data has."""
    import anndata
    import pandas as pd

    rng, n_genes, n_cells = np.random.default_rng(0), 2000, 200
    names = [CONTROL, *(f"GENE{i:04d}" for i in range(40))]
    base = rng.gamma(1.0, 0.5, n_genes)
    blocks, rows = [], []
    for cell_type in ("ct0", "ct1"):
        for name in names:
            moved = (rng.random(n_genes) < 0.05) * (name != CONTROL)
            counts = rng.poisson(base * np.exp(rng.normal(0, 1, n_genes) * moved), (n_cells, n_genes))
            blocks.append(np.log1p(counts * (1e4 / counts.sum(axis=1, keepdims=True))).astype(np.float32))
            rows += [(name, cell_type, "b0")] * n_cells
    obs = pd.DataFrame(rows, columns=["gene", "cell_type", "gem_group"], index=[f"cell{i}" for i in range(len(rows))])
    var = pd.DataFrame(index=[f"G{i:04d}" for i in range(n_genes)])
    anndata.AnnData(np.vstack(blocks), obs, var).write_h5ad(path)


def prepare(peers: Path, folder: Path, n_methods: int) -> list[Path]:
    """real.h5ad, and each method's predictions with real controls, as cell-eval takes them."""
    import anndata

    source = peers / "data" / "lognorm" / "synth.h5ad"
    if source.is_file():
        cells = anndata.read_h5ad(source)
        X = np.asarray(cells.obsm["X_hvg"] if "X_hvg" in cells.obsm else cells.X, dtype=np.float32)
        cells = anndata.AnnData(X, cells.obs[["gene", "cell_type", "gem_group"]], cells.var[[]].iloc[: X.shape[1]])
    else:
        print(f"no cells in {peers}: they are generated", file=sys.stderr)
        generate(folder / "cells.h5ad")
        cells = anndata.read_h5ad(folder / "cells.h5ad")
    cells.write_h5ad(folder / "real.h5ad")
    given = peers / "runs" / "small" / "pred_x.h5ad"
    for number in range(n_methods):
        if number == 0 and given.is_file():
            shutil.copy(given, folder / "method_0.h5ad")
            continue
        predictions_of(cells, number / n_methods, np.random.default_rng(number)).write_h5ad(
            folder / f"method_{number}.h5ad"
        )
    return [folder / f"method_{number}.h5ad" for number in range(n_methods)]


def predictions_of(cells, share: float, rng: np.random.Generator):
    """Control cells, moved by a share of each perturbation's mean response."""
    predicted = cells.copy()
    for cell_type in cells.obs["cell_type"].unique():
        here = (cells.obs["cell_type"] == cell_type).to_numpy()
        controls = np.flatnonzero(here & (cells.obs["gene"] == CONTROL).to_numpy())
        for name in cells.obs["gene"][here].unique():
            if name == CONTROL:
                continue
            rows = np.flatnonzero(here & (cells.obs["gene"] == name).to_numpy())
            drawn = cells.X[rng.choice(controls, len(rows))]
            response = cells.X[rows].mean(axis=0) - cells.X[controls].mean(axis=0)
            predicted.X[rows] = np.maximum(drawn + share * response, 0)
    return predicted


def evaluate_files(folder: Path, n_methods: int, cell_types: list[str]) -> None:
    """What is timed of ours: files in, report out."""
    import anndata
    import pandas as pd

    from esm_perturb.cells.store import store_from_anndata
    from esm_perturb.core.config import DataKwargs
    from esm_perturb.evaluation.metrics import evaluate
    from esm_perturb.evaluation.report import build_report

    def part(path: Path):
        cells = anndata.read_h5ad(path)
        return cells[cells.obs["cell_type"].isin(cell_types)].copy()

    data = DataKwargs(scale="log1p")
    real = store_from_anndata(part(folder / "real.h5ad"), data)
    predictions = {}
    for number in range(n_methods):
        predicted = store_from_anndata(part(folder / f"method_{number}.h5ad"), data).to_anndata()
        predictions[f"method_{number}"] = predicted[(predicted.obs["perturbation"] != CONTROL).to_numpy()].copy()
    train = real.subset(real.controls(real.conditions()[0]))
    trained = train.obs.assign(perturbation="another perturbation")  # half of the controls, under another name
    trained.iloc[::2, trained.columns.get_loc("perturbation")] = CONTROL
    train.obs = trained
    evaluation = evaluate(real, predictions, train, n_threads=2)
    build_report(
        evaluation,
        title="Benchmark",
        provenance={"seed": 0},
        training={},
        coverage=pd.DataFrame({"requested": ["-"], "matched_as": ["-"], "status": ["exact"]}),
        leakage=evaluation.conditions[["perturbation"]].assign(train_cells=0, shared_controls=0),
        split_table=pd.DataFrame({"cells": [len(real)]}, index=pd.Index(["test"], name="split")),
        model="method_0",
        path=folder / f"report_{len(cell_types)}.html",
    )
    print(len(evaluation.per_condition), "scored conditions", file=sys.stderr)


def timed(command: list[str]) -> dict:
    """Seconds and peak memory of one process and its children."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        told = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, sum(p.memory_info().rss for p in [told, *told.children(recursive=True)]))
            except psutil.Error:
                pass  # it has just ended
            time.sleep(0.05)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}:\n{log.read()[-4000:]}")
    return {"seconds": time.perf_counter() - began, "peak_gb": peak / 1e9}


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description="Evaluation and report: ours against cell-eval.")
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--methods", type=int, default=4)
    parser.add_argument("--require", action="store_true", help="exit 1 when a number that was promised is missed")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        folder, *cell_types = chosen.worker
        evaluate_files(Path(folder), chosen.methods, cell_types)
        return
    peers = Path(os.environ.get("PEERS") or "peers").absolute()
    program = peers / "venv" / "bin" / "cell-eval"
    program = program if program.is_file() else Path(sys.executable).parent / "cell-eval"
    runs: dict[str, list[dict]] = {"ours": [], "ours, 40": [], "cell-eval": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        methods = prepare(peers, folder, chosen.methods)
        mine = [sys.executable, __file__, "--methods", str(chosen.methods), "--worker", str(folder)]
        peer = [str(program), "run", "-ap", str(methods[0]), "-ar", str(folder / "real.h5ad"), "--pert-col", "gene"]
        peer += ["--control-pert", CONTROL, "--celltype-col", "cell_type", "--num-threads", "2", "--profile", "full"]
        commands = {
            "ours": [*mine, "ct0", "ct1"],
            "ours, 40": [*mine, "ct0"],
            "cell-eval": [*peer, "-o", str(folder / "o")],
        }
        for repeat in range(chosen.repeats):
            for side, command in commands.items():
                runs[side].append(timed(command))
                took = runs[side][-1]
                print(
                    f"{repeat + 1}/{chosen.repeats} {side}: {took['seconds']:.1f} s, {took['peak_gb']:.2f} GB",
                    file=sys.stderr,
                )
        size = (folder / "report_2.html").stat().st_size
    seconds = {side: statistics.median(run["seconds"] for run in took) for side, took in runs.items()}
    memory = {side: max(run["peak_gb"] for run in took) for side, took in runs.items()}
    ratios = {
        "cell_eval": chosen.methods * seconds["cell-eval"] / seconds["ours"],
        "linearity": 2 * seconds["ours, 40"] / seconds["ours"],
        "memory": memory["cell-eval"] / memory["ours"],
    }
    figures = {f"{side}, s": round(value, 1) for side, value in seconds.items()}
    figures |= {f"{side}, peak GB": round(value, 2) for side, value in memory.items()} | {
        "report MB": round(size / 1e6, 2)
    }
    environment = {
        "methods": chosen.methods,
        "repeats": chosen.repeats,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "peer": str(program),
    }
    ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(json.dumps({"name": "evaluate", "ratios": ratios, "figures": figures, "environment": environment}))
    missed = [f"{name}: {ratios[name]}, required {least}" for name, least in AT_LEAST.items() if ratios[name] < least]
    missed += [f"peak memory {memory['ours']:.2f} GB, at most {AT_MOST_GB}"] if memory["ours"] > AT_MOST_GB else []
    if chosen.require and missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
