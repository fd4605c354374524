"""Weights of arc-state models, converted, give their predictions."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from esm_perturb.core.config import InputError
from esm_perturb.models.from_state import from_state
from esm_perturb.models.network import SetPrediction
from esm_perturb.models.state_transition import StateTransition

HERE = Path(__file__).parent
RECORDED = HERE / "data" / "state_parity.safetensors"
PEER = Path(os.environ.get("PEERS", "")) / "venv" / "bin" / "python"
VARIANTS = (
    "plain",
    "onehot",
    "projected",
    "single_layers",
    "deep",
    "no_residual",
    "embedding",
    "gene_decoder",
    "all",
    "all_decoder",
    "all_no_residual",
    "batch_encoder",
    "confidence",
    "tokens",
)


def converted(path: Path) -> tuple[StateTransition, SetPrediction, dict[str, torch.Tensor]]:
    """Our model of a recorded one, what it predicts, and the record."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["arguments"])
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    perturbations = {f"GENE{i}": vector for i, vector in enumerate(tensors["perturbations"])}
    model = from_state(weights, arguments, perturbations=perturbations)
    with torch.no_grad():
        modalities = ["unspecified"] * len(perturbations)
        return model, model(tensors["control"], list(perturbations), modalities, batches=tensors["batches"]), tensors


@pytest.fixture(scope="module")
def peer_models(tmp_path_factory) -> Path:
    """A folder with models that arc-state itself built and ran."""
    if not (os.environ.get("PEERS") and PEER.is_file()):
        pytest.skip("set PEERS to a folder that holds venv/bin/python with arc-state 0.11.1")
    folder = tmp_path_factory.mktemp("state")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(PEER), str(HERE / "state_models.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_of_a_converted_model_are_those_of_state(peer_models, variant):
    model, ours, theirs = converted(peer_models / f"{variant}.safetensors")
    compared = [field for field in SetPrediction._fields if field in theirs]
    assert compared[0] == "cells" and theirs["cells"].abs().max() > 0.5
    for field in compared:
        torch.testing.assert_close(getattr(ours, field), theirs[field], atol=1e-4, rtol=0)
    assert (ours.genes is not None) == ("genes" in theirs)
    assert (ours.confidence is not None) == ("confidence" in theirs)
    assert model.nonnegative == (not bool((theirs["cells"] < 0).any()))


def test_recorded_predictions_are_reproduced():
    """The same without the peer, from a file in the repository: space `all`, batches, a confidence token."""
    assert RECORDED.stat().st_size < 300_000
    model, ours, theirs = converted(RECORDED)
    for field in ("cells", "confidence"):
        assert theirs[field].std() > 0.01
        torch.testing.assert_close(getattr(ours, field), theirs[field], atol=1e-4, rtol=0)


def test_a_converted_model_is_kept_and_published_as_any_other(tmp_path):
    model, ours, theirs = converted(RECORDED)
    model.save_pretrained(tmp_path / "released")
    again = StateTransition.from_pretrained(tmp_path / "released")
    labels, modalities = model.pert_encoder.names, ["unspecified"] * 3
    with torch.no_grad():
        assert torch.equal(again(theirs["control"], labels, modalities, batches=theirs["batches"]).cells, ours.cells)


def test_a_broken_parity_is_noticed():
    """The recorded file has teeth: each of its weights matters."""
    tensors = load_file(RECORDED)
    with safe_open(RECORDED, "pt") as file:
        arguments = json.loads(file.metadata()["arguments"])
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    perturbations = {f"GENE{i}": vector for i, vector in enumerate(tensors["perturbations"])}
    torch.manual_seed(0)
    for name, value in weights.items():
        changed = {**weights, name: value + 0.1 * torch.randn_like(value)}
        model = from_state(changed, arguments, perturbations=perturbations)
        with torch.no_grad():
            ours = model(tensors["control"], list(perturbations), ["unspecified"] * 3, batches=tensors["batches"])
        moved = [(getattr(ours, field) - tensors[field]).abs().max() for field in ("cells", "confidence")]
        assert max(moved) > 1e-4, name
    with pytest.raises(InputError, match="does not fit"):
        from_state({**weights, "unknown.weight": torch.zeros(1)}, arguments, perturbations=perturbations)
