"""Prepared files: sorted, lossless, whole or absent, and refused when anything behind them changed."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from esm_perturb.cells import disk_matrix
from esm_perturb.cells.prepare import ORDER, check_gene_selection, prepare, read_gene_list, sorted_rows
from esm_perturb.cells.split_file import read_split_toml
from esm_perturb.cells.splits import assign_splits
from esm_perturb.cells.store import CellStore
from esm_perturb.core.config import DataKwargs, InputError, MissingFileError

CONTROL = DataKwargs().control_pert
NAMES = ["STAT1", "TP53", "KLF1", "KLF1+TP53", "GATA1"]


def make_adata(seed=0, n=400, n_genes=30):
    """Counts of a screen in random order."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "gene": np.where(rng.random(n) < 0.3, CONTROL, rng.choice(NAMES, n)),
            "cell_type": rng.choice(["k562", "rpe1"], n),
            "gem_group": rng.integers(1, 4, n),
            "how": rng.choice(["CRISPRa", "CRISPRi"], n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    X = scipy.sparse.csr_matrix(rng.poisson(rng.gamma(0.5, 1.0, n_genes), (n, n_genes)).astype(np.float32))
    return anndata.AnnData(X, obs, pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]))


def make_spec(folder, held_out='[fewshot."screen.k562"]\nval = ["KLF1"]\ntest = ["STAT1"]\n', **files):
    """A split file beside its data."""
    files = files or {"screen": "screen.h5ad"}
    lines = [f'{name} = "{file}"' for name, file in files.items()]
    trained = [f'{name} = "train"' for name in files]
    text = "\n".join(["[datasets]", *lines, "[training]", *trained, held_out])
    (folder / "split.toml").write_text(text)
    return read_split_toml(folder / "split.toml")


@pytest.fixture
def screen(tmp_path):
    """(folder, spec, path of the prepared file)."""
    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    spec = make_spec(tmp_path)
    return tmp_path, spec, prepare(spec, DataKwargs(), tmp_path / "prepared.h5ad", progress=False)


def opened(spec, path, **settings):
    return CellStore.from_spec(spec, DataKwargs(prepared=str(path), **settings))


# ---- sorted and lossless


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "two files"])
@pytest.mark.parametrize("buffer", [1 << 26, 2048])
def test_every_cell_keeps_its_values_and_stands_in_order(tmp_path, monkeypatch, seed, layout, buffer):
    monkeypatch.setattr(disk_matrix, "_BUFFER_BYTES", buffer)
    adata = make_adata(seed)
    if layout == "two files":
        adata[:150].copy().write_h5ad(tmp_path / "a.h5ad")
        adata[150:, np.random.default_rng(0).permutation(30)].copy().write_h5ad(tmp_path / "b.h5ad")
        spec = make_spec(tmp_path, "", first="a.h5ad", second="b.h5ad")
    else:
        change = {
            "csr": scipy.sparse.csr_matrix,
            "csc": scipy.sparse.csc_matrix,
            "dense": scipy.sparse.csr_matrix.toarray,
        }
        adata.X = change[layout](adata.X)
        adata.write_h5ad(tmp_path / "screen.h5ad", compression="gzip")
        spec = make_spec(tmp_path)
    data = DataKwargs(modality_col="how")
    path = prepare(spec, data, tmp_path / "prepared.h5ad", progress=False)
    memory = CellStore.from_spec(spec, data)
    store = opened(spec, path, modality_col="how", memory_gb=1e-9)
    by_name = pd.DataFrame(memory.rows(np.arange(400)), index=memory.obs.index, columns=memory.gene_names)
    ours = pd.DataFrame(store.rows(np.arange(400)), index=store.obs.index, columns=store.gene_names)
    pd.testing.assert_frame_equal(ours, by_name.loc[ours.index], check_exact=True)
    assert sorted(store.obs.index) == sorted(memory.obs.index)
    labels = [tuple(row) for row in store.obs[list(ORDER)].astype(str).to_numpy()]
    assert labels == sorted(labels)
    assert labels == [tuple(row) for row in memory.obs.loc[store.obs.index, list(ORDER)].astype(str).to_numpy()]
    assert (store.scale, store.scale_found, store.record["target_sum"]) == ("log1p", "counts", 1e4)


def test_anndata_reads_it_and_its_arrays_are_one_run(screen):
    _, spec, path = screen
    adata, store = anndata.read_h5ad(path), opened(spec, path)
    assert (adata.X.toarray() == store.rows(np.arange(400))).all() and adata.X.dtype == np.float32
    assert adata.X.has_canonical_format and list(adata.var_names) == store.gene_names
    record = json.loads(adata.uns["esm_perturb"]["record"])
    assert (
        record["files"][0]["sha256"] == store.record["files"][0]["sha256"] and len(record["files"][0]["sha256"]) == 64
    )
    assert record["settings"]["pert_col"] == "gene" and record["version"] and record["files"][0]["n_cells"] == 400
    with h5py.File(path) as file:
        for name in ("data", "indices"):
            assert file[f"X/{name}"].chunks is None and file[f"X/{name}"].id.get_offset()


@pytest.mark.parametrize("columns", [ORDER[:4], ORDER, ("dataset", "cell_type")])
def test_cells_of_a_set_and_their_controls_lie_together(screen, columns):
    _, spec, path = screen
    store = opened(spec, path)
    for _, rows in store.obs.reset_index(drop=True).groupby(list(columns), observed=True):
        assert len(rows) == rows.index.max() - rows.index.min() + 1
    controls = store.obs.reset_index(drop=True).query("perturbation == @CONTROL")
    for _, rows in controls.groupby(["cell_type"], observed=True):
        assert len(rows) == rows.index.max() - rows.index.min() + 1


def test_scales_that_are_not_counts_are_written_as_they_are(tmp_path):
    adata = make_adata()
    adata.X = np.random.default_rng(0).normal(size=adata.shape).astype(np.float32)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    spec = make_spec(tmp_path)
    store = opened(spec, prepare(spec, DataKwargs(), tmp_path / "p.h5ad", progress=False))
    assert (store.scale, store.scale_found) == ("other", "other") and "target_sum" not in store.record
    assert (store.rows(np.arange(400)) == adata.X[adata.obs.index.get_indexer(store.obs.index)]).all()


def test_all_zero_and_single_cells_are_prepared(tmp_path):
    adata = make_adata(n=3)
    adata.obs["gene"] = [CONTROL, "STAT1", "TP53"]
    adata.X = scipy.sparse.csr_matrix((3, 30), dtype=np.float32)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    spec = make_spec(tmp_path, "")
    path = prepare(spec, DataKwargs(cell_type_key=None), tmp_path / "p.h5ad", progress=False)
    for budget in (0.0, 1e-12):
        store = opened(spec, path, cell_type_key=None, memory_gb=budget)
        assert not store.rows([0, 1, 2]).any() and store.record["empty_cells"] == 3


# ---- genes


def test_genes_of_a_list_in_its_order(screen):
    folder, spec, path = screen
    (folder / "genes.txt").write_text("GENE7\n\nGENE2\n GENE11 \n")
    genes = read_gene_list(folder / "genes.txt")
    few = prepare(spec, DataKwargs(), folder / "few.h5ad", genes=genes, progress=False)
    assert opened(spec, few).gene_names == ["GENE7", "GENE2", "GENE11"]
    assert (opened(spec, few).rows(np.arange(400)) == opened(spec, path).rows(np.arange(400))[:, [7, 2, 11]]).all()
    for wrong, message in [(["GENE7", "GEN2"], "did you mean 'GENE2'"), ([], "no gene"), (["GENE1"] * 2, "twice")]:
        with pytest.raises(InputError, match=message):
            prepare(spec, DataKwargs(), folder / "x.h5ad", genes=wrong, progress=False)
    with pytest.raises(MissingFileError):
        read_gene_list(folder / "none.txt")


def test_variable_genes_are_chosen_by_training_cells_alone(screen):
    folder, spec, _ = screen
    first = opened(spec, prepare(spec, DataKwargs(), folder / "a.h5ad", genes=8, progress=False))
    splits = assign_splits(first.obs, spec, control=CONTROL)
    check_gene_selection(first, splits)
    assert first.obs["chose_genes"].to_numpy().sum() == len(splits.perturbed_indices("train"))
    adata = make_adata()
    original = CellStore.from_spec(spec, DataKwargs())
    held_out = np.setdiff1d(np.arange(400), assign_splits(original.obs, spec, control=CONTROL).indices("train"))
    assert len(held_out) > 20
    dense = adata.X.toarray()
    dense[held_out] = np.random.default_rng(5).poisson(20, (len(held_out), 30))
    adata.X = scipy.sparse.csr_matrix(dense)
    adata.write_h5ad(folder / "screen.h5ad")
    second = opened(spec, prepare(spec, DataKwargs(), folder / "b.h5ad", genes=8, progress=False))
    assert second.gene_names == first.gene_names and len(first.gene_names) == 8
    other = make_spec(folder, '[fewshot."screen.k562"]\ntest = ["GATA1"]\n')
    with pytest.raises(InputError, match="cells that this split tests"):
        check_gene_selection(second, assign_splits(second.obs, other, control=CONTROL))


# ---- what changed since


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pert_col": "how"}, "data.kwargs.pert_col='gene', but this run asks for 'how'"),
        ({"cell_type_key": None}, "cell_type_key='cell_type', but this run asks for None"),
        ({"batch_col": None}, "batch_col"),
        ({"modality_col": "how"}, "modality_col=None"),
        ({"guide_col": "how"}, "guide_col=None"),
        ({"control_pert": "DMSO"}, "control_pert"),
        ({"embed_key": "X_hvg"}, "embed_key=None"),
        ({"scale": "log1p"}, "scale='auto'"),
        ({"target_sum": 1e6}, "target_sum=10000.0"),
    ],
)
def test_other_settings_are_refused(screen, change, message):
    _, spec, path = screen
    with pytest.raises(InputError) as caught:
        opened(spec, path, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(opened(spec, path, scale="counts", num_workers=3, basal_mapping_strategy="batch")) == 400


def test_other_data_sets_are_refused(screen):
    folder, _, path = screen
    with pytest.raises(InputError, match=r"Data set 'sceen' is in the split file .*did you mean 'screen'"):
        opened(make_spec(folder, "", sceen="screen.h5ad"), path)
    make_adata(1).write_h5ad(folder / "more.h5ad")
    with pytest.raises(InputError, match="Data set 'more' is in the split file"):
        opened(make_spec(folder, "", screen="screen.h5ad", more="more.h5ad"), path)
    with pytest.raises(InputError, match="was prepared from screen.h5ad, but data set 'screen' now is more.h5ad"):
        opened(make_spec(folder, "", screen="more.h5ad"), path)


def test_a_source_that_changed_is_refused_and_one_that_moved_is_not(screen, caplog):
    folder, spec, path = screen
    source = folder / "screen.h5ad"
    os.utime(source, ns=(1, 1))
    assert len(opened(spec, path)) == 400, "another time, the same content"
    content = bytearray(source.read_bytes())
    content[-9] ^= 1
    source.write_bytes(content)
    with pytest.raises(InputError, match="screen.h5ad' changed after prepared file 'prepared.h5ad' was made"):
        opened(spec, path)
    source.write_bytes(content + b"x")
    with pytest.raises(InputError, match="changed after"):
        opened(spec, path)
    source.unlink()
    with caplog.at_level(logging.WARNING):
        assert len(opened(spec, path)) == 400
    assert "used unchecked" in caplog.text


def test_a_prepared_file_that_changed_is_refused(screen):
    folder, spec, path = screen

    def changed(function):
        copy = folder / "copy.h5ad"
        copy.unlink(missing_ok=True)
        shutil.copy(path, copy)
        with h5py.File(copy, "r+") as file:
            function(file)
        with pytest.raises(InputError) as caught:
            opened(spec, copy)
        return str(caught.value)

    def swap(file, name):
        file[name][0], file[name][1] = file[name][1], file[name][0]

    assert "changed after it was made" in changed(lambda file: file["X/data"].__setitem__(3, 9.0))
    assert "changed after it was made" in changed(lambda file: swap(file, "obs/_index"))
    assert "changed after it was made" in changed(lambda file: swap(file, "var/_index"))
    assert "changed after it was made" in changed(lambda file: file["obs/perturbation/codes"].__setitem__(0, 1))
    assert "changed after it was made" in changed(lambda file: swap(file, "obs/cell_type/categories"))
    assert "not written by `esm-perturb prepare`" in changed(lambda file: file["uns"].pop("esm_perturb"))
    adata = anndata.read_h5ad(path)
    adata[:50].copy().write_h5ad(folder / "part.h5ad")
    with pytest.raises(InputError, match="changed after it was made"):
        opened(spec, folder / "part.h5ad")


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_truncated_prepared_file_is_one_sentence(screen, share):
    _, spec, path = screen
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match="is the file complete"):
        opened(spec, path)


def test_cut_off_while_open_is_one_sentence(screen):
    _, spec, path = screen
    store = opened(spec, path, memory_gb=1e-9)
    os.truncate(path, 4096)
    with pytest.raises(InputError, match="cut off after it was opened"):
        store.rows(np.arange(400))


def test_a_missing_one_names_the_nearest(screen):
    folder, spec, _ = screen
    with pytest.raises(MissingFileError, match=r"did you mean 'prepared.h5ad'\?"):
        opened(spec, folder / "prepred.h5ad")
    with pytest.raises(InputError, match="not written by `esm-perturb prepare`"):
        opened(spec, folder / "screen.h5ad")


# ---- whole or absent


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_leaves_nothing_half_written(tmp_path, suffix, how):
    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    make_spec(tmp_path)
    script = f"""
        import time
        from esm_perturb.cells import prepare as module
        from esm_perturb.cells.split_file import read_split_toml
        from esm_perturb.core.config import DataKwargs
        write = module._write_rows
        def slow(*arguments):
            write(*arguments)
            print("writing", flush=True)
            time.sleep(60)
        module._write_rows = slow
        module.prepare(read_split_toml("{tmp_path}/split.toml"), DataKwargs(), "{tmp_path}/out{suffix}", progress=False)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.send_signal(how)
    left = {file.name for file in tmp_path.iterdir()} - {"screen.h5ad", "split.toml"}
    assert not (tmp_path / f"out{suffix}").exists()
    assert all(name.startswith(".out.") for name in left) and (how == signal.SIGKILL or not left)


def test_a_source_that_changes_meanwhile_stops_it(tmp_path, monkeypatch):
    from esm_perturb.cells import prepare as module

    make_adata().write_h5ad(tmp_path / "screen.h5ad")
    write = module._write_rows

    def touching(*arguments):
        os.utime(tmp_path / "screen.h5ad", ns=(1, 1))
        write(*arguments)

    monkeypatch.setattr(module, "_write_rows", touching)
    with pytest.raises(InputError, match="changed while it was prepared"):
        prepare(make_spec(tmp_path), DataKwargs(), tmp_path / "out.h5ad", progress=False)
    assert {file.name for file in tmp_path.iterdir()} == {"screen.h5ad", "split.toml"}


def test_an_old_file_is_replaced_by_a_new_one_only(screen):
    folder, spec, path = screen
    before = path.read_bytes()
    for output, message in [(folder / "screen.h5ad", "is a source"), (folder / "out.txt", "must end in")]:
        with pytest.raises(InputError, match=message):
            prepare(spec, DataKwargs(), output, progress=False)
    with pytest.raises(InputError):
        prepare(spec, DataKwargs(), path, genes=["nothing"], progress=False)
    assert path.read_bytes() == before
    prepare(spec, DataKwargs(), path, genes=["GENE3"], progress=False)
    assert opened(spec, path).gene_names == ["GENE3"]


def test_order_is_stable():
    obs = make_adata().obs.rename(columns={"gene": "perturbation", "gem_group": "batch", "how": "modality"})
    obs = obs.assign(dataset="d").astype(str).astype("category")
    rows = sorted_rows(obs)
    keys = [(*(str(obs[name].iloc[row]) for name in ORDER), row) for row in rows]
    assert keys == sorted(keys)
