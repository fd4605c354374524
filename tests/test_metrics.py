"""Metrics, alignment, intervals, strata and the gaming check against brute force, constructed cases and bad input."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from esm_perturb.cells.store import CellStore, store_from_anndata
from esm_perturb.core.config import DataKwargs, InputError
from esm_perturb.evaluation.baselines import MeanResponse, NoChange, predict_cells
from esm_perturb.evaluation.ceilings import profile_of
from esm_perturb.evaluation.distances import energy_distance, mean_distance, variance_ratio
from esm_perturb.evaluation.gaming import gaming
from esm_perturb.evaluation.intervals import paired_bootstrap
from esm_perturb.evaluation.metrics import METRICS, compare, evaluate
from esm_perturb.evaluation.profiles import centroid_accuracy, effect_weights
from esm_perturb.evaluation.strata import stratify

NAMES = [f"P{i}" for i in range(8)]


def make_store(names=NAMES, *, seed=0, genes=30, cells=8, lines=("k562",), scale="log1p", sparse=True):
    """Poisson cells (log1p) or Gaussian cells (other) with a different random shift for each perturbation."""
    rng = np.random.default_rng(seed)
    blocks, rows = [], []
    for line in lines:
        for name in ("ctrl", *names):
            size = 3 * cells if name == "ctrl" else cells
            shift = np.zeros(genes) if name == "ctrl" else rng.normal(0, 0.5, genes)
            if scale == "log1p":
                block = np.log1p(rng.poisson(np.maximum(2 + 2 * shift, 0.1), (size, genes)) * 0.9)
            else:
                block = rng.normal(shift, 1.0, (size, genes))
            blocks.append(block.astype(np.float32))
            rows += [("toy", line, name, "1", "CRISPRi")] * size
    obs = pd.DataFrame(rows, columns=["dataset", "cell_type", "perturbation", "batch", "modality"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    X = np.vstack(blocks)
    X = scipy.sparse.csr_matrix(X) if sparse else X
    return CellStore(X, [f"G{i}" for i in range(genes)], obs, "ctrl", scale, scale, {})


def halves(store, held_out):
    """Train and test stores; controls are dealt alternately."""
    test = store.obs["perturbation"].isin(held_out).to_numpy()
    even = ((store.obs["perturbation"] == store.control) & (np.arange(len(store.obs)) % 2 == 0)).to_numpy()
    return store.subset(np.flatnonzero(~test & ~even)), store.subset(np.flatnonzero(test | even))


def study(store=None, held_out=("P0", "P1", "P2")):
    """Train and test stores, and predictions of two baselines."""
    train, test = halves(make_store() if store is None else store, held_out)
    methods = [MeanResponse(), NoChange()]
    return train, test, {m.name: predict_cells(m.fit(train), test, seed=1) for m in methods}


def perfect(test):
    truth = test.subset(np.flatnonzero(test.obs["perturbation"] != "ctrl"))
    X = truth.rows(np.arange(len(truth.obs)))
    return anndata.AnnData(X, obs=truth.obs.copy(), var=pd.DataFrame(index=test.gene_names))


def quick(test, predictions, train, **settings):
    return evaluate(test, predictions, train, cell_eval=False, **settings)


# Formulas


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(1, 5), st.integers(0, 10_000))
def test_energy_distance_equals_double_loops(n, m, genes, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, genes)), rng.normal(size=(m, genes))
    y[0] = x[0]
    between = np.mean([np.linalg.norm(a - b) for a in x for b in y])
    within = [
        np.mean([np.linalg.norm(a - b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)
    ]
    assert np.isclose(energy_distance(x, y), 2 * between - sum(within), atol=2e-3)
    assert np.isclose(mean_distance(y), within[1], atol=2e-3)


def test_distribution_metrics_survive_single_and_identical_cells():
    cells = np.ones((4, 3))
    assert np.isnan(energy_distance(cells[:1], cells)) and np.isnan(variance_ratio(cells[:1], cells))
    assert energy_distance(cells, cells) == 0 and np.isnan(variance_ratio(cells, cells))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10_000))
def test_centroid_accuracy_equals_loops_and_does_not_see_a_common_shift(n, seed):
    predicted, real, shift = (np.random.default_rng(seed + i).normal(size=(n, 6)) for i in range(3))
    d = np.array([[np.linalg.norm(p - q) for q in real] for p in predicted])
    loops = [np.mean([d[p, q] > d[p, p] for q in range(n) if q != p]) for p in range(n)]
    np.testing.assert_allclose(centroid_accuracy(predicted, real), loops)
    np.testing.assert_allclose(centroid_accuracy(predicted + 50 * shift[0], real + 50 * shift[0]), loops)
    assert np.isclose(centroid_accuracy(np.tile(shift[0], (n, 1)), real).mean(), 0.5)


def test_effect_weights_are_squared_welch_statistics_above_two():
    rng = np.random.default_rng(0)
    real, reference = rng.normal(size=(20, 50)) + np.r_[np.full(5, 3.0), np.zeros(45)], rng.normal(size=(30, 50))
    t = ttest_ind(real, reference, equal_var=False).statistic
    noise = reference.var(0, ddof=1) / 30
    found = effect_weights(real.mean(0), reference.mean(0), real.var(0, ddof=1), 20, noise)
    expected = np.maximum(t**2 - 4, 0)
    np.testing.assert_allclose(found, expected / expected.sum())


@pytest.mark.parametrize("sparse", [True, False])
def test_profiles_do_not_depend_on_blocks(sparse):
    store = make_store(sparse=sparse)
    one, other = (profile_of(store, np.arange(21), seed=3, block=block) for block in (4096, 4))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    X = store.rows(np.arange(21)).astype(float)
    np.testing.assert_allclose(one.mean, X.mean(0))
    np.testing.assert_allclose(one.variance, X.var(0, ddof=1))


# Intervals


def test_bootstrap_agrees_with_explicit_resampling():
    rng = np.random.default_rng(0)
    groups = np.repeat([f"g{i}" for i in range(15)], rng.integers(1, 4, 15))
    a, b = rng.normal(0.2, 1, len(groups)), rng.normal(0, 1, len(groups))
    found = paired_bootstrap(a, b, groups, n=20_000, level=0.9)
    names, rows = np.unique(groups), {g: np.flatnonzero(groups == g) for g in groups}
    means = []
    for _ in range(20_000):
        picked = np.concatenate([rows[g] for g in rng.choice(names, len(names))])
        means.append((a - b)[picked].mean())
    assert np.isclose(found.mean, (a - b).mean()) and found.n == 15
    plain = np.quantile(means, [0.05, 0.95])
    assert found.low < plain[0] < plain[1] < found.high
    assert np.isclose(found.high - found.low, plain[1] - plain[0], rtol=0.2)


def test_bootstrap_ignores_the_order_of_rows():
    rng = np.random.default_rng(0)
    a, groups = rng.normal(size=30), np.array([f"g{i % 10}" for i in range(30)])
    order = rng.permutation(30)
    one, other = paired_bootstrap(a, 0 * a, groups), paired_bootstrap(a[order], 0 * a, groups[order])
    np.testing.assert_allclose(one, other)


# Evaluation


def test_a_perfect_prediction_and_gene_permutation():
    train, test, _ = study()
    evaluation = quick(test, {"perfect": perfect(test)}, train)
    scores = evaluation.per_condition
    right = ["pearson_delta", "systema_pearson_delta", "variance_ratio", "r2_delta", "centroid_accuracy"]
    np.testing.assert_allclose(scores[right], 1, rtol=1e-5)
    np.testing.assert_allclose(scores[["mse", "wmse"]], 0, atol=1e-9)
    assert (scores["energy_distance"] < 0).all()
    order = np.random.default_rng(0).permutation(30)
    names = [test.gene_names[i] for i in order]
    moved = [CellStore(s.X[:, order], names, s.obs, "ctrl", "log1p", "log1p", {}) for s in (test, train)]
    again = quick(moved[0], {"perfect": perfect(test)}, moved[1])
    np.testing.assert_allclose(again.per_condition[right], scores[right])
    assert again.notes == ["perfect: its genes were put into the order of the test cells."]


def test_the_mean_response_of_the_training_perturbations_explains_nothing_of_a_perturbation():
    train, test, _ = study()
    reference = quick(test, {"perfect": perfect(test)}, train)
    cells = perfect(test)
    for condition, mean, response in zip(
        test.conditions(), reference.control_means, reference.mean_responses, strict=True
    ):
        cells.X[(cells.obs["perturbation"] == condition.perturbation).to_numpy()] = mean + response
    scores = quick(test, {"mean": cells}, train).per_condition
    np.testing.assert_allclose(scores["r2_delta"], 0, atol=1e-5)
    np.testing.assert_allclose(scores["systema_pearson_delta"], 0, atol=1e-5)
    assert np.isclose(scores["centroid_accuracy"].mean(), 0.5)


def test_several_seeds_are_averaged_condition_by_condition_and_their_spread_is_kept():
    train, test, _ = study()
    model = MeanResponse().fit(train)
    seeds = [predict_cells(model, test, seed=seed) for seed in range(3)]
    single = [quick(test, {"m": adata}, train) for adata in seeds]
    joint = quick(test, {"m": seeds, "no_change": seeds[0]}, train)
    metrics = ["pearson_delta", "energy_distance", "centroid_accuracy", "r2_delta"]
    expected = np.mean([s.per_condition[metrics].to_numpy() for s in single], axis=0)
    np.testing.assert_allclose(joint.per_condition.query("method == 'm'")[metrics], expected)
    spread = joint.summary.set_index(["method", "metric"])["seed_sd"]
    means = [s.per_condition["mse"].mean() for s in single]
    assert np.isclose(spread["m", "mse"], np.std(means, ddof=1)) and np.isnan(spread["no_change", "mse"])
    kept = joint.per_seed.query("method == 'm' and metric == 'mse'")
    np.testing.assert_allclose(kept["mean"], means)
    assert joint.predictions["m"] is seeds[0]


def test_sparse_predictions_score_as_dense_ones():
    train, test, predictions = study()
    sparse = {name: adata.copy() for name, adata in predictions.items()}
    for adata in sparse.values():
        adata.X = scipy.sparse.csr_matrix(adata.X)
    one, other = quick(test, predictions, train), quick(test, sparse, train)
    pd.testing.assert_frame_equal(other.per_condition, one.per_condition)


def test_the_same_inputs_give_the_same_numbers_whatever_the_order_of_predicted_cells():
    train, test, predictions = study(make_store(lines=("k562", "rpe1")))
    order = np.random.default_rng(0).permutation(predictions["no_change"].n_obs)
    shuffled = {name: adata[order].copy() for name, adata in predictions.items()}
    one, same, other = (quick(test, p, train) for p in (predictions, predictions, shuffled))
    pd.testing.assert_frame_equal(one.summary, same.summary)
    pd.testing.assert_frame_equal(one.per_condition, other.per_condition, atol=1e-5)


def test_cell_eval_fills_significant_genes_and_other_scales_have_none():
    train, test, predictions = study(make_store(cells=30))
    found = evaluate(test, predictions, train)
    real = found.differential["real"].query("fdr < 0.05").groupby("perturbation").size()
    counted = found.conditions.set_index("perturbation")["n_de"]
    assert counted.sum() > 0 and all(counted[name] == real.get(name, 0) for name in counted.index)
    assert set(found.differential) == {"real", *predictions} and found.scaled is None
    assert any("scaled score" in note for note in found.notes)
    train, test, predictions = study(make_store(scale="other"))
    other = evaluate(test, predictions, train)
    assert "cell-eval was left out" in other.notes[0] and other.conditions["n_de"].isna().all()


def test_a_method_that_cell_eval_refuses_is_noted_and_the_others_are_scored():
    train, test, predictions = study()
    predictions["mean_response"].X[0, 0] = 20
    again = evaluate(test, predictions, train)
    assert "cell-eval was left out for mean_response: it predicts values below 0 or from 15 up." in again.notes
    scored = again.per_condition.groupby("method")["cell_eval_pearson_delta"].count()
    assert scored["mean_response"] == 0 and scored["no_change"] == 3


def test_one_cell_of_one_perturbation_is_scored_where_it_can_be():
    store = make_store()
    keep = np.flatnonzero((store.obs["perturbation"] != "P1") | ~store.obs["perturbation"].duplicated())
    train, test, predictions = study(store.subset(keep), ["P1"])
    found = quick(test, predictions, train)
    assert found.per_condition[["energy_distance", "variance_ratio", "centroid_accuracy"]].isna().all(axis=None)
    assert found.per_condition["mse"].notna().all() and found.conditions["replicate"].isna().all()
    assert "single cell" in " ".join(found.notes)
    assert set(compare(found, "mean_response")["outcome"]) == {"no difference shown"}


def test_compare_takes_any_metric_with_a_direction():
    train, test, predictions = study()
    found = quick(test, predictions, train)
    for metric in set(METRICS) & set(found.per_condition):
        one, other = compare(found, "no_change", metric), compare(found, "mean_response", metric)
        assert np.isclose(one["mean"][0], -other["mean"][0], equal_nan=True), metric
    with pytest.raises(InputError, match=r"did you mean 'no_change'"):
        compare(found, "no_chang")
    with pytest.raises(InputError, match=r"did you mean 'pearson_delta'"):
        compare(found, "no_change", "pearson_delt")


def test_strata_partition_the_conditions():
    train, test, predictions = study(make_store(lines=("k562", "rpe1")), NAMES[:6])
    nearest = {condition: number / 20 for number, condition in enumerate(test.conditions()) if number}
    found = quick(test, predictions, train, nearest_train=nearest)
    table = stratify(found, "no_change", "nearest_train", metric="mse")
    assert list(table["method"].unique()) == ["no_change", "mean_response"]
    scores = found.per_condition.query("method == 'no_change'").assign(by=found.conditions["nearest_train"].to_numpy())
    for row in table.query("method == 'no_change'").itertuples():
        part = scores[scores["by"].between(row.lowest, row.highest)]
        assert np.isclose(part["mse"].mean(), row.mean) and part["perturbation"].nunique() == row.n
    assert stratify(found, "no_change", "n_cells")["stratum"].unique().tolist() == ["all"]
    with pytest.raises(InputError, match="effect_size"):
        stratify(found, "no_change", "effectsize")


def test_scaling_cannot_improve_a_perfect_prediction_and_improves_a_timid_one():
    train, test, _ = study()
    right = perfect(test)
    timid = right.copy()
    found = quick(test, {"right": right}, train)
    for condition, control, real in zip(test.conditions(), found.control_means, found.real_means, strict=True):
        timid.X[(timid.obs["perturbation"] == condition.perturbation).to_numpy()] -= 2 / 3 * (real - control)
    assert not gaming(found, "right")["fooled"].any()
    checked = gaming(quick(test, {"timid": timid}, train), "timid").set_index(["metric", "scale"])
    assert checked.loc[("mse", 3.0), "mean"] < 1e-9 and checked.loc[("mse", 3.0), "fooled"]
    assert np.isclose(checked.loc[("pearson_delta", 3.0), "gain"], 0, atol=1e-4)
    with pytest.raises(InputError, match="no mean training response"):
        gaming(replace(found, mean_responses=None), "right")


# Bad input


def changed(adata, **parts):
    """A copy with other values, obs columns, or names."""
    X, obs, var = parts.get("X", adata.X), parts.get("obs", adata.obs).copy(), parts.get("var", adata.var_names)
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame(index=list(var)))


def bad_predictions(adata):
    genes, obs = list(adata.var_names), adata.obs
    nan = adata.X.copy()
    nan[3, 2] = np.nan
    return {
        "'P0'": adata[(obs["perturbation"] != "P0").to_numpy()].copy(),
        "1 of 30 genes": adata[:, 1:].copy(),
        "repeated gene names": changed(adata, var=[genes[0], genes[0], *genes[2:]]),
        "repeated cell names": changed(adata, obs=obs.set_axis([obs.index[0], *obs.index[:-1]])),
        "NaN": changed(adata, X=nan),
        "counts have to be normalised": changed(adata, X=np.expm1(adata.X) * 10),
        "like z-scores": changed(adata, X=(adata.X - adata.X.mean(0)) / adata.X.std(0)),
        "'modality'": changed(adata, obs=obs.drop(columns="modality")),
    }


@pytest.mark.parametrize("words", bad_predictions(study()[2]["no_change"]))
def test_bad_predictions_are_refused_in_one_sentence(words):
    train, test, predictions = study()
    with pytest.raises(InputError, match=words) as refusal:
        quick(test, {"broken_arm": bad_predictions(predictions["no_change"])[words]}, train)
    assert "broken_arm" in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_can_be_matched_by_name_scores_the_same_and_is_noted():
    train, test, predictions = study()
    adata = predictions["no_change"]
    genes = list(adata.var_names)
    more = adata[:8].copy()
    more.obs["perturbation"], more.obs_names = ["ctrl"] * 4 + ["other"] * 4, [f"more{i}" for i in range(8)]
    unusual = {
        "order of the test cells": adata[:, ::-1].copy(),
        "further gene": changed(adata, X=np.column_stack([adata.X[:, 0], adata.X]), var=["new", *genes]),
        "predicted controls were left out": anndata.concat([adata, more]),
        "not in the test": anndata.concat([adata, more]),
    }
    expected = quick(test, {"m": adata}, train)
    for words, prediction in unusual.items():
        found = quick(test, {"m": prediction}, train)
        pd.testing.assert_frame_equal(found.per_condition, expected.per_condition)
        assert any(words in note and note.startswith("m: ") for note in found.notes), (words, found.notes)
    assert expected.notes == []
    fewer = quick(test, {"m": adata[1:].copy()}, train)
    assert "another number of cells" in fewer.notes[0]


def test_stores_that_do_not_fit_are_refused():
    train, test, predictions = study()
    with pytest.raises(InputError, match="also in the training cells"):
        quick(test, predictions, make_store())
    with pytest.raises(InputError, match="at least one method"):
        quick(test, {}, train)
    with pytest.raises(InputError, match="no predictions were given for m"):
        quick(test, {"m": []}, train)
    without = test.subset(np.flatnonzero(test.obs["perturbation"] != "ctrl"))
    with pytest.raises(InputError, match=r"no test control cell in toy\.k562"):
        quick(without, predictions, train)
    with pytest.raises(InputError, match="nothing to evaluate"):
        quick(test.subset(np.flatnonzero(test.obs["perturbation"] == "ctrl")), predictions, train)
    with pytest.raises(InputError, match="training cells have other genes"):
        quick(test, predictions, replace(train, gene_names=train.gene_names[::-1]))


# Cost


def test_memory_does_not_grow_with_the_number_of_perturbations():
    peaks = []
    for n in (10, 40):
        names = [f"Q{i}" for i in range(n + 2)]
        train, test, predictions = study(make_store(names, genes=200, cells=40), names[:n])
        tracemalloc.start()
        quick(test, predictions, train)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    profiles = 30 * 200 * 8 * 12 / 2**20
    assert peaks[1] < peaks[0] + profiles + 1, peaks


# Real data


def test_real_cells_by_hand_and_by_cell_eval():
    path = Path(__file__).parents[2] / "shared" / "data" / "perturb_seq" / "norman19_mcfaline23.h5ad"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    data = DataKwargs(pert_col="condition", control_pert="control", batch_col=None, modality_col="perturbation_type")
    store = store_from_anndata(anndata.read_h5ad(path), data)
    singles = sorted({c.perturbation for c in store.conditions() if "+" not in c[2] and c.cell_type == "A172"})
    train, test = halves(store, singles[:3])
    predictions = {m.name: predict_cells(m.fit(train), test, seed=0) for m in (MeanResponse(), NoChange())}
    scores = evaluate(test, predictions, train).per_condition
    np.testing.assert_allclose(scores["pearson_delta"], scores["cell_eval_pearson_delta"].fillna(0), atol=1e-4)
    means = scores.groupby("method")["pearson_delta"].mean()
    assert means["mean_response"] > means["no_change"]
    row = scores.iloc[0]
    keys = ["cell_type", "perturbation", "modality"]
    cells = test.X[(test.obs[keys] == row[keys]).all(axis=1).to_numpy()].mean(0)
    controls = test.X[((test.obs.cell_type == row.cell_type) & (test.obs.perturbation == "control")).to_numpy()].mean(0)
    made = predictions[row.method]
    guess = made.X[(made.obs[keys] == row[keys]).all(axis=1).to_numpy()].mean(0)
    by_hand = np.corrcoef(np.ravel(cells - controls), np.ravel(guess - np.ravel(controls)))[0, 1]
    assert np.isclose(row["pearson_delta"], by_hand, atol=1e-4)
