"""The embedded model keeps what its card promises."""

import json
from pathlib import Path

import numpy as np
import pytest

from esm_perturb.proteins.embed import embed_sequences
from esm_perturb.proteins.embedding_space import agreement_difference, composition_vectors, family_agreement
from esm_perturb.proteins.esm2 import ESM2
from esm_perturb.proteins.mini_report import unigram_nll
from esm_perturb.proteins.pretraining import masked_nll
from esm_perturb.proteins.protein_sets import protein_id, read_distinct
from esm_perturb.proteins.sequences import AMINO_ACIDS

MODEL = Path(__file__).parents[1] / "data" / "mini_esm2"
DATA = Path(__file__).parents[2] / "shared" / "data" / "proteins"
CARD = (MODEL / "README.md").read_text(encoding="utf-8")
REPORT = json.loads((MODEL / "report.json").read_text(encoding="utf-8"))  # travels with the weights
CROP = 256


@pytest.fixture(scope="module")
def held_out() -> dict:
    """The held-out set of the card, its sequences found in the FASTA files."""
    paths = [DATA / file["file"] for file in REPORT["data"]["files"]]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"needs the FASTA files of the card in {DATA}")
    sequences = {protein_id(sequence): sequence for sequence in read_distinct(paths)[0]}
    record = json.loads((MODEL / "held_out.json").read_text(encoding="utf-8"))
    return {
        "proteins": [sequences[name] for name in record["proteins"]],
        "families": [[sequences[name] for name in family] for family in record["families"]],
        "frequencies": np.array([record["training_frequencies"][residue] for residue in AMINO_ACIDS]),
    }


def test_the_model_fits_into_the_repository_and_says_whose_it_is():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 8_000_000
    assert "not Meta's ESM2" in CARD


def test_the_card_states_the_report():
    for value in (REPORT["perplexity"], REPORT["shuffled_perplexity"], REPORT["unigram_perplexity"]):
        assert f"{value:.2f}" in CARD
    assert f"{REPORT['natural_below_shuffled']:.1%}" in CARD
    assert f"{REPORT['families']['embeddings'][0]:.1%}" in CARD
    assert f"{REPORT['parameters']:,}" in CARD


def test_promises_hold_with_their_intervals():
    assert REPORT["below_unigram"] > 0.8 and REPORT["below_unigram_interval"][0] > 0.5
    assert REPORT["natural_below_shuffled"] > 0.8 and REPORT["natural_below_shuffled_interval"][0] > 0.7
    assert REPORT["perplexity_interval"][1] < REPORT["unigram_perplexity"]


@pytest.mark.realdata
def test_held_out_proteins_score_as_the_card_says(held_out):
    natural = [sequence[:CROP] for sequence in held_out["proteins"][:120]]
    rng = np.random.default_rng(0)
    shuffled = ["".join(rng.permutation(list(sequence))) for sequence in natural]
    model = ESM2.load("mini_esm2", device="cpu")
    ours, theirs = (masked_nll(model, sequences, seed=1) for sequences in (natural, shuffled))
    perplexity = np.exp(np.concatenate(ours).mean())
    unigram = np.exp(unigram_nll(held_out["frequencies"], natural).sum() / sum(map(len, ours)))
    assert unigram - perplexity > 0.6
    assert abs(perplexity - REPORT["perplexity"]) < 0.6
    assert np.mean([a.sum() < b.sum() for a, b in zip(ours, theirs, strict=True)]) > 0.75


@pytest.mark.realdata
def test_families_that_it_never_met_are_found_as_the_card_says(held_out):
    families = [family for family in held_out["families"] if len(family) > 1]
    names = {f"{i}-{j}": sequence for i, family in enumerate(families) for j, sequence in enumerate(family)}
    labels = {name: name.split("-")[0] for name in names}
    ours = family_agreement(embed_sequences(ESM2.load("mini_esm2", device="cpu"), names, progress=False), labels)
    base = family_agreement(composition_vectors(names), labels)
    assert ours.low > 20 * ours.chance
    assert ours.share == pytest.approx(REPORT["families"]["embeddings"][0], abs=0.005)
    assert agreement_difference(ours, base)[0] == pytest.approx(REPORT["families"]["difference"][0], abs=0.005)
