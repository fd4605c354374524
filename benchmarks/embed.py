"""Gene embeddings: ours against fair-esm's extraction loop, in turn, on the same proteins, weights and threads.

usage: python benchmarks/embed.py [n_proteins] [repeats]

500 human proteins drawn at random (from the folder named by REALDATA or ../shared/data; else synthetic ones with the
same distribution of lengths), the architecture of ESM2-8M with random weights, 3 repeats. On a GPU also that of 650M.
The last line is one JSON object; a ratio above 1 means that ours costs less.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from esm_perturb.proteins.embed import embed_sequences
from esm_perturb.proteins.esm2 import ESM2, to_fair_esm_state
from esm_perturb.proteins.fast_network import flops
from esm_perturb.proteins.sequences import AMINO_ACIDS, read_fasta

CUT = 1022
H200_BFLOAT16 = 989e12  # dense FLOP/s, its data sheet
PROTEOME = 11.4e6  # residues of the human canonical proteome


def proteins(n: int, seed: int = 0) -> tuple[dict[str, str], str]:
    """Proteins for the benchmark, and where they come from."""
    rng = np.random.default_rng(seed)
    path = Path(os.environ.get("REALDATA") or "../shared/data") / "proteins" / "human.fasta.gz"
    if path.is_file():
        human = read_fasta(path)
        names = rng.choice(list(human), size=n, replace=False)
        return {name: human[name] for name in names}, "human"
    lengths = np.exp(rng.normal(6.137, 0.750, size=n)).astype(int) + 1  # log-normal, fitted to 12,464 human proteins
    return {f"P{i}": "".join(rng.choice(list(AMINO_ACIDS), size=size)) for i, size in enumerate(lengths)}, "synthetic"


def fair_esm_loop(model: torch.nn.Module, sequences: dict[str, str], device: str) -> np.ndarray:
    """What fair-esm's `scripts/extract.py --include mean` does, with its default batches; files are not written."""
    from esm import FastaBatchedDataset

    data = FastaBatchedDataset(list(sequences), list(sequences.values()))
    batches = data.get_batch_indices(4096, extra_toks_per_seq=1)
    converter = model.alphabet.get_batch_converter(CUT)
    loader = torch.utils.data.DataLoader(data, collate_fn=converter, batch_sampler=batches)
    layer, result = model.num_layers, {}
    with torch.no_grad():
        for labels, texts, tokens in loader:
            states = model(tokens.to(device), repr_layers=[layer], return_contacts=False)["representations"][layer]
            states = states.to("cpu")
            for row, label in enumerate(labels):
                result[label] = states[row, 1 : min(CUT, len(texts[row])) + 1].mean(0).clone()
    return np.stack([result[name].numpy() for name in sequences])


def timed(compute: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    """The result, seconds on the clock, and seconds of processor time (what counts on a busy machine)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began, worked = time.perf_counter(), time.process_time()
    result = compute()
    return result, time.perf_counter() - began, time.process_time() - worked


def ours(model: ESM2, sequences: dict[str, str], precision: str, *, packed: bool = False) -> np.ndarray:
    """Our vectors."""
    return embed_sequences(model, sequences, precision=precision, packed=packed, progress=False).vectors


def against_fair_esm(sequences: dict[str, str], repeats: int, device: str) -> tuple[dict, dict]:
    """Ratios and figures of the 8M architecture."""
    from esm.model.esm2 import ESM2 as FairESM2

    model = ESM2.new(6, 320, 20, seed=0).to(device).eval()
    fair = FairESM2(6, 320, 20).eval()
    fair.load_state_dict(to_fair_esm_state(model))
    fair = fair.to(device)
    residues = sum(min(CUT, len(sequence)) for sequence in sequences.values())
    runs = {
        "fair-esm": lambda: fair_esm_loop(fair, sequences, device),
        "fp32": lambda: ours(model, sequences, "float32"),
        "bf16": lambda: ours(model, sequences, "bfloat16"),
    }
    few = dict(list(sequences.items())[:3])
    fair_esm_loop(fair, few, device), ours(model, few, "float32"), ours(model, few, "bfloat16")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    vectors = {}
    for repeat in range(repeats):
        for name, run in runs.items():
            vectors[name], spent, worked = timed(run)
            seconds[name].append(spent)
            processor[name].append(worked)
            print(f"{repeat + 1}/{repeats} {name}: {spent:.1f} s, {residues / spent:.0f} residues/s", file=sys.stderr)
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
    for name, packed in (("padded attention", False), ("packed attention", True)):
        ours(model, sequences, "bfloat16", packed=packed)
        spent = statistics.median(
            timed(lambda packed=packed: ours(model, sequences, "bfloat16", packed=packed))[1] for _ in range(repeats)
        )
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


def main() -> None:
    """Time both sides in turn and print the ratios of their medians."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    sequences, source = proteins(n)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        ratios, figures = against_fair_esm(sequences, repeats, device)
    except ImportError:
        print("fair-esm is not installed (pip install fair-esm==2.0.0): ours alone", file=sys.stderr)
        model = ESM2.new(6, 320, 20, seed=0).to(device).eval()
        spent = [timed(lambda: ours(model, sequences, "float32"))[1] for _ in range(repeats)]
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


if __name__ == "__main__":
    main()
