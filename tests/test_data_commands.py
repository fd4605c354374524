"""Splits, prepared files and the leakage audit from the command line and in training."""

import anndata
import numpy as np
import pandas as pd
import pytest

from esm_perturb.cells.split_file import read_split_toml
from esm_perturb.core.config import InputError
from esm_perturb.core.resolve import resolve_config
from esm_perturb.models.preparation import prepare
from esm_perturb.models.training import train
from esm_perturb.workflow.cli import main


def config(tiny, **told):
    return resolve_config(config=tiny / "run.yaml", parameters=told)


def edited(tiny, tmp_path, edit) -> str:
    """A run on the small screen's cells after `edit(adata)`."""
    adata = anndata.read_h5ad(tiny / "cells.h5ad")
    edit(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "split.toml").write_text((tiny / "split.toml").read_text())
    return f"data.kwargs.toml_config_path={tmp_path / 'split.toml'}"


def held_out(tiny) -> tuple[str, list[str]]:
    """A cell type of the split file, and its test perturbations."""
    (_, cell_type), lists = next(iter(read_split_toml(tiny / "split.toml").fewshot.items()))
    return cell_type, lists["test"]


@pytest.mark.parametrize("kind", ["random", "cell_type"])
def test_a_drawn_split_is_written_and_trains(kind, tiny, tmp_path, capsys):
    path = tmp_path / f"{kind}.toml"
    main(["split", kind, "--config", str(tiny / "split.toml"), "--val", "0", "--output", str(path)])
    assert capsys.readouterr().out.splitlines()[2].startswith("train")
    prepared = prepare(resolve_config(config=f"{tiny / 'run.yaml'},{path}"))
    assert len(prepared.splits.perturbed_indices("test"))
    assert prepared.leakage.leaks.empty


@pytest.mark.parametrize(
    "words, said",
    [
        (["randm"], "did you mean 'random'"),
        (["random", "--test", "2"], "test"),
        (["family"], "either families"),
        (["random", "--seen", "1"], "do not use seen"),
    ],
    ids=" ".join,
)
def test_a_split_that_cannot_be_is_one_line_and_code_2(words, said, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["split", *words, "--config", str(tiny / "split.toml"), "--output", str(tmp_path / "new.toml")])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and said in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["split", "random"], ["prepare"]], ids=" ".join)
def test_what_is_there_is_not_replaced_by_something_else(words, tiny, tmp_path, capsys):
    for name in ("proteins.fasta.gz", "notes.toml", "cells.h5ad"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SystemExit) as stop:
            main([*words, "--config", str(tiny / "run.yaml"), "--output", str(tmp_path / name)])
        told = capsys.readouterr().err
        assert stop.value.code == 2 and told.count("\n") == 1 and name in told
        assert (tmp_path / name).read_text() == "mine"


def test_training_from_a_prepared_file_uses_the_same_cells(tiny, tmp_path, capsys):
    path = tmp_path / "prepared.h5ad"
    main(["prepare", "--config", str(tiny / "run.yaml"), "--output", str(path)])
    assert str(path) in capsys.readouterr().out
    plain = prepare(config(tiny))
    tiny_budget = [f"data.kwargs.prepared={path}", "data.kwargs.memory_gb=1e-6"]
    on_disk = prepare(resolve_config(config=tiny / "run.yaml", overrides=tiny_budget))
    assert plain.store.in_memory and not on_disk.store.in_memory
    assert on_disk.splits.table.equals(plain.splits.table)
    order = pd.Index(on_disk.store.obs.index).get_indexer(plain.store.obs.index)
    assert np.array_equal(on_disk.store.rows(order), plain.store.rows(np.arange(len(order))))
    told = [*tiny_budget, f"output_dir={tmp_path / 'run'}", "training.max_steps=5", "training.val_freq=5"]
    summary = train(resolve_config(config=tiny / "run.yaml", overrides=told))
    assert np.isfinite(summary["last"]["val_loss"])


def test_genes_that_test_cells_chose_are_refused(tiny, tmp_path):
    """Prepared for one split, used with another."""
    path, text = tmp_path / "prepared.h5ad", (tiny / "split.toml").read_text()
    main(["prepare", "--config", str(tiny / "run.yaml"), "--n_genes", "10", "--output", str(path)])
    cell_type, names = held_out(tiny)
    trained = prepare(config(tiny)).train_genes[0]
    other = tmp_path / "other.toml"
    other.write_text(text.replace("cells.h5ad", str(tiny / "cells.h5ad")).replace(names[0], trained))
    used = [f"data.kwargs.prepared={path}"]
    prepare(resolve_config(config=tiny / "run.yaml", overrides=used))
    with pytest.raises(InputError, match="chosen by .* cells that this split tests"):
        prepare(resolve_config(config=f"{tiny / 'run.yaml'},{other}", overrides=used))


@pytest.mark.parametrize("memory_gb", ["0", "1e-6"])
def test_a_test_cell_that_trains_under_another_name_stops_the_run(memory_gb, tiny, tmp_path):
    cell_type, names = held_out(tiny)

    def copy_a_test_cell(adata):
        label, types = adata.obs["gene"].astype(str), adata.obs["cell_type"].astype(str)
        test = np.flatnonzero((types == cell_type) & (label == names[0]))[0]
        trained = np.flatnonzero((types == cell_type) & ~label.isin([*names, "non-targeting"]))
        X = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X.copy()
        X[trained[-1]] = X[test]
        adata.X = X

    where = edited(tiny, tmp_path, copy_a_test_cell)
    with pytest.raises(InputError, match="Training would see the test, cells: 1 of"):
        prepare(resolve_config(config=tiny / "run.yaml", overrides=[where, f"data.kwargs.memory_gb={memory_gb}"]))


def test_a_test_gene_that_trains_under_another_name_stops_the_run(tiny, tmp_path):
    """Two names of one gene have one embedding."""
    from esm_perturb.proteins.embeddings import GeneEmbeddings

    _, names = held_out(tiny)
    plain = prepare(config(tiny))
    table = GeneEmbeddings.load(tiny / "genes.pt")
    vectors = np.array(table.vectors)
    vectors[table.names.index(plain.train_genes[0])] = vectors[table.names.index(names[0])]
    GeneEmbeddings(table.names, vectors).save(tmp_path / "genes.pt")
    with pytest.raises(InputError, match="Training would see the test, other names"):
        prepare(config(tiny, esm_embeddings_path=str(tmp_path / "genes.pt")))


def test_a_zero_shot_claim_is_held_to(tiny, tmp_path):
    """A perturbation that is tested in one cell type and trains in another is listed, or, when asked, refused."""
    cell_type, names = held_out(tiny)
    text = (tiny / "split.toml").read_text()
    screen = next(iter(read_split_toml(tiny / "split.toml").datasets))
    path = tmp_path / "split.toml"
    path.write_text(
        f'[datasets]\n"{screen}" = "{tiny / "cells.h5ad"}"\n[training]\n"{screen}" = "train"\n'
        f'[fewshot."{screen}.{cell_type}"]\ntest = ["{names[0]}"]\n'
    )
    assert text.count("fewshot") > 1  # the file of the small screen holds its genes out everywhere
    where = f"data.kwargs.toml_config_path={path}"
    table = prepare(resolve_config(config=tiny / "run.yaml", overrides=[where])).leakage.table.set_index("check")
    assert table.loc["other cell types"]["shared"].max() == 1
    with pytest.raises(InputError, match="other cell types"):
        prepare(resolve_config(config=tiny / "run.yaml", overrides=[where, "data.kwargs.strict_zero_shot=true"]))
