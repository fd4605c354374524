"""`make check` passes on this repository; each kind of neglect makes it fail with a message that says what to do."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ("nbs", "esm_perturb", "tests", "benchmarks", "settings.ini", "setup.py", "README.md", "ruff.toml")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """What git tracks, or would track, of the checked files."""
    folder = tmp_path_factory.mktemp("pristine")
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CHECKED]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def repository(pristine, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "repository"))


@pytest.fixture
def complaints(repository, monkeypatch, capsys):
    """Runs the check on the copy; gives its complaints, none when it passes."""
    spec = importlib.util.spec_from_file_location("check", ROOT / "tests" / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    monkeypatch.setattr(check, "ROOT", repository)
    monkeypatch.setattr("sys.argv", ["check.py"])

    def run() -> str:
        try:
            check.main()
        except SystemExit as stop:
            assert stop.code == 1
            return capsys.readouterr().err
        return capsys.readouterr().err

    return run


def edit_notebook(path: Path, change) -> None:
    """Change a notebook's plain data and write it as nbdev does."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    change(notebook)
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_repository_passes(complaints):
    assert complaints() == ""


def test_rewriting_a_notebook_unchanged_is_no_offence(repository, complaints):
    """The helper of the tests below changes nothing by itself."""
    edit_notebook(repository / "nbs" / "pipelines" / "20_train.ipynb", lambda notebook: None)
    assert complaints() == ""


def test_a_module_changed_by_hand(repository, complaints):
    module = repository / "esm_perturb" / "models" / "losses.py"
    module.write_text(module.read_text().replace("import torch\n", "import torch  # faster\n", 1))
    assert "esm_perturb/models/losses.py differs: run nbdev_export" in complaints()


def test_a_new_module_without_a_notebook(repository, complaints):
    (repository / "esm_perturb" / "models" / "by_hand.py").write_text("ANSWER = 42\n")
    assert "esm_perturb/models/by_hand.py has no notebook: delete it" in complaints()


def test_a_notebook_that_was_changed_and_not_exported(repository, complaints):
    def change(notebook: dict) -> None:
        exported = next(cell for cell in code_cells(notebook) if "def energy_distance" in "".join(cell["source"]))
        exported["source"] = [line.replace("Energy distance", "Distance") for line in exported["source"]]

    path = repository / "nbs" / "models" / "30_losses.ipynb"
    before = path.read_text()
    edit_notebook(path, change)
    assert path.read_text() != before
    assert "esm_perturb/models/losses.py differs: run nbdev_export" in complaints()


@pytest.mark.parametrize(
    "change",
    [
        lambda notebook: code_cells(notebook)[0].update(execution_count=7),
        lambda notebook: code_cells(notebook)[0]["metadata"].update(collapsed=True),
    ],
    ids=["execution count", "cell metadata"],
)
def test_an_uncleaned_notebook(repository, complaints, change):
    edit_notebook(repository / "nbs" / "models" / "30_losses.ipynb", change)
    assert "nbs/models/30_losses.ipynb differs: run nbdev_clean" in complaints()


def test_a_dropped_parameters_tag(repository, complaints):
    def change(notebook: dict) -> None:
        for cell in notebook["cells"]:
            cell["metadata"].pop("tags", None)

    edit_notebook(repository / "nbs" / "pipelines" / "30_predict.ipynb", change)
    assert "30_predict.ipynb has 0 cells tagged 'parameters'; it needs exactly one" in complaints()


def test_a_dropped_kernel_language(repository, complaints):
    edit_notebook(
        repository / "nbs" / "pipelines" / "30_predict.ipynb",
        lambda notebook: notebook["metadata"]["kernelspec"].pop("language"),
    )
    assert "30_predict.ipynb names no kernel language" in complaints()


def test_a_pipeline_with_outputs(repository, complaints):
    output = {"name": "stdout", "output_type": "stream", "text": ["0.5\n"]}
    edit_notebook(
        repository / "nbs" / "pipelines" / "30_predict.ipynb",
        lambda notebook: code_cells(notebook)[1]["outputs"].append(output),
    )
    assert "30_predict.ipynb holds outputs" in complaints()


def test_badly_formatted_code(repository, complaints):
    edit_notebook(
        repository / "nbs" / "pipelines" / "30_predict.ipynb",
        lambda notebook: code_cells(notebook)[-1]["source"].append("\nx  =  {'a':1}"),
    )
    assert "ruff format --check" in (found := complaints()) and "30_predict.ipynb" in found


def test_a_readme_changed_by_hand(repository, complaints):
    with (repository / "README.md").open("a") as readme:
        readme.write("\nOne more thing.\n")
    assert "README.md differs from nbs/index.ipynb: run make readme" in complaints()
