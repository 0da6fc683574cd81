"""What docs/results/published.md says of the cure follows from its record."""

import importlib.util
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_the_cure_is_described_only_where_all_groups_but_the_final_norm_share_a_power_of_two(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RESULTS), *sys.path])
    spec = importlib.util.spec_from_file_location("redraw_published", RESULTS / "redraw_published.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    said = script.scaled({"final": 3, "stream": -3, "model.layers.0.mlp.output": -3})
    assert said.startswith("It scales 2 groups of tensors by 2^-3") and "2^3" in said and "by 2^-6." in said
    with pytest.raises(SystemExit, match="no words"):
        script.scaled({"final": 3, "stream": -3, "model.layers.0.mlp.output": -1})
