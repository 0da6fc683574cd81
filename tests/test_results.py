"""Pages of results are what their scripts draw from the records next to them."""

import importlib.util
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGES = [page.stem for page in sorted(RESULTS.glob("*.md")) if (RESULTS / f"redraw_{page.stem}.py").exists()]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_script_draws_from_the_records(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RESULTS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"redraw_{name}", RESULTS / f"redraw_{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = RESULTS / f"{name}.md"
    assert script.page() == page.read_text(), f"run docs/results/redraw_{name}.py"
    assert len(page.read_text()) > 2000
