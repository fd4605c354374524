"""Protein files, gene names and downloads: every form in which they are handed around, hostile input, real tables."""

import contextlib
import gzip
import http.server
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_perturb.core.config import InputError, MissingFileError
from esm_perturb.core.files import project_root, sha256_file
from esm_perturb.proteins import downloads
from esm_perturb.proteins.downloads import SOURCES, Source, fetch
from esm_perturb.proteins.fasta import fasta_records, why_no_protein
from esm_perturb.proteins.gene_names import (
    FOUND,
    MGI,
    STATUSES,
    AvailableNames,
    GeneNames,
    GeneRecord,
    Match,
    find_collisions,
    match_names,
)
from esm_perturb.proteins.isoforms import mark_canonical, read_canonical
from esm_perturb.proteins.sequences import (
    POLICIES,
    RESIDUES,
    Isoform,
    choose_isoforms,
    choose_sequences,
    clean_sequence,
    drop_stops,
    read_fasta,
    read_isoforms,
    residue_report,
    undecided_genes,
    write_fasta,
)


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Residues


@given(
    st.text(alphabet="acdEFGHIKlmnpqrSTVWYxbuzojJ*-. \n", max_size=40),
    st.sampled_from(["X", "error"]),
    st.sampled_from(["keep", "replace"]),
)
@settings(max_examples=200, deadline=None)
def test_cleaning_twice_changes_nothing_and_keeps_positions(raw, unknown, rare):
    written = "".join(raw.split()).rstrip("*")
    if not written or (unknown == "error" and set(written.upper()) & set("*J-.")):
        with pytest.raises(InputError):
            clean_sequence(raw, unknown=unknown, rare=rare)
        return
    cleaned = clean_sequence(raw, unknown=unknown, rare=rare)
    assert clean_sequence(cleaned, unknown=unknown, rare=rare) == cleaned
    assert set(cleaned) <= set(RESIDUES) and len(cleaned) == len(written)
    assert rare == "keep" or not set(cleaned) & set("UO")


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_is_cleaned_or_refused_in_one_line(raw):
    try:
        assert set(clean_sequence(raw)) <= set(RESIDUES)
    except InputError as error:
        assert "\n" not in str(error)


@given(st.text(alphabet="acMKJUOBZXx*-.", min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_report_counts_what_cleaning_changes(raw):
    report = residue_report({"A": raw})["residues"]
    stops, inside = raw.count("*"), raw.rstrip("*")
    assert report["terminal *"] == len(raw) - len(inside)
    assert report["internal *"] == inside.count("*") == stops - report["terminal *"]
    assert report["lower case"] == sum(letter.islower() for letter in raw)
    if inside:
        written = report[["internal *", "J", "gap"]].sum() + report["X"]
        assert clean_sequence(raw).count("X") == written


# FASTA

RECORDS = st.dictionaries(
    st.text("ABCdef123-_.", min_size=1), st.text(RESIDUES + "acd*-", min_size=1, max_size=150), min_size=1
)


def _readable(sequences) -> bool:
    return not any(why_no_protein(sequence) for sequence in sequences.values()) and not (
        set("".join(sequences.values()).upper()) <= set("ACGTUN*-.")
    )


@given(RECORDS)
@settings(max_examples=60, deadline=None)
def test_fasta_round_trip(tmp_path_factory, sequences):
    if _readable(sequences):
        path = tmp_path_factory.mktemp("fasta") / "proteins.fasta.gz"
        assert read_fasta(write_fasta(path, sequences)) == sequences


@given(RECORDS, st.integers(1, 70), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_layout_does_not_matter(tmp_path_factory, sequences, width, newline, blank, zipped, mark):
    if not _readable(sequences):
        return
    lines = []
    for name, sequence in sequences.items():
        lines += [f">{name}", *(sequence[i : i + width] for i in range(0, len(sequence), width)), *[""] * blank]
    content = (b"\xef\xbb\xbf" if mark else b"") + newline.join(lines).encode()
    path = tmp_path_factory.mktemp("fasta") / "proteins"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert read_fasta(path) == sequences


FASTA_LIKE = st.lists(
    st.sampled_from(
        [b">", b">A\n", b">sp|P1|X GN=A\n", b">E pep gene_symbol:\n", b"MKT", b"*", b"\n", b"\r", b" ", b"\0", b"\xff"]
    )
).map(b"".join)


@given(st.binary(max_size=80) | FASTA_LIKE, st.booleans(), st.sampled_from(["auto", "id", "gene"]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, content, zipped, key):
    path = tmp_path_factory.mktemp("fasta") / "any"
    path.write_bytes(gzip.compress(content) if zipped else content)
    try:
        proteins = read_fasta(path, key=key)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert proteins and all(name and sequence.strip("*") for name, sequence in proteins.items())


WHOLE = gzip.compress(b">A\n" + b"MKTAYIAKQRQISFVKSHFSRQ\n" * 30 + b">B\nMSTNPKPQRKTKRNTNRRPQDVKFPGG\n", mtime=0)


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_gzip_file_cut_or_changed_anywhere_is_refused(tmp_path_factory, place, change):
    folder = tmp_path_factory.mktemp("gzip")
    (folder / "whole").write_bytes(WHOLE)
    (folder / "cut").write_bytes(WHOLE[:place])
    with pytest.raises(InputError) as caught:
        read_fasta(folder / "cut")
    one_line(caught)
    (folder / "changed").write_bytes(WHOLE[:place] + bytes([WHOLE[place] ^ change]) + WHOLE[place + 1 :])
    with contextlib.suppress(InputError):  # the header's date and system do not matter
        assert read_fasta(folder / "changed") == read_fasta(folder / "whole")


def test_damaged_fasta_files_are_refused(tmp_path):
    whole = gzip.compress(
        b">A\n" + b"MKTAYIAKQRQISFVKSHFSRQ\n" * 500 + b">B\n" + bytes(np.arange(65, 90)) * 50, mtime=0
    )
    flipped = whole[:30] + bytes([whole[30] ^ 0xFF]) + whole[31:]
    cases = {
        "cut.fasta.gz": (whole[:-20], "cut short"),
        "flipped.fasta.gz": (flipped, "damaged|cut short|not protein|not FASTA|UTF-8"),
        "binary.fasta": (bytes(range(256)), "UTF-8|not FASTA"),
        "latin.fasta": (b">B\nMK\n" + ">Å\nMKT\n".encode("latin-1"), "line 3 is not UTF-8"),
        "utf16.fasta": (">A\nMKT\n".encode("utf-16"), "line 1 is not UTF-8"),
        "empty.fasta.gz": (gzip.compress(b""), "is empty"),
        "nothing.fasta": (b"", "is empty"),
        "table.tsv": (b"gene\tsequence\nA\tMKT\n", "line 1"),
        "page.html": (b"<!DOCTYPE html>\n<html>", "line 1 is not FASTA"),
        "dna.fasta": (b">A\n" + b"ACGTTGCA" * 10, "nucleotides"),
        "rna.fasta": (b">A\n" + b"acguugca" * 10, "nucleotides"),
        "mixed.fasta": (b">P\nMKT\n>D\n" + b"ACGTTGCA" * 10 + b"\n>Q\nMS\n", "line 3: 'D' is nucleotides"),
        "iupac.fasta": (b">P\nMKT\n>D\n" + b"ACGTTGCARY" * 4 + b"ACGTTGCAAC" * 6, "line 3: 'D' is nucleotides"),
        "primers.fasta": (b"".join(b">D%d\nACGTTGCAACGTTGCAACGT\n" % i for i in range(5)), "holds nucleotides"),
        "gaps.fasta": (b">P\nMKT\n>G\n---.\n-*\n", "line 3: 'G' has no residue, only gaps or X"),
        "unknown.fasta": (b">P\nMKT\n>G\nXXxX*\n", "line 3: 'G' has no residue, only gaps or X"),
        "no_name.fasta": (b">A\nMK\n> \nMK\n", "line 3: the header has no name"),
        "no_sequence.fasta": (b">A\n>B\nMK\n", "line 1: 'A' has an empty sequence"),
        "stop_only.fasta": (b">A\nMK\n>B\n*\n", "line 3: 'B' has an empty sequence"),
        "twice.fasta": (b">A\nMK\n>A\nMS\n", "line 3: 'A' occurs before with a different sequence"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            read_fasta(tmp_path / name)
        assert name in one_line(caught)
    for absent in (tmp_path / "absent.fasta", tmp_path):
        with pytest.raises(MissingFileError):
            read_fasta(absent)


def test_proteins_of_few_letters_are_proteins(tmp_path):
    proteins = {
        "short": "ACGTACGTTGCA" * 4 + "ACGTACGTTGC",  # 59 letters
        "silk": "GAGAGSGAGAGSGAGAGY" * 20,
        "glycine": "GGYGGSGGYGGSRGGYGGGSSGSYGGGGS" * 4,
        "cysteine": "CTSCTGACTGCGNCTNAVTCTNSTHCVKANTCTGSTDCNTA" * 3,
        "one": "XXXXM---",
    }
    assert read_fasta(write_fasta(tmp_path / "a.fasta", proteins)) == proteins
    for sequence in ("---", "XX", "ACGTACGTTGCA" * 5):
        with pytest.raises(InputError, match="not one that a FASTA file can hold"):
            write_fasta(tmp_path / "b.fasta", {"P": "MK", "Q": sequence})


def test_gene_key_wants_a_gene_where_the_format_has_one(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">sp|P1|X_Y Some protein OS=Homo sapiens PE=1\nMKT\n")
    assert read_fasta(path) == {"P1": "MKT"}
    with pytest.raises(InputError, match="line 1: 'P1' names no gene"):
        read_fasta(path, key="gene")
    path.write_text(">TP53 a\nMKT\n>TP53 b\nMKTA\n")
    assert read_fasta(path, key="gene") == {"TP53": "MKTA"}
    assert read_fasta(path, key="gene", isoforms="first") == {"TP53": "MKT"}
    with pytest.raises(InputError, match="line 3: 'TP53' occurs before"):
        read_fasta(path)


def test_records_stream_in_bounded_memory(tmp_path):
    path = tmp_path / "large.fasta.gz"
    record = b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK\n" * 7
    path.write_bytes(gzip.compress(b"".join(b">P%d\n" % i + record for i in range(20_000)), 1))
    tracemalloc.start()
    count = sum(1 for _ in fasta_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 2_000_000  # the proteins themselves are 8.4 MB


# Isoforms

HEADERS = {
    "sp|P04637|P53_HUMAN Cellular tumor antigen p53 OS=Homo sapiens OX=9606 GN=TP53 PE=1 SV=4": ("P04637", None, True),
    "sp|P04637-2|P53_HUMAN Isoform 2 of p53 OS=Homo sapiens GN=TP53": ("P04637-2", None, False),
    "tr|A0A087WT22|A0A087WT22_HUMAN p53 OS=Homo sapiens OX=9606 GN=TP53 PE=1 SV=1": ("A0A087WT22", None, None),
    "ENSP1.4 pep chromosome:GRCh38:17:1:2:-1 gene:ENSG1.18 transcript:ENST1.9 gene_symbol:TP53 description:x": (
        "ENSP1.4",
        "ENSG1.18",
        None,
    ),
    "ENSP2.4|ENST1.9|ENSG1.18|OTTHUMG1.3|OTTHUMT1.3|TP53-201|TP53|393": ("ENSP2.4", "ENSG1.18", None),
    "TP53 id=P04638 source=TUnA_Intra0": ("P04638", None, None),
}


@pytest.mark.parametrize("key", ["auto", "gene"])
def test_every_kind_of_header_is_one_gene(tmp_path, key):
    (tmp_path / "a").write_text("".join(f">{header}\nMK{'K' * i}\n" for i, header in enumerate(HEADERS)))
    genes = read_isoforms(tmp_path / "a", key=key)
    assert list(genes) == ["TP53"]
    assert [(isoform.id, isoform.gene_id, isoform.canonical) for isoform in genes["TP53"]] == list(HEADERS.values())
    assert read_fasta(tmp_path / "a", isoforms="canonical") == {"TP53": "MK"}
    assert list(read_fasta(tmp_path / "a", key="id")) == [known[0] for known in HEADERS.values()]


def test_an_ensembl_protein_without_symbol_is_kept_under_its_gene_id(tmp_path):
    header = ">ENSP00000000001.1 pep scaffold:X gene:ENSG00000000009.2 transcript:ENST1.1\nMK\n"
    (tmp_path / "a").write_text(header)
    assert read_fasta(tmp_path / "a") == {"ENSG00000000009": "MK"}
    with pytest.raises(InputError, match="names no gene"):
        read_fasta(tmp_path / "a", key="gene")


def test_identical_repeats_are_read_once_and_equal_proteins_with_other_ids_are_not(tmp_path):
    record = ">ENSP{0} pep gene:ENSG1 gene_symbol:A\n{1}\n"
    (tmp_path / "a").write_text("".join(record.format(*x) for x in [(1, "MK"), (1, "mk*"), (2, "MK"), (3, "M*K")]))
    isoforms = read_isoforms(tmp_path / "a")
    assert [isoform.id for isoform in isoforms["A"]] == ["ENSP1", "ENSP2", "ENSP3"]
    kept, dropped = drop_stops(isoforms)
    assert dropped == {"A": ["ENSP3"]} and choose_isoforms(kept, "all_mean") == {"A": ["MK", "MK"]}
    assert choose_isoforms(kept, "unique_mean") == choose_isoforms(kept, "canonical") == {"A": ["MK"]}


def test_proteins_of_several_organisms_under_one_name_are_warned_of(tmp_path, caplog):
    (tmp_path / "a").write_text(">tr|A|A p OS=Mus musculus GN=ins PE=1\nMK\n>tr|B|B p OS=Danio rerio GN=ins PE=1\nMS\n")
    with caplog.at_level("WARNING"):
        read_isoforms(tmp_path / "a")
    assert "1 names hold proteins of several organisms, first 'ins' (Danio rerio, Mus musculus)" in caplog.text


ISOFORMS = st.dictionaries(
    st.sampled_from("ABC"),
    st.lists(
        st.builds(
            Isoform,
            id=st.text("pq", min_size=1, max_size=3),
            sequence=st.sampled_from(["MK", "mk", "MKK", "MKK*", "MS", "M*S"]),
            canonical=st.sampled_from([True, False, None]),
        ),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
)


@given(ISOFORMS)
@settings(max_examples=200, deadline=None)
def test_policies_choose_what_they_say(isoforms):
    def norm(sequences):
        return [sequence.upper().rstrip("*") for sequence in sequences]

    written = {gene: [isoform.sequence for isoform in several] for gene, several in isoforms.items()}
    assert choose_isoforms(isoforms, "all_mean") == written
    for gene, distinct in choose_isoforms(isoforms, "unique_mean").items():
        assert norm(distinct) == list(dict.fromkeys(norm(written[gene])))
    for gene, (longest,) in choose_isoforms(isoforms, "longest").items():
        lengths = [len(sequence) for sequence in norm(written[gene])]
        assert longest == written[gene][lengths.index(max(lengths))]
    undecided = undecided_genes(isoforms)
    if undecided:
        with pytest.raises(InputError, match=f"canonical protein of {len(undecided)} of {len(isoforms)} genes"):
            choose_isoforms(isoforms, "canonical")
    decided = {gene: several for gene, several in isoforms.items() if gene not in undecided}
    for gene, (sequence,) in choose_isoforms(decided, "canonical").items():
        stated = {s for isoform, s in zip(isoforms[gene], norm(written[gene]), strict=True) if isoform.canonical}
        assert {sequence.upper().rstrip("*")} == (
            stated if len(set(norm(written[gene]))) > 1 else {norm(written[gene])[0]}
        )


MANE = (
    "#NCBI_GeneID\tEnsembl_Gene\tsymbol\tEnsembl_nuc\tEnsembl_prot\tMANE_status\n"
    "GeneID:1\tENSG00000000001.5\tA\tENST00000000012.4\tENSP00000000012.2\tMANE Select\n"
    "GeneID:1\tENSG00000000001.5\tA\tENST00000000011.4\tENSP00000000011.2\tMANE Plus Clinical\n"
    "GeneID:2\tENSG00000000002.5\tB\tENST00000000021.4\tENSP00000000021.2\tMANE Select\n"
)
ENSEMBL = "ENSG00000000001.5\tENST00000000012.9\tEnsembl Canonical\nENSG00000000002.5\tENST00000000021.1\tMANE Select\n"
OWN = "gene\tprotein\nA\tENSP00000000012\nB\tENSP00000000021\n"


@pytest.mark.parametrize("table", [MANE, ENSEMBL, OWN])
@pytest.mark.parametrize("gencode", [False, True])
def test_a_table_decides_about_canonical_isoforms(tmp_path, table, gencode):
    form = (
        ">ENSP000000000{0}.2|ENST000000000{0}.4|ENSG0000000000{1}.5|-|-|{2}-201|{2}|9\n{3}\n"
        if gencode
        else ">ENSP000000000{0}.2 pep gene:ENSG0000000000{1}.5 transcript:ENST000000000{0}.4 gene_symbol:{2}\n{3}\n"
    )
    proteins = [(11, 1, "A", "MKKK"), (12, 1, "A", "MK"), (21, 2, "B", "MS"), (22, 2, "B", "MSS"), (31, 3, "C", "MW")]
    (tmp_path / "a").write_text("".join(form.format(*words) for words in proteins))
    (tmp_path / "table").write_bytes(gzip.compress(table.encode()))
    isoforms = read_isoforms(tmp_path / "a")
    assert undecided_genes(isoforms) == ["A", "B"]
    marked = mark_canonical(isoforms, read_canonical(tmp_path / "table"))
    assert choose_isoforms(marked, "canonical") == {"A": ["MK"], "B": ["MS"], "C": ["MW"]}
    assert choose_isoforms(marked, "longest") == choose_isoforms(isoforms, "longest")


def test_a_table_of_canonical_isoforms_outranks_headers_and_must_fit(tmp_path):
    isoforms = {"A": [Isoform("P1", "MK", canonical=True), Isoform("P1-2", "MKK", canonical=False)]}
    assert choose_isoforms(mark_canonical(isoforms, {"P1-2"}), "canonical") == {"A": ["MKK"]}
    assert choose_isoforms(mark_canonical(isoforms, {"A": "P1-2", "B": "P1"}), "canonical") == {"A": ["MKK"]}
    for wrong in ({"P2"}, {"B": "P1"}, set()):
        with pytest.raises(InputError, match="None of the"):
            mark_canonical(isoforms, wrong)
    (tmp_path / "t").write_text("A\tP1\nB\n")
    with pytest.raises(InputError, match="line 2 names no protein"):
        read_canonical(tmp_path / "t")


def test_unknown_policy_is_refused():
    with pytest.raises(InputError, match=f"choose one of {', '.join(POLICIES)}"):
        choose_isoforms({}, "first")


# Gene names

NAMES = st.sampled_from(["A", "a", "B", "b1", "C", "D1", "ENSG00000000001", "ENSG00000000001.4", "P12345", " A"])
TABLES = st.lists(
    st.builds(
        GeneRecord,
        symbol=st.sampled_from(["A", "B", "C", "c", "D"]),
        previous=st.lists(NAMES, max_size=2).map(tuple),
        aliases=st.lists(NAMES, max_size=2).map(tuple),
        ensembl=st.lists(st.sampled_from(["ENSG00000000001", "ENSG00000000002"]), max_size=1).map(tuple),
        uniprot=st.lists(st.sampled_from(["P12345", "Q67890"]), max_size=2).map(tuple),
    ),
    max_size=5,
)
ANY = NAMES | st.sampled_from(["c", "D", "ENSG00000000002.1", "Q67890", "q67890", "nothing"])


@given(TABLES, st.lists(ANY, max_size=8), st.sets(ANY, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_matching_never_invents_and_never_guesses(table, requested, available, random):
    names = GeneNames(table)
    matches = names.match(requested, available)
    assert [match.requested for match in matches] == requested
    for match in matches:
        assert match.status in STATUSES and (match.name is not None) == (match.status in FOUND)
        assert match.name is None or match.name in available
        assert set(match.candidates) <= available and bool(match.candidates) == (match.status == "ambiguous")
        if len(names.denoted(match.requested)) > 1 and match.name is not None:
            assert match.status in ("exact", "case-folded", "Ensembl id")  # by spelling alone
            assert match in match_names([match.requested], available)
        if match.requested in available:
            assert match == Match(match.requested, match.requested, "exact")
    shuffled = random.sample(table, len(table))
    assert GeneNames(shuffled).match(requested, sorted(available)) == matches
    index = AvailableNames(available)
    assert [names.match([request], index)[0] for request in requested] == matches
    for name, several in find_collisions(matches).items():
        assert len(several) > 1 and all(match.name == name for match in matches if match.requested in several)


@given(st.lists(ANY, max_size=8), st.sets(ANY, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_table_is_an_empty_table(requested, available):
    assert match_names(requested, available) == match_names(requested, available, GeneNames([]))


def test_an_alias_of_several_genes_that_is_a_previous_symbol_too_is_listed():
    names = GeneNames(
        [
            GeneRecord("JPT2", ("HN1L",), (), ("ENSG00000206053",)),
            GeneRecord("X1", (), ("HN1L", "SOLE")),
            GeneRecord("X2", (), ("HN1L",)),
        ]
    )
    assert names.match(["HN1L"], ["JPT2", "X1"]) == [Match("HN1L", None, "ambiguous", ("JPT2", "X1"))]
    assert names.match(["HN1L"], ["ENSG00000206053.3"]) == [Match("HN1L", None, "ambiguous", ("ENSG00000206053.3",))]
    assert names.match(["HN1L"], ["OTHER"]) == [Match("HN1L", None, "missing")]
    assert names.match(["HN1L", "JPT2"], ["HN1L"]) == [
        Match("HN1L", "HN1L", "exact"),
        Match("JPT2", None, "ambiguous", ("HN1L",)),
    ]
    assert names.match(["SOLE"], ["X1"]) == [Match("SOLE", "X1", "alias")]


def test_two_accessions_of_one_gene_are_two_proteins_and_one_accession_of_two_genes_is_one():
    names = GeneNames([GeneRecord("G", uniprot=("P1", "P2")), *(GeneRecord(h, uniprot=("P3",)) for h in ("H1", "H2"))])
    assert names.match(["G"], ["P1", "P2"]) == [Match("G", None, "ambiguous", ("P1", "P2"))]
    assert names.match(["H1", "H2"], ["P3"]) == [Match(h, "P3", "UniProt id") for h in ("H1", "H2")]
    assert names.match(["P3"], ["H1", "H2"]) == [Match("P3", None, "ambiguous", ("H1", "H2"))]


def test_two_approved_symbols_that_differ_in_case_are_two_genes():
    names = GeneNames([GeneRecord("T"), GeneRecord("t")])
    assert names.match(["t"], ["T"]) == [Match("t", None, "missing")]
    assert match_names(["t"], ["T"]) == [Match("t", "T", "case-folded")]


def test_a_symbol_up_to_case_outranks_an_alias():
    names = GeneNames([GeneRecord("GEM"), GeneRecord("GMNN", (), ("Gem",), ("ENSG00000000001",))])
    assert names.match(["Gem"], ["GEM", "GMNN"]) == [Match("Gem", "GEM", "case-folded")]
    assert (
        names.match(["Gem"], ["GMNN"]) == names.match(["Gem"], ["ENSG00000000001"]) == [Match("Gem", None, "missing")]
    )


@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            [
                b"symbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\tuniprot_ids\n",
                b"\t",
                b'"',
                b"\n",
                b"A",
                b"Approved",
                b"|",
            ]
        )
    ).map(b"".join),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_gene_table_or_refused_in_one_line(tmp_path_factory, content, zipped):
    path = tmp_path_factory.mktemp("names") / "any"
    path.write_bytes(gzip.compress(content) if zipped else content)
    try:
        assert GeneNames.read(path).records
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_both_forms_of_hgnc_give_the_same_names(tmp_path):
    (tmp_path / "set").write_text(
        "symbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\tuniprot_ids\n"
        'JPT2\tApproved\t"FLJ13092|L11"\tHN1L\tENSG00000206053\t"Q9H910|Q9H911"\n'
    )
    (tmp_path / "custom").write_text(
        "Status\tApproved symbol\tAlias symbols\tPrevious symbols\tEnsembl gene ID\tUniProt ID(supplied by UniProt)\n"
        "Approved\tJPT2\tFLJ13092, L11\tHN1L\tENSG00000206053\tQ9H910, Q9H911\n"
        "Entry Withdrawn\tGONE\t\t\t\t\n"
    )
    (tmp_path / "mouse").write_text("Marker Symbol\tStatus\tMarker Synonyms (pipe-separated)\nTrp53\tO\tp53|Tp53\n")
    record = GeneRecord("JPT2", ("HN1L",), ("FLJ13092", "L11"), ("ENSG00000206053",), ("Q9H910", "Q9H911"))
    for form in ("set", "custom"):
        assert GeneNames.read(tmp_path / form).records == {"JPT2": record}
    assert GeneNames.read(tmp_path / "mouse", MGI).records == {"Trp53": GeneRecord("Trp53", (), ("p53", "Tp53"))}
    with pytest.raises(MissingFileError, match="Gene table"):
        GeneNames.read(tmp_path / "absent")


def test_chosen_sequences_keep_the_requested_name_and_list_the_others():
    names = GeneNames([GeneRecord("JPT2", ("HN1L",)), GeneRecord("A", ("X",)), GeneRecord("B", ("X",))])
    proteins = {"JPT2": "MK", "A": "MA", "B": "MB"}
    chosen = choose_sequences(proteins, ["HN1L", "b", "X", "NONE", "b"], missing="drop", names=names)
    assert chosen == ({"HN1L": "MK", "b": "MB"}, ["X", "NONE"])
    with pytest.raises(InputError, match=r"2 of 3 genes have no protein in 'f': X, NONE; ambiguous: X \(A or B\)"):
        choose_sequences(proteins, ["b", "X", "NONE"], names=names, where="f")
    with pytest.raises(InputError, match="1 of 1 genes"):
        choose_sequences(proteins, ["NONE"], missing="drop")


# Downloads

CONTENT = gzip.compress(b">TP53\nMEEPQSDPSVEPPLSQETF\n" * 1, mtime=0)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path == "/absent.gz":
            return self.send_error(404)
        if self.path == "/slow.gz":
            self.server.released.wait(10)
        page = b"<html>Please sign in</html>" if self.path == "/page.gz" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(page[:-10] if self.path == "/cut.gz" else page)

    def log_message(self, *words):
        pass


@pytest.fixture
def served(monkeypatch):
    """A server on this machine, with one source for each way in which a download can go."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.requests, server.released = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("good", "absent", "slow", "page", "cut"):
        url = f"http://127.0.0.1:{server.server_port}/{name}.gz"
        monkeypatch.setitem(SOURCES, name, Source("a test", url, "proteins"))
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def test_a_download_is_kept_recorded_and_not_repeated(served, tmp_path, capsys):
    path = fetch("good", folder=tmp_path)
    assert path.read_bytes() == CONTENT and sha256_file(path) in capsys.readouterr().out
    assert (tmp_path / "good.gz.sha256").read_text() == f"{sha256_file(path)}  good.gz\n"
    assert fetch("good", folder=tmp_path) == path and served.requests == ["/good.gz"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["good.gz", "good.gz.sha256"]
    path.write_bytes(CONTENT + b"\0")
    with pytest.raises(InputError, match="damaged or another release"):
        fetch("good", folder=tmp_path)
    path.unlink()
    assert fetch("good", folder=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("good", {"sha256": "0" * 64}, "where 000000000000… was expected"),
        ("cut", {}, "broke off"),
        ("absent", {}, "answers 404"),
        ("slow", {}, "did not answer in time"),
        ("page", {}, "line 1 is not FASTA"),
    ],
)
def test_a_failed_download_leaves_nothing(served, tmp_path, monkeypatch, name, options, said):
    monkeypatch.setattr(downloads, "TIMEOUT", (0.5, 0.5))
    with pytest.raises(InputError, match=said) as caught:
        fetch(name, folder=tmp_path, **options)
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_offline_names_the_address_and_takes_a_local_file(served, tmp_path):
    served.shutdown()
    served.server_close()
    with pytest.raises(InputError) as caught:
        fetch("good", folder=tmp_path / "cache")
    message = one_line(caught)
    assert SOURCES["good"].url in message and "local_file" in message and "no connection" in message
    local = tmp_path / "by_hand.gz"
    local.write_bytes(CONTENT)
    assert fetch("good", local_file=local) == local == fetch("good", local_file=local, sha256=sha256_file(local))
    local.write_bytes(gzip.compress(b">TP53\nMEEPQSDPSVEPPLSQETW\n"))
    with pytest.raises(InputError, match="damaged or another release"):
        fetch("good", local_file=local)
    assert fetch("good", local_file=local, sha256=sha256_file(local)) == local == fetch("good", local_file=local)
    with pytest.raises(MissingFileError):
        fetch("good", local_file=tmp_path / "absent")


def test_only_what_looks_like_the_proteome_is_trusted(tmp_path):
    header = {
        "human_uniprot": ">sp|P{0}|A_HUMAN Some protein OS=Homo sapiens OX=9606 GN=G{0} PE=1 SV=1",
        "mouse_uniprot": ">tr|P{0}|A_MOUSE Some protein OS=Mus musculus OX=10090 GN=G{0} PE=1 SV=1",
        "human_ensembl": ">ENSP{0:011d}.1 pep chromosome:GRCh38:1:1:2:1 gene:ENSG1.1 gene_symbol:G{0}",
        "mouse_ensembl": ">ENSMUSP{0:011d}.1 pep chromosome:GRCm39:1:1:2:1 gene:ENSMUSG1.1 gene_symbol:G{0}",
    }

    def write(kind: str, n: int):
        path = tmp_path / f"{kind}_{n}.fasta"
        path.write_text("".join(f"{header[kind].format(i)}\nMKTAYIAK\n" for i in range(n)))
        return path

    for name in header:
        for kind in header:
            path = write(kind, 12_000)
            if kind == name:
                assert fetch(name, local_file=path) == path and path.with_name(f"{path.name}.sha256").is_file()
                path.with_name(f"{path.name}.sha256").unlink()
                continue
            with pytest.raises(InputError, match="headers are of another kind, first line 1:") as caught:
                fetch(name, local_file=path)
            assert path.name in one_line(caught) and not path.with_name(f"{path.name}.sha256").exists()
        few = write(name, 900)
        with pytest.raises(InputError, match="it holds 900 proteins, and 10,000 or more were expected"):
            fetch(name, local_file=few)
        assert not few.with_name(f"{few.name}.sha256").exists()


def test_sources_are_addresses_of_what_they_say():
    for source in SOURCES.values():
        assert source.url.startswith("https://") and source.kind in ("proteins", "genes")
        assert source.sha256 is None or len(source.sha256) == 64


# Real tables


@pytest.fixture(scope="module")
def shared():
    folder = project_root().parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development data are not on this machine")
    return folder


@pytest.fixture(scope="module")
def hgnc(shared) -> GeneNames:
    return GeneNames.read(shared / "genes" / "hgnc.tsv.gz")


@pytest.mark.realdata
def test_human_proteins_are_all_readable(shared):
    human = read_fasta(shared / "proteins" / "human.fasta.gz")
    assert len(human) == 12_464 and len(human["TTN"]) == 34_350
    assert all(clean_sequence(sequence) for sequence in human.values())
    assert residue_report(human).loc["U", "genes"] == 17
    yeast = read_fasta(shared / "proteins" / "yeast_proteome.fasta.gz", isoforms="canonical")
    assert "TY4B-P" in yeast and len(yeast) == 6060


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "n_proteins", "n_genes", "n_undecided"),
    [
        ("human", 12_464, 12_464, 0),
        ("yeast_proteome", 6060, 6060, 0),
        ("pombe_proteome", 5122, 5084, 38),
        ("ecoli_proteome", 4438, 4392, 0),
        ("uniprot_sample", 20_000, 12_876, 1118),
        ("microbial_viral", 19_513, 19_513, 0),
    ],
)
def test_isoforms_of_real_proteomes(shared, name, n_proteins, n_genes, n_undecided):
    isoforms = read_isoforms(shared / "proteins" / f"{name}.fasta.gz")
    assert sum(map(len, isoforms.values())) == n_proteins and len(isoforms) == n_genes
    assert len(undecided_genes(isoforms)) == n_undecided
    assert sum(map(len, choose_isoforms(isoforms, "all_mean").values())) == n_proteins
    assert set(map(len, choose_isoforms(isoforms, "longest").values())) == {1}


@pytest.mark.realdata
def test_screens_are_matched_to_real_proteins(shared, hgnc):
    import anndata

    assert len(hgnc.records) == 43_837
    screen = anndata.read_h5ad(shared / "perturb_seq" / "l1000_knockdown_zscores.h5ad", backed="r")
    genes = [gene for gene in screen.obs["perturbation"].astype(str).unique() if gene != "control"]
    human = read_fasta(shared / "proteins" / "human.fasta.gz")
    matches = hgnc.match(genes, human)
    renamed = {match.requested: match.name for match in matches if match.status == "previous symbol"}
    assert renamed == {
        "TOMM70A": "TOMM70",
        "ATP5S": "DMAC2L",
        "ERO1L": "ERO1A",
        "WDR61": "SKIC8",
        "TMEM5": "RXYLT1",
    }
    assert all(match.status in ("exact", "previous symbol", "missing") for match in matches)
    without = hgnc.match(["ACTB", "CDC42", "RUNX1T1", "CNN1"], human)
    assert {match.status for match in without} == {"missing"}


@pytest.mark.realdata
def test_ambiguous_names_of_hgnc_are_listed(hgnc):
    assert hgnc.match(["ABL", "HN1L"], hgnc.records) == [
        Match("ABL", None, "ambiguous", ("ABL1", "DSP-AS1", "MTTP")),
        Match("HN1L", "JPT2", "previous symbol"),
    ]
    symbols = list(hgnc.records)
    assert all(match.status == "exact" for match in hgnc.match(symbols, hgnc.records))
    folded = hgnc.match([symbol.swapcase() for symbol in symbols], hgnc.records)
    assert all(match.name in (None, symbol) for match, symbol in zip(folded, symbols, strict=True))
