"""Perplexity and what stands beside it: known answers, brute force, fair-esm, bad input, and files killed half-way."""

import copy
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_perturb.core.config import InputError
from esm_perturb.proteins import perplexity as perplexity_module
from esm_perturb.proteins import sequence_quality
from esm_perturb.proteins.esm2 import ALPHABET, ESM2, MASK, to_fair_esm_state, tokenize
from esm_perturb.proteins.perplexity import (
    ESMEvaluator,
    calculate_esm_perplexity,
    draw_masks,
    masked_from_unmasked,
    residue_nll,
    scored_positions,
)
from esm_perturb.proteins.scoring import score_fasta
from esm_perturb.proteins.scoring_report import scoring_report
from esm_perturb.proteins.sequence_quality import (
    frechet_distance,
    longest_repeat,
    nearest_reference,
    quality_summary,
    quality_table,
)
from esm_perturb.proteins.sequences import AMINO_ACIDS

REALDATA = Path(__file__).parents[2] / "shared" / "data"
PUBLISHED = REALDATA / "perplexity" / "ada1_esm2_35M_published.csv"


@pytest.fixture(scope="module")
def model() -> ESM2:
    """Random weights, every bias and LayerNorm away from its start."""
    model = ESM2.new(n_layers=2, hidden_dim=48, n_heads=4, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def proteins() -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list(AMINO_ACIDS), size=size)) for size in (5, 40, 17, 40, 1, 63)]


# The numbers


def test_every_kind_of_score_is_the_same_alone_and_in_a_batch(model, proteins):
    evaluator = ESMEvaluator(model, batch_size=3)
    for method in (evaluator.score, evaluator.pseudo_perplexity, evaluator.one_pass):
        together = method(proteins).iloc[:, 0]
        np.testing.assert_allclose(together, [method([one]).iloc[0, 0] for one in proteins], rtol=2e-5)
        np.testing.assert_allclose(method(proteins[::-1]).iloc[::-1, 0], together, rtol=2e-5)


def test_alone_equals_in_a_batch_for_padded_attention_too(model, proteins, monkeypatch):
    """A GPU pads; so does fair-esm's network."""
    network = perplexity_module.open_network

    def with_padding(model, settings):
        opened = network(model, settings)
        opened.attention = "padded"
        return opened

    expected = ESMEvaluator(model).perplexity(proteins)
    monkeypatch.setattr(perplexity_module, "open_network", with_padding)
    np.testing.assert_allclose(ESMEvaluator(model, batch_size=6).perplexity(proteins), expected, rtol=2e-5)


def test_masked_and_exact_scores_equal_loops_over_fair_esm(model, proteins):
    from esm.model.esm2 import ESM2 as FairESM2

    fair = FairESM2(num_layers=2, embed_dim=48, attention_heads=4).eval()
    fair.load_state_dict(to_fair_esm_state(model), strict=True)
    sequence = proteins[1]
    ids, _ = tokenize([sequence])

    def nll(hidden: list[int]) -> list[float]:
        masked = ids.clone()
        masked[0, [position + 1 for position in hidden]] = MASK
        with torch.inference_mode():
            log_p = fair(masked)["logits"][0].log_softmax(dim=-1)
        return [-log_p[position + 1, ids[0, position + 1]].item() for position in hidden]

    evaluator = ESMEvaluator(model, seed=7)
    masked = [value for row in draw_masks(sequence, seed=7) for value in nll(row.tolist())]
    exact = [nll([position])[0] for position in range(len(sequence))]
    assert math.isclose(evaluator.perplexity([sequence])[0], math.exp(np.mean(masked)), rel_tol=2e-5)
    assert math.isclose(evaluator.pseudo_perplexity([sequence])["nll"][0], np.mean(exact), rel_tol=2e-5)


def test_the_fair_esm_network_gives_the_same_scores(model, proteins):
    fair = ESM2(model.network, name="same", backend="fair-esm").eval()
    np.testing.assert_allclose(ESMEvaluator(fair).perplexity(proteins), ESMEvaluator(model).perplexity(proteins), 2e-5)


@pytest.mark.parametrize("aa_only", [False, True])
def test_a_known_distribution_gives_its_perplexity(aa_only):
    model = ESM2.new(1, 16, 2)
    with torch.no_grad():
        model.network.lm_head.decoder.weight.zero_()
        model.network.lm_head.bias.copy_(torch.linspace(-2, 2, 33))
    p = torch.linspace(-2, 2, 33).softmax(dim=0)
    total = sum(p[ALPHABET.index(residue)].item() for residue in AMINO_ACIDS) if aa_only else 1.0
    evaluator = ESMEvaluator(model, aa_only=aa_only)
    expected = [total / p[ALPHABET.index(residue)].item() for residue in "AW"]
    table = evaluator.score(["AAAAAAAAAA", "WWWWW"])
    np.testing.assert_allclose(table["perplexity"], expected, rtol=1e-5)
    np.testing.assert_allclose(evaluator.pseudo_perplexity(["AAAAAAAAAA", "WWWWW"])["perplexity"], expected, rtol=1e-5)
    np.testing.assert_allclose(table["standard_error"], 0, atol=1e-4)


def test_standard_error_is_that_of_the_masks_and_falls_with_their_number(model, proteins):
    sequence = proteins[5]
    by_mask = [values.mean() for values in residue_nll(model, [sequence] * 5, list(draw_masks(sequence)))]
    row = ESMEvaluator(model).score([sequence]).iloc[0]
    expected = math.exp(np.mean(by_mask)) * np.std(by_mask, ddof=1) / math.sqrt(5)
    assert math.isclose(row["standard_error"], expected, rel_tol=1e-4)
    many = ESMEvaluator(model, n_masks=100).score([sequence]).iloc[0]
    assert 0 < many["standard_error"] < row["standard_error"]
    assert math.isnan(ESMEvaluator(model, n_masks=1).score([sequence])["standard_error"][0])


def test_the_unmasked_pass_is_inverted_by_bayes_rule():
    q = np.linspace(0.001, 0.999, 50)
    kept, replaced = 0.1 * q, 0.1 * q / 20
    seen = (kept + replaced) / (0.1 * q + 0.1 / 20)
    np.testing.assert_allclose(np.exp(-masked_from_unmasked(-np.log(seen))), q, rtol=1e-9)


def test_an_unmasked_pass_hides_nothing(model, proteins):
    table = ESMEvaluator(model).one_pass(proteins)
    assert "perplexity" not in table.columns
    ids, mask = tokenize([proteins[1]])
    with torch.inference_mode():
        log_p = model.logits(ids, mask)[0].log_softmax(dim=-1)
    nll = -log_p[range(1, 41), ids[0, 1:41]].mean().item()
    assert math.isclose(table["unmasked_perplexity"][1], math.exp(nll), rel_tol=2e-5)


def test_only_hidden_positions_reach_the_output_head(model, proteins, monkeypatch):
    rows = []
    head = model.network.lm_head
    hook = head.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    calculate_esm_perplexity(proteins, model, batch_size=4)
    hook.remove()
    assert sum(rows) == 5 * sum(max(1, int(0.15 * len(sequence))) for sequence in proteins) and len(rows) == 2


def test_batches_keep_to_the_token_budget(model, proteins, monkeypatch):
    sizes = []
    opened = perplexity_module.open_network

    def watched(model, settings):
        network = opened(model, settings)
        return type("Watched", (), {
            "device": network.device,
            "__call__": lambda self, packed, at: sizes.append(packed.lengths) or network(packed, at=at),
        })()  # fmt: skip

    monkeypatch.setattr(perplexity_module, "open_network", watched)
    residue_nll(model, proteins * 5, [scored_positions(one) for one in proteins * 5], batch_tokens=200)
    assert all(max(batch) * len(batch) <= 200 for batch in sizes)
    assert [length for batch in sizes for length in batch] == sorted(
        (len(one) + 2 for one in proteins * 5), reverse=True
    )


def test_memory_that_runs_out_halves_the_batch_and_costs_one_sequence_at_most(model, proteins, monkeypatch):
    """A network that holds 70 tokens: two sequences never fit, the longest not even alone."""
    opened = perplexity_module.open_network

    def small(model, settings):
        network = opened(model, settings)

        def forward(self, packed, at):
            if len(packed.ids) > 64:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(packed, at=at)

        return type("Small", (), {"device": network.device, "__call__": forward})()

    expected = ESMEvaluator(model).score(proteins)
    monkeypatch.setattr(perplexity_module, "open_network", small)
    table = ESMEvaluator(model).score(proteins)
    assert table["status"].tolist() == ["scored"] * 5 + ["out_of_memory"] and "smaller model" in table["reason"][5]
    np.testing.assert_allclose(table["perplexity"][:5], expected["perplexity"][:5], rtol=2e-5)


def test_scoring_disturbs_no_random_state_and_no_mode(model, proteins):
    model.train()
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    calculate_esm_perplexity(proteins, model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002
    model.eval()


@given(st.text(alphabet=AMINO_ACIDS + "XU", min_size=1, max_size=80), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_masks_hide_the_stated_number_of_standard_residues(sequence, seed):
    standard = [index for index, residue in enumerate(sequence) if residue in AMINO_ACIDS]
    if standard:
        masks = draw_masks(sequence, seed=seed)
        assert masks.shape == (5, max(1, int(0.15 * len(standard) + 1e-9)))
        assert all(len(set(row)) == len(row) and set(row) <= set(standard) for row in masks.tolist())


# Published values


def needs(path: Path) -> Path:
    """A file of the real data; the test is skipped without it."""
    if not path.is_file():
        pytest.skip(f"real data are not beside this repository: {path.name}")
    return path


@pytest.mark.realdata
def test_natural_proteins_score_below_their_shuffled_copies_and_those_below_random_ones():
    with gzip.open(needs(REALDATA / "proteins" / "uniprot_sample.fasta.gz"), "rt") as file:
        records = file.read().split(">")[1:]
    whole = ["".join(record.split("\n")[1:]) for record in records if "Fragment" not in record.split("\n")[0]]
    rng = np.random.default_rng(1)
    fitting = [protein for protein in whole if 80 <= len(protein) <= 160 and set(protein) <= set(AMINO_ACIDS)]
    natural = [fitting[i] for i in rng.choice(len(fitting), 40, replace=False)]
    shuffled = ["".join(rng.permutation(list(protein))) for protein in natural]
    drawn = ["".join(rng.choice(list(AMINO_ACIDS), size=len(protein))) for protein in natural]
    mini = ESMEvaluator("mini_esm2")
    groups = [mini.score(proteins)["perplexity"] for proteins in (natural, shuffled, drawn)]
    assert groups[0].median() < groups[1].median() < groups[2].median()
    assert (groups[0] < groups[1]).mean() > 0.6
    unmasked = [mini.one_pass(proteins)["unmasked_perplexity"].max() for proteins in (natural, shuffled, drawn)]
    assert max(unmasked) < min(group.median() for group in groups)


@pytest.mark.realdata
def test_published_scores_have_our_formulas():
    needs(PUBLISHED)
    table = pd.read_csv(PUBLISHED)
    np.testing.assert_allclose(np.exp(-table["pll"] / table["length"]), table["pseudo_perplexity"], rtol=1e-4)
    np.testing.assert_allclose(np.exp(-table["mean_log_prob"]), table["perplexity"], rtol=1e-4)
    assert table["perplexity"].max() < table["pseudo_perplexity"].min()


@pytest.mark.realdata
def test_published_format_is_reproduced(model):
    published = pd.read_csv(needs(PUBLISHED)).head(2)
    exact = ESMEvaluator(model).pseudo_perplexity([sequence[:60] for sequence in published["sequence"]])
    ours = pd.DataFrame({"pseudo_perplexity": exact["perplexity"], "mean_pll": -exact["nll"]})
    ours["pll"] = ours["mean_pll"] * exact["n_scored"]
    assert (published["length"] == published["sequence"].str.len()).all() and (exact["n_scored"] == 60).all()
    np.testing.assert_allclose(np.exp(-ours["pll"] / 60), ours["pseudo_perplexity"], rtol=1e-9)


# Bad input


def test_bad_input_keeps_its_place_and_says_why(model, proteins, caplog):
    good = proteins[1]
    given = ["", good, None, "MK1", "XXX", "M" * 10_000, good, good.lower() + "*\n", " \n", "MK-J*A", b"MK"]
    table = ESMEvaluator(model).score(given)
    bad, fine = "not_protein", "scored"
    statuses = ["empty", fine, bad, bad, "no_standard_residue", "too_long", fine, fine, "empty", fine, bad]
    assert table["status"].tolist() == statuses
    assert (table["status"] == "scored").equals(table["perplexity"].notna())
    assert (table["reason"] == "").equals(table["perplexity"].notna())
    assert table["perplexity"][1] == table["perplexity"][6] == table["perplexity"][7]
    assert table["n_scored"][9] == 3 and "10000 residues" in table["reason"][5]
    with caplog.at_level("WARNING"):
        values = ESMEvaluator(model).perplexity(given)
    assert len(values) == len(given) and len(caplog.messages) == table["perplexity"].isna().sum()


def test_an_alphabet_that_does_not_match_is_refused(model, tmp_path):
    folder = model.save(tmp_path / "other")
    words = (folder / "vocab.txt").read_text().split()
    words[4], words[5] = words[5], words[4]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(InputError, match="vocab"):
        calculate_esm_perplexity(["MKT"], str(folder))


@pytest.mark.parametrize(
    "options", [{"mask_fraction": 0}, {"mask_fraction": 1.1}, {"batch_size": 0}, {"n_masks": 0}, {"seed": -1}]
)
def test_options_out_of_range_are_refused(model, options):
    with pytest.raises(InputError, match=next(iter(options))):
        ESMEvaluator(model, **options)


def test_longer_sequences_are_scored_on_request(model):
    sequence = "MKTAYIAKQR" * 110
    assert ESMEvaluator(model).score([sequence])["status"][0] == "too_long"
    assert ESMEvaluator(model, max_residues=2000, n_masks=1).score([sequence])["status"][0] == "scored"


# Files


CHILD = """
import sys
from esm_perturb.proteins.esm2 import ESM2
from esm_perturb.proteins.perplexity import ESMEvaluator
from esm_perturb.proteins.scoring import score_fasta
evaluator = ESMEvaluator(ESM2.new(1, 16, 2), batch_size=64)
score_fasta(sys.argv[1], sys.argv[2], evaluator, progress=False)
"""


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    fasta, output, whole = tmp_path / "many.fasta", tmp_path / "scores.csv", tmp_path / "whole.csv"
    sizes = rng.integers(20, 60, size=4000)
    lines = (f">s{i}\n{''.join(rng.choice(list(AMINO_ACIDS), size=size))}\n" for i, size in enumerate(sizes))
    fasta.write_text("".join(lines))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(fasta), str(output)], env=environment)
    parts = tmp_path / "scores.csv.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("0*.csv"))) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not output.exists()
    evaluator = ESMEvaluator(ESM2.new(1, 16, 2), batch_size=64)
    continued = score_fasta(fasta, output, evaluator, progress=False)
    assert continued.n_parts_found >= 2 and not parts.exists()
    score_fasta(fasta, whole, evaluator, progress=False)
    assert output.read_bytes() == whole.read_bytes()
    assert pd.read_csv(output)["id"].tolist() == [f"s{index}" for index in range(4000)]


def test_parts_of_other_settings_are_not_used(model, tmp_path):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nMKTAYIAKQRQISFVKSHFSRQ\n")
    first = score_fasta(fasta, tmp_path / "a.csv", ESMEvaluator(model), progress=False)
    second = score_fasta(fasta, tmp_path / "b.csv", ESMEvaluator(model, aa_only=True), progress=False)
    exact = score_fasta(fasta, tmp_path / "c.csv", ESMEvaluator(model), exact=True, progress=False)
    values = [pd.read_csv(run.path)["perplexity"][0] for run in (first, second, exact)]
    assert len(set(values)) == 3
    assert json.loads((tmp_path / "c.json").read_text())["kind"] == "pseudo_perplexity"


def test_a_file_that_fails_leaves_the_old_scores(model, tmp_path):
    (tmp_path / "bad.fasta").write_text("no header\n")
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(InputError, match="is not FASTA"):
        score_fasta(tmp_path / "bad.fasta", tmp_path / "a.csv", ESMEvaluator(model), progress=False)
    assert (tmp_path / "a.csv").read_text() == "old"


# Beyond perplexity


def test_longest_repeat_equals_all_pairs():
    rng = np.random.default_rng(1)
    for _ in range(60):
        text = "".join(rng.choice(list("AC"), size=rng.integers(0, 30)))
        stretches = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
        expected = max((len(s) for s in set(stretches) if stretches.count(s) > 1), default=0)
        assert longest_repeat(text) == expected


def test_the_nearest_reference_is_found_among_thousands(monkeypatch):
    rng = np.random.default_rng(3)
    reference = ["".join(rng.choice(list(AMINO_ACIDS), size=80)) for _ in range(2000)]
    chosen = rng.choice(2000, size=10, replace=False)
    changed = []
    for index in chosen:
        letters = list(reference[index])
        for place in rng.choice(80, size=24, replace=False):
            letters[place] = "W"
        changed.append("".join(letters))
    for most in (10**6, 1):  # all pairs; candidates alone
        monkeypatch.setattr(sequence_quality, "_MOST_PAIRS", most)
        nearest, distance = nearest_reference(changed, reference)
        assert nearest.tolist() == chosen.tolist() and (distance <= 0.3).all()
    strangers = ["".join(rng.choice(list(AMINO_ACIDS), size=80)) for _ in range(30)]
    bound = nearest_reference(strangers, reference)[1]
    monkeypatch.setattr(sequence_quality, "_MOST_PAIRS", 10**6)
    excess = bound - nearest_reference(strangers, reference)[1]
    assert (excess >= 0).all() and 0 < excess.mean() < 0.035  # with one candidate instead of thirty it is 0.05


def test_a_damaged_model_is_no_lack_of_memory(model):
    damaged = copy.deepcopy(model)
    next(damaged.network.esm.encoder.layer[0].parameters()).data.fill_(float("nan"))
    with pytest.raises(InputError, match="are not numbers"):
        ESMEvaluator(damaged).score(["MKTAYIAKQRQISFVKSHFSR"])


def test_pairs_for_diversity_are_drawn_evenly_and_without_a_list_of_all():
    names = ["A" * n for n in range(1, 61)]
    rng, seen = np.random.default_rng(0), []
    original = sequence_quality.normalized_distance
    sequence_quality.normalized_distance = lambda a, b: seen.append((len(a), len(b))) or original(a, b)
    try:
        value, n_pairs = sequence_quality._diversity(names, rng, 1700)
    finally:
        sequence_quality.normalized_distance = original
    assert n_pairs == len(set(seen)) == 1700 and all(1 <= a < b <= 60 for a, b in seen)
    assert value == pytest.approx(np.mean([1 - a / b for b in range(1, 61) for a in range(1, b)]), abs=0.01)


def test_sets_are_measured_as_seqme_measures_them(model):
    seqme = pytest.importorskip("seqme", reason="seqme is not installed")
    rng = np.random.default_rng(6)
    some, other = (["".join(rng.choice(list(AMINO_ACIDS), size=n)) for n in rng.integers(20, 60, 14)] for _ in "ab")
    some[:3] = other[0], some[5], some[5]
    found = quality_summary(some, reference=other, model=model)
    vectors = {s: v for s, v in zip((*some, *other), sequence_quality._vectors(model, [*some, *other]), strict=True)}
    fbd = seqme.metrics.FBD(other, lambda sequences: np.stack([vectors[s] for s in sequences]))
    assert found["frechet_distance"] == pytest.approx(fbd(some).value, rel=1e-3, abs=1e-6)
    assert found["diversity"] == pytest.approx(seqme.metrics.Diversity()(some).value)
    assert found["unique_share"] == pytest.approx(seqme.metrics.Uniqueness()(some).value)
    assert 1 - found["copied_share"] == pytest.approx(seqme.metrics.Novelty(other)(some).value)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(4000, 3))
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), (x - x.mean(0)).T).T
    assert math.isclose(frechet_distance(x, 3 * x + [1, 2, 2]), 9 + 3 * (1 - 3) ** 2, rel_tol=1e-9)
    assert frechet_distance(x[:3], x[:3]) < 1e-9
    with pytest.raises(InputError):
        frechet_distance(x[:1], x)


def test_quality_says_what_perplexity_does_not(model, proteins):
    natural = [proteins[1], proteins[3], proteins[5], proteins[2]]
    table = quality_table([natural[0], natural[0], "A" * 30], reference=natural)
    assert table["novelty"].tolist()[:2] == [0, 0] and table["copies"].tolist() == [2, 2, 1]
    assert table["entropy"][2] == 0 and table["longest_repeat_share"][2] > 0.95
    one = quality_summary(natural, reference=natural, model=model)
    assert one["copied_share"] == 1 and one["amino_acid_divergence"] < 1e-12 and one["length_distance"] == 0
    assert one["frechet_distance"] < 1e-6 and one["frechet_n"] == 4 and one["unique_share"] == 1


def test_the_report_is_one_file_and_survives_hostile_ids(model, proteins, tmp_path):
    fasta = tmp_path / "a.fasta"
    names = ["<script>alert(1)</script>", *(f"s{i}" for i in range(5))]
    fasta.write_text("".join(f">{name}\n{one}\n" for name, one in zip(names, proteins, strict=True)) + ">empty\n")
    scored = score_fasta(fasta, tmp_path / "a.csv", ESMEvaluator(model), progress=False)
    page = scoring_report(scored.path, fasta, tmp_path / "a.html", reference=proteins).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert 'src="http' not in page and 'href="http' not in page and "<link" not in page
    assert "6 of 7" in page and page.count("<figure") >= 3
