"""Properties of the model and its checkpoints that are awkward to show in a notebook."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from esm_perturb.cells.store import Condition
from esm_perturb.core.config import InputError, ModelKwargs
from esm_perturb.core.resolve import MODELS
from esm_perturb.models.checkpoints import FORMAT
from esm_perturb.models.encoders import build_encoder
from esm_perturb.models.from_state import stack_projections
from esm_perturb.models.network import StateNetwork
from esm_perturb.models.state_transition import StateTransition, predict_cells
from esm_perturb.models.transformer import SetTransformer

GENES = [f"GENE{i}" for i in range(6)]
KNOCKDOWN = Condition("d", "K562", "GENE1", "unspecified")


# Every part of the network, in the combinations that change how others work.
VARIANTS = {
    "plain": {},
    "projected": {"n_encoder_layers": 2, "n_decoder_layers": 3},
    "not projected": {"n_encoder_layers": 2, "use_basal_projection": False},
    "no residual": {"predict_residual": False},
    "batches": {"batch_encoder": True},
    "batch token": {"use_batch_token": True},
    "confidence": {"confidence_token": True},
    "all": {"output_space": "all"},
    "all, no residual": {"output_space": "all", "predict_residual": False},
    "embedding": {"output_space": "embedding"},
    "decoder": {"target_names": ["T1", "T2", "T3"]},
    "everything": {
        "output_space": "all",
        "target_names": ["T1", "T2", "T3"],
        "batch_encoder": True,
        "use_batch_token": True,
        "confidence_token": True,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
    },
}


def make_model(kind: str = "esm", *, seed: int = 0, output_space="gene", target_names=None, **settings):
    kwargs = ModelKwargs(
        **({"hidden_dim": 32, "cell_set_len": 8, "n_layers": 1, "n_heads": 4, "dropout": 0.1} | settings)
    )
    torch.manual_seed(seed)
    vectors = np.random.default_rng(seed).normal(size=(6, 10)).astype(np.float32)
    encoder = build_encoder(
        (kind,),
        genes=GENES,
        vectors=vectors,
        train_genes=GENES[:4],
        modalities=["unspecified"],
        control="non-targeting",
        model=kwargs,
        seed=seed,
    )
    return StateTransition(
        kwargs,
        [f"G{i}" for i in range(12)],
        encoder,
        nonnegative=output_space == "gene" and target_names is None,
        output_space=output_space,
        target_names=target_names,
        batch_names=["b0", "b1", "b2"],
    ).eval()


def a_batch(seed: int = 0) -> dict:
    """Three sets of seven cells, the second and third with padding."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "control": torch.rand(3, 7, 12, generator=generator) * 2,
        "perturbations": ["GENE1", "GENE2+GENE3", "non-targeting"],
        "modalities": ["unspecified"] * 3,
        "mask": torch.arange(7)[None] < torch.tensor([[7], [4], [1]]),
        "batches": torch.randint(-1, 3, (3, 7), generator=generator),
    }


def given(prediction) -> dict[str, torch.Tensor]:
    """The fields of a prediction that are there."""
    return {name: value for name, value in prediction._asdict().items() if value is not None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_cells_is_without_meaning(variant):
    """Cells, masks and batches permuted: cells permuted alike, what is said of the set unchanged."""
    model, batch = make_model(**VARIANTS[variant], seed=1), a_batch()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    permuted = batch | {key: batch[key][:, order] for key in ("control", "mask", "batches")}
    with torch.no_grad():
        first, second = given(model(**batch)), given(model(**permuted))
    for name, value in first.items():
        expected = value[:, order] if value.dim() == 3 else value
        real = permuted["mask"] if value.dim() == 3 else slice(None)
        torch.testing.assert_close(second[name][real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_cell_changes_nothing(variant):
    """Whatever stands in masked places, and whether they are there at all, real cells are predicted the same."""
    model, batch = make_model(**VARIANTS[variant], seed=1), a_batch()
    padded = torch.where(batch["mask"][:, :, None], batch["control"], 1e3)
    with torch.no_grad():
        first, second = given(model(**batch)), given(model(**batch | {"control": padded}))
        alone = {key: batch[key][1:2, :4] for key in ("control", "batches")}
        third = given(model(**alone, perturbations=["GENE2+GENE3"], modalities=["unspecified"], mask=None))
    for name, value in first.items():
        real = batch["mask"] if value.dim() == 3 else slice(None)
        torch.testing.assert_close(second[name][real], value[real], atol=1e-5, rtol=1e-5)
        own = value[1:2, :4] if value.dim() == 3 else value[1:2]
        torch.testing.assert_close(third[name], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_dead(variant):
    """What a variant predicts, with its masks and batches, trains each of its parameters."""
    model, batch = make_model(**VARIANTS[variant], seed=1).train(), a_batch()
    model.nonnegative = False
    for head in (model.gene_decoder, model.confidence_head):
        if head is not None:
            head[-2].bias.data.fill_(9.0)  # above the ReLU's zero
    outputs = given(model(**batch))
    sum(value.square().sum() for value in outputs.values()).backward()
    dead = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not dead


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_and_folders_give_a_model_back_to_the_bit(variant, tmp_path):
    model, batch = make_model(**VARIANTS[variant], seed=1), a_batch()
    model.save(tmp_path / "best.ckpt", {"scale": "log1p", "best": {"step": 3, "val_loss": 0.125}})
    loaded = StateTransition.load(tmp_path / "best.ckpt")
    released = StateTransition.from_pretrained(loaded.save_pretrained(tmp_path / "released"))
    for again in (loaded, released):
        assert again.description() == model.description() and not again.training
        weights = model.state_dict()
        assert list(again.state_dict()) == list(weights)
        assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
        assert all(parameter.requires_grad for parameter in again.parameters())
        with torch.no_grad():
            for name, value in given(again(**batch)).items():
                assert torch.equal(value, getattr(model(**batch), name))
    assert (tmp_path / "released" / "genes.txt").read_text().split() == model.output_names


@pytest.mark.parametrize("n_heads", [4, 12])
def test_every_even_hidden_dim_builds_and_runs(n_heads):
    for hidden_dim in range(2, 131, 2):
        kwargs = ModelKwargs(hidden_dim=hidden_dim, n_layers=1, n_heads=n_heads, confidence_token=True)
        network = StateNetwork(kwargs, 6, nonnegative=True)
        out = network.respond(torch.rand(2, 3, 6), torch.rand(2, hidden_dim))
        assert out.cells.shape == (2, 3, 6) and torch.isfinite(out.cells).all()
        assert network.transformer_backbone.layers[0].self_attn.head_dim % 8 == 0


# Trainable parameters of arc-state 0.11.1 with 2,000 genes in and out, features of 5,120 numbers, no gene decoder.
TRAINABLE = {
    "state": 82_518_224,
    "state_sm": 37_752_944,
    "state_lg": 239_446_496,
    "tahoe_llama_62089464": 72_734_000,
    "tahoe_llama_212693232": 239_446_496,
}


@pytest.mark.parametrize("name", MODELS)
def test_presets_have_the_parameters_of_state(name):
    kwargs = ModelKwargs(**MODELS[name])
    features = np.random.default_rng(0).normal(size=(2, 5120)).astype(np.float32)
    made = {"train_genes": GENES[:2], "modalities": ["unspecified"], "control": "c", "model": kwargs, "seed": 0}
    with torch.device("meta"):
        network = StateNetwork(kwargs, 2000, nonnegative=True)
        encoder = build_encoder(("esm",), genes=GENES[:2], vectors=features, **made)
    count = sum(parameter.numel() for module in (network, encoder) for parameter in module.parameters())
    assert count == TRAINABLE.get(name, count)
    assert name in TRAINABLE or 65e6 < count < 75e6


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
    ours.load_state_dict(stack_projections(llama.state_dict()), strict=True)
    cells = torch.randn(3, 7, 48)
    with torch.no_grad():
        theirs = llama(inputs_embeds=cells, attention_mask=torch.zeros(3, 1, 7, 7)).last_hidden_state
        torch.testing.assert_close(ours(cells), theirs, atol=1e-5, rtol=1e-5)


def test_unknown_gene_is_never_predicted_as_control():
    model = make_model()
    controls = np.random.default_rng(0).uniform(0, 2, (5, 12)).astype(np.float32)
    for label in ("GENE9", "GENE1+GENE9", "gene1", "", " "):
        with pytest.raises(InputError, match="no entry"):
            predict_cells(model, KNOCKDOWN._replace(perturbation=label), controls)
    same = predict_cells(model, KNOCKDOWN._replace(perturbation="GENE2+GENE1"), controls)
    np.testing.assert_array_equal(same, predict_cells(model, KNOCKDOWN._replace(perturbation="GENE1+GENE2"), controls))


def test_prediction_does_not_depend_on_random_state_or_mode():
    model = make_model(dropout=0.5)
    controls = np.random.default_rng(0).uniform(0, 2, (20, 12)).astype(np.float32)
    first = predict_cells(model, KNOCKDOWN, controls)
    model.train()
    torch.manual_seed(99)
    np.testing.assert_array_equal(predict_cells(model, KNOCKDOWN, controls), first)
    assert model.training and first.min() >= 0 and first.dtype == np.float32


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    for name, write in {"a.ckpt": torch.save, "b.ckpt": lambda x, p: Path(p).write_bytes(pickle.dumps(x))}.items():
        write({"format": FORMAT, "model": Payload()}, tmp_path / name)
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


def test_batches_that_are_unknown_get_the_mean_of_those_that_are_known():
    model = make_model(batch_encoder=True, seed=1)
    batch = a_batch() | {"mask": None}
    table = model.batch_encoder.weight
    with torch.no_grad():
        unknown = model(**batch | {"batches": None}).cells
        torch.testing.assert_close(model(**batch | {"batches": torch.full((3, 7), -1)}).cells, unknown)
        table[0] = table[1:].mean(0)  # then the mean over all is this row
        known = model(**batch | {"batches": torch.zeros(3, 7, dtype=torch.long)}).cells
        torch.testing.assert_close(known, model(**batch | {"batches": None}).cells, atol=1e-5, rtol=1e-5)


def test_loading_leaves_the_training_random_state_to_the_caller(tmp_path):
    """A model and its copy, trained with the same seed, take the same steps."""
    model = make_model(dropout=0.5, seed=1)
    model.save(tmp_path / "best.ckpt")
    after = []
    for one in (model, StateTransition.load(tmp_path / "best.ckpt")):
        optimizer = torch.optim.AdamW(one.train().parameters(), lr=0.01)
        for step in range(3):
            torch.manual_seed(step)
            one(**a_batch(step)).cells.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        after.append(torch.cat([parameter.detach().flatten() for parameter in one.parameters()]))
    assert torch.equal(*after)


def test_a_folder_of_two_models_is_refused(tmp_path):
    """Weights of one and the description of another, of the same shapes: nothing but the hash tells them apart."""
    for seed in (1, 2):
        make_model(seed=seed).save_pretrained(tmp_path / f"m{seed}")
    (tmp_path / "m1" / "model.safetensors").replace(tmp_path / "m2" / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors' is not the file that config\.json belongs to"):
        StateTransition.from_pretrained(tmp_path / "m2")
    with pytest.raises(InputError, match=r"model\.safetensors absent"):
        StateTransition.from_pretrained(tmp_path / "m1")


def test_a_released_folder_is_replaced_whole_and_nothing_else_is(tmp_path):
    folder = make_model(seed=1).save_pretrained(tmp_path / "released")
    second = make_model(seed=2)
    second.save_pretrained(folder)
    again = StateTransition.from_pretrained(folder)
    assert torch.equal(again.project_out[-1].weight, second.project_out[-1].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="choose a new folder"):
        second.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_card_says_what_the_model_is(tmp_path):
    model = make_model(target_names=["T1", "T2"])
    model.extra = {"name": "pilot", "scale": "log1p", "best": {"val_loss": 0.5}, "train_genes": GENES * 3}
    folder = model.save_pretrained(tmp_path / "released", licence="cc-by-4.0")
    card = (folder / "README.md").read_text()
    head = card.split("---")[1]
    assert "license: cc-by-4.0" in head and "library_name: esm_perturb" in head
    for words in ("# pilot", "log1p", "2 genes out", "esm: 6 known names", "best.val_loss | 0.5", "18 entries"):
        assert words in card
