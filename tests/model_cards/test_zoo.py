"""The index of local checkpoints: one row a model, from the records alone."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import hub_run
import pytest
from browser import CHROMIUM, look

from modeling_periln.convert import convert
from periln.model_cards import zoo
from periln.runkit.errors import run_command


class Cells(HTMLParser):
    """The cells of a page's table, row by row, and whatever the page would load."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A completed and a diverged run, a fine-tuning, an export, and a folder that is none of them."""
    root = tmp_path_factory.mktemp("zoo") / "models"
    run = hub_run.write_run(root / "runs")
    diverged = hub_run.write_run(root / "runs", "pre", status="diverged")
    (diverged / "summary.json").write_text(json.dumps({"status": "diverged", "reason": "<b>rise</b>", "step": 8}))
    (run / "sft").mkdir()
    (run / "sft" / "recipe.yaml").write_text("stage: sft\nseed: 1\n")
    shutil.copytree(run / "checkpoints" / "step_00000004", run / "sft" / "checkpoints" / "step_00000002")
    shutil.copytree(run / "checkpoints" / "step_00000008", run / "sft" / "checkpoints" / "step_00000004")
    (run / "sft" / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/step_00000002", "step": 2}))
    convert(run / "checkpoints" / "step_00000008", root / "exports" / "x", "hyperclovax")
    (root / "notes").mkdir()
    return root


@pytest.fixture(scope="module")
def rows(root) -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in zoo.collect([root], zoo.parse([str(root)]))}


def test_runs_fine_tunings_and_exports_have_a_row_each(rows):
    inside = "models/runs/peri_seed1"
    assert set(rows) == {inside, f"{inside}/sft", "models/runs/pre_seed1", "models/exports/x"}
    assert rows[f"{inside}/sft"]["checkpoint"].endswith("sft/checkpoints/step_00000002")  # the chosen one
    assert rows["models/exports/x"]["placement"] == "hyperclovax (export)"


def test_a_row_says_placement_size_tokens_loss_scores_and_headroom(rows):
    row = rows["models/runs/peri_seed1"]
    assert (row["placement"], row["parameters (with embeddings)"], row["tokens"], row["status"]) == (
        "peri",
        "14,304",
        "512",
        "completed",
    )
    assert row["loss"] == "2.2500 (held-out)"
    assert row["scores"].startswith("40.00 % (mean of five, 0-shot: arc_easy 30.0,")
    assert row["FP16 headroom"].startswith("13.0 bits")  # the stability bench's
    other = rows["models/runs/pre_seed1"]
    assert other["loss"].endswith("(training)") and other["scores"] == "not measured"
    assert other["FP16 headroom"].startswith("12.0 bits")  # of the recorded steps of training


def test_the_page_is_one_file_with_the_same_cells_and_no_local_path(root, tmp_path):
    args = zoo.parse([str(root), str(root / "runs"), "--out", str(tmp_path)])
    assert run_command(zoo.main, args) == 0
    html, markdown = (tmp_path / "zoo.html").read_text(), (tmp_path / "zoo.md").read_text()
    page = Cells(html)
    assert page.rows[0] == list(zoo.HEAD) and len(page.rows) == 5  # a folder named twice is listed once
    assert page.loaded == ["data:,"]  # the icon, which is none
    assert [line.split(" | ")[0].lstrip("| ") for line in markdown.splitlines()[6:]] == [r[0] for r in page.rows[1:]]
    assert str(root) not in html + markdown
    first = html, markdown
    assert run_command(zoo.main, args) == 0
    assert first == ((tmp_path / "zoo.html").read_text(), (tmp_path / "zoo.md").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_rows_can_be_read_and_sorted_at_any_width(root, tmp_path, width):
    pytest.importorskip("aiohttp", reason="the DevTools protocol is spoken through aiohttp")
    assert run_command(zoo.main, zoo.parse([str(root), "--out", str(tmp_path)])) == 0
    names = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)"
    if width == 400:  # by the list above: there are no heads
        chosen = f"list.value = {zoo.HEAD.index('FP16 headroom')}; list.dispatchEvent(new Event('change'))"
        sort = f"(() => {{ const list = document.querySelector('.sort-by'); {chosen} }})()"
    else:
        sort = f"document.querySelectorAll('th button')[{zoo.HEAD.index('FP16 headroom')}].click()"
    inner = "[...document.querySelectorAll('.scroll')].map(s => s.scrollWidth - s.clientWidth)"
    heads = "document.querySelector('thead').getBoundingClientRect().height > 0"
    seen = look(tmp_path / "zoo.html", width, scripts=[names, sort, names, inner, heads])
    before, _, after, beyond, has_heads = seen.answers
    assert seen.problems == [] and seen.page["wide"] == [] and seen.page["scroll"] <= width
    assert before != after and sorted(before) == sorted(after)
    assert after[0] == "models/runs/pre_seed1"  # 12.0 bits, the least
    assert beyond == [0]
    assert has_heads == (width > 400)


def test_a_folder_without_models_is_refused_by_name(root, tmp_path, capsys):
    assert run_command(zoo.main, zoo.parse([str(root / "notes")])) == 2
    assert "notes holds no runs and no models" in capsys.readouterr().err
    assert run_command(zoo.main, zoo.parse([str(tmp_path / "nowhere")])) == 2
    assert "nowhere is missing" in capsys.readouterr().err


def test_a_configuration_that_is_none_is_named(root, tmp_path, capsys):
    odd = shutil.copytree(root / "exports", tmp_path / "odd") / "x"
    (odd / "config.json").write_text("{}")
    assert [row["placement"] for row in zoo.collect([odd], zoo.parse([str(odd)]))] == ["not recorded"]
    (odd / "config.json").write_text("[]")
    assert run_command(zoo.main, zoo.parse([str(odd), "--out", str(tmp_path)])) == 1
    assert "config.json is not a configuration: it holds a list" in capsys.readouterr().err
