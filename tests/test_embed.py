"""Embedding proteins: parity with fair-esm, every policy, and runs that are killed, damaged, shared or out of room."""

import copy
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from esm_perturb.core.config import InputError, MissingFileError
from esm_perturb.core.files import sha256_text, write_json, write_yaml
from esm_perturb.proteins import embed, embedding_run, fast_network
from esm_perturb.proteins.embed import EmbedSettings, crops, embed_sequences, make_plan
from esm_perturb.proteins.embedding_run import EmbeddingRun, embed_to_folder, load_run, read_shard, share
from esm_perturb.proteins.esm2 import ESM2, MASK, to_fair_esm_state, tokenize
from esm_perturb.proteins.fast_network import PackedESM2, pack
from esm_perturb.proteins.residues import embed_residues, write_residues
from esm_perturb.proteins.sequences import AMINO_ACIDS

N_LAYERS, DIM, HEADS = 3, 48, 4


def random_protein(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list(AMINO_ACIDS), size=length))


@pytest.fixture(autouse=True)
def _one_thread():
    """Bytes are compared below, and sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> ESM2:
    """Random weights with every bias and LayerNorm away from its start, so that a forgotten tensor shows."""
    model = ESM2.new(N_LAYERS, DIM, HEADS, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def fair(model):
    from esm.model.esm2 import ESM2 as FairESM2

    fair = FairESM2(num_layers=N_LAYERS, embed_dim=DIM, attention_heads=HEADS).eval()
    fair.load_state_dict(to_fair_esm_state(model), strict=True)
    return fair


@pytest.fixture(scope="module")
def proteins() -> dict[str, str]:
    return {f"G{index}": random_protein(length, index) for index, length in enumerate((5, 40, 17, 40, 1, 63))}


@pytest.fixture(scope="module")
def giant() -> str:
    return random_protein(35_000, 9)


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- the same numbers as fair-esm


@pytest.mark.parametrize("attention", ["each", "padded"])
def test_every_layer_equals_fair_esm(model, fair, proteins, attention):
    _, _, tokens = fair.alphabet.get_batch_converter()(list(proteins.items()))
    real = tokens != fair.alphabet.padding_idx
    network = PackedESM2(model, attention=attention)
    with torch.inference_mode():
        states = fair(tokens, repr_layers=list(range(N_LAYERS + 1)))["representations"]
    for layer in range(N_LAYERS + 1):
        ours = network(pack(list(proteins.values())), layer)
        torch.testing.assert_close(ours, states[layer][real], atol=1e-5, rtol=0)
        padded = model.hidden(*tokenize(list(proteins.values())), layer=layer).detach()
        torch.testing.assert_close(padded[real], states[layer][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("backend", ["transformers", "fair-esm"])
def test_mean_and_bos_equal_fair_esm(model, fair, proteins, layer, backend):
    ours = ESM2(model.network, name="m", backend=backend).eval()
    for pooling, part in (("mean", slice(1, -1)), ("bos", slice(0, 1))):
        found = embed_sequences(ours, proteins, layer=layer, pooling=pooling, batch_tokens=120, progress=False)
        for row, item in enumerate(proteins.items()):
            _, _, tokens = fair.alphabet.get_batch_converter()([item])
            with torch.inference_mode():
                states = fair(tokens, repr_layers=[layer % 4])["representations"][layer % 4][0]
            np.testing.assert_allclose(found.vectors[row], states[part].mean(dim=0), atol=1e-5, rtol=0)


def test_saturn_reads_what_its_script_read(model, fair):
    lengths = (700, 1019, 1020, 1021, 1022, 1023, 1400)
    proteins = {f"L{length}": random_protein(length, length) for length in lengths}
    found = embed_sequences(model, proteins, compat="saturn", progress=False)
    for row, item in enumerate(proteins.items()):
        _, _, tokens = fair.alphabet.get_batch_converter()([item])
        with torch.inference_mode():
            states = fair(tokens[:, :1022], repr_layers=[N_LAYERS])["representations"][N_LAYERS][0]
        expected = states[1 : min(1022, len(item[1])) + 1].mean(dim=0)
        np.testing.assert_allclose(found.vectors[row], expected, atol=1e-5, rtol=0)
    ordinary = embed_sequences(model, proteins, progress=False).vectors
    changed = np.abs(found.vectors - ordinary).max(axis=1) > 1e-5
    assert changed.tolist() == [length > 1020 for length in lengths]
    assert found.record["settings"]["compat"] == "saturn" and found.record["max_residues"] == 1021


@given(st.lists(st.text(AMINO_ACIDS, min_size=1, max_size=30), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_masked_tokens_do_not_feel_their_neighbours(model, texts, seed):
    tokens = pack(texts)
    masked = torch.rand(len(tokens.ids), generator=torch.Generator().manual_seed(seed)) < 0.3
    tokens = tokens._replace(ids=tokens.ids.masked_fill(masked, MASK))
    together = PackedESM2(model)(tokens).split(tokens.lengths)
    for ids, states in zip(tokens.ids.split(tokens.lengths), together, strict=True):
        if (ids == MASK).all():
            continue
        alone = model.hidden(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0].detach()
        torch.testing.assert_close(states, alone, atol=2e-5, rtol=0)


def test_bfloat16_keeps_the_direction(model, proteins, monkeypatch):
    exact = embed_sequences(model, proteins, progress=False).vectors
    for native in (False, True):
        monkeypatch.setattr(fast_network, "multiplies_bfloat16", lambda device, native=native: native)
        rounded = embed_sequences(model, proteins, precision="bfloat16", progress=False)
        assert rounded.record["arithmetic"].startswith("bfloat16" if native else "float32 on weights")
        cosine = (
            (rounded.vectors * exact).sum(1) / np.linalg.norm(rounded.vectors, axis=1) / np.linalg.norm(exact, axis=1)
        )
        assert cosine.min() > 0.999 and not np.array_equal(rounded.vectors, exact)


def test_packed_attention_asks_flash_attention_for_the_same(model, proteins, monkeypatch):
    """Without a GPU: a stand-in with the documented meaning of `varlen_attn` gets the arguments that we pass."""
    from torch.nn.attention import varlen

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale):
        assert cu_seq_q.dtype == torch.int32 and max_q == int(cu_seq_q.diff().max()) and max_k == max_q
        bounds = cu_seq_q.tolist()
        assert torch.equal(cu_seq_q, cu_seq_k)
        result = torch.empty_like(query)
        for begin, end in zip(bounds, bounds[1:], strict=False):
            scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end]) * scale
            result[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value[begin:end])
        return result

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    each, packed = PackedESM2(model), PackedESM2(model)
    packed.attention = "varlen"
    tokens = pack(list(proteins.values()))
    torch.testing.assert_close(packed(tokens), each(tokens), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_equals_cpu(model, proteins, packed):
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    exact = embed_sequences(model, proteins, progress=False).vectors
    gpu = ESM2.new(N_LAYERS, DIM, HEADS, seed=1)
    gpu.load_state_dict(model.state_dict())
    gpu = gpu.to("cuda").eval()
    found = embed_sequences(gpu, proteins, precision="bfloat16", packed=packed, progress=False).vectors
    cosine = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999
    if not packed:
        np.testing.assert_allclose(embed_sequences(gpu, proteins, progress=False).vectors, exact, atol=1e-4, rtol=0)


# ---- models that cannot be had


def test_an_absent_hub_is_not_waited_for(monkeypatch):
    """Without a network one question is asked, and neither library retries."""
    import urllib.request

    import huggingface_hub.constants

    from esm_perturb.proteins import checkpoints

    asked, loads = [], []

    def unreachable(request, timeout):
        asked.append((request.full_url, timeout))
        raise OSError("Name or service not known")

    def not_cached(source, where, dtype, *, local_files_only):
        loads.append(local_files_only)
        raise OSError("not cached")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(checkpoints, "_from_pretrained", not_cached)
    with pytest.raises(InputError, match="hf download facebook/esm2_t33_650M_UR50D"):
        ESM2.load("esm2_t33_650M_UR50D")
    assert loads == [True] and len(asked) == 1 and asked[0][1] <= 10


def test_damaged_weights_and_an_empty_name_are_one_sentence(model, tmp_path):
    folder = model.save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(model.network.state_dict(), path)
    assert ESM2.load(folder, device="cpu").parameters_sha256() == model.parameters_sha256()
    whole = path.read_bytes()
    torch.save(model.network.state_dict(), path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    bad = [b"", b"x", b"hello world", b"\0" * 99, b"\x80\x02", b"G123", b"J12", whole[:-1], whole[: len(whole) // 2]]
    bad += [legacy[:size] for size in range(0, 400, 7)] + [legacy[:40] + b"\xff" + legacy[41:], legacy[5:]]
    for content in bad:
        path.write_bytes(content)
        (tmp_path / "esm2_bad.pt").write_bytes(content)
        for source in (folder, tmp_path / "esm2_bad.pt"):
            with pytest.raises(InputError) as caught:
                ESM2.load(source, device="cpu")
            assert str(source) in one_line(caught)
    for empty in ("", " "):
        with pytest.raises(InputError, match="name is empty"):
            ESM2.load(empty)


# ---- which proteins, in which batches


def test_vectors_do_not_depend_on_order_copies_or_batches(model, proteins):
    reference = embed_sequences(model, proteins, progress=False)
    backwards = dict(reversed(proteins.items()))
    same = embed_sequences(model, backwards, progress=False)
    assert same.names == list(backwards) and np.array_equal(same.vectors[::-1], reference.vectors)
    for batch_tokens in (1, 90):
        other = embed_sequences(model, backwards, batch_tokens=batch_tokens, progress=False)
        np.testing.assert_allclose(other.vectors[::-1], reference.vectors, atol=5e-6, rtol=0)


def test_equal_proteins_are_computed_once(model, monkeypatch):
    read = []
    forward = PackedESM2.__call__
    monkeypatch.setattr(
        PackedESM2, "__call__", lambda self, p, layer: read.append(sum(p.lengths)) or forward(self, p, layer)
    )
    long = random_protein(60, 0)
    genes = {"A": long, "B": long.lower() + "*", "CUT": long[:50] + "WW", "ISOFORMS": [long, "MK", "MK"]}
    found = embed_sequences(model, genes, max_residues=50, progress=False)
    assert sum(read) == (50 + 2) + (2 + 2)
    assert np.array_equal(found.vectors[0], found.vectors[2])
    short = embed_sequences(model, {"MK": "MK"}, progress=False).vectors[0]
    np.testing.assert_allclose(found.vectors[3], (found.vectors[0] + 2 * short) / 3, atol=1e-6)
    record = found.record
    assert (record["n_proteins"], record["n_distinct_sequences"], record["n_truncated"]) == (6, 2, 4)
    assert len(record["sequence_sha256"]["ISOFORMS"]) == 3 and isinstance(record["sequence_sha256"]["A"], str)


def test_a_full_gpu_halves_the_batches_for_good(model, proteins, monkeypatch, caplog):
    reference = embed_sequences(model, proteins, progress=False)
    forward, asked = PackedESM2.__call__, []

    def short_of_memory(self, packed, layer):
        asked.append(len(packed.lengths) * max(packed.lengths))
        if asked[-1] > room:
            raise torch.OutOfMemoryError
        return forward(self, packed, layer)

    monkeypatch.setattr(PackedESM2, "__call__", short_of_memory)
    room = 100
    with caplog.at_level("WARNING"):
        found = embed_sequences(model, proteins, progress=False)
    np.testing.assert_allclose(found.vectors, reference.vectors, atol=5e-6, rtol=0)
    failed = [index for index, tokens in enumerate(asked) if tokens > room]
    assert 0 < len(failed) <= 3 and failed == list(range(len(failed))), asked
    assert "batches of" in caplog.text
    room = 30
    with pytest.raises(InputError, match="63 residues: choose long=window"):
        embed_sequences(model, proteins, progress=False)


def test_model_random_state_and_mode_are_left_alone(model, proteins):
    model.train()
    before, state = model.parameters_sha256(), torch.get_rng_state()
    embed_sequences(model, proteins, precision="bfloat16", progress=False)
    assert model.training and torch.equal(torch.get_rng_state(), state) and model.parameters_sha256() == before
    model.eval()


def test_progress_tells_speed_on_standard_error(model, capfd):
    embed_sequences(model, {"A": "MKTAYIAK"})
    output = capfd.readouterr()
    assert output.out == "" and "8.00/8.00" in output.err and "residues/s" in output.err


@pytest.mark.parametrize(
    ("genes", "said"),
    [
        ({"A": "MK", "": "MK"}, "row 2 is ''"),
        ({"A\nB": "MK"}, "line break"),
        ({"A": "MK", 7: "MK"}, "row 2 is 7"),
        ({"A": b"MK"}, "Gene 'A': A protein sequence must be text, and this is bytes"),
    ],
)
def test_what_cannot_be_written_is_refused_before_computing(model, genes, said, tmp_path, monkeypatch):
    monkeypatch.setattr(PackedESM2, "__call__", lambda *_: pytest.fail("computed"))
    for call in (embed_sequences, lambda *given, **how: embed_to_folder(*given, tmp_path / "run", **how)):
        with pytest.raises(InputError, match=said) as caught:
            call(model, genes, progress=False)
        one_line(caught)
    with pytest.raises(InputError, match=said):
        list(embed_residues(model, genes, progress=False))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": 1.5}, "layer=1.5 must be a whole number."),
        ({"layer": True}, "layer=True must be a whole number."),
        ({"max_residues": "10"}, "max_residues='10' must be a whole number."),
        ({"max_residues": 0}, "max_residues=0 must be at least 1."),
        ({"overlap": None, "long": "window"}, "overlap=None must be a whole number."),
        ({"batch_tokens": -1}, "batch_tokens=-1 must be at least 0."),
        ({"packed": "no"}, "packed='no' must be true or false."),
        ({"pooling": None}, "pooling=None must be text."),
    ],
)
def test_an_option_of_another_kind_is_named(options, said):
    with pytest.raises(InputError) as caught:
        EmbedSettings(**options)
    assert one_line(caught) == said


def test_the_record_says_how_the_weights_were_stored(model, proteins, tmp_path):
    model.save(tmp_path / "m")
    for dtype in ("float32", "bfloat16"):
        loaded = ESM2.load(tmp_path / "m", device="cpu", dtype=dtype)
        record = embed_sequences(loaded, proteins, progress=False).record
        assert (record["weights_dtype"], record["dtype"]) == (dtype, "float32")
    shape = {"num_hidden_layers": N_LAYERS, "hidden_size": DIM, "num_attention_heads": HEADS}
    assert record["architecture"] == shape | {"intermediate_size": 4 * DIM, "layer_norm_eps": 1e-5}


# ---- long proteins


def test_windows_equal_a_direct_average_per_residue(model, proteins):
    protein = random_protein(100, 3)
    found = embed_sequences(model, {"A": protein}, long="window", max_residues=30, overlap=10, progress=False)
    sums, counts = np.zeros((100, DIM)), np.zeros(100)
    for crop in crops(protein, EmbedSettings(long="window", max_residues=30, overlap=10)):
        states = model.hidden(*tokenize([crop.residues])).detach()[0, 1:-1].numpy()
        sums[crop.start : crop.start + 30] += states
        counts[crop.start : crop.start + 30] += 1
    residues = sums / counts[:, None]
    assert counts.min() == 1 and counts.max() >= 2
    np.testing.assert_allclose(found.vectors[0], residues.mean(axis=0), atol=2e-6)
    settings_ = EmbedSettings(long="window", max_residues=30, overlap=10)
    stream = dict(embed_residues(model, {"A": protein, "B": "MK"}, settings_, progress=False))
    np.testing.assert_allclose(stream["A"], residues, atol=1e-5)
    bos = embed_sequences(
        model, {"A": protein}, long="window", max_residues=30, overlap=10, pooling="bos", progress=False
    )
    first = [model.hidden(*tokenize([crop.residues])).detach()[0, 0].numpy() for crop in crops(protein, settings_)]
    np.testing.assert_allclose(bos.vectors[0], np.mean(first, axis=0), atol=2e-6)


def test_a_giant_protein_under_every_policy(giant, caplog):
    small = ESM2.new(1, 16, 2, seed=0).eval()
    with pytest.raises(InputError, match="Gene 'TTN': the protein has 35,000 residues") as caught:
        embed_sequences(small, {"A": "MK", "TTN": giant}, long="error", progress=False)
    assert "choose long=truncate" in one_line(caught)
    genes = {"TTN": giant, "START": giant[:1022]}
    cut = embed_sequences(small, genes, progress=False)
    assert np.array_equal(cut.vectors[0], cut.vectors[1]) and cut.record["truncated"] == ["TTN"]
    spread = embed_sequences(small, genes, long="window", progress=False)
    assert np.array_equal(spread.vectors[1], cut.vectors[1]) and not np.allclose(spread.vectors[0], cut.vectors[0])
    assert spread.record["truncated"] == [] and spread.record["longer_than_max_residues"] == ["TTN"]
    with caplog.at_level(logging.WARNING):
        whole = embed_sequences(small, {"TTN": giant[:5000]}, long="full", progress=False)
    assert "long=full reads 'TTN' (5,000 residues) at once" in caplog.text and "long=window" in caplog.text
    states = small.hidden(*tokenize([giant[:5000]])).detach()[0, 1:-1].mean(dim=0)
    np.testing.assert_allclose(whole.vectors[0], states, atol=1e-5)


@pytest.mark.slow
def test_a_giant_protein_in_one_pass(giant):
    small = ESM2.new(1, 16, 1, seed=0).eval()
    found = embed_sequences(small, {"TTN": giant}, long="full", progress=False)
    windows = embed_sequences(small, {"TTN": giant}, long="window", progress=False)
    assert np.isfinite(found.vectors).all() and np.abs(found.vectors - windows.vectors).max() < 0.1


def test_windows_of_a_giant_need_little_memory(giant):
    small = ESM2.new(2, 64, 4, seed=0).eval()
    embed_sequences(small, {"A": giant[:3000]}, long="window", progress=False)
    peaks = []
    forward = PackedESM2.__call__
    batches = embed.Batches(PackedESM2(small), EmbedSettings(long="window"))
    batches.network = lambda packed, layer: peaks.append(len(packed.ids)) or forward(PackedESM2(small), packed, layer)
    batches(crops(giant, EmbedSettings(long="window")), lambda rows, hidden: None)
    assert len(peaks) == 10 and max(peaks) <= 4096


# ---- states of residues


def test_residue_file_equals_the_states(model, fair, proteins, tmp_path):
    genes = proteins | {"COPY": proteins["G1"]}
    path = write_residues(tmp_path / "r.safetensors", model, genes, progress=False)
    states = load_file(path)
    with safe_open(write_residues(path, model, genes, isoforms="longest", progress=False), "np") as file:
        made = file.metadata()
    hashes = json.loads(made["sequence_sha256"])
    assert made["isoforms"] == "longest" and hashes == {name: sha256_text(text) for name, text in genes.items()}
    assert set(states) == set(genes) and [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]
    for name, protein in genes.items():
        _, _, tokens = fair.alphabet.get_batch_converter()([(name, protein)])
        with torch.inference_mode():
            expected = fair(tokens, repr_layers=[N_LAYERS])["representations"][N_LAYERS][0, 1:-1]
        np.testing.assert_allclose(states[name], expected, atol=1e-5, rtol=0)


def test_residue_file_on_a_full_disk_is_not_there(model, proteins, tmp_path, file_limit):
    with file_limit(3000), pytest.raises(InputError, match="could not be written .*make room"):
        write_residues(tmp_path / "r.safetensors", model, proteins, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- runs on disk


@pytest.fixture
def file_limit():
    """No file may grow beyond so many bytes: writes fail as they do on a full disk."""
    from contextlib import contextmanager

    @contextmanager
    def limit(n_bytes: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="module")
def many() -> dict[str, str | list[str]]:
    lengths = np.random.default_rng(5).integers(30, 500, size=60)
    genes = {f"G{index}": random_protein(length, index) for index, length in enumerate(lengths)}
    return genes | {"ISOFORMS": [genes["G1"], genes["G50"], "MKTAYI"], "COPY": genes["G7"]}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but the time at which it was made."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in ("provenance.json", "run.yaml", "sequences.json")
    }


def is_memory_mapped(array: np.ndarray) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


@pytest.fixture(scope="module")
def finished(many, tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder, and an undisturbed run with it."""
    folder = tmp_path_factory.mktemp("finished")
    ESM2.new(4, 128, 8, seed=3).save(folder / "model")
    torch.set_num_threads(1)
    embed_to_folder(folder / "model", many, folder / "run", shard_residues=1000, progress=False)
    return folder / "model", folder / "run"


def test_a_run_equals_embedding_in_memory(finished, many):
    found = load_run(finished[1])
    direct = embed_sequences(ESM2.load(finished[0]), many, progress=False)
    assert list(found.names) == list(many) and is_memory_mapped(found.vectors)
    np.testing.assert_allclose(found.vectors, direct.vectors, atol=2e-6, rtol=0)
    same = set(direct.record) - {"provenance"}
    assert {name: found.record[name] for name in same} == {name: direct.record[name] for name in same}
    assert len(list((finished[1] / "shards").iterdir())) > 10
    saved = found.save(finished[1].parent / "genes.pt")
    assert torch.load(saved, weights_only=True)["G1"].shape == (128,)


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "esm_perturb.proteins.embedding_run", "--config", str(config)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def write_config(folder: Path, model_folder: Path, genes: dict, **changes) -> Path:
    write_json(folder / "genes.json", genes)
    config = {"model": str(model_folder), "sequences": str(folder / "genes.json"), "output_dir": str(folder / "run")}
    return write_yaml(folder / "config.yaml", config | {"shard_residues": 1000} | changes)


def test_killed_at_any_moment_the_rerun_ends_with_the_same_bytes(finished, many, tmp_path):
    config, shards = write_config(tmp_path, finished[0], many), tmp_path / "run" / "shards"
    n_shards = len(list((finished[1] / "shards").iterdir()))
    rng = np.random.default_rng()
    done = 0
    for _ in range(3):
        process = start(config)
        enough, deadline = done + int(rng.integers(1, 4)), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if shards.is_dir() and sum(not path.name.startswith(".") for path in shards.iterdir()) >= enough:
                break
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = sum(not path.name.startswith(".") for path in shards.iterdir())
        assert process.returncode in (-signal.SIGKILL, 0)
        if done < n_shards:
            assert not (tmp_path / "run" / "record.json").exists()
    times = {path: path.stat().st_mtime_ns for path in shards.iterdir() if not path.name.startswith(".")}
    process = start(config)
    assert process.communicate()[1] is not None and process.returncode == 0
    assert all(path.stat().st_mtime_ns == made for path, made in times.items()), "a finished shard was computed again"
    assert contents(tmp_path / "run") == contents(finished[1])


def test_leavings_of_a_killed_process_and_other_shards_go(finished, many, tmp_path):
    model, folder = ESM2.load(finished[0]), tmp_path / "run"
    (folder / "shards").mkdir(parents=True)
    for name in (f".{'a' * 64}.x1_.safetensors", f"{'b' * 64}.safetensors"):
        (folder / "shards" / name).write_text("left")
    for name in (".vectors.x_1.npy", ".record.ab.json", ".provenance.cd.json"):
        (folder / name).write_text("left")
    mine = [folder / "notes.txt", folder / "shards" / "model.safetensors", folder / ".vectors"]
    for path in mine:
        path.write_text("the user's")
    embed_to_folder(model, many, folder, shard_residues=1000, progress=False)
    assert [path.read_text() for path in mine] == ["the user's"] * 3
    for path in mine:
        path.unlink()
    assert contents(folder) == contents(finished[1])


def test_two_processes_make_the_same_bytes(finished, many, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = embed_to_folder(finished[0], many, tmp_path / "run", shard_residues=1000, n_processes=2, progress=False)
    assert contents(tmp_path / "run") == contents(finished[1])
    assert np.array_equal(found.vectors, load_run(finished[1]).vectors)


def test_shares_are_even_and_complete(many):
    settings_ = EmbedSettings()
    plan = make_plan(embed.clean_proteins(many, settings_), settings_, shard_residues=1000)
    costs = embedding_run.shard_costs(plan, settings_, 33, 1280)
    for world in (1, 2, 3, 5):
        shares = share(costs, world)
        assert sorted(sum(shares, [])) == list(range(len(plan.shards)))
        loads = [sum(costs[index] for index in indices) for indices in shares]
        assert max(loads) - min(loads) <= max(costs)
    assert sum(costs) == sum(
        24 * 33 * 1280**2 * (len(p) + 2) + 4 * 33 * 1280 * (len(p) + 2) ** 2 for p in plan.proteins
    )


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "another shard"])
def test_a_damaged_shard_is_computed_again(finished, many, tmp_path, damage, caplog):
    model = ESM2.load(finished[0])
    run = EmbeddingRun(model, many, tmp_path / "run", EmbedSettings(), shard_residues=1000)
    run.compute(range(len(run.keys)), progress=False)
    path = run.path(2)
    whole = path.read_bytes()
    bad = {
        "cut": whole[: len(whole) // 2],
        "flip": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "empty": b"",
        "text": b"\x10\0\0\0\0\0\0\0 not a shard    ",
        "another shard": run.path(3).read_bytes(),
    }
    path.write_bytes(bad[damage])
    with caplog.at_level("WARNING"):
        assert read_shard(path, run.keys[2]) is None
        run.assemble()
    assert f"'{path}' is damaged" in caplog.text
    assert contents(tmp_path / "run") == contents(finished[1])


def test_whatever_changes_is_computed_again(model, proteins, tmp_path):
    """The vectors of a folder that is used again are those of a fresh one."""
    other = ESM2.new(N_LAYERS, DIM, HEADS, seed=8).eval()
    turned = ESM2.new(N_LAYERS, DIM, HEADS, seed=1)
    turned.load_state_dict(model.state_dict())
    turned.network.esm.rotary_embeddings.inv_freq *= 1.01
    fair = ESM2(model.network, name="m", backend="fair-esm")
    coarse = ESM2(copy.deepcopy(model.network), name="m").eval()  # equal weights, another number in config.json
    coarse.config.layer_norm_eps = 0.1
    assert coarse.parameters_sha256() == model.parameters_sha256()
    changes = [
        (model, proteins, EmbedSettings()),
        (other, proteins, EmbedSettings()),
        (turned, proteins, EmbedSettings()),
        (coarse, proteins, EmbedSettings()),
        (fair, proteins, EmbedSettings()),
        (model, proteins, EmbedSettings(layer=1)),
        (model, proteins, EmbedSettings(pooling="bos")),
        (model, proteins, EmbedSettings(max_residues=30)),
        (model, proteins, EmbedSettings(long="window", max_residues=30, overlap=5)),
        (model, proteins, EmbedSettings(long="window", max_residues=30, overlap=20)),
        (model, proteins, EmbedSettings(precision="bfloat16")),
        (model, proteins | {"G5": proteins["G5"][:-1] + "W"}, EmbedSettings()),
    ]
    seen = set()
    for index, (network, genes, settings_) in enumerate(changes):
        embed_to_folder(model, proteins, tmp_path / "used", progress=False)  # a run removes the shards of others
        again = embed_to_folder(network, genes, tmp_path / "used", settings_, progress=False)
        fresh = embed_to_folder(network, genes, tmp_path / f"fresh{index}", settings_, progress=False)
        assert contents(tmp_path / "used") == contents(tmp_path / f"fresh{index}")
        seen.add(again.vectors.tobytes())
        assert np.array_equal(again.vectors, fresh.vectors)
    assert len(seen) == len(changes)


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(finished, many, tmp_path, monkeypatch, file_limit):
    model, write = ESM2.load(finished[0]), Path.write_bytes
    written = []

    def full_after_three(self, data):
        if len(written) == 3:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_after_three)
    with pytest.raises(InputError, match="No space left on device.*finished shards are kept") as caught:
        embed_to_folder(model, many, tmp_path / "run", shard_residues=1000, progress=False)
    assert str(tmp_path / "run") in one_line(caught)
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(left) == 3 and all(path.read_bytes() == contents(finished[1])[f"shards/{path.name}"] for path in left)
    monkeypatch.undo()
    with file_limit(20_000), pytest.raises(InputError, match="make room there"):
        embed_to_folder(model, many, tmp_path / "run", shard_residues=1000, progress=False)
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(left) == len(contents(finished[1])) - 2 and not {"vectors.npy", "record.json"} & set(left)
    embed_to_folder(model, many, tmp_path / "run", shard_residues=1000, progress=False)
    assert contents(tmp_path / "run") == contents(finished[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_dir": "blocked/run"}, "'blocked/run' cannot be written to (Not a directory)"),
        ({"model": "absent"}, "neither a model folder"),
        ({"sequences": "absent.json"}, "do not exist"),
        ({"settings": {"long": "error", "max_residues": 100}}, "more than max_residues=100"),
        ({"settings": {"long": "windows"}}, "did you mean 'window'"),
    ],
)
def test_the_module_ends_with_code_2_and_one_sentence(finished, many, tmp_path, monkeypatch, capfd, changes, said):
    monkeypatch.chdir(tmp_path)
    Path("blocked").write_text("a file where a folder is wanted")
    with pytest.raises(SystemExit) as caught:
        embedding_run.main(["--config", str(write_config(tmp_path, finished[0], many, **changes))])
    lines = capfd.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and lines[-1].startswith("input error: ") and said in lines[-1], lines


def test_an_unfinished_or_torn_folder_is_refused(finished, tmp_path):
    with pytest.raises(MissingFileError, match="run it again"):
        load_run(tmp_path)
    for name in ("vectors.npy", "record.json", "provenance.json"):
        for other in ("vectors.npy", "record.json", "provenance.json"):
            (tmp_path / other).write_bytes((finished[1] / other).read_bytes())
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError) as caught:
            load_run(tmp_path)
        assert str(tmp_path) in one_line(caught)


def test_vectors_that_are_not_the_records_are_refused(finished, tmp_path):
    for name in ("vectors.npy", "record.json", "provenance.json"):
        (tmp_path / name).write_bytes((finished[1] / name).read_bytes())
    np.save(tmp_path / "vectors.npy", np.load(tmp_path / "vectors.npy")[::-1].copy())
    with pytest.raises(InputError, match="vectors.npy' is not what record.json describes") as caught:
        load_run(tmp_path)
    assert str(tmp_path) in one_line(caught)


def test_a_folder_is_for_one_run_at_a_time(finished, many, tmp_path):
    """Threads, processes and launched runs: the second gets one sentence, and the first is not disturbed."""
    config, folder = write_config(tmp_path, finished[0], many), tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for n_processes in (1, 2):
            with pytest.raises(InputError, match="Another run is writing to .* choose another output_dir") as caught:
                embed_to_folder(finished[0], many, folder, n_processes=n_processes, progress=False)
            assert str(folder) in one_line(caught)
        process = start(config)
        message = process.communicate()[1].strip().splitlines()[-1]
        assert process.returncode == 2 and "input error: Another run is writing to" in message
        assert [path.name for path in folder.iterdir()] == [".lock"]
    embed_to_folder(finished[0], many, folder, shard_residues=1000, progress=False)  # a lock file that nobody holds
    assert contents(folder) == contents(finished[1])


def test_a_killed_run_leaves_no_lock_and_no_workers(finished, many, tmp_path):
    """Two processes are started by one that is killed: they stop at the next shard, and a new run can begin."""
    if not Path("/proc/self/cmdline").is_file():
        pytest.skip("processes are found in /proc")
    code = (
        "import json, sys\n"
        "from esm_perturb.proteins.embedding_run import embed_to_folder\n"
        "genes = json.load(open(sys.argv[2]))\n"
        "embed_to_folder(sys.argv[1], genes, sys.argv[3], n_processes=2, shard_residues=1, progress=False)\n"
    )
    lengths = np.random.default_rng(6).integers(300, 500, size=4000)
    genes = {f"G{index}": random_protein(length, index) for index, length in enumerate(lengths)}
    write_json(tmp_path / "genes.json", genes)
    folder = tmp_path / "run"
    command = [sys.executable, "-c", code, str(finished[0]), str(tmp_path / "genes.json"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def workers() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += [int(path.parent.name)] * (str(folder / "run.yaml").encode() in path.read_bytes())
            except OSError:  # it ended while we looked
                continue
        return found

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while len(list(folder.glob("shards/[0-9a-f]*"))) < 4 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        assert len(workers()) == 3  # torch's launcher and two of ours
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while (left := workers()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left and len(list(folder.glob("shards/[0-9a-f]*"))) < len(genes)
    few = dict(list(genes.items())[:3])
    assert len(embed_to_folder(finished[0], few, folder, shard_residues=1, progress=False).names) == 3


def test_memory_stays_flat(tmp_path):
    """Peak memory of a process, from /proc, for 500 and 20,000 proteins."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc")
    code = (
        "import sys, re, numpy as np\n"
        "from esm_perturb.proteins.embedding_run import embed_to_folder\n"
        "from esm_perturb.proteins.esm2 import ESM2\n"
        "rng, n = np.random.default_rng(0), int(sys.argv[1])\n"
        "letters = np.frombuffer(b'ACDEFGHIKLMNPQRSTVWY', dtype='S1')\n"
        "genes = {f'G{i}': rng.choice(letters, size=20 + i % 40).tobytes().decode() for i in range(n)}\n"
        "embed_to_folder(ESM2.new(1, 64, 2), genes, sys.argv[2], shard_residues=20_000, progress=False)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    peaks = []
    for n in (500, 20_000):
        command = [sys.executable, "-c", code, str(n), str(tmp_path / str(n))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 120, peaks  # the states of all residues would be 200 MB
    record = json.loads((tmp_path / "20000" / "record.json").read_text())
    assert record["n_genes"] == 20_000
