"""`make check`: notebooks clean, package in sync with them, pipelines well-formed, code formatted."""

import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MAX_KILOBYTES = 400


def run(*command: str, cwd: Path) -> list[str]:
    """Run a tool; its output is a problem when it fails."""
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [f"{' '.join(command)}:\n{done.stdout}{done.stderr}".rstrip()]


def files(folder: Path, suffixes: tuple[str, ...]) -> set[str]:
    """Relative paths of the files with these suffixes, caches and checkpoints left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes)
    return {str(path) for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts)}


def differences(made: Path, kept: Path, suffixes: tuple[str, ...], advice: str) -> list[str]:
    """What differs between what the tools make and what the repository holds."""
    made_files, kept_files = files(made, suffixes), files(kept, suffixes)
    problems = [f"{kept.name}/{name} is missing: {advice}" for name in sorted(made_files - kept_files)]
    problems += [f"{kept.name}/{name} has no notebook: delete it" for name in sorted(kept_files - made_files)]
    _, changed, _ = filecmp.cmpfiles(made, kept, made_files & kept_files, shallow=False)
    return problems + [f"{kept.name}/{name} differs: {advice}" for name in sorted(changed)]


def in_sync() -> list[str]:
    """Clean and export in a copy, and compare with the working tree, tracked or not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        for name in ("settings.ini", "setup.py", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        (copy / "esm_perturb").mkdir()
        (copy / "esm_perturb" / "__init__.py").write_text("")
        problems = run("nbdev_clean", cwd=copy)
        problems += differences(copy / "nbs", ROOT / "nbs", (".ipynb",), "run nbdev_clean")
        problems += run("nbdev_export", cwd=copy)
        return problems + differences(copy / "esm_perturb", ROOT / "esm_perturb", (".py",), "run nbdev_export")


def pipelines() -> list[str]:
    """One `parameters` cell, a kernel language, no outputs."""
    problems = []
    for path in sorted((ROOT / "nbs" / "pipelines").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        tagged = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        if len(tagged) != 1:
            problems.append(f"{path.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
        if not notebook["metadata"].get("kernelspec", {}).get("language"):
            problems.append(f"{path.name} names no kernel language (metadata.kernelspec.language)")
        if any(c.get("outputs") for c in notebook["cells"]):
            problems.append(f"{path.name} holds outputs; pipeline notebooks are stripped")
    return problems


def sizes() -> list[str]:
    """Notebooks that grew too large to read or to review."""
    notebooks = (ROOT / "nbs").rglob("*.ipynb")
    large = [p for p in notebooks if p.stat().st_size > MAX_KILOBYTES * 1024 and ".ipynb_checkpoints" not in p.parts]
    return [f"{path.name} is {path.stat().st_size // 1024} KB; keep outputs below {MAX_KILOBYTES} KB" for path in large]


def rendered_readme() -> str:
    """README.md as nbs/index.ipynb gives it; image paths start at the repository's root."""
    import nbformat
    from nbconvert import MarkdownExporter

    body, _ = MarkdownExporter().from_notebook_node(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    return body.strip().replace("](images/", "](nbs/images/") + "\n"


def readme() -> list[str]:
    """README.md is the rendered index notebook."""
    same = (ROOT / "README.md").read_text(encoding="utf-8") == rendered_readme()
    return [] if same else ["README.md differs from nbs/index.ipynb: run make readme"]


def style() -> list[str]:
    """Lint and format of notebooks, tests and benchmarks."""
    places = [name for name in ("nbs", "tests", "benchmarks", "setup.py") if (ROOT / name).exists()]
    return run("ruff", "check", *places, cwd=ROOT) + run("ruff", "format", "--check", *places, cwd=ROOT)


def main() -> None:
    """Print every problem and exit 1, or one line and exit 0; with --write-readme, write README.md instead."""
    if sys.argv[1:] == ["--write-readme"]:
        (ROOT / "README.md").write_text(rendered_readme(), encoding="utf-8")
        return
    problems = [
        *in_sync(),
        *pipelines(),
        *sizes(),
        *readme(),
        *style(),
    ]
    for problem in problems:
        print(f"check: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(1)
    print("check: notebooks clean, package in sync, pipelines well-formed, code formatted")


if __name__ == "__main__":
    main()
