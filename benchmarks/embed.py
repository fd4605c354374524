"""Gene embeddings: ours against fair-esm's extraction loop, in turn, on the same proteins, weights and threads.

usage: python benchmarks/embed.py [n_proteins] [repeats] [--require FP32 BF16]

500 human proteins drawn at random (from the folder named by REALDATA, or shared/data beside this repository; else
synthetic ones with the same distribution of lengths), the architecture of ESM2-8M with random weights, 3 repeats. On a
GPU also that of 650M.
The last line is one JSON object; a ratio above 1 means that ours costs less. With --require the exit code is 1 when a
ratio is below its number.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from esm_perturb.proteins.embed import (
    Embedder,
    EmbedSettings,
    Members,
    clean_proteins,
    embed_sequences,
    make_plan,
    progress_bar,
)
from esm_perturb.proteins.esm2 import ESM2, to_fair_esm_state
from esm_perturb.proteins.fast_network import flops
from esm_perturb.proteins.sequences import AMINO_ACIDS, read_fasta

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CUT = 1022
SLICE = {"cpu": 4 * 4096, "cuda": 100_000}  # residues in one of our shards, here
H200_BFLOAT16 = 989e12  # dense FLOP/s, its data sheet
PROTEOME = 11.4e6  # residues of the human canonical proteome


def proteins(n: int, seed: int = 0) -> tuple[dict[str, str], str]:
    """Proteins for the benchmark, and where they come from."""
    rng = np.random.default_rng(seed)
    path = Path(os.environ.get("REALDATA") or DATA) / "proteins" / "human.fasta.gz"
    if path.is_file():
        human = read_fasta(path)
        names = rng.choice(list(human), size=n, replace=False)
        return {name: human[name] for name in names}, "human"
    lengths = np.exp(rng.normal(6.137, 0.750, size=n)).astype(int) + 1  # log-normal, fitted to 12,464 human proteins
    return {f"P{i}": "".join(rng.choice(list(AMINO_ACIDS), size=size)) for i, size in enumerate(lengths)}, "synthetic"


def fair_esm_loop(
    model: torch.nn.Module, sequences: dict[str, str], device: str, result: dict[str, np.ndarray]
) -> Iterator[int]:
    """What fair-esm's `scripts/extract.py --include mean` does, with its default batches; files are not written.

    Yields the residues done after each batch.
    """
    from esm import FastaBatchedDataset

    data = FastaBatchedDataset(list(sequences), list(sequences.values()))
    batches = data.get_batch_indices(4096, extra_toks_per_seq=1)
    converter = model.alphabet.get_batch_converter(CUT)
    loader = torch.utils.data.DataLoader(data, collate_fn=converter, batch_sampler=batches)
    layer = model.num_layers
    for labels, texts, tokens in loader:
        with torch.no_grad():
            states = model(tokens.to(device), repr_layers=[layer], return_contacts=False)["representations"][layer]
            states = states.to("cpu")
            for row, label in enumerate(labels):
                result[label] = states[row, 1 : min(CUT, len(texts[row])) + 1].mean(0).clone().numpy()
        yield sum(min(CUT, len(text)) for text in texts)


def our_loop(model: ESM2, sequences: dict[str, str], precision: str, result: dict[str, np.ndarray]) -> Iterator[int]:
    """What `embed_sequences` does, in shards of a few batches. Yields the residues done after each."""
    settings = EmbedSettings(precision=precision)
    plan = make_plan(clean_proteins(sequences, settings), settings, shard_residues=SLICE[model.device.type])
    embedder, members = Embedder(model, settings), Members.of(plan)
    vectors = np.zeros((len(sequences), model.dim), dtype=np.float32)
    result.update(zip(sequences, vectors, strict=True))
    with progress_bar(plan, plan.shards, settings, model.name, show=False) as bar:
        for shard in plan.shards:
            proteins = [plan.proteins[row] for row in shard]
            members.add(vectors, shard, embedder(proteins, bar))
            yield sum(map(len, proteins))


def in_turn(loops: dict[str, Iterator[int]]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds on the clock and of processor time of loops that advance side by side, whichever is behind.

    So a busy machine slows them all alike.
    """
    done, clock, processor = ({name: 0.0 for name in loops} for _ in range(3))
    active = dict(loops)
    while active:
        name = min(active, key=done.get)
        began, worked = time.perf_counter(), time.process_time()
        residues = next(active[name], None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clock[name] += time.perf_counter() - began
        processor[name] += time.process_time() - worked
        if residues is None:
            del active[name]
        else:
            done[name] += residues
    return clock, processor


def against_fair_esm(sequences: dict[str, str], repeats: int, device: str) -> tuple[dict, dict]:
    """Ratios and figures of the 8M architecture."""
    from esm.model.esm2 import ESM2 as FairESM2

    model = ESM2.new(6, 320, 20, seed=0).to(device).eval()
    fair = FairESM2(6, 320, 20).eval()
    fair.load_state_dict(to_fair_esm_state(model))
    fair = fair.to(device)
    residues = sum(min(CUT, len(sequence)) for sequence in sequences.values())
    seconds: dict[str, list[float]] = {"fair-esm": [], "fp32": [], "bf16": []}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    for repeat in range(-1, repeats):  # the first is short, to warm up
        chosen = sequences if repeat >= 0 else dict(list(sequences.items())[:3])
        found: dict[str, dict[str, np.ndarray]] = {name: {} for name in seconds}
        loops = {
            "fair-esm": fair_esm_loop(fair, chosen, device, found["fair-esm"]),
            "fp32": our_loop(model, chosen, "float32", found["fp32"]),
            "bf16": our_loop(model, chosen, "bfloat16", found["bf16"]),
        }
        clock, worked = in_turn(loops)
        for name in loops if repeat >= 0 else ():
            seconds[name].append(clock[name])
            processor[name].append(worked[name])
            print(f"{repeat + 1}/{repeats} {name}: {residues / clock[name]:.0f} residues/s", file=sys.stderr)
    vectors = {name: np.stack([rows[gene] for gene in sequences]) for name, rows in found.items()}
    difference = float(np.abs(vectors["fp32"] - vectors["fair-esm"]).max())
    norms = {name: np.linalg.norm(values, axis=1) for name, values in vectors.items()}
    cosine = float(((vectors["bf16"] * vectors["fp32"]).sum(1) / norms["bf16"] / norms["fp32"]).min())
    if difference > 1e-5 or cosine < 0.999:
        raise SystemExit(f"numbers differ: {difference:.1e} in float32, cosine {cosine:.5f} in bfloat16")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: round(medians["fair-esm"] / medians[name], 3) for name in ("fp32", "bf16")}
    figures = {f"{name} residues/s": round(residues / median) for name, median in medians.items()}
    cost = {name: statistics.median(values) for name, values in processor.items()}
    figures |= {f"{name} ratio of processor time": round(cost["fair-esm"] / cost[name], 3) for name in ratios}
    figures |= {f"{name} s, fastest to slowest": [round(f(v), 2) for f in (min, max)] for name, v in seconds.items()}
    return ratios, figures | {
        "residues": residues,
        "largest difference, fp32": difference,
        "smallest cosine, bf16": round(cosine, 6),
    }


def large_model(sequences: dict[str, str], repeats: int) -> dict:
    """On a GPU: the 650M architecture in bfloat16, beside the floor of its dense operations."""
    model = ESM2.new(33, 1280, 20, seed=0).to("cuda").eval()
    lengths = [min(CUT, len(sequence)) + 2 for sequence in sequences.values()]
    work = sum(flops(length, 33, 1280) for length in lengths)
    figures = {}

    def once(packed: bool) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        embed_sequences(model, sequences, precision="bfloat16", packed=packed, progress=False)
        return time.perf_counter() - began

    for name, packed in (("padded attention", False), ("packed attention", True)):
        once(packed)
        spent = statistics.median(once(packed) for _ in range(repeats))
        figures[f"650M bf16, {name}, residues/s"] = round(sum(lengths) / spent)
        figures[f"650M bf16, {name}, share of {H200_BFLOAT16 / 1e12:.0f} TFLOP/s"] = round(
            work / spent / H200_BFLOAT16, 3
        )
    floor = work / sum(lengths) * PROTEOME / H200_BFLOAT16
    return figures | {"650M, floor for the human proteome, s": round(floor, 1)}


def memory(n_sequences: int) -> float:
    """Peak memory in MB of a process that embeds so many sequences into a folder."""
    code = (
        "import sys, re, pathlib, tempfile, numpy as np\n"
        "from esm_perturb.proteins.embedding_run import embed_to_folder\n"
        "from esm_perturb.proteins.esm2 import ESM2\n"
        "rng = np.random.default_rng(0)\n"
        "letters = np.frombuffer(b'ACDEFGHIKLMNPQRSTVWY', dtype='S1')\n"
        "sizes = rng.integers(40, 160, size=int(sys.argv[1]))\n"
        "genes = {f'G{i}': rng.choice(letters, size=n).tobytes().decode() for i, n in enumerate(sizes)}\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    embed_to_folder(ESM2.new(1, 16, 2), genes, folder, progress=False)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(n_sequences)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1]) / 1024


def shortfall(ratios: dict[str, float], fp32: float, bf16: float) -> str:
    """Which ratios are below what is required, or were not measured; empty when none is."""
    required = {"fp32": fp32, "bf16": bf16}
    missed = [name for name, least in required.items() if not ratios.get(name, 0.0) >= least]
    return "; ".join(f"{name}: ratio {ratios.get(name, 'not measured')}, required {required[name]}" for name in missed)


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description="Gene embeddings: ours against fair-esm's extraction loop.")
    parser.add_argument("n_proteins", nargs="?", type=int, default=500)
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--require", nargs=2, type=float, metavar=("FP32", "BF16"), help="exit 1 below these ratios")
    chosen = parser.parse_args()
    n, repeats = chosen.n_proteins, chosen.repeats
    sequences, source = proteins(n)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        ratios, figures = against_fair_esm(sequences, repeats, device)
    except ImportError:
        print("fair-esm is not installed (pip install fair-esm==2.0.0): ours alone", file=sys.stderr)
        model = ESM2.new(6, 320, 20, seed=0).to(device).eval()
        spent = []
        for _ in range(repeats):
            clock, _ = in_turn({"fp32": our_loop(model, sequences, "float32", {})})
            spent.append(clock["fp32"])
        ratios, figures = {}, {"fp32 s": round(statistics.median(spent), 2)}
    figures |= large_model(sequences, repeats) if device == "cuda" else {"650M": "not run: no GPU"}
    if Path("/proc/self/status").is_file():
        figures |= {f"peak MB, {count} sequences": round(memory(count)) for count in (500, 20_000)}
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "proteins": f"{n} {source}",
        "repeats": repeats,
    }
    print(json.dumps({"name": "embed", "ratios": ratios, "figures": figures, "environment": environment}))
    if chosen.require and (missed := shortfall(ratios, *chosen.require)):
        raise SystemExit(missed)


if __name__ == "__main__":
    main()
