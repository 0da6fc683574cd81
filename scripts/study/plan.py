"""The plan as a file: what is fixed before the first run, and its table."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from periln.runkit.recipes import at_path, merge
from periln.scripts.arguments.study import Budget
from periln.scripts.recipe import Recipe
from periln.scripts.study.design import Cell, Design
from periln.scripts.study.sizes import Size

CLAIMS = Path(__file__).parents[2] / "eval" / "study" / "claims.yaml"
MOST_INSTALLED = 64_000_000  # tokens asked of the text that is installed with the machine
DCLM = "hf:mlfoundations/dclm-baseline-1.0"
PADDED = {"cl100k_base": 100352}  # vocabulary of the model


def data_of(design: Design, source: str | None) -> dict[str, Any]:
    """The plan's section `data`: options of prepare_data, and where the result is in the study's folder."""
    needed = max(map(design.tokens_of, design.cells))
    tokens = min(MOST_INSTALLED, max(2_000_000, 40 * needed)) if needed <= MOST_INSTALLED else math.ceil(1.05 * needed)
    source = source or ("installed" if needed <= MOST_INSTALLED else DCLM)
    large = design.size.vocabulary in PADDED.values()
    tokenizer = {"tokenizer": "cl100k_base"} if large else {"vocab_size": design.size.vocabulary}
    share = {"heldout_share": 0.01, "heldout_documents": 400}
    context = max(512, 2 * design.size.length)
    return {"path": "data", "source": source, **tokenizer, "max_tokens": tokens, "context": context, **share}


def shared_fields(design: Design, device: str) -> dict[str, Any]:
    """The recipe that all cells share, but for their `fields`."""
    return {
        "device": device,
        "trackers": [],
        "flight": {"steps": 0},
        "keep_last": 1,
        "heldout_sequences": 64,
        "precision": {"mode": "fp16", "residual_dtype": "float16", "loss_scale_growth_interval": 100},
    }


def fields_of(cell: Cell, design: Design) -> dict[str, Any]:
    """What a cell's recipe has beside the shared fields, dotted; its learning rate may be open."""
    steps, size = design.steps_of(cell), cell.size
    half = bool(cell.changes.get("half"))
    shape = size.deep if cell.deep else size.shape
    quarter = steps // 4
    return {
        "model": {**shape.model(size.length), "vocab_size": design.size.vocabulary, **cell.model},
        "seed": cell.seed,
        "steps": steps,
        "batch_size": size.batch * (2 if half else 1),
        "sequence_length": size.length // (2 if half else 1),
        "layer_stats_every": max(1, quarter // 3),
        "heldout_every": quarter,
        "checkpoint_every": quarter,
        **{name: value for name, value in cell.changes.items() if name != "half"},
    }


def build(design: Design, budget: Budget, args: Any, workers: int, speed: float, at: Size, measured: bool) -> dict:
    """plan.yaml's content."""
    cells = []
    for cell in design.cells:
        cells.append(
            {
                "name": cell.name,
                "group": cell.group,
                "variant": cell.variant,
                "block": cell.block,
                "seed": cell.seed,
                "size": f"{cell.size.name}{' deep' if cell.deep else ''}",
                "tokens": design.tokens_of(cell),
                "rate": cell.rate,
                "like": cell.like or None,
                "seconds": round(design.seconds[cell.name], 1),
                "fields": fields_of(cell, design),
            }
        )
    return {
        "study": 1,
        "budget": budget.text,
        "workers": workers,
        "device": args.device,
        "tokens_per_second": {"value": round(speed, 1), "size": at.name, "measured": measured},
        "size": design.size.name,
        "seeds": sorted({cell.seed for cell in design.cells}),
        "rates": sorted({cell.rate for cell in design.cells if cell.rate}),
        "data": data_of(design, args.source),
        "recipe": shared_fields(design, args.device),
        "cells": cells,
    }


def recipe_of(plan: dict[str, Any], cell: dict[str, Any], rate: float, data: str) -> dict[str, Any]:
    """A cell's whole recipe, as `scripts.pretrain` reads it."""
    recipe = dict(plan["recipe"])
    for name, value in (cell["fields"] | {"optimizer.learning_rate": rate}).items():
        recipe = merge(recipe, at_path(name, value))
    return {"name": cell["name"], "data": data, **recipe}


def check_recipes(plan: dict[str, Any]) -> None:
    """Raise UsageError for a cell that no run could be: before any work starts."""
    from periln.runkit.recipes import from_mapping

    for cell in plan["cells"]:
        from_mapping(Recipe, recipe_of(plan, cell, cell["rate"] or 1e-3, plan["data"]["path"])).check()


# --- words -------------------------------------------------------------------------------------------------
def detectable(pairs: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference, in standard deviations of a difference, that a paired two-sided t test of so many
    pairs finds with the power; inf below two. Five pairs: 1.7."""
    if pairs < 2:
        return math.inf
    from scipy.optimize import brentq
    from scipy.special import stdtrit
    from scipy.stats import nct

    df, limit = pairs - 1, float(stdtrit(pairs - 1, 1 - alpha / 2))

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(pairs)
        found = float(nct.sf(limit, df, shift))
        return (found if math.isfinite(found) else 1.0) - power

    return float(brentq(missing, 0.01, 40.0, xtol=1e-3))


def table(plan: dict[str, Any]) -> list[str]:
    """The table of cells: a line a group and block, with hours of one core or GPU."""
    lines = [f"{'group':6}{'block':20}{'cells':>6}{'tokens':>10}{'size':>12}{'hours':>8}  variants"]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in plan["cells"]:
        rows.setdefault((cell["group"], cell["block"]), []).append(cell)
    for (group, block), cells in sorted(rows.items()):
        hours = sum(cell["seconds"] for cell in cells) / 3600
        variants = ", ".join(dict.fromkeys(cell["variant"] for cell in cells))
        tokens = f"{cells[0]['tokens'] / 1e6:.2f}M"
        lines.append(f"{group:6}{block:20}{len(cells):6}{tokens:>10}{cells[0]['size']:>12}{hours:8.2f}  {variants}")
    total = sum(cell["seconds"] for cell in plan["cells"]) / 3600
    lines.append(f"{'':6}{'in all':20}{len(plan['cells']):6}{'':22}{total:8.2f}")
    return lines


def pairs_of(plan: dict[str, Any], group: str) -> int:
    """The seeds that every comparison of a group has."""
    return min(Counter((c["variant"], c["block"]) for c in plan["cells"] if c["group"] == group).values())


def powers(plan: dict[str, Any]) -> list[str]:
    """What the comparisons of each group can find."""
    lines = []
    for group in sorted({cell["group"] for cell in plan["cells"]}):
        pairs = pairs_of(plan, group)
        least = detectable(pairs)
        found = f"{least:.1f} standard deviations of a difference" if math.isfinite(least) else "nothing: no interval"
        lines.append(f"{group}: {pairs} pair{'s' if pairs > 1 else ''} a comparison find {found} at 80 % power")
    return lines


def undecidable(plan: dict[str, Any], claims: dict[str, Any]) -> list[str]:
    """The claims that the plan's cells will not be able to decide, with the reason."""
    groups = Counter(cell["group"] for cell in plan["cells"])
    pairs = {
        g: min(Counter((c["variant"], c["block"]) for c in plan["cells"] if c["group"] == g).values()) for g in groups
    }
    blocks = {(cell["group"], cell["block"]) for cell in plan["cells"]}
    lines = []
    for name, claim in claims["claims"].items():
        if claim.get("untestable"):
            lines.append(f"{name}: {claim['untestable']}")
            continue
        missing = [g for g in claim["groups"] if g not in groups]
        absent = [f"{g} {b}" for g, b in claim.get("blocks", []) if (g, b) not in blocks]
        few = [g for g in claim["groups"] if pairs.get(g, 9) < 2]
        if missing or absent:
            lines.append(f"{name}: needs {', '.join(missing + absent)}, which the plan does not have")
        elif few:
            lines.append(f"{name}: one seed in {', '.join(few)} gives no interval")
    return lines
