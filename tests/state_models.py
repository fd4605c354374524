"""Run by the peer's Python: State models of several kinds with random weights, inputs and their predictions.

usage: python state_models.py FOLDER; writes one .safetensors a model, its constructor's arguments in the metadata.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from state.tx.models.state_transition import StateTransitionPerturbationModel

N_FEATURES, N_PERTURBATION, HIDDEN, SET_LEN, N_SETS, N_BATCHES = 20, 6, 16, 5, 3, 4
DECODER = {"latent_dim": N_FEATURES, "gene_dim": 30, "hidden_dims": [1024, 1024, 512], "dropout": 0.1}
UCE = {"embed_key": "X_uce", "gene_decoder_bool": True, "decoder_cfg": DECODER}
VARIANTS = {
    "plain": {},
    "onehot": {},
    "projected": {"use_basal_projection": True},
    "single_layers": {"n_encoder_layers": 1, "n_decoder_layers": 1, "use_basal_projection": True},
    "deep": {"n_encoder_layers": 4, "n_decoder_layers": 4, "use_basal_projection": True, "num_hidden_layers": 3},
    "no_residual": {"predict_residual": False},
    "embedding": {"embed_key": "X_uce", "output_space": "embedding"},
    "gene_decoder": UCE,
    "all": {"output_space": "all", "embed_key": None},
    "all_decoder": {**UCE, "output_space": "all"},
    "all_no_residual": {"output_space": "all", "predict_residual": False},
    "batch_encoder": {"batch_encoder": True},
    "confidence": {"confidence_token": True},
    "tokens": {"confidence_token": True, "use_batch_token": True, "basal_mapping_strategy": "batch"},
}


def arguments_of(variant: str) -> dict:
    """What the model's constructor is called with."""
    changes = dict(VARIANTS[variant])
    backbone = {
        "bidirectional_attention": True,
        "max_position_embeddings": SET_LEN,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": changes.pop("num_hidden_layers", 2),
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return {
        "input_dim": N_FEATURES,
        "output_dim": N_FEATURES,
        "hidden_dim": HIDDEN,
        "pert_dim": N_PERTURBATION,
        "gene_dim": 30 if "decoder_cfg" in changes else N_FEATURES,
        "hvg_dim": N_FEATURES,
        "batch_dim": N_BATCHES,
        "cell_set_len": SET_LEN,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "predict_residual": True,
        "distributional_loss": "energy",
        "embed_key": "X_hvg",
        "output_space": "gene",
        "use_basal_projection": False,
        "gene_decoder_bool": False,
        "basal_mapping_strategy": "random",
        "control_pert": "non-targeting",
        "gene_names": [f"G{i}" for i in range(30 if "decoder_cfg" in changes else N_FEATURES)],
        "transformer_backbone_key": "llama",
        "transformer_backbone_kwargs": backbone,
        **changes,
    }


@torch.no_grad()
def record(variant: str, folder: Path) -> None:
    """Weights, inputs and predictions of one model."""
    arguments = arguments_of(variant)
    torch.manual_seed(list(VARIANTS).index(variant))
    with contextlib.redirect_stdout(io.StringIO()):
        model = StateTransitionPerturbationModel(**arguments).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.3 * noise)
    if arguments.get("confidence_token"):
        model.confidence_token.confidence_projection[8].bias.fill_(1.0)  # above the ReLU's zero
    control = torch.randn(N_SETS, SET_LEN, N_FEATURES)
    vectors = torch.eye(N_PERTURBATION)[:N_SETS] if variant == "onehot" else torch.randn(N_SETS, N_PERTURBATION)
    batches = torch.randint(N_BATCHES, (N_SETS, SET_LEN))
    batch = {
        "ctrl_cell_emb": control.flatten(0, 1),
        "pert_emb": vectors[:, None].expand(-1, SET_LEN, -1).flatten(0, 1),
        "batch": batches.flatten(),
    }
    out = model(batch)
    cells = out[0] if isinstance(out, tuple) else out
    tensors = {f"weights.{name}": tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    tensors |= {"control": control, "perturbations": vectors, "batches": batches}
    tensors["cells"] = cells.view(N_SETS, SET_LEN, N_FEATURES)
    if isinstance(out, tuple):
        tensors["confidence"] = out[1].flatten()
    if "decoder_cfg" in arguments:
        tensors["genes"] = model.gene_decoder(tensors["cells"])
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"{variant}.safetensors", metadata={"arguments": json.dumps(arguments)})


if __name__ == "__main__":
    for name in VARIANTS:
        record(name, Path(sys.argv[1]))
