"""Splits against a reference that looks at one cell at a time, generated splits, the leakage audit, and real data."""

import json
import os
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from esm_perturb.cells.hard_splits import distance_split, embedding_clusters, family_split, nearest_training_genes
from esm_perturb.cells.leakage import audit_leakage
from esm_perturb.cells.make_splits import (
    cell_type_split,
    combination_split,
    make_split,
    random_split,
    read_labels,
)
from esm_perturb.cells.reading import dataset_files
from esm_perturb.cells.similar_proteins import similar_proteins
from esm_perturb.cells.split_file import SplitSpec, canonical_perturbation, read_split_toml
from esm_perturb.cells.split_writer import GeneratedSplit, condition_table, split_toml, toml_key, toml_string
from esm_perturb.cells.splits import assign_splits
from esm_perturb.cells.store import CellStore
from esm_perturb.core.config import DataKwargs, InputError
from esm_perturb.evaluation.audits import audit_sentences, data_section

CONTROL = "control"
SPLITS = ("train", "val", "test")
quick = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))


def make_obs(design, *, n_controls=6, batch=("1", "2"), modality="CRISPRi"):
    """Cells of a design, {(data set, cell type): {perturbation: number of cells}}, controls added to each context."""
    rows = []
    for (dataset, cell_type), perturbations in design.items():
        for name, number in {**perturbations, CONTROL: n_controls}.items():
            rows += [(dataset, cell_type, name, batch[i % len(batch)], modality) for i in range(number)]
    columns = ["dataset", "cell_type", "perturbation", "batch", "modality"]
    return pd.DataFrame(rows, columns=columns, index=[f"cell{i}" for i in range(len(rows))])


def write(folder, text, name="splits.toml"):
    path = Path(folder) / name
    path.write_text(text, encoding="utf-8")
    return path


def few(obs, held_out, *, cell_type="K562", share=False, strict=False, **evidence):
    """The audit of a split that tests these perturbations of one cell type of `screen`."""
    fewshot = {("screen", cell_type): {"val": [], "test": list(held_out)}}
    spec = SplitSpec(dict.fromkeys(obs["dataset"].unique(), "x"), {"screen": "train"}, {}, fewshot, "splits.toml")
    spec = replace(spec, training=dict.fromkeys(obs["dataset"].unique(), "train"))
    splits = assign_splits(obs, spec, control=CONTROL, val_fraction=0, share_controls=share)
    return audit_leakage(obs, splits, strict=strict, **evidence), splits


# ---- every cell where the file puts it


def where(tables, dataset, cell_type, label):
    """Where a TOML file puts one perturbed cell."""
    key = f"{dataset}.{cell_type}"
    if key in tables.get("zeroshot", {}):
        return tables["zeroshot"][key]
    if key in tables.get("fewshot", {}):
        genes = set(label.split("+"))
        for split in ("val", "test"):
            for name in tables["fewshot"][key].get(split, []):
                if {part.strip() for part in name.split("+")} - {CONTROL} == genes:
                    return split
        return "train"
    return "train" if tables.get("training", {}).get(dataset) == "train" else "unused"


DATASETS = ["a", "a.b", "a.b.c", "the screen", "ß/µ"]
CELL_TYPES = ["k562", "b.k562", "hep.g2", "日本", "<i>T</i> cell", 'the "best"', "back\\slash"]
NAMES = ["A", "B", "C&amp;D", "é", "A+B", "A+é", "B+C&amp;D"]


@st.composite
def designs(draw):
    """Cells in one to three data sets, and the tables of a file that names some of them."""
    datasets = draw(st.lists(st.sampled_from(DATASETS), min_size=1, max_size=3, unique=True))
    pairs = [
        (d, c)
        for d in datasets
        for c in draw(st.lists(st.sampled_from(CELL_TYPES), min_size=1, max_size=3, unique=True))
    ]
    keys = [".".join(pair) for pair in pairs]
    assume(len(set(keys)) == len(keys))
    design, zeroshot, fewshot = {}, {}, {}
    for pair, key in zip(pairs, keys, strict=True):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
        design[pair] = {name: draw(st.integers(1, 5)) for name in names}
        table = draw(st.sampled_from(["zeroshot", "fewshot", "fewshot", "none"]))
        if table == "zeroshot":
            zeroshot[key] = draw(st.sampled_from(SPLITS))
        elif table == "fewshot":
            cut, end = sorted(draw(st.lists(st.integers(0, len(names)), min_size=2, max_size=2)))
            spelt = ["+".join(draw(st.permutations(name.split("+")))) for name in names]
            if end:
                fewshot[key] = {"val": spelt[:cut], "test": spelt[cut:end]}
    used = {d for d, c in pairs if f"{d}.{c}" in {**zeroshot, **fewshot}}
    training = {d: "train" for d in datasets if d not in used or draw(st.booleans())}
    return design, {"training": training, "zeroshot": zeroshot, "fewshot": fewshot}


def as_toml(datasets, tables):
    lines = ["[datasets]", *(f"{toml_key(d)} = {toml_string(f'/data/{i}.h5ad')}" for i, d in enumerate(datasets))]
    for table in ("training", "zeroshot"):
        lines += [f"[{table}]", *(f"{toml_key(k)} = {toml_string(v)}" for k, v in tables[table].items())]
    for key, lists in tables["fewshot"].items():
        lines += [f"[fewshot.{toml_key(key)}]"]
        lines += [f"{split} = [{', '.join(map(toml_string, names))}]" for split, names in lists.items()]
    return "\n".join(lines) + "\n"


@given(designs(), st.booleans(), st.integers(0, 5))
@quick
def test_every_cell_is_where_the_file_puts_it(tmp_path_factory, drawn, share, seed):
    design, tables = drawn
    obs = make_obs(design).sample(frac=1, random_state=seed)
    path = write(tmp_path_factory.mktemp("toml"), as_toml(dict.fromkeys(d for d, _ in design), tables))
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    cells = list(zip(obs["dataset"], obs["cell_type"], obs["perturbation"], strict=True))
    expected = [None if label == CONTROL else where(tables, d, c, label) for d, c, label in cells]
    trains = {cells[i][0] for i, split in enumerate(expected) if split == "train"}
    try:
        spec = read_split_toml(path)
        splits = assign_splits(obs, spec, control=CONTROL, val_fraction=0, share_controls=share, seed=seed)
    except InputError as error:
        unclear = "in no split" in str(error) and any(
            name.startswith(other + ".") for name in DATASETS for other in DATASETS
        )
        assert not trains or set(tables["training"]) - trains or unclear, str(error)
        return
    for split in SPLITS:
        assert splits.perturbed_indices(split).tolist() == [i for i, s in enumerate(expected) if s == split]
    for context in design:
        here = [i for i, cell in enumerate(cells) if cell[:2] == context]
        controls = {i for i in here if expected[i] is None}
        present = {expected[i] for i in here} & set(SPLITS)
        got = {split: set(splits.control_indices(split)) & set(here) for split in SPLITS}
        if share:
            assert all(got[s] == (controls if s in present or (s == "train" and present) else set()) for s in SPLITS)
        else:
            assert {s for s in SPLITS if got[s]} == present
            assert sum(map(len, got.values())) == (len(controls) if present else 0)
            assert set().union(*got.values()) == (controls if present else set())


@given(st.integers(0, 10_000), st.floats(0.05, 0.6))
@quick
def test_drawn_validation_leaves_training_everywhere(seed, share):
    design = {
        ("d", "x"): dict.fromkeys("ABCDE", 3),
        ("d", "y"): dict.fromkeys("CDEFG", 3),
        ("e", "x"): {"A": 2, "G+H": 2},
    }
    obs = make_obs(design)
    fewshot = {("d", "x"): {"val": [], "test": ["A"]}}
    spec = SplitSpec({"d": "d", "e": "e"}, {"d": "train", "e": "train"}, {}, fewshot, "f.toml")
    try:
        splits = assign_splits(obs, spec, control=CONTROL, val_fraction=share, seed=seed)
    except InputError as error:
        assert "no perturbed cell" in str(error)
        return
    names = {split: set(obs["perturbation"].iloc[splits.perturbed_indices(split)]) for split in SPLITS}
    assert names["val"] and not names["val"] & names["train"]
    assert len(names["val"]) == max(1, round(share * len(names["val"] | names["train"])))


def test_both_orders_of_a_combination_are_held_out(tmp_path):
    obs = pd.DataFrame({"gene": ["B+A", "A+B", "A+ctrl", "ctrl"] * 5, "cell_type": "K562"}, index=map(str, range(20)))
    anndata.AnnData(np.ones((20, 2), np.float32), obs).write_h5ad(tmp_path / "d.h5ad")
    path = write(tmp_path, '[datasets]\nd = "d.h5ad"\n[training]\nd = "train"\n[fewshot."d.K562"]\ntest = ["A+B"]\n')
    data = DataKwargs(batch_col=None, control_pert="ctrl")
    store = CellStore.from_spec(read_split_toml(path), data)
    splits = assign_splits(store.obs, read_split_toml(path), control="ctrl", val_fraction=0)
    assert splits.perturbed_indices("test").tolist() == [i for i in range(20) if i % 4 < 2]


HEAD = '[datasets]\nd = "d.h5ad"\ne = "e.h5ad"\n[training]\nd = "train"\ne = "train"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[zeroshot]\n"d.X" = "test"', "did you mean 'x'"),
        ('[zeroshot]\n"dd.x" = "test"', "did you mean 'd'"),
        ('[zeroshot]\nd = "test"', "names no cell type"),
        ('[zeroshot]\n"d.only controls" = "val"', "no perturbed cell"),
        ('[zeroshot]\n"d.only controls" = "train"', "no perturbed cell"),
        ('[zeroshot]\n"e.x" = "test"', "'e' is under [training]"),
        ('[fewshot."d.x"]\ntest = ["STAT2"]', "did you mean 'STAT1'"),
        ('[fewshot."d.x"]\nval = ["STAT1"]\ntest = ["A+B", "STAT1"]', "both val and test"),
        ('[fewshot."d.x"]\nval = ["B+A"]\ntest = ["A + B"]', "both val and test"),
        ('[fewshot."d.x"]\nval = []', "names no perturbation"),
        ('[fewshot."d.x"]\ntrain = ["STAT1"]', "only val and test"),
        ('[fewshot."e.x"]\ntest = ["STAT1", "A+B"]', "'e' is under [training]"),
        ('[fewshot."d.x"]\ntest = ["A+control"]', "has no cell"),
        ('[fewshot."d.x"]\ntest = ["control"]', "Control label"),
    ],
)
def test_what_cell_load_passes_over_is_an_error(tmp_path, text, message):
    design = {
        ("d", "x"): {"STAT1": 3, "A+B": 3},
        ("d", "y"): {"STAT1": 3},
        ("d", "only controls"): {},
        ("e", "x"): {"STAT1": 3, "A+B": 3},
    }
    with pytest.raises(InputError) as caught:
        assign_splits(make_obs(design), read_split_toml(write(tmp_path, HEAD + text)), control=CONTROL)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_dotted_key_means_the_context_that_exists(tmp_path):
    text = '[datasets]\na = "a.h5ad"\n"a.b" = "b.h5ad"\n[training]\na = "train"\n"a.b" = "train"\n'
    spec = read_split_toml(write(tmp_path, text + '[fewshot."a.b.c"]\ntest = ["A"]\n'))
    cells = dict.fromkeys("ABC", 2)
    for contexts, tested in (
        ([("a", "b.c"), ("a.b", "d")], ("a", "b.c")),
        ([("a", "d"), ("a.b", "c")], ("a.b", "c")),
    ):
        obs = make_obs(dict.fromkeys(contexts, cells))
        test = obs.iloc[assign_splits(obs, spec, control=CONTROL).perturbed_indices("test")]
        assert set(zip(test["dataset"], test["cell_type"], strict=True)) == {tested}
    with pytest.raises(InputError, match="rename a data set"):
        assign_splits(make_obs(dict.fromkeys([("a", "b.c"), ("a.b", "c")], cells)), spec, control=CONTROL)


def test_the_documented_examples_run_as_they_stand(tmp_path):
    obs = make_obs({("replogle_k562", "K562"): dict.fromkeys(["A", "B", "C", "D"], 4)})
    head = '[datasets]\nreplogle_k562 = "k.h5ad"\n[training]\nreplogle_k562 = "train"\n'
    for text, n_test in (
        ('[fewshot."replogle_k562.K562"]\ntest = ["A"]\n', 1),
        ("", 0),
        ('[fewshot."replogle_k562.K562"]\nval = []\ntest = ["A"]', 1),
    ):
        splits = assign_splits(obs, read_split_toml(write(tmp_path, head + text)), control=CONTROL)
        assert splits.table["perturbations"].to_dict() == {"train": 3 - n_test, "val": 1, "test": n_test}


def test_files_folders_and_globs(tmp_path):
    names = ["one/a.h5ad", "one/b.h5ad", "two/a.h5ad", "two/c.h5ad", "c[1].h5ad"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        obs = pd.DataFrame({"gene": ["A", "B", CONTROL] * 3, "cell_type": f"t.{number}"}, index=map(str, range(9)))
        anndata.AnnData(np.full((9, 2), number, np.float32), obs).write_h5ad(tmp_path / name)
    path = write(
        tmp_path,
        '[datasets]\nfolder = "one"\n"gl.ob" = "two/*.h5ad"\nbraces = "{one,two}/a.h5ad"\nfile = "c[1].h5ad"\n'
        '[training]\nfolder = "train"\n"gl.ob" = "train"\nbraces = "train"\nfile = "train"\n'
        '[zeroshot]\n"gl.ob.t.2" = "test"\n"folder.t.1" = "val"\n',
    )
    spec = read_split_toml(path)
    assert [len(dataset_files(location)) for location in spec.datasets.values()] == [2, 2, 2, 1]
    obs, _ = read_labels(spec.datasets, DataKwargs(batch_col=None, control_pert=CONTROL))
    splits = assign_splits(obs, spec, control=CONTROL)
    for row, (dataset, cell_type, name) in enumerate(
        zip(obs["dataset"], obs["cell_type"], obs["perturbation"], strict=True)
    ):
        if name != CONTROL:
            expected = {"gl.ob.t.2": "test", "folder.t.1": "val"}.get(f"{dataset}.{cell_type}", "train")
            assert splits.labels[row] == expected


# ---- the written file


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@given(texts)
@quick
def test_any_text_survives_toml(text):
    assert tomllib.loads(f"{toml_key(text)} = {toml_string(text)}") == {text: text}
    assert tomllib.loads(f"[fewshot.{toml_key(text)}]\ntest = [\n    {toml_string(text)},\n]") == {
        "fewshot": {text: {"test": [text]}}
    }


@given(st.data())
@quick
def test_a_generated_file_says_what_the_table_says(tmp_path_factory, data):
    labels = (
        st.text(st.characters(codec="utf-8", exclude_characters="+"), min_size=1, max_size=6)
        .map(str.strip)
        .filter(bool)
    )
    contexts = data.draw(st.lists(st.tuples(labels, labels), min_size=1, max_size=3, unique_by=".".join))
    assume(not any(a[0].startswith(b[0] + ".") for a in contexts for b in contexts))
    names = data.draw(st.lists(labels.filter(lambda name: name != CONTROL), min_size=4, max_size=8, unique=True))
    obs = make_obs({context: dict.fromkeys(names, 2) for context in contexts})
    split = random_split(obs, control=CONTROL, val=0.25, test=0.25, seed=data.draw(st.integers(0, 99)))
    path = split.write(
        tmp_path_factory.mktemp("toml") / "made.toml", {name: f"/data/{i}" for i, (name, _) in enumerate(contexts)}
    )
    again = assign_splits(obs, read_split_toml(path), control=CONTROL, val_fraction=0)
    found = obs.assign(split=again.labels)[obs["perturbation"] != CONTROL].drop_duplicates(
        ["dataset", "cell_type", "perturbation"]
    )
    both = split.table.merge(found, on=["dataset", "cell_type", "perturbation"])
    assert len(both) == len(split.table) and (both["split_x"] == both["split_y"]).all()


# ---- generators

GENES = [f"{family}{number}" for family in ("DUSP", "KLF", "MAPK", "STAT", "TP") for number in (1, 2, 3)]


@st.composite
def screens(draw):
    """Singles and pairs in two cell types, not all of them in both."""
    names = draw(st.lists(st.sampled_from(GENES), min_size=6, max_size=15, unique=True))
    pairs = draw(st.lists(st.tuples(st.sampled_from(GENES), st.sampled_from(GENES)), max_size=12))
    names += sorted({canonical_perturbation("+".join(pair)) for pair in pairs if pair[0] != pair[1]})
    other = draw(st.lists(st.sampled_from(names), min_size=3, unique=True))
    return make_obs({("screen", "K562"): dict.fromkeys(names, 2), ("screen", "RPE1"): dict.fromkeys(other, 1)})


def draw_kind(kind, obs, seed, val, test, cell_types):
    vectors = {
        gene: np.random.default_rng([i // 3, 7]).normal(size=6) + 0.1 * np.random.default_rng(i).normal(size=6)
        for i, gene in enumerate(GENES)
    }
    shares = {"control": CONTROL, "val": val, "test": test, "cell_types": cell_types}
    if kind == "random":
        return random_split(obs, seed=seed, **shares)
    if kind == "family":
        return family_split(obs, {gene: gene.rstrip("123") for gene in GENES}, seed=seed, **shares)
    if kind == "distance":
        return distance_split(obs, vectors, **shares)
    return combination_split(obs, seed=seed, seen=int(kind), **shares)


@pytest.mark.parametrize("kind", ["random", "family", "distance", "2", "1", "0"])
@given(
    obs=screens(),
    seed=st.integers(0, 999),
    val=st.sampled_from([0, 0.1, 0.3]),
    test=st.floats(0.05, 0.5),
    only=st.booleans(),
)
@settings(quick, max_examples=40)
def test_generated_splits(kind, obs, seed, val, test, only):
    cell_types = ["K562"] if only else []
    try:
        split = draw_kind(kind, obs, seed, val, test, cell_types)
    except InputError as error:
        assert "\n" not in str(error)
        return
    table = split.table
    pd.testing.assert_frame_equal(table, draw_kind(kind, obs, seed, val, test, cell_types).table)
    keys = ["dataset", "cell_type", "perturbation", "n_cells"]
    pd.testing.assert_frame_equal(table[keys], condition_table(obs, CONTROL)[keys])
    assert {"train", "test"} | ({"val"} if val else set()) == set(table["split"])
    held = table[table["split"] != "train"]
    assert not only or set(held["cell_type"]) == {"K562"}
    chosen = table[table["cell_type"] == "K562"] if only else table
    assert (chosen.groupby("perturbation")["split"].nunique() == 1).all()
    by_name = dict(zip(chosen["perturbation"], chosen["split"], strict=True))
    train = {name for name, where in by_name.items() if where == "train"}
    trained_genes = {gene for name in train for gene in name.split("+")}
    if kind == "random":
        wanted = max(1, round(test * len(by_name)))
        assert len(split.names("test")) == wanted
    elif kind in ("family", "distance"):
        out = dict(zip(split.genes["gene"], split.genes["split"], strict=True))
        assert not {gene for gene, where in out.items() if where != "train"} & trained_genes
        for name, where in by_name.items():
            assert where == min((out[gene] for gene in name.split("+")), key=["test", "val", "train"].index)
        if kind == "family":
            assert (split.genes.groupby("family")["split"].nunique() == 1).all()
    else:
        pairs = {name: set(name.split("+")) for name in by_name if "+" in name}
        seen = {name: len(genes & train) for name, genes in pairs.items() if genes & trained_genes <= train}
        counted = chosen.dropna(subset="seen")
        assert dict(zip(counted["perturbation"], counted["seen"], strict=True)) == seen
        for where in ("test", "val") if val else ("test",):
            wanted = [name for name in seen if by_name[name] == where and seen[name] == int(kind)]
            assert wanted
            unseen = {gene for name in wanted for gene in pairs[name]} - train
            assert len(unseen) >= 2 - int(kind) and not unseen & trained_genes
            if kind == "2":
                assert all("+" in name for name in split.names(where))
            if kind == "1":
                assert not any(genes <= unseen for genes in pairs.values())


@pytest.mark.parametrize("seed", range(10))
def test_with_one_seen_gene_no_pair_has_two_unseen_ones(seed):
    names = [*"ABCDEFGH", "A+B", "B+C", "C+D", "D+E", "E+F", "F+G", "G+H", "A+H"]
    obs = make_obs({("screen", "K562"): dict.fromkeys(names, 2)})
    split = combination_split(obs, control=CONTROL, seen=1, val=0.2, test=0.5, seed=seed)
    held = split.table[split.table["split"] != "train"]
    assert set(held["seen"].dropna()) == {1} and len(split.names("test")) > 3


def test_the_farthest_cluster_is_tested_and_its_neighbour_named():
    rng = np.random.default_rng(0)
    vectors = {f"G{i}": rng.normal(size=8) + [5, 0, 0, 0, 0, 0, 0, 0] for i in range(18)}
    vectors |= {f"FAR{i}": np.array([-40, 0, 0, 0, 0, 0, 0, 0]) + 0.1 * rng.normal(size=8) for i in range(3)}
    obs = make_obs({("d", "x"): dict.fromkeys(vectors, 2)})
    split = distance_split(obs, vectors, control=CONTROL, val=0, test=3 / 21)
    assert split.names("test") == ["FAR0", "FAR1", "FAR2"]
    centred = {gene: vector - np.mean(list(vectors.values()), axis=0) for gene, vector in vectors.items()}
    for row in split.genes.query("split == 'test'").itertuples():
        a = centred[row.gene]
        cosine = {g: b @ a / np.linalg.norm(a) / np.linalg.norm(b) for g, b in centred.items() if g.startswith("G")}
        assert row.nearest == max(cosine, key=cosine.get) and row.similarity == pytest.approx(max(cosine.values()))


@given(st.integers(0, 999))
@settings(quick, max_examples=20)
def test_clusters_come_in_the_order_of_their_nearness(seed):
    rng = np.random.default_rng(seed)
    vectors = {f"G{i}": value for i, value in enumerate(np.repeat(rng.normal(size=(6, 5)), 3, axis=0))}
    vectors = {gene: value + 0.3 * rng.normal(size=5) for gene, value in vectors.items()}
    mean = np.mean(list(vectors.values()), axis=0)
    unit = {gene: (value - mean) / np.linalg.norm(value - mean) for gene, value in vectors.items()}
    clusters = embedding_clusters(vectors, 6)
    assert sorted(gene for cluster in clusters for gene in cluster) == sorted(vectors)
    nearness = [max(unit[a] @ unit[b] for a in c for b in set(vectors) - set(c)) for c in clusters]
    assert len(clusters) == 6 and (np.diff(nearness) > -1e-4).all()


def test_a_hard_split_is_harder_than_a_random_one():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=(40, 16)), 4, axis=0) + 0.5 * rng.normal(size=(160, 16))
    vectors = {f"G{i}": value for i, value in enumerate(values)}
    obs = make_obs({("d", "x"): dict.fromkeys(vectors, 1)})
    similar = []
    for split in (random_split(obs, control=CONTROL), distance_split(obs, vectors, control=CONTROL)):
        similar.append(
            nearest_training_genes(vectors, split.names("test"), split.names("train"))["similarity"].median()
        )
    assert similar[1] < similar[0] - 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda obs: random_split(obs, control=CONTROL, test=0.9), "val + test < 1"),
        (lambda obs: random_split(obs, control=CONTROL, test=0), "Shares must be"),
        (lambda obs: random_split(obs[obs["perturbation"].isin(["A", "B", CONTROL])], control=CONTROL), "too few"),
        (lambda obs: random_split(obs, control=CONTROL, cell_types=["K56"]), "did you mean 'K562'"),
        (lambda obs: combination_split(obs, control=CONTROL), "is a pair"),
        (lambda obs: cell_type_split(obs, control=CONTROL, cell_types=["K562"]), "train split"),
        (lambda obs: cell_type_split(obs, control=CONTROL), "1 cell types are too few"),
        (lambda obs: family_split(obs, {"A": "1"}, control=CONTROL), "3 of 4 perturbed genes have no family: B, C, D"),
        (lambda obs: family_split(obs, dict.fromkeys("ABCD", "1"), control=CONTROL), "can be held out"),
        (lambda obs: distance_split(obs, {"A": np.ones(2)}, control=CONTROL), "have no embedding"),
    ],
)
def test_impossible_requests_are_refused(make, message):
    with pytest.raises(InputError) as caught:
        make(make_obs({("d", "K562"): dict.fromkeys("ABCD", 2)}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def screen_on_disk(folder, *, spelt=("A+ctrl", "C+ctrl", "ctrl+D", "D+C", "A+B", "B+ctrl", "E+ctrl", "ctrl")):
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(list(spelt) * 12),
            "cell_type": pd.Categorical(np.repeat(["K562", "hep.g2"], 6 * len(spelt))),
        }
    )
    obs["gem_group"] = pd.Categorical(np.where(np.arange(len(obs)) % 2, "1", "2"))
    obs.index = [f"c{i}" for i in range(len(obs))]
    X = np.random.default_rng(0).poisson(1.0, (len(obs), 12)).astype(np.float32)
    anndata.AnnData(X, obs).write_h5ad(Path(folder) / "screen.h5ad")
    return write(folder, '[datasets]\nscreen = "screen.h5ad"\n', "data.toml")


def test_a_file_is_made_whole_or_not_at_all(tmp_path):
    toml, data = screen_on_disk(tmp_path), DataKwargs(control_pert="ctrl")
    split = make_split("random", toml, tmp_path / "made.toml", data=data, test=0.3)
    text = (tmp_path / "made.toml").read_text()
    assert text.startswith("# Made by esm_perturb") and '# kind: "random"' in text and "# seed: 42" in text
    tables = tomllib.loads(text)
    assert tables["datasets"]["screen"] == str((tmp_path / "screen.h5ad").resolve())
    listed = {name for lists in tables["fewshot"].values() for names in lists.values() for name in names}
    assert listed <= set(anndata.read_h5ad(tmp_path / "screen.h5ad").obs["gene"]), "spelt as in the data"
    assert {canonical_perturbation(name, control="ctrl") for name in listed} == set(
        split.names("val") + split.names("test")
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="control cells for"):
        few_controls = anndata.read_h5ad(tmp_path / "screen.h5ad")
        few_controls = few_controls[
            (few_controls.obs["gene"] != "ctrl") | (np.arange(few_controls.n_obs) % 48 == 7)
        ].copy()
        few_controls.write_h5ad(tmp_path / "screen.h5ad")
        make_split("random", toml, tmp_path / "other.toml", data=data)
    assert sorted(tmp_path.iterdir()) == before


CELL_LOAD = """
import json, logging, sys
from cell_load.data_modules import PerturbationDataModule
logging.disable(logging.CRITICAL)
module = PerturbationDataModule(sys.argv[1], batch_size=2, num_workers=0, control_pert="ctrl", cell_sentence_len=4)
module.setup()
found = {}
for split, subsets in (("train", module.train_datasets), ("val", module.val_datasets), ("test", module.test_datasets)):
    for subset in subsets:
        cache = subset.dataset.metadata_cache
        for row in subset.indices:
            pert = cache.pert_categories[cache.pert_codes[row]]
            if pert != "ctrl":
                found.setdefault(f"{cache.cell_type_categories[cache.cell_type_codes[row]]}|{pert}", []).append(split)
print(json.dumps({key: sorted(set(splits)) for key, splits in found.items()}))
"""


@pytest.mark.parametrize("kind", ["random", "cell_type", "combinations"])
def test_cell_load_reads_the_same_split(tmp_path, kind):
    python = os.environ.get("CELL_LOAD_PYTHON")
    if not python:
        pytest.skip("CELL_LOAD_PYTHON names no interpreter that has cell-load")
    toml, data = screen_on_disk(tmp_path), DataKwargs(control_pert="ctrl")
    options = {"cell_types": ["hep.g2"]} if kind == "cell_type" else {"val": 0, "test": 0.4}
    split = make_split(kind, toml, tmp_path / "made.toml", data=data, **options)
    done = subprocess.run(
        [python, "-c", CELL_LOAD, tmp_path / "made.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for key, splits in json.loads(done.stdout.splitlines()[-1]).items():
        cell_type, label = key.split("|")
        found.setdefault((cell_type, canonical_perturbation(label, control="ctrl")), set()).update(splits)
    table = split.table
    assert found == {
        (c, p): {s} for c, p, s in zip(table["cell_type"], table["perturbation"], table["split"], strict=True)
    }


# ---- similar proteins


def edits(first, second):
    """Levenshtein's distance by the textbook's table."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(st.integers(0, 10_000), st.sampled_from([0.8, 0.9, 0.95, 1.0]), st.integers(5, 120))
@settings(quick, max_examples=30)
def test_no_similar_pair_is_missed(seed, identity, size):
    rng = np.random.default_rng(seed)
    ancestors = [rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size) for _ in range(2)]
    proteins = {}
    for number in range(16):
        letters = ancestors[number % 2].copy().tolist()
        for place in rng.integers(0, size, rng.integers(0, size // 6 + 2)):
            letters[place] = rng.choice(["A", "", "WW"])
        proteins[f"G{number}"] = "".join(letters) or "M"
    got = similar_proteins(proteins, proteins, identity=identity)
    for a, one in proteins.items():
        for b, other in proteins.items():
            same = 1 - edits(one, other) / max(len(one), len(other))
            listed = ((got["first"] == a) & (got["second"] == b)).any()
            assert listed == (a != b and same >= identity - 1e-9)


# ---- leakage


@pytest.fixture
def screen():
    """Two cell types, five singles and a pair in each; batches of their own for each perturbation, and expression."""
    names = dict.fromkeys(["A", "B", "C", "D", "E", "A+B"], 6)
    obs = make_obs({("screen", "K562"): names, ("screen", "RPE1"): {"F": 6, "G": 6}}, n_controls=12)
    obs["guide"] = np.where(obs["perturbation"] == CONTROL, "", obs["perturbation"] + "-g")
    X = np.random.default_rng(0).poisson(2.0, (len(obs), 40)).astype(np.float32)
    return obs, X


PROTEINS = {
    gene: "".join(np.random.default_rng(i).choice(list("ACDEFGHIKLMNPQRSTVWY"), 80)) for i, gene in enumerate("ABCDEFG")
}


def row(audit, check, between="train–test"):
    return audit.table[(audit.table["check"] == check) & (audit.table["between"] == between)].iloc[0]


def test_a_clean_split_is_silent(screen):
    obs, X = screen
    audit, _ = few(obs, ["C", "D"], sequences=PROTEINS, rows=lambda rows: X[rows], strict=True)
    assert (audit.table["severity"] == "info").all()
    assert audit.raise_if_leaking() is audit and len(audit.conditions) == 2
    assert set(audit.table.loc[audit.table["shared"] > 0, "check"]) == {"cells in known batches"}
    assert audit_sentences(audit) == audit_sentences(audit.conditions)


def test_a_split_without_test_is_audited(screen):
    obs, X = screen
    splits = assign_splits(obs, SplitSpec({"screen": "x"}, {"screen": "train"}, {}, {}, "f"), control=CONTROL)
    audit = audit_leakage(obs, splits, sequences=PROTEINS, rows=lambda rows: X[rows]).raise_if_leaking()
    assert len(audit.conditions) == 0 and "shared" in audit.summary()


def test_trained_test_cells_are_found(screen):
    obs, _ = screen
    _, splits = few(obs, ["C"])
    labels = splits.labels.copy()
    labels[np.flatnonzero(obs["perturbation"] == "C")[0]] = "train"
    audit = audit_leakage(obs, replace(splits, labels=labels))
    assert row(audit, "test conditions")[["shared", "of", "severity"]].tolist() == [1, 1, "error"]
    with pytest.raises(InputError, match="C in K562 of screen"):
        audit.raise_if_leaking()
    assert audit_sentences(audit)[0].startswith("LEAK")


@pytest.mark.parametrize("kind", ["perturbed", "control"])
def test_twin_cells_are_found(screen, kind):
    obs, X = screen
    _, splits = few(obs, ["C"])
    rows = [splits.perturbed_indices, splits.control_indices][kind == "control"]
    X[rows("train")[1]] = X[rows("test")[0]]
    audit, _ = few(obs, ["C"], rows=lambda rows: X[rows])
    assert row(audit, "cells")[["shared", "severity"]].tolist() == [1, "error"]
    X[rows("test")[0], 5:] = X[rows("train")[1], 5:] = 0
    assert row(few(obs, ["C"], rows=lambda rows: X[rows])[0], "cells")["shared"] == 0, "too few values to tell"


def test_repeated_barcodes_need_expression_to_be_judged(screen):
    obs, X = screen
    names = [f"screen/lane{i // 24}/AAAC-{i % 24}" for i in range(len(obs))]
    obs = obs.set_axis(names)
    assert row(few(obs, ["E"])[0], "cell names")["severity"] == "warning"
    audit, splits = few(obs, ["E"], rows=lambda rows: X[rows])
    assert row(audit, "cell names")["severity"] == "info" and row(audit, "cell names")["shared"] > 0
    test = splits.perturbed_indices("test")[0]
    X[np.flatnonzero([name.endswith(names[test].split("/")[-1]) for name in names])] = X[test]
    assert row(few(obs, ["E"], rows=lambda rows: X[rows])[0], "cells")["severity"] == "error"


@pytest.mark.parametrize("evidence", ["spelling", "protein", "embedding"])
def test_a_second_name_of_a_tested_gene_is_found(screen, evidence):
    obs, _ = screen
    obs["perturbation"] = obs["perturbation"].replace({"D": "c " if evidence == "spelling" else "CC"}).str.strip()
    obs["perturbation"] = obs["perturbation"].replace({"c": "c"})
    facts = {
        "spelling": {},
        "protein": {"sequences": {"C": PROTEINS["C"], "CC": PROTEINS["C"].lower() + "*"}},
        "embedding": {"vectors": {"C": np.ones(4, np.float32), "CC": np.ones(4), "A": np.zeros(4), "B": np.zeros(4)}},
    }[evidence]
    with pytest.raises(InputError, match="C = (c|CC) in K562"):
        few(obs, ["C"], **facts)[0].raise_if_leaking()
    if evidence != "spelling":
        few(obs, ["C"])[0].raise_if_leaking()
        few(obs, ["A"], vectors={"A": np.zeros(4), "B": np.zeros(4)})[0].raise_if_leaking()


def test_names_are_matched_inside_combinations(screen):
    obs, _ = screen
    obs["perturbation"] = obs["perturbation"].replace({"D": "B+a"})
    with pytest.raises(InputError, match=r"A\+B = B\+a"):
        few(obs, ["A+B"])[0].raise_if_leaking()


def test_similar_proteins_are_told(screen):
    obs, _ = screen
    near = PROTEINS["C"][:40] + "W" + PROTEINS["C"][41:]
    audit, _ = few(obs, ["C"], sequences=PROTEINS | {"E": near, "F": near})
    audit.raise_if_leaking()
    assert row(audit, "proteins ≥ 90% identical")[["shared", "examples", "severity"]].tolist() == [
        1,
        "C ~ E 99%",
        "warning",
    ]
    assert row(audit, "proteins ≥ 90% identical, elsewhere")["severity"] == "info"
    assert audit.proteins["same_context"].tolist() == [True, False]


def test_where_else_a_test_perturbation_trains(screen):
    obs, _ = screen
    obs.loc[obs["perturbation"] == "F", "perturbation"] = "C"
    other = (
        obs[obs["cell_type"] == "K562"]
        .assign(dataset="second")
        .set_axis([f"x{i}" for i in range((obs["cell_type"] == "K562").sum())])
    )
    audit, _ = few(obs, ["C"])
    audit.raise_if_leaking()
    assert row(audit, "other cell types")[["shared", "severity"]].tolist() == [1, "info"]
    assert "1 of 1 test perturbations train in other cell types" in " ".join(audit_sentences(audit))
    with pytest.raises(InputError, match="C in RPE1"):
        few(obs, ["C"], strict=True)[0].raise_if_leaking()
    audit, _ = few(pd.concat([obs, other]), ["C"])
    assert row(audit, "same cell type, other data set")[["shared", "severity"]].tolist() == [1, "warning"]
    assert any("Warning" in sentence for sentence in audit_sentences(audit))


def test_doses_of_one_perturbation_are_shared_once(screen):
    obs, _ = screen
    obs.loc[obs["perturbation"].isin(["F", "G"]), "perturbation"] = "C"
    rows = np.flatnonzero(obs["perturbation"] == "C")
    obs.loc[obs.index[rows], "modality"] = [f"compound@{1 + i % 4}" for i in range(len(rows))]
    audit, _ = few(obs, ["C", "D"])
    found = row(audit, "other cell types")
    assert found[["shared", "of"]].tolist() == [1, 2]
    assert found["examples"].count("C in RPE1 (compound@") == 4
    assert "other cell types 1 of 2" in audit.summary()
    second = obs[obs["cell_type"] == "K562"].assign(dataset="second")
    audit, _ = few(pd.concat([obs, second.set_axis([f"x{i}" for i in range(len(second))])]), ["C"])
    assert row(audit, "same cell type, other data set")[["shared", "of"]].tolist() == [1, 1]


def test_guides_batches_and_controls(screen):
    obs, _ = screen
    obs.loc[obs["perturbation"] == "D", "guide"] = "C-g"
    obs["batch"] = np.where(obs["perturbation"] == "C", "3", obs["batch"])
    audit, _ = few(obs, ["C"], share=True)
    assert row(audit, "guides")[["shared", "of", "examples", "severity"]].tolist() == [1, 1, "C-g", "warning"]
    assert row(audit, "controls")[["shared", "of", "severity"]].tolist() == [12, 12, "warning"]
    assert row(audit, "cells in known batches")[["shared", "of"]].tolist() == [0, 6]
    renamed = obs.assign(perturbation=obs["perturbation"].replace({"C": "C_sg1", "D": "C_sg2"}))
    assert row(few(renamed, ["C_sg1"])[0], "guides as perturbations")[["shared", "severity"]].tolist() == [1, "warning"]
    assert row(few(obs, ["C"])[0], "controls")["shared"] == 0


def test_the_audit_is_saved_and_shown(screen, tmp_path):
    obs, X = screen
    audit, _ = few(obs, ["C"], sequences=PROTEINS | {"E": PROTEINS["C"]}, rows=lambda rows: X[rows])
    saved = pd.read_csv(audit.save(tmp_path / "leakage.csv"), keep_default_na=False)
    pd.testing.assert_frame_equal(saved, audit.table, check_dtype=False)
    html = data_section(pd.DataFrame(), audit, pd.DataFrame({"cells": [1]}))
    assert "C = E in K562" in html and 'aria-label="Similar proteins"' in html


# ---- real data


@pytest.fixture(scope="module")
def realdata():
    folder = Path(os.environ.get("REALDATA") or Path(__file__).parents[2] / "shared" / "data").resolve()
    if not (folder / "perturb_seq").is_dir():
        pytest.skip(f"'{folder}' holds no perturb_seq/; set REALDATA")
    return folder


NORMAN = DataKwargs(pert_col="condition", batch_col=None, modality_col="perturbation_type", control_pert="control")


@pytest.mark.realdata
def test_one_gene_activated_and_repressed(realdata, tmp_path):
    file = realdata / "perturb_seq" / "norman19_mcfaline23.h5ad"
    text = f'[datasets]\nreal = "{file}"\n[training]\nreal = "train"\n[fewshot."real.k562"]\n'
    text += 'test = ["TGFBR2", "MAPK1+CNN1"]\n'
    spec = read_split_toml(write(tmp_path, text))
    store = CellStore.from_spec(spec, NORMAN)
    splits = assign_splits(store.obs, spec, control="control", val_fraction=0)
    raw = anndata.read_h5ad(file).obs
    test = (raw["cell_type"] == "k562") & raw["condition"].isin(["TGFBR2", "CNN1+MAPK1"])
    assert splits.perturbed_indices("test").tolist() == np.flatnonzero(test).tolist()
    audit = audit_leakage(store.obs, splits, rows=store.rows).raise_if_leaking()
    assert row(audit, "other cell types")["examples"] == "TGFBR2 in A172 (CRISPRi), TGFBR2 in T98G (CRISPRi)"
    with pytest.raises(InputError, match="TGFBR2 in A172"):
        audit_leakage(store.obs, splits, strict=True).raise_if_leaking()
    one_context = replace(NORMAN, cell_type_key=None)
    spec = read_split_toml(write(tmp_path, text.replace("real.k562", "real.all")))
    obs, _ = read_labels(spec.datasets, one_context)
    splits = assign_splits(obs, spec, control="control", val_fraction=0)
    assert set(obs["modality"].iloc[splits.perturbed_indices("test")]) == {"CRISPRa", "CRISPRi"}
    audit_leakage(obs, splits, strict=True).raise_if_leaking()


@pytest.mark.realdata
@pytest.mark.parametrize("seen", [2, 1, 0])
def test_combinations_of_norman(realdata, tmp_path, seen):
    file = realdata / "perturb_seq" / "norman19_mcfaline23.h5ad"
    toml = write(tmp_path, f'[datasets]\nreal = "{file}"\n', "data.toml")
    options = {"data": NORMAN, "seen": seen, "val": 0, "test": 0.2, "cell_types": ["k562"]}
    split = make_split("combinations", toml, tmp_path / "made.toml", **options)
    pairs = split.table[(split.table["split"] == "test") & (split.table["seen"] == seen)]["perturbation"]
    train = set(split.table[(split.table["split"] == "train") & (split.table["cell_type"] == "k562")]["perturbation"])
    assert len(pairs) and all(sum(gene in train for gene in pair.split("+")) == seen for pair in pairs)
    listed = {
        name
        for lists in tomllib.loads((tmp_path / "made.toml").read_text())["fewshot"].values()
        for name in lists["test"]
    }
    assert listed <= set(anndata.read_h5ad(file).obs["condition"]), "SET+KLF1 stays SET+KLF1"


@pytest.mark.realdata
def test_cell_lines_and_guides_of_datlinger(realdata, tmp_path):
    file = realdata / "perturb_seq" / "datlinger21_jurkat_counts.h5ad"
    data = DataKwargs(
        pert_col="perturbation",
        cell_type_key="cell_line",
        batch_col="condition",
        guide_col="guide",
        control_pert="control",
    )
    toml = write(tmp_path, f'[datasets]\ndatlinger = "{file}"\n', "data.toml")
    make_split("random", toml, tmp_path / "made.toml", data=data)
    spec = read_split_toml(tmp_path / "made.toml")
    assert list(spec.fewshot) == [("datlinger", "Jurkat cells")]
    store = CellStore.from_spec(spec, data)
    splits = assign_splits(store.obs, spec, control="control")
    audit = audit_leakage(store.obs, splits, rows=store.rows).raise_if_leaking()
    assert row(audit, "guides")[["shared", "of"]].tolist() == [0, 8] and row(audit, "cells")["shared"] == 0
    by_guide = replace(data, pert_col="guide")
    make_split("random", toml, tmp_path / "guides.toml", data=by_guide)
    obs, _ = read_labels(spec.datasets, by_guide)
    splits = assign_splits(obs, read_split_toml(tmp_path / "guides.toml"), control="control")
    assert row(audit_leakage(obs, splits), "guides as perturbations")["severity"] == "warning"


@pytest.mark.realdata
def test_wells_without_a_cell_type(realdata, tmp_path):
    file = realdata / "perturb_seq" / "l1000_knockdown_zscores.h5ad"
    data = DataKwargs(pert_col="perturbation", cell_type_key=None, batch_col=None, control_pert="control")
    toml = write(tmp_path, f'[datasets]\nl1000 = "{file}"\n', "data.toml")
    split = make_split("random", toml, tmp_path / "made.toml", data=data, test=0.25)
    assert split.counts()["perturbations"].to_dict() == {"train": 39, "val": 6, "test": 15}
    spec = read_split_toml(tmp_path / "made.toml")
    assert list(spec.fewshot) == [("l1000", "all")]
    store = CellStore.from_spec(spec, data)
    assert audit_leakage(
        store.obs, assign_splits(store.obs, spec, control="control"), rows=store.rows
    ).raise_if_leaking()
    hairpins = replace(data, pert_col="pert_id")
    with pytest.raises(InputError, match="control"):
        make_split("random", toml, tmp_path / "made.toml", data=hairpins)


@pytest.mark.realdata
def test_sisters_among_human_proteins(realdata):
    from esm_perturb.proteins.sequences import clean_sequence, read_fasta

    human = read_fasta(realdata / "proteins" / "human.fasta.gz")
    genes = ["TUBA1A", "TUBA4A", "TUBG1", "TUBG2", "KLF1", "STAT1", "STAT3", "KLF4", "MYC", "TP53"]
    proteins = {gene: clean_sequence(human[gene]) for gene in genes}
    found = similar_proteins(
        {gene: proteins[gene] for gene in genes[::2]}, {gene: proteins[gene] for gene in genes[1::2]}
    )
    assert set(zip(found["first"], found["second"], strict=True)) == {("TUBA1A", "TUBA4A"), ("TUBG1", "TUBG2")}


def test_a_generated_split_is_written_with_its_head():
    table = condition_table(make_obs({("d", "x"): {"A": 2, "B": 2, 'C"': 2}}), CONTROL).assign(
        split=["test", "train", "train"]
    )
    text = split_toml(GeneratedSplit(table, {"kind": "random", "seed": 3}), {"d": "/x.h5ad", "unused": "/y.h5ad"})
    assert "# seed: 3" in text and "# test: 1 perturbations, 2 cells" in text
    assert tomllib.loads(text)["datasets"] == {"d": "/x.h5ad"}
