"""docs/results/retrofit.md is what its script draws from the records."""

import importlib.util
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def script():
    spec = importlib.util.spec_from_file_location("redraw_retrofit", RESULTS / "redraw_retrofit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_drawn_from_the_records():
    assert (RESULTS / "retrofit.md").read_text() == script().page()


def test_every_record_is_on_the_page(monkeypatch):
    module, read = script(), []
    own = module.read
    monkeypatch.setattr(module, "read", lambda name: read.append(name) or own(name))
    module.page()
    assert set(read) == {path.stem for path in (RESULTS / "records" / "retrofit").glob("*.json")}
