"""cell-eval and cell-eval2 through us and called plainly on the same files, and what must not change their numbers."""

import contextlib
import io

import anndata
import numpy as np
import pandas as pd
import polars
import pytest
import scipy.sparse
import scipy.stats

from esm_perturb.cells.store import CellStore, store_from_anndata
from esm_perturb.core.config import DataKwargs, InputError
from esm_perturb.evaluation import vcc2026
from esm_perturb.evaluation.baselines import MeanResponse, NoChange, predict_cells
from esm_perturb.evaluation.cell_eval import KEYS, cell_eval_metrics, contexts_of, predicted_cells, predicted_rows
from esm_perturb.evaluation.vcc2026 import counts_at_depth, scaled_scores

CONTROL = DataKwargs().control_pert
LINES = ("k562", "rpe1")


def make_counts(n_perturbations=6, *, seed=0, n_genes=60, n_cells=16, lines=LINES, sizes=None):
    """Negative binomial counts; each perturbation, named after a measured gene, moves a third of the genes."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(2, 20, n_genes)
    names = [CONTROL, *(f"G{i}" for i in range(n_perturbations))]
    factors = np.exp(rng.normal(0, 0.8, (len(names), n_genes)) * (rng.random((len(names), n_genes)) < 0.33))
    factors[0] = 1
    blocks, rows = [], []
    for line in lines:
        for number, name in enumerate(names):
            size = 4 * n_cells if name == CONTROL else (sizes or {}).get(name, n_cells)
            depth = rng.gamma(8, 1 / 8, (size, 1))
            blocks.append(rng.poisson(base * factors[number] * depth))
            rows += [(line, name)] * size
    obs = pd.DataFrame(rows, columns=["cell_type", "gene"], index=[f"c{i}" for i in range(len(rows))])
    obs["gem_group"] = "1"
    X = scipy.sparse.csr_matrix(np.vstack(blocks).astype(np.float32))
    return anndata.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]))


def stores_of(adata, held_out, **settings):
    """Training and test cells; controls are dealt alternately."""
    store = store_from_anndata(adata, DataKwargs(**settings))
    is_control = (store.obs["perturbation"] == store.control).to_numpy()
    test = store.obs["perturbation"].isin(held_out).to_numpy()
    even = np.arange(len(store)) % 2 == 0
    return store.subset(np.flatnonzero(~test & ~(is_control & even))), store.subset(
        np.flatnonzero(test | is_control & even)
    )


@pytest.fixture(scope="module")
def screen():
    """Test cells of four perturbations in two lines, and predictions: noisy truth, mean response, no change."""
    adata = make_counts(8)
    train, test = stores_of(adata, [f"G{i}" for i in range(4)])
    methods = [MeanResponse(), NoChange()]
    predictions = {method.name: predict_cells(method.fit(train), test, seed=1) for method in methods}
    good = predictions["no_change"].copy()
    rng, X = np.random.default_rng(0), np.asarray(good.X.toarray() if scipy.sparse.issparse(good.X) else good.X).copy()
    for condition, rows in predicted_rows(good).items():
        real = test.rows(test.cells(condition))
        X[rows] = np.maximum(real[rng.integers(0, len(real), len(rows))] + rng.normal(0, 0.05, X[rows].shape), 0)
    good.X = X.astype(np.float32)
    return test, {"good": good, **predictions}


@pytest.fixture(scope="module")
def scored(screen):
    """What cell-eval says of all methods."""
    return cell_eval_metrics(*screen)


def files_of(test, predicted, line, folder):
    """Real and predicted cells of one line as a user of cell-eval would write them, with the real controls in both."""
    mine = test.obs["cell_type"].to_numpy() == line
    real = test.to_anndata()[mine].copy()
    controls = real[real.obs["perturbation"] == CONTROL]
    guess = predicted[(predicted.obs["cell_type"] == line).to_numpy()]
    both = anndata.concat([controls, guess[guess.obs["perturbation"] != CONTROL]])
    for name, cells in (("real", real), ("pred", both)):
        X = cells.X.toarray() if scipy.sparse.issparse(cells.X) else cells.X
        out = anndata.AnnData(X, cells.obs[["perturbation"]].astype(str), pd.DataFrame(index=test.gene_names))
        out.obs_names_make_unique()
        out.write_h5ad(folder / f"{name}.h5ad")


# ---- cell-eval 0.8.2


@pytest.mark.parametrize("method", ["good", "mean_response", "no_change"])
def test_the_full_profile_is_cell_evals_own_on_the_same_files(screen, scored, method, tmp_path):
    from cell_eval import MetricsEvaluator

    test, predictions = screen
    ours, differential = scored
    for line in LINES:
        files_of(test, predictions[method], line, tmp_path)
        with contextlib.redirect_stderr(io.StringIO()):
            evaluator = MetricsEvaluator(
                adata_pred=str(tmp_path / "pred.h5ad"),
                adata_real=str(tmp_path / "real.h5ad"),
                control_pert=CONTROL,
                pert_col="perturbation",
                num_threads=1,
                outdir=str(tmp_path / line),
            )
            plain, _ = evaluator.compute(profile="full", break_on_error=True)
        plain = plain.to_pandas().set_index("perturbation").sort_index()
        mine = ours[(ours["method"] == method) & (ours["cell_type"] == line)].set_index("perturbation").sort_index()
        columns = [f"cell_eval_{name}" for name in plain]
        assert set(columns) == {name for name in ours if name.startswith("cell_eval_")} and len(columns) == 28
        np.testing.assert_allclose(mine[columns].to_numpy(float), plain.to_numpy(float), atol=1e-5)  # float32 sums
        for side, name in (("real", "real"), (method, "pred")):
            tests = polars.read_csv(tmp_path / line / f"{name}_de.csv").to_pandas()
            table = differential[side].query("cell_type == @line").reset_index(drop=True)
            assert (table["gene"] == tests["feature"]).all() and (table["perturbation"] == tests["target"]).all()
            for column in ("p_value", "fdr"):
                np.testing.assert_allclose(table[column], tests[column], atol=1e-6)
            np.testing.assert_allclose(table["log2_fold_change"], tests["log2_fold_change"], atol=1e-4)  # float32 means


def test_differential_expression_is_wilcoxon_and_benjamini_hochberg(screen, scored):
    test, (_, differential) = screen[0], scored
    condition = test.conditions()[1]
    cells, controls = (test.rows(rows).astype(float) for rows in (test.cells(condition), test.controls(condition)))
    table = differential["real"]
    table = table[(table[KEYS] == list(condition)).all(axis=1)]
    p_values = scipy.stats.mannwhitneyu(cells, controls, axis=0, method="asymptotic").pvalue
    np.testing.assert_allclose(table["p_value"], p_values, rtol=1e-6)
    np.testing.assert_allclose(table["fdr"], scipy.stats.false_discovery_control(p_values), rtol=1e-6)


def test_whole_numbers_are_never_normalised_by_each_objects_own_median():
    rng = np.random.default_rng(0)
    adata = make_counts(3, lines=("k562",))
    adata.X = scipy.sparse.csr_matrix(np.minimum(adata.X.toarray(), 9))  # whole, and within the range of log1p values
    store = store_from_anndata(adata, DataKwargs(scale="log1p"))
    predicted = predict_cells(NoChange().fit(store), store, seed=0)
    predicted.X = rng.integers(0, 4, predicted.shape).astype(np.float32)  # another median than the real cells
    scores, _ = cell_eval_metrics(store, {"whole": predicted})
    for _, row in scores.iterrows():
        condition = next(c for c in store.conditions() if c.perturbation == row["perturbation"])
        control, real = store.mean(store.controls(condition)), store.mean(store.cells(condition))
        mean = predicted_cells("whole", predicted, condition).mean(axis=0, dtype=float)
        expected = np.corrcoef(mean - control, real - control)[0, 1]
        assert row["cell_eval_pearson_delta"] == pytest.approx(expected, abs=1e-5)
        assert row["cell_eval_mae"] == pytest.approx(np.abs(mean - real).mean(), rel=1e-5)


def test_methods_do_not_influence_each_other_and_rows_may_come_in_any_order(screen, scored):
    test, predictions = screen
    together, tables = scored
    alone, _ = cell_eval_metrics(test, {"no_change": predictions["no_change"]})
    mixed = predictions["no_change"]
    mixed = mixed[np.random.default_rng(3).permutation(len(mixed))].copy()
    mixed.X = scipy.sparse.csr_matrix(mixed.X)
    shuffled, _ = cell_eval_metrics(test, {"no_change": mixed})
    expected = together[together["method"] == "no_change"].set_index(KEYS).drop(columns="method")
    for other in (alone, shuffled):
        other = other.set_index(KEYS).loc[expected.index, expected.columns]
        np.testing.assert_allclose(other.to_numpy(float), expected.to_numpy(float), atol=1e-4)  # float32 sums
    assert list(tables) == ["real", *predictions] and all(len(table) == 2 * 4 * 60 for table in tables.values())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_perturbations_of_one_cell_have_scores_or_nan(n):
    adata = make_counts(n + 2, lines=("k562",), sizes={"G0": 1})
    train, test = stores_of(adata, [f"G{i}" for i in range(n)])
    scores, _ = cell_eval_metrics(test, {"no_change": predict_cells(NoChange().fit(train), test, seed=0)})
    assert len(scores) == n and np.isfinite(scores["cell_eval_mae"]).all()
    assert scores["cell_eval_discrimination_score_l1"].isna().all() == (n < 2)
    assert scores["cell_eval_clustering_agreement"].isna().all() == (n < 3)
    assert scores["cell_eval_pearson_edistance"].isna().all() == (n < 2)


def test_what_cell_eval_cannot_score_is_refused_in_a_sentence(screen):
    test, predictions = screen
    large = predictions["good"].copy()
    large.X[0, 0] = 20
    refusals = [
        ({"large": large}, {}, "large predicts values below 0 or from 15 up"),
        ({"real": predictions["good"]}, {}, "no method can be called 'real'"),
        ({"good": predictions["good"]}, {"profile": "ful"}, "did you mean 'full'"),
        ({"good": predictions["good"][:9].copy()}, {}, "good predicts no cell of"),
    ]
    for given, settings, message in refusals:
        with pytest.raises(InputError, match=message):
            cell_eval_metrics(test, given, **settings)


# ---- cell-eval2 0.20, vcc2026


def test_scaled_scores_are_cell_eval2s_own_on_the_same_files(screen, tmp_path):
    from cell_eval2 import EvalConfig, aggregate_metrics_wide, build_generic_baseline, compute_metrics, score_metrics
    from cell_eval2.baseline import build_run_meta
    from cell_eval2.real_bundle import build_real_bundle

    test, predictions = screen
    scaled, notes = scaled_scores(test, predictions, seed=5)
    scaled = scaled[scaled["method"] == "mean_response"].set_index("metric")
    expected = []
    for conditions in contexts_of(test):
        rows = test.controls(conditions[0])
        depth = np.median(test.obs["n_counts"].iloc[rows])
        rng = np.random.default_rng([5, list(predictions).index("mean_response")])
        real, guess, labels = [test.counts(rows)], [test.counts(rows)], [CONTROL] * len(rows)
        guessed = list(labels)
        for condition in conditions:
            real.append(test.counts(test.cells(condition)))
            cells = predicted_cells("mean_response", predictions["mean_response"], condition)
            guess.append(counts_at_depth(cells, depth, 1e4, rng))
            labels += [condition.perturbation] * real[-1].shape[0]
            guessed += [condition.perturbation] * guess[-1].shape[0]
        for name, blocks, label in (("R", real, labels), ("P", guess, guessed)):
            obs = pd.DataFrame({"target": label}, index=[f"cell_{i}" for i in range(len(label))])
            cells = anndata.AnnData(scipy.sparse.vstack(blocks, format="csr"), obs, pd.DataFrame(index=test.gene_names))
            cells.write_h5ad(tmp_path / f"{name}.h5ad")
        R, P, b, bundle = (str(tmp_path / name) for name in ("R.h5ad", "P.h5ad", "b.h5ad", conditions[0].cell_type))
        config = EvalConfig(metrics="vcc2026", input_type="counts", device="cpu", cache_strict=True)
        build_generic_baseline(R, config=config, save_pred=b, seed=5)
        build_real_bundle(R, b, config=config, outdir=bundle, bundle_id="x")
        user = aggregate_metrics_wide(compute_metrics(P, R, config=config))
        scores = score_metrics(user, real_bundle=bundle, user_meta=build_run_meta(config, R, P)).to_pandas()
        scores["value"] = [user[name][2] if name in user.columns else np.nan for name in scores["metric"]]
        assert user["statistic"][2] == "mean"
        expected.append(scores.set_index("metric"))
    for metric in scaled.index:
        for ours, theirs in (("score", "from_replicate"), ("value", "value")):
            mean = np.mean([scores.loc[metric, theirs] for scores in expected])  # both lines have four perturbations
            assert scaled.loc[metric, ours] == pytest.approx(mean, abs=1e-6, nan_ok=True), (metric, ours)
    assert len(scaled) == 7 and sum("counts a cell" in note for note in notes) == 2


def test_better_predictions_score_higher_and_both_ends_are_where_they_should_be(screen):
    test, predictions = screen
    scaled, _ = scaled_scores(test, predictions)
    averages = scaled.query("metric == 'avg_score'").set_index("method")["score"]
    assert averages["good"] > 0.6 > averages["mean_response"] > averages["no_change"]
    members = scaled[scaled["metric"] != "avg_score"]
    assert members.groupby("metric")["baseline"].nunique().eq(1).all()
    assert (members["score"].groupby(members["method"]).mean() - averages).abs().max() < 1e-9


def test_each_perturbation_drawn_once_scores_what_cell_eval2_scores(screen, monkeypatch):
    test, predictions = screen
    one = test.conditions()[0]  # contexts of three and of four perturbations, so weights matter
    test = test.subset(np.setdiff1d(np.arange(len(test)), test.cells(one)))
    both = {"good": [predictions["good"], predictions["no_change"]], "mean_response": predictions["mean_response"]}
    monkeypatch.setattr(vcc2026, "_draws", lambda names, seed: pd.DataFrame(1, index=range(3), columns=list(names)))
    once, _ = scaled_scores(test, both)
    np.testing.assert_allclose(once["low"], once["score"], atol=1e-9)
    np.testing.assert_allclose(once["high"], once["score"], atol=1e-9)


def test_the_scaled_score_has_an_interval_over_perturbations(screen):
    test, predictions = screen
    scaled, _ = scaled_scores(test, predictions)
    averages = scaled.query("metric == 'avg_score'").set_index("method")
    assert (averages["low"] < averages["score"]).all() and (averages["score"] < averages["high"]).all()
    assert averages.loc["good", "low"] > averages.loc["no_change", "high"]


def test_rounding_to_counts_keeps_means_and_silent_genes():
    rng = np.random.default_rng(0)
    expected = np.array([0.0, 0.05, 0.5, 1.0, 7.3, 250.0])
    counts = counts_at_depth(np.log1p(np.tile(expected, (40_000, 1)) * 2), 5000, 1e4, rng).toarray()
    assert (counts == np.rint(counts)).all() and not counts[:, 0].any()
    assert (np.abs(counts - expected) < 1 + 1e-6).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.01)


def test_without_counts_there_is_a_sentence_and_no_score(screen):
    test, predictions = screen
    logged = CellStore(test.X, test.gene_names, test.obs, test.control, "log1p", "log1p", {})
    nothing, notes = scaled_scores(logged, predictions)
    assert nothing is None and "raw counts" in notes[0] and "log1p" in notes[0]


def test_small_and_single_perturbations_and_negative_predictions_are_left_out_aloud():
    adata = make_counts(6, sizes={"G0": 3})
    adata = adata[~((adata.obs["cell_type"] == "rpe1") & adata.obs["gene"].isin(["G1", "G2"]))].copy()
    train, test = stores_of(adata, ["G0", "G1", "G2", "G3"])
    predictions = {"no_change": predict_cells(NoChange().fit(train), test, seed=0)}
    below = predictions["no_change"].copy()
    below.X = -np.asarray(below.X.toarray() if scipy.sparse.issparse(below.X) else below.X) - 1
    scaled, notes = scaled_scores(test, predictions | {"below": below})
    assert set(scaled["method"]) == {"no_change"}
    told = " ".join(notes)
    assert "1 perturbation(s) of data.k562 with fewer than 4 cells" in told
    assert "left out for data.rpe1: it needs at least two perturbations" in told
    assert "left out for below: it predicts values below 0" in told


def test_the_same_seed_gives_the_same_scores(screen):
    test, predictions = screen
    one = {"mean_response": predictions["mean_response"]}
    first, again, other = (scaled_scores(test, one, seed=seed)[0]["score"].to_numpy() for seed in (0, 0, 1))
    np.testing.assert_allclose(first, again, rtol=1e-6)  # cell-eval2 sums in the order in which its threads finish
    assert not np.allclose(first, other, rtol=1e-6)
