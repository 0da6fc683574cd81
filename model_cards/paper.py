"""Cards of the paper's nine models, three sizes x three placements: `python -m model_cards.paper`.

No weights belong to them: each is the recipe that trains the model here, with the paper's numbers (Peri-LN,
arXiv 2502.02732, Table 2 and Tables 6 to 11) marked as the paper's. They are in the text, never in `model-index`,
which is for measurements of a repository's own weights.
"""

import sys

from periln.model_cards.arguments.paper import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("model_cards.paper", parse, check))  # parses before the imports below, which take seconds

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from periln.model_cards.cards import LIBRARY, PAPER, PIPELINE, TEMPLATES, normalized
from periln.model_cards.facts import markdown, text
from periln.model_cards.placement import EQUATION, diagram, norms_in_words, plan_of
from periln.runkit.folder import write_text
from periln.runkit.process import start_stage
from periln.runkit.recipes import flatten, read_yaml
from periln.runkit.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "scripts" / "recipes"
TABLES = ROOT / "eval" / "paper"
SIZES, PLACEMENTS = ("400M", "1.5B", "3.2B"), ("post", "pre", "peri")
DATASET = "mlfoundations/dclm-baseline-1.0"
COLUMNS = {"pretrain": "pretrained", "sft": "fine-tuned on LIMA"}


def _number(value: float, deviation: float | None = None) -> str:
    if math.isnan(value):
        return "not printed"
    return f"{value:.2f}" + (f" ± {deviation:.2f}" if deviation is not None and not math.isnan(deviation) else "")


def table_2(size: str, placement: str) -> str:
    """The model's row of the paper's Table 2."""
    rows = pd.read_csv(TABLES / "table_02.csv", comment="#")
    row = rows[(rows["size"] == size) & (rows.placement == placement)].iloc[0]
    lines = [(task.title, _number(row[task.name], row[f"{task.name}_std"])) for task in TASKS]
    lines += [("average of the five", _number(row.avg)), ("loss on C4, nats a token", _number(row.c4_loss))]
    return markdown(
        [*lines, ("average after fine-tuning on LIMA", _number(row.sft_avg))], ("the paper's", "accuracy in %")
    )


def by_seed(size: str, placement: str) -> tuple[str, int, int]:
    """The model's rows of the paper's Tables 6 to 11; seeds that diverged in pretraining, and all seeds."""
    rows = pd.read_csv(TABLES / "tables_06_to_11.csv", comment="#")
    rows = rows[(rows["size"] == size) & (rows.placement == placement)].sort_values(["stage", "seed"], kind="stable")
    lines = []
    for _, row in rows.iterrows():
        scores = [_number(100 * row[task.name]) if row.status == "completed" else "-" for task in TASKS]
        status = "none: the pretraining diverged" if (row.stage, row.status) == ("sft", "diverged") else row.status
        lines.append((COLUMNS[row.stage], str(row.seed), status, *scores))
    first = rows[rows.stage == "pretrain"]
    head = ("the paper's", "seed", "status", *(task.title for task in TASKS))
    return markdown(lines, head), int((first.status == "diverged").sum()), len(first)


def recipe_of(size: str, placement: str) -> tuple[Path, dict[str, Any]]:
    path = RECIPES / f"{size.lower()}-{placement}.yaml"
    return path, read_yaml(path)


def render_paper_card(size: str, placement: str) -> str:
    """The card of one of the nine."""
    path, recipe = recipe_of(size, placement)
    plan = plan_of({"model_type": "peri_llama", **recipe["model"]})
    seeds, diverged, total = by_seed(size, placement)
    data = ModelCardData(
        model_name=recipe["name"],
        license="apache-2.0",
        language=["en"],
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        datasets=[DATASET],
        tags=["peri-llama", placement, f"arxiv:{PAPER}"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "paper.md.j2"),
        name=recipe["name"],
        size=size,
        placement=placement,
        equation=EQUATION,
        norms=norms_in_words(plan),
        drawing=diagram(plan),
        recipe=markdown([(k, text(v)) for k, v in flatten(recipe).items() if k != "name"], ("field", "value")),
        file=path.relative_to(ROOT).as_posix(),
        tokens=f"{recipe['steps'] * recipe['batch_size'] * recipe['sequence_length'] / 1e9:.1f} billion",
        table_2=table_2(size, placement),
        seeds=seeds,
        diverged=diverged,
        total=total,
    )
    return normalized(card)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    for size in SIZES:
        for placement in PLACEMENTS:
            file = args.out / f"{recipe_of(size, placement)[1]['name']}.md"
            write_text(file, render_paper_card(size, placement))
            print(file)
