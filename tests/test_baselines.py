"""Baselines against scikit-learn, formulas written out, hostile splits and real data."""

import itertools
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from esm_perturb.cells.store import CellStore, Condition, draw_controls, store_from_anndata
from esm_perturb.core.config import DataKwargs, InputError
from esm_perturb.evaluation.baselines import (
    Additive,
    MeanResponse,
    NoChange,
    OracleMean,
    SeenElsewhere,
    fit_baselines,
    predict_cells,
)
from esm_perturb.evaluation.embedding_baselines import (
    Bilinear,
    KNearest,
    RidgeOnEmbeddings,
    gene_folds,
    nearest_trained,
)
from esm_perturb.evaluation.responses import TrainResponses, cells_with_mean, train_responses

SINGLES = [f"P{i}" for i in range(12)]


def make_store(names=SINGLES, *, lines=("k562",), genes=20, cells=6, scale="log1p", sparse=True, modality="CRISPRi"):
    """Cells around a random shift for each perturbation; P0, P1, … are the first measured genes."""
    blocks, rows = [], []
    for line in lines:
        for name in ("ctrl", *names):
            size = 4 * cells if name == "ctrl" else cells
            rng = np.random.default_rng([len(line), *name.encode(), *line.encode()])
            shift = np.zeros(genes) if name == "ctrl" else rng.normal(0.1, 0.4, genes)
            if scale == "log1p":
                block = np.log1p(rng.poisson(np.maximum(2 + 2 * shift, 0.1), (size, genes)) * 0.9)
            else:
                block = rng.normal(shift, 1.0, (size, genes))
            blocks.append(block.astype(np.float32))
            rows += [("toy", line, name, "1", "none" if name == "ctrl" else modality)] * size
    obs = pd.DataFrame(rows, columns=["dataset", "cell_type", "perturbation", "batch", "modality"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    X = scipy.sparse.csr_matrix(np.vstack(blocks)) if sparse else np.vstack(blocks)
    gene_names = [f"P{i}" for i in range(10)] + [f"G{i}" for i in range(genes - 10)]
    return CellStore(X, gene_names[:genes], obs, "ctrl", scale, scale)


def halves(store, held_out, line="k562"):
    """Train and test stores; controls are dealt alternately."""
    test = ((store.obs["cell_type"] == line) & store.obs["perturbation"].isin(held_out)).to_numpy()
    even = ((store.obs["perturbation"] == store.control) & (np.arange(len(store.obs)) % 2 == 0)).to_numpy()
    in_line = (store.obs["cell_type"] == line).to_numpy()
    return store.subset(np.flatnonzero(~test & ~even)), store.subset(np.flatnonzero(test | (even & in_line)))


def vectors_of(names=SINGLES, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(len(names), dim))


def condition(name, line="k562", modality="CRISPRi"):
    return Condition("toy", line, name, modality)


def every_baseline(test):
    """All of them, unfitted, with vectors for every single gene."""
    learned = [RidgeOnEmbeddings(SINGLES, vectors_of()), KNearest(SINGLES, vectors_of()), Bilinear()]
    return [NoChange(), MeanResponse(), SeenElsewhere(), Additive(), OracleMean(test), *learned]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.floats(0, 5), st.floats(-4, 4)), min_size=1, max_size=6),
    st.integers(0, 10_000),
)
def test_cells_with_mean_meets_the_mean_and_stays_above_zero(n_cells, genes, seed):
    level, response = np.array(genes).T
    controls = (np.random.default_rng(seed).uniform(0, 1, (n_cells, len(genes))) * level).astype(np.float32)
    cells, clipped = cells_with_mean(controls, response, nonnegative=True)
    wanted = controls.mean(0, dtype=np.float64) + response
    np.testing.assert_allclose(cells.mean(0), np.maximum(wanted, 0), atol=1e-4)
    assert cells.min() >= 0 and cells.dtype == np.float32 and clipped == np.mean(wanted < 0)


def test_scaling_keeps_silent_cells_silent():
    controls = np.array([[0.0, 1.0], [2.0, 0.0]])
    cells, _ = cells_with_mean(controls, np.array([0.5, -0.2]), nonnegative=True)
    assert cells[0, 0] == 0 and cells[1, 1] == 0


@pytest.mark.parametrize("sparse", [True, False])
def test_a_perturbation_counts_once_however_many_cells_it_has(sparse):
    store = make_store(sparse=sparse)
    rows = np.r_[0 : len(store), np.repeat(np.flatnonzero(store.obs["perturbation"] == "P1"), 2)]
    obs = store.obs.iloc[rows].set_axis([f"d{i}" for i in range(len(rows))])
    heavy = CellStore(store.X[rows], store.gene_names, obs, "ctrl", "log1p", "log1p")
    for one, other in zip(every_baseline(store), every_baseline(heavy), strict=True):
        if not isinstance(one, NoChange):
            found = [method.fit(cells).response(condition("P2")) for method, cells in ((one, store), (other, heavy))]
            np.testing.assert_allclose(*found, atol=1e-6, err_msg=one.name)


def test_baselines_do_not_depend_on_the_order_of_cells():
    store = make_store([*SINGLES, "P0+P1"], lines=("k562", "rpe1"))
    shuffled = store.subset(np.random.default_rng(0).permutation(len(store)))
    for one, other in zip(every_baseline(store)[1:], every_baseline(shuffled)[1:], strict=True):
        one, other = one.fit(store), other.fit(shuffled)
        for asked in store.conditions():
            np.testing.assert_allclose(one.response(asked), other.response(asked), atol=1e-5, err_msg=one.name)


def test_only_the_oracle_sees_test_cells():
    store = make_store()
    held_out = ["P9", "P10"]
    before = fit_baselines(*halves(store, held_out), names=SINGLES, vectors=vectors_of())[0]
    changed = CellStore(store.X.toarray(), store.gene_names, store.obs, "ctrl", "log1p", "log1p")
    changed.X[np.flatnonzero(store.obs["perturbation"].isin(held_out))] = 9.0
    after = fit_baselines(*halves(changed, held_out), names=SINGLES, vectors=vectors_of())[0]
    controls, rng = store.rows(store.controls(condition("P9"))), np.random.default_rng(0)
    same = {
        one.name: np.allclose(one.predict(condition("P9"), controls, rng), two.predict(condition("P9"), controls, rng))
        for one, two in zip(before, after, strict=True)
    }
    assert {name for name, equal in same.items() if not equal} == {"oracle_mean"}
    assert {"ridge", "knn", "bilinear", "mean_response", "no_change"} <= set(same)


def test_a_summary_fits_as_the_cells_do_and_cells_have_their_shape_and_scale():
    train, test = halves(make_store(lines=("k562", "rpe1")), ["P1", "P11"])
    summary = TrainResponses.of(train)
    for one, other in zip(every_baseline(test), every_baseline(test), strict=True):
        made = [predict_cells(method.fit(cells), test, seed=0) for method, cells in ((one, train), (other, summary))]
        np.testing.assert_array_equal(made[0].X, made[1].X)
        assert made[0].shape == (12, 20) and made[0].X.dtype == np.float32 and made[0].X.min() >= 0
        assert np.isfinite(made[0].X).all() and made[0].X.std(0).min() > 0, "constant cells"


def test_the_oracle_is_the_mean_of_the_evaluated_pseudobulks():
    store = make_store(lines=("k562", "rpe1"))
    train, test = halves(store, ["P1", "P2", "P3"])
    made = predict_cells(OracleMean(test).fit(train), test, seed=0)
    profiles = [test.mean(test.cells(c)) for c in test.conditions()]
    for name in ("P1", "P2", "P3"):
        cells = made.X[(made.obs["perturbation"] == name).to_numpy()]
        np.testing.assert_allclose(cells.mean(0), np.mean(profiles, axis=0), atol=1e-5)


def test_seen_elsewhere_averages_other_contexts_of_the_same_modality():
    store = make_store(lines=("k562", "rpe1", "hepg2"))
    activated = store.obs["cell_type"].eq("hepg2") & store.obs["perturbation"].ne("ctrl")
    store.obs.loc[activated, "modality"] = "CRISPRa"
    train, test = halves(store, ["P1"])
    conditions, values = train_responses(train)
    fitted, place = SeenElsewhere().fit(train), conditions.index(condition("P1", "rpe1"))
    np.testing.assert_allclose(fitted.response(test.conditions()[0]), values[place])
    assert not fitted.knows(condition("P1", modality="CRISPRko"))
    mean = MeanResponse().fit(train)
    unknown = condition("NEW", "rpe1")
    np.testing.assert_array_equal(fitted.response(unknown), mean.response(unknown))


def test_additive_sums_members_and_counts_what_it_assumed():
    store = make_store([*SINGLES, "P0+P1", "P1+P2", "P10+NEW"], lines=("k562", "rpe1"))
    train, test = halves(store, ["P0+P1", "P10+NEW", "P0"])
    conditions, values = train_responses(train)
    of = dict(zip(conditions, values, strict=True))
    fitted = Additive().fit(train)
    singles_here = [value for c, value in of.items() if c.cell_type == "k562" and "+" not in c.perturbation]
    expected = of[condition("P0", "rpe1")] + of[condition("P1")]
    np.testing.assert_allclose(fitted.response(condition("P0+P1")), expected)
    np.testing.assert_allclose(fitted.response(condition("P1+P0")), expected)
    assert not fitted.assumed
    expected = of[condition("P10")] + np.mean(singles_here, axis=0)
    np.testing.assert_allclose(fitted.response(condition("NEW+P10")), expected)
    assert fitted.assumed == {condition("NEW+P10"): ["NEW"]}
    notes = fit_baselines(train, test)[1]
    assert any("1 of 4 genes that were never trained alone (NEW)" in note for note in notes)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from("ABCDEFGH"), min_size=1, max_size=3), min_size=2, max_size=15), st.integers(0, 9)
)
def test_no_gene_is_on_both_sides_of_a_fold(members, seed):
    asked = [condition("+".join(sorted(parts)), line) for parts in members for line in ("k562", "rpe1")]
    try:
        folds = list(gene_folds(asked, 5, seed))
    except InputError:
        assert all(a & b for a, b in itertools.combinations(members, 2))
        return
    for kept, left in folds:
        sides = [{gene for i in rows for gene in asked[i].perturbation.split("+")} for rows in (kept, left)]
        held = {gene for gene in sides[1] if gene not in sides[0]}
        assert sorted([*kept, *left]) == list(range(len(asked)))
        assert all(held & set(asked[i].perturbation.split("+")) for i in left)


def test_the_seed_deals_genes_to_folds():
    asked = [condition(name) for name in SINGLES]
    dealt = [[tuple(left) for _, left in gene_folds(asked, 4, seed)] for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert sorted(sum(dealt[0], ())) == list(range(12)) and {len(left) for left in dealt[0]} == {3}


@pytest.mark.parametrize("dim", [3, 40])
def test_ridge_and_its_chosen_penalty_equal_scikit_learn(dim):
    names, vectors = [*SINGLES, "P0+P1"], vectors_of(dim=dim)
    conditions, values = train_responses(make_store(names))
    ridge = RidgeOnEmbeddings(SINGLES, vectors, seed=3).fit(make_store(names))
    scaled = (vectors - vectors.mean(0)) / vectors.std(0)
    table = dict(zip(SINGLES, scaled, strict=True))
    x = np.stack([sum(table[gene] for gene in c.perturbation.split("+")) for c in conditions])

    def fitted(rows, alpha):
        unit = np.mean(((x[rows] - x[rows].mean(0)) ** 2).sum(1))
        return Ridge(alpha=alpha * unit).fit(x[rows], values[rows])

    folds = list(gene_folds(conditions, 5, 3))
    errors = [
        sum(((fitted(kept, alpha).predict(x[left]) - values[left]) ** 2).sum() for kept, left in folds)
        / sum(values[left].size for _, left in folds)
        for alpha in ridge.alphas
    ]
    np.testing.assert_allclose(ridge.errors, errors, rtol=1e-6)
    assert ridge.alpha == ridge.alphas[np.argmin(errors)]
    expected = fitted(np.arange(len(x)), ridge.alpha).predict((table["P3"] + table["P5"])[None])[0]
    np.testing.assert_allclose(ridge.response(condition("P5+P3")), expected, atol=1e-8)


def test_neighbours_and_their_chosen_number_equal_scikit_learn():
    vectors = vectors_of()
    conditions, values = train_responses(make_store())
    knn = KNearest(SINGLES, vectors, seed=2).fit(make_store())
    order = [SINGLES.index(c.perturbation) for c in conditions]
    x = (vectors - vectors.mean(0))[order]

    def cosine_weights(distances):
        return np.maximum(1 - distances, 0) + 1e-300

    def predicted(kept, left, k, weighting):
        weights = "uniform" if weighting == "uniform" else cosine_weights
        model = KNeighborsRegressor(min(k, len(kept)), metric="cosine", algorithm="brute", weights=weights)
        return model.fit(x[kept], values[kept]).predict(x[left])

    folds = list(gene_folds(conditions, 5, 2))
    for k, weighting in ((1, "uniform"), (3, "uniform"), (5, "uniform"), (3, "cosine"), (5, "cosine")):
        squares = sum(((predicted(a, b, k, weighting) - values[b]) ** 2).sum() for a, b in folds)
        n_values = sum(values[b].size for _, b in folds)
        np.testing.assert_allclose(knn.errors.loc[k, weighting], squares / n_values, rtol=1e-6)
    assert knn.errors.loc[knn.k, knn.weighting] == knn.errors.to_numpy().min()
    squares = sum(((values[a].mean(0) - values[b]) ** 2).sum() for a, b in folds)
    np.testing.assert_allclose(knn.errors.loc[0, "uniform"], squares / sum(values[b].size for _, b in folds))


def test_neighbours_have_the_same_modality():
    train = make_store(lines=("k562", "rpe1"))
    activated = train.obs["cell_type"].eq("rpe1") & train.obs["perturbation"].ne("ctrl")
    train.obs.loc[activated, "modality"] = "CRISPRa"
    knn = KNearest(SINGLES, vectors_of()).fit(train)
    knn.k, knn.weighting = 1, "uniform"
    conditions, values = train_responses(train)
    of = dict(zip(conditions, values, strict=True))
    np.testing.assert_allclose(knn.response(condition("P3")), of[condition("P3")])
    means = MeanResponse().fit(train)
    unseen = condition("P3", modality="CRISPRko")
    np.testing.assert_allclose(knn.response(unseen), means.response(unseen))


@pytest.mark.parametrize("n_external", [None, 3, 30])
def test_bilinear_equals_its_formula(n_external):
    store = make_store()
    conditions, values = train_responses(store)
    external = None if n_external is None else vectors_of(dim=n_external)
    fitted = Bilinear(None if external is None else SINGLES, external, n_components=4, penalty=0.3).fit(store)
    profile = store.mean(store.controls(conditions[0]))
    G = PCA(4).fit_transform(np.stack([profile, *(values + profile)], axis=1))
    table = dict(zip(store.gene_names, G, strict=True) if external is None else zip(SINGLES, external, strict=True))
    known = [i for i, c in enumerate(conditions) if c.perturbation in table]
    P, b = np.stack([table[conditions[i].perturbation] for i in known]), values.mean(0)
    Y = (values[known] - b).T
    W = np.linalg.inv(G.T @ G + 0.3 * np.eye(4)) @ G.T @ Y @ P @ np.linalg.inv(P.T @ P + 0.3 * np.eye(P.shape[1]))
    np.testing.assert_allclose(fitted.response(condition("P2")), G @ W @ table["P2"] + b, atol=1e-6)
    np.testing.assert_allclose(fitted.response(condition("P2+P4")), G @ W @ (table["P2"] + table["P4"]) + b, atol=1e-6)
    if external is None:
        np.testing.assert_allclose(fitted.response(condition("P11")), b)
        assert fitted.without_row == {"P10", "P11"}


def test_nearest_trained_equals_loops():
    vectors = vectors_of([*SINGLES, "aspirin"])
    names = [*SINGLES, "aspirin"]
    asked = [condition(name) for name in ("P0", "P1", "P1+P2", "P3", "ibuprofen")]
    trained = [condition(name, "rpe1") for name in ("P3", "P4", "P5+P6", "unknown")]
    found = nearest_trained(asked, trained, names, vectors)
    table = dict(zip(names, vectors - vectors[3:7].mean(0), strict=True))
    known = [table["P3"], table["P4"], table["P5"] + table["P6"]]
    for label, mine in (("P0", table["P0"]), ("P1+P2", table["P1"] + table["P2"]), ("P3", table["P3"])):
        expected = max(mine @ v / np.linalg.norm(mine) / np.linalg.norm(v) for v in known)
        assert np.isclose(found[condition(label)], expected)
    assert np.isclose(found[condition("P3")], 1) and np.isnan(found[condition("ibuprofen")])
    assert np.isnan(list(nearest_trained(asked, [], names, vectors).values())).all()


def test_refusals():
    store = make_store()
    perturbed = store.subset(np.flatnonzero(store.obs["perturbation"] != "ctrl"))
    with pytest.raises(InputError, match="no control cell in toy.k562"):
        train_responses(perturbed)
    with pytest.raises(InputError, match="hold no perturbation"):
        train_responses(store.subset(np.flatnonzero(store.obs["perturbation"] == "ctrl")))
    for make in (RidgeOnEmbeddings, KNearest):
        with pytest.raises(InputError, match="at least two training perturbations"):
            make(["P1"], np.ones((1, 2))).fit(make_store(["P1"]))
        with pytest.raises(InputError, match=r"'P11' has no embedding.*fingerprint"):
            make(SINGLES[:-1], vectors_of(SINGLES[:-1])).fit(store)
        with pytest.raises(InputError, match="each name once"):
            make(["P1", "P1"], np.ones((2, 2)))
        with pytest.raises(InputError, match="'P2' holds a value that is not finite"):
            make(["P1", "P2"], np.array([[1.0], [np.nan]]))
    with pytest.raises(InputError, match="the bilinear model needs two"):
        Bilinear().fit(make_store(["A", "B", "C"]))
    with pytest.raises(InputError, match="no responses to add up"):
        Additive().fit(make_store(["A+B", "C+D"]))
    with pytest.raises(InputError, match="No control cell in toy.k562"):
        predict_cells(NoChange(), perturbed, seed=0)


def test_what_does_not_apply_is_left_out_with_a_sentence():
    train, test = halves(make_store(["A", "B", "C", "D"]), ["A"])
    found, notes = fit_baselines(train, test, names=["A", "B", "C"], vectors=vectors_of("ABC"))
    assert [baseline.name for baseline in found] == ["no_change", "mean_response", "oracle_mean", "bilinear"]
    left_out = [note.split(" was left out")[0] for note in notes if " was left out" in note]
    assert sorted(left_out) == ["additive", "knn", "ridge", "seen_elsewhere"]
    assert any("bilinear reads the embeddings" in note for note in notes)
    found, notes = fit_baselines(train, test)
    assert any(note.startswith("bilinear was left out") for note in notes)
    found, notes = fit_baselines(train, test, names=list("BCD"), vectors=vectors_of("BCD"))
    assert len([note for note in notes if "'A' has no embedding" in note]) == 2
    assert not {"ridge", "knn"} & {baseline.name for baseline in found}


def test_compounds_take_fingerprints():
    drugs = ["nutlin", "trametinib", "NAD+", "DMSO-2"]
    train, test = halves(make_store(drugs, modality="compound@0.5"), ["NAD+"])
    bits = np.random.default_rng(0).integers(0, 2, (4, 64)).astype(np.uint8)
    found, _ = fit_baselines(train, test, names=drugs, vectors=bits)
    assert {"ridge", "knn"} <= {baseline.name for baseline in found}


def test_every_method_starts_from_the_same_controls_and_the_seed_matters():
    store = make_store()
    asked = store.conditions()[0]
    first = draw_controls(store, asked, 40, seed=0)
    assert np.array_equal(first, draw_controls(store, asked, 40, seed=0))
    assert not np.array_equal(first, draw_controls(store, asked, 40, seed=1))
    assert set(store.obs["perturbation"].iloc[first]) == {"ctrl"}
    made = [predict_cells(method.fit(store), store, seed=5).obs["control_cell"] for method in every_baseline(store)]
    assert all(list(one) == list(made[0]) for one in made)


def test_z_scores_are_shifted_and_never_clipped():
    train, test = halves(make_store(scale="other", sparse=False), ["P1", "P11"])
    for baseline in every_baseline(test)[1:]:
        predicted = predict_cells(baseline.fit(train), test, seed=0)
        assert predicted.X.min() < 0 and set(baseline.clipped.values()) == {0.0}
        rows = (predicted.obs["perturbation"] == "P1").to_numpy()
        wanted = (
            train.mean(train.controls(condition("P1")))
            if baseline.name != "oracle_mean"
            else test.mean(test.controls(condition("P1")))
        )
        np.testing.assert_allclose(predicted.X[rows].mean(0), wanted + baseline.response(condition("P1")), atol=1e-5)


def test_a_new_cell_type_gets_its_own_training_controls_and_the_overall_mean():
    store = make_store(lines=("k562", "rpe1"))
    train, test = halves(store, SINGLES)
    conditions, values = train_responses(train)
    assert {c.cell_type for c in conditions} == {"rpe1"}
    mean = MeanResponse().fit(train)
    np.testing.assert_allclose(mean.response(condition("P0")), values.mean(0))
    few = test.rows(test.controls(condition("P0")))[:3]
    wanted = train.mean(train.controls(condition("P0"))) + values.mean(0)
    made = mean.predict(condition("P0"), few, np.random.default_rng(0))
    np.testing.assert_allclose(made.mean(0), np.maximum(wanted, 0), atol=1e-5)


def test_norman_and_mcfaline_doubles():
    path = Path(__file__).parents[2] / "shared" / "data" / "perturb_seq" / "norman19_mcfaline23.h5ad"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    data = DataKwargs(pert_col="condition", control_pert="control", batch_col=None, modality_col="perturbation_type")
    store = store_from_anndata(anndata.read_h5ad(path), data)
    doubles = sorted({c.perturbation for c in store.conditions() if "+" in c.perturbation})
    train, test = halves(store, [*doubles[:6], "KLF1"])
    names = store.genes()
    found, notes = fit_baselines(train, test, names=names, vectors=vectors_of(names, 16))
    assert {"additive", "ridge", "knn", "oracle_mean"} <= {baseline.name for baseline in found}
    assert any(note.startswith("additive takes the mean single response for") for note in notes)
    errors = {}
    for baseline in found[1:]:
        shifts = [
            baseline.response(c) - test.mean(test.cells(c)) + test.mean(test.controls(c)) for c in test.conditions()
        ]
        errors[baseline.name] = np.mean(np.square(shifts))
    assert errors["oracle_mean"] < errors["mean_response"], errors
