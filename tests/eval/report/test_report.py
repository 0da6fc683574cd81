"""Tests of the report: what it says comes from the records, and the file needs nothing but itself."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from browser import CHROMIUM, look
from synthetic_runs import TASKS, write_demo, write_run, write_sample, write_scores, write_sft

from periln.eval.arguments.report import parse
from periln.eval.figures.catalogue import CATALOGUE
from periln.eval.figures.files import all_figures
from periln.eval.records.frames import load
from periln.eval.report.command import main
from periln.eval.report.page import adds_text, evidence, render, write
from periln.eval.report.verdict import noise, verdict
from periln.eval.tables.run_stability import stability
from periln.runkit.errors import UsageError, UserError
from periln.runkit.public import public

ROOT = Path(__file__).resolve().parents[3]
# What a demo records: the stability bench, and the paper's other recipes, are further commands.
DRAWN = ("overview", "1", "3b", "3c", "5", "6", "7b", "rates", "headroom", "peaks", "events")


class Page(HTMLParser):
    """Tags with attributes, the text, and whether every tag was closed."""

    VOID = ("meta", "link", "img", "br", "wbr")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def sentences(path: Path) -> str:
    frames = load(path)
    return " ".join(" ".join([head, *more]) for head, more in verdict(frames, stability(frames).numbers))


@pytest.fixture(scope="session")  # the slow tests of this file run long after the others
def demo(tmp_path_factory) -> Path:
    """A demo with its report, and what the command printed."""
    path = write_demo(tmp_path_factory.mktemp("runs") / "demo")
    command = [sys.executable, "-m", "eval.report", str(path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    (path / "printed.txt").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return Page((demo / "report.html").read_text())


# --- the file ------------------------------------------------------------------------------------------------


def test_the_file_loads_nothing_from_elsewhere(page):
    assert page.open == []
    assert len(page.all("img")) == len(DRAWN)
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed")
        for name in ("src", "href", "srcset", "poster", "background"):
            assert attrs.get(name, "data:").startswith(("data:", "#")), (tag, name)
    style = page.words[page.words.index("body {") :][:4000]
    assert "url(" not in style
    assert "@import" not in style
    assert [attrs.get("id") for attrs in page.all("script")] == ["plots", None]
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_images_are_described_and_captions_stand_below(page):
    for image in page.all("img"):
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 30
        assert image["width"] in ("900", "1020")
    assert len(page.all("figcaption")) == len(DRAWN)
    assert "Runs drawn: post 3 (1 diverged), pre 3, peri 3." in page.words


def test_what_is_not_drawn_is_named_with_what_it_needs(page):
    assert f"Not drawn: {len(CATALOGUE) - len(DRAWN)} figures" in page.words
    assert "Needs angular distances between layers (eval/stability/angles_*.parquet)" in page.words
    assert "scripts/recipes/400m-peri-frozen-gamma.yaml" in page.words


def test_a_diverged_run_is_explained(page):
    assert "Overflow: step 86 was skipped: the forward pass was not finite" in page.words
    assert "Not known: there is no flight record" in page.words


def test_links_lead_somewhere(page):
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link["href"][1:] for link in page.all("a")} <= ids


def test_redrawing_gives_the_same_bytes_whatever_the_settings(demo, tmp_path):
    with mpl.rc_context({"font.size": 30, "axes.grid": False}):
        main(parse([str(demo), "--out", str(tmp_path)]))
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / "report.html").read_bytes() == (demo / "report.html").read_bytes()
    assert {file.stem for file in (demo / "figures").iterdir()} == {f"figure_{name}" for name in DRAWN}
    for name in DRAWN:
        again = (tmp_path / "figures" / f"figure_{name}.png").read_bytes()
        assert again == (demo / "figures" / f"figure_{name}.png").read_bytes()
        assert b"tEXt" not in again


def test_no_absolute_path_is_told(demo, page):
    html = (demo / "report.html").read_text()
    assert str(demo.parent) not in html
    assert "/home/somebody" not in html
    assert "data: …/tokens" in page.words


def test_benchmarks_are_called_by_the_names_of_the_tasks(page):
    for task in TASKS:
        assert task in page.words
    assert "ARC" not in page.words


def test_the_command_prints_the_table_and_last_the_path(demo):
    lines = (demo / "printed.txt").read_text().splitlines()
    assert lines[-1] == str(demo / "report.html")
    assert any(line.startswith("-- learning rate 0.02") for line in lines)


def test_the_report_needs_no_torch():
    code = (
        "import periln.eval.report.command, sys; "
        "assert 'periln.eval.report.page' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_browser_would_complain(tmp_path):
    pytest.importorskip("aiohttp", reason="the DevTools protocol is spoken through aiohttp")
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'>"
        "<title>x</title><p style='width:900px'>wide</p><img src='gone.png'>"
        "<script>console.error('complaint'); undefinedFunction()</script>"
    )
    seen = look(page, 400)
    said = " ".join(seen.problems)
    assert "complaint" in said and "undefinedFunction" in said and "gone.png" in said
    assert seen.page["wide"] == ["P."] and seen.page["broken"] == 1


# --- what it says --------------------------------------------------------------------------------------------


def test_the_verdict_names_the_runs_that_diverged(demo):
    said = sentences(demo)
    assert "9 pretraining runs: 8 completed, 1 diverged." in said
    assert "Learning rate 0.002: 6 of 6 runs completed." in said
    assert "Learning rate 0.02: 2 of 3 runs completed." in said
    assert "post seed 1 (diverged at step 90: the loss was not finite for 10 steps in a row)" in said


def test_the_verdict_is_computed_from_the_records(tmp_path):
    run = write_run(tmp_path, "pre")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "pre 1 gradient spike and 2 skipped steps in 200" in sentences(tmp_path)
    calm = [record | {"grad_norm": 1.0, "skip_kind": None} for record in lines]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, calm)) + "\n")
    assert "pre 0 gradient spikes and 0 skipped steps in 200" in sentences(tmp_path)


def test_scores_within_the_noise_rank_nothing(tmp_path):
    write_scores(write_run(tmp_path, "pre"), [0.25, 0.25, 0.50, 0.33, 0.50])
    write_scores(write_run(tmp_path, "peri"), [0.30, 0.25, 0.50, 0.33, 0.50])
    found = noise(load(tmp_path), "mini")
    assert found["gap"] == pytest.approx(1.0)
    assert found["near"] == found["scores"] == 10
    assert found["sizes"] == [48]
    errors = [0.30 * 0.70, 0.25 * 0.75, 0.25, 0.33 * 0.67, 0.25]
    assert found["error"] == pytest.approx(100 * (2 * sum(e / 47 for e in errors)) ** 0.5 / 5)
    assert "they rank no placement" in sentences(tmp_path)
    write_scores(tmp_path / "peri_lr0.002_seed1", [0.95] * 5)
    assert "they rank no placement" not in sentences(tmp_path)


def test_residual_adds_are_counted_as_they_were_seen():
    half = {"stream": "float16", "branch": "float16", "output": "float16"}
    wide = half | {"stream": "float32", "output": "float32"}
    assert adds_text({"a": half, "b": half}) == "2 of 2 in float16"
    assert adds_text({"a": half, "b": half, "c": wide}) == (
        "2 of 3 in float16, 1 of 3 in float32 + float16 giving float32"
    )
    assert adds_text({}) == "n/a"


def test_fp16_evidence(demo, page):
    shown = evidence(load(demo)).text
    assert set(shown["residual adds"]) == {"16 of 16 in float16"}
    assert shown["loss scale"].iloc[0] == "8192 to 65536"
    assert "torch2.13.0" in page.words.replace("\n", "")


def test_samples_are_escaped(tmp_path):
    run = write_run(tmp_path, "pre")
    write_sample(run, "</pre><script>alert(1)</script>\x00\ud800 & so on")
    write_sample(write_sft(run, [0.3] * 5), "<img src=http://x>", "<b>How?")
    html = render(load(tmp_path), [])
    assert "<script>alert" not in html
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in html
    assert "<img" not in html
    assert "\x00" not in html
    html.encode()
    assert "http://x" in Page(html).words


def test_paths_are_cut_down():
    assert public("/home/me and you/data/x.jsonl") == "…/x.jsonl"
    assert public("C:\\Users\\me\\x") == "…/x"
    assert public("cannot read /home/me/x.bin: gone") == "cannot read …/x.bin: gone"
    assert public({"a": ["/data"], "b": 3}) == {"a": ["…/data"], "b": 3}
    for harmless in ("runs/demo/x", "https://huggingface.co/a/b", "nats/token", "1/2", "1/sqrt(2L)"):
        assert public(harmless) == harmless


# --- what is missing or wrong --------------------------------------------------------------------------------


def test_a_run_that_has_only_just_begun(tmp_path):
    run = write_run(tmp_path, "peri")
    shutil.rmtree(run / "layers")
    for name in ("metrics.jsonl", "environment.json", "summary.json"):
        (run / name).unlink()
    frames = load(tmp_path)
    drawings = list(all_figures(frames))
    assert all(drawing.png is None for drawing in drawings)
    page = Page(render(frames, drawings))
    assert f"Not drawn: {len(CATALOGUE)} figures" in page.words
    assert "The environment was not recorded." in page.words


def test_unfinished_runs_and_runs_cut_short(tmp_path):
    for placement, status in (("post", "failed"), ("pre", "interrupted"), ("peri", "running")):
        run = write_run(tmp_path, placement)
        (run / "summary.json").write_text(json.dumps({"status": status, "step": 40, "reason": "see /var/log/x/y"}))
        lines = (run / "metrics.jsonl").read_text().splitlines()[:40]
        (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
        for file in sorted((run / "layers").iterdir())[1:]:
            file.unlink()
    said = sentences(tmp_path)
    assert "post seed 1 (failed at step 40: see …/y)" in said
    assert "peri seed 1 (running at step 40" in said
    write(load(tmp_path), tmp_path)
    assert Page((tmp_path / "report.html").read_text()).all("img")


def test_a_figure_that_can_no_longer_be_drawn_goes(tmp_path):
    run = write_run(tmp_path, "post")
    stale = tmp_path / "figures" / "figure_7b.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of other runs")
    shutil.rmtree(run / "layers")
    (run / "metrics.jsonl").unlink()
    write(load(tmp_path), tmp_path)
    assert not stale.exists()


def test_one_run_folder_is_enough(tmp_path):
    run = write_run(tmp_path, "peri")
    write_sft(run, [0.3] * 5)
    frames = load(run)
    assert list(frames.runs.run) == [".", "sft"]
    assert frames.runs.parent.iloc[1] == "."


def test_number_formats_are_told_of_the_newest_checkpoint_that_has_them(tmp_path):
    run = write_run(tmp_path, "peri")
    for step, said in ((5, ["old"]), (10, ["The stream in INT8 <loses>.", "\x1b[31mred"])):
        file = run / "eval" / "formats" / f"step_{step:08d}" / "formats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"asked": {"samples": 16, "tokens": 256, "step": step}, "said": said}))
    text = render(load(run), [])
    assert "Number formats, by emulation in FP32 (16 samples of 256 tokens, step 10):" in text
    assert "<li>The stream in INT8 &lt;loses&gt;.</li>" in text and "old</li>" not in text and "\x1b" not in text


def test_errors_name_the_path(tmp_path):
    with pytest.raises(UserError, match="nowhere is missing"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run folders"):
        load(tmp_path)
    run = write_run(tmp_path, "peri")
    (run / "layers" / "step_00000050.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"cannot read .*step_00000050\.parquet"):
        load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        main(parse([str(tmp_path), "--out", str(tmp_path / "file")]))
