"""Batches of cell sets: ours against cell-load 0.10.4, in turn, on the same file, sets and batch; and ours from disk.

usage: python benchmarks/loader.py [repeats] [--require] [--folder FOLDER]

PEERS names a folder whose `venv/bin/python` has cell-load and whose `data/` holds `lognorm/synth.h5ad` (16,400 cells x
2,000 genes, CSR X and dense obsm X_hvg) and `lognorm_fewshot.toml`. Without it data of that shape are generated and
ours is timed alone. Both sides work in a process of their own, without worker processes, and end in dense float32
tensors of perturbed cells and of as many controls; short sets are filled up by resampling on both. Counted are
perturbed cells per second, over whole batches, the plan of each epoch included.
From disk: files of 100,000 and of 1,000,000 cells x 2,000 genes, 200 values a cell, are generated and prepared (in
FOLDER, kept there when given: 3.5 GB), and read in turn, each in a process of its own, from a warm page cache. The
seconds to the first batch begin with opening the file, after all imports.
The last line is one JSON object; a ratio above 1 means that ours costs less. With --require the exit code is 1 when
something is missed or was not measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

N_GENES = 2000
# name → embed_key, cells in a set, batches a turn of ours, and of the peer
CASES = {
    "CSR X, sets of 64": (None, 64, 60, 4),
    "CSR X, sets of 512": (None, 512, 9, 1),
    "dense obsm, sets of 64": ("X_hvg", 64, 60, 10),
    "dense obsm, sets of 512": ("X_hvg", 512, 9, 2),
}
DISK_SIZES, DISK_BATCHES = (100_000, 1_000_000), 400
SMALL, LARGE = (f"disk, {n_cells:,} cells" for n_cells in DISK_SIZES)
GROWTH = f"{SMALL} over {LARGE}, cost of a cell"
AT_LEAST = {"CSR X, sets of 64": 200, "dense obsm, sets of 64": 40, f"{LARGE}, cells/s": 60_000, GROWTH: 1 / 1.2}
AT_MOST = {f"{LARGE}, peak MB": 2000, f"{LARGE}, first batch s": 5}


def generate(folder: Path) -> Path:
    """Cells of 2 cell types x (40 perturbations and control) x 200, as CSR X and dense obsm; the split file's path."""
    import anndata
    import pandas as pd
    import scipy.sparse

    rng, n_cells = np.random.default_rng(0), 16_400
    names = np.array(["non-targeting", *(f"GENE{i:04d}" for i in range(40))])
    obs = pd.DataFrame(
        {
            "gene": np.tile(np.repeat(names, 200), 2),
            "cell_type": np.repeat(["ct0", "ct1"], n_cells // 2),
            "gem_group": rng.choice(["b0", "b1", "b2", "b3"], n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    mean = rng.gamma(0.35, 1.0, N_GENES) + 0.01
    counts = rng.poisson(6000 * mean / mean.sum() * rng.gamma(4.0, 0.25, (n_cells, N_GENES)))
    X = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32)
    order = rng.permutation(n_cells)
    var = pd.DataFrame(index=[f"GENE{i:04d}" for i in range(N_GENES)])
    cells = anndata.AnnData(scipy.sparse.csr_matrix(X[order]), obs=obs.iloc[order].astype("category"), var=var)
    cells.obsm["X_hvg"] = X[order]
    cells.write_h5ad(folder / "synth.h5ad")
    held_out = {"val": [f"GENE{i:04d}" for i in range(27, 30)], "test": [f"GENE{i:04d}" for i in range(30, 40)]}
    lists = "".join(f"{split} = {json.dumps(genes)}\n" for split, genes in held_out.items())
    text = f'[datasets]\nsynth = "{folder}/synth.h5ad"\n[training]\nsynth = "train"\n[fewshot."synth.ct1"]\n{lists}'
    path = folder / "fewshot.toml"
    path.write_text(text)
    return path


def generate_on_disk(folder: Path, n_cells: int) -> Path:
    """A prepared file of so many cells, about 100 of each perturbation and cell type; the split file's path."""
    import anndata
    import h5py
    import pandas as pd

    from esm_perturb.cells.prepare import prepare
    from esm_perturb.cells.split_file import read_split_toml
    from esm_perturb.core.config import DataKwargs

    source, toml, prepared = (folder / f"{n_cells}.{ending}" for ending in ("source.h5ad", "toml", "prepared.h5ad"))
    toml.write_text(f'[datasets]\nscreen = "{source}"\n[training]\nscreen = "train"\n')
    if prepared.is_file():
        return toml
    rng, per_cell, chunk = np.random.default_rng(0), 200, 20_000
    names = ["non-targeting", *(f"P{i}" for i in range(n_cells // 210))]
    columns = {
        "gene": (np.where(rng.random(n_cells) < 0.05, 0, rng.integers(1, len(names), n_cells)), names),
        "cell_type": (rng.integers(0, 2, n_cells), ["k562", "rpe1"]),
        "gem_group": (rng.integers(0, 8, n_cells), [f"lane{i}" for i in range(8)]),
    }
    obs = pd.DataFrame({name: pd.Categorical.from_codes(*column) for name, column in columns.items()})
    obs.index = "cell" + obs.index.astype(str)
    anndata.AnnData(obs=obs, var=pd.DataFrame(index=[f"GENE{i:04d}" for i in range(N_GENES)])).write_h5ad(source)
    with h5py.File(source, "r+") as file:
        if "X" in file:
            del file["X"]
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]})
        X["indptr"] = np.arange(n_cells + 1) * per_cell
        data, indices = (
            X.create_dataset(key, (n_cells * per_cell,), dtype) for key, dtype in (("data", "f4"), ("indices", "i4"))
        )
        for start in range(0, n_cells, chunk):
            shape = (min(chunk, n_cells - start), per_cell)
            place = slice(start * per_cell, (start + shape[0]) * per_cell)
            step = N_GENES // per_cell
            indices[place] = (np.arange(per_cell) * step + rng.integers(0, step, shape)).reshape(-1)
            data[place] = 1 + rng.poisson(1.0, shape).reshape(-1)
    prepare(read_split_toml(toml), DataKwargs(), prepared)
    return toml


# ---- what a process does: give (perturbed, control, perturbed cells among them) for ever


def our_batches(toml: str, case: str) -> Iterator[tuple]:
    """Batches of `PerturbationDataModule`, from memory, or from a prepared file beside the split file."""
    import anndata.io  # noqa: F401  (before the clock starts)

    from esm_perturb.cells.data_module import PerturbationDataModule
    from esm_perturb.cells.split_file import read_split_toml
    from esm_perturb.cells.splits import assign_splits
    from esm_perturb.cells.store import CellStore
    from esm_perturb.core.config import DataKwargs

    embed_key, set_len, *_ = CASES.get(case, (None, 64))
    if case in CASES:
        data = DataKwargs(toml_config_path=toml, embed_key=embed_key, pad="resample")
    else:  # less memory than the smaller file needs
        prepared = toml.replace(".toml", ".prepared.h5ad")
        data = DataKwargs(toml_config_path=toml, prepared=prepared, memory_gb=0.1)
    began = time.perf_counter()
    spec = read_split_toml(toml)
    store = CellStore.from_spec(spec, data)
    splits = assign_splits(store.obs, spec, control=store.control)
    module = PerturbationDataModule(store, splits, data=data, cell_set_len=set_len, batch_size=8, seed=0)
    loader = module.loader("train")
    if store.in_memory is (case not in CASES):
        raise SystemExit(f"{case}: the cells are {'not ' * (not store.in_memory)}in memory")
    while True:
        for batch in loader:
            yield batch["perturbed"].flatten(0, 1), batch["control"].flatten(0, 1), int(batch["mask"].sum()), began
        loader.batch_sampler.set_epoch(loader.batch_sampler.epoch + 1)


def peer_batches(toml: str, case: str) -> Iterator[tuple]:
    """Batches of cell-load's module, with the settings that arc-state gives it."""
    import logging

    from cell_load.data_modules import PerturbationDataModule

    logging.disable(logging.WARNING)
    embed_key, set_len, *_ = CASES[case]
    began = time.perf_counter()
    module = PerturbationDataModule(
        toml_config_path=toml,
        batch_size=8,
        num_workers=0,
        cell_sentence_len=set_len,
        pert_col="gene",
        batch_col="gem_group",
        cell_type_key="cell_type",
        control_pert="non-targeting",
        embed_key=embed_key,
        output_space="gene" if embed_key else "all",
    )
    module.setup("fit")
    loader = module.train_dataloader()
    while True:
        for batch in loader:
            yield batch["pert_cell_emb"], batch["ctrl_cell_emb"], len(batch["pert_cell_emb"]), began


def peak_mb() -> float | None:
    """Peak memory of this process."""
    status = Path("/proc/self/status")
    return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.is_file() else None


def work(side: str, toml: str, case: str) -> None:
    """A process of one side: at each line of input, so many batches, and a line of what they were and took."""
    batches = {"ours": our_batches, "cell-load": peer_batches}[side](toml, case)
    began = next(batches)[3]
    first_batch = time.perf_counter() - began
    print("ready", flush=True)
    for line in sys.stdin:
        cells, shown, began, worked = 0, None, time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            batch = next(batches)
            cells += batch[2]
            shown = batch[:2] if shown is None or len(batch[0]) > len(shown[0]) else shown
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        report = {
            "cells/s": cells / seconds,
            "cells/s of processor time": cells / processor,
            "first batch s": first_batch,
            "peak MB": peak_mb(),
            "shapes": [list(x.shape) for x in shown],
            "types": [f"{x.dtype} {x.layout}" for x in shown],
            "non-zero": [float((x != 0).float().mean()) for x in shown],
            "mean": [float(x.mean()) for x in shown],
        }
        print(json.dumps(report), flush=True)


class Side:
    """One side's process."""

    def __init__(self, python: str, side: str, toml: str, case: str):
        command = [python, __file__, "--work", side, toml, case]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self._expect(lambda line: line == "ready\n")

    def _expect(self, wanted: Callable[[str], bool]) -> str:
        for line in self.process.stdout:
            if wanted(line):
                return line
        raise SystemExit(f"a side's process ended with code {self.process.wait()}: {' '.join(self.process.args)}")

    def turn(self, n_batches: int) -> dict:
        """Time so many batches."""
        print(n_batches, file=self.process.stdin, flush=True)
        return json.loads(self._expect(lambda line: line.startswith("{")))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def check_equal_work(case: str, reports: dict[str, dict]) -> None:
    """Both sides gave tensors of one shape and type, with alike content."""
    first, *others = reports.values()
    for other in others:
        alike = all(np.allclose(first[key], other[key], rtol=0.05) for key in ("non-zero", "mean"))
        if not alike or any(first[key] != other[key] for key in ("shapes", "types")):
            raise SystemExit(f"{case}: the sides do unequal work: {json.dumps(reports)}")
    n_cells = 8 * CASES[case][1]
    if first["shapes"] != 2 * [[n_cells, N_GENES]] or set(first["types"]) != {"torch.float32 torch.strided"}:
        raise SystemExit(f"{case}: not two dense float32 tensors of {n_cells} cells: {json.dumps(first)}")


def in_turn(sides: dict[str, Side], turns: dict[str, int], label: str, repeats: int) -> dict[str, list[dict]]:
    """Reports of processes that take turns."""
    reports: dict[str, list[dict]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            reports[name].append(side.turn(turns[name]))
            rate = reports[name][-1]["cells/s"]
            print(f"{label}, {repeat + 1}/{repeats} {name}: {rate:,.0f} cells/s", file=sys.stderr)
    for side in sides.values():
        side.close()
    return reports


def median(reports: list[dict], key: str) -> float:
    """Of one number over a process's turns."""
    return statistics.median(report[key] for report in reports)


def rates(name: str, reports: list[dict]) -> dict:
    """Cells a second: the median, and the slowest and fastest turn."""
    every = [report["cells/s"] for report in reports]
    figures = {f"{name}, cells/s": round(statistics.median(every))}
    return figures | {f"{name}, slowest to fastest": [round(min(every)), round(max(every))]}


def from_memory(case: str, pythons: dict[str, str], toml: str, repeats: int) -> tuple[dict, dict]:
    """Ratio and figures of one case of both sides."""
    turns = dict(zip(("ours", "cell-load"), CASES[case][2:], strict=True))
    sides = {side: Side(python, side, toml, case) for side, python in pythons.items()}
    reports = in_turn(sides, turns, case, repeats)
    for together in zip(*reports.values(), strict=True):
        check_equal_work(case, dict(zip(reports, together, strict=True)))
    figures = {key: value for name in reports for key, value in rates(f"{case}, {name}", reports[name]).items()}
    if "cell-load" not in reports:
        return {}, figures
    key = "cells/s of processor time"
    figures[f"{case}, ratio of processor time"] = round(
        median(reports["ours"], key) / median(reports["cell-load"], key), 1
    )
    return {case: round(median(reports["ours"], "cells/s") / median(reports["cell-load"], "cells/s"), 1)}, figures


def from_disk(folder: Path, repeats: int) -> tuple[dict, dict]:
    """Ratio and figures of the files on disk."""
    sides = {}
    for name, n_cells in zip((SMALL, LARGE), DISK_SIZES, strict=True):
        toml = generate_on_disk(folder, n_cells)
        with Path(str(toml).replace(".toml", ".prepared.h5ad")).open("rb") as file:
            while file.read(1 << 24):
                pass  # into the page cache
        sides[name] = Side(sys.executable, "ours", str(toml), name)
    reports = in_turn(sides, dict.fromkeys(sides, DISK_BATCHES), "from disk", repeats)
    figures = {}
    for name, turns in reports.items():
        figures |= rates(name, turns)
        figures |= {f"{name}, first batch s": round(turns[0]["first batch s"], 2)}
        figures |= {f"{name}, peak MB": turns[-1]["peak MB"] and round(turns[-1]["peak MB"])}
    return {GROWTH: round(median(reports[LARGE], "cells/s") / median(reports[SMALL], "cells/s"), 3)}, figures


def shortfall(measured: dict[str, float]) -> str:
    """What is missed or was not measured; empty when nothing is."""
    missed = [(name, f"at least {least:g}") for name, least in AT_LEAST.items() if not measured.get(name, 0) >= least]
    missed += [(name, f"at most {most:g}") for name, most in AT_MOST.items() if not (measured.get(name) or 1e9) <= most]
    return "; ".join(f"{name}: {measured.get(name, 'not measured')}, required {what}" for name, what in missed)


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description="Batches of cell sets: ours against cell-load.")
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--require", action="store_true", help="exit 1 when a number that was promised is missed")
    parser.add_argument("--folder", help="where the files on disk are kept; without it they are deleted")
    parser.add_argument("--work", nargs=3, metavar=("SIDE", "TOML", "CASE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(*chosen.work)
        return
    import torch

    peers = Path(os.environ.get("PEERS") or "peers")
    python, toml = peers / "venv" / "bin" / "python", peers / "data" / "lognorm_fewshot.toml"
    pythons = {"ours": sys.executable} | ({"cell-load": str(python)} if python.is_file() else {})
    if "cell-load" not in pythons:
        print(f"no {python}: ours alone", file=sys.stderr)
    ratios, figures, source = {}, {}, "that of PEERS" if toml.is_file() else "generated"
    with tempfile.TemporaryDirectory() as folder:
        toml = toml if toml.is_file() else generate(Path(folder))
        for case in CASES:
            ratio, more = from_memory(case, pythons, str(toml), chosen.repeats)
            ratios |= ratio
            figures |= more
        place = Path(chosen.folder or folder)
        place.mkdir(parents=True, exist_ok=True)
        ratio, more = from_disk(place, chosen.repeats)
        ratios |= ratio
        figures |= more
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "data": source,
        "repeats": chosen.repeats,
    }
    print(json.dumps({"name": "loader", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require and (missed := shortfall(ratios | figures)):
        raise SystemExit(missed)


if __name__ == "__main__":
    main()
