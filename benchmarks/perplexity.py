"""Masked perplexity: ours against the original's procedure, in turn, on the same proteins, masks, weights and threads.

usage: python benchmarks/perplexity.py [n_proteins] [repeats] [--require RATIO]

The original scores one sequence at a time, with five forward passes through fair-esm. 64 natural proteins of mixed
length (human, from the folder named by REALDATA, or shared/data beside this repository; else synthetic ones with their
distribution of lengths), the architecture of ESM2-8M with random weights, 3 repeats. The last line is one JSON object;
a ratio above 1 means that ours costs less. With --require the exit code is 1 below it.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from esm_perturb.proteins.esm2 import ESM2, MASK, MAX_RESIDUES, to_fair_esm_state, tokenize
from esm_perturb.proteins.perplexity import ESMEvaluator, draw_masks
from esm_perturb.proteins.sequences import AMINO_ACIDS, clean_sequence, read_fasta

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHUNK = 16  # proteins that one side scores before it is the other's turn


def proteins(n: int, seed: int = 0) -> tuple[list[str], str]:
    """Proteins of at most 1,022 residues, and where they come from."""
    rng = np.random.default_rng(seed)
    path = Path(os.environ.get("REALDATA") or DATA) / "proteins" / "human.fasta.gz"
    if path.is_file():
        human = sorted({clean_sequence(sequence) for sequence in read_fasta(path).values()})
        usable = [sequence for sequence in human if 30 <= len(sequence) <= MAX_RESIDUES]
        return rng.choice(usable, size=n, replace=False).tolist(), "human"
    lengths = np.exp(rng.normal(6.137, 0.750, size=n)).clip(30, MAX_RESIDUES).astype(int)
    return ["".join(rng.choice(list(AMINO_ACIDS), size=size)) for size in lengths], "synthetic"


@torch.no_grad()
def one_at_a_time(fair: torch.nn.Module, sequences: list[str], device: str) -> list[float]:
    """The original's procedure with our masks: five passes of one sequence each, logits everywhere."""
    values = []
    for sequence in sequences:
        ids = tokenize([sequence])[0].to(device)
        losses = []
        for mask in draw_masks(sequence):
            places = torch.from_numpy(mask + 1).to(device)
            logits = fair(ids.index_fill(1, places, MASK), repr_layers=[], return_contacts=False)["logits"][0, places]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, places], reduction="none"))
        values.append(math.exp(torch.cat(losses).double().mean().item()))
    return values


def compare(sequences: list[str], repeats: int, device: str) -> tuple[dict, dict]:
    """Ratio and figures of the 8M architecture."""
    from esm.model.esm2 import ESM2 as FairESM2

    model = ESM2.new(6, 320, 20, seed=0).to(device).eval()
    fair = FairESM2(6, 320, 20).eval()
    fair.load_state_dict(to_fair_esm_state(model))
    fair, evaluator = fair.to(device), ESMEvaluator(model, batch_size=CHUNK)
    sides = {"original": lambda some: one_at_a_time(fair, some, device), "ours": evaluator.perplexity}
    chunks = [sequences[start : start + CHUNK] for start in range(0, len(sequences), CHUNK)]
    clock: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-1, repeats):  # the first is short, to warm up
        found, spent = {name: [] for name in sides}, {name: np.zeros(2) for name in sides}
        for chunk in chunks if repeat >= 0 else [sequences[:2]]:
            for name, score in sides.items():
                began = np.array([time.perf_counter(), time.process_time()])
                found[name] += score(chunk)  # both end with numbers on the host, so a GPU has finished
                spent[name] += np.array([time.perf_counter(), time.process_time()]) - began
        for name in sides if repeat >= 0 else ():
            clock[name].append(spent[name][0])
            processor[name].append(spent[name][1])
            print(f"{repeat + 1}/{repeats} {name}: {spent[name][0]:.1f} s", file=sys.stderr)
    difference = float(np.abs(np.subtract(found["ours"], found["original"])).max())
    if difference > 1e-4:
        raise SystemExit(f"numbers differ by {difference:.1e}")
    medians = {name: statistics.median(values) for name, values in clock.items()}
    cost = {name: statistics.median(values) for name, values in processor.items()}
    kind = "cuda" if device == "cuda" else "cpu"
    figures = {f"{name} sequences/s": round(len(sequences) / median, 3) for name, median in medians.items()}
    figures |= {f"{name} s, fastest to slowest": [round(f(v), 2) for f in (min, max)] for name, v in clock.items()}
    figures["ratio of processor time"] = round(cost["original"] / cost["ours"], 3)
    figures |= {"residues": sum(map(len, sequences)), "largest difference": difference}
    return {kind: round(medians["original"] / medians["ours"], 3)}, figures


def memory(n_sequences: int) -> float:
    """Peak memory in MB of a process that scores a FASTA file of so many sequences."""
    code = (
        "import sys, re, pathlib, tempfile, numpy as np\n"
        "from esm_perturb.proteins.esm2 import ESM2\n"
        "from esm_perturb.proteins.perplexity import ESMEvaluator\n"
        "from esm_perturb.proteins.scoring import score_fasta\n"
        "rng = np.random.default_rng(0)\n"
        "letters = np.frombuffer(b'ACDEFGHIKLMNPQRSTVWY', dtype='S1')\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    path = pathlib.Path(folder) / 'many.fasta'\n"
        "    with path.open('w') as file:\n"
        "        for i, n in enumerate(rng.integers(30, 90, size=int(sys.argv[1]))):\n"
        "            file.write(f'>s{i}\\n{rng.choice(letters, size=n).tobytes().decode()}\\n')\n"
        "    evaluator = ESMEvaluator(ESM2.new(1, 16, 2), batch_size=64)\n"
        "    score_fasta(path, path.with_suffix('.csv'), evaluator, progress=False)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(n_sequences)], capture_output=True, text=True, check=True)
    return float(re.findall(r"\d+", done.stdout)[-1]) / 1024


def main() -> None:
    """Time both sides in turn and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description="Masked perplexity: ours against one sequence at a time.")
    parser.add_argument("n_proteins", nargs="?", type=int, default=64)
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--require", type=float, default=0.0, metavar="RATIO", help="exit 1 below this ratio")
    chosen = parser.parse_args()
    sequences, source = proteins(chosen.n_proteins)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        ratios, figures = compare(sequences, chosen.repeats, device)
    except ImportError:
        print("fair-esm is not installed (pip install fair-esm==2.0.0): ours alone", file=sys.stderr)
        evaluator = ESMEvaluator(ESM2.new(6, 320, 20, seed=0).to(device).eval(), batch_size=CHUNK)
        began = time.perf_counter()
        evaluator.perplexity(sequences)
        ratios, figures = {}, {"ours sequences/s": round(len(sequences) / (time.perf_counter() - began), 3)}
    if Path("/proc/self/status").is_file():
        figures |= {f"peak MB, {count} sequences": round(memory(count)) for count in (500, 10_000)}
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "proteins": f"{len(sequences)} {source}",
        "repeats": chosen.repeats,
    }
    print(json.dumps({"name": "perplexity", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require and not max(ratios.values(), default=0.0) >= chosen.require:
        raise SystemExit(f"ratio {ratios}, required {chosen.require}")


if __name__ == "__main__":
    main()
