"""Baselines, metrics and report against brute force, hostile names and real data."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_perturb.cells.store import CellStore, store_from_anndata
from esm_perturb.core.config import DataKwargs, InputError
from esm_perturb.evaluation.baselines import (
    MeanResponse,
    NoChange,
    RidgeOnEmbeddings,
    cells_with_mean,
    draw_controls,
    predict_cells,
    train_responses,
)
from esm_perturb.evaluation.intervals import paired_bootstrap
from esm_perturb.evaluation.metrics import compare, energy_distance, evaluate, variance_ratio
from esm_perturb.evaluation.report import build_report, rebuild_index

HOSTILE = ['<script>alert("x")</script>', "$x^2$", "A&B", "genes/…", "'; DROP", "{{ 7*7 }}"]


def make_store(
    names=("P1", "P2", "P3", "P4"), *, seed=0, genes=12, cells=8, lines=("k562",), scale="log1p", sparse=True
):
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


def evaluation_of(store, held_out, *, cell_eval=False):
    train, test = halves(store, held_out)
    methods = [MeanResponse(), NoChange()]
    predictions = {m.name: predict_cells(m.fit(train), test, seed=1) for m in methods}
    return evaluate(test, predictions, train, cell_eval=cell_eval), train, test


def report_of(evaluation, path, model="mean_response", title="A run", **changes):
    inputs = {
        "provenance": {"seed": 1},
        "training": {},
        "coverage": pd.DataFrame({"requested": ["P1"], "matched_as": ["P1"], "status": ["exact"]}),
        "leakage": evaluation.conditions[["perturbation"]].assign(train_cells=0, shared_controls=0),
        "split_table": pd.DataFrame({"cells": [1]}, index=pd.Index(["train"], name="split")),
    }
    return build_report(evaluation, title=title, model=model, path=path, **{**inputs, **changes})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.floats(0, 5), st.floats(-4, 4)), min_size=1, max_size=6),
    st.integers(0, 10_000),
)
def test_cells_with_mean_meets_the_mean_and_stays_above_zero(n_cells, genes, seed):
    level, response = np.array(genes).T
    controls = np.random.default_rng(seed).uniform(0, 1, (n_cells, len(genes))) * level
    cells, clipped = cells_with_mean(controls, response, nonnegative=True)
    wanted = controls.mean(0) + response
    np.testing.assert_allclose(cells.mean(0), np.maximum(wanted, 0), atol=1e-4)
    assert cells.min() >= 0 and clipped == np.mean(wanted < 0)


def test_scaling_keeps_silent_cells_silent():
    controls = np.array([[0.0, 1.0], [2.0, 0.0]])
    cells, _ = cells_with_mean(controls, np.array([0.5, -0.2]), nonnegative=True)
    assert cells[0, 0] == 0 and cells[1, 1] == 0


@pytest.mark.parametrize("sparse", [True, False])
def test_mean_response_weighs_perturbations_not_cells(sparse):
    store = make_store(sparse=sparse)
    many = np.flatnonzero(store.obs["perturbation"] == "P1")
    obs = store.obs.iloc[np.r_[0 : len(store.obs), many, many]]
    obs = obs.set_axis([f"d{i}" for i in range(len(obs))])
    heavy = CellStore(
        store.X[np.r_[0 : len(store.obs), many, many]], store.gene_names, obs, "ctrl", "log1p", "log1p", {}
    )
    condition = store.conditions()[0]
    np.testing.assert_allclose(
        MeanResponse().fit(store).response(condition), MeanResponse().fit(heavy).response(condition), atol=1e-6
    )


def test_baselines_do_not_depend_on_the_order_of_cells():
    store = make_store(lines=("k562", "rpe1"))
    shuffled = store.subset(np.random.default_rng(0).permutation(len(store.obs)))
    vectors = np.random.default_rng(1).normal(size=(4, 3))
    for make in (MeanResponse, lambda: RidgeOnEmbeddings(["P1", "P2", "P3", "P4"], vectors)):
        one, other = make().fit(store), make().fit(shuffled)
        for condition in store.conditions():
            np.testing.assert_allclose(one.response(condition), other.response(condition), atol=1e-6)


def test_test_cells_never_reach_a_baseline():
    store = make_store()
    train, test = halves(store, ["P4"])
    before = MeanResponse().fit(train).response(test.conditions()[0])
    store.X[np.flatnonzero(store.obs["perturbation"] == "P4")] = 9.0
    after = MeanResponse().fit(halves(store, ["P4"])[0]).response(test.conditions()[0])
    np.testing.assert_array_equal(before, after)


def test_ridge_predicts_a_combination_as_the_sum_of_its_genes():
    store = make_store(names=("A", "B", "C", "A+B"))
    ridge = RidgeOnEmbeddings(["A", "B", "C"], np.random.default_rng(0).normal(size=(3, 2))).fit(store)
    np.testing.assert_allclose(ridge._feature("A+B"), ridge._feature("A") + ridge._feature("B"))
    np.testing.assert_allclose(ridge._feature("B+A"), ridge._feature("A+B"))


def test_refusals_of_baselines():
    store = make_store()
    perturbed = store.subset(np.flatnonzero(store.obs["perturbation"] != "ctrl"))
    with pytest.raises(InputError, match="no training control cell in toy.k562"):
        train_responses(perturbed)
    with pytest.raises(InputError, match="hold no perturbation"):
        train_responses(store.subset(np.flatnonzero(store.obs["perturbation"] == "ctrl")))
    with pytest.raises(InputError, match="at least two training perturbations"):
        RidgeOnEmbeddings(["P1"], np.ones((1, 2))).fit(make_store(names=("P1",)))
    with pytest.raises(InputError, match="P4"):
        RidgeOnEmbeddings(["P1", "P2", "P3"], np.ones((3, 2))).fit(store)
    with pytest.raises(InputError, match="No control cell in toy.k562"):
        predict_cells(NoChange(), perturbed, seed=0)


def test_every_method_starts_from_the_same_controls_and_the_seed_matters():
    store = make_store()
    condition = store.conditions()[0]
    first = draw_controls(store, condition, 40, seed=0)
    assert np.array_equal(first, draw_controls(store, condition, 40, seed=0))
    assert not np.array_equal(first, draw_controls(store, condition, 40, seed=1))
    assert set(store.obs["perturbation"].iloc[first]) == {"ctrl"}


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
    assert np.isclose(energy_distance(x, y), 2 * between - sum(within), atol=1e-6)


def test_distribution_metrics_survive_single_and_identical_cells():
    cells = np.ones((4, 3))
    assert np.isnan(energy_distance(cells[:1], cells)) and np.isnan(variance_ratio(cells[:1], cells))
    assert energy_distance(cells, cells) == 0 and np.isnan(variance_ratio(cells, cells))


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


def test_a_perfect_prediction_and_gene_permutation():
    _, train, test = evaluation_of(make_store(names=[f"P{i}" for i in range(8)], genes=30), ["P0", "P1", "P2"])
    truth = test.subset(np.flatnonzero(test.obs["perturbation"] != "ctrl"))
    perfect = anndata.AnnData(
        truth.rows(np.arange(len(truth.obs))), obs=truth.obs.copy(), var=pd.DataFrame(index=test.gene_names)
    )
    scores = evaluate(test, {"perfect": perfect}, train, cell_eval=False).per_condition
    np.testing.assert_allclose(scores[["pearson_delta", "systema_pearson_delta", "variance_ratio"]], 1)
    np.testing.assert_allclose(scores["mse"], 0, atol=1e-9)
    assert (scores["energy_distance"] < 0).all()
    order = np.random.default_rng(0).permutation(30)
    permute = {"gene_names": [test.gene_names[i] for i in order]}
    moved = [
        CellStore(s.X[:, order], permute["gene_names"], s.obs, "ctrl", "log1p", "log1p", {}) for s in (test, train)
    ]
    again = evaluate(moved[0], {"perfect": perfect[:, order]}, moved[1], cell_eval=False).per_condition
    np.testing.assert_allclose(again["pearson_delta"], scores["pearson_delta"])


def test_evaluation_refuses_leaks_wrong_genes_and_unknown_names():
    evaluation, train, test = evaluation_of(make_store(), ["P1"])
    predictions = evaluation.predictions
    with pytest.raises(InputError, match="also in the training cells"):
        evaluate(test, predictions, make_store())
    reordered = {"m": predictions["no_change"][:, ::-1].copy()}
    with pytest.raises(InputError, match="another order"):
        evaluate(test, reordered, train)
    with pytest.raises(InputError, match=r"did you mean 'no_change'"):
        compare(evaluation, "no_chang")
    with pytest.raises(InputError, match="at least one method"):
        evaluate(test, {}, train)


def test_sparse_predictions_score_as_dense_ones():
    evaluation, train, test = evaluation_of(make_store(), ["P1", "P2"])
    sparse = {name: adata.copy() for name, adata in evaluation.predictions.items()}
    for adata in sparse.values():
        adata.X = scipy.sparse.csr_matrix(adata.X)
    again = evaluate(test, sparse, train, cell_eval=False)
    pd.testing.assert_frame_equal(again.per_condition, evaluation.per_condition)


def test_other_scales_have_no_cell_eval_but_a_note(tmp_path):
    evaluation, _, _ = evaluation_of(make_store(scale="other"), ["P1", "P2"], cell_eval=True)
    assert "cell-eval was left out" in evaluation.notes[0]
    assert evaluation.predictions["mean_response"].X.min() < 0
    assert "cell-eval was left out" in report_of(evaluation, tmp_path / "report.html").read_text()


def test_a_method_that_cell_eval_refuses_is_noted_and_the_others_are_scored():
    evaluation, train, test = evaluation_of(make_store(), ["P1", "P2"])
    predictions = {name: adata.copy() for name, adata in evaluation.predictions.items()}
    predictions["mean_response"].X[0, 0] = 20
    again = evaluate(test, predictions, train)
    assert again.notes == ["cell-eval was left out for mean_response: it predicts values below 0 or from 15 up."]
    scored = again.per_condition.groupby("method")["cell_eval_pearson_delta"].count()
    assert scored["mean_response"] == 0 and scored["no_change"] == 2


def test_one_perturbation_with_one_cell_still_gives_a_report(tmp_path):
    store = make_store(lines=("k562",))
    keep = np.flatnonzero((store.obs["perturbation"] != "P1") | ~store.obs["perturbation"].duplicated())
    evaluation, _, _ = evaluation_of(store.subset(keep), ["P1"], cell_eval=True)
    assert np.isnan(evaluation.per_condition["energy_distance"]).all()
    text = report_of(evaluation, tmp_path / "report.html").read_text()
    assert "no difference" in text and "With 1 held-out perturbation only" in text
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_names_are_text_everywhere(tmp_path):
    store = make_store(names=(*HOSTILE, "P1", "P2"))
    store.gene_names[: len(HOSTILE)] = HOSTILE
    evaluation, _, _ = evaluation_of(store, HOSTILE)
    page = report_of(evaluation, tmp_path / "report.html", title=HOSTILE[0], provenance={"config": {"x": HOSTILE[0]}})
    text = page.read_text()
    tags = Tags(text)
    assert [tag for tag, _ in tags.tags].count("script") == 2
    assert "".join(tags.text).count("49") == "".join(Tags(text.replace("{{ 7*7 }}", "")).text).count("49")
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert {row["perturbation"] for row in record["per_condition"]} == set(HOSTILE)
    assert json.loads(re.search(r'id="metrics">(.*?)</script>', text, re.S)[1]) == record


def test_report_is_self_contained_and_accessible(tmp_path):
    evaluation, _, _ = evaluation_of(make_store(names=[f"P{i}" for i in range(8)]), ["P0", "P1", "P2"])
    text = report_of(evaluation, tmp_path / "report.html").read_text()
    tags = Tags(text).tags
    assert not re.search(r"https?://|@import|url\(", text) and len(text) < 10 * 2**20
    assert not [
        attrs for tag, attrs in tags if tag in ("link", "iframe", "object") or (tag == "script" and "src" in attrs)
    ]
    assert [tag for tag, _ in tags].count("h1") == 1
    assert all(attrs.get("alt") and attrs["src"].startswith("data:") for tag, attrs in tags if tag == "img")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_same_inputs_give_the_same_report(tmp_path):
    pages = []
    for name in ("a", "b"):
        evaluation, _, _ = evaluation_of(make_store(), ["P1", "P2"])
        pages.append(report_of(evaluation, tmp_path / name / "report.html").read_text())
    assert pages[0] == pages[1]


def test_index_lists_failures_and_survives_broken_files(tmp_path):
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "run.json").write_text(json.dumps({"status": "failed", "error": "<b>broken"}))
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "metrics.json").write_text("[1, 2")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "metrics.json").write_text("[]")
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "metrics.json").write_text(json.dumps({"headline": "It beats the mean.", "provenance": None}))
    text = rebuild_index(tmp_path).read_text()
    assert "&lt;b&gt;broken" in text and "It beats the mean." in text
    assert [text.count(f">{mark}<") for mark in ("◆ unreadable", "▼ failed", "● finished")] == [2, 1, 1]
    with pytest.raises(InputError, match="does not exist"):
        rebuild_index(tmp_path / "nowhere")


def real_file(name):
    path = Path(os.environ.get("REALDATA") or "REALDATA is not set") / "perturb_seq" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


@pytest.mark.realdata
def test_norman_and_mcfaline_by_hand_and_by_cell_eval():
    data = DataKwargs(pert_col="condition", control_pert="control", batch_col=None, modality_col="perturbation_type")
    store = store_from_anndata(anndata.read_h5ad(real_file("norman19_mcfaline23.h5ad")), data)
    singles = sorted(
        {c.perturbation for c in store.conditions() if "+" not in c.perturbation and c.cell_type == "A172"}
    )
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


@pytest.mark.realdata
def test_z_scores_are_shifted_and_never_clipped():
    data = DataKwargs(pert_col="perturbation", control_pert="control", batch_col=None, cell_type_key=None)
    adata = anndata.read_h5ad(real_file("l1000_knockdown_zscores.h5ad"))
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    is_control = adata.obs["pert_type"].astype(str).str.startswith("ctl").to_numpy()
    adata.obs.loc[is_control, "perturbation"] = "control"
    store = store_from_anndata(adata, data)
    assert store.scale == "other"
    train, test = halves(store, sorted(set(store.obs["perturbation"]) - {"control"})[:10])
    response = MeanResponse().fit(train)
    predicted = predict_cells(response, test, seed=0)
    assert predicted.X.min() < 0 and set(response.clipped.values()) == {0.0}
    evaluation = evaluate(test, {"mean_response": predicted}, train)
    assert evaluation.notes and np.isfinite(evaluation.per_condition["pearson_delta"]).all()
