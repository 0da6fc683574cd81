"""Tests of the report in a browser: what is above the fold, and that its charts and tables do what they offer."""

from pathlib import Path

import pandas as pd
import pytest
from browser import CHROMIUM, Seen, look
from synthetic_bench import write_any, write_bench
from synthetic_runs import write_demo

from periln.eval.records.frames import load
from periln.eval.report.page import write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
]
pytest.importorskip("aiohttp", reason="the DevTools protocol is spoken through aiohttp")

UNFOLD = "document.querySelectorAll('details').forEach(d => d.open = true)"
WAIT = "new Promise(done => setTimeout(done, 250))"
# Every chart is built when it is first seen.
BUILD = """(async () => {
  for (const f of document.querySelectorAll('figure')) {
    f.scrollIntoView();
    await new Promise(r => setTimeout(r, 120));
  }
  scrollTo(0, 0);
  return document.querySelectorAll('.chart').length;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write(load(demo := write_demo(tmp_path_factory.mktemp("runs") / "demo")), demo)


def at(page: Path, *scripts: str, width: int = 1280, **more) -> Seen:
    seen = look(page, width, height=800, scripts=scripts, **more)
    assert seen.problems == []
    return seen


def within(figure: str, body: str) -> str:
    """A script that has the figure as `f` and its chart's parts within reach."""
    return (
        f"(async () => {{ const f = document.querySelector('#figure-{figure}');"
        "const all = q => [...f.querySelectorAll(q)], one = q => f.querySelector(q);"
        "const lines = () => all('.canvas path[stroke-linejoin]').map(p => p.getAttribute('d'));"
        "const box = (key, value) => one(`input[data-key=${key}][data-value='${value}']`);"
        f"{body} }})()"
    )


def test_the_answer_and_the_first_figure_are_above_the_fold(page):
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom"
    hidden = "[...document.querySelectorAll('details.part')].filter(d => d.open).length"
    drawn = "document.querySelector('#figure-overview .canvas svg').getBoundingClientRect().height"
    answer_ends, figure_ends, open_parts, height = at(
        page, *map(bottom.format, (".answer", "figure")), hidden, drawn
    ).answers
    assert 0 < answer_ends < figure_ends <= 800
    assert height > 150
    assert open_parts == 0  # the details are folded


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    inner = (
        "[...document.querySelectorAll('.scroll')].filter(s => !s.hidden && s.scrollWidth > s.clientWidth + 1)"
        ".map(s => s.getAttribute('aria-label'))"
    )
    seen = at(page, UNFOLD, BUILD, inner, width=width)
    assert seen.page["wide"] == []
    assert seen.page["scroll"] <= seen.page["width"] <= width
    if width == 400:
        assert seen.answers[2] == []  # nor does anything scroll within it


def test_two_thirds_of_a_wide_window_are_used(page):
    used = "[...document.querySelectorAll('.canvas svg')].map(s => s.getBoundingClientRect().right)"
    assert min(at(page, UNFOLD, BUILD, used).answers[2]) > 2 / 3 * 1280


def test_every_figure_with_numbers_becomes_a_chart_and_its_picture_comes_back(page):
    swap = within(
        "3b",
        "const before = one('.scroll').hidden; one('button.swap').click();"
        "return [before, one('.scroll').hidden, one('.canvas').hidden]",
    )
    seen = at(page, UNFOLD, BUILD, swap)
    assert seen.answers[1] == seen.page["images"] == 11
    assert seen.answers[2] == [True, False, True]


def test_without_javascript_the_pictures_and_tables_are_there(page):
    state = "[document.querySelectorAll('.chart, button').length, document.querySelectorAll('table').length > 2]"
    images = "[...document.images].map(i => i.closest('.scroll').hidden || !i.naturalWidth)"
    seen = at(page, UNFOLD, state, images, javascript=False)
    assert seen.answers[1] == [0, True]
    assert seen.answers[2] == [False] * 11


def test_toggles_take_placements_rates_and_seeds_away(page):
    script = within(
        "rates",
        "const count = () => lines().length; const found = [count()];"
        "for (const [key, value] of [['series', 'peri'], ['rate', '0.02'], ['seed', '2']]) {"
        "  box(key, value).click(); found.push(count()); }"
        "box('series', 'peri').click(); found.push(count()); return found",
    )
    # Two panels. A placement has two seeds and their mean at 0.002, and one seed at 0.02.
    assert at(page, UNFOLD, BUILD, script).answers[2] == [24, 16, 12, 4, 6]


def test_the_axis_smoothing_and_range_of_steps_change_the_lines(page):
    script = within(
        "3b",
        "const set = (input, value, event) => {"
        "  input.value = value; input.dispatchEvent(new Event(event)); return lines()[0] };"
        "const plain = lines()[0], rough = d => d.split('L').length;"
        "const log = set(one('.axis select'), 'log', 'change'), linear = set(one('.axis select'), 'linear', 'change');"
        "const smooth = set(one('.smooth input'), 90, 'input');"
        "const part = set(one('.from input'), 150, 'change');"
        "return [plain === linear, plain === log, plain === smooth, rough(plain), rough(part)]",
    )
    assert at(page, UNFOLD, BUILD, script).answers[2] == [True, False, False, 200, 50]


def test_a_recorded_step_can_be_chosen(page):
    script = within(
        "5",
        "const range = one('.step input'), last = lines()[0];"
        "range.value = 0; range.dispatchEvent(new Event('input'));"
        "return [one('.step output').textContent, lines()[0] === last]",
    )
    assert at(page, UNFOLD, BUILD, script).answers[2] == ["step 0", False]


@pytest.mark.parametrize(
    ("figure", "target", "words"),
    [
        ("overview", "circle", ["seed 1", "held-out loss: ", "nats a token"]),
        ("3b", "path[stroke-linejoin]", ["rate 0.002, seed ", "step 0: "]),
        ("headroom", "rect + text ~ rect", ["rate 0.002", "step 0, the embedding: ", "bits"]),
    ],
)
def test_pointing_at_something_shows_its_values(page, figure, target, words):
    script = within(
        figure,
        "f.scrollIntoView({block: 'center'});"
        f"const mark = one('.canvas {target}'), r = mark.getBoundingClientRect();"
        "const where = {bubbles: true, clientX: r.left + 1, clientY: r.top + 3};"
        "mark.dispatchEvent(new PointerEvent('pointermove', where));"
        "return [one('.tip').hidden, one('.tip').textContent]",
    )
    hidden, text = at(page, UNFOLD, BUILD, script).answers[2]
    assert not hidden
    assert all(word in text for word in words), text


def test_numbers_can_be_taken_along(page):
    script = (
        "(async () => { const found = []; URL.createObjectURL = blob => { found.push(blob.text()); return '#' };"
        "for (const q of ['#figure-3b .controls .csv', '#figure-headroom .controls .csv', '#figure-overview .csv', "
        "'#stability .csv']) document.querySelector(q).click(); return Promise.all(found) })()"
    )
    lines, heat, dots, table = (text.splitlines() for text in at(page, UNFOLD, BUILD, script).answers[2])
    assert len(lines) == 1 + 6 * 200 and lines[1].startswith("post_lr0.002_seed1,post,0.002,,1,,,")
    assert heat[0] == "placement,learning_rate,size,seeds,step,layer,bits left" and len(heat) > 100
    assert dots[0] == "run,placement,learning_rate,seed,status,held-out loss,least FP16 headroom" and len(dots) == 10
    assert table[0].startswith("block,placement,seed,status") and table[1].startswith(
        "learning rate 0.002,post,1,completed"
    )


def test_a_table_is_sorted_within_its_blocks_by_a_click(page):
    script = (
        "(() => { const table = document.querySelector('#stability table'), head = table.tHead.rows[0].cells[3];"
        "const number = row => parseFloat(row.cells[3].textContent);"
        "const cells = () => [...table.tBodies].map(b => [...b.rows].slice(1).map(number));"
        "const found = [cells()];"
        "for (let i = 0; i < 3; i++) { head.querySelector('button').click(); found.push(cells(), head.ariaSort) }"
        "return found })()"
    )
    first, up, rising, down, falling, again, _ = at(page, UNFOLD, script).answers[1]
    assert up == [sorted(block) for block in first] and down == [sorted(block, reverse=True) for block in first]
    assert (rising, falling) == ("ascending", "descending") and again == first
    assert first != up


def test_a_link_opens_the_folded_part_it_leads_into(page):
    script = f"document.querySelector('nav a[href=\"#scores\"]').click(); {WAIT}"
    is_open = "document.querySelector('#scores').open"
    assert at(page, is_open, script, is_open).answers[::2] == [False, True]


def test_other_shapes_of_runs_make_charts_too(tmp_path):
    for i, rate in enumerate((0.001, 0.002, 0.004)):
        write_any(tmp_path, f"a{i}", rate=rate, growth=40.0)
        write_any(
            tmp_path, f"b{i}", rate=rate, status="diverged" if i else "completed", model={"norm_placement": "pre"}
        )
    write_any(tmp_path, "frozen", model={"output_norm_learnable": False})
    write_any(tmp_path, "wide", parameters=4e6, layers=30, model={"hidden_size": 32})
    file = write(load(tmp_path), tmp_path)
    marks = within("3a", "return all('.canvas text').filter(t => t.textContent === '✕').length")
    over = within("headroom", "return all('.canvas rect[fill=\"#d55e00\"]').length > 0")
    seen = at(file, UNFOLD, BUILD, marks, over)
    assert seen.answers[2:] == [2, True]


def test_distances_between_layers_can_be_read_off(tmp_path):
    for seed in (1, 2):
        write_bench(write_any(tmp_path, f"a{seed}", layers=3, seed=seed), [40], 3)
        write_bench(write_any(tmp_path, f"b{seed}", layers=3, seed=seed, model={"norm_placement": "pre"}), [40], 3)
    moved = tmp_path / "a2" / "eval" / "stability" / "angles_00000040.parquet"
    pd.read_parquet(moved).assign(value=lambda t: 3 * t.value).to_parquet(moved)
    file = write(load(tmp_path), tmp_path)
    script = within(
        "7c",
        "f.scrollIntoView({block: 'center'}); const said = [];"
        "for (const mark of [one('.canvas circle'), one('.canvas rect[fill^=rgb]')]) {"
        "  mark.dispatchEvent(new PointerEvent('pointermove', {bubbles: true})); said.push(one('.tip').textContent); }"
        "const maps = () => new Set(all('.canvas text[font-weight=\"600\"]').map(t => t.textContent)).size;"
        "const before = maps(); box('series', 'pre').click(); const after = maps();"
        "let csv; URL.createObjectURL = blob => { csv = blob.text(); return '#' }; one('.controls .csv').click();"
        "return [said, before, after, (await csv).split('\\n')];",
    )
    said, before, after, csv = at(file, UNFOLD, BUILD, script).answers[2]
    assert "layer 1: " in said[0] and said[0].endswith(" pi")
    assert "after the embedding and after layer 1: " in said[1]
    assert before - after == 1
    assert csv[0].strip() == "placement,learning_rate,size,seeds,layer,other_layer,angular distance / pi"
    angles = pd.concat(pd.read_parquet(p) for p in tmp_path.glob("a?/eval/stability/angles_*.parquet"))
    angles = angles[(angles.step == angles.step.max()) & (angles.layer == 0) & (angles.other == 1)]
    line = next(line for line in csv if line.startswith("peri") and ",0,1," in line)
    assert float(line.rsplit(",", 1)[1]) == pytest.approx(angles.value.mean(), rel=2e-3)


def test_what_a_model_wrote_cannot_run(tmp_path):
    from synthetic_runs import write_run, write_sample

    run = write_run(tmp_path, "pre")
    write_sample(
        run, "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    )
    seen = at(write(load(tmp_path), tmp_path), UNFOLD, "document.title")
    assert seen.answers[1].startswith("PeriLlama")
