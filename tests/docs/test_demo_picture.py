"""The picture of the demo: its script draws it from the records, and the pages say the records' numbers."""

import importlib.util
import math

import pandas as pd
from documents import ROOT

PAGES = ("docs/index.md", "docs/tutorials/first-study.md")


def script():
    spec = importlib.util.spec_from_file_location("redraw_demo", ROOT / "docs" / "results" / "redraw_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def size(png: bytes) -> bytes:
    assert png.startswith(b"\x89PNG")
    return png[16:24]


def test_the_picture_is_drawn_from_the_records():
    found = script()
    assert size(found.draw()) == size(found.PICTURE.read_bytes())


def test_the_pages_say_what_the_records_say():
    found = script()
    peaks = pd.read_csv(found.RECORDS / "peaks.csv")
    runs = found.read_json(found.RECORDS / "runs.json")["runs"]
    diverged = {name for name, run in runs.items() if run["summary"]["status"] == "diverged"}
    assert len(runs) == 9 and diverged == {"pre_lr0.07_seed1", "post_lr0.07_seed1"}
    largest = peaks[peaks.sublayer != "final"].groupby("run").value.max()
    assert not peaks[peaks.run.isin(diverged)].value.map(math.isfinite).all()
    bits = {run: math.log2(65504 / value) for run, value in largest.items() if run not in diverged}
    assert min(value for run, value in bits.items() if "lr0.002" in run) >= 11
    for page in PAGES:
        assert f"{bits['peri_lr0.07_seed1']:.1f} bits left" in " ".join((ROOT / page).read_text().split())


def test_what_is_kept_of_a_demo_is_what_is_drawn(tmp_path, monkeypatch):
    from synthetic_runs import write_demo

    found = script()
    monkeypatch.setattr(found, "RECORDS", tmp_path / "records")
    found.keep(write_demo(tmp_path / "demo"))
    assert size(found.draw())
    assert len(found.read_json(tmp_path / "records" / "runs.json")["runs"]) == 9
