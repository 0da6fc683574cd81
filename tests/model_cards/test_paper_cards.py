"""The cards of the paper's nine models: as committed, and with the paper's numbers as the paper's."""

from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from periln.model_cards.paper import PLACEMENTS, SIZES, TABLES, recipe_of, render_paper_card

FOLDER = Path(__file__).resolve().parents[2] / "model_cards" / "paper"
NINE = [(size, placement) for size in SIZES for placement in PLACEMENTS]


@pytest.mark.parametrize(("size", "placement"), NINE)
def test_the_committed_card_is_what_recipe_and_tables_give(size, placement):
    """After a change: python -m model_cards.paper"""
    name = recipe_of(size, placement)[1]["name"]
    assert (FOLDER / f"{name}.md").read_text() == render_paper_card(size, placement)


@pytest.mark.parametrize(("size", "placement"), NINE)
def test_every_number_of_table_2_is_there_and_none_enters_the_model_index(size, placement):
    card = ModelCard(render_paper_card(size, placement))
    rows = pd.read_csv(TABLES / "table_02.csv", comment="#").set_index(["size", "placement"])
    for name, value in rows.loc[(size, placement)].items():
        assert f"{value:.2f}" in card.text, name
    assert card.data.eval_results is None and card.data.datasets == ["mlfoundations/dclm-baseline-1.0"]
    assert "every score on this page is the paper's" in card.text


def test_the_seeds_that_diverged_are_counted():
    assert "3 of 5 seeds diverged" in render_paper_card("3.2B", "pre")
    assert "0 of 5 seeds diverged" in render_paper_card("400M", "peri")


def test_there_are_nine_and_no_more():
    assert len(list(FOLDER.glob("*.md"))) == 9
