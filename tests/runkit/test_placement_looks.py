"""Order, colour, marker and embedding norm of a placement come from the model family's own table."""

import subprocess
import sys
from pathlib import Path

import pytest

from modeling_periln import PLACEMENT_NAMES, PeriLlamaConfig
from modeling_periln.placements import PLACEMENTS as ROWS
from periln.runkit import placements
from periln.runkit.sizes import paper_size, size_name


def test_every_placement_of_the_table_has_a_look_of_its_own_in_its_order():
    assert placements.PLACEMENTS == tuple(PLACEMENT_NAMES) == tuple(placements.COLOURS) == tuple(placements.MARKERS)
    assert len(set(placements.COLOURS.values())) == len(set(placements.MARKERS.values())) == len(PLACEMENT_NAMES)
    assert placements.colour_of("mine") == placements.OTHER_COLOUR


@pytest.mark.parametrize("name", PLACEMENT_NAMES)
@pytest.mark.parametrize("stated", [None, True, False])
def test_whether_there_is_an_embedding_norm_is_what_the_model_has(name, stated):
    model = {"norm_placement": name, "embedding_norm": stated}
    row = ROWS.get(name, ROWS["pre"])
    assert placements.has_embedding_norm(model) == (row.embedding_norm if stated is None else stated)
    assert PeriLlamaConfig(norm_placement=name).norm_placement == name


def test_a_placement_of_ones_own_and_a_mixture():
    assert placements.has_embedding_norm({"norm_placement": {"input_norm": True, "embedding_norm": True}})
    assert not placements.has_embedding_norm({"norm_placement": "peri", "layer_placements": ["peri", "pre"]})


def test_the_table_is_read_without_torch():
    code = "import periln.runkit.placements, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_a_size_has_one_name_in_tables_and_figures():
    assert (paper_size(370e6), size_name(370e6)) == (None, "370M")  # 7.5 % below 400M
    assert size_name(385e6) == "400M"
