"""Properties of the model, its losses and its checkpoints that are awkward to show in a notebook."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from esm_perturb.cells.store import Condition
from esm_perturb.core.config import InputError, ModelKwargs
from esm_perturb.models.encoders import build_encoder
from esm_perturb.models.losses import energy_distance, set_loss
from esm_perturb.models.state_transition import StateTransition
from esm_perturb.models.transformer import SetTransformer

GENES = [f"GENE{i}" for i in range(6)]
KNOCKDOWN = Condition("d", "K562", "GENE1", "unspecified")


def make_model(kind: str = "esm", *, seed: int = 0, **settings) -> StateTransition:
    kwargs = ModelKwargs(
        **({"hidden_dim": 32, "cell_set_len": 8, "n_layers": 1, "n_heads": 4, "dropout": 0.1} | settings)
    )
    torch.manual_seed(seed)
    vectors = np.random.default_rng(seed).normal(size=(6, 10)).astype(np.float32)
    encoder = build_encoder(
        kind,
        genes=GENES,
        vectors=vectors,
        train_genes=GENES[:4],
        modalities=["unspecified"],
        control="non-targeting",
        model=kwargs,
        seed=seed,
    )
    return StateTransition(kwargs, [f"G{i}" for i in range(12)], encoder, nonnegative=True).eval()


def test_backbone_equals_llama_without_positions_and_causality():
    """The weights of Hugging Face's LlamaModel, which State trains, give the same outputs here."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=2,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    llama = LlamaModel(config).eval()
    llama.rotary_emb.forward = lambda x, position_ids: (torch.ones(1, x.shape[1], 16), torch.zeros(1, x.shape[1], 16))
    ours = SetTransformer(48, 2, 4, head_dim=16, intermediate_size=96).eval()
    weights = {name: value for name, value in llama.state_dict().items() if name != "embed_tokens.weight"}
    ours.load_state_dict(weights, strict=True)
    cells = torch.randn(3, 7, 48)
    with torch.no_grad():
        theirs = llama(inputs_embeds=cells, attention_mask=torch.zeros(3, 1, 7, 7)).last_hidden_state
        torch.testing.assert_close(ours(cells), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unbiased", [True, False])
def test_energy_distance_is_a_distance(unbiased):
    """Symmetric, blind to the order of cells, unmoved by a common shift, and scaling with the data."""
    torch.manual_seed(0)
    x, y = torch.rand(3, 9, 20), torch.rand(3, 9, 20) + 0.2
    value = energy_distance(x, y, unbiased=unbiased)
    torch.testing.assert_close(energy_distance(y, x, unbiased=unbiased), value)
    torch.testing.assert_close(energy_distance(x[:, torch.randperm(9)], y, unbiased=unbiased), value)
    torch.testing.assert_close(energy_distance(x + 5, y + 5, unbiased=unbiased), value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(energy_distance(3 * x, 3 * y, unbiased=unbiased), 3 * value, atol=1e-4, rtol=1e-4)
    assert (value > 0).all()


def test_minimising_the_unbiased_energy_keeps_the_spread():
    """With sets of 8, the V-statistic shrinks the predicted spread; the U-statistic does not."""
    torch.manual_seed(0)
    spread = {}
    for unbiased in (True, False):
        scale = torch.tensor(1.0, requires_grad=True)
        optimizer = torch.optim.Adam([scale], lr=0.02)
        for _ in range(150):
            loss = energy_distance(scale * torch.randn(64, 8, 10), torch.randn(64, 8, 10), unbiased=unbiased).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread[unbiased] = float(scale.detach())
    assert spread[True] == pytest.approx(1, abs=0.07)
    assert spread[False] < 0.9


@pytest.mark.parametrize("name", ["energy", "sinkhorn", "mse"])
def test_every_loss_trains_with_single_cells_duplicates_and_padding(name):
    torch.manual_seed(0)
    predicted = torch.rand(3, 6, 10)
    predicted[0] = predicted[0, :1]
    target = predicted.clone()
    predicted.requires_grad_()
    mask = torch.arange(6)[None] < torch.tensor([[6], [1], [4]])
    loss = set_loss(name)(predicted, target, mask)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(predicted.grad).all()
    assert not predicted.grad[1, 1:].any()


def test_bfloat16_prediction_is_scored_in_float32():
    torch.manual_seed(0)
    x, y = torch.rand(2, 16, 50), torch.rand(2, 16, 50)
    rounded = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = energy_distance(rounded, y)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, energy_distance(rounded.detach().float(), y), atol=1e-6, rtol=0)


def test_unknown_gene_is_never_predicted_as_control():
    model = make_model()
    controls = np.random.default_rng(0).uniform(0, 2, (5, 12)).astype(np.float32)
    for label in ("GENE9", "GENE1+GENE9", "gene1", "", " "):
        with pytest.raises(InputError, match="no entry"):
            model.predict(KNOCKDOWN._replace(perturbation=label), controls)
    same = model.predict(KNOCKDOWN._replace(perturbation="GENE2+GENE1"), controls)
    np.testing.assert_array_equal(same, model.predict(KNOCKDOWN._replace(perturbation="GENE1+GENE2"), controls))


def test_prediction_does_not_depend_on_random_state_or_mode():
    model = make_model(dropout=0.5)
    controls = np.random.default_rng(0).uniform(0, 2, (20, 12)).astype(np.float32)
    first = model.predict(KNOCKDOWN, controls)
    model.train()
    torch.manual_seed(99)
    np.testing.assert_array_equal(model.predict(KNOCKDOWN, controls), first)
    assert model.training and first.min() >= 0 and first.dtype == np.float32


def test_shuffled_encoder_keeps_its_pairing_in_the_checkpoint(tmp_path):
    model, straight = make_model("shuffled"), make_model("esm")
    assert sorted(map(tuple, model.pert_encoder.lookup.vectors.tolist())) == sorted(
        map(tuple, straight.pert_encoder.lookup.vectors.tolist())
    )
    model.save(tmp_path / "best.ckpt")
    again = StateTransition.load(tmp_path / "best.ckpt")
    torch.testing.assert_close(again.pert_encoder.lookup.vectors, model.pert_encoder.lookup.vectors, atol=0, rtol=0)
    with pytest.raises(InputError, match="cannot take new genes"):
        again.pert_encoder.add_genes(["NEW"], np.zeros((1, 10)))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    for name, write in {"a.ckpt": torch.save, "b.ckpt": lambda x, p: Path(p).write_bytes(pickle.dumps(x))}.items():
        write({"format": "esm_perturb.state_transition.1", "model": Payload()}, tmp_path / name)
        with pytest.raises(InputError, match="read safely"):
            StateTransition.load(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_checkpoint_cut_short_is_refused(tmp_path):
    path = tmp_path / "best.ckpt"
    make_model().save(path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            StateTransition.load(path)
