"""Tables of gene embeddings: every format to the last bit, hostile files, lookup, and the check of wrong tables."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from esm_perturb.core.config import InputError, MissingFileError
from esm_perturb.core.files import project_root
from esm_perturb.proteins.embedding_space import (
    agreement_difference,
    centred_directions,
    composition_vectors,
    families_by_name,
    family_agreement,
    nearest_neighbours,
    permutation_z,
)
from esm_perturb.proteins.embeddings import GeneEmbeddings, vector_hashes
from esm_perturb.proteins.gene_names import GeneNames, GeneRecord
from esm_perturb.proteins.name_table import NameTable, check_names, name_arrays
from esm_perturb.proteins.sequences import AMINO_ACIDS, read_fasta
from esm_perturb.proteins.table_files import read_table, write_table

SUFFIXES = (".pt", ".safetensors", ".parquet", ".npz", ".h5ad")
FILES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

symbols = st.one_of(
    st.sampled_from(
        ["TP53", "HLA-A", "<script>alert(1)</script>", "a/b", "C:\\x", "1-Mar", "Ωmega", "names", "vectors"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), min_size=1, max_size=12),
).filter(str.strip)
plain_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(
    st.text(max_size=8).filter(lambda key: key not in ("sha256", "notes")), plain_json, max_size=4
)


@st.composite
def tables(draw) -> tuple[list[str], np.ndarray, dict]:
    """Any names, any finite float32 bits (zeros of both signs, subnormals, the largest), any plain record."""
    names = draw(st.lists(symbols, min_size=1, max_size=8, unique=True))
    dim = draw(st.integers(1, 5))
    bits = draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(names) * dim, max_size=len(names) * dim))
    vectors = np.array(bits, dtype=np.uint32).view(np.float32).reshape(len(names), dim)
    return names, np.where(np.isfinite(vectors), vectors, np.float32(-0.0)), draw(records)


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def example(n: int = 20, dim: int = 6, seed: int = 0) -> GeneEmbeddings:
    vectors = np.random.default_rng(seed).normal(size=(n, dim))
    return GeneEmbeddings([f"GENE{index}" for index in range(n)], vectors, {"model": "example"})


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


# Formats


@given(tables(), st.sampled_from(SUFFIXES))
@FILES
def test_every_format_keeps_names_order_bits_and_record(tmp_path, table, suffix):
    names, vectors, record = table
    read = read_table(write_table(tmp_path / f"table{suffix}", names, vectors, record))
    assert list(read.names) == names and same_bits(read.vectors, vectors) and read.record == record


@given(tables(), st.sampled_from([".json", ".pt"]))
@FILES
def test_tensor_and_map_keep_names_order_bits_and_record(tmp_path, table, map_suffix):
    names, vectors, record = table
    path = write_table(tmp_path / "table.pt", names, vectors, record, tmp_path / f"rows{map_suffix}")
    read = read_table(path, tmp_path / f"rows{map_suffix}")
    assert list(read.names) == names and same_bits(read.vectors, vectors) and read.record == record


@given(tables())
@FILES
def test_an_opened_file_is_the_loaded_file(tmp_path, table):
    names, vectors, record = table
    path = GeneEmbeddings(names, vectors, record).save(tmp_path / "table.safetensors")
    opened, loaded = GeneEmbeddings.open(path), GeneEmbeddings.load(path)
    assert list(opened.names) == loaded.names == names and opened.record == loaded.record
    assert same_bits(opened.vectors, loaded.vectors)
    wanted = [*names, *(name.upper() for name in names), *(name.swapcase() for name in names), "not a gene"]
    ours, theirs = (table.lookup(wanted, policy="drop") for table in (opened, loaded))
    pd.testing.assert_frame_equal(ours.report.table, theirs.report.table)
    assert same_bits(ours.vectors, theirs.vectors) and ours.genes == theirs.genes


def test_saving_completes_the_record_with_a_hash_of_each_vector(tmp_path):
    made = example()
    for suffix in SUFFIXES:
        again = GeneEmbeddings.load(made.save(tmp_path / f"a{suffix}"))
        assert again.record == {"model": "example", "vector_sha256": vector_hashes(made.names, made.vectors)}
        assert GeneEmbeddings.load(again.save(tmp_path / f"b{suffix}")).record == again.record
    assert made.record == {"model": "example"}


def test_state_reads_the_pt_as_it_is(tmp_path):
    """cell-load: `torch.load(path)`, the dimension from the first value, vectors stacked."""
    made = example(n=300, dim=64)
    path = made.save(tmp_path / "genes.pt")
    plain = torch.load(path)
    first = next(iter(plain.values()))
    assert list(plain) == made.names and first.shape == (64,) and all(type(name) is str for name in plain)
    assert all(type(vector) is torch.Tensor and vector.dtype == torch.float32 for vector in plain.values())
    assert all(vector.untyped_storage().nbytes() == 4 * 64 for vector in plain.values())
    assert same_bits(torch.stack(list(plain.values())).numpy(), made.vectors)
    torch.save(plain["GENE7"], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4000 and path.stat().st_size < 300 * 64 * 4 + 300 * 600


def test_names_from_numpy_and_pandas_are_plain_text_in_the_file(tmp_path):
    for names in (np.array(["A", "B"]), pd.Index(["A", "B"]), np.array(["A", "B"], dtype=object)):
        path = GeneEmbeddings(list(names), np.eye(2)).save(tmp_path / "genes.pt")
        assert [type(name) for name in torch.load(path)] == [str, str]


def test_parquet_of_a_data_frame_is_read(tmp_path):
    frame = pd.DataFrame(np.arange(6, dtype=np.float32).reshape(2, 3), index=["A", "B"], columns=["e0", "e1", "e2"])
    frame.to_parquet(tmp_path / "index.parquet")
    frame.rename_axis("gene").reset_index().to_parquet(tmp_path / "column.parquet")
    pd.DataFrame({"gene": ["A", "B"], "v": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]}).to_parquet(tmp_path / "list.parquet")
    for name in ("index", "column", "list"):
        read = GeneEmbeddings.load(tmp_path / f"{name}.parquet")
        assert read.names == ["A", "B"] and read.vectors.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "float64" in read.record["notes"][0]


@pytest.mark.parametrize("pattern", ["{}", "esm2_{}", "PC{:02d}", "from 1: {}"])
def test_wide_parquet_takes_its_order_from_the_numbers(tmp_path, pattern):
    first = 1 if "from 1" in pattern else 0
    vectors = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    columns = {pattern.format(number + first): vectors[:, number] for number in range(32)}
    frame = pd.DataFrame({"gene": list("ABCDE")} | {name: columns[name] for name in sorted(columns)})
    frame.to_parquet(tmp_path / "wide.parquet")
    assert same_bits(read_table(tmp_path / "wide.parquet").vectors, vectors)
    frame[1:3].to_parquet(tmp_path / "rows.parquet")  # pandas keeps the numbers of these rows
    assert same_bits(read_table(tmp_path / "rows.parquet").vectors, vectors[1:3])


def test_wide_parquet_with_a_column_that_is_no_dimension_is_refused(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    right = pd.DataFrame(vectors, columns=[str(number) for number in range(32)]).assign(gene=["A", "B", "C"])
    whole = {"7": np.array([1, 2, 3])}
    for change, said in [
        (right.assign(length=[1.0, 2.0, 3.0]), r"\(length\)"),
        (right.assign(n_cells=[1, 2, 3], score=[0.5] * 3), r"\(n_cells, score\)"),
        (right.assign(**whole), r"\(7\)"),
        (right.drop(columns="7"), "no column 7"),
        (right.rename(columns={"7": "dim7"}), r"\(dim7\)"),
        (right.rename(columns={"7": "07", "6": "7"}), "no dimension|no column 6"),
        (right[["gene", "3"]].rename(columns={"3": "x"}), r"\(x\)"),
    ]:
        change.to_parquet(tmp_path / "odd.parquet")
        with pytest.raises(InputError, match=said) as caught:
            GeneEmbeddings.load(tmp_path / "odd.parquet")
        assert "odd.parquet" in one_line(caught)


def test_one_vector_per_gene_is_read_from_npz_and_safetensors(tmp_path):
    from safetensors.numpy import save_file

    vectors = {"TP53": np.ones(3, np.float32), "a/b": np.zeros(3, np.float32)}
    np.savez(tmp_path / "genes.npz", **vectors)
    save_file(vectors, tmp_path / "genes.safetensors")
    for name in ("genes.npz", "genes.safetensors"):
        assert GeneEmbeddings.load(tmp_path / name).lookup(["a/b", "TP53"]).vectors.tolist() == [[0, 0, 0], [1, 1, 1]]
    with pytest.raises(InputError, match="convert it once"):
        GeneEmbeddings.open(tmp_path / "genes.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "stored"),
    [
        ({"A": np.ones(3, np.float32), "B": np.zeros(3, np.float32)}, None),
        ({"A": np.ones(3, np.float64), "B": np.zeros(3, ">f8")}, "float64"),
        ({np.str_("A"): np.ones(3, np.float16), np.str_("B"): np.zeros(3, np.float16)}, "float16"),
        ({"A": [1.0, 1, 1.0], "B": (0.0, 0.0, 0.0)}, "float64"),
        ({"A": torch.ones(3, dtype=torch.bfloat16), "B": torch.zeros(3, dtype=torch.bfloat16)}, "bfloat16"),
        ({"A": torch.nn.Parameter(torch.ones(3)), "B": torch.zeros(6)[::2]}, None),
        ({"A": [np.float64(1), np.float32(1), 1.0], "B": [0.0] * 3}, "float64"),
    ],
)
def test_older_contents_are_read_and_noted(tmp_path, content, stored, legacy):
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
    read = GeneEmbeddings.load(tmp_path / "old.pt")
    assert read.names == ["A", "B"] and read.vectors.tolist() == [[1, 1, 1], [0, 0, 0]]
    notes = read.record.get("notes", [])
    assert (notes == []) if stored is None else (stored in notes[0] and "old.pt" in notes[0])


def test_a_numpy_matrix_and_its_map_are_read(tmp_path):
    for order in ("C", "F"):
        torch.save(np.asarray(np.arange(6.0).reshape(2, 3), order=order), tmp_path / "matrix.pt")
        (tmp_path / "rows.json").write_text('{"B": 1, "A": 0}')
        read = GeneEmbeddings.load(tmp_path / "matrix.pt", tmp_path / "rows.json")
        assert read.names == ["B", "A"] and read.vectors.tolist() == [[3, 4, 5], [0, 1, 2]]


class _Crafted:
    """Pickles as a numpy array of the type and bytes given, as no numpy would write it."""

    def __init__(self, dtype_state: tuple, code: str, data: object, shape: tuple = (1,)):
        self.parts = dtype_state, code, data, shape

    def __reduce__(self):
        state, code, data, shape = self.parts
        make = np._core.multiarray._reconstruct
        return make, (np.ndarray, (0,), b"b"), (1, shape, _CraftedType(code, state), False, data)


class _CraftedType:
    def __init__(self, code: str, state: tuple):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, "x"], dtype=object),
        np.array(["x"]),
        np.ones(3, np.int64),
        np.ones((2, 2)),
        _Crafted((3, "|", None, None, None, -1, -1, 0), "O8", b"\1\2\3\4\5\6\7\10"),  # a pointer for numpy to follow
        _Crafted((3, "<", None, None, None, -1, -1, 0), "f4", bytes(4), (10**12,)),
        _Crafted((3, "<", None, None, None, -1, -1, 0), "f4", bytes(3)),
        _Crafted((3, "?", None, None, None, -1, -1, 0), "f4", bytes(4)),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(2, 2),
        torch.ones(()),
        torch.ones(3).to_sparse(),
        ["a", "b"],
        [],
        None,
        {"B": torch.ones(3)},
    ],
    ids=repr,
)
def test_values_that_are_no_vectors_are_refused(tmp_path, value):
    torch.save({"A": value}, tmp_path / "odd.pt")
    with pytest.raises(InputError) as caught:
        GeneEmbeddings.load(tmp_path / "odd.pt")
    assert "odd.pt" in one_line(caught)


def test_pickles_are_refused_unread_and_told_how_to_convert(tmp_path):
    flag = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (flag.write_text, ("ran",))

    for name in ("genes.pkl", "genes.pickle", "genes.npy"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(InputError, match="torch.save"):
            GeneEmbeddings.load(tmp_path / name)
    for suffix in SUFFIXES:
        (tmp_path / f"genes{suffix}").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(InputError):
            GeneEmbeddings.load(tmp_path / f"genes{suffix}")
    torch.save({"A": Payload()}, tmp_path / "zip.pt")
    torch.save({"A": Payload()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "old.pt"):
        with pytest.raises(InputError, match="if you trust it, rewrite it with torch.save"):
            GeneEmbeddings.load(tmp_path / name)
    np.savez(tmp_path / "objects.npz", names=np.array(["A"]), vectors=np.array([[Payload()]], dtype=object))
    with pytest.raises(InputError, match="Python objects.*np.savez"):
        GeneEmbeddings.load(tmp_path / "objects.npz")
    assert not flag.exists()


def test_a_plain_pickle_named_pt_is_called_one_and_the_advice_works(tmp_path, monkeypatch):
    import numpy

    monkeypatch.chdir(tmp_path)
    for content in (
        {"A": np.ones(2, np.float32)},
        {"A": [1.0, 1.0]},
        {"A": torch.ones(2)},
        {"A": np.array([1, 1], "O")},
    ):
        for protocol in (2, 4, 5):
            Path("FILE.pt").write_bytes(pickle.dumps(content, protocol=protocol))
            with pytest.raises(InputError, match="'FILE.pt' was written with pickle, not torch.save") as caught:
                GeneEmbeddings.load("FILE.pt")
            advice = one_line(caught).split("rewrite it with ")[1].removesuffix(".")
            exec(advice, {"torch": torch, "numpy": numpy, "pickle": pickle, "FILE": "FILE.pt", "NEW_FILE": "NEW.pt"})
            assert GeneEmbeddings.load("NEW.pt").vectors.tolist() == [[1, 1]]
    torch.save({"A": torch.ones(2)}, "old.pt", _use_new_zipfile_serialization=False)
    Path("old.pt").write_bytes(Path("old.pt").read_bytes()[:-5] + b".")
    with pytest.raises(InputError, match="damaged or not a PyTorch file"):
        GeneEmbeddings.load("old.pt")


def test_a_torch_file_that_could_run_code_is_called_that(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"A": Runs()}, tmp_path / "t.pt")
    with pytest.raises(InputError, match="could run code when opened"):
        GeneEmbeddings.load(tmp_path / "t.pt")


def test_equal_tables_are_equal_files(tmp_path):
    for name in ("a", "b"):
        example().save(tmp_path / f"{name}.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("pooling, status", [("mean", "failed"), ("bos", "not checked")])
def test_first_tokens_are_not_held_against_composition(pooling, status):
    """Right tables of BOS vectors often fail the checks that permuted tables of means fail."""
    rng = np.random.default_rng(0)
    proteins = {f"G{i}": "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 80)) for i in range(60)}
    vectors = rng.normal(size=(60, 8)).astype(np.float32)
    table = GeneEmbeddings(list(proteins), vectors, {"model": "example", "settings": {"pooling": pooling}})
    found = table.check(proteins).to_frame().set_index("check")["status"]
    assert found["vectors follow proteins"] == status


def test_genes_on_one_row_of_a_map_are_noted(tmp_path):
    path = write_table(tmp_path / "t.pt", ["A", "B"], np.eye(2), {"notes": ["x"]}, tmp_path / "rows.json")
    assert read_table(path, tmp_path / "rows.json").record == {"notes": ["x"]}
    (tmp_path / "t.pt.json").unlink()
    (tmp_path / "rows.json").write_text('{"A": 0, "B": 1, "C": 0}')
    read = GeneEmbeddings.load(path, tmp_path / "rows.json")
    assert read.vectors.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert read.record["notes"] == ["2 genes of the map share a row of 't.pt' with another gene"]
    again = GeneEmbeddings.load(read.save(tmp_path / "again.npz"))
    assert again.record["notes"] == read.record["notes"]


def test_notes_of_the_record_stay_when_a_file_adds_its_own(tmp_path):
    write_table(tmp_path / "t.pt", ["A"], np.ones((1, 2)), {"notes": ["made by hand"]})
    torch.save({"A": torch.ones(2, dtype=torch.float64)}, tmp_path / "t.pt")
    notes = read_table(tmp_path / "t.pt").record["notes"]
    assert notes[0] == "made by hand" and "float64" in notes[1] and len(notes) == 2


def test_the_advice_on_pickles_works(tmp_path, monkeypatch):
    import numpy

    torch.save({"A": np.array([1, 2], dtype=object)}, tmp_path / "FILE")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").rename(tmp_path / "FILE.pt")
    with pytest.raises(InputError) as caught:
        GeneEmbeddings.load("FILE.pt")
    advice = str(caught.value).split("rewrite it with ")[1].removesuffix(".")
    exec(advice, {"torch": torch, "numpy": numpy, "FILE": "FILE.pt", "NEW_FILE": "NEW.pt"})
    assert GeneEmbeddings.load("NEW.pt").vectors.tolist() == [[1, 2]]


# Damage


@given(st.binary(max_size=300), st.sampled_from((*SUFFIXES, "map")))
@settings(FILES, max_examples=150)
def test_random_bytes_are_refused_in_one_sentence(tmp_path, content, suffix):
    torch.save(torch.zeros(2, 3), tmp_path / "tensor.pt")
    path = tmp_path / (f"noise{suffix}" if suffix != "map" else "noise.json")
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_table(*((path,) if suffix != "map" else (tmp_path / "tensor.pt", path)))
    assert path.name in one_line(caught)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    content = {suffix: example().save(folder / f"t{suffix}").read_bytes() for suffix in SUFFIXES}
    return content | {"record": (folder / "t.pt.json").read_bytes()}


@given(st.sampled_from(SUFFIXES), st.floats(0, 1, exclude_max=True))
@settings(FILES, max_examples=100)
def test_a_file_cut_anywhere_is_refused_in_one_sentence(tmp_path, whole, suffix, share):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[suffix][: int(share * len(whole[suffix]))])
    with pytest.raises(InputError) as caught:
        GeneEmbeddings.load(path)
    assert path.name in one_line(caught)


@given(st.data(), st.sampled_from([suffix for suffix in SUFFIXES if suffix != ".h5ad"]))
@settings(FILES, max_examples=300)
def test_an_altered_file_is_refused_or_unchanged(tmp_path, whole, data, suffix):
    """The right table or none, as long as the record is whole. Not `.h5ad`: altered, it can hang HDF5's library."""
    content = bytearray(whole[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"altered{suffix}"
    path.write_bytes(content)
    (tmp_path / "altered.pt.json").write_bytes(whole["record"])
    try:
        read = GeneEmbeddings.load(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    made = example()
    if "vector_sha256" in read.record:
        assert read.names == made.names and same_bits(read.vectors, made.vectors)


@given(st.data())
@settings(FILES, max_examples=200)
def test_an_altered_index_never_opens_to_a_wrong_gene(tmp_path, whole, data):
    content = bytearray(whole[".safetensors"])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path, made = tmp_path / "altered.safetensors", example()
    path.write_bytes(content)
    try:
        opened = GeneEmbeddings.open(path)
        report = opened.lookup([*made.names, "gene3"], policy="drop").report
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert list(opened.names) == made.names and report.table["matched_as"].tolist() == [*made.names, "GENE3"]


def test_no_single_bit_of_the_index_leads_to_a_wrong_gene(tmp_path, whole):
    """Every third byte in turn: the file is refused, or every name is where it was (opening reads no vectors)."""
    content, made, path = whole[".safetensors"], example(), tmp_path / "flipped.safetensors"
    opened = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        try:
            table = GeneEmbeddings.open(path)
        except InputError:
            continue
        opened += 1
        assert list(table.names) == made.names and [table.names.row(name) for name in made.names] == list(range(20))
        assert table.names.spellings("gene7") == ["GENE7"]
    assert 20 * 6 <= opened < len(content) / 6


def test_values_that_changed_in_an_h5ad_are_refused(tmp_path):
    adata = anndata.read_h5ad(example().save(tmp_path / "genes.h5ad"))
    adata.varm["esm2"][3, 0] += 1
    adata.write_h5ad(tmp_path / "genes.h5ad")
    for read in (lambda: GeneEmbeddings.load(tmp_path / "genes.h5ad"), lambda: GeneEmbeddings.from_varm(adata)):
        with pytest.raises(InputError, match="1 of 20 vectors are not those of the record \\(first: 'GENE3'\\)"):
            read()


def test_a_record_of_other_vectors_is_refused(tmp_path):
    path = example(seed=1).save(tmp_path / "genes.pt")
    example(seed=2).save(tmp_path / "others.pt")
    (tmp_path / "others.pt.json").replace(tmp_path / "genes.pt.json")
    with pytest.raises(InputError, match="describes other vectors"):
        GeneEmbeddings.load(path)
    for content in ("{", "[]", '"x"', "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / "genes.pt.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match="delete it"):
            GeneEmbeddings.load(path)


def test_names_shuffled_against_vectors_are_not_saved_under_the_old_record(tmp_path):
    saved = GeneEmbeddings.load(example().save(tmp_path / "genes.parquet"))
    order = np.random.default_rng(0).permutation(20)
    together = GeneEmbeddings([saved.names[row] for row in order], saved.vectors[order], saved.record)
    assert GeneEmbeddings.load(together.save(tmp_path / "reordered.parquet")).names == together.names
    fewer = GeneEmbeddings(saved.names[:5], saved.vectors[:5], saved.record)
    assert len(GeneEmbeddings.load(fewer.save(tmp_path / "fewer.parquet"))) == 5
    with pytest.raises(InputError, match="the names were permuted or the values changed"):
        GeneEmbeddings(saved.names, saved.vectors[order], saved.record).save(tmp_path / "shuffled.parquet")
    assert not (tmp_path / "shuffled.parquet").exists()


# Names and maps


@pytest.mark.parametrize(
    "names", [["A", ""], ["A", "  "], ["A", "A"], ["A", "B\n"], ["A", "B\0"], ["A", "\ud800"], ["A", 3]]
)
def test_names_that_cannot_be_are_refused(tmp_path, names):
    with pytest.raises(InputError) as caught:
        GeneEmbeddings(names, np.eye(2))
    one_line(caught)


def test_files_with_names_that_cannot_be_are_refused(tmp_path):
    eye = np.eye(2, dtype=np.float32)
    for names, said in ((["A", "A"], "more than once"), (["A", ""], "not empty")):
        for suffix in (".parquet", ".npz", ".h5ad"):
            if suffix == ".h5ad" and names[1] == "A":
                continue  # anndata warns and writes it; read below
            with pytest.raises(InputError, match=said):
                read_table(write_table(tmp_path / f"names{suffix}", names, eye, {}))
    with pytest.raises(InputError, match="more than once"):
        read_table(write_table(tmp_path / "twice.safetensors", ["A", "A"], eye, {}))
    with pytest.raises(InputError, match="more than once"):
        read_table(tmp_path / "twice.safetensors", mmap=True)
    torch.save({"": torch.ones(2)}, tmp_path / "empty.pt")
    torch.save({7: torch.ones(2)}, tmp_path / "number.pt")
    for name in ("empty.pt", "number.pt"):
        with pytest.raises(InputError, match=name):
            GeneEmbeddings.load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"A": 2}', "at row 2, and .* has 2 rows"),
        ('{"A": -1}', "at row -1"),
        ('{"A": true}', "whole numbers"),
        ('{"A": 0.0}', "whole numbers"),
        ('{"A": "0"}', "whole numbers"),
        ('["A", "B"]', "whole numbers"),
        ('{"A": 0, "A": 1}', "lists a gene twice"),
        ("{" * 3000, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"": 0}', "not empty"),
        ("{}", "0 names|no vectors"),
    ],
)
def test_wrong_maps_are_refused(tmp_path, text, said):
    torch.save(torch.eye(2), tmp_path / "tensor.pt")
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        GeneEmbeddings.load(tmp_path / "tensor.pt", tmp_path / "rows.json")
    one_line(caught)


def test_a_row_may_have_two_names_or_none(tmp_path):
    torch.save(torch.arange(6.0).reshape(3, 2), tmp_path / "tensor.pt")
    (tmp_path / "rows.json").write_text('{"B": 2, "A": 0, "A2": 0}')
    read = GeneEmbeddings.load(tmp_path / "tensor.pt", tmp_path / "rows.json")
    assert read.names == ["B", "A", "A2"] and read.vectors.tolist() == [[4, 5], [0, 1], [0, 1]]


@given(st.lists(symbols, min_size=1, max_size=30, unique=True), symbols)
@settings(max_examples=200, deadline=None)
def test_the_name_table_finds_what_a_dictionary_finds(names, other):
    table = NameTable(name_arrays(check_names(names, "x")), "x")
    assert list(table) == names == table[:] and [table.row(name) for name in names] == list(range(len(names)))
    assert table.row(other) == ({name: row for row, name in enumerate(names)}.get(other))
    assert (other in table) == (other in names)
    assume(not other.strip().casefold().startswith("ens"))
    key = other.strip().casefold()
    assert table.spellings(other) == [name for name in names if name.strip().casefold() == key]


def test_names_with_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr("esm_perturb.proteins.name_table._hash", lambda name: np.int64(7))
    table = NameTable(name_arrays(["A", "b", "B", "c"]), "x")
    assert [table.row(name) for name in ("A", "b", "B", "c", "d", "C")] == [0, 1, 2, 3, None, None]
    assert table.spellings("B") == ["b", "B"] and table.spellings("C") == ["c"] and table.spellings("d") == []


# Writing


LIMITED = """
import resource, signal, sys
import numpy as np
from esm_perturb.core.config import InputError
from esm_perturb.proteins.embeddings import GeneEmbeddings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
vectors = np.random.default_rng(1).normal(size=(200, 500))
table = GeneEmbeddings([f"G{i}" for i in range(200)], vectors)
for name in sys.argv[1:]:
    try:
        table.save(name, "rows.json" if name == "tensor.pt" else None)
    except InputError as error:
        print(name, "|", error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system cannot limit the size of files")
def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    """Writes beyond 50 kB fail in the system call, whoever makes it: Python, torch, HDF5, Arrow or Rust."""
    names = [f"genes{suffix}" for suffix in SUFFIXES]
    for name in names:
        example().save(tmp_path / name)
    example().save(tmp_path / "tensor.pt", tmp_path / "rows.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *names, "tensor.pt", "new.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == 7, done.stderr
    assert all("could not be written" in line and "unchanged" in line for line in said)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_crash_between_two_files_is_noticed(tmp_path, monkeypatch):
    """Killed after the map was put in place and before the tensor was: the record does not fit, so nothing is read."""
    example(seed=1).save(tmp_path / "tensor.pt", tmp_path / "rows.json")
    replaced, replace = [], Path.replace

    def killed_at_the_last(self, target):
        if len(replaced) == 2:
            raise KeyboardInterrupt
        replaced.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        GeneEmbeddings(["X", "Y"], np.eye(2)).save(tmp_path / "tensor.pt", tmp_path / "rows.json")
    monkeypatch.undo()
    assert replaced == ["tensor.pt.json", "rows.json"]
    with pytest.raises(InputError, match="describes other vectors"):
        GeneEmbeddings.load(tmp_path / "tensor.pt", tmp_path / "rows.json")


def test_wrong_places_and_suffixes_are_said(tmp_path):
    table = example()
    (tmp_path / "file").write_text("x")
    cases = [
        (lambda: table.save(tmp_path / "file" / "genes.pt"), "could not be written"),
        (lambda: table.save(tmp_path / "genes.csv"), "suffix"),
        (lambda: table.save(tmp_path / "genes.pkl"), "pickle"),
        (lambda: table.save(tmp_path / "genes.npz", tmp_path / "rows.json"), "gene_to_esm_map_path"),
        (lambda: table.save(tmp_path / "genes.pt", tmp_path / "rows.csv"), "must be a .json or .pt"),
        (lambda: GeneEmbeddings.load(tmp_path / "genes.csv"), "suffix"),
        (lambda: GeneEmbeddings.load(tmp_path / "absent.pt"), "absent.pt.*--esm_embeddings_path"),
        (lambda: GeneEmbeddings.open(table.save(tmp_path / "genes.pt")), "GeneEmbeddings.load\\(FILE\\).save"),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=said) as caught:
            call()
        one_line(caught)
    with pytest.raises(MissingFileError):
        GeneEmbeddings.load(tmp_path / "absent.safetensors")


# Large tables


SPARSE = """
import json, resource, sys, time
import numpy as np
from esm_perturb.proteins.name_table import name_arrays
from esm_perturb.proteins.table_files import _FORMAT, _arrays_sha256
names = [f"gene{i}_species{i % 61}" for i in range(500_000)]
arrays = name_arrays(names)
kinds = {"int64": "I64", "uint8": "U8"}
header, place = {"__metadata__": {"format": _FORMAT, "names_sha256": _arrays_sha256(arrays), "record": "{}"}}, 0
for name, array in arrays.items():
    span = [place, place + array.nbytes]
    header[name] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape), "data_offsets": span}
    place += array.nbytes
end = place + 500_000 * 1280 * 4
header["vectors"] = {"dtype": "F32", "shape": [500_000, 1280], "data_offsets": [place, end]}
text = json.dumps(header).encode()
with open(sys.argv[1], "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values()))
    file.truncate(8 + len(text) + end)
"""
OPEN = """
import resource, sys, time
import torch
from esm_perturb.proteins.embeddings import GeneEmbeddings
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, began = memory(), time.perf_counter()
table = GeneEmbeddings.open(sys.argv[1])
found = table.lookup([f"GENE{i}_species{i % 61}" for i in range(0, 500_000, 5000)])
print(time.perf_counter() - began, memory() - before, found.report.n_found, len(table), table.dim)
"""


def test_half_a_million_genes_open_in_a_second_and_in_little_memory(tmp_path):
    """2.6 GB of vectors, mostly a hole in the file; the better of two, since a busy machine slows some of them."""
    path = tmp_path / "large.safetensors"
    subprocess.run([sys.executable, "-c", SPARSE, path], check=True)
    assert path.stat().st_size > 2.5e9
    runs = [
        subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    seconds, megabytes, *rest = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    path.unlink()
    assert min(seconds) < 1 and min(megabytes) < 200 and rest == [(100,) * 2, (500_000,) * 2, (1280,) * 2]


def test_an_opened_row_that_is_not_finite_is_refused_when_it_is_looked_up(tmp_path):
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    vectors[2, 1] = np.nan
    path = write_table(tmp_path / "genes.safetensors", list("ABCD"), vectors, {})
    opened = GeneEmbeddings.open(path)
    assert opened.lookup(["A", "D"]).vectors.tolist() == [[0, 1, 2], [9, 10, 11]]
    with pytest.raises(InputError, match="vector of 'C' holds NaN"):
        opened.lookup(["A", "C"])
    with pytest.raises(InputError, match="vector of 'C' holds NaN"):
        GeneEmbeddings.load(path)
    assert opened.check().failed == ["finite values"]


def test_a_long_record_does_not_slow_the_opening(tmp_path):
    record = {"model": "example", "sequence_sha256": {f"G{index}": "0" * 64 for index in range(60_000)}}
    path = GeneEmbeddings(["A"], np.ones((1, 2)), record).save(tmp_path / "genes.safetensors")
    assert int.from_bytes(path.read_bytes()[:8], "little") < 10_000  # of the header, which opening reads
    opened = GeneEmbeddings.open(path)
    assert isinstance(opened._record, str) and opened.lookup(["A"]).found.all() and isinstance(opened._record, str)
    assert (
        opened.record == GeneEmbeddings.load(path).record
        and opened.record["sequence_sha256"] == record["sequence_sha256"]
    )


# Lookup

HGNC = GeneNames(
    [
        GeneRecord("JPT2", ("HN1L",), ("L11",), ("ENSG00000206053",), ("Q9H910",)),
        GeneRecord("ABCC1", ("MRP1",), (), ("ENSG00000103222",), ("P33527",)),
        GeneRecord("MSH3", (), ("MRP1",)),
    ]
)


@pytest.mark.parametrize("opened", [False, True])
def test_lookup_by_symbol_alias_and_id(tmp_path, opened):
    table = GeneEmbeddings(["JPT2", "P33527", "MSH3", "STAT1"], np.eye(4))
    if opened:
        table = GeneEmbeddings.open(table.save(tmp_path / "genes.safetensors"))
    wanted = ["STAT1", "stat1", "HN1L", "L11", "ENSG00000206053.7", "ABCC1", "MRP1", "NOPE", "Q9H910"]
    found = table.lookup(wanted, policy="drop", names=HGNC)
    statuses = [
        "exact",
        "case-folded",
        "previous symbol",
        "alias",
        "Ensembl id",
        "UniProt id",
        "ambiguous",
        "missing",
        "UniProt id",
    ]
    assert found.report.table["status"].tolist() == statuses
    assert found.report.table["candidates"].tolist()[6] == "MSH3, P33527" and found.genes == [*wanted[:6], "Q9H910"]
    assert found.vectors.argmax(axis=1).tolist() == [3, 3, 0, 0, 0, 1, 0] and found.report.missing == ["MRP1", "NOPE"]
    assert found.report.shared == {"STAT1": ["STAT1", "stat1"], "JPT2": ["HN1L", "L11", "ENSG00000206053.7", "Q9H910"]}
    with pytest.raises(InputError, match="MRP1 \\(MSH3, P33527\\?\\)"):
        table.lookup(wanted, names=HGNC)
    assert table.lookup(["HN1L"], policy="drop").report.missing == ["HN1L"]


def test_the_mean_of_an_opened_table_with_nan_is_refused(tmp_path):
    vectors = np.ones((5000, 3), np.float32)
    vectors[4500, 1] = np.nan
    names = [f"GENE{row}" for row in range(5000)]
    opened = GeneEmbeddings.open(write_table(tmp_path / "genes.safetensors", names, vectors, {}))
    assert opened.lookup(["GENE1", "XYZ"], policy="zero").vectors.sum() == 3
    with pytest.raises(InputError, match="genes.safetensors'.*'GENE4500' holds NaN"):
        opened.lookup(["GENE1", "XYZ"], policy="mean")


def test_zero_and_mean_say_each_gene_once(caplog):
    table = example(3, 2)
    with caplog.at_level(logging.WARNING):
        zero = table.lookup(["XYZ", "GENE1", "XYZ"], policy="zero")
        table.lookup(["XYZ"], policy="zero")
        mean = table.lookup(["XYZ"], policy="mean")
    assert zero.vectors[[0, 2]].tolist() == [[0, 0], [0, 0]] and zero.found.tolist() == [False, True, False]
    np.testing.assert_allclose(mean.vectors[0], table.vectors.mean(axis=0), rtol=1e-6)
    assert caplog.messages == [
        "Gene XYZ not found in ESM embeddings, using zero vector",
        "Gene XYZ not found in ESM embeddings, using mean vector",
    ]
    with pytest.raises(InputError, match="choose one of"):
        table.lookup(["GENE1"], policy="zeros")
    with pytest.raises(InputError, match="as a list of text"):
        table.lookup([3])
    assert table.lookup("GENE1").genes == ["GENE1"]


def test_the_coverage_is_a_file(tmp_path):
    report = example().lookup(["gene1", "NOPE, <b>", "GENE2"], policy="drop").report
    read = pd.read_csv(report.save(tmp_path / "run" / "coverage.csv"), keep_default_na=False)
    assert read["requested"].tolist() == ["gene1", "NOPE, <b>", "GENE2"]
    assert read["matched_as"].tolist() == ["GENE1", "", "GENE2"]
    assert list(read.columns) == ["requested", "matched_as", "status", "candidates"]
    assert report.summary() == "2 of 3 genes have an embedding (1 exact, 1 case-folded, 1 missing)"


# AnnData


def test_vectors_travel_in_an_anndata_and_its_file(tmp_path):
    table = example()
    cells = anndata.AnnData(np.zeros((2, 4), np.float32))
    cells.var_names = ["GENE3", "none", "gene1", "GENE0"]
    report = table.to_varm(cells, "esm2")
    assert report.n_found == 3 and cells.var["esm2_found"].tolist() == [True, False, True, True]
    assert np.isnan(cells.varm["esm2"][1]).all() and cells.varm["esm2"].dtype == np.float32
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for read in (GeneEmbeddings.from_varm(cells), GeneEmbeddings.load(tmp_path / "cells.h5ad")):
        assert read.names == ["GENE3", "gene1", "GENE0"] and same_bits(read.vectors, table.vectors[[3, 1, 0]])
        assert read.record == {"model": "example"}
    kept = GeneEmbeddings.from_varm(cells[:, ["GENE0", "none"]])
    assert kept.names == ["GENE0"] and same_bits(kept.vectors, table.vectors[[0]])


def test_wrong_varm_is_refused(tmp_path):
    cells = anndata.AnnData(np.zeros((2, 3), np.float32))
    cells.var["symbol"] = ["GENE0", "GENE1", "x"]
    with pytest.raises(InputError, match="None of the AnnData's 3 genes"):
        example().to_varm(cells)
    assert not cells.varm and "esm2_found" not in cells.var
    with pytest.raises(InputError, match="no column var\\['names'\\]"):
        example().to_varm(cells, column="names")
    with pytest.raises(InputError, match="no varm\\['esm2'\\].*none"):
        GeneEmbeddings.from_varm(cells)
    assert example().to_varm(cells, column="symbol").n_found == 2
    with pytest.raises(InputError, match="did you mean 'esm2'"):
        GeneEmbeddings.from_varm(cells, "esm")
    cells.uns["esm2_record"] = "{"
    with pytest.raises(InputError, match="no JSON record"):
        GeneEmbeddings.from_varm(cells)
    del cells.var["esm2_found"]
    with pytest.raises(InputError, match="no column var\\['esm2_found'\\]"):
        GeneEmbeddings.from_varm(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match="cells.h5ad.*esm2_found"):
        GeneEmbeddings.load(tmp_path / "cells.h5ad")


# The space


def test_neighbours_do_not_depend_on_the_order_of_rows():
    table = example(30, 4)
    vectors = table.vectors.copy()
    vectors[[3, 8, 9]] = vectors[5]
    order = np.random.default_rng(1).permutation(30)
    one = GeneEmbeddings(table.names, vectors)
    two = GeneEmbeddings([table.names[row] for row in order], vectors[order])
    first, second = nearest_neighbours(one, "GENE5", 6), nearest_neighbours(two, "GENE5", 6)
    pd.testing.assert_frame_equal(first, second)
    assert first["gene"].tolist()[:3] == ["GENE3", "GENE8", "GENE9"] and (first["similarity"][:3] == 1).all()
    centred = vectors - vectors.mean(axis=0)
    by_hand = centred @ centred[5] / np.linalg.norm(centred, axis=1) / np.linalg.norm(centred[5])
    assert np.allclose(first.set_index("gene")["similarity"], [by_hand[int(g[4:])] for g in first["gene"]], atol=1e-5)
    with pytest.raises(InputError, match="did you mean 'GENE5'"):
        nearest_neighbours(one, "gene5")
    with pytest.raises(InputError, match="1 or more"):
        nearest_neighbours(one, "GENE5", 0)


def test_family_agreement_is_the_share_of_nearest_relatives():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 16))
    families = {f"{family}.{member}": str(family) for family in range(12) for member in range(4)}
    near = GeneEmbeddings(list(families), np.repeat(centres, 4, axis=0) + 0.1 * rng.normal(size=(48, 16)))
    noise = GeneEmbeddings(list(families), rng.normal(size=(48, 16)))
    good, chance = family_agreement(near, families), family_agreement(noise, families)
    assert good.share == good.low == good.high == 1 and good.n_genes == 48 and good.n_families == 12
    assert good.chance == pytest.approx(3 / 47) and chance.low <= chance.chance <= chance.high
    difference, low, high = agreement_difference(good, chance)
    assert difference == pytest.approx(good.share - chance.share) and 0.5 < low <= difference <= high
    labels, direction = np.array(list(families.values())), centred_directions(noise.vectors).astype(float)
    cosine = direction @ direction.T - 2 * np.eye(48)
    assert chance.share == np.mean(labels[cosine.argmax(axis=1)] == labels)
    lonely = families | {"0.0": "alone"}
    assert family_agreement(near, lonely).n_genes == 47
    fewer = {gene: family for gene, family in families.items() if family != "3"}
    assert set(family_agreement(near, fewer).table["neighbour"]) <= set(fewer)
    with pytest.raises(InputError, match="No two"):
        family_agreement(near, {"0.0": "a", "1.0": "b"})
    with pytest.raises(InputError, match="different genes"):
        agreement_difference(good, family_agreement(near, fewer))


def test_composition_is_counted():
    table = composition_vectors({"A": "AAAC", "B": "aacc*", "C": "XX"})
    spread = np.array([[0.75, 0.25], [0.5, 0.5], [0, 0]]).std(axis=0)
    expected = np.zeros((3, 20))
    expected[:, :2] = np.array([[0.75, 0.25], [0.5, 0.5], [0, 0]]) / spread
    np.testing.assert_allclose(table.vectors, expected, rtol=1e-6)
    with pytest.raises(InputError, match="at least one"):
        composition_vectors({})


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permutation_z_is_exact(n, seed):
    """Against all n! permutations."""
    from itertools import permutations

    match = np.random.default_rng(seed).normal(size=(n, n))
    traces = [match[np.arange(n), list(order)].sum() for order in permutations(range(n))]
    assert permutation_z(match) == pytest.approx(
        (np.trace(match) - np.mean(traces)) / np.std(traces), rel=1e-6, abs=1e-6
    )


# The check


def proteins_and_vectors(n: int, seed: int, dim: int = 48, noise: float = 1.0) -> tuple[dict[str, str], np.ndarray]:
    """Proteins, and vectors of which composition explains about half, as in a small ESM2."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(20, 8.0), size=n)
    proteins = {f"GENE{i}": "".join(rng.choice(list(AMINO_ACIDS), size=150, p=row)) for i, row in enumerate(shares)}
    counts = np.array([[protein.count(letter) for letter in AMINO_ACIDS] for protein in proteins.values()]) / 150
    signal = counts @ rng.normal(size=(20, dim))
    signal /= signal.std(axis=0)
    return proteins, 5 + 0.3 * (signal + noise * rng.normal(size=(n, dim)))


def statuses(table: GeneEmbeddings, *args, **kwargs) -> dict[str, str]:
    found = table.check(*args, **kwargs).table
    assert set(found["status"]) <= {"ok", "warning", "failed", "not checked"}
    assert found["finding"].str.endswith(".").all() and not found["finding"].str.contains("\n").any()
    return dict(zip(found["check"], found["status"], strict=True))


def test_check_does_not_cry_wolf_and_finds_permutations_over_seeds():
    """100 right tables, each permuted and shifted: no false alarm, none missed."""
    for seed in range(100):
        n = (30, 60, 200)[seed % 3]
        proteins, vectors = proteins_and_vectors(n, seed)
        names, record = list(proteins), {"model": "example", "dim": 48}
        right = GeneEmbeddings(names, vectors, record).check(proteins, seed=seed)
        assert not right.failed and not right.warnings, right.summary()
        order = np.random.default_rng(seed).permutation(n)
        for wrong in (
            vectors[order],
            np.roll(vectors, 1, axis=0),
            np.random.default_rng(seed).normal(size=vectors.shape),
        ):
            assert "vectors follow proteins" in GeneEmbeddings(names, wrong, record).check(proteins, seed=seed).failed


def test_check_finds_names_that_shift_in_the_middle():
    found = 0
    for seed in range(20):
        proteins, vectors = proteins_and_vectors(300, seed)
        vectors[200:] = np.roll(vectors[200:], 1, axis=0)
        report = GeneEmbeddings(list(proteins), vectors, {"model": "example"}).check(proteins)
        found += report.failed == ["vectors follow proteins"]
        said = report.table.set_index("check")["finding"]["vectors follow proteins"]
    assert found == 20 and "shifted by one row" in said and "GENE299" in said


def test_check_finds_permuted_families_without_proteins():
    rng = np.random.default_rng(0)
    kinds = ["RPL", "ZNF", "KRT", "HOXA", "RAB", "TRIM", "CDK", "SOX"]
    names = [f"{kind}{number}" for kind in kinds for number in range(1, 13)]
    assert families_by_name(names) == {name: name.rstrip("0123456789") for name in names}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        vectors = np.repeat(rng.normal(size=(8, 32)), 12, axis=0) * 0.7 + rng.normal(size=(96, 32))
        assert statuses(GeneEmbeddings(names, vectors))["relatives lie together"] == "ok"
        permuted = vectors[rng.permutation(96)]
        assert statuses(GeneEmbeddings(names, permuted))["relatives lie together"] == "failed"


def test_check_compares_with_the_hashes_of_the_record(tmp_path):
    saved = GeneEmbeddings.load(example().save(tmp_path / "genes.npz"))
    assert statuses(saved)["vectors as recorded"] == "ok"
    swapped = saved.vectors.copy()
    swapped[[2, 5]] = swapped[[5, 2]]
    report = GeneEmbeddings(saved.names, swapped, saved.record).check()
    assert report.failed == ["vectors as recorded"]
    assert "2 of 20: GENE2 has that of GENE5, GENE5 has that of GENE2" in report.summary()
    changed = saved.vectors.copy()
    changed[3, 0] += 1e-3
    assert "1 of 20 vectors changed" in GeneEmbeddings(saved.names, changed, saved.record).check().summary()
    with pytest.raises(InputError, match="genes.npz failed the check of vectors as recorded"):
        report.raise_if_failed("genes.npz")


@pytest.mark.parametrize(
    ("dim", "record", "path", "status", "said"),
    [
        (5120, {"model": "esm2_t48_15B_UR50D"}, "", "ok", "ESM2-15B"),
        (5120, {"model": "esm2_t36_3B_UR50D"}, "", "failed", "ESM2-3B, which has 2,560 .* 5,120: that is ESM2-15B"),
        (5120, {}, "human_3B.pt", "failed", "file's name says ESM2-3B"),
        (5120, {}, "human.gene_symbol_to_embedding_ESM2.pt", "ok", "ESM2-15B"),
        (1280, {"model": "esm2_t33_650M_UR50D"}, "", "ok", "650M"),
        (320, {"model": "esm2_t33_650M_UR50D"}, "", "failed", "that is ESM2-8M"),
        (256, {"model": "mini_esm2", "dim": 256}, "", "ok", "record of 'mini_esm2'"),
        (255, {"model": "mini_esm2", "dim": 256}, "", "failed", "record says 256"),
        (77, {}, "", "warning", "no ESM2 has"),
    ],
)
def test_check_of_the_dimension(dim, record, path, status, said):
    table = GeneEmbeddings(["A", "B"], np.random.default_rng(0).normal(size=(2, dim)), record, path)
    row = table.check().table.set_index("check").loc["dimension"]
    assert row["status"] == status and pd.Series(row["finding"]).str.contains(said).all()


def test_check_of_rows_columns_and_scale():
    proteins, vectors = proteins_and_vectors(100, 3)
    names = list(proteins)
    spoilt = vectors.copy()
    spoilt[1], spoilt[2] = 0, 0.25
    found = statuses(GeneEmbeddings(names, spoilt), proteins)
    assert found["zero rows"] == found["constant rows"] == "failed"
    flat = vectors.copy()
    flat[:, :3] = 1.5
    assert statuses(GeneEmbeddings(names, flat), proteins)["columns"] == "warning"
    flat[:, 3:40] = 1.5
    assert statuses(GeneEmbeddings(names, flat), proteins)["columns"] == "failed"
    standard = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for processed in (standard, unit, 1e4 * vectors, 1e-6 * vectors):
        assert statuses(GeneEmbeddings(names, processed), proteins)["scale"] == "warning"
    assert statuses(GeneEmbeddings(names, vectors), proteins)["scale"] == "ok"
    assert statuses(GeneEmbeddings(names, np.ones((100, 8))))["equal rows"] == "failed"


def test_check_of_equal_rows():
    proteins, vectors = proteins_and_vectors(100, 4)
    names = list(proteins)
    proteins["GENE1"] = proteins["GENE2"] = proteins["GENE3"]
    vectors[[1, 2]] = vectors[3]
    paralogs = GeneEmbeddings(names, vectors)
    row = paralogs.check(proteins).table.set_index("check").loc["equal rows"]
    assert row["status"] == "ok" and "GENE1, GENE2, GENE3" in row["finding"]
    hashes = {name: str(hash(protein)) for name, protein in proteins.items()}
    assert statuses(GeneEmbeddings(names, vectors, {"sequence_sha256": hashes}))["equal rows"] == "ok"
    assert statuses(paralogs)["equal rows"] == "ok"  # 3 % of genes, as in the human proteome
    vectors[10:18] = vectors[10]
    many = GeneEmbeddings(names, vectors)
    assert statuses(many, proteins)["equal rows"] == "failed" and statuses(many)["equal rows"] == "warning"
    cut = {"truncated": names[10:18]}  # proteins that are equal up to where the model stopped reading
    assert statuses(GeneEmbeddings(names, vectors, cut), proteins)["equal rows"] == "ok"
    _, apart = proteins_and_vectors(100, 4)
    lists = {name: [protein] for name, protein in proteins.items()}
    for report in (
        GeneEmbeddings(names, apart).check(lists),
        GeneEmbeddings(names, apart, {"sequence_sha256": hashes}).check(proteins),
    ):
        assert "Equal proteins have different vectors" in report.summary()
    assert GeneEmbeddings(names, apart).check(proteins).warnings == ["dimension", "record", "equal rows"]


def isoform_means(proteins: dict[str, list[str]], dim: int = 48) -> np.ndarray:
    """The mean vector over each gene's proteins, of which composition explains most."""
    rng = np.random.default_rng(0)
    weights, vector_of = rng.normal(size=(20, dim)), {}
    for protein in (protein for several in proteins.values() for protein in several):
        counts = np.array([protein.count(letter) for letter in AMINO_ACIDS]) / len(protein)
        vector_of.setdefault(protein, 5 + 3 * counts @ weights + 0.05 * rng.normal(size=dim))
    return np.array([np.mean([vector_of[protein] for protein in several], axis=0) for several in proteins.values()])


def test_check_of_a_mean_over_isoforms():
    """Two genes share one isoform and differ in others; a third has an isoform twice."""
    single, _ = proteins_and_vectors(100, 7)
    proteins = {name: [protein] for name, protein in single.items()}
    proteins["GENE1"] = [*proteins["GENE0"], single["GENE1"]]
    proteins["GENE2"] = [single["GENE3"], single["GENE3"].lower() + "*"]
    first = {name: several[0] for name, several in proteins.items()}
    vectors = isoform_means({name: [p.upper().rstrip("*") for p in several] for name, several in proteins.items()})
    foreign = GeneEmbeddings(list(proteins), vectors, {"model": "m", "dim": 48})
    hashes = {name: [f"hash of {p.upper().rstrip('*')}" for p in several] for name, several in proteins.items()}
    hashes |= {name: several[0] for name, several in hashes.items() if len(several) == 1}
    recorded = GeneEmbeddings(list(proteins), vectors, {"model": "m", "dim": 48, "sequence_sha256": hashes})
    for table, given_proteins in [(recorded, first), (recorded, proteins), (recorded, None), (foreign, proteins)]:
        report = table.check(given_proteins)
        assert not report.failed and not report.warnings, report.summary()
    assert foreign.check(first).failed == [] and foreign.check(first).warnings == ["equal rows"]
    order = np.random.default_rng(0).permutation(100)
    permuted = GeneEmbeddings(list(proteins), vectors[order], {"model": "m", "dim": 48})
    assert permuted.check(proteins).failed == ["equal rows", "vectors follow proteins"]


def test_check_of_proteins_that_differ_behind_the_cut():
    single, vectors = proteins_and_vectors(100, 8)
    tail, names = "M" * 1021, list(single)
    single["GENE1"], single["GENE2"] = tail + single["GENE1"], tail + single["GENE2"]
    vectors[2] = vectors[1]
    assert statuses(GeneEmbeddings(names, vectors), single)["equal rows"] == "ok"
    single["GENE2"] = "W" + single["GENE2"]
    assert statuses(GeneEmbeddings(names, vectors), single)["equal rows"] == "failed"


def test_check_of_names():
    eye = np.random.default_rng(0).normal(size=(3, 4))
    for names, said in [
        (["1-Mar", "B", "C"], "dates: 1-Mar"),
        (["A ", "B", "C"], "'A '"),
        (["Tp53", "TP53", "C"], "tp53"),
    ]:
        row = GeneEmbeddings(names, eye).check().table.set_index("check").loc["names"]
        assert row["status"] == "warning" and said in row["finding"]


def test_the_report_is_a_file(tmp_path):
    report = example().check()
    read = pd.read_csv(report.save(tmp_path / "check.csv"))
    assert list(read.columns) == ["check", "status", "finding"] and len(read) == len(report.table)
    assert json.dumps(report.to_frame().to_dict("records"))


def test_an_opened_table_is_checked_like_a_loaded_one(tmp_path):
    proteins, vectors = proteins_and_vectors(200, 5)
    path = GeneEmbeddings(list(proteins), vectors, {"model": "example"}).save(tmp_path / "genes.safetensors")
    opened, loaded = (kind(path).check(proteins).table for kind in (GeneEmbeddings.open, GeneEmbeddings.load))
    pd.testing.assert_frame_equal(opened, loaded)


@pytest.fixture(scope="module")
def human(tmp_path_factory) -> tuple[GeneEmbeddings, dict[str, str]]:
    """About 400 real proteins, half of well-known families, cut at 150 residues, embedded by the mini ESM2."""
    folder = project_root().parent / "shared" / "data" / "proteins"
    if not folder.is_dir() or not (project_root() / "data" / "mini_esm2").is_dir():
        pytest.skip("the development data or the mini ESM2 are not on this machine")
    from esm_perturb.proteins.embed import embed_sequences
    from esm_perturb.proteins.esm2 import ESM2

    everything = read_fasta(folder / "human.fasta.gz")
    rng, relatives = np.random.default_rng(0), sorted(families_by_name(sorted(everything)))
    chosen = sorted({*rng.choice(relatives, 200, replace=False), *rng.choice(sorted(everything), 200, replace=False)})
    proteins = {str(name): everything[name][:150] for name in chosen}
    return embed_sequences(ESM2.load("mini_esm2", device="cpu"), proteins, progress=False), proteins


@pytest.mark.realdata
def test_check_on_real_proteins(human):
    table, proteins = human
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(table), (60, 120, 250, len(table))[seed % 4], replace=False))
        names, vectors = [table.names[row] for row in rows], table.vectors[rows]
        right = GeneEmbeddings(names, vectors, table.record)
        for given_proteins in (proteins, None):
            report = right.check(given_proteins, seed=seed)
            assert not report.failed and not report.warnings, report.summary()
        permuted = GeneEmbeddings(names, vectors[rng.permutation(len(rows))], table.record)
        shifted = GeneEmbeddings(names, np.roll(vectors, 1, axis=0), table.record)
        for wrong in (permuted, shifted):
            assert "vectors follow proteins" in wrong.check(proteins, seed=seed).failed
    by_name = statuses(GeneEmbeddings(table.names, table.vectors[np.random.default_rng(0).permutation(len(table))]))
    assert by_name["relatives lie together"] == "failed" and statuses(table)["relatives lie together"] == "ok"
