"""Pipelines from the outside: bare papermill, the command line and Jupyter; bad input and failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ENVIRONMENT
from safetensors.torch import load_file

from esm_perturb.core.config import InputError
from esm_perturb.core.files import project_root, read_yaml
from esm_perturb.evaluation.baselines import MeanResponse, NoChange, RidgeOnEmbeddings
from esm_perturb.proteins.embeddings import GeneEmbeddings
from esm_perturb.workflow import cli, pipelines
from esm_perturb.workflow.cli import main
from esm_perturb.workflow.pipelines import PIPELINES, PipelineError, pipeline_path, read_parameters, run_pipeline


def snapshot(*folders: Path) -> dict[str, bytes]:
    """Every file below the folders, with its content; caches left out."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if "__pycache__" not in path.parts}


def repository_state() -> dict[str, tuple[int, int]]:
    """Size and time of the repository's sources and data, and of what lies at its top."""
    root = project_root()
    files = [path for name in ("nbs", "configs", "data", "esm_perturb") for path in (root / name).rglob("*")]
    files = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    state = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return state | {str(path): (0, 0) for path in root.iterdir()}


# ---- the same run, started in two ways


@pytest.fixture(scope="module")
def bare_papermill(tiny, shell, tmp_path_factory):
    """`20_train` run by papermill's own command: the process, the run folder and the executed notebook."""
    folder = tmp_path_factory.mktemp("bare")
    words = ("-f", tiny / "run.yaml", "-p", "output_dir", folder / "run")
    done = shell("papermill", pipeline_path("20_train"), folder / "out.ipynb", *words, cwd=folder)
    return done, folder / "run", folder / "out.ipynb"


def test_bare_papermill_succeeds_and_knows_every_parameter(bare_papermill):
    done, run, executed = bare_papermill
    assert done.returncode == 0, done.stderr
    assert "unknown parameter" not in done.stderr.lower() and "unable to parse" not in done.stderr.lower()
    assert read_yaml(run / "config.yaml")["training"]["max_steps"] == 20
    cells = nbformat.read(executed, as_version=4).cells
    assert sum("injected-parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def test_papermill_and_the_command_line_give_the_same_model(bare_papermill, trained):
    _, run, _ = bare_papermill
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns="steps_per_second") for folder in (run, trained)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0]["step"].tolist() == [5, 10, 15, 20]
    checkpoints = [torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True) for folder in (run, trained)]
    first, second = (checkpoint["weights"] for checkpoint in checkpoints)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    settings = [read_yaml(folder / "config.yaml") | {"output_dir": ""} for folder in (run, trained)]
    assert settings[0] == settings[1]


def test_a_wrong_type_stops_bare_papermill(tiny, shell, tmp_path):
    words = ("-f", tiny / "run.yaml", "-r", "max_steps", "20", "-p", "output_dir", tmp_path / "run")
    done = shell("papermill", pipeline_path("20_train"), tmp_path / "out.ipynb", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "Parameter 'max_steps' of 20_train must be int, found '20'." in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_notebook_run_as_it_stands_leaves_the_repository_clean(shell, tmp_path):
    """As JupyterLab would run it: no parameters, and another working directory than the notebook's."""
    before = repository_state()
    elsewhere, temporary = tmp_path / "elsewhere", tmp_path / "temporary"
    elsewhere.mkdir()
    temporary.mkdir()
    done = shell("jupyter", "execute", pipeline_path("10_embed_genes"), cwd=elsewhere, temporary=temporary)
    assert done.returncode == 0, done.stderr
    assert repository_state() == before
    assert list(elsewhere.iterdir()) == []
    assert len(list(temporary.glob("esm_perturb_*/genes.pt"))) == 1


@pytest.mark.parametrize("pipeline", PIPELINES.values())
def test_papermill_reads_the_parameters_that_we_read(pipeline):
    """What `papermill --help-notebook` shows: papermill parses the cell with patterns, we with Python's parser."""
    theirs, ours = papermill.inspect_notebook(str(pipeline_path(pipeline))), read_parameters(pipeline_path(pipeline))
    assert list(theirs) == list(ours)
    for name, parameter in ours.items():
        assert theirs[name]["inferred_type_name"] == parameter.type.__name__
        assert theirs[name]["help"] == parameter.help != ""
        assert type(parameter.default) is parameter.type


# ---- bad input


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory) -> Path:
    """Inputs with one fault each."""
    folder = tmp_path_factory.mktemp("broken")
    toml = (tiny / "split.toml").read_text().replace('"cells.h5ad"', f'"{tiny / "cells.h5ad"}"')
    assert "FAM01-" in toml
    (folder / "misspelt.toml").write_text(toml.replace("FAM01-", "FAM01_"))
    cells = anndata.read_h5ad(tiny / "cells.h5ad")
    cells[cells.obs["gene"] != "non-targeting"].write_h5ad(folder / "no_controls.h5ad")
    (folder / "no_controls.toml").write_text(toml.replace(str(tiny / "cells.h5ad"), "no_controls.h5ad"))
    whole = GeneEmbeddings.load(tiny / "genes.pt")
    GeneEmbeddings(whole.names[1:], whole.vectors[1:]).save(folder / "one_short.pt")
    (folder / "empty.fasta").write_text("")
    (folder / "empty_model").mkdir()
    (folder / "occupied").write_text("a file")
    return folder


TRAIN = ["train", "--config", "{tiny}/run.yaml"]
BAD = {
    "misspelt parameter": ([*TRAIN, "--max_stepz", "3"], "'--max_stepz' (did you mean '--max_steps'?)"),
    "parameter of the wrong type": ([*TRAIN, "--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
    "unknown override": ([*TRAIN, "model.kwargs.hiden_dim=8"], "'model.kwargs.hiden_dim' (did you mean 'hidden_dim'?)"),
    "unknown perturbation": (
        ["train", "--config", "{tiny}/run.yaml,{broken}/misspelt.toml"],
        r"'FAM01_\d\d' .*misspelt.toml .*\(did you mean 'FAM01-\d\d'\?\)",
    ),
    "missing gene": ([*TRAIN, "--esm_embeddings_path", "{broken}/one_short.pt"], r"FAM01-01.* missing_genes=drop"),
    "missing embeddings": (
        ["train", "--esm_embeddings_path", "no.pt"],
        r"no.pt' does not exist.* --esm_embeddings_path",
    ),
    "no control cells": (
        ["train", "--config", "{tiny}/run.yaml,{broken}/no_controls.toml"],
        "control label 'non-targeting' .* data.kwargs.control_pert",
    ),
    "missing FASTA": (["embed", "--fasta", "no.fasta"], "'no.fasta' does not exist"),
    "unknown species": ([*TRAIN, "embeddings.current=mous"], "'mous' (did you mean 'mouse'?)"),
    "unknown table format": (["embed", "--formats", "pickle"], "formats='pickle' must name pt"),
    "no process": (["embed", "--n_processes", "0"], "n_processes=0 must be at least 1"),
    "residues of several isoforms": (["embed", "--residues", "--isoforms", "all_mean"], "choose isoforms=canonical"),
    "residues by SATURN's recipe": (
        ["embed", "--residues", "--isoforms", "longest", "--compat", "saturn"],
        "not pooled",
    ),
    "input among the results": (["embed", "--fasta", "runs/new/genes.h5ad"], "has the name of a result in output_dir"),
    "empty FASTA": (["embed", "--fasta", "{broken}/empty.fasta"], "empty.fasta' is empty"),
    "not a model": (["embed", "--fasta", "{tiny}/proteins.fasta", "--model", "{broken}/empty_model"], "empty_model"),
    "prediction without a run": (["predict", "--run_dir", "{tiny}"], "folder of a finished training run"),
    "evaluation without a run": (["evaluate", "--run_dir", "{tiny}"], "folder of a training run"),
    "predictions of no run": (["evaluate", "--predictions", "a.h5ad"], "give --run_dir with --predictions"),
    "unknown arm": (["evaluate", "--arms", "esm,shufled", "--max_steps", "2"], "did you mean 'shuffled'"),
    "no seed": (["evaluate", "--arms", "esm", "--n_seeds", "0"], "one seed or more"),
    "unknown command": (["trian"], "did you mean 'train'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2_and_leaves_nothing(name, tiny, broken, tmp_path, monkeypatch, capfd):
    words, expected = BAD[name]
    words = [word.format(tiny=tiny, broken=broken) for word in words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = sorted(snapshot(tiny, broken))
    with pytest.raises(SystemExit) as stop:
        main([*words, *([] if name == "unknown command" else ["--output_dir", "runs/new"])])
    told = capfd.readouterr()
    assert stop.value.code == 2
    assert told.out == "" and told.err.startswith("esm-perturb: ") and told.err.count("\n") == 1, told.err
    assert re.search(expected if "\\" in expected or ".*" in expected else re.escape(expected), told.err)
    assert list(tmp_path.iterdir()) == [] and sorted(snapshot(tiny, broken)) == before


def test_bad_input_from_a_terminal(shell, tmp_path):
    """The installed command passes on what `main` gives."""
    done = shell("esm-perturb", "train", "--max_stepz", "3", "--output_dir", "new", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("esm-perturb: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["train"], ["embed"], ["demo", "--max_steps", "1"]], ids=" ".join)
def test_a_folder_that_cannot_be_made(broken, words, capfd):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--output_dir", str(broken / "occupied" / "run")])
    told = capfd.readouterr().err
    assert stop.value.code == 2
    assert told.count("\n") == 1 and "choose another output_dir" in told
    assert (broken / "occupied").read_text() == "a file"


def test_a_refused_rerun_leaves_the_finished_run_as_it_was(tiny, trained, tmp_path, monkeypatch, capfd):
    """Other settings in the same folder: the checkpoint and the configuration beside it still belong together."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = snapshot(run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tiny / "run.yaml"), "--lr", "0.01", "--output_dir", str(run)])
    assert stop.value.code == 2
    assert "holds a run with other settings: training.lr differs" in capfd.readouterr().err
    assert snapshot(run) == before


def test_a_folder_of_another_study_is_refused_untouched(tmp_path, capfd):
    from esm_perturb.workflow.study import claim_folder

    folder = tmp_path / "demo"
    claim_folder(folder, {"study": "demo", "seed": 0, "max_steps": 0}, "mini_esm2")
    before = snapshot(folder)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--seed", "1", "--output_dir", str(folder)])
    assert stop.value.code == 2
    assert "another seed (0, now 1)" in capfd.readouterr().err
    assert snapshot(folder) == before


def test_somebody_elses_index_is_not_overwritten(tmp_path, capfd):
    page = tmp_path / "index.html"
    page.write_text("my own page")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2 and "was not written by esm-perturb" in capfd.readouterr().err
    assert page.read_text() == "my own page"
    page.unlink()
    main(["report", str(tmp_path)])
    main(["report", str(tmp_path)])


def test_unknown_arms_are_refused_before_anything_is_simulated(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for arms, hint in {"esn": "did you mean 'esm'", "esm,esm": "once", ",": "at least one"}.items():
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--arms", arms, "--output_dir", "study"])
        assert stop.value.code == 2
        told = capfd.readouterr().err
        assert hint in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- failures inside a run


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a notebook of our own in the place of `20_train`."""

    def make(source: str) -> None:
        notebook = nbformat.v4.new_notebook()
        parameters = nbformat.v4.new_code_cell('output_dir: str = ""  # run folder', metadata={"tags": ["parameters"]})
        notebook.cells = [parameters, nbformat.v4.new_code_cell("print('it began')"), nbformat.v4.new_code_cell(source)]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        nbformat.write(notebook, tmp_path / "20_train.ipynb")
        for module in (pipelines, cli):
            monkeypatch.setattr(module, "pipeline_path", lambda pipeline: tmp_path / f"{pipeline}.ipynb")

    return make


def test_a_failure_in_a_training_process_ends_with_code_1_and_says_where(stand_in, tmp_path, capfd):
    """From the launched process through the notebook to the terminal."""
    stand_in("from esm_perturb.core.launch import launch\nlaunch('esm_perturb.no_such_module')")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--output_dir", str(tmp_path / "run")])
    told = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith("esm-perturb: 20_train failed: LaunchError: ") and last.endswith("run/20_train.ipynb")
    assert "no_such_module" in last
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "failed" and facts["notebook"] == "20_train.ipynb"
    assert "no_such_module" in facts["error"]
    cells = nbformat.read(tmp_path / "run" / "20_train.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.ename for output in outputs if output.output_type == "error"] == ["LaunchError"]
    assert "no_such_module" in (tmp_path / "run" / "report.html").read_text()


def test_a_killed_kernel_is_a_failed_run(stand_in, tmp_path):
    """As when the memory runs out."""
    stand_in("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(PipelineError, match="20_train failed: .* killed, most often for lack of memory"):
        run_pipeline("20_train", {}, output_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert "it began" in (tmp_path / "run" / "20_train.ipynb").read_text()


def test_only_our_input_errors_count_as_bad_input(stand_in, tmp_path):
    """A `ValueError` from somewhere else is a failure: its files stay."""
    stand_in("raise ValueError('not the user\\'s fault')")
    with pytest.raises(PipelineError, match="ValueError: not the user's fault"):
        run_pipeline("20_train", {}, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "20_train.ipynb").is_file()
    stand_in("from esm_perturb.core.config import InputError\nraise InputError('no such gene')")
    with pytest.raises(InputError, match="^no such gene$"):
        run_pipeline("20_train", {}, output_dir=tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


# ---- from a trained run to a report


@pytest.fixture(scope="module")
def evaluated(trained, shell, tmp_path_factory) -> Path:
    """A folder with `predict/` and `evaluate/` of the small run."""
    folder = tmp_path_factory.mktemp("evaluated")
    steps = {
        "predict": ("--run_dir", trained),
        "evaluate": ("--run_dir", trained, "--predictions", folder / "predict" / "esm.h5ad"),
    }
    for command, words in steps.items():
        done = shell("esm-perturb", command, *words, "--output_dir", folder / command, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "Error" not in done.stderr
        assert done.stdout == f"Report: {folder / command / 'report.html'}\n"
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_run_folder_holds_what_is_documented(trained, evaluated):
    common = {"report.html", "metrics.json", "run.json", "config.yaml", "provenance.json"}
    made = {"20_train.ipynb", "metrics.csv", "training.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert names(trained) == common | made | {"leakage.csv"}
    assert names(evaluated / "predict") == common | {"30_predict.ipynb", "esm.h5ad", "learning_curve.csv"}
    assert common | {"40_evaluate.ipynb", "notebook.html"} <= names(evaluated / "evaluate")
    for folder in (trained, evaluated / "predict", evaluated / "evaluate"):
        assert json.loads((folder / "run.json").read_text())["status"] == "ok"


def test_predictions_are_one_cell_for_each_real_test_cell(tiny, trained, evaluated):
    predicted = anndata.read_h5ad(evaluated / "predict" / "esm.h5ad")
    real = anndata.read_h5ad(tiny / "cells.h5ad")
    held_out = set(re.findall(r"FAM\d\d-\d\d", (tiny / "split.toml").read_text()))
    assert set(predicted.obs["perturbation"]) == held_out
    assert predicted.n_obs == int(real.obs["gene"].isin(held_out).sum())
    assert list(predicted.var_names) == list(real.var_names)
    assert (real.obs.loc[predicted.obs["control_cell"], "gene"] == "non-targeting").all()
    facts = json.loads(predicted.uns["esm_perturb"])
    assert facts["method"] == "esm" and facts["split"] == "test"


def test_reports_ask_the_network_for_nothing(trained, evaluated):
    pages = [trained / "report.html", evaluated / "predict" / "report.html"]
    pages += [evaluated / "evaluate" / "report.html", evaluated / "evaluate" / "notebook.html"]
    outside = re.compile(
        r"""(?:src|srcset|href|action|data)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(\s*["']?\s*(?:https?:)?//"""
    )
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loads = [found.group() for found in re.finditer(outside, text)]
        assert loads == [], page
        assert page.stat().st_size < 10 * 1024 * 1024


def test_the_verdict_names_every_baseline_with_an_interval(tiny, evaluated):
    verdict = json.loads((evaluated / "evaluate" / "metrics.json").read_text())["verdict"]
    assert {row["baseline"] for row in verdict} >= {NoChange.name, MeanResponse.name, RidgeOnEmbeddings.name}
    held_out = set(re.findall(r"FAM\d\d-\d\d", (tiny / "split.toml").read_text()))
    for row in verdict:
        assert row["low"] <= row["mean_difference"] <= row["high"] and row["n"] == len(held_out)
        assert 0 <= row["wins"] <= row["n"] and row["outcome"]


def test_arms_are_trained_where_they_are_missing_and_used_where_they_are_there(trained, shell, tmp_path):
    """`train` is the esm arm; a second call trains nothing and predicts nothing anew."""
    before = snapshot(trained)
    words = ["evaluate", "--run_dir", trained, "--arms", "esm,onehot", "--n_seeds", "2", "--quick"]
    done = shell("esm-perturb", *words, "--output_dir", "new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = {path.name for path in (tmp_path / "new").glob("train_*")}
    assert runs == {"train_esm_seed4", "train_onehot", "train_onehot_seed4"}
    assert snapshot(trained) == before
    record = json.loads((tmp_path / "new" / "metrics.json").read_text())
    arms = pd.DataFrame(record["arms"])
    assert arms["Arm"].tolist() == ["esm", "onehot"] and (arms["Seeds"] == 2).all()
    methods = {row["baseline"] for row in record["verdict"]}
    assert methods >= {"onehot", "esm_shuffled_at_inference", "mean_response", "ridge", "knn", "oracle_mean"}
    splits = {
        read_yaml(folder / "config.yaml")["data"]["kwargs"]["split_seed"]
        for folder in (tmp_path / "new").glob("*_seed4")
        if folder.name.startswith("train")
    }
    assert splits == {3}
    kept = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*") if path.suffix in (".ckpt", ".h5ad")
    }
    done = shell("esm-perturb", *words, "--output_dir", "new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = shell(
        "esm-perturb",
        "evaluate",
        "--config",
        read_yaml(trained / "config.yaml")["data"]["kwargs"]["toml_config_path"],
        "--arms",
        "onehot",
        "--max_steps",
        "7",
        "--output_dir",
        "new",
        cwd=tmp_path,
    )
    assert other.returncode == 2 and "holds a run with another" in other.stderr and other.stderr.count("\n") == 1


# ---- embedding runs


@pytest.fixture(scope="module")
def isoforms(tmp_path_factory) -> Path:
    """Two genes, one of them with a canonical and a longer alternative protein."""
    path = tmp_path_factory.mktemp("isoforms") / "iso.fasta"
    letters = np.random.default_rng(0).choice(list("ACDEFGHIKLMNPQRSTVWY"), 700)
    records = {
        "sp|P00001|GA_HUMAN GN=GA": "".join(letters[:90]),
        "sp|P00001-2|GA_HUMAN GN=GA": "".join(letters[:150]),
        "sp|P00002|GB_HUMAN GN=GB": "".join(letters[150:]),
    }
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    return path


def test_states_of_residues_follow_the_settings_of_the_table(shell, isoforms, tmp_path):
    words = ("--isoforms", "canonical", "--max_residues", "200", "--long", "window", "--residues", "--formats", "npz")
    done = shell("esm-perturb", "embed", "--fasta", isoforms, *words, "--output_dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    states = load_file(tmp_path / "run" / "residues.safetensors")
    assert {gene: len(values) for gene, values in states.items()} == {"GA": 90, "GB": 550}
    table = GeneEmbeddings.load(tmp_path / "run" / "genes.npz")
    for gene, values in states.items():
        np.testing.assert_allclose(values.numpy().mean(axis=0), table.lookup([gene]).vectors[0], atol=1e-5)
    assert (table.record["species"], table.record["isoforms"]) == ("human", "canonical")


def test_tables_of_an_earlier_run_do_not_stay(shell, isoforms, tmp_path):
    run = ("embed", "--fasta", isoforms, "--output_dir", tmp_path / "run")
    assert shell("esm-perturb", *run, cwd=tmp_path).returncode == 0
    first = GeneEmbeddings.load(tmp_path / "run" / "genes.pt").vectors
    refused = shell("esm-perturb", *run, "--genes", "GA,NOPE", cwd=tmp_path)
    assert refused.returncode == 2
    assert "NOPE" not in (tmp_path / "run" / "coverage.csv").read_text()
    done = shell("esm-perturb", *run, "--isoforms", "canonical", "--formats", "safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "genes.pt").exists()
    assert not np.array_equal(GeneEmbeddings.load(tmp_path / "run" / "genes.safetensors").vectors[0], first[0])


def test_a_killed_embedding_pipeline_goes_on_to_the_same_table(shell, isoforms, tmp_path):
    command = [str(Path(sys.executable).parent / "esm-perturb"), "embed", "--fasta", str(isoforms), "--output_dir"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")],
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "killed").glob("shards/*")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for folder in ("killed", "whole"):
        done = shell("esm-perturb", *command[1:], tmp_path / folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("vectors.npy", "record.json", "coverage.csv", "genes.pt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_files_beside_the_results_stay(shell, isoforms, tmp_path):
    """A folder may hold the input as well."""
    fasta = tmp_path / "genes.fasta"
    fasta.write_bytes(isoforms.read_bytes())
    (tmp_path / "genes.txt").write_text("GA\n")
    done = shell("esm-perturb", "embed", "--fasta", "genes.fasta", "--output_dir", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "genes.txt").read_text() == "GA\n" and fasta.read_bytes() == isoforms.read_bytes()
    assert (tmp_path / "genes.pt").is_file()


def test_commands_started_together_do_not_disturb_each_other(isoforms, tmp_path):
    program = str(Path(sys.executable).parent / "esm-perturb")
    processes = [
        subprocess.Popen(
            [program, "embed", "--fasta", str(isoforms), "--output_dir", f"run{number}"],
            cwd=tmp_path,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run0", "run1", "run2"]


# ---- proteins


@pytest.fixture(scope="module")
def diffusion(shell, tmp_path_factory) -> Path:
    """The folder of the diffusion demo."""
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    words = ("--max_steps", "6", "sampling.sample_interval=3", "sampling.min_steps_before_sampling=3")
    done = shell("esm-perturb", "train-diffusion", *words, "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_proteins_are_trained_sampled_and_scored_by_command(diffusion, shell, tmp_path):
    common = {"report.html", "metrics.json", "run.json", "provenance.json"}
    made = {"50_train_diffusion.ipynb", "training.json", "samples.html", "samples/step_00000003.csv", "config.yaml"}
    assert common | made <= names(diffusion)
    words = ("--model", diffusion, "--n", "3", "--prefix", "MK", "--steps", "20", "--length", "40")
    done = shell("esm-perturb", "sample", *words, "--output_dir", "drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = pd.read_csv(tmp_path / "drawn" / "samples.csv")
    assert drawn["sequence"].str.startswith("MK").all() and (drawn["length"] == 40).all()
    assert drawn["sequence"].nunique() == 3 and drawn["perplexity"].notna().all()
    words = ("--fasta", tmp_path / "drawn" / "samples.fasta", "--esm_model", "mini_esm2")
    done = shell("esm-perturb", "score", *words, "--output_dir", "scored", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scored = pd.read_csv(tmp_path / "scored" / "scores.csv")
    np.testing.assert_allclose(scored["perplexity"], drawn["perplexity"], rtol=1e-4)
    refused = shell("esm-perturb", "score", *words, "--reference", "no.fasta", "--output_dir", "other", cwd=tmp_path)
    assert refused.returncode == 2 and "'no.fasta' does not exist" in refused.stderr


def test_samples_that_fail_do_not_fail_the_training(shell, tmp_path, monkeypatch):
    words = ("--max_steps", "4", "sampling.sample_interval=2", "sampling.min_steps_before_sampling=2")
    (tmp_path / "site").mkdir()
    broken = (
        "import esm_perturb.proteins.sampling as s\n\ndef sample(*a, **k): raise MemoryError\n\ns.sample = sample\n"
    )
    (tmp_path / "site" / "sitecustomize.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = shell("esm-perturb", "train-diffusion", *words, "--output_dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "run" / "samples" / "step_00000002.csv")
    assert rows["status"].str.startswith("failed: out of memory").all()
    assert (tmp_path / "run" / "training.json").is_file()
