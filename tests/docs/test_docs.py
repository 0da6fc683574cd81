"""The documentation: it builds without a broken link, its commands parse, and it leaves out nothing of the code."""

import dataclasses
import importlib
import importlib.util
import re
import sys

import pytest
from browser import CHROMIUM, look
from documents import ROOT, blocks, own_commands, pages

from modeling_periln import PLACEMENT_NAMES
from periln.command_line import arguments_of
from periln.runkit.steps import STEP_FIELDS
from periln.verbs import OTHERS, VERBS

DOCS = ROOT / "docs"
BUILDS_WITH = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")
ABBREVIATED = {"SRC": "here"}
# Words that mean a file of the reader's, which a command reads before it starts.
A_RECIPE = "RECIPE.yaml"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("documentation_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(page) -> str:
    return page.relative_to(ROOT).as_posix()


# --- the build -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built strictly: a broken link or reference raises."""
    for package in BUILDS_WITH:
        try:
            importlib.import_module(package)
        except ImportError:
            pytest.skip(f"{package} is not installed: pip install 'peri-llama[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("docs") / "site"
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    finally:
        config.plugins.on_shutdown()
    return folder


@pytest.mark.slow
def test_it_builds_and_no_link_or_reference_is_broken(site):
    shown = (site / "reference" / "python-api" / "index.html").read_text()
    for name in ("PeriLlamaConfig", "PeriLlamaForCausalLM", "to_native", "RunFolder", "read_yaml"):
        assert re.search(rf'id="[\w.]*\b{name}"', shown), name
    for page in site.rglob("*.html"):
        assert "<!-- generated" not in page.read_text(), page


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_its_first_page_fits_the_window_and_asks_nobody(site, width):
    pytest.importorskip("aiohttp", reason="the DevTools protocol is spoken through aiohttp")
    header = "document.querySelector('.md-header').innerText"
    cards = "[...document.querySelectorAll('.grid li')].map(e => e.getBoundingClientRect().width)"
    seen = look(site / "index.html", width, height=800, scripts=[header, cards])
    assert seen.page["wide"] == [] and seen.page["scroll"] <= width and not seen.page["broken"]
    asked = [problem for problem in seen.problems if not problem.startswith("asked for file:")]
    assert asked == []
    said, cards = seen.answers
    assert "PeriLlama" in said and "None" not in said
    assert len(cards) == 4 and min(cards) > 200


def test_a_mark_or_a_file_that_there_is_not_fails(hooks):
    with pytest.raises(hooks.DocumentationError, match=r"page\.md: nothing is generated as 'nothing'"):
        hooks.fill_in("<!-- generated: nothing -->", "page.md")
    with pytest.raises(hooks.DocumentationError, match=r"page\.md: the repository has no nowhere\.py"):
        hooks.fill_in("[x](repo:nowhere.py)", "page.md")
    filled = hooks.fill_in("[x](repo:LOG.md) [y](repo:tests)", "page.md")
    assert filled == f"[x]({hooks.repository()}/blob/main/LOG.md) [y]({hooks.repository()}/tree/main/tests)"


def test_the_navigation_takes_up_pages_that_it_does_not_name(hooks, monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("index", "published", "study"):
        (tmp_path / "results" / f"{name}.md").write_text(f"# {name.title()} models\n")
    monkeypatch.setattr(hooks, "DOCS", tmp_path)
    nav = [{"Results": ["results/index.md", "results/*"]}, "results/study.md"]
    assert hooks.expand(nav) == [{"Results": ["results/index.md", "results/published.md"]}, "results/study.md"]
    assert hooks.result_pages() == "- [Published models](published.md)\n- [Study models](study.md)"
    assert hooks.expand([{"How-to": ["how-to/*"]}]) == [{"How-to": []}]


# --- the commands ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [page for page in pages() if list(own_commands(page))], ids=name_of)
def test_the_commands_of_a_page_are_command_lines(page):
    verbs = {f"periln {verb.name}": verb.command for verb in VERBS}
    known = set(verbs.values()) | set(OTHERS)
    for name, words in own_commands(page):
        if name == "periln --help":
            continue
        command = verbs.get(name, name)
        assert command in known, f"{name} is not a command"
        module = "periln.convert" if command == "convert" else arguments_of(command)
        try:
            importlib.import_module(module).parse(words, prog=name)
        except SystemExit as stop:
            pytest.fail(f"{name} {' '.join(words)}: exit {stop.code}")


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page, "python")], ids=name_of)
def test_the_python_of_a_page_compiles(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


def test_files_of_the_repository_that_commands_name_are_there():
    for page in pages():
        for _, words in own_commands(page):
            for word in words:
                if re.match(r"(scripts|sft|eval|examples|model_cards)/", word):
                    assert (ROOT / word).exists(), f"{name_of(page)}: {word}"


# --- what the code has -----------------------------------------------------------------------------------------------
def test_every_option_of_every_command_is_in_the_reference(hooks):
    text = hooks.command_line()
    for command, prog in [(v.command, f"periln {v.name}") for v in VERBS] + [(c, f"python -m {c}") for c in OTHERS]:
        part = re.search(rf"^## {re.escape(prog)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        for action in hooks.parser_of(command, prog)._actions:
            hidden = action.help == "==SUPPRESS==" or action.dest in ("help", "debug", "threads")
            for flag in [] if hidden else action.option_strings:
                assert f"`{flag}" in part or f", {flag}" in part, f"{prog} {flag}"


def test_every_field_of_a_recipe_is_in_the_reference(hooks):
    text = hooks.recipes()
    for place in hooks.RECIPES.values():
        module, _, name = place.partition(":")
        for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
            assert f"| `{field.name}` |" in text
    assert "| `optimizer.norm_decay.input` |" in text
    assert "| `seed` | int | `1` |  | fixed |" in text
    assert "| `optimizer.final_learning_rate` | float | `0.1` | a share of learning\\_rate" in text
    assert "| `keep_last` | int | `2` | checkpoints; two, so that one damaged" in text  # a comment above the field


def test_every_key_and_placement_is_in_the_reference(hooks):
    record, table = hooks.step_record(), hooks.placements()
    assert all(f"| `{name}` |" in record for name in STEP_FIELDS)
    equations = (DOCS / "reference" / "placements.md").read_text()
    for name in PLACEMENT_NAMES:
        assert f"| `{name}` |" in table and f"| `{name}` |" in equations


def test_hooks_import_without_mkdocs(hooks):
    assert "mkdocs" not in vars(hooks) and sys.modules.get("mkdocs.commands.build") is None
