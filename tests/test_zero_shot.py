"""Zero-shot prediction on simulated screens: sequence helps when it can, and only then.

Three simulator seeds, each with the family effect on and off; 32 genes are never perturbed in training. The numbers are
kept in reports/zero_shot.json.
"""

import concurrent.futures
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

SEEDS = (0, 1, 2)
ARMS = ("esm", "onehot", "shuffled")
REPORT = Path(__file__).resolve().parents[1] / "reports" / "zero_shot.json"


def compare_arms(folder: str, seed: int, family_effect: bool) -> dict:
    """Train the demo's arms on one screen; paired differences of Pearson of delta: (mean, low, high) by pair."""
    import torch

    from esm_perturb.cells.simulate import SimulationConfig, simulate, write_simulation
    from esm_perturb.core.config import to_dict
    from esm_perturb.core.files import write_yaml
    from esm_perturb.core.resolve import resolve_config
    from esm_perturb.evaluation.baselines import MeanResponse, RidgeOnEmbeddings, predict_cells
    from esm_perturb.evaluation.metrics import compare, evaluate
    from esm_perturb.models.preparation import prepare
    from esm_perturb.models.training import train
    from esm_perturb.proteins.embed import embed_sequences
    from esm_perturb.proteins.esm2 import ESM2
    from esm_perturb.workflow.runs import predict_run, split_store

    torch.set_num_threads(1)
    screen = simulate(SimulationConfig(seed=seed, family_effect=family_effect))
    files = write_simulation(screen, folder)
    genes = Path(folder) / "genes.pt"
    embed_sequences(ESM2.load("mini_esm2"), screen.sequences, progress=False).save(genes)
    methods = {}
    for arm in ARMS:
        told = {
            "output_dir": f"{folder}/{arm}",
            "esm_embeddings_path": str(genes),
            "pert_encoder": arm,
            "seed": seed + 1,
        }
        config = resolve_config(preset="demo", config=files["split"], parameters=told)
        prepared = prepare(config)
        write_yaml(Path(config.output_dir) / "config.yaml", to_dict(config))
        train(config)
        methods[arm] = predict_run(config.output_dir, prepared, split="test", seed=0)
        if arm == "esm":
            test_cells, train_cells = split_store(prepared, "test"), split_store(prepared, "train")
            for baseline in (MeanResponse(), RidgeOnEmbeddings(prepared.genes, prepared.vectors)):
                methods[baseline.name] = predict_cells(baseline.fit(train_cells), test_cells, seed=0)
    evaluation = evaluate(test_cells, methods, train_cells, cell_eval=False)
    assert len(screen.held_out) >= 30
    assert not set(screen.held_out) & set(prepared.train_genes)
    pairs = {}
    for model in ("esm", "onehot"):
        for row in compare(evaluation, model).to_dict("records"):
            pairs[f"{model} - {row['baseline']}"] = [row["mean"], row["low"], row["high"]]
    return pairs


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Paired differences for every (seed, family effect), on two processes."""
    from esm_perturb.core.files import write_json

    cases = [(seed, on) for seed in SEEDS for on in (True, False)]
    context = multiprocessing.get_context("spawn")
    workers = min(2, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {case: pool.submit(compare_arms, str(tmp_path_factory.mktemp("screen")), *case) for case in cases}
        found = {case: job.result() for case, job in jobs.items()}
    write_json(REPORT, {f"seed {seed}, family effect {'on' if on else 'off'}": found[seed, on] for seed, on in cases})
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_sequence_helps_where_families_share_effects(results, seed):
    for rival in ("mean_response", "shuffled"):
        mean, low, high = results[seed, True][f"esm - {rival}"]
        assert low > 0, f"esm against {rival}: {mean:.3f} ({low:.3f} to {high:.3f})"


@pytest.mark.parametrize("seed", SEEDS)
def test_one_hot_does_not_beat_the_mean(results, seed):
    mean, low, high = results[seed, True]["onehot - mean_response"]
    assert low <= 0, f"onehot against mean_response: {mean:.3f} ({low:.3f} to {high:.3f})"


@pytest.mark.parametrize("seed", SEEDS)
def test_sequence_wins_nothing_without_family_effects(results, seed):
    for rival in ("mean_response", "ridge", "onehot"):
        mean, low, high = results[seed, False][f"esm - {rival}"]
        assert low <= 0, f"esm against {rival}: {mean:.3f} ({low:.3f} to {high:.3f})"


def test_nor_does_it_beat_its_shuffled_arm_without_family_effects(results):
    """Two trained arms differ by chance from run to run, which no interval over genes knows: the screens together."""
    differences = np.array([results[seed, False]["esm - shuffled"][0] for seed in SEEDS])
    margin = 4.303 * differences.std(ddof=1) / len(SEEDS) ** 0.5  # Student's t, 2 degrees of freedom, 95 %
    assert differences.mean() - margin <= 0, differences
    assert np.abs(differences).max() < 0.1, differences  # with family effects it is above 0.3
