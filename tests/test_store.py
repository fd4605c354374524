"""The store: one answer from every storage, in memory and on disk, and a sentence for every kind of bad file."""

import logging
import multiprocessing
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esm_perturb.cells import disk_matrix
from esm_perturb.cells.disk_matrix import DiskMatrix
from esm_perturb.cells.joining import free_memory
from esm_perturb.cells.prepare import prepare
from esm_perturb.cells.split_file import read_split_toml
from esm_perturb.cells.splits import assign_splits
from esm_perturb.cells.store import CellStore, group_rows, read_cells, store_from_anndata
from esm_perturb.cells.targets import read_targets
from esm_perturb.core.config import DataKwargs, InputError, MissingFileError

N_CELLS, N_GENES = 300, 25
CONTROL = DataKwargs().control_pert
ON_DISK = 1e-9  # a budget in GB that nothing fits


def make_adata(seed=0, *, n=N_CELLS, n_genes=N_GENES):
    """Counts; labels in random order."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "gene": np.where(rng.random(n) < 0.3, CONTROL, rng.choice(["STAT1", "TP53", "KLF1+TP53"], n)),
            "cell_type": rng.choice(["k562", "rpe1"], n),
            "gem_group": rng.integers(1, 4, n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    X = rng.poisson(0.7, (n, n_genes)).astype(np.float32)
    X[:, 0] += 1
    return anndata.AnnData(scipy.sparse.csr_matrix(X), obs, pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]))


def normalised(adata):
    """What every storage must give, by scanpy: dense."""
    adata = adata.copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    return adata.X.toarray()


def write_zarr(adata, path):
    with warnings.catch_warnings(action="ignore"):
        adata.write_zarr(path)


def open_file(path, **asked):
    return read_cells({"screen": str(path)}, DataKwargs(**asked))


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Storage → (store, number of each of its rows in `make_adata`)."""
    folder, adata = tmp_path_factory.mktemp("stores"), make_adata()
    shuffled = adata[:, np.random.default_rng(1).permutation(N_GENES)].copy()
    dense, csc = adata.copy(), adata.copy()
    dense.X, csc.X = adata.X.toarray(), scipy.sparse.csc_matrix(adata.X)
    wide = anndata.AnnData(np.zeros((N_CELLS, N_GENES), np.float32), adata.obs, adata.var)
    wide.layers["counts"], wide.layers["int"] = adata.X, adata.X.astype(np.int64).toarray()
    wide.obsm["X_hvg"], wide.obsm["sparse"] = adata.X.toarray().astype(np.float64), adata.X
    wide.obsm["frame"] = adata.to_df()
    adata.write_h5ad(folder / "csr.h5ad")
    adata.write_h5ad(folder / "gzip.h5ad", compression="gzip")
    dense.write_h5ad(folder / "dense.h5ad")
    dense.write_h5ad(folder / "dense_gzip.h5ad", compression="gzip")
    csc.write_h5ad(folder / "csc.h5ad")
    wide.write_h5ad(folder / "wide.h5ad")
    write_zarr(adata, folder / "csr.zarr")
    write_zarr(dense, folder / "dense.zarr")
    (folder / "halves").mkdir()
    adata[:150].copy().write_h5ad(folder / "halves" / "a.h5ad")
    dense[150:, np.arange(N_GENES)[::-1]].copy().write_h5ad(folder / "halves" / "b.h5ad")
    shuffled.write_h5ad(folder / "shuffled.h5ad")
    found = {
        "AnnData": store_from_anndata(adata, DataKwargs()),
        "AnnData, dense": store_from_anndata(dense, DataKwargs()),
    }
    for name in ("csr.h5ad", "gzip.h5ad", "dense.h5ad", "dense_gzip.h5ad", "csr.zarr", "dense.zarr", "halves"):
        for place, budget in {"memory": 0.0, "disk": ON_DISK}.items():
            found[f"{name}, {place}"] = open_file(folder / name, memory_gb=budget)
    found["csc.h5ad, memory"] = open_file(folder / "csc.h5ad")
    for key in ("layers/counts", "layers/int", "X_hvg", "sparse"):
        found[f"{key}, disk"] = open_file(folder / "wide.h5ad", embed_key=key, memory_gb=ON_DISK)
    found["frame, memory"] = open_file(folder / "wide.h5ad", embed_key="frame")
    for file in ("csr.h5ad", "csc.h5ad", "shuffled.h5ad"):
        (folder / "split.toml").write_text(f'[datasets]\nscreen = "{file}"\n[training]\nscreen = "train"\n')
        spec = read_split_toml(folder / "split.toml")
        for suffix in (".h5ad", ".zarr"):
            path = prepare(spec, DataKwargs(), folder / f"prepared_{file}{suffix}", progress=False)
            for place, budget in {"memory": 0.0, "disk": ON_DISK}.items():
                data = DataKwargs(prepared=str(path), memory_gb=budget)
                found[f"{path.name}, {place}"] = CellStore.from_spec(spec, data)
    names = {name: store.obs.index.str.removeprefix("screen/") for name, store in found.items()}
    return {name: (found[name], adata.obs.index.get_indexer(cells)) for name, cells in names.items()}


@pytest.fixture(scope="session")
def truth():
    """`make_adata`, normalised by scanpy."""
    return normalised(make_adata())


# ---- the same cells from every storage


@given(indices=st.lists(st.integers(-1, N_CELLS - 1), max_size=60))
@example(indices=[0, 0, 83, 85])  # as many rows as are read in one go, but not the same
@settings(max_examples=40)
def test_every_storage_gives_the_rows_asked_for(stores, truth, indices):
    indices = np.array(indices, dtype=np.int64)
    for name, (store, source) in stores.items():
        genes = store.to_memory().gene_names
        columns = [int(gene.removeprefix("GENE")) for gene in genes]
        expected = np.where(indices[:, None] >= 0, truth[source[indices]][:, columns], 0)
        rows = store.rows(indices)
        assert rows.dtype == np.float32 and rows.flags.c_contiguous, name
        np.testing.assert_allclose(rows, expected.reshape(len(indices), N_GENES), rtol=1e-5, err_msg=name)
        out = np.full_like(rows, 7)
        assert store.rows(indices, out) is out and (out == rows).all()


def test_disk_and_memory_agree_to_the_last_bit(stores):
    for name, (store, _) in stores.items():
        if name.endswith("disk"):
            assert not store.in_memory and isinstance(store.X, DiskMatrix), name
            loaded = store.to_memory()
            assert loaded.in_memory and loaded.to_memory() is loaded
            assert (loaded.rows(np.arange(N_CELLS)) == store.rows(np.arange(N_CELLS))).all(), name
            twin = name.replace("disk", "memory")
            if twin in stores:
                assert stores[twin][0].in_memory
                assert (stores[twin][0].rows(np.arange(N_CELLS)) == store.rows(np.arange(N_CELLS))).all(), name


@pytest.mark.parametrize("buffer", [64, 1024])
def test_small_buffers_change_nothing(stores, truth, monkeypatch, tmp_path, buffer):
    monkeypatch.setattr(disk_matrix, "_BUFFER_BYTES", buffer)
    monkeypatch.setattr(disk_matrix, "_GAP_BYTES", 8)
    adata = make_adata()
    for layout in (scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.csr_matrix.toarray):
        adata.X, path = layout(make_adata().X), tmp_path / f"{layout.__name__}.h5ad"
        adata.write_h5ad(path)
        budgets = [0.0] if layout is scipy.sparse.csc_matrix else [0.0, ON_DISK]
        for budget in budgets:
            store = open_file(path, memory_gb=budget)
            np.testing.assert_allclose(store.rows(np.arange(N_CELLS)[::-1]), truth[::-1], rtol=1e-5)


def test_everything_else_works_on_disk_as_in_memory(stores, truth):
    memory, disk = stores["csr.h5ad, memory"][0], stores["csr.h5ad, disk"][0]
    assert disk.conditions() == memory.conditions() and disk.genes() == memory.genes()
    rows = np.array([3, 3, 250, 17])
    np.testing.assert_allclose(disk.mean(rows), truth[rows].mean(axis=0), rtol=1e-5)
    assert disk.mean(rows).dtype == np.float64 and (disk.mean(rows) == memory.mean(rows)).all()
    with pytest.raises(ValueError, match="no cells"):
        disk.mean([])
    view = disk.subset(rows)
    assert not view.in_memory and view.X.shape == (4, N_GENES) and (view.rows([2, -1]) == disk.rows([250, -1])).all()
    again = view.subset(np.array([False, True, False, True]))
    assert (again.rows([1, 0]) == disk.rows([17, 3])).all()
    assert (again.to_anndata().X.toarray() == disk.rows([3, 17])).all()
    kept, dropped = disk.drop_perturbations(["TP53+KLF1"])
    other = memory.drop_perturbations(["TP53+KLF1"])
    assert kept.obs.equals(other[0].obs) and dropped.equals(other[1]) and len(kept) + dropped["n_cells"].sum() == 300
    assert (kept.rows(np.arange(len(kept))) == other[0].rows(np.arange(len(kept)))).all()
    for condition in disk.conditions():
        assert (disk.cells(condition) == memory.cells(condition)).all()
        assert (disk.controls(condition) == memory.controls(condition)).all()


@given(indices=st.lists(st.integers(0, N_CELLS - 1), max_size=60))
@settings(max_examples=20)
def test_every_storage_gives_the_counts_back_exactly(stores, indices):
    counts = make_adata().X.toarray()
    for name, (store, source) in stores.items():
        columns = [int(gene.removeprefix("GENE")) for gene in store.gene_names]
        found = store.counts(np.array(indices, dtype=np.int64))
        wanted = counts[source[np.array(indices, dtype=np.int64)]][:, columns]
        assert (found.toarray() == wanted).all() and found.shape == wanted.shape, name
        assert (store.obs["n_counts"] == counts[source].sum(axis=1)).all(), name


def test_counts_survive_a_choice_of_genes_and_any_depth(tmp_path):
    adata = make_adata()
    depth = np.random.default_rng(2).integers(1, 3000, N_CELLS)
    adata.X = scipy.sparse.csr_matrix(adata.X.multiply(depth[:, None]))
    adata.write_h5ad(tmp_path / "x.h5ad")
    (tmp_path / "split.toml").write_text('[datasets]\nscreen = "x.h5ad"\n[training]\nscreen = "train"\n')
    spec = read_split_toml(tmp_path / "split.toml")
    genes = ["GENE3", "GENE0", "GENE9"]
    path = prepare(spec, DataKwargs(), tmp_path / "p.h5ad", genes=genes, progress=False)
    store = CellStore.from_spec(spec, DataKwargs(prepared=str(path)))
    wanted = adata[store.obs.index.str.removeprefix("screen/"), genes].X.toarray()
    assert (store.counts(np.arange(N_CELLS)).toarray() == wanted).all() and wanted.max() > 9000


def test_no_counts_are_made_up():
    logged = make_adata()
    logged.X = scipy.sparse.csr_matrix(normalised(logged))
    with pytest.raises(InputError, match="not as counts"):
        store_from_anndata(logged, DataKwargs()).counts(np.arange(3))
    fractions = make_adata()
    fractions.X = fractions.X * np.float32(0.3)
    with pytest.raises(InputError, match="do not come from whole counts"):
        store_from_anndata(fractions, DataKwargs(scale="counts")).counts(np.arange(3))
    store = store_from_anndata(make_adata(), DataKwargs())
    del store.obs["n_counts"]
    with pytest.raises(InputError, match="esm-perturb prepare"):
        store.counts(np.arange(3))


def test_row_numbers_outside_are_errors(stores):
    for name in ("csr.h5ad, memory", "dense.h5ad, memory", "csr.h5ad, disk", "dense.zarr, disk"):
        for index in (-2, N_CELLS):
            with pytest.raises(IndexError):
                stores[name][0].rows([0, index])


class Rows(torch.utils.data.Dataset):
    """Rows of a store, some at a time."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.store.rows([index, -1, 299 - index])


OPEN = ["gzip.h5ad, disk", "csr.zarr, disk", "dense.h5ad, disk", "prepared_csr.h5ad.h5ad, disk"]


@pytest.mark.parametrize("name", OPEN)
def test_forked_workers_and_threads_read_the_same(stores, name):
    store = stores[name][0]
    expected = [store.rows([i, -1, 299 - i]) for i in range(40)]
    loader = torch.utils.data.DataLoader(Rows(store), batch_size=None, num_workers=2)
    assert all((batch.numpy() == rows).all() for batch, rows in zip(loader, expected, strict=True))
    with ThreadPoolExecutor(8) as pool:
        threads = list(pool.map(Rows(pickle.loads(pickle.dumps(store))).__getitem__, range(40)))
    assert all((ours == rows).all() for ours, rows in zip(threads, expected, strict=True))


def test_a_process_started_afresh_reads_the_same(stores):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for name in OPEN:
            store = stores[name][0]
            assert (pool.apply(store.rows, ([7, -1, 299],)) == store.rows([7, -1, 299])).all(), name


def test_controls_are_held_where_they_fit(tmp_path):
    adata = make_adata()
    adata.write_h5ad(tmp_path / "x.h5ad")
    size = 8 * (adata.X.nnz + N_CELLS) / 1e9
    store = open_file(tmp_path / "x.h5ad", memory_gb=0.9 * size)
    assert not store.in_memory and store.X._held.shape[0] == (adata.obs["gene"] == CONTROL).sum()
    assert open_file(tmp_path / "x.h5ad", memory_gb=0.1 * size).X._held is None
    assert open_file(tmp_path / "x.h5ad", memory_gb=1.1 * size).in_memory


def test_a_backed_anndata_is_read_from_its_file(tmp_path, truth):
    make_adata().write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    store = store_from_anndata(backed, DataKwargs(memory_gb=ON_DISK))
    assert not store.in_memory
    np.testing.assert_allclose(store.rows([5, 2]), truth[[5, 2]], rtol=1e-5)
    np.testing.assert_allclose(store_from_anndata(backed[[5, 2]], DataKwargs()).rows([0, 1]), truth[[5, 2]], rtol=1e-5)


def test_the_anndata_given_is_not_changed_nor_shared():
    for layout in (scipy.sparse.csr_matrix, scipy.sparse.csr_matrix.toarray):
        adata = make_adata()
        adata.X = layout(adata.X)
        adata.X = np.log1p(adata.X)
        store = store_from_anndata(adata, DataKwargs())
        before = store.rows([0])
        adata.X *= 0
        assert (store.rows([0]) == before).all()


def test_labels_are_categories_and_groups_are_right(stores):
    store = stores["AnnData"][0]
    labels = store.obs.drop(columns="n_counts")
    assert all(isinstance(dtype, pd.CategoricalDtype) for dtype in labels.dtypes)
    for columns in (["cell_type"], ["cell_type", "perturbation", "batch"]):
        groups = group_rows(store.obs, columns)
        naive = {}
        for row, labels in enumerate(store.obs[columns].astype(str).itertuples(index=False)):
            naive.setdefault(tuple(labels), []).append(row)
        assert list(groups) == sorted(naive) and all(groups[key].tolist() == naive[key] for key in naive)
    assert store.subset(store.cells(store.conditions()[0])).obs["perturbation"].cat.categories.tolist() == ["KLF1+TP53"]


# ---- memory or disk


def test_beyond_the_budget_there_is_one_sentence(tmp_path, caplog):
    adata = make_adata()
    adata.write_h5ad(tmp_path / "csr.h5ad")
    with caplog.at_level(logging.WARNING):
        assert not open_file(tmp_path / "csr.h5ad", memory_gb=ON_DISK).in_memory
    assert "esm-perturb prepare" in caplog.text
    adata.X = scipy.sparse.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(InputError, match=r"csc.h5ad stores its matrix gene by gene \(CSC\).*esm-perturb prepare"):
        open_file(tmp_path / "csc.h5ad", memory_gb=ON_DISK)
    assert 1e6 < free_memory() < 1e14


# ---- several files


@pytest.mark.parametrize("budget", [0.0, ON_DISK])
def test_files_are_aligned_by_gene_name(tmp_path, budget):
    first, second = make_adata(0), make_adata(1)
    order = np.random.default_rng(0).permutation(N_GENES)
    first.write_h5ad(tmp_path / "a.h5ad")
    second[:, order].copy().write_h5ad(tmp_path / "b.h5ad")
    store = open_file(tmp_path, memory_gb=budget)
    assert store.gene_names == list(first.var_names) and store.in_memory == (budget == 0)
    np.testing.assert_allclose(
        store.rows(np.arange(600)), np.concatenate([normalised(first), normalised(second)]), rtol=1e-5
    )
    assert store.obs.index[[0, 300]].tolist() == ["screen/a/cell0", "screen/b/cell0"]
    (tmp_path / "b.h5ad").unlink()
    second[:, 1:].copy().write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(InputError, match="differ: 1 only in"):
        open_file(tmp_path, memory_gb=budget)


# ---- bad input


def one_bad(value, row=41, gene=7):
    X = make_adata().X.toarray()
    X[row, gene] = value
    return X


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("budget", [0.0, ON_DISK])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (-np.inf, "NaN or infinite"), (-3, "some negative")],
)
def test_broken_values_are_named_with_their_cell_and_gene(tmp_path, value, message, dense, budget):
    adata = make_adata()
    adata.X = one_bad(value) if dense else scipy.sparse.csr_matrix(one_bad(value))
    adata.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(InputError, match=f"x.h5ad .*{message}.*first: cell 'cell41', gene 'GENE7'"):
        open_file(tmp_path / "x.h5ad", memory_gb=budget)


def test_negative_whole_numbers_may_be_meant():
    adata = make_adata()
    adata.X = one_bad(-3)
    store = store_from_anndata(adata, DataKwargs(scale="other"))
    assert (store.scale, store.rows([41])[0, 7]) == ("other", -3)
    with pytest.raises(InputError, match="cannot hold counts"):
        store_from_anndata(adata, DataKwargs(scale="counts"))


@pytest.mark.parametrize("budget", [0.0, ON_DISK])
def test_cells_without_counts_stay_zero_and_are_counted(tmp_path, caplog, budget):
    adata = make_adata()
    adata.X = scipy.sparse.csr_matrix(adata.X.toarray() * (np.arange(N_CELLS) > 2)[:, None])
    adata.write_h5ad(tmp_path / "x.h5ad")
    with caplog.at_level(logging.WARNING):
        store = open_file(tmp_path / "x.h5ad", memory_gb=budget)
    assert store.record["empty_cells"] == 3 and "3 of 300 cells have no expression at all" in caplog.text
    assert not store.rows([0, 1, 2]).any() and np.isfinite(store.rows(np.arange(300))).all()


@pytest.mark.parametrize("empty", ["", "  ", "nan", "NaN", "None", None, np.nan])
def test_cells_without_a_dose_may_say_so_in_text(empty):
    obs = pd.DataFrame({"gene": ["DMSO", "aspirin", "TP53"], "cell_type": "k562", "dose": ["", "0.5", empty]})
    adata = anndata.AnnData(np.ones((3, 4), np.float32), obs.set_axis(["a", "b", "c"]))
    data = DataKwargs(control_pert="DMSO", batch_col=None, dose_col="dose")
    modalities = store_from_anndata(adata, data).obs["modality"]
    assert modalities.tolist() == ["unspecified", "unspecified@0.5", "unspecified"]


def test_targets_are_the_same_cells(tmp_path):
    """Each rule of what is predicted, on two files, one of which lacks X_hvg."""
    adata = make_adata()
    adata.var["highly_variable"] = np.arange(N_GENES) % 3 == 0
    adata.obsm["X_uce"] = np.random.default_rng(2).normal(size=(N_CELLS, 6)).astype(np.float32)
    adata.obsm["X_hvg"] = np.log1p(adata.X.toarray()[:, ::3])
    for name, part in {"a": adata[:150].copy(), "b": adata[150:, ::-1].copy()}.items():
        if name == "b":
            part.obsm["X_hvg"] = np.log1p(part.X.toarray()[:, part.var["highly_variable"].to_numpy()])
        part.write_h5ad(tmp_path / f"{name}.h5ad")
    del part.obsm["X_hvg"]
    (tmp_path / "c").mkdir()
    part.write_h5ad(tmp_path / "c" / "b.h5ad")
    text = '[datasets]\nx = "a.h5ad"\ny = "{}"\n[training]\nx = "train"\ny = "train"\n'
    found = {}
    for place in ("b.h5ad", "c"):
        (tmp_path / "split.toml").write_text(text.format(place))
        spec = read_split_toml(tmp_path / "split.toml")
        for key in (None, "X_hvg", "X_uce") if place == "b.h5ad" else ("X_uce",):
            for space in ("gene", "all", "embedding"):
                for budget in (0.0, ON_DISK):
                    data = DataKwargs(embed_key=key, output_space=space, memory_gb=budget)
                    store = CellStore.from_spec(spec, data)
                    targets = read_targets(spec, data, store)
                    found[place, key, space] = None if targets is None else targets.record["embed_key"] or "X"
                    if targets is not None:
                        mine, theirs = (s.obs.drop(columns="n_counts", errors="ignore") for s in (targets, store))
                        assert mine.equals(theirs)
                        assert targets.in_memory is (budget == 0.0)
                        plain = CellStore.from_spec(spec, DataKwargs(embed_key=targets.record["embed_key"]))
                        assert (targets.rows(np.arange(300)) == plain.rows(np.arange(300))).all()
    assert {key: value for key, value in found.items() if value} == {
        ("b.h5ad", "X_hvg", "all"): "X",
        ("b.h5ad", "X_uce", "gene"): "X_hvg",
        ("b.h5ad", "X_uce", "all"): "X",
        ("c", "X_uce", "gene"): "X",
        ("c", "X_uce", "all"): "X",
    }
    fewer, _ = store.drop_perturbations(["STAT1"])
    data = DataKwargs(embed_key="X_uce", output_space="all")
    found, everyone = read_targets(spec, data, fewer), read_targets(spec, data, store)
    assert found.obs.index.equals(fewer.obs.index)
    rows = everyone.obs.index.get_indexer(fewer.obs.index)
    assert (found.rows(np.arange(len(fewer))) == everyone.rows(rows)).all()
    prepared = DataKwargs(embed_key="X_uce", prepared="any.h5ad")
    with pytest.raises(InputError, match="A prepared file holds one matrix, but .*X_uce.* needs X beside it"):
        read_targets(spec, prepared, store)


@pytest.mark.parametrize("key", ["X_hvg", "X_uce", "frame", "layers/raw", None])
@pytest.mark.parametrize("backed", [False, True])
def test_cells_in_memory_are_read_as_those_of_a_file(tmp_path, key, backed):
    adata = make_adata()
    adata.var["highly_variable"] = np.arange(N_GENES) < 5
    adata.obsm["X_hvg"] = scipy.sparse.csr_matrix(np.log1p(adata.X[:, :5].toarray()))
    adata.obsm["X_uce"] = np.random.default_rng(0).normal(size=(N_CELLS, 4))
    adata.obsm["frame"] = pd.DataFrame(adata.X[:, :2].toarray(), index=adata.obs_names, columns=["A", "B"])
    adata.layers["raw"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    from_file = open_file(tmp_path / "cells.h5ad", embed_key=key)
    given_ = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r") if backed else adata
    store = store_from_anndata(given_, DataKwargs(embed_key=key), dataset="screen")
    assert store.gene_names == from_file.gene_names
    assert (store.scale, store.scale_found) == (from_file.scale, from_file.scale_found)
    assert (store.rows(np.arange(N_CELLS)) == from_file.rows(np.arange(N_CELLS))).all()
    with pytest.raises(InputError, match="has no obsm.'X_uc'. .*did you mean 'X_uce'"):
        store_from_anndata(given_, DataKwargs(embed_key="X_uc"))


def test_an_embedding_is_never_taken_for_counts(tmp_path):
    adata = make_adata()
    adata.obsm["X_code"] = np.random.default_rng(0).integers(0, 9, (N_CELLS, 4)).astype(np.float32)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for scale in ("auto", "counts", "log1p"):
        store = open_file(tmp_path / "cells.h5ad", embed_key="X_code", scale=scale)
        assert store.scale == store.scale_found == "other"
        assert (store.rows(np.arange(N_CELLS)) == adata.obsm["X_code"]).all()


def test_repeated_names_and_genes_are_refused(tmp_path):
    adata = make_adata()
    adata.obs_names = ["cell1", *adata.obs_names[1:]]
    with pytest.raises(InputError, match="Cell name 'cell1' occurs twice"):
        store_from_anndata(adata, DataKwargs())
    with warnings.catch_warnings(action="ignore"):
        adata = make_adata()
        adata.var_names = ["GENE1", *adata.var_names[1:]]
        with pytest.raises(InputError, match="1 gene names of 'data' occur twice"):
            store_from_anndata(adata, DataKwargs())
    twice = scipy.sparse.csr_matrix((np.ones(4, np.float32), [3, 3, 0, 1], [0, 2, *[4] * 299]), shape=(300, N_GENES))
    adata = make_adata()
    adata.X = twice
    with pytest.raises(InputError, match="cell 'cell0' stores the same gene twice"):
        store_from_anndata(adata, DataKwargs())


def test_one_cell_groups_and_a_context_without_controls(tmp_path):
    adata = make_adata()
    adata.obs["gene"] = adata.obs["gene"].where(adata.obs["gene"] != "STAT1", CONTROL)
    adata.obs.iloc[7, 0] = "STAT1"
    adata.obs.iloc[7, 1] = "k562"
    store = store_from_anndata(adata, DataKwargs())
    (lonely,) = [condition for condition in store.conditions() if condition.perturbation == "STAT1"]
    assert store.cells(lonely).tolist() == [7]
    adata = make_adata()
    adata = adata[(adata.obs["gene"] != CONTROL) | (adata.obs["cell_type"] != "rpe1")].copy()
    store = store_from_anndata(adata, DataKwargs(), dataset="screen")
    condition = next(c for c in store.conditions() if c.cell_type == "rpe1")
    assert store.controls(condition).size == 0
    (tmp_path / "s.toml").write_text('[datasets]\nscreen = "x.h5ad"\n[training]\nscreen = "train"\n')
    with pytest.raises(InputError, match=r"rpe1.* no control"):
        assign_splits(store.obs, read_split_toml(tmp_path / "s.toml"), control=CONTROL)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97, 0.999])
def test_a_truncated_h5ad_is_one_sentence(tmp_path, share):
    make_adata().write_h5ad(tmp_path / "x.h5ad")
    os.truncate(tmp_path / "x.h5ad", int((tmp_path / "x.h5ad").stat().st_size * share))
    with pytest.raises(InputError, match=r"x.h5ad' cannot be read as HDF5 .* is the file complete\?"):
        open_file(tmp_path / "x.h5ad")


def test_damaged_structure_is_one_sentence(tmp_path):
    for name, place, value in [("indices", 5, N_GENES), ("indices", 5, -1), ("indptr", 3, 10**6), ("indptr", 0, 1)]:
        make_adata().write_h5ad(tmp_path / "x.h5ad")
        with h5py.File(tmp_path / "x.h5ad", "r+") as file:
            file[f"X/{name}"][place] = value
        for budget in (0.0, ON_DISK):
            with pytest.raises(InputError, match="is damaged"):
                open_file(tmp_path / "x.h5ad", memory_gb=budget)
    make_adata().write_h5ad(tmp_path / "y.h5ad")
    with h5py.File(tmp_path / "y.h5ad", "r+") as file:
        del file["X"]
    with pytest.raises(InputError, match="has no 'X'"):
        open_file(tmp_path / "y.h5ad")
    write_zarr(make_adata(), tmp_path / "x.zarr")
    (tmp_path / "x.zarr" / "zarr.json").unlink(missing_ok=True)
    (tmp_path / "x.zarr" / ".zgroup").unlink(missing_ok=True)
    with pytest.raises(InputError, match="cannot be read as zarr"):
        open_file(tmp_path / "x.zarr")
    with pytest.raises(MissingFileError, match="did you mean 'x.zarr'"):
        open_file(tmp_path / "xx.zarr")


def test_a_lost_chunk_of_a_zarr_is_not_taken_for_zeros(tmp_path):
    write_zarr(make_adata(), tmp_path / "x.zarr")
    chunks = [file for file in (tmp_path / "x.zarr" / "X" / "data").rglob("*") if file.name.isdigit()]
    assert len(open_file(tmp_path / "x.zarr")) == N_CELLS
    chunks[0].unlink()
    with pytest.raises(InputError, match="is damaged: parts of its matrix 'X' are missing"):
        open_file(tmp_path / "x.zarr")


HOSTILE = ["<b>STAT1</b>", "β-catenin", "名前", 'say "x"', "a/b", "it's & so", "Ünï\u0301", "NaN", "-1", " TP53"]


def test_strange_labels_come_back_as_they_are(tmp_path):
    adata = make_adata()
    rng = np.random.default_rng(0)
    adata.obs["gene"] = np.where(adata.obs["gene"] == CONTROL, CONTROL, rng.choice(HOSTILE, N_CELLS))
    adata.obs["cell_type"] = rng.choice(["<i>k562</i>", "Ö"], N_CELLS)
    adata.var_names = [f"<gene {i}>" for i in range(N_GENES)]
    memory = store_from_anndata(adata, DataKwargs(), dataset="s")
    adata.write_h5ad(tmp_path / "ö <x>.h5ad")
    (tmp_path / "s.toml").write_text('[datasets]\ns = "ö <x>.h5ad"\n[training]\ns = "train"\n', encoding="utf-8")
    spec = read_split_toml(tmp_path / "s.toml")
    path = prepare(spec, DataKwargs(), tmp_path / "fertig <ü>.h5ad", progress=False)
    for store in (CellStore.from_spec(spec, DataKwargs()), CellStore.from_spec(spec, DataKwargs(prepared=str(path)))):
        assert store.gene_names == memory.gene_names
        assert store.obs.loc[memory.obs.index].astype(str).equals(memory.obs.astype(str))
    assert {condition.perturbation for condition in memory.conditions()} == {name.strip() for name in HOSTILE}


def test_columns_of_any_type_are_labels(tmp_path):
    adata = make_adata()
    adata.obs["gem_group"] = pd.Categorical(adata.obs["gem_group"])
    adata.obs["flag"] = np.arange(N_CELLS) % 2 == 0
    adata.obs["number"] = (np.arange(N_CELLS) % 3) / 2
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert set(open_file(tmp_path / "x.h5ad").obs["batch"]) == {"1", "2", "3"}
    assert set(open_file(tmp_path / "x.h5ad", batch_col="flag").obs["batch"]) == {"True", "False"}
    assert set(open_file(tmp_path / "x.h5ad", batch_col="number").obs["batch"]) == {"0.0", "0.5", "1.0"}
    with pytest.raises(InputError, match=r"Column 'cell_typ' \(data.kwargs.cell_type_key\).*did you mean 'cell_type'"):
        open_file(tmp_path / "x.h5ad", cell_type_key="cell_typ")
    adata.obs.loc["cell5", "gene"] = np.nan
    adata.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(InputError, match=r"1 cells of x.h5ad have no value in column 'gene' \(first: 'cell5'\)"):
        open_file(tmp_path / "x.h5ad")


# ---- real data


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("norman19_mcfaline23.h5ad", {"pert_col": "condition", "modality_col": "perturbation_type"}),
        ("datlinger21_jurkat_counts.h5ad", {"pert_col": "perturbation", "cell_type_key": "condition"}),
        ("l1000_knockdown_zscores.h5ad", {"pert_col": "perturbation", "cell_type_key": None}),
    ],
)
def test_real_files_read_and_prepared_are_the_same(tmp_path, file, columns):
    beside = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("REALDATA") or beside) / "perturb_seq" / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    asked = columns | {"batch_col": None, "control_pert": "control"}
    (tmp_path / "s.toml").write_text(f'[datasets]\nreal = "{path}"\n[training]\nreal = "train"\n')
    spec = read_split_toml(tmp_path / "s.toml")
    memory = CellStore.from_spec(spec, DataKwargs(**asked))
    disk = CellStore.from_spec(spec, DataKwargs(**asked, memory_gb=ON_DISK))
    made = prepare(spec, DataKwargs(**asked), tmp_path / "prepared.h5ad", progress=False)
    prepared = CellStore.from_spec(spec, DataKwargs(**asked, prepared=str(made), memory_gb=ON_DISK))
    everything = np.arange(len(memory))
    assert memory.in_memory and not disk.in_memory and not prepared.in_memory
    assert (disk.rows(everything) == memory.rows(everything)).all()
    back = memory.obs.index.get_indexer(prepared.obs.index)
    assert (prepared.rows(everything) == memory.rows(back)).all() and sorted(back) == everything.tolist()
    assert prepared.obs.astype(str).equals(memory.obs.iloc[back].astype(str))
    assert prepared.conditions() == memory.conditions() and prepared.scale_found == memory.scale_found
    if memory.scale_found == "counts":
        raw = anndata.read_h5ad(path).X
        assert (memory.counts(everything) != raw).nnz == 0 and (prepared.counts(everything) != raw[back]).nnz == 0
