"""Cell sets and their loaders, against brute force, Lightning, other processes and the device."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_perturb.cells import data_module
from esm_perturb.cells.data_module import PerturbationDataModule, ResidentCells
from esm_perturb.cells.sets import SetSampler, group_cells
from esm_perturb.cells.split_file import read_split_toml
from esm_perturb.cells.splits import Splits, assign_splits
from esm_perturb.cells.store import CellStore, store_from_anndata
from esm_perturb.cells.targets import read_targets
from esm_perturb.core.config import DataKwargs, InputError

DATA = DataKwargs()
CONTROL = DATA.control_pert
COLUMNS = ["dataset", "cell_type", "perturbation", "modality"]
HEAD = '[datasets]\nscreen = "screen.h5ad"\n[training]\nscreen = "train"\n'
HELD_OUT = HEAD + '[zeroshot]\n"screen.hep.g2" = "test"\n[fewshot."screen.k562"]\nval = ["KLF1"]\ntest = ["STAT1"]\n'


def make_adata(
    seed=0, *, n=400, n_genes=15, sparse=True, names=("STAT1", "TP53", "KLF1", "KLF1+TP53")
) -> anndata.AnnData:
    """Random labels over three cell types and three lanes; one perturbation has a single cell."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "gene": np.where(rng.random(n) < 0.3, CONTROL, rng.choice(names, n)),
            "cell_type": rng.choice(["k562", "rpe1", "hep.g2"], n),
            "gem_group": rng.integers(1, 4, n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    obs.iloc[0] = ["LONE1", "rpe1", 1]
    X = rng.poisson(1.0, (n, n_genes)).astype(np.float32)
    X[:, 0] += 1
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    return anndata.AnnData(X=scipy.sparse.csr_matrix(X) if sparse else X, obs=obs, var=var)


def make(folder, text=HEAD, seed=0, *, data=DATA, val_fraction=0.0, **options) -> tuple[CellStore, Splits]:
    """Store and splits of random cells."""
    path = Path(folder) / "splits.toml"
    path.write_text(text)
    store = store_from_anndata(make_adata(seed, **options), data, dataset="screen")
    spec = read_split_toml(path)
    return store, assign_splits(store.obs, spec, control=store.control, val_fraction=val_fraction, seed=seed)


def cells_of(batches) -> list[int]:
    return [cell for batch in batches for cell_set in batch for cell in cell_set.cells.tolist()]


def digest(batches) -> str:
    """SHA-256 over every set of every batch, in order."""
    plain = [[(s.group, s.cells.tolist(), s.controls.tolist()) for s in batch] for batch in batches]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def content(batch: dict) -> dict:
    """A batch as plain data, exact to the bit."""
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


# ---- groups


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("basal", ["random", "batch"])
@pytest.mark.parametrize("dtype", ["object", "category"])
def test_groups_are_what_pandas_groups(tmp_path, seed, basal, dtype):
    """Also where labels are categories that are not in alphabetical order."""
    store, splits = make(tmp_path, HELD_OUT, seed)
    if dtype == "category":
        for column in store.obs:
            labels = sorted(store.obs[column].unique(), reverse=True)
            store.obs[column] = pd.Categorical(store.obs[column], categories=labels)
    plain, columns = store.obs.astype(str), [*COLUMNS, "batch"] if basal == "batch" else COLUMNS
    for split in ("train", "val", "test"):
        groups = group_cells(store, splits, split, basal=basal)
        rows, controls = splits.perturbed_indices(split), splits.control_indices(split)
        expected = {key: rows[at].tolist() for key, at in plain.iloc[rows].groupby(columns).indices.items()}
        found = np.split(groups.cells, np.cumsum(groups.sizes)[:-1])
        assert [part.tolist() for part in found] == [expected[key] for key in sorted(expected)]
        assert [tuple(c) for c in groups.conditions] == [key[:4] for key in sorted(expected)]
        pools = np.split(groups.controls, np.cumsum(groups.pool_sizes)[:-1])
        for key, pool in zip(sorted(expected), groups.pool, strict=True):
            of_type = controls[(plain["cell_type"].iloc[controls] == key[1]).to_numpy()]
            same = [row for row in of_type if basal == "random" or plain["batch"].iloc[row] == key[4]]
            assert sorted(pools[pool]) == sorted(same or of_type)


def test_a_batch_without_controls_takes_those_of_its_cell_type(tmp_path):
    store, _ = make(tmp_path)
    lonely = (store.obs["batch"] == "1") & (store.obs["cell_type"] == "rpe1") & (store.obs["perturbation"] == CONTROL)
    store = store.subset(np.flatnonzero(~lonely))
    splits = assign_splits(store.obs, read_split_toml(tmp_path / "splits.toml"), control=CONTROL, val_fraction=0.0)
    sampler = SetSampler(group_cells(store, splits, "train", basal="batch"), cell_set_len=8, batch_size=4, seed=0)
    labels, fell_back = store.obs[["cell_type", "batch"]].to_numpy(), 0
    for cell_set in (cell_set for batch in sampler for cell_set in batch):
        cell_type, batch = labels[cell_set.cells[0]]
        assert set(labels[cell_set.controls, 0]) == {cell_type}
        if (cell_type, batch) == ("rpe1", "1"):
            fell_back += 1
        else:
            assert set(labels[cell_set.controls, 1]) == {batch}
    assert fell_back


def test_a_context_without_controls_is_refused(tmp_path):
    store, splits = make(tmp_path)
    rows = splits.control_rows["train"]
    splits.control_rows["train"] = rows[(store.obs["cell_type"].iloc[rows] != "rpe1").to_numpy()]
    with pytest.raises(InputError, match="'rpe1' of data set 'screen' has train cells but no train control"):
        group_cells(store, splits, "train")


def test_the_same_gene_by_two_modalities_never_shares_a_set():
    adata = make_adata()
    adata.obs["how"] = np.where(adata.obs["gem_group"] == 1, "CRISPRa", "CRISPRi")
    data = DataKwargs(modality_col="how")
    store = store_from_anndata(adata, data, dataset="screen")
    every = np.full(len(store), "train", dtype=object)
    controls = np.flatnonzero(store.obs["perturbation"] == CONTROL)
    splits = Splits(
        every, pd.DataFrame(), pd.DataFrame(), "", {"train": controls, "val": controls[:0], "test": controls[:0]}
    )
    module = PerturbationDataModule(store, splits, data=data, cell_set_len=16, batch_size=4, seed=0)
    seen = set()
    for sets, batch in zip(module.loader("train").batch_sampler, module.loader("train"), strict=True):
        for number, cell_set in enumerate(sets):
            assert set(store.obs["modality"].iloc[cell_set.cells]) == {batch["modality"][number]}
            seen.add((batch["perturbation"][number], batch["modality"][number]))
    assert {("KLF1+TP53", "CRISPRa"), ("KLF1+TP53", "CRISPRi")} <= seen


# ---- an epoch


def test_sets_of_one_cell_that_no_equal_shares_can_hold_are_refused(tmp_path):
    store, splits = make(tmp_path, n=120)
    groups = group_cells(store, splits, "train", basal="random")
    cells = len(splits.perturbed_indices("train"))
    world_size = next(n for n in (2, 3, 4, 5) if cells % n)
    with pytest.raises(InputError, match="equal shares need; use fewer processes"):
        SetSampler(groups, cell_set_len=1, batch_size=1, seed=0, world_size=world_size)
    assert len(SetSampler(groups, cell_set_len=1, batch_size=1, seed=0)) == cells


@given(
    seed=st.integers(0, 1000),
    cell_set_len=st.integers(2, 40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    basal=st.sampled_from(["random", "batch"]),
    resample=st.booleans(),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_an_epoch_shows_every_training_cell_once(
    tmp_path_factory, seed, cell_set_len, batch_size, world_size, basal, resample
):
    store, splits = make(tmp_path_factory.mktemp("toml"), HEAD, seed, n=120)
    groups = group_cells(store, splits, "train", basal=basal)
    options = {"cell_set_len": cell_set_len, "batch_size": batch_size, "seed": seed, "resample": resample}
    ranks = [SetSampler(groups, **options, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(rank) for rank in ranks]
    wanted = splits.perturbed_indices("train").tolist()
    assert {len(one) for one in batches} == {len(ranks[0])}, "ranks take as many steps"
    assert all(1 <= len(batch) <= batch_size for one in batches for batch in one)
    shown = [set(cells_of(one)) for one in batches]
    assert sum(map(len, shown)) == len(set().union(*shown)), "ranks share cells"
    assert sorted(set().union(*shown)) == wanted
    if not resample:
        assert sorted(cell for one in batches for cell in cells_of(one)) == wanted, "a cell comes twice"
    controls, labels = set(splits.control_indices("train")), store.obs[[*COLUMNS, "batch"]].to_numpy()
    for cell_set in (cell_set for one in batches for batch in one for cell_set in batch):
        members, beside = cell_set.cells, cell_set.controls
        assert 1 <= len(members) == len(beside) <= cell_set_len and (len(members) == cell_set_len or not resample)
        assert {tuple(row) for row in labels[members][:, :4]} == {tuple(groups.conditions[cell_set.group])}
        assert set(beside) <= controls and set(labels[beside, 1]) == set(labels[members, 1])
        if basal == "batch":
            (lane,) = set(labels[members, 4])
            same = {row for row in controls if labels[row, 1] == labels[members[0], 1] and labels[row, 4] == lane}
            assert set(beside) <= same or not same


@pytest.mark.parametrize("seed", range(3))
def test_controls_serve_equally_often(tmp_path, seed):
    """The dealt deck against a count: uses of a cell type's controls differ by one at most, and no set repeats one."""
    store, splits = make(tmp_path, seed=seed)
    sampler = SetSampler(group_cells(store, splits, "train"), cell_set_len=16, batch_size=4, seed=seed)
    sets = [cell_set for batch in sampler for cell_set in batch]
    uses = np.bincount(np.concatenate([cell_set.controls for cell_set in sets]), minlength=len(store))
    controls = splits.control_indices("train")
    for cell_type in ("k562", "rpe1", "hep.g2"):
        of_type = uses[controls[(store.obs["cell_type"].iloc[controls] == cell_type).to_numpy()]]
        assert np.ptp(of_type) <= 1
    uses[controls] = 0
    assert not uses.any(), "a perturbed cell stands among controls"


def test_resampled_sets_hold_all_their_cells_and_nothing_else(tmp_path):
    store, splits = make(tmp_path)
    groups = group_cells(store, splits, "train")
    filled = SetSampler(groups, cell_set_len=64, batch_size=2, seed=5, resample=True)
    masked = SetSampler(groups, cell_set_len=64, batch_size=2, seed=5)
    assert all(len(cell_set.cells) == 64 for batch in filled for cell_set in batch)
    sets = [{frozenset(s.cells.tolist()) for batch in one for s in batch} for one in (filled, masked)]
    assert sets[0] == sets[1]


def test_an_epoch_depends_on_nothing_but_seed_and_epoch(tmp_path):
    store, splits = make(tmp_path)
    groups = group_cells(store, splits, "train")
    options = {"cell_set_len": 8, "batch_size": 2, "seed": 3}
    old, epochs = SetSampler(groups, **options), []
    for epoch in range(4):
        old.set_epoch(epoch)
        epochs.append(list(old))
    sets = [{frozenset(s.cells.tolist()) for batch in epoch for s in batch if len(s.cells) > 3} for epoch in epochs]
    assert all(len(a & b) < len(a) / 20 for i, a in enumerate(sets) for b in sets[:i]), "two epochs share sets"
    torch.manual_seed(0)
    fresh = SetSampler(groups, **options)
    fresh.set_epoch(3)
    assert digest(fresh) == digest(epochs[3])
    for start in range(len(fresh) + 1):
        fresh.set_start(start)
        assert digest(fresh) == digest(epochs[3][start:])
    fresh.set_epoch(3)
    assert digest(fresh) == digest([]), "naming the present epoch again does not rewind it"
    fresh.set_epoch(4)
    fresh.set_epoch(3)
    assert digest(fresh) == digest(epochs[3])
    other = SetSampler(groups, **options | {"seed": 4})
    assert digest(other) != digest(epochs[0])
    fixed = SetSampler(groups, **options, shuffle=False)
    before = digest(fixed)
    fixed.set_epoch(9)
    assert digest(fixed) == before


ELSEWHERE = """
import sys
sys.path.insert(0, {tests!r})
from test_sets import SetSampler, digest, group_cells, make
store, splits = make({folder!r})
sampler = SetSampler(group_cells(store, splits, "train"), cell_set_len=8, batch_size=2, seed=7, rank=1, world_size=2)
sampler.set_epoch(5)
print(digest(sampler))
"""


def test_another_process_draws_the_same_sets(tmp_path):
    code = ELSEWHERE.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    store, splits = make(tmp_path)
    options = {"cell_set_len": 8, "batch_size": 2, "seed": 7, "rank": 1, "world_size": 2}
    sampler = SetSampler(group_cells(store, splits, "train"), **options)
    sampler.set_epoch(5)
    assert done.stdout.split()[-1] == digest(sampler)


# ---- batches


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_cells_that_were_chosen(tmp_path, sparse, workers):
    store, splits = make(tmp_path, HELD_OUT, sparse=sparse)
    data = DataKwargs(num_workers=workers)
    module = PerturbationDataModule(store, splits, data=data, cell_set_len=8, batch_size=3, seed=0)
    whole = store.rows(np.arange(len(store)))
    for split in ("train", "val", "test"):
        loader = module.loader(split)
        for sets, batch in zip(list(loader.batch_sampler), loader, strict=True):
            longest = max(len(cell_set.cells) for cell_set in sets)
            assert batch["control"].shape == batch["perturbed"].shape == (len(sets), longest, 15)
            assert batch["mask"].shape == batch["batch"].shape == (len(sets), longest)
            assert batch["control"].dtype == batch["perturbed"].dtype == torch.float32
            for number, (group, cells, controls) in enumerate(sets):
                condition = module.groups[split].conditions[group]
                assert tuple(batch[column][number] for column in COLUMNS) == tuple(condition)
                rest = longest - len(cells)
                assert batch["mask"][number].tolist() == [True] * len(cells) + [False] * rest
                padding = np.zeros((rest, 15), np.float32)
                assert (batch["perturbed"][number].numpy() == np.concatenate([whole[cells], padding])).all()
                assert (batch["control"][number].numpy() == np.concatenate([whole[controls], padding])).all()
                lanes = [("screen", lane) for lane in store.obs["batch"].iloc[cells]]
                assert [module.batches[i] for i in batch["batch"][number, : len(cells)].tolist()] == lanes
                assert (batch["batch"][number, len(cells) :] == -1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_batches_keep_their_content(tmp_path, workers):
    """Memory serves again only when nothing refers to it: not a batch, nor a tensor or an array of one."""
    store, splits = make(tmp_path)
    data = DataKwargs(num_workers=workers)
    module = PerturbationDataModule(store, splits, data=data, cell_set_len=8, batch_size=3, seed=0)
    loader = module.loader("train")
    expected = [content(batch) for batch in loader]
    assert [content(batch) for batch in list(loader)] == expected
    for part in (lambda batch: batch["perturbed"][0], lambda batch: batch["control"].numpy()[-1]):
        kept = [part(batch) for batch in loader]
        assert [x.tolist() for x in kept] == [
            batch["perturbed"][0] if isinstance(x, torch.Tensor) else batch["control"][-1]
            for x, batch in zip(kept, expected, strict=True)
        ]


def test_memory_of_dropped_batches_is_used_again(tmp_path):
    store, splits = make(tmp_path)
    module = PerturbationDataModule(store, splits, data=DATA, cell_set_len=8, batch_size=3, seed=0)
    dropped = {batch["control"].data_ptr() for batch in module.loader("train")}
    kept = list(module.loader("train"))
    assert len({batch["control"].data_ptr() for batch in kept}) == len(kept) > 10
    assert len(dropped) <= 4


def test_validation_and_test_cover_their_split_in_a_fixed_order(tmp_path):
    store, splits = make(tmp_path, HELD_OUT)
    options = {"cell_set_len": 8, "batch_size": 3, "seed": 0}
    for pad in ("mask", "resample"):
        module = PerturbationDataModule(store, splits, data=DataKwargs(pad=pad), **options)
        for split in ("val", "test"):
            loader = module.loader(split)
            before = [content(batch) for batch in loader]
            loader.batch_sampler.set_epoch(4)
            assert [content(batch) for batch in loader] == before
            assert sorted(cells_of(loader.batch_sampler)) == splits.perturbed_indices(split).tolist()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("free", ["plenty", "scarce"])
def test_resident_cells_give_the_same_batches(tmp_path, monkeypatch, sparse, free):
    """To the bit, in either layout; where neither fits, a sentence says so."""
    store, splits = make(tmp_path, HELD_OUT, sparse=sparse)
    dense = 4 * store.X.shape[0] * store.X.shape[1]
    if sparse:  # a tenth of the values, so that CSR is the smaller one
        X = store.X.toarray()
        store.X = scipy.sparse.csr_matrix(np.where(X > np.quantile(X, 0.9), X, 0))
    if free == "scarce":
        monkeypatch.setattr(data_module, "free_on", lambda device: 2 * dense - 2)
    options = {"cell_set_len": 8, "batch_size": 3, "seed": 0}
    plain = PerturbationDataModule(store, splits, data=DATA, **options)
    resident = PerturbationDataModule(store, splits, data=DataKwargs(resident=True), device="cpu", **options)
    if free == "scarce" and not sparse:
        with pytest.raises(InputError, match="more than half of the .* GB that are free on cpu"):
            resident.loader("train")
        return
    for split in ("train", "val", "test"):
        ours, expected = resident.loader(split), plain.loader(split)
        assert [content(batch) for batch in ours] == [content(batch) for batch in expected]
        assert ours.dataset.resident.layout == ("csr" if free == "scarce" else "dense")
    assert resident.loader("train").dataset.resident is resident.loader("val").dataset.resident


def test_repeated_entries_of_a_sparse_row_add_up_on_the_device(tmp_path, monkeypatch):
    store, _ = make(tmp_path, n=30)
    X = scipy.sparse.csr_matrix((np.float32([1, 2, 4]), [3, 3, 0], [0, 3, *[3] * 29]), shape=store.X.shape)
    store.X = X
    monkeypatch.setattr(data_module, "free_on", lambda device: 4 * X.shape[0] * X.shape[1])
    resident = ResidentCells(store, "cpu")
    assert resident.layout == "csr"
    assert (resident.rows(np.array([1, 0, -1])).numpy() == store.rows(np.array([1, 0, -1]))).all()
    assert X.nnz == 3, "the store's own matrix is left alone"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("budget", ["controls", "nothing"])
@pytest.mark.parametrize("sparse", [True, False])
def test_cells_on_disk_give_the_same_batches(tmp_path, sparse, budget, workers):
    """Whether the controls are held in memory or not; counts are normalised on the way."""
    make_adata(sparse=sparse).write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "splits.toml").write_text(HELD_OUT.replace("screen.h5ad", str(tmp_path / "screen.h5ad")))
    spec = read_split_toml(tmp_path / "splits.toml")
    batches, options = [], {"cell_set_len": 8, "batch_size": 3, "seed": 0}
    for memory_gb in (1.0, 1.6e-5 if budget == "controls" else 1e-9):
        data = DataKwargs(memory_gb=memory_gb, num_workers=workers)
        store = CellStore.from_spec(spec, data)
        assert store.in_memory is (memory_gb == 1.0)
        splits = assign_splits(store.obs, spec, control=CONTROL, seed=0)
        module = PerturbationDataModule(store, splits, data=data, **options)
        if not store.in_memory:
            assert (store.X._held is not None) is (budget == "controls")
        batches.append([content(batch) for split in ("train", "val", "test") for batch in module.loader(split)])
    assert batches[0] == batches[1]
    on_device = PerturbationDataModule(store, splits, data=DataKwargs(resident=True), device="cpu", **options)
    loaders = [on_device.loader(split) for split in ("train", "val", "test")]
    assert [content(batch) for loader in loaders for batch in loader] == batches[0]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("place", "workers"), [("memory", 0), ("memory", 2), ("disk", 0), ("disk", 2), ("device", 0)])
def test_targets_are_the_genes_of_the_perturbed_cells(tmp_path, sparse, place, workers):
    """The sets are those without targets, to the bit, wherever the two matrices lie; padded places are zero."""
    adata = make_adata(sparse=sparse)
    adata.obsm["X_uce"] = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "splits.toml").write_text(HELD_OUT.replace("screen.h5ad", str(tmp_path / "screen.h5ad")))
    spec = read_split_toml(tmp_path / "splits.toml")
    asked = {"num_workers": workers, "memory_gb": 1e-9 if place == "disk" else 1.0, "resident": place == "device"}
    data = DataKwargs(embed_key="X_uce", **asked)
    store = CellStore.from_spec(spec, data)
    targets = read_targets(spec, data, store)
    assert store.in_memory is targets.in_memory is (place != "disk")
    splits = assign_splits(store.obs, spec, control=CONTROL, seed=0)
    options = {"data": data, "cell_set_len": 8, "batch_size": 3, "seed": 0, "device": "cpu"}
    alone = PerturbationDataModule(store, splits, **options)
    both = PerturbationDataModule(store, splits, targets=targets, **options)
    genes = store_from_anndata(make_adata(sparse=sparse), DataKwargs(), dataset="screen").rows(np.arange(400))
    for split in ("train", "val", "test"):
        loader = both.loader(split)
        batches = list(loader)
        assert [content(batch) for batch in alone.loader(split)] == [
            {key: value for key, value in content(batch).items() if key != "genes"} for batch in batches
        ]
        for sets, batch in zip(loader.batch_sampler, batches, strict=True):
            assert batch["genes"].dtype == torch.float32
            for number, cell_set in enumerate(sets):
                padding = np.zeros((batch["mask"].shape[1] - len(cell_set.cells), 15), np.float32)
                expected = np.concatenate([genes[cell_set.cells], padding])
                np.testing.assert_array_equal(batch["genes"][number].numpy(), expected)


def test_targets_of_other_cells_are_refused(tmp_path):
    store, splits = make(tmp_path)
    other = store.subset(np.arange(len(store))[::-1])
    with pytest.raises(InputError, match="not the cells of the store, in its order"):
        PerturbationDataModule(store, splits, data=DATA, cell_set_len=8, batch_size=3, seed=0, targets=other)


def test_resident_cells_and_workers_exclude_each_other(tmp_path):
    store, splits = make(tmp_path)
    data = DataKwargs(resident=True, num_workers=2)
    with pytest.raises(InputError, match="num_workers is 2; set it to 0"):
        PerturbationDataModule(store, splits, data=data, cell_set_len=8, batch_size=3, seed=0)


# ---- Lightning


class Recorder(pl.LightningModule):
    """Remembers every batch; learns nothing; stops after a number of steps."""

    def __init__(self, stop_after: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[object, list] = {}
        self.stop_after = stop_after

    def training_step(self, batch):
        self.seen.setdefault(self.current_epoch, []).append(content(batch))
        return (self.weight * batch["control"].mean()).sum()

    def validation_step(self, batch):
        self.seen.setdefault("val", []).append(content(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAt(pl.Callback):
    """Saves a checkpoint after so many steps, and stops there."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            raise KeyboardInterrupt


def fit(module: PerturbationDataModule, *callbacks, resume=None, **options) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    try:
        trainer.fit(model, module, ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert callbacks
    return model


@pytest.mark.filterwarnings("ignore:Total length of `list`")
@pytest.mark.parametrize("val_fraction", [0.4, 0.0])
def test_lightning_reshuffles_every_epoch(tmp_path, val_fraction):
    store, splits = make(tmp_path, val_fraction=val_fraction)
    module = PerturbationDataModule(store, splits, data=DATA, cell_set_len=8, batch_size=4, seed=0)
    model = fit(module, max_epochs=3)
    assert len(model.seen[0]) == len(module.train_dataloader())
    epochs = []
    for epoch in range(3):
        batches = [(np.array(batch["perturbed"]), np.array(batch["mask"])) for batch in model.seen[epoch]]
        epochs.append([cells[place].sum(0) for x, mask in batches for cells, place in zip(x, mask, strict=True)])
        sampler = module.loader("train").batch_sampler
        sampler.set_epoch(epoch)
        plan = sampler.plan()
        assert sum(int(mask.sum()) for _, mask in batches) == len(plan.cells)
    totals = [np.sum(sets, axis=0) for sets in epochs]
    np.testing.assert_allclose(totals[1:], totals[:-1], rtol=1e-5, err_msg="the same cells in every epoch")
    for a, b in zip(epochs, epochs[1:], strict=False):
        assert not np.allclose(np.sort(a, axis=0), np.sort(b, axis=0)), "in other sets"
    if val_fraction:
        n_val = len(model.seen["val"]) // 3
        assert model.seen["val"][:n_val] == model.seen["val"][n_val : 2 * n_val] == model.seen["val"][2 * n_val :]
    else:
        assert "val" not in model.seen


@pytest.mark.filterwarnings("ignore:Total length of `list`", "ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize(("stop", "workers"), [("inside", 0), ("inside", 2), ("boundary", 0), ("boundary", 2)])
def test_a_resumed_run_sees_what_was_left(tmp_path, stop, workers):
    """Interrupted in the second epoch, or at its end, and gone on in a new trainer: no batch twice, none left out."""
    store, splits = make(tmp_path)
    sizes = {"data": DataKwargs(num_workers=workers), "cell_set_len": 8, "batch_size": 6, "seed": 0}
    module = PerturbationDataModule(store, splits, **sizes)
    length = len(module.loader("train"))
    step = length + 2 if stop == "inside" else 2 * length
    steps = 3 * length + 1
    assert 4 < length < 30
    whole = fit(module, max_steps=steps, max_epochs=-1).seen
    path = tmp_path / "last.ckpt"
    first = fit(PerturbationDataModule(store, splits, **sizes), SaveAt(step, path), max_steps=steps, max_epochs=-1).seen
    second = fit(PerturbationDataModule(store, splits, **sizes), resume=path, max_steps=steps, max_epochs=-1).seen
    expected, found = (
        [batch for run in runs for batches in run.values() for batch in batches] for runs in ([whole], [first, second])
    )
    assert len(expected) == steps
    assert found == expected


def test_resident_cells_train_under_lightning(tmp_path):
    store, splits = make(tmp_path)
    sizes = {"cell_set_len": 8, "batch_size": 6, "seed": 0}
    plain = fit(PerturbationDataModule(store, splits, data=DATA, **sizes), max_epochs=2).seen
    resident = PerturbationDataModule(store, splits, data=DataKwargs(resident=True), **sizes)
    assert fit(resident, max_epochs=2).seen == plain
    assert resident.train_dataloader().dataset.resident.device == torch.device("cpu")
