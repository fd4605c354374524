"""Evaluation of real data of another scale, end to end."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest

from esm_perturb.cells.store import store_from_anndata
from esm_perturb.core.config import DataKwargs
from esm_perturb.evaluation.baselines import MeanResponse, predict_cells
from esm_perturb.evaluation.metrics import evaluate


def halves(store, held_out):
    """Train and test stores; controls are dealt alternately."""
    test = store.obs["perturbation"].isin(held_out).to_numpy()
    even = ((store.obs["perturbation"] == store.control) & (np.arange(len(store.obs)) % 2 == 0)).to_numpy()
    return store.subset(np.flatnonzero(~test & ~even)), store.subset(np.flatnonzero(test | even))


def real_file(name):
    path = Path(os.environ.get("REALDATA") or "REALDATA is not set") / "perturb_seq" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


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
