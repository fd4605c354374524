"""Figures: what they say must be so, hostile labels stay text, and eighty drill-downs stay small and quick."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from urllib.parse import unquote

import anndata
import numpy as np
import pandas as pd
import pytest

from esm_perturb.cells.store import CellStore
from esm_perturb.evaluation import check_figures, figures
from esm_perturb.evaluation.cell_figures import (
    energy_figure,
    energy_matrix,
    neighbour_share,
    pca_figure,
    project,
    rank_figure,
    rank_matrix,
)
from esm_perturb.evaluation.metrics import Evaluation
from esm_perturb.evaluation.response_figures import (
    cells_figure,
    drill_down,
    response_figure,
    responses,
    significant,
    volcano_figure,
)
from esm_perturb.evaluation.score_figures import paired_figure, scores_figure, strata_figure, trend_figure

METHODS = [
    *("esm", "shuffled", "onehot", "random", "fingerprint", "esm_shuffled_at_inference", "mean_response"),
    *("seen_elsewhere", "additive", "bilinear", "ridge", "knn", "oracle_mean", "no_change"),
]
HOSTILE = ["<script>alert(1)</script>", "$x^2$", "a\"b'c&d", "long" * 30, "naïve–µ", "%41#"]


def study(n_conditions=8, n_genes=60, n_cells=12, names=None, contexts=("K562",), tests=True, seed=0):
    """An evaluation of two methods: ``esm`` is right up to noise, ``mean_response`` answers the same to everything."""
    rng = np.random.default_rng(seed)
    names = names or [f"GENE{number}" for number in range(n_genes)]
    perturbations = sorted(f"P{number:03d}" for number in range(n_conditions))
    base, effect = rng.uniform(0.5, 2, n_genes), rng.normal(0, 0.5, (n_conditions, n_genes))
    blocks, labels = [], []
    for context in contexts:
        blocks.append(base + rng.normal(0, 0.2, (3 * n_cells, n_genes)))
        labels += [("d", context, "non-targeting")] * (3 * n_cells)
        for number, perturbation in enumerate(perturbations):
            blocks.append(base + effect[number] + rng.normal(0, 0.2, (n_cells, n_genes)))
            labels += [("d", context, perturbation)] * n_cells
    obs = pd.DataFrame(labels, columns=["dataset", "cell_type", "perturbation"]).assign(batch="b", modality="crispri")
    obs.index = [f"cell{number}" for number in range(len(obs))]
    X = np.vstack(blocks).clip(0).astype(np.float32)
    store = CellStore(X, list(names), obs.astype("category"), "non-targeting", "log1p", "log1p")
    conditions = store.conditions()
    control = np.stack([store.mean(store.controls(condition)) for condition in conditions])
    real = np.stack([store.mean(store.cells(condition)) for condition in conditions])
    shared = np.broadcast_to((real - control).mean(axis=0), real.shape)
    predicted_means, predictions, rows, differential = {}, {}, [], {}
    for method, response in {"esm": real - control, "mean_response": shared}.items():
        target = np.repeat(control + response, n_cells, axis=0)
        cells = (target + rng.normal(0, 0.2, target.shape)).astype(np.float32)
        keys = pd.DataFrame([c._asdict() for c in conditions for _ in range(n_cells)]).astype("category")
        keys.index = [f"{method}-{number}" for number in range(len(keys))]
        predictions[method] = anndata.AnnData(cells, obs=keys, var=pd.DataFrame(index=list(names)))
        predicted_means[method] = cells.reshape(len(conditions), n_cells, n_genes).mean(axis=1, dtype=float)
        for index, condition in enumerate(conditions):
            score = np.corrcoef(predicted_means[method][index] - control[index], (real - control)[index])[0, 1]
            rows.append({"method": method, **condition._asdict(), "pearson_delta": score, "variance_ratio": 0.9})
    if tests:
        for method, means in {"real": real, **predicted_means}.items():
            change = means - control
            keys = pd.DataFrame([c._asdict() for c in conditions for _ in range(n_genes)])
            small = np.exp(-20 * np.abs(change.ravel()))
            table = {"log2_fold_change": change.ravel(), "p_value": small, "fdr": small}
            differential[method] = keys.assign(gene=list(names) * len(conditions), **table).sample(
                frac=1, random_state=0
            )
    facts = {"n_cells": n_cells, "n_controls": 3 * n_cells, "replicate": 0.9, "nearest_train": np.nan}
    effect_size = np.sqrt(((real - control) ** 2).mean(axis=1))
    per_condition = pd.DataFrame(rows)
    means = per_condition.groupby("method", sort=False)[["pearson_delta", "variance_ratio"]].mean()
    summary = means.stack().rename_axis(["method", "metric"]).rename("mean").reset_index()
    return Evaluation(
        per_condition=per_condition,
        summary=summary.assign(low=summary["mean"] - 0.1, high=summary["mean"] + 0.1, n=n_conditions),
        conditions=pd.DataFrame([c._asdict() for c in conditions]).assign(effect_size=effect_size, **facts),
        control_means=control,
        real_means=real,
        predicted_means=predicted_means,
        real=store,
        predictions=predictions,
        differential=differential,
    )


def lightness(color):
    """CIE L* of a hexadecimal colour, and its relative luminance."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * np.cbrt(luminance) - 16, luminance


def test_every_method_has_a_colour_and_a_marker_of_its_own():
    styles = [figures.method_style(method) for method in METHODS]
    for field in ("label", "light", "dark", "marker"):
        assert len({getattr(style, field) for style in styles}) == len(METHODS), field
    for style in styles:  # readable on paper and on a dark screen: contrast of at least 3
        for color, paper in ((style.light, figures.PAPER[0]), (style.dark, figures.PAPER[1])):
            low, high = sorted([lightness(color)[1], lightness(paper)[1]])
            assert (high + 0.05) / (low + 0.05) >= 3, style


@pytest.mark.parametrize("side", ["light", "dark"])
def test_methods_that_share_a_figure_differ_in_grey(side):
    for together in (("esm", "ridge", "mean_response"), ("esm", "shuffled", "onehot")):
        grey = [lightness(getattr(figures.method_style(method), side))[0] for method in together]
        assert min(abs(a - b) for a, b in itertools.combinations(grey, 2)) > 5, dict(zip(together, grey, strict=True))


def test_hostile_gene_names_are_text_and_the_svg_is_well_formed():
    evaluation = study(n_genes=len(HOSTILE) + 1, names=[*HOSTILE, "TP53"])
    for figure in drill_down(evaluation, 0, ["esm", "mean_response"]):
        uri = figures.to_data_uri(figure.drawing)
        assert not re.search(r"[<>\"#&]", uri)
        text = unquote(uri.removeprefix("data:image/svg+xml,"))
        root = ElementTree.fromstring(text)
        assert "script" not in {element.tag.split("}")[-1] for element in root.iter()}
        assert "prefers-color-scheme:dark" in text and figures.INK[0] not in text.split("</style>")[1]
    shown = "".join(top.drawing for top in drill_down(evaluation, 0, ["esm"]))
    assert "&lt;script" in shown and "<script" not in shown and "long" * 30 not in shown


def test_captions_state_what_is_recomputed():
    evaluation = study()
    direction, (real, predicted) = significant(evaluation, 2), responses(evaluation, 2, "esm")
    assert np.array_equal(direction, np.sign(real) * (np.exp(-20 * np.abs(real)) < 0.05))  # rows were shuffled
    caption = response_figure(evaluation, 2, "esm").caption
    right = int((np.sign(predicted) == direction)[direction != 0].sum())
    assert f"{right} of {int(np.abs(direction).sum())} significant" in caption
    drawing = response_figure(evaluation, 2, "esm").drawing
    triangles = sum(len(re.findall("M", path)) for path in re.findall(r'opacity="\.85" d="([^"]*)"', drawing))
    assert triangles <= int(np.abs(direction).sum())
    volcano = volcano_figure(evaluation, 2, "mean_response").caption
    assert f"{int(np.abs(significant(evaluation, 2, 'mean_response')).sum())} in predicted" in volcano


def test_without_tests_there_is_no_volcano_and_no_triangle():
    evaluation = study(tests=False)
    assert [figure.name for figure in drill_down(evaluation, 0, ["esm"])] == ["response_esm", "top_genes", "cells_esm"]
    assert "significant" not in response_figure(evaluation, 0, "esm").caption


def test_infinite_fold_changes_and_zero_p_values_are_drawn():
    evaluation = study()
    table = evaluation.differential["esm"]
    table.loc[table.index[:40], "log2_fold_change"] = np.inf
    table.loc[table.index[40:80], "p_value"] = 0.0
    table.loc[table.index[80:90], ["p_value", "fdr", "log2_fold_change"]] = np.nan
    for index in range(len(evaluation.conditions)):
        ElementTree.fromstring(figures.to_svg(volcano_figure(evaluation, index, "esm").drawing))


def test_one_cell_one_gene_one_condition():
    evaluation = study(n_conditions=1, n_genes=2, n_cells=2)
    assert len(drill_down(evaluation, 0, ["esm"])) == 4
    assert rank_figure(evaluation, "esm") is None and trend_figure(evaluation, "effect_size", ["esm"]) is None
    projection = project(evaluation, ["esm"])
    for figure in (pca_figure(evaluation, projection), energy_figure(evaluation, projection, "esm")):
        assert figures.to_svg(figure.drawing).startswith("<svg")


def test_energy_matrix_equals_double_loops():
    evaluation = study(n_conditions=4, contexts=("K562", "RPE1"))
    projection = project(evaluation, ["esm"], cells_per_condition=7)
    points, groups = projection.points, projection.groups
    found = energy_matrix(projection, "esm", 8)

    def mean_distance(x, y, skip):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (skip and i == j)]
        return np.mean([np.linalg.norm(x[i].astype(float) - y[j]) for i, j in pairs])

    for row, column in ((0, 0), (1, 5), (7, 2)):
        x, y = points["esm"][groups["esm"] == row], points["real"][groups["real"] == column]
        expected = 2 * mean_distance(x, y, False) - mean_distance(x, x, True) - mean_distance(y, y, True)
        assert np.isclose(found[row, column], expected, atol=1e-3)


def test_ranks_know_the_context_and_ignore_scale_and_spiked_targets():
    evaluation = study(n_conditions=5, contexts=("K562", "RPE1"))
    ranks = rank_matrix(evaluation, "esm")
    assert (np.diag(ranks) == 0).all() and np.isfinite(ranks).sum() == 2 * 25
    evaluation.predicted_means["esm"] = evaluation.control_means + 9 * (
        evaluation.predicted_means["esm"] - evaluation.control_means
    )
    assert np.allclose(rank_matrix(evaluation, "esm"), ranks, equal_nan=True)
    names = ["P000", "P001", "P002", "P003", "P004", *(f"GENE{n}" for n in range(55))]
    spiked = study(n_conditions=5, names=names)
    before = rank_matrix(spiked, "mean_response")
    spiked.predicted_means["mean_response"][np.arange(5), np.arange(5)] -= 100
    assert np.allclose(rank_matrix(spiked, "mean_response"), before)


def test_predictions_do_not_move_the_axes_and_true_cells_find_their_own():
    evaluation = study()
    projection = project(evaluation, ["esm", "mean_response"])
    assert np.allclose(projection.components, project(evaluation, []).components)
    assert neighbour_share(projection, "esm") > 0.5 > 0.3 > neighbour_share(projection, "mean_response")


def test_mode_collapse_shows():
    evaluation = study()
    assert check_figures.condition_variance(evaluation, "esm") > 0.9
    assert check_figures.condition_variance(evaluation, "mean_response") < 0.1
    assert "Mean response 0.90 and 0.0" in check_figures.collapse_figure(evaluation, ["mean_response"]).caption


def test_every_figure_has_a_caption_an_alternative_and_closes_its_drawing():
    import matplotlib.pyplot as plt

    evaluation = study()
    evaluation.conditions["nearest_train"] = np.linspace(0, 1, len(evaluation.conditions))
    strata = pd.DataFrame({"method": ["esm"], "stratum": ["low"], "n": [3], "mean": [0.1], "low": [0.0], "high": [0.2]})
    gaming = pd.DataFrame({"scale": [0.3, 1.0, 3.0], "metric": "mse", "mean": [1.0, 2.0, 9.0]})
    costs = pd.DataFrame({"method": ["esm"], "cells_per_second": [10.0], "peak_memory_gb": [np.nan]})
    plt.close("all")
    drawn = [
        scores_figure(evaluation, "pearson_delta", "Caption."),
        trend_figure(evaluation, "nearest_train", ["esm"]),
        strata_figure(strata, "esm", "effect_size"),
        paired_figure(evaluation, "esm", "mean_response"),
        rank_figure(evaluation, "esm"),
        check_figures.gaming_figure(gaming, "esm"),
        check_figures.cost_figure(costs),
    ]
    for figure in drawn:
        assert figure.caption.endswith(".") and len(figure.alt) > 30
        assert "nan" not in figure.caption.lower() and figures.to_svg(figure.drawing).startswith("<svg")
    assert not plt.get_fignums()
    assert "rewarded by MSE" in drawn[5].caption


def test_eighty_drill_downs_are_small():
    evaluation = study(n_conditions=4, n_genes=2000, n_cells=60)
    size = sum(
        len(figures.to_data_uri(figure.drawing)) for figure in drill_down(evaluation, 1, ["esm", "mean_response"])
    )
    assert 80 * size < 6e6


def test_same_inputs_same_drawing():
    one, two = (cells_figure(study(), 1, "esm").drawing for _ in range(2))
    assert one == two
    first, second = (figures.to_svg(scores_figure(study(), "pearson_delta", "").drawing) for _ in range(2))
    assert first == second
