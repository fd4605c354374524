"""Prediction on AnnData: one answer whatever the order and the storage, and a sentence for what cannot be predicted."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_perturb.cells.store import Condition, draw_controls, store_from_anndata
from esm_perturb.core.config import DataKwargs, InputError, ModelKwargs
from esm_perturb.evaluation import baselines
from esm_perturb.models.encoders import build_encoder
from esm_perturb.models.new_genes import add_proteins, add_table
from esm_perturb.models.predict import predict, read_controls
from esm_perturb.models.state_transition import StateTransition, predict_cells
from esm_perturb.proteins.embed import embed_sequences
from esm_perturb.proteins.embeddings import GeneEmbeddings
from esm_perturb.proteins.esm2 import ESM2
from esm_perturb.proteins.sequences import read_fasta

GENES = [f"GENE{i}" for i in range(20)]
KNOWN = ["KLF1", "STAT1", "TP53"]
SMILES = {"aspirin": "CC(=O)OC1=CC=CC=C1C(=O)O", "ethanol": "CCO"}
MINI = Path(__file__).parents[1] / "data" / "mini_esm2"


def make_model(
    *, kinds=("esm",), columns=GENES, vectors=None, modalities=("KO",), extra=None, scale="log1p", **options
):
    """Random weights; sets of at most 8 cells."""
    torch.manual_seed(0)
    names = ("batch_names", "target_names", "output_space")
    spaces = {name: options.pop(name) for name in names if name in options}
    sizes = ModelKwargs(hidden_dim=16, n_layers=2, n_heads=2, cell_set_len=8, dropout=0.2, **options)
    encoder = build_encoder(
        kinds,
        genes=KNOWN,
        vectors=np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32) if vectors is None else vectors,
        train_genes=[*KNOWN, *SMILES],
        modalities=list(modalities),
        control="non-targeting",
        model=sizes,
        seed=0,
        smiles=SMILES if "fingerprint" in kinds else None,
    )
    model = StateTransition(sizes, columns, encoder, nonnegative=scale == "log1p", **spaces)
    model.extra = {"scale": scale, "target_sum": 1e4 if scale == "log1p" else None} | (extra or {})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else None
    return model.eval()


def make_adata(seed=0, *, n=60, genes=GENES):
    """Counts; 3 cell types, of which the last has no control; two lanes."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "gene": np.where(rng.random(n) < 0.7, "non-targeting", "STAT1"),
            "cell_type": rng.choice(["k562", "rpe1"], n),
            "gem_group": rng.choice(["lane1", "lane2"], n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    obs.loc["cell0", ["gene", "cell_type"]] = ["TP53", "hepg2"]
    X = scipy.sparse.csr_matrix(rng.poisson(1.0, (n, len(genes))).astype(np.float32))
    return anndata.AnnData(X, obs, pd.DataFrame(index=genes))


def asked(model, adata, perturbations, **options):
    """Without a bar."""
    return predict(model, adata, perturbations, progress=False, **options)


def facts(predicted) -> dict:
    return json.loads(predicted.uns["esm_perturb"])


# ---- what comes out


VARIANTS = {
    "plain": {},
    "all": {"output_space": "all"},
    "no residual": {"predict_residual": False, "use_basal_projection": False},
    "tokens": {"confidence_token": True, "use_batch_token": True, "batch_names": ["data/lane1", "data/lane2"]},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("n_cells", [0, 1, 37])
def test_each_condition_is_what_the_model_says_of_its_controls_alone(n_cells, variant):
    """Against one condition at a time, in the order of the cells."""
    model, adata = make_model(**VARIANTS[variant]), make_adata()
    predicted = asked(model, adata, ["TP53", "STAT1+KLF1", "non-targeting"], n_cells=n_cells, seed=3)
    store = store_from_anndata(adata, DataKwargs())
    assert predicted.X.dtype == np.float32
    assert predicted.var_names.tolist() == GENES
    for cell_type in ("k562", "rpe1"):
        for name in ("TP53", "KLF1+STAT1", "non-targeting"):
            of_condition = predicted.obs.query("cell_type == @cell_type and perturbation == @name")
            condition = Condition("data", cell_type, name, "KO")
            size = n_cells or len(store.controls(condition))
            assert len(of_condition) == size
            rows = store.obs.index.get_indexer(of_condition["control_cell"])
            assert sorted(rows) == sorted(draw_controls(store, condition, size, 3)) or n_cells == 0
            expected = predict_cells(model, condition, store.rows(rows))
            np.testing.assert_allclose(predicted[of_condition.index].X, expected, atol=1e-5)
            assert (store.obs["cell_type"].iloc[rows] == cell_type).all()
            assert (store.obs["batch"].iloc[rows].to_numpy() == of_condition["batch"].to_numpy()).all()
    said = facts(predicted)
    assert (said["scale"], said["target_sum"], said["seed"], said["read_from"]) == ("log1p", 1e4, 3, "X")
    assert said["perturbations"] == ["TP53", "KLF1+STAT1", "non-targeting"]
    assert said["versions"]["torch"] == torch.__version__


@settings(max_examples=15)
@given(st.permutations(["TP53", "STAT1", "KLF1", "KLF1+TP53"]), st.integers(0, 4), st.sampled_from([0, 1, 3]))
def test_a_seed_gives_the_same_cells_whatever_else_is_asked_for(order, n_left_out, batch_size):
    model, adata = make_model(), make_adata()
    everything = asked(model, adata, sorted(order), seed=5)
    wanted = order[n_left_out:] or order[:1]
    found = asked(model, adata, wanted, seed=5, batch_size=batch_size)
    assert list(dict.fromkeys(found.obs["perturbation"])) == ["+".join(sorted(name.split("+"))) for name in wanted]
    for name in set(found.obs["perturbation"]):
        ours, all_ = (part[part.obs["perturbation"] == name] for part in (found, everything))
        assert ours.obs["control_cell"].tolist() == all_.obs["control_cell"].tolist()
        np.testing.assert_allclose(ours.X, all_.X, atol=1e-5)
    again = asked(model, adata, wanted, seed=5, batch_size=batch_size)
    np.testing.assert_array_equal(again.X, found.X)
    orders = everything.obs.groupby("perturbation", observed=True)["control_cell"].apply(tuple)
    assert orders.nunique() == len(orders), "each perturbation has its own draw"
    other = asked(model, adata, wanted, seed=6)
    assert other.obs["control_cell"].tolist() != found.obs["control_cell"].tolist()


def test_controls_are_drawn_without_replacement_until_exhausted():
    adata = make_adata()
    predicted = asked(make_model(), adata, "TP53", cell_types="rpe1", n_cells=100)
    uses = predicted.obs["control_cell"].value_counts()
    n_controls = ((adata.obs["gene"] == "non-targeting") & (adata.obs["cell_type"] == "rpe1")).sum()
    assert len(uses) == n_controls
    assert set(uses) <= {100 // n_controls, -(-100 // n_controls)}


def test_the_method_is_the_function():
    model, adata = make_model(modalities=("KO", "compound@1")), make_adata()
    options = {"cell_types": ["rpe1"], "n_cells": 9, "modality": "compound", "dose": 2.0, "seed": 4, "batch_size": 1}
    expected = asked(model, adata, "TP53", **options)
    found = model.predict(adata, "TP53", **options, data=DataKwargs(), progress=False)
    np.testing.assert_array_equal(found.X, expected.X)
    assert found.obs.equals(expected.obs)


@pytest.mark.parametrize("cells", ["cells.h5ad", Path("cells.h5ad"), pd.DataFrame()])
def test_cells_are_an_anndata(cells):
    with pytest.raises(InputError, match=f"not as {type(cells).__name__}; read a file with read_h5ad"):
        make_model().predict(cells, "TP53")


def test_the_model_is_left_as_it_was():
    """Mode, weights and the AnnData; dropout does not act."""
    model, adata = make_model(), make_adata()
    before, values = model.state_dict(), adata.X.toarray()
    expected = asked(model, adata, "TP53").X
    np.testing.assert_array_equal(asked(model.train(), adata, "TP53").X, expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(adata.X.toarray(), values)


def test_the_card_names_a_prediction_that_works(tmp_path):
    """Its arguments, as they stand there; nothing that is published tells the author's folders."""
    both, dosed = ("esm", "fingerprint"), ("compound@0.1", "compound@10")
    for i, (kinds, modalities) in enumerate([(("esm",), ("KO",)), (both, (*dosed, "KO")), (both, dosed)]):
        model = make_model(kinds=kinds, modalities=modalities, esm_embeddings_path="/home/me/table.pt")
        model.extra |= {"init_from": {"file": "runs/mine/best.ckpt"}, "embeddings": {"fasta": ["/home/me/x.fasta"]}}
        folder = model.save_pretrained(tmp_path / str(i))
        card, config = (folder / "README.md").read_text(), (folder / "config.json").read_text()
        for text in (card, config):
            assert "table.pt" in text and "x.fasta" in text
            assert not any(place in text for place in ("/home", "runs/mine"))
        arguments = card.split("model.predict(adata, ")[1].split(")  #")[0]
        names, options = eval(f"(lambda *names, **options: (names[0], options))({arguments})")
        assert asked(StateTransition.from_pretrained(folder), make_adata(), names, **options).n_obs
        assert ("modality" in options, "dose" in options) == (i == 1, i == 2)


def test_a_training_run_is_no_released_folder(tmp_path):
    make_model().save(tmp_path / "checkpoints" / "best.ckpt")
    for load in (StateTransition.load, StateTransition.from_pretrained):
        with pytest.raises(InputError, match="is a training run; load checkpoints/best.ckpt"):
            load(tmp_path)


# ---- genes and scales


def test_genes_are_matched_by_name():
    """Reordered, and with others in between, which are left out and counted."""
    model, adata = make_model(), make_adata()
    expected = asked(model, adata, "TP53")
    rng = np.random.default_rng(1)
    np.testing.assert_allclose(asked(model, adata[:, rng.permutation(20)].copy(), "TP53").X, expected.X, atol=1e-5)
    more = make_adata(genes=[*GENES, *"ABCDE"])
    more.X = scipy.sparse.hstack([adata.X, more.X[:, :5]]).tocsr()
    found = asked(model, more[:, rng.permutation(25)].copy(), "TP53")
    np.testing.assert_allclose(found.X, expected.X, atol=1e-5)
    assert facts(found)["columns_left_out"] == 5
    more.layers["counts"], more.X = more.X, None
    found = asked(make_model(extra={"data": {"embed_key": "layers/counts"}}), more, "TP53")
    np.testing.assert_allclose(found.X, expected.X, atol=1e-5)


def test_genes_chosen_in_training_are_normalised_over_all():
    """The model was trained on 20 of 25 genes, after counts had been normalised over all 25."""
    model, more = make_model(extra={"source_genes": 25}), make_adata(genes=[*"ABCDE", *GENES])
    store = store_from_anndata(more, DataKwargs())
    controls = read_controls(model, more)
    rows = store.obs.index.get_indexer(controls.store.obs.index)
    np.testing.assert_array_equal(controls.rows(np.arange(len(rows))), store.rows(rows)[:, 5:])


def test_counts_for_a_model_of_log1p_values_are_remarked(caplog):
    """Training saw log1p values only, so nobody knows to which sum per cell."""
    found = asked(make_model(extra={"target_sum": None}), make_adata(), "TP53")
    assert "counts are normalised to 10000" in caplog.text
    assert facts(found)["target_sum"] == 1e4
    np.testing.assert_array_equal(found.X, asked(make_model(), make_adata(), "TP53").X)


def test_missing_and_repeated_genes_are_refused():
    model, adata = make_model(), make_adata()
    with pytest.raises(
        InputError, match="2 of the model's 20 genes are not in the AnnData: GENE3, GENE7 .*as in training"
    ):
        asked(model, adata[:, [i for i in range(20) if i not in (3, 7)]].copy(), "TP53")
    with pytest.raises(InputError, match="20 of the model's 20 genes .* and 15 more"):
        asked(model, make_adata(genes=[f"ENSG{i}" for i in range(20)]), "TP53")
    with pytest.warns(UserWarning, match="unique"):
        twice = make_adata(genes=["GENE0", *GENES[:-1]])
    with pytest.raises(InputError, match="Gene 'GENE0' occurs twice"):
        asked(model, twice, "TP53")


def test_counts_and_log1p_give_the_same(tmp_path):
    """Dense, sparse, CSC, a layer asked for in training, and a file that is not read whole."""
    model, adata = make_model(), make_adata()
    expected = asked(model, adata, ["TP53", "KLF1"], seed=1)
    dense, logged = adata.copy(), adata.copy()
    dense.X = adata.X.toarray().astype(np.int64)
    logged.X = np.log1p(adata.X.toarray() / adata.X.toarray().sum(1, keepdims=True) * 1e4)
    logged.X = scipy.sparse.csc_matrix(logged.X)
    layered = adata.copy()
    layered.layers["counts"], layered.X = adata.X, None
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    of_layer = make_model(extra={"data": {"embed_key": "layers/counts"}})
    for other, its in ((dense, model), (logged, model), (layered, of_layer), (backed, model)):
        found = asked(its, other, ["TP53", "KLF1"], seed=1)
        np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-4)
    assert facts(asked(model, logged, "TP53"))["controls_found_as"] == "log1p"
    assert facts(expected)["controls_found_as"] == "counts"


def test_cells_on_another_scale_are_refused():
    adata = make_adata()
    scaled = adata.copy()
    scaled.X = adata.X.toarray() - 0.5
    with pytest.raises(InputError, match="on the scale 'other', but the model was trained on 'log1p'"):
        asked(make_model(), scaled, "TP53")
    with pytest.raises(InputError, match="on the scale 'counts', but the model was trained on 'other'"):
        asked(make_model(scale="other"), adata, "TP53")
    assert facts(asked(make_model(scale="other"), scaled, "TP53"))["scale"] == "other"


def test_an_embedding_is_read_and_genes_are_decoded():
    adata = make_adata()
    adata.obsm["X_uce"] = np.random.default_rng(4).normal(size=(60, 5)).astype(np.float32)
    columns = [f"X_uce_{i}" for i in range(5)]
    about = {"data": {"embed_key": "X_uce"}, "target_scale": "log1p"}
    options = {"columns": columns, "scale": "other", "extra": about}
    cells = make_model(**options, output_space="embedding")
    genes = make_model(**options, target_names=GENES[:12])
    found = asked(genes, adata, "TP53", seed=2)
    assert found.var_names.tolist() == GENES[:12]
    assert (facts(found)["scale"], facts(found)["read_from"]) == ("log1p", "X_uce")
    assert (found.X >= 0).all()
    rows = adata.obs.index.get_indexer(found.obs["control_cell"])
    parts = found.obs.groupby("cell_type", observed=True).indices
    for cell_type, places in parts.items():
        condition = Condition("data", cell_type, "TP53", "KO")
        expected = predict_cells(genes, condition, adata.obsm["X_uce"][rows[places]])
        np.testing.assert_allclose(found.X[places], expected, atol=1e-5)
    of_cells = asked(cells, adata, "TP53", seed=2)
    assert of_cells.var_names.tolist() == columns
    assert facts(of_cells)["scale"] == "other"
    del adata.obsm["X_uce"]
    with pytest.raises(InputError, match="has no obsm.'X_uce'"):
        asked(cells, adata, "TP53")
    adata.obsm["X_uce"] = np.zeros((60, 4), np.float32) - 1
    with pytest.raises(InputError, match="1 of the model's 5 dimensions are not in the AnnData: X_uce_4"):
        asked(cells, adata, "TP53")


# ---- perturbations


def test_an_unknown_perturbation_is_refused_with_its_remedy():
    adata = make_adata()
    with pytest.raises(
        InputError, match=r"no entry for STAT2, NEW1 \(did you mean 'STAT1'\?\); .*add_table.*add_proteins"
    ):
        asked(make_model(), adata, ["STAT2+TP53", "KLF1", "NEW1"])
    both = make_model(kinds=("esm", "fingerprint"))
    with pytest.raises(InputError, match="add_table.*SMILES"):
        asked(both, adata, "ibuprofen")
    with pytest.raises(InputError, match="it knows only those that it was trained with"):
        asked(make_model(kinds=("onehot",)), adata, "NEW1")
    with pytest.raises(InputError, match="nothing to predict"):
        asked(make_model(), adata, [])


def test_a_combination_may_be_spelt_in_any_order():
    model, adata = make_model(), make_adata()
    one, other = asked(model, adata, "TP53+KLF1"), asked(model, adata, " KLF1 + TP53")
    np.testing.assert_array_equal(one.X, other.X)
    assert one.obs["perturbation"].unique().tolist() == ["KLF1+TP53"]
    assert asked(model, adata, ["TP53+KLF1", "KLF1+TP53"]).n_obs == one.n_obs


def test_compounds_come_with_doses_and_new_ones_with_smiles():
    adata, modalities = make_adata(), ("KO", "compound@1", "compound@10")
    model = make_model(kinds=("esm", "fingerprint"), modalities=modalities)
    found = [asked(model, adata, "aspirin", modality="compound", dose=dose) for dose in (1, 10.0)]
    assert [part.obs["modality"].iloc[0] for part in found] == ["compound@1", "compound@10"]
    torch.nn.init.normal_(model.pert_encoder.dose.network[-1].weight)
    ten = asked(model, adata, "aspirin", modality="compound@10")
    assert ten.obs["control_cell"].tolist() == found[1].obs["control_cell"].tolist()
    assert np.abs(ten.X - asked(model, adata, "aspirin", modality="compound@1").X).max() > 1e-3
    with pytest.raises(InputError, match="several modalities, so name one: KO, compound"):
        asked(model, adata, "aspirin")
    with pytest.raises(InputError, match="has a dose already"):
        asked(model, adata, "aspirin", modality="compound@10", dose=1)
    with pytest.raises(InputError, match="not trained on modality 'compounds'"):
        asked(model, adata, "aspirin", modality="compounds")
    model.pert_encoder.add_compounds({"caffeine": "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"})
    assert asked(model, adata, "caffeine+TP53", modality="compound", dose=2.5).n_obs == ten.n_obs


def test_modality_and_dose_are_those_of_what_was_perturbed(caplog):
    adata = make_adata()
    model = make_model(kinds=("esm", "fingerprint"), modalities=("CRISPRi", "compound@0.1", "compound@10"))
    for name, modality, dose, message in (
        ("aspirin", "compound", None, "'compound' was trained with doses, from 0.1 to 10; name one"),
        ("STAT1", "CRISPRi", 5, "'CRISPRi' was trained without doses; leave out the dose 5"),
        ("STAT1", "compound", 1, "'STAT1' holds no compound, so it cannot be predicted under modality 'compound'"),
        ("aspirin", "CRISPRi", None, "'aspirin' holds a compound, so it cannot be predicted under modality 'CRISPRi'"),
        ("STAT1+aspirin", "CRISPRi", None, "'STAT1.aspirin' holds a compound"),
    ):
        with pytest.raises(InputError, match=message):
            asked(
                model, adata, ["TP53+ethanol" if modality == "compound" else "TP53", name], modality=modality, dose=dose
            )
    asked(model, adata, ["STAT1", "non-targeting"], modality="CRISPRi")
    asked(model, adata, ["STAT1+aspirin", "non-targeting"], modality="compound", dose=10)
    assert "outside" not in caplog.text
    asked(model, adata, "aspirin", modality="compound", dose=1e9)
    assert "Dose 1e+09 of modality 'compound' is outside those of training, 0.1 to 10." in caplog.text


def test_a_gene_from_a_fasta_is_predictable(tmp_path):
    """With the ESM2 of training in the recorded way; a table gives the same cells."""
    esm2 = ESM2.load(MINI, device="cpu")
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    rng = np.random.default_rng(0)
    proteins = {name: "M" + "".join(rng.choice(letters, 40 + i)) for i, name in enumerate([*KNOWN, "NEW1", "NEW2"])}
    (tmp_path / "new.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in proteins.items()))
    table = embed_sequences(esm2, proteins, layer=2, pooling="bos", progress=False)
    table.save(tmp_path / "table.pt")
    of_training = embed_sequences(esm2, {k: proteins[k] for k in KNOWN}, layer=2, pooling="bos", progress=False)
    models = [make_model(vectors=of_training.vectors, extra={"embeddings": of_training.record}) for _ in range(2)]
    adata = make_adata()
    with pytest.raises(InputError, match="no entry for NEW1"):
        asked(models[0], adata, "NEW1")
    assert add_proteins(models[0], read_fasta(tmp_path / "new.fasta"), esm2, progress=False) == ["NEW1", "NEW2"]
    assert add_table(models[1], tmp_path / "table.pt", ["NEW2", "TP53"]) == ["NEW2"]
    first, second = (asked(model, adata, "NEW2+TP53") for model in models)
    np.testing.assert_allclose(first.X, second.X, atol=1e-4)
    models[0].save(tmp_path / "model.ckpt", models[0].extra)
    again = asked(StateTransition.load(tmp_path / "model.ckpt"), adata, "NEW2+TP53")
    np.testing.assert_array_equal(again.X, first.X)
    with pytest.raises(InputError, match=r"with layer=\d, but the model was trained on 2"):
        embed_sequences(esm2, proteins, progress=False).save(tmp_path / "last.pt")
        add_table(models[1], tmp_path / "last.pt")
    other = ESM2.new(n_layers=2, hidden_dim=esm2.dim, n_heads=4)
    with pytest.raises(InputError, match="was trained on embeddings of .*mini_esm2.*, not of random"):
        add_proteins(models[1], proteins, other)
    other.name = esm2.name
    with pytest.raises(InputError, match="has other weights than the one of training"):
        add_proteins(models[1], proteins, other)


def test_a_permuted_table_is_noticed(tmp_path):
    """It has no record: the genes that the model knows give it away."""
    vectors = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    GeneEmbeddings([*KNOWN, "NEW"], np.vstack([vectors[::-1], vectors[:1]])).save(tmp_path / "permuted.npz")
    with pytest.raises(InputError, match="2 of the 3 genes that the model knows another vector .*names are permuted"):
        add_table(make_model(vectors=vectors), tmp_path / "permuted.npz")
    GeneEmbeddings([*KNOWN, "NEW"], np.vstack([vectors, vectors[:1]])).save(tmp_path / "sound.npz")
    model = make_model(vectors=vectors)
    assert add_table(model, tmp_path / "sound.npz") == ["NEW"]
    np.testing.assert_array_equal(
        model.pert_encoder(["NEW"], ["KO"]).detach(), model.pert_encoder(["KLF1"], ["KO"]).detach()
    )


# ---- cells


def test_a_cell_type_without_controls_is_refused():
    model, adata = make_model(), make_adata()
    with pytest.raises(
        InputError, match="'hepg2' has no control cell in the AnnData; those that have some: k562, rpe1"
    ):
        asked(model, adata, "TP53", cell_types=["k562", "hepg2"])
    with pytest.raises(InputError, match=r"'rpe2' has no control .*did you mean 'rpe1'"):
        asked(model, adata, "TP53", cell_types="rpe2")
    assert set(asked(model, adata, "TP53").obs["cell_type"]) == {"k562", "rpe1"}
    with pytest.raises(InputError, match="No cell of the AnnData carries the control label 'non-targeting'"):
        asked(model, adata[adata.obs["gene"] != "non-targeting"].copy(), "TP53")


def test_columns_may_be_named_otherwise():
    model, adata = make_model(), make_adata()
    expected = asked(model, adata, "TP53")
    names = {"gene": "target", "cell_type": "line", "gem_group": "lane"}
    adata.obs = adata.obs.rename(columns=names).replace({"non-targeting": "ctrl"})
    data = DataKwargs(pert_col="target", cell_type_key="line", batch_col="lane", control_pert="ctrl")
    np.testing.assert_array_equal(asked(model, adata, "TP53", data=data).X, expected.X)
    with pytest.raises(InputError, match="Column 'gene' .data.kwargs.pert_col. is not in obs"):
        asked(model, adata, "TP53")
    trained = make_model(extra={"data": {"pert_col": "target", "cell_type_key": "line", "batch_col": "absent"}})
    adata.obs = adata.obs.replace({"ctrl": "non-targeting"})
    found = asked(trained, adata, "TP53")
    np.testing.assert_array_equal(found.X, expected.X)
    assert set(found.obs["batch"]) == {"all"}


def test_batches_reach_the_model(caplog):
    """By data set and label, by label where that is clear, and the mean of all where training had no such batch."""
    adata = make_adata()
    names = ["screen/lane1", "screen/lane3"]
    model = make_model(batch_names=names, batch_encoder=True)
    found = asked(model, adata, "TP53", cell_types="k562")
    store = read_controls(model, adata, cell_types=["k562"]).store
    rows = store.obs.index.get_indexer(found.obs["control_cell"])
    batches = np.where(store.obs["batch"].iloc[rows] == "lane1", 0, -1)
    assert {0, -1} == set(batches)
    condition = Condition("data", "k562", "TP53", "KO")
    np.testing.assert_allclose(found.X, predict_cells(model, condition, store.rows(rows), batches=batches), atol=1e-5)
    assert np.abs(found.X - predict_cells(model, condition, store.rows(rows))).max() > 1e-3
    assert "are of no batch of training" in caplog.text


# ---- the evaluation's view


def test_a_model_is_evaluated_on_genes_that_it_decodes():
    """The model reads the embedding; baselines and the real cells are genes."""
    adata = make_adata()
    adata.obsm["X_uce"] = np.random.default_rng(4).normal(size=(60, 5)).astype(np.float32)
    adata = adata[adata.obs["cell_type"] != "hepg2"].copy()
    genes, inputs = store_from_anndata(adata, DataKwargs()), store_from_anndata(adata, DataKwargs(embed_key="X_uce"))
    columns, names = [f"X_uce_{i}" for i in range(5)], ["data/lane1", "data/lane2"]
    model = make_model(
        columns=columns,
        scale="other",
        target_names=GENES,
        batch_encoder=True,
        batch_names=names,
        modalities=("unspecified",),
    )
    found = baselines.predict_cells(baselines.ModelPredictor("esm", model), genes, seed=1, inputs=inputs)
    unchanged = baselines.predict_cells(baselines.NoChange(), genes, seed=1, inputs=inputs)
    assert found.var_names.tolist() == unchanged.var_names.tolist() == GENES
    assert found.obs["control_cell"].tolist() == unchanged.obs["control_cell"].tolist()
    rows = genes.obs.index.get_indexer(found.obs["control_cell"])
    np.testing.assert_array_equal(unchanged.X, genes.rows(rows))
    of_batch = np.where(genes.obs["batch"].iloc[rows] == "lane1", 0, 1)
    for condition in genes.conditions():
        here = (found.obs["cell_type"] == condition.cell_type).to_numpy()
        expected = predict_cells(model, condition, inputs.rows(rows[here]), batches=of_batch[here])
        np.testing.assert_allclose(found.X[here], expected, atol=1e-5)
    with pytest.raises(InputError, match="not the cells of the store"):
        baselines.predict_cells(baselines.NoChange(), genes, seed=1, inputs=inputs.subset([1, 0]))
