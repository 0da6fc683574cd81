"""Pages of results are what their scripts draw from the records next to them."""

import importlib.util
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGES = [page.stem for page in sorted(RESULTS.glob("*.md")) if (RESULTS / f"redraw_{page.stem}.py").exists()]


def script(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RESULTS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"redraw_{name}", RESULTS / f"redraw_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_script_draws_from_the_records(name, monkeypatch):
    page = RESULTS / f"{name}.md"
    assert script(name, monkeypatch).page() == page.read_text(), f"run docs/results/redraw_{name}.py"
    assert len(page.read_text()) > 2000


def test_every_record_of_a_retrofit_is_on_its_page(monkeypatch):
    module, read = script("retrofit", monkeypatch), []
    own = module.read
    monkeypatch.setattr(module, "read", lambda name: read.append(name) or own(name))
    module.page()
    assert set(read) == {path.stem for path in (RESULTS / "records" / "retrofit").glob("*.json")}


def test_the_cure_is_described_only_where_all_groups_but_the_final_norm_share_a_power_of_two(monkeypatch):
    module = script("published", monkeypatch)
    said = module.scaled({"final": 3, "stream": -3, "model.layers.0.mlp.output": -3})
    assert said.startswith("It scales 2 groups of tensors by 2^-3") and "2^3" in said and "by 2^-6." in said
    with pytest.raises(SystemExit, match="no words"):
        module.scaled({"final": 3, "stream": -3, "model.layers.0.mlp.output": -1})
