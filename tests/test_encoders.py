"""Properties of perturbation encoders: what is added up, what is refused, and what a control arm may know."""

import dataclasses
import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from esm_perturb.core.config import InputError, ModelKwargs
from esm_perturb.models.encoder_parts import FeatureTable, mlp, random_vectors
from esm_perturb.models.encoders import build_encoder, encoder_from
from esm_perturb.models.fingerprints import morgan_fingerprints
from esm_perturb.models.state_transition import StateTransition

GENES = [f"GENE{i}" for i in range(12)]
DRUGS = {
    "aspirin": "CC(=O)OC1=CC=CC=C1C(=O)O",
    "ibuprofen": "CC(C)CC1=CC=C(C=C1)C(C)C(=O)O",
    "caffeine": "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "naproxen": "CC(C1=CC2=C(C=C1)C=C(C=C2)OC)C(=O)O",
}
SETTINGS = ModelKwargs(hidden_dim=32, dropout=0.0, fingerprint_bits=256)
VECTORS = np.random.default_rng(0).normal(3, 2, size=(12, 10)).astype(np.float32)
DOSED = ["CRISPRi", "compound@0.01", "compound@1", "compound@100"]
KINDS = ["esm", "onehot", "random", "shuffled", "fingerprint", "esm+fingerprint", "esm+onehot", "onehot+fingerprint"]


def make(kinds: str = "esm", *, modalities=("unspecified",), seed: int = 0, **changes):
    """A small encoder in evaluation mode; genes or compounds are left out where no part knows them."""
    parts = set(kinds.split("+"))
    if "fingerprint" in parts and importlib.util.find_spec("rdkit") is None:
        pytest.skip("needs rdkit")
    given = dict(genes=GENES, vectors=VECTORS, train_genes=[*GENES[:8], "aspirin", "ibuprofen"], smiles=DRUGS)
    if not parts & {"esm", "random", "shuffled", "onehot"}:
        given |= dict(genes=[], vectors=None)
    if not parts & {"fingerprint", "onehot"}:
        given |= dict(smiles=None)
    given |= dict(modalities=modalities, control="non-targeting", model=SETTINGS, seed=seed) | changes
    torch.manual_seed(0)
    return build_encoder(tuple(kinds.split("+")), **given).eval()


@torch.no_grad()
def encode(encoder, *labels: str, modality: str = "unspecified") -> torch.Tensor:
    return encoder(labels, [modality] * len(labels))


def excite(module: nn.Module) -> None:
    """Move weights that begin at zero, as training would."""
    with torch.no_grad():
        for weight in module.parameters():
            if not weight.any():
                weight.normal_(std=0.3)


# What is added up


@pytest.mark.parametrize("kinds", KINDS)
def test_an_encoding_is_the_sum_of_its_members_in_any_order(kinds):
    encoder = make(kinds)
    excite(encoder)
    members = encoder.names[:3]
    single = encode(encoder, *members)
    labels = ["+".join(order) for order in itertools.permutations(members)]
    together, apart = encode(encoder, *labels), [encode(encoder, label)[0] for label in labels]
    assert all(torch.equal(row, together[0]) for row in together)
    assert all(torch.equal(row, apart[0]) for row in apart)
    torch.testing.assert_close(together[0], single.sum(0), atol=1e-5, rtol=1e-5)
    assert not encode(encoder, "non-targeting").any()
    torch.testing.assert_close(encode(encoder, f"{members[0]}+non-targeting"), single[:1], atol=1e-6, rtol=0)


def test_a_sum_of_parts_is_the_sum_over_the_parts_that_know_the_member():
    both = make("esm+onehot", smiles=None)
    excite(both)
    rows = torch.tensor([3])
    with torch.no_grad():
        alone = [part.network(part.lookup(rows)) for part in both.parts.values()]
    torch.testing.assert_close(encode(both, "GENE3"), alone[0] + alone[1], atol=1e-6, rtol=0)


def test_an_encoding_does_not_depend_on_its_batch():
    encoder = make("esm+fingerprint", modalities=DOSED)
    excite(encoder)
    labels, modalities = (
        ["GENE3", "aspirin", "non-targeting", "GENE1+caffeine", "GENE3"],
        ["CRISPRi", *DOSED[1:], "CRISPRi"],
    )
    with torch.no_grad():
        whole = encoder(labels, modalities)
        for i, (label, modality) in enumerate(zip(labels, modalities, strict=True)):
            torch.testing.assert_close(encoder([label], [modality])[0], whole[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(whole[0], whole[4])


def test_equal_perturbations_of_a_batch_are_encoded_once():
    encoder, seen = make(), []
    encoder.parts["esm"].network.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    encode(encoder, *["GENE1", "GENE2", "GENE1+GENE2", "non-targeting"] * 10)
    assert seen == [2]


# What is refused


@pytest.mark.parametrize("kinds", KINDS)
def test_an_unknown_member_is_refused_with_the_nearest_name(kinds):
    encoder = make(kinds)
    known = encoder.names[0]
    for label in (known.swapcase(), f"{known}+{known.swapcase()}"):
        with pytest.raises(InputError, match=f"no entry for .*'{known.swapcase()}' .did you mean '{known}'"):
            encode(encoder, label)
    for label in ("QQQ", "", " "):
        with pytest.raises(InputError, match=r"no entry for .*; .*\.$"):
            encode(encoder, label)


@pytest.mark.parametrize(
    "kinds, changes, said",
    [
        ("fingerprint", {"genes": GENES}, "esm.fingerprint"),
        ("esm", {"smiles": DRUGS}, "esm.fingerprint"),
        ("esm+fingerprint", {"smiles": None}, "smiles_col"),
        ("esm+fingerprint", {"genes": []}, "drop esm"),
        ("esm+fingerprint", {"genes": [*GENES[:11], "aspirin"]}, "both a gene and a compound"),
        ("esm", {"vectors": None}, "needs one embedding"),
        ("random", {"vectors": VECTORS[:3]}, "each of the 12 genes"),
        ("esm", {"train_genes": []}, "learns nothing"),
        ("esm+fingerprint", {"train_genes": GENES}, "fingerprint of pert_encoder knows trains"),
        ("fingerprint", {"smiles": DRUGS | {"JQ9": "C1CC"}}, "SMILES 'C1CC' of compound 'JQ9'"),
        ("fingerprint", {"smiles": DRUGS | {"JQ9": ""}}, "SMILES '' of compound 'JQ9'"),
    ],
)
def test_data_that_a_part_cannot_read_are_refused(kinds, changes, said):
    with pytest.raises(InputError, match=said):
        make(kinds, **changes)


# Control arms


def test_random_vectors_have_the_spread_of_the_table_and_follow_the_name():
    generator = np.random.default_rng(1)
    names = [f"G{i}" for i in range(3000)]
    table = (generator.normal(size=(3000, 6)) * [1, 10, 0.1, 5, 2, 1] + [0, 3, -1, 100, 0, 1]).astype(np.float32)
    drawn = random_vectors(names, table, seed=4)
    np.testing.assert_allclose(drawn.mean(0), table.mean(0), atol=0.1 * table.std(0).max(), rtol=0)
    np.testing.assert_allclose(drawn.std(0) / table.std(0), 1, atol=0.06)
    assert abs(np.corrcoef(drawn[:, 1], table[:, 1])[0, 1]) < 0.06
    order = generator.permutation(3000)
    again = random_vectors([names[i] for i in order], table[order], seed=4)
    np.testing.assert_array_equal(again, drawn[order])
    assert not np.isclose(random_vectors(names, table, seed=5), drawn).any(1).all()


def test_shuffled_gives_every_gene_the_vector_of_another():
    straight, broken = make("esm").parts["esm"].lookup.vectors, make("shuffled").parts["shuffled"].lookup.vectors
    assert (straight != broken).any(1).all()
    assert sorted(map(tuple, straight.tolist())) == sorted(map(tuple, broken.tolist()))
    assert not torch.equal(make("shuffled", seed=1).parts["shuffled"].lookup.vectors, broken)


def test_shuffling_at_inference_changes_predictions_and_no_weight():
    encoder = make("esm+fingerprint")
    before, weights = encode(encoder, *GENES, *DRUGS), {name: p.clone() for name, p in encoder.named_parameters()}
    scale = encoder.parts["esm"].lookup.mean.clone()
    with pytest.raises(InputError, match="eval"):
        encoder.train().shuffled(3)
    after = encode(encoder.eval().shuffled(3), *GENES, *DRUGS)
    assert (before != after).any(1).all()
    assert all(torch.equal(weights[name], p) for name, p in encoder.named_parameters())
    assert torch.equal(encoder.parts["esm"].lookup.mean, scale)
    torch.testing.assert_close(before[:12].sum(0), after[:12].sum(0), atol=1e-4, rtol=1e-4)  # the same vectors
    assert torch.equal(encode(make("esm+fingerprint").shuffled(3), *GENES, *DRUGS), after)
    with pytest.raises(InputError, match="no features to shuffle"):
        make("onehot").shuffled(0)


# Fingerprints


def test_fingerprints_are_those_of_rdkit():
    Chem = pytest.importorskip("rdkit.Chem", reason="needs rdkit")
    from rdkit.Chem import rdFingerprintGenerator

    for radius, n_bits in ((2, 2048), (3, 512), (0, 64)):
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
        wanted = [set(generator.GetFingerprint(Chem.MolFromSmiles(text)).GetOnBits()) for text in DRUGS.values()]
        bits = morgan_fingerprints(DRUGS, radius=radius, n_bits=n_bits)
        assert [set(np.flatnonzero(row).tolist()) for row in bits] == wanted
    settings = dataclasses.replace(SETTINGS, fingerprint_radius=3, fingerprint_bits=512)
    table = make("fingerprint", model=settings).parts["fingerprint"].lookup
    np.testing.assert_array_equal(table.vectors.numpy(), morgan_fingerprints(DRUGS, radius=3, n_bits=512))
    trained = table(torch.tensor([0, 1]))  # aspirin and ibuprofen set the scale
    assert trained.square().mean().item() == pytest.approx(1, abs=1e-5) and trained.min() == 0


def test_without_rdkit_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(InputError, match="pip install rdkit"):
        morgan_fingerprints(DRUGS)
    make("esm")


# Training


def test_genes_and_compounds_of_one_batch_train_together():
    encoder = make("esm+fingerprint", modalities=DOSED).train()
    loss = encoder(["GENE1", "aspirin", "GENE2+caffeine"], ["CRISPRi", "compound@1", "compound@0.01"]).square().sum()
    loss.backward()
    for part in encoder.parts.values():
        assert all(weight.grad.any() for weight in part.network.parameters())
    assert encoder.dose.network[-1].weight.grad.any() and encoder.modality_offset.weight.grad.any()


def test_an_optimizer_learns_a_response_that_depends_on_gene_compound_and_dose():
    encoder = make("esm+fingerprint", modalities=DOSED).train()
    labels = ["GENE1", "GENE2", "aspirin", "aspirin", "aspirin", "non-targeting"]
    modalities = ["CRISPRi", "CRISPRi", *DOSED[1:], "CRISPRi"]
    torch.manual_seed(1)
    target = torch.randn(6, 32)
    target[5] = 0
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    for _ in range(150):
        loss = (encoder(labels, modalities) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


@pytest.mark.parametrize("kinds", KINDS)
def test_every_weight_has_a_gradient_in_every_batch(kinds):
    """Else training on several processes stops at the first batch without compounds."""
    modalities = DOSED if "fingerprint" in kinds else ["KO", "OE"]
    encoder = make(kinds, modalities=modalities).train()
    for label in ("non-targeting", encoder.names[0]):
        encoder.zero_grad(set_to_none=True)
        encoder([label], [modalities[0]]).sum().backward()
        assert all(weight.grad is not None for weight in encoder.parameters())


def test_bfloat16_networks_add_up_in_float32():
    encoder = make("esm+fingerprint", modalities=DOSED)
    excite(encoder)
    labels, modalities = ["GENE1+GENE2", "aspirin", "GENE1+caffeine"], ["CRISPRi", "compound@1", "compound@100"]
    with torch.no_grad():
        exact = encoder(labels, modalities)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = encoder(labels, modalities)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.05)


# Modality and dose


def test_a_dose_changes_nothing_at_first_and_then_smoothly():
    encoder = make("esm+fingerprint", modalities=DOSED)
    plain = encode(encoder, "aspirin", modality="compound")
    for modality in (*DOSED[1:], "compound@7.5"):
        assert torch.equal(encode(encoder, "aspirin", modality=modality), plain)
    excite(encoder.dose)
    doses = [0.01, 0.1, 1, 10, 100]
    encoded = torch.cat([encode(encoder, "aspirin", modality=f"compound@{dose}") for dose in doses])
    assert torch.equal(encode(encoder, "aspirin", modality="compound"), plain)
    steps = (encoded[1:] - encoded[:-1]).norm(dim=1)
    assert (steps > 1e-3).all() and (encoded[-1] - encoded[0]).norm() > steps.max()
    near = encode(encoder, "aspirin", modality="compound@1.001")
    assert (near - encoded[2]).norm() < 0.01 * steps.min()
    assert not encode(encoder, "non-targeting", modality="compound@1").any()
    assert torch.equal(encode(encoder, "GENE1", modality="CRISPRi"), encode(make("esm+fingerprint"), "GENE1"))


def test_a_modality_shifts_every_perturbation_but_the_control():
    encoder = make(modalities=["CRISPRi", "CRISPRa"])
    labels = ["GENE1", "GENE2+GENE3", "non-targeting"]
    first = encode(encoder, *labels, modality="CRISPRi")
    assert torch.equal(encode(encoder, *labels, modality="CRISPRa"), first)
    excite(encoder)
    shift = encode(encoder, *labels, modality="CRISPRa") - encode(encoder, *labels, modality="CRISPRi")
    torch.testing.assert_close(shift[0], shift[1], atol=1e-5, rtol=0)
    assert shift[0].any() and not shift[2].any()
    assert make().modality_offset is None


def test_doses_are_standardised_on_a_logarithmic_axis():
    film = make("esm+fingerprint", modalities=DOSED).dose
    assert film.mean.item() == pytest.approx(0) and film.spread.item() == pytest.approx(np.std([-2, 0, 2]))


@pytest.mark.parametrize(
    "modality", ["compound@0", "compound@-1", "compound@nan", "compound@inf", "compound@high", "drug@1"]
)
def test_a_dose_that_is_no_number_above_zero_is_refused(modality):
    with pytest.raises(InputError, match="above zero|not trained on modality"):
        encode(make("esm+fingerprint", modalities=DOSED), "aspirin", modality=modality)


def test_a_model_trained_without_doses_refuses_one():
    encoder = make("esm+fingerprint", modalities=["CRISPRi", "compound"])
    assert encoder.dose is None
    with pytest.raises(InputError, match="trained without doses; give modality 'compound'"):
        encode(encoder, "aspirin", modality="compound@1")
    encode(encoder, "non-targeting", modality="anything")


# New perturbations and checkpoints


def test_new_genes_and_compounds_are_encoded_like_those_of_the_data():
    encoder = make("esm+onehot+fingerprint")
    excite(encoder.parts["esm"])
    encoder.add_genes(["NEW"], VECTORS[9:10])
    encoder.add_compounds({"coffein": DRUGS["caffeine"]})
    assert torch.equal(*(encode(encoder, name) for name in ("NEW", "GENE9")))
    assert torch.equal(*(encode(encoder, name) for name in ("coffein", "caffeine")))
    torch.testing.assert_close(encode(encoder, "NEW+coffein"), encode(encoder, "GENE9+caffeine"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "kinds, add, said",
    [
        ("onehot", lambda e: e.add_genes(["A"], np.zeros((1, 10))), "cannot take new genes"),
        ("shuffled", lambda e: e.add_genes(["A"], np.zeros((1, 10))), "cannot take new genes"),
        ("esm", lambda e: e.add_compounds({"A": "C"}), "cannot take new compounds"),
        ("esm", lambda e: e.add_genes(["GENE1"], np.zeros((1, 10))), "already"),
        ("esm", lambda e: e.add_genes(["A", "A"], np.zeros((2, 10))), "already"),
        ("esm+fingerprint", lambda e: e.add_genes(["aspirin"], np.zeros((1, 10))), "already"),
        ("esm", lambda e: e.add_genes(["A"], np.zeros((1, 9))), r"\(1, 10\)"),
        ("fingerprint", lambda e: e.add_compounds({"A": "C1CC"}), "compound 'A'"),
    ],
)
def test_new_perturbations_that_do_not_fit_are_refused_and_leave_no_trace(kinds, add, said):
    encoder = make(kinds)
    before = encoder.names
    with pytest.raises(InputError, match=said):
        add(encoder)
    assert encoder.names == before


@pytest.mark.parametrize("kinds", KINDS)
def test_description_and_weights_give_the_encoder_back_to_the_bit(kinds, tmp_path):
    modalities = DOSED if "fingerprint" in kinds else ["KO", "OE"]
    encoder = make(kinds, modalities=modalities)
    excite(encoder)
    if "esm" in kinds:
        encoder.add_genes(["NEW"], VECTORS[9:10] + 1)
        encoder.shuffled(1)
    torch.save([encoder.description(), encoder.state_dict()], tmp_path / "encoder.pt")
    again = encoder_from(*torch.load(tmp_path / "encoder.pt", weights_only=True)).eval()
    assert again.description() == encoder.description() and again.kinds == tuple(kinds.split("+"))
    for modality in modalities:
        assert torch.equal(*(encode(e, *encoder.names, modality=modality) for e in (encoder, again)))
    with pytest.raises(InputError, match="no entry"):
        encode(again, "QQQ")


def test_a_model_checkpoint_holds_its_encoder(tmp_path):
    settings = dataclasses.replace(SETTINGS, n_layers=1, n_heads=2, cell_set_len=8)
    model = StateTransition(settings, ["G1", "G2"], make("shuffled", model=settings), nonnegative=True).eval()
    model.save(tmp_path / "best.ckpt")
    again = StateTransition.load(tmp_path / "best.ckpt").pert_encoder
    assert torch.equal(encode(again, *GENES), encode(model.pert_encoder, *GENES))


# Parity with State


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_the_networks_are_states(n_layers):
    """State's MLP on features or one-hot vectors, its weights copied under their own numbers, gives our encodings."""
    settings = dataclasses.replace(
        SETTINGS, esm_encoder_layers=n_layers, n_encoder_layers=n_layers, standardize_embeddings=False
    )
    for kinds, features in (("esm", torch.from_numpy(VECTORS)), ("onehot", torch.eye(12))):
        theirs = mlp(features.shape[1], 32, hidden_dim=32, n_layers=n_layers, dropout=0.0)
        ours = make(kinds, model=settings, smiles=None).parts[kinds]
        weights = theirs.state_dict()
        if kinds == "onehot":
            ours.lookup.load_state_dict({"weight": weights.pop("0.weight").T, "bias": weights.pop("0.bias")})
        ours.network.load_state_dict(weights)
        with torch.no_grad():
            torch.testing.assert_close(ours([[name] for name in GENES]), theirs(features), atol=1e-6, rtol=1e-5)


def test_an_unseen_gene_cannot_stretch_a_feature_that_hardly_varies():
    vectors = VECTORS.copy()
    vectors[:, 4] = 1 + 1e-6 * VECTORS[:, 4]
    table = make(vectors=vectors).parts["esm"].lookup
    assert isinstance(table, FeatureTable) and table(torch.arange(12)).abs().max() < 10
    outlier = VECTORS.copy()
    outlier[10] = 1e6
    assert torch.equal(make(vectors=outlier).parts["esm"].lookup.mean, make().parts["esm"].lookup.mean)
