"""Splits, store and loader against brute force, hostile files, and real data."""

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_perturb.cells.data_module import PerturbationDataModule
from esm_perturb.cells.expression import dense_rows, detect_scale
from esm_perturb.cells.inspection import inspect_h5ad
from esm_perturb.cells.prepare import prepare
from esm_perturb.cells.split_file import modality_label, split_modality
from esm_perturb.cells.splits import (
    assign_splits,
    canonical_perturbation,
    parse_perturbation,
    read_split_toml,
    split_overlap,
)
from esm_perturb.cells.store import CellStore, read_cells, store_from_anndata
from esm_perturb.core.config import DataKwargs, InputError, MissingFileError

DATA = DataKwargs()
CONTROL = DATA.control_pert


def make_adata(seed=0, *, n=400, n_genes=15, sparse=True, names=("STAT1", "TP53", "KLF1", "KLF1+TP53", "TP53+STAT1")):
    """Random labels over three cell types and three lanes; combinations are spelt in either order."""
    rng = np.random.default_rng(seed)
    spelt = [other for name in names for other in {name, "+".join(reversed(name.split("+")))}]
    obs = pd.DataFrame(
        {
            "gene": np.where(rng.random(n) < 0.3, CONTROL, rng.choice(spelt, n)),
            "cell_type": rng.choice(["k562", "rpe1", "hep.g2"], n),
            "gem_group": rng.integers(1, 4, n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    X = rng.poisson(1.0, (n, n_genes)).astype(np.float32)
    X[:, 0] += 1
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    return anndata.AnnData(X=scipy.sparse.csr_matrix(X) if sparse else X, obs=obs, var=var)


def write_toml(folder, text):
    path = Path(folder) / "splits.toml"
    path.write_text(text)
    return path


HEAD = '[datasets]\n"screen.1" = "screen.h5ad"\n[training]\n"screen.1" = "train"\n'
HELD_OUT = (
    HEAD
    + '[zeroshot]\n"screen.1.hep.g2" = "test"\n'
    + '[fewshot."screen.1.k562"]\nval = ["KLF1"]\ntest = ["STAT1", "STAT1+TP53"]\n'
)


@pytest.fixture
def screen(tmp_path):
    """(store, spec) of a screen on disk whose data set and cell type names contain dots."""
    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    spec = read_split_toml(write_toml(tmp_path, HELD_OUT))
    return CellStore.from_spec(spec, DATA), spec


def in_memory(adata, tmp_path, text, *, data=DATA, dataset="screen.1", **options):
    """(store, splits) of cells in memory."""
    store = store_from_anndata(adata, data, dataset=dataset)
    spec = read_split_toml(write_toml(tmp_path, text))
    return store, assign_splits(store.obs, spec, control=store.control, **options)


# ---- splits


def expected_label(cell_type, name):
    """Where `HELD_OUT` puts a perturbed cell, one cell at a time."""
    parts = set(name.split("+"))
    if cell_type == "hep.g2":
        return "test"
    if cell_type == "k562" and parts == {"KLF1"}:
        return "val"
    if cell_type == "k562" and parts in ({"STAT1"}, {"STAT1", "TP53"}):
        return "test"
    return "train"


@pytest.mark.parametrize("seed", range(5))
def test_every_cell_is_where_the_file_puts_it(tmp_path, seed):
    adata = make_adata(seed)
    _, splits = in_memory(adata, tmp_path, HELD_OUT)
    for row, (name, cell_type) in enumerate(zip(adata.obs["gene"], adata.obs["cell_type"], strict=True)):
        if name != CONTROL:
            assert splits.labels[row] == expected_label(cell_type, name)
    for split in ("train", "val", "test"):
        wanted = [
            row
            for row, (name, cell_type) in enumerate(zip(adata.obs["gene"], adata.obs["cell_type"], strict=True))
            if name != CONTROL and expected_label(cell_type, name) == split
        ]
        assert splits.perturbed_indices(split).tolist() == wanted
        assert splits.table.loc[split, "cells"] == len(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_controls_are_disjoint_complete_and_proportional(tmp_path, seed):
    store, splits = in_memory(make_adata(seed), tmp_path, HELD_OUT, seed=seed)
    rows = [splits.control_indices(split) for split in ("train", "val", "test")]
    assert np.sort(np.concatenate(rows)).tolist() == np.flatnonzero(store.obs["perturbation"] == CONTROL).tolist()
    context = (store.obs["cell_type"] == "k562").to_numpy()
    cells = np.array([context[splits.perturbed_indices(split)].sum() for split in ("train", "val", "test")])
    controls = np.array([context[part].sum() for part in rows])
    assert np.abs(controls - controls.sum() * cells / cells.sum()).max() < 1
    for lane in ("1", "2", "3"):
        here = np.array([((store.obs["batch"].iloc[part] == lane) & context[part]).sum() for part in rows])
        assert np.abs(here - here.sum() * controls / controls.sum()).max() < 2.5


def test_shared_controls_serve_every_split_of_their_context(tmp_path):
    store, splits = in_memory(make_adata(), tmp_path, HELD_OUT, share_controls=True)
    controls = np.flatnonzero(store.obs["perturbation"] == CONTROL)
    k562 = controls[(store.obs["cell_type"].iloc[controls] == "k562").to_numpy()]
    assert splits.control_indices("train").tolist() == controls.tolist()
    assert splits.control_indices("val").tolist() == k562.tolist()
    assert set(k562) < set(splits.control_indices("test"))
    assert split_overlap(store.obs, splits)["shared_controls"].min() > 0


def test_the_hash_names_the_split(tmp_path):
    store, splits = in_memory(make_adata(), tmp_path, HELD_OUT, seed=1)
    spec = read_split_toml(tmp_path / "splits.toml")
    assert assign_splits(store.obs, spec, control=CONTROL, seed=1).hash == splits.hash
    assert assign_splits(store.obs, spec, control=CONTROL, seed=2).hash != splits.hash


@given(st.lists(st.text("ABC+ ", min_size=1, max_size=6), min_size=1, max_size=4), st.randoms())
def test_the_order_of_a_combination_does_not_matter(genes, random):
    genes = [gene.strip("+ ").replace("+", "") for gene in genes]
    genes = [gene for gene in genes if gene] or ["A"]
    shuffled = random.sample(genes, len(genes))
    assert canonical_perturbation("+".join(genes)) == canonical_perturbation("+".join(shuffled))
    assert parse_perturbation(canonical_perturbation("+".join(genes))) == parse_perturbation("+".join(genes))


def test_validation_is_a_seeded_share_of_training_perturbations(tmp_path):
    text = HEAD + '[zeroshot]\n"screen.1.rpe1" = "test"\n'
    store, splits = in_memory(make_adata(), tmp_path, text, val_fraction=0.4)
    names = store.obs["perturbation"].to_numpy()
    assert len(set(names[splits.perturbed_indices("val")])) == 2
    assert not set(names[splits.perturbed_indices("val")]) & set(names[splits.perturbed_indices("train")])
    assert "seeded: 2 of 5" in splits.table.loc["val", "chosen"]
    none = in_memory(make_adata(), tmp_path, text, val_fraction=0.0)[1]
    assert none.table.loc["val", "cells"] == 0 and none.control_indices("val").size == 0


def test_cell_types_that_no_table_names_are_unused(tmp_path):
    text = '[datasets]\n"screen.1" = "screen.h5ad"\n[fewshot."screen.1.k562"]\nval = ["KLF1"]\ntest = ["STAT1"]\n'
    store, splits = in_memory(make_adata(), tmp_path, text)
    assert set(splits.labels[(store.obs["cell_type"] != "k562").to_numpy()]) == {"unused"}
    assert splits.table.loc["unused", "cells"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[zeroshot]\n"screen1.k562" = "test"', "did you mean 'screen.1'"),
        ('[zeroshot]\n"screen.1.K562 " = "test"', "did you mean 'k562'"),
        ('[zeroshot]\n"screen.1" = "test"', "names no cell type"),
        ('[fewshot."screen.1.k56"]\ntest = ["STAT1"]', "did you mean 'k562'"),
        ('[fewshot."screen.1.k562"]\ntest = ["STAT11"]', "did you mean 'STAT1'"),
        ('[fewshot."screen.1.k562"]\ntest = ["TP53+KLF"]', "did you mean 'KLF1+TP53'"),
        ('[fewshot."screen.1.k562"]\ntest = ["KLF1+TP53"]\nval = ["TP53+KLF1"]', "both val and test"),
        (f'[fewshot."screen.1.k562"]\ntest = ["{CONTROL}"]', "Control label"),
        ('[fewshot."screen.1.k562"]\nvalid = ["STAT1"]', "only val and test are read"),
        ('[few_shot."screen.1.k562"]\ntest = ["STAT1"]', "did you mean 'fewshot'"),
    ],
)
def test_a_name_that_matches_nothing_stops_the_run(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        in_memory(make_adata(), tmp_path, HEAD + text + "\n")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_perturbation_of_another_cell_type_is_not_this_one(tmp_path):
    adata = make_adata()
    adata = adata[~((adata.obs["cell_type"] == "k562") & (adata.obs["gene"] == "STAT1"))].copy()
    with pytest.raises(InputError, match="has no cell in k562"):
        in_memory(adata, tmp_path, HELD_OUT)


def test_contexts_without_enough_controls_are_refused(tmp_path):
    adata = make_adata()
    is_control = (adata.obs["gene"] == CONTROL) & (adata.obs["cell_type"] == "k562")
    with pytest.raises(InputError, match="no control"):
        in_memory(adata[~is_control].copy(), tmp_path, HELD_OUT)
    few = is_control & (is_control.cumsum() > 2)
    with pytest.raises(InputError, match="share_controls=true"):
        in_memory(adata[~few].copy(), tmp_path, HELD_OUT)
    assert in_memory(adata[~few].copy(), tmp_path, HELD_OUT, share_controls=True)


def test_a_file_in_which_nothing_trains_is_refused(tmp_path):
    zeroshot = "".join(f'"screen.1.{cell_type}" = "test"\n' for cell_type in ("k562", "rpe1", "hep.g2"))
    with pytest.raises(InputError, match="No perturbed cell trains"):
        in_memory(make_adata(), tmp_path, '[datasets]\n"screen.1" = "s.h5ad"\n[zeroshot]\n' + zeroshot)


def test_the_audit_finds_what_training_shares(tmp_path):
    store, splits = in_memory(make_adata(), tmp_path, HELD_OUT)
    audit = split_overlap(store.obs, splits).set_index(["cell_type", "perturbation"])
    assert (audit["train_cells"] == 0).all() and (audit["shared_controls"] == 0).all()
    assert audit.loc[("k562", "STAT1"), "trained_elsewhere"] == "screen.1/rpe1 (unspecified)"
    assert audit.loc[("k562", "STAT1+TP53"), "parts_trained"] == "STAT1, TP53"
    assert audit["test_cells"].sum() == len(splits.perturbed_indices("test"))


# ---- store


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "int32", "float64"])
def test_every_storage_gives_the_same_cells(tmp_path, layout):
    adata, reference = make_adata(), store_from_anndata(make_adata(), DATA)
    convert = {
        "csr": lambda X: X,
        "csc": scipy.sparse.csc_matrix,
        "dense": lambda X: X.toarray(),
        "int32": lambda X: X.astype(np.int32),
        "float64": lambda X: X.astype(np.float64),
    }
    adata.X = convert[layout](adata.X)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    store = read_cells({"data": str(tmp_path / "screen.h5ad")}, DATA)
    assert (store.scale_found, store.scale) == ("counts", "log1p")
    assert store.rows([0]).dtype == np.float32
    np.testing.assert_allclose(store.rows(np.arange(400)), reference.rows(np.arange(400)), rtol=1e-5)


def test_counts_are_normalised_as_scanpy_does():
    adata = make_adata()
    store = store_from_anndata(adata, DATA)
    import scanpy

    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    np.testing.assert_allclose(store.rows(np.arange(400)), adata.X.toarray(), rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(-1, 29), max_size=40))
@settings(deadline=None)
def test_rows_are_the_rows_asked_for(seed, indices):
    dense = np.random.default_rng(seed).poisson(0.5, (30, 7)).astype(np.float32)
    expected = np.stack([dense[i] if i >= 0 else np.zeros(7) for i in indices]) if indices else np.zeros((0, 7))
    for X in (dense, scipy.sparse.csr_matrix(dense)):
        assert (dense_rows(X, np.array(indices, dtype=np.int64)) == expected).all()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"pert_col": "genes"}, "did you mean 'gene'"),
        ({"cell_type_key": "celltype"}, "did you mean 'cell_type'"),
        ({"batch_col": "batch"}, "data.kwargs.batch_col=null"),
        ({"control_pert": "DMSO_TF"}, "did you mean 'non-targeting'"),
        ({"modality_col": "modality"}, "data.kwargs.modality_col"),
        ({"output_space": "genes"}, "did you mean 'gene'?); choose gene, all, embedding"),
        ({"dose_col": "dosis"}, "data.kwargs.dose_col=null"),
        ({"smiles_col": "smile"}, "data.kwargs.smiles_col=null"),
    ],
)
def test_wrong_settings_say_what_is_there(screen, settings_, message):
    with pytest.raises(InputError) as caught:
        CellStore.from_spec(screen[1], DataKwargs(**settings_))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    (tmp_path / "screen.h5ad").write_bytes(b"\x89HDF\r\n broken")
    with pytest.raises(InputError, match="cannot be read as HDF5"):
        read_cells({"d": str(tmp_path / "screen.h5ad")}, DATA)
    with pytest.raises(MissingFileError, match="did you mean 'screen.h5ad'"):
        read_cells({"d": str(tmp_path / "sceen.h5ad")}, DATA)
    with pytest.raises(InputError, match="NaN"):
        adata = make_adata(sparse=False)
        adata.X[3, 3] = np.nan
        store_from_anndata(adata, DATA)


def test_each_data_set_needs_its_own_controls(tmp_path):
    first, second = make_adata(0), make_adata(1)
    second = second[second.obs["gene"] != CONTROL].copy()
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(InputError, match="data set 'b'"):
        read_cells({"a": str(tmp_path / "a.h5ad"), "b": str(tmp_path / "b.h5ad")}, DATA)


def test_the_same_gene_by_two_modalities_is_two_conditions():
    adata = make_adata()
    adata.obs["how"] = np.where(adata.obs["cell_type"] == "k562", "CRISPRa", "CRISPRi")
    store = store_from_anndata(adata, DataKwargs(cell_type_key=None, modality_col="how"))
    stat1 = [condition for condition in store.conditions() if condition.perturbation == "STAT1"]
    assert [condition.modality for condition in stat1] == ["CRISPRa", "CRISPRi"]
    assert not set(store.cells(stat1[0])) & set(store.cells(stat1[1]))
    assert len(store.controls(stat1[0])) == (adata.obs["gene"] == CONTROL).sum()


def test_a_test_gene_that_trains_in_a_combination_is_listed(tmp_path):
    text = HEAD + '[fewshot."screen.1.k562"]\nval = ["TP53"]\ntest = ["STAT1"]\n'
    store, splits = in_memory(make_adata(), tmp_path, text)
    audit = split_overlap(store.obs, splits)
    assert audit["perturbation"].tolist() == ["STAT1"]
    assert audit["parts_trained"].item() == "STAT1+TP53"


# ---- doses and SMILES

SMILES = {"imatinib": "CC1=C", "sorafenib": "CNC(=O)"}
DRUGS = DataKwargs(control_pert="DMSO", modality_col="how", dose_col="dose", smiles_col="smiles", batch_col=None)


def drug_screen(dose_type=np.float64, *, n=200, seed=0, first="imatinib") -> anndata.AnnData:
    """Two compounds in three doses, their combination, a gene, and controls with a dose and a SMILES of their own."""
    rng = np.random.default_rng(seed)
    names = rng.choice([first, "sorafenib", "sorafenib+imatinib", "ABL1", "DMSO"], n)
    is_gene = names == "ABL1"
    obs = pd.DataFrame(
        {
            "gene": names,
            "cell_type": "k562",
            "how": np.where(is_gene, "KO", "compound"),
            "dose": np.where(is_gene, np.nan, rng.choice([0.1, 2.5, 10.0], n)).astype(dose_type),
            "smiles": [SMILES.get(name, "CS(C)=O" if name == "DMSO" else "") for name in names],
        },
        index=[f"cell{i}" for i in range(n)],
    )
    X = scipy.sparse.csr_matrix(rng.poisson(1.0, (n, 5)).astype(np.float32))
    return anndata.AnnData(X, obs, pd.DataFrame(index=[f"GENE{i}" for i in range(5)]))


@settings(max_examples=200)
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.text("abcXYZ @+-", min_size=1))
def test_a_modality_label_tells_its_dose(dose, name):
    assert split_modality(modality_label(name, dose)) == (name, dose)
    with np.errstate(over="ignore"):
        small = np.float32(dose)
    if 0 < small < np.inf:
        assert np.float32(split_modality(modality_label(name, small))[1]) == small


def test_doses_are_conditions_of_their_own(tmp_path):
    """One cell at a time, over two files that store doses as 4 and as 8 bytes."""
    both = {"a": drug_screen(np.float32, seed=1), "b": drug_screen(np.float64, seed=2)}
    for name, adata in both.items():
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    store = read_cells({"drugs": str(tmp_path)}, DRUGS)
    raw = pd.concat([both["a"].obs, both["b"].obs])
    for name, how, dose, label in zip(raw["gene"], raw["how"], raw["dose"], store.obs["modality"], strict=True):
        assert label == (how if name in ("DMSO", "ABL1") else f"{how}@{round(float(dose), 4):g}")
    assert store.obs["modality"].nunique() == 5
    conditions = [c for c in store.conditions() if c.perturbation == "imatinib"]
    assert [c.modality for c in conditions] == ["compound@0.1", "compound@10", "compound@2.5"]
    assert all(len(store.controls(c)) == (raw["gene"] == "DMSO").sum() for c in conditions)
    text = '[datasets]\ndrugs = "d"\n[training]\ndrugs = "train"\n[fewshot."drugs.k562"]\ntest = ["sorafenib"]\n'
    splits = assign_splits(store.obs, read_split_toml(write_toml(tmp_path, text)), control="DMSO")
    assert set(store.obs["modality"].iloc[splits.perturbed_indices("test")]) == {c.modality for c in conditions}


@pytest.mark.parametrize("dose", [0.0, -1.0, np.inf, "high"])
def test_a_dose_is_a_number_above_zero(dose):
    adata = drug_screen()
    row = int(np.flatnonzero(adata.obs["gene"] == "sorafenib")[3])
    doses = adata.obs["dose"].astype(object)
    doses.iloc[row] = dose
    adata.obs["dose"] = doses
    with pytest.raises(InputError, match=rf"'dose' .* holds '{dose}' for cell 'cell{row}'; a dose is a number above"):
        store_from_anndata(adata, DRUGS)
    adata.obs["dose"] = doses.where(adata.obs["gene"] != "sorafenib", 1).mask(adata.obs["gene"] == "DMSO", dose)
    assert "compound@1" in set(store_from_anndata(adata, DRUGS).obs["modality"]), "what controls say does not count"


def test_an_at_sign_belongs_to_doses():
    adata = drug_screen()
    adata.obs["how"] = "compound@24h"
    for data in (DRUGS, DataKwargs(control_pert="DMSO", modality_col="how", batch_col=None)):
        with pytest.raises(InputError, match="'compound@24h' of 'data' contains '@', which stands before a dose"):
            store_from_anndata(adata, data)


def test_smiles_come_along(tmp_path):
    """With subsets, dropped perturbations, several files, prepared files, and stores on disk."""
    drug_screen(seed=1).write_h5ad(tmp_path / "a.h5ad")
    drug_screen(seed=2, first="ABL1").write_h5ad(tmp_path / "b.h5ad")
    text = '[datasets]\nx = "a.h5ad"\ny = "b.h5ad"\n[training]\nx = "train"\ny = "train"\n'
    spec = read_split_toml(write_toml(tmp_path, text))
    store = CellStore.from_spec(spec, DRUGS)
    assert store.smiles == SMILES
    assert store.subset([0, 1]).smiles == store.drop_perturbations(["sorafenib"])[0].smiles == SMILES
    on_disk = CellStore.from_spec(spec, DataKwargs(**vars(DRUGS) | {"memory_gb": 1e-9}))
    assert on_disk.smiles == on_disk.to_memory().smiles == on_disk.subset([3]).to_memory().smiles == SMILES
    assert CellStore.from_spec(spec, DataKwargs(**vars(DRUGS) | {"smiles_col": None})).smiles == {}
    path = prepare(spec, DRUGS, tmp_path / "prepared.h5ad", progress=False)
    prepared = CellStore.from_spec(spec, DataKwargs(**vars(DRUGS) | {"prepared": str(path)}))
    assert prepared.smiles == SMILES
    assert set(prepared.obs["modality"]) == set(store.obs["modality"])
    for setting in ("smiles_col", "dose_col"):
        with pytest.raises(InputError, match=f"was prepared with data.kwargs.{setting}="):
            CellStore.from_spec(spec, DataKwargs(**vars(DRUGS) | {"prepared": str(path), setting: None}))


def test_smiles_that_contradict_each_other_are_refused(tmp_path):
    adata, other = drug_screen(), drug_screen(seed=1)
    row = int(np.flatnonzero(adata.obs["gene"] == "imatinib")[2])
    adata.obs.iloc[row, adata.obs.columns.get_loc("smiles")] = "CO"
    with pytest.raises(InputError, match="'imatinib' of 'data' has two SMILES in column 'smiles'"):
        store_from_anndata(adata, DRUGS)
    drug_screen().write_h5ad(tmp_path / "a.h5ad")
    other.obs["smiles"] = other.obs["smiles"].replace("CC1=C", "CO")
    other.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(InputError, match="'imatinib' is 'CC1=C' in a.h5ad, but 'CO' in b.h5ad"):
        read_cells({"x": str(tmp_path / "a.h5ad"), "y": str(tmp_path / "b.h5ad")}, DRUGS)


def test_a_combination_does_not_define_its_parts(tmp_path):
    """Its parts are defined by cells of their own, or by another data set."""
    adata = drug_screen()
    adata.obs["smiles"] = np.where(adata.obs["gene"] == "sorafenib+imatinib", "CC1=C.CNC(=O)", "")
    adata.write_h5ad(tmp_path / "pairs.h5ad")
    with pytest.raises(InputError, match="Combination 'imatinib.sorafenib' of pairs.h5ad has a SMILES, but no cell"):
        read_cells({"x": str(tmp_path / "pairs.h5ad")}, DRUGS)
    drug_screen().write_h5ad(tmp_path / "singles.h5ad")
    both = {"x": str(tmp_path / "pairs.h5ad"), "y": str(tmp_path / "singles.h5ad")}
    assert read_cells(both, DRUGS).smiles == SMILES


# ---- real data


@pytest.fixture
def realdata():
    folder = os.environ.get("REALDATA")
    if not folder or not (Path(folder) / "perturb_seq").is_dir():
        pytest.skip("REALDATA does not name a folder with perturb_seq/")
    return Path(folder).resolve() / "perturb_seq"


NORMAN = DataKwargs(pert_col="condition", batch_col=None, modality_col="perturbation_type", control_pert="control")


@pytest.mark.realdata
def test_norman_and_mcfaline(realdata, tmp_path):
    file = realdata / "norman19_mcfaline23.h5ad"
    raw = anndata.read_h5ad(file)
    pairs = sorted(name for name in raw.obs["condition"].unique() if "+" in name)
    backwards = "+".join(reversed(pairs[0].split("+")))
    spec = read_split_toml(
        write_toml(
            tmp_path,
            f'[datasets]\nreal = "{file}"\n[training]\nreal = "train"\n[zeroshot]\n"real.T98G" = "test"\n'
            f'[fewshot."real.k562"]\ntest = ["{backwards}"]\n',
        )
    )
    store = CellStore.from_spec(spec, NORMAN)
    assert (store.scale_found, store.scale, store.X.shape) == ("log1p", "log1p", (4796, 500))
    np.testing.assert_allclose(store.rows([7]), raw.X[[7]].toarray().astype(np.float32))
    assert {c.modality for c in store.conditions() if c.cell_type == "k562"} == {"CRISPRa"}
    splits = assign_splits(store.obs, spec, control="control")
    assert set(raw.obs["condition"].iloc[splits.perturbed_indices("test")]) >= {pairs[0]}
    in_test = (raw.obs["cell_type"] == "T98G") | (raw.obs["condition"] == pairs[0])
    is_control = raw.obs["condition"] == "control"
    assert splits.perturbed_indices("test").tolist() == np.flatnonzero(in_test & ~is_control).tolist()
    assert split_overlap(store.obs, splits)["train_cells"].sum() == 0
    module = PerturbationDataModule(store, splits, data=NORMAN, cell_set_len=64, batch_size=8, seed=0)
    batches = list(module.train_dataloader())
    assert sum(int(batch["mask"].sum()) for batch in batches) == len(splits.perturbed_indices("train"))


@pytest.mark.realdata
def test_z_scores_stay_as_they_are(realdata):
    file = realdata / "l1000_knockdown_zscores.h5ad"
    settings_ = DataKwargs(pert_col="perturbation", cell_type_key=None, batch_col=None, control_pert="control")
    store = read_cells({"l1000": str(file)}, settings_)
    assert (store.scale_found, store.scale) == ("other", "other")
    assert (store.rows(np.arange(len(store))) == anndata.read_h5ad(file).X).all()
    with pytest.raises(InputError, match="cannot hold counts"):
        read_cells({"l1000": str(file)}, DataKwargs(**{**vars(settings_), "scale": "counts"}))
    with pytest.raises(InputError, match="cell_type_key=null"):
        read_cells({"l1000": str(file)}, DataKwargs(pert_col="perturbation", control_pert="control"))


@pytest.mark.realdata
def test_counts_are_recognised_and_normalised(realdata):
    file = realdata / "datlinger21_jurkat_counts.h5ad"
    found = inspect_h5ad(file)
    assert found["scale"] == "counts" and found["suggested"]["pert_col"] == "perturbation"
    settings_ = DataKwargs(pert_col="perturbation", cell_type_key="condition", batch_col=None, control_pert="control")
    store = read_cells({"datlinger": str(file)}, settings_)
    raw = anndata.read_h5ad(file).X
    totals = np.expm1(store.rows(np.arange(200)).astype(np.float64)).sum(1)
    np.testing.assert_allclose(totals, np.where(np.asarray(raw[:200].sum(1)).ravel() > 0, 1e4, 0), rtol=1e-3)
    assert detect_scale(store.X) == "log1p"
    assert {condition.cell_type for condition in store.conditions()} == {"stimulated", "unstimulated"}
