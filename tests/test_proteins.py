"""Proteins: hostile files, and parity with fair-esm and transformers on equal random weights."""

import argparse
import json

import numpy as np
import pytest
import torch

from esm_perturb.core.config import InputError
from esm_perturb.proteins.embed import embed_sequences
from esm_perturb.proteins.embeddings import GeneEmbeddings
from esm_perturb.proteins.esm2 import ALPHABET, ESM2, MASK, save_fair_esm, to_fair_esm_state, tokenize
from esm_perturb.proteins.sequences import AMINO_ACIDS, RESIDUES

LENGTHS = (5, 40, 17, 40, 1, 63)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


@pytest.fixture(scope="module")
def model() -> ESM2:
    """Random weights with every bias and LayerNorm away from its start, so that a forgotten tensor shows."""
    model = ESM2.new(n_layers=3, hidden_dim=48, n_heads=4, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def fair(model):
    from esm.model.esm2 import ESM2 as FairESM2

    fair = FairESM2(num_layers=3, embed_dim=48, attention_heads=4).eval()
    fair.load_state_dict(to_fair_esm_state(model), strict=True)
    return fair


@pytest.fixture(scope="module")
def proteins() -> dict[str, str]:
    rng = np.random.default_rng(0)
    return {f"G{index}": "".join(rng.choice(list(AMINO_ACIDS), size=length)) for index, length in enumerate(LENGTHS)}


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Tokens and numbers


def test_tokens_equal_fair_esm(fair, proteins):
    sequences = [*proteins.values(), RESIDUES + ".-", "MXXXXK"]
    _, _, expected = fair.alphabet.get_batch_converter()([(str(i), s) for i, s in enumerate(sequences)])
    ids, mask = tokenize(sequences)
    assert tuple(fair.alphabet.all_toks) == ALPHABET
    assert torch.equal(ids, expected) and torch.equal(mask, expected != fair.alphabet.padding_idx)


def test_unknown_runs_keep_their_length():
    ids, _ = tokenize(["MJJJ?éK"])
    assert ids.shape == (1, 9) and (ids[0, 2:7] == ALPHABET.index("<unk>")).all() and ids[0, 7] == ALPHABET.index("K")


def test_masked_logits_equal_fair_esm(model, fair, proteins):
    ids, mask = tokenize(list(proteins.values()))
    positions = torch.zeros_like(mask)
    for row, length in enumerate(LENGTHS):
        positions[row, 1 : 1 + max(1, length // 4)] = True
    ids = ids.masked_fill(positions, MASK)
    with torch.inference_mode():
        expected = fair(ids)["logits"]
        torch.testing.assert_close(model.logits(ids, mask)[mask], expected[mask], atol=2e-5, rtol=0)
        torch.testing.assert_close(model.logits_at(ids, mask, positions), expected[positions], atol=2e-5, rtol=0)


def test_rotary_frequencies_survive_casts():
    model = ESM2.new(1, 32, 2)
    exact = model.network.esm.rotary_embeddings.inv_freq.clone()
    assert torch.equal(model.bfloat16().float().network.esm.rotary_embeddings.inv_freq, exact)


# Formats


def test_fair_esm_reads_our_checkpoint_and_we_read_it(model, fair, proteins, tmp_path):
    from esm.pretrained import load_model_and_alphabet_core

    path = save_fair_esm(model, tmp_path / "esm2_t3_test.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, weights_only=True)
    theirs, _ = load_model_and_alphabet_core("esm2_t3_test", checkpoint)
    ids, mask = tokenize(list(proteins.values()))
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(ids)["logits"][mask], fair(ids)["logits"][mask], atol=0, rtol=0)
    ours = [ESM2.load(path, backend=backend, device="cpu") for backend in ("transformers", "fair-esm")]
    assert {other.parameters_sha256() for other in ours} == {model.parameters_sha256()}
    assert ours[0].name == "esm2_t3_test" and not ours[0].training


def test_published_fair_esm_name_is_read_from_torch_hubs_cache(model, tmp_path):
    save_fair_esm(model, tmp_path / "torch_home" / "hub" / "checkpoints" / "esm2_t6_8M_UR50D.pt")
    loaded = ESM2.load("esm2_t6_8M_UR50D", backend="fair-esm", device="cpu")
    assert loaded.parameters_sha256() == model.parameters_sha256()


def test_transformers_reads_our_folder(model, proteins, tmp_path):
    from transformers import AutoModelForMaskedLM

    model.save(tmp_path / "folder")
    ids, mask = tokenize(list(proteins.values()))
    with torch.inference_mode():
        theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder").eval()(ids, attention_mask=mask).logits
        torch.testing.assert_close(theirs[mask], model.logits(ids, mask)[mask], atol=1e-6, rtol=0)


def test_we_read_what_transformers_writes(model, tmp_path):
    model.network.save_pretrained(tmp_path / "folder")
    assert ESM2.load(tmp_path / "folder", device="cpu").parameters_sha256() == model.parameters_sha256()


def test_bfloat16_folder_halves_the_file_and_stays_close(model, proteins, tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model.save(tmp_path / dtype, dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.6 * sizes["float32"]
    ids, mask = tokenize(list(proteins.values()))
    with torch.inference_mode():
        rounded = ESM2.load(tmp_path / "bfloat16", device="cpu").hidden(ids, mask)
        assert (rounded - model.hidden(ids, mask))[mask].abs().max() < 0.1


def _break_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


LAYER = "esm.encoder.layer.1.attention.self.key.weight"
BROKEN_FOLDERS = {
    "tensor missing": (lambda f: _break_weights(f, lambda w: w.pop(LAYER)), LAYER),
    "head missing": (lambda f: _break_weights(f, lambda w: w.pop("lm_head.dense.bias")), "lm_head.dense.bias"),
    "wrong shape": (lambda f: _break_weights(f, lambda w: w.update({LAYER: torch.zeros(3, 3)})), "do not fit"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(20)), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no readable weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "other model": (lambda f: _edit_config(f, model_type="bert"), "'bert'"),
    "other vocabulary size": (lambda f: _edit_config(f, vocab_size=25), "vocab_size=25"),
    "absolute positions": (lambda f: _edit_config(f, position_embedding_type="absolute"), "position_embedding_type"),
    "no token dropout": (lambda f: _edit_config(f, token_dropout=False), "token_dropout"),
    "other order": (lambda f: (f / "vocab.txt").write_text("\n".join(sorted(ALPHABET))), "33 tokens in order"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folder_is_refused(model, tmp_path, case):
    folder = model.save(tmp_path / "model")
    damage, said = BROKEN_FOLDERS[case]
    damage(folder)
    with pytest.raises(InputError) as caught:
        ESM2.load(folder, device="cpu")
    assert said in one_line(caught)


class Opaque:
    """A class that no safe loader knows."""


def _without_layer(model) -> dict:
    state = to_fair_esm_state(model)
    del state["layers.2.fc1.weight"]
    config = argparse.Namespace(encoder_layers=3, encoder_embed_dim=48, encoder_attention_heads=4)
    return {"cfg": {"model": config}, "model": state}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda model: {"model": Opaque()}, "not a safe checkpoint"),
        (lambda model: {"args": 1, "model": {}}, "not a fair-esm ESM2 checkpoint"),
        (lambda model: torch.zeros(3), "not a fair-esm ESM2 checkpoint"),
        (_without_layer, "esm.encoder.layer.2.intermediate.dense.weight"),
        (lambda model: _without_layer(model) | {"model": {"strange": torch.zeros(1)}}, "'strange'"),
    ],
)
def test_broken_fair_esm_checkpoint_is_refused(model, tmp_path, content, said):
    torch.save(content(model), tmp_path / "esm2_x.pt")
    with pytest.raises(InputError) as caught:
        ESM2.load(tmp_path / "esm2_x.pt", device="cpu")
    assert said in one_line(caught)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    def unreachable(url, path):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for name, backend, said in [
        ("esm2_t6_8M_UR50D", "transformers", "hf download facebook/esm2_t6_8M_UR50D"),
        ("facebook/esm2_t33_650M_UR50D", "transformers", "fair-esm .pt file"),
        ("esm2_t6_8M_UR50D", "fair-esm", "dl.fbaipublicfiles.com"),
        ("esm2_t33_650M", "transformers", "did you mean 'esm2_t33_650M_UR50D'"),
        (tmp_path / "absent.pt", "transformers", "does not exist"),
        (tmp_path / "absent_folder", "transformers", "neither a model folder"),
    ]:
        with pytest.raises(InputError) as caught:
            ESM2.load(name, backend=backend)
        assert said in one_line(caught)


# Embeddings


def test_long_proteins_are_cut_and_recorded(model):
    long = "MKTAYIAKQR" * 5
    embeddings = embed_sequences(model, {"LONG": long, "CUT": long[:20], "S": "MK"}, max_residues=20, progress=False)
    assert np.array_equal(embeddings.vectors[0], embeddings.vectors[1])
    assert embeddings.record["truncated"] == ["LONG"] and embeddings.record["n_truncated"] == 1
    assert len(set(embeddings.record["sequence_sha256"].values())) == 3


def test_saved_embeddings_load_with_plain_torch_and_without_their_record(model, proteins, tmp_path):
    embeddings = embed_sequences(model, proteins, progress=False)
    path = embeddings.save(tmp_path / "genes.pt")
    plain = torch.load(path, weights_only=True)
    assert list(plain) == list(proteins) and plain["G0"].shape == (48,) and plain["G0"].dtype == torch.float32
    assert GeneEmbeddings.load(path).record["model_parameters_sha256"] == model.parameters_sha256()
    (tmp_path / "genes.pt.json").unlink()
    assert GeneEmbeddings.load(path).record == {}


def test_unsafe_pickle_is_never_run(tmp_path):
    flag = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (flag.write_text, ("ran",))

    torch.save({"A": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(InputError) as caught:
        GeneEmbeddings.load(tmp_path / "evil.pt")
    assert not flag.exists() and "weights_only=False" in one_line(caught)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.75, 0.99])
def test_a_truncated_table_is_refused_in_one_sentence(tmp_path, share):
    path = tmp_path / "genes.pt"
    torch.save({f"G{i}": torch.ones(64) for i in range(200)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as caught:
        GeneEmbeddings.load(path)
    assert str(path) in one_line(caught)


def test_half_precision_files_are_read_as_float32(tmp_path):
    torch.save({"A": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "half.pt")
    assert GeneEmbeddings.load(tmp_path / "half.pt").vectors.dtype == np.float32


def test_missing_genes_are_named_counted_and_located(tmp_path, caplog):
    embeddings = GeneEmbeddings(["A"], np.ones((1, 3)), path="genes.pt")
    wanted = [f"M{index}" for index in range(14)]
    with pytest.raises(InputError) as caught:
        embeddings.lookup([*wanted, *wanted, "A"])
    message = one_line(caught)
    assert "14 genes" in message and "M9 and 4 more" in message and "'genes.pt'" in message
    assert "missing_genes=drop, zero or mean" in message
    with caplog.at_level("WARNING"):
        vectors = embeddings.lookup(["M0", "A", "M0"], policy="zero").vectors
    assert vectors.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert caplog.messages == ["Gene M0 not found in ESM embeddings, using zero vector"]
