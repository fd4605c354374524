"""The report and the index: escaped, self-contained, the same twice, and working in a real browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esm_perturb.cells.store import CellStore
from esm_perturb.core.config import InputError
from esm_perturb.evaluation.audits import audit_summary
from esm_perturb.evaluation.baselines import MeanResponse, NoChange, predict_cells
from esm_perturb.evaluation.metrics import compare, evaluate
from esm_perturb.evaluation.page import render_page, table_html
from esm_perturb.evaluation.report import build_report
from esm_perturb.evaluation.report_index import rebuild_index
from esm_perturb.evaluation.report_sections import perturbations_section
from esm_perturb.evaluation.report_tables import leaderboard, perturbation_table
from esm_perturb.evaluation.verdict import comparisons, headline, verdict_html

KEPT = Path(__file__).parents[1] / "reports" / "kept" / "norman19_mcfaline23"
HOSTILE = ['<script>alert("x")</script>', "$x^2$", "A&B", "genes/…", "'; DROP", "{{ 7*7 }}", "x" * 60]
NAMES = [*HOSTILE, *(f"P{i}" for i in range(11))]


def make_store(names=NAMES, *, genes=14, cells=8, scale="log1p"):
    """Poisson cells (log1p) or Gaussian cells (other) with a different random shift for each perturbation."""
    rng = np.random.default_rng(0)
    blocks, rows = [], []
    for name in ("ctrl", *names):
        size = 3 * cells if name == "ctrl" else cells
        shift = np.zeros(genes) if name == "ctrl" else rng.normal(0, 0.5, genes)
        counts = rng.poisson(np.maximum(2 + 2 * shift, 0.1), (size, genes))
        blocks.append(np.log1p(counts) if scale == "log1p" else rng.normal(shift, 1.0, (size, genes)))
        rows += [("toy", "k562", name, "1", "CRISPRi")] * size
    obs = pd.DataFrame(rows, columns=["dataset", "cell_type", "perturbation", "batch", "modality"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    gene_names = [*HOSTILE, *(f"G{i}" for i in range(genes - len(HOSTILE)))]
    return CellStore(np.vstack(blocks).astype(np.float32), gene_names, obs, "ctrl", scale, scale, {})


def evaluation_of(store, held_out, *, cell_eval=False):
    """Mean response and no change on held-out perturbations; controls are dealt alternately."""
    test = store.obs["perturbation"].isin(held_out).to_numpy()
    even = ((store.obs["perturbation"] == "ctrl") & (np.arange(len(store.obs)) % 2 == 0)).to_numpy()
    train, test = store.subset(np.flatnonzero(~test & ~even)), store.subset(np.flatnonzero(test | even))
    predictions = {m.name: predict_cells(m.fit(train), test, seed=1) for m in (MeanResponse(), NoChange())}
    return evaluate(test, predictions, train, cell_eval=cell_eval)


def report_of(evaluation, path, **changes):
    """The page of an evaluation with small made-up surroundings."""
    inputs = {
        "title": HOSTILE[0],
        "model": "mean_response",
        "provenance": {"seed": 1, "config": {"x": HOSTILE[0]}},
        "training": {"esm": pd.DataFrame({"step": [1, 2], "train_loss": [2.0, 1.0]})},
        "coverage": pd.DataFrame({"requested": HOSTILE, "matched_as": HOSTILE, "status": "exact"}),
        "leakage": evaluation.conditions[["perturbation"]].assign(train_cells=0, shared_controls=0),
        "split_table": pd.DataFrame({"cells": [1]}, index=pd.Index(["train"], name="split")),
        "arms": pd.DataFrame({"Arm": HOSTILE[:2], "Best for": ["<b>unseen genes</b>", "nothing"]}),
        "costs": pd.DataFrame(
            {
                "method": ["esm"],
                "steps_per_second": 2.0,
                "cells_per_second": 90.0,
                "seconds": 5.0,
                "peak_memory_gb": 1.0,
            }
        ),
    }
    return build_report(evaluation, path=path, **{**inputs, **changes})


@pytest.fixture(scope="module")
def evaluation():
    return evaluation_of(make_store(), [*HOSTILE, *NAMES[7:13]])


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    return report_of(evaluation, tmp_path_factory.mktemp("reports") / "toy" / "report.html")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_names_are_text_everywhere_and_the_record_is_inside(page):
    text = page.read_text()
    tags = Tags(text)
    assert [tag for tag, _ in tags.tags].count("script") == 2 and "<b>unseen" not in text
    assert not [attrs for _, attrs in tags.tags if any(name.startswith("on") for name in attrs)]
    assert "{{ 7*7 }}" in "".join(tags.text)
    record = json.loads((page.parent / "metrics.json").read_text())
    assert set(pd.DataFrame(record["per_condition"])["perturbation"]) == {*HOSTILE, *NAMES[7:13]}
    assert json.loads(re.search(r'id="metrics">(.*?)</script>', text, re.S)[1]) == record


def test_report_is_self_contained_and_accessible(page):
    text = page.read_text()
    tags = Tags(text).tags
    plain = re.sub(r'src="data:image/svg[^"]*"', "", text)
    assert not re.search(r"https?://|@import|url\(", plain) and len(text.encode()) < 10_000_000
    assert not [a for tag, a in tags if tag in ("link", "iframe", "object") or (tag == "script" and "src" in a)]
    assert [tag for tag, _ in tags].count("h1") == 1
    assert all(attrs.get("alt") and attrs["src"].startswith("data:") for tag, attrs in tags if tag == "img")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for tag, a in tags if tag == "a"} <= set(ids)


def test_numbers_of_the_record_are_those_of_the_evaluation(page, evaluation):
    record = json.loads((page.parent / "metrics.json").read_text())
    for name in ("per_condition", "conditions"):
        stored, table = pd.DataFrame(record[name]), getattr(evaluation, name)
        numbers = table.select_dtypes("number").columns
        np.testing.assert_allclose(stored[numbers].astype(float), table[numbers].astype(float), rtol=1e-5)
    row = compare(evaluation, "mean_response").iloc[0]
    assert record["verdict"][0]["mean_difference"] == row["mean"] and record["verdict"][0]["outcome"] == row["outcome"]
    assert {row["metric"] for row in record["comparisons"]} >= {"pearson_delta", "mse", "energy_distance"}
    assert list(record["arms"]) == ["Arm", "Best for"] and record["costs"]["method"] == ["esm"]


def test_the_kept_report_of_real_cells_is_whole():
    """The present answer for norman19_mcfaline23: four arms, three seeds each, and nothing of the machine it ran on."""
    text = (KEPT / "report.html").read_text()
    record = json.loads((KEPT / "metrics.json").read_text())
    assert json.loads(re.search(r'id="metrics">(.*?)</script>', text, re.S)[1]) == record
    arms = pd.DataFrame(record["arms"])
    assert arms["Arm"].tolist() == ["esm", "onehot", "random", "shuffled"] and (arms["Seeds"] == 3).all()
    assert len(text) < 10_000_000 and not re.search(r'"(?:[A-Z]:)?[\\/](?!/)[\w.-]+[\\/]', json.dumps(record))


def test_same_inputs_give_the_same_report(page, evaluation, tmp_path):
    assert report_of(evaluation, tmp_path / "report.html").read_text() == page.read_text()


def test_an_unknown_model_writes_nothing(evaluation, tmp_path):
    with pytest.raises(InputError, match="did you mean 'no_change'"):
        report_of(evaluation, tmp_path / "report.html", model="no_chang")
    assert not list(tmp_path.iterdir())


def test_one_perturbation_with_one_cell_on_another_scale_still_gives_a_report(tmp_path):
    store = make_store(names=("P1", "P2", "P3"), scale="other")
    keep = np.flatnonzero((store.obs["perturbation"] != "P1") | ~store.obs["perturbation"].duplicated())
    evaluation = evaluation_of(store.subset(keep), ["P1"], cell_eval=True)
    text = report_of(evaluation, tmp_path / "report.html", arms=None, costs=None, training={}).read_text()
    assert "no difference" in text and "With 1 held-out perturbation only" in text and "cell-eval was left out" in text
    assert "No learning curve was recorded" in text and 'id="arms"' not in text
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_drill_downs_keep_to_their_budget_and_say_so(evaluation):
    whole = perturbations_section(evaluation, "mean_response")
    few = perturbations_section(evaluation, "mean_response", max_bytes=len(whole) // 3)
    none = perturbations_section(evaluation, "mean_response", max_bytes=-1)
    assert whole.count("<dialog") == len(evaluation.conditions) > few.count("<dialog") > none.count("<dialog") == 0
    assert "have no figures here" in few and "have no figures here" not in whole
    strongest = int(evaluation.conditions["effect_size"].argmax())
    assert f'href="#condition-{strongest}"' in few


def test_the_table_keeps_scores_with_their_condition(evaluation):
    mixed = replace(evaluation, per_condition=evaluation.per_condition.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(
        perturbation_table(mixed, "mean_response"), perturbation_table(evaluation, "mean_response")
    )


def test_a_star_marks_the_best_mean_whatever_the_direction(evaluation):
    for metric, best in (("mse", "min"), ("pearson_delta", "max")):
        means = evaluation.summary.query("metric == @metric").set_index("method")["mean"]
        html = leaderboard(evaluation, [metric])
        cells = re.findall(r"<td.*?</td>", html, re.S)
        marked = ['class="best"' in cell for cell in cells]  # the last one is what a repeat would score: never the best
        assert marked == [*(m == getattr(means, f"idx{best}")() for m in means.index), False]


def test_verdict_claims_only_what_the_interval_shows(evaluation):
    compared = comparisons(evaluation, "mean_response")
    verdict = compared[compared["metric"] == "pearson_delta"]
    for outcome, words in (
        ("beats", "beats"),
        ("loses to", "loses to"),
        ("no difference shown", "shows no difference"),
    ):
        assert words in headline(verdict.assign(outcome=outcome), "mean_response")
    clean = verdict_html(evaluation, compared, "mean_response", audits=["No test perturbation has a training cell."])
    leaked = verdict_html(evaluation, compared, "mean_response", audits=["LEAK: 3 cells."])
    assert "no leak found" in clean and "no leak found" not in leaked and "LEAK: 3 cells." in leaked
    conditions = pd.DataFrame({"perturbation": ["A"], "train_cells": [4]})
    assert audit_summary(conditions, pd.DataFrame())[0].startswith("LEAK")


def test_index_lists_failures_stages_and_survives_broken_files(tmp_path):
    records = {
        "failed/run.json": json.dumps({"status": "failed", "error": "<b>broken"}),
        "garbage/metrics.json": "[1, 2",
        "list/metrics.json": "[]",
        "fine/metrics.json": json.dumps({"headline": "It beats the mean.", "provenance": None}),
        "study/train/run.json": json.dumps({"status": "failed", "error": "no memory"}),
        "stopped/20_train.ipynb": "{}",
        "notes/readme.txt": "not a run",
    }
    for name, text in records.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    text = rebuild_index(tmp_path).read_text()
    assert "&lt;b&gt;broken" in text and "It beats the mean." in text and "train: no memory" in text
    marks = ("◆ unreadable", "▼ failed", "● finished", "○ unfinished")
    assert [text.count(f">{mark}<") for mark in marks] == [2, 2, 1, 1] and "readme" not in text
    assert rebuild_index(tmp_path).read_text() == text
    with pytest.raises(InputError, match="does not exist"):
        rebuild_index(tmp_path / "nowhere")
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(InputError, match="was not written by esm-perturb"):
        rebuild_index(tmp_path)


PROBE = """<script>
addEventListener("load", async () => {
  const pause = () => new Promise(done => setTimeout(done, 300)), found = {width: innerWidth};
  const inBox = part => part.parentElement?.closest(".scroll, pre") || part.matches(".skip");
  const outside = part => part.getBoundingClientRect().right > innerWidth + 1 && !inBox(part);
  const cut = root => [...document.querySelectorAll(root)].filter(outside).map(part => part.outerHTML.slice(0, 120));
  found.scroll = document.documentElement.scrollWidth;
  found.cut = cut("body *");
  const table = document.querySelector("table.sortable td a, table.sortable th a")?.closest("table");
  if (table) {
    const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === "Mean response");
    const values = () => [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.value));
    found.sorted = [];
    for (let i = 0; i < 2; i++) { table.tHead.querySelectorAll("button")[column].click(); found.sorted.push(values()); }
    const input = table.closest(".scroll").previousElementSibling.querySelector("input");
    input.value = "P1"; input.dispatchEvent(new Event("input"));
    found.shown = [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[0].textContent);
    input.value = ""; input.dispatchEvent(new Event("input"));
    table.querySelector("a").click(); await pause();
    const open = () => [...document.querySelectorAll("dialog[open]")].map(dialog => dialog.id);
    found.opened = [table.querySelector("a").hash.slice(1), ...open()];
    const dialog = document.querySelector("dialog[open]");
    await Promise.all([...dialog.querySelectorAll("img")].map(image => image.decode()));
    found.images = [...dialog.querySelectorAll("img")].map(image => image.naturalWidth);
    found.cutInside = cut("dialog[open] *");
    dialog.querySelector("[data-step='1']").click(); await pause();
    found.next = open();
    document.querySelector("dialog[open] form button").click(); await pause();
    found.closed = open();
  }
  found.broken = [...document.images].filter(image => image.loading !== "lazy" && !image.naturalWidth).length;
  found.requests = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
  parent.postMessage(JSON.stringify(found), "*");
});
</script></body>"""
FRAME = """<!doctype html><body style="margin:0">
<iframe src="copy.html" style="border:0;width:{}px;height:900px"></iframe>
<pre id="found"></pre><script>
addEventListener("message", event => {{ document.getElementById("found").textContent = event.data; }});</script>"""


def browse(page, folder, width):
    """Measure a copy of a page in a browser, framed at a width in pixels; its findings and console lines."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    (folder / "copy.html").write_text(page.read_text().replace("</body>", PROBE))
    (folder / "frame.html").write_text(FRAME.format(width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command = [browser, *flags, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 600)},1000"]
    command += ["--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    text = "".join(Tags(done.stdout.partition('id="found">')[2].partition("</pre>")[0]).text)
    assert text, f"the browser has measured nothing: {done.stderr[-2000:]}"
    return json.loads(text), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1280, 420])
def test_report_works_in_a_browser(page, tmp_path, width):
    found, console = browse(page, tmp_path, width)
    assert not console and found["requests"] == 0 and found["broken"] == 0
    assert found["width"] == width and found["scroll"] <= width and not found["cut"] and not found["cutInside"]
    down, up = found["sorted"]
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(up) == 13
    assert found["shown"] and all("P1" in name for name in found["shown"])
    assert found["opened"][0] == found["opened"][1] and len(found["opened"]) == 2
    assert len(found["images"]) >= 3 and all(found["images"])
    assert len(found["next"]) == 1 and found["next"] != found["opened"][1:] and found["closed"] == []


@pytest.mark.parametrize("width", [1280, 420])
def test_index_fits_in_a_browser(tmp_path, width):
    (tmp_path / "runs" / ("long_name_" * 12)).mkdir(parents=True)
    record = {"title": "A" * 150, "headline": "word " * 80, "provenance": {"time": "2026-01-01T00:00:00+00:00"}}
    (tmp_path / "runs" / ("long_name_" * 12) / "metrics.json").write_text(json.dumps(record))
    found, console = browse(rebuild_index(tmp_path / "runs"), tmp_path, width)
    assert not console and found["requests"] == 0 and found["scroll"] <= width and not found["cut"]


def test_a_missing_number_sorts_last_and_reads_as_a_dash():
    html = table_html(pd.DataFrame({"gene": ["A", "B"], "score": [np.nan, 0.5]}), "Scores", sortable=True)
    assert 'data-value="">–<' in html and 'data-value="0.5">0.500<' in html
    text = render_page("x", html, eyebrow="", data={"end": "</script>"})
    assert text.count("</script>") == 2
