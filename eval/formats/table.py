"""The rows as a table for the terminal and Markdown, and as CSV."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from periln.eval.formats.recipes import RECIPES, TARGETS, Recipe
from periln.eval.formats.summary import SURVIVES
from periln.eval.formats.words import AS_IT_IS, EMULATION, PLACES
from periln.eval.records.words import number
from periln.eval.text_table import Table, signed


def _bits(row: dict[str, Any], group: str) -> str:
    if group != RECIPES:
        return f"{row[f'bits_{group}']:g}"
    weights, activations, _, kv = (row[f"bits_{target}"] for target in TARGETS)
    return f"{weights:g}/{activations:g}/{kv:g}"


def _lost(row: dict[str, Any]) -> str:
    if row["rise"] is None:
        return "not finite"
    text = signed(row["rise"], 4)
    return text if row["rise_low"] is None else f"{text} [{signed(row['rise_low'], 4)}, {signed(row['rise_high'], 4)}]"


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.2%}" if value >= 5e-5 else "<0.01%"


def _cells(recipe: Recipe, row: dict[str, Any]) -> dict[str, str]:
    variant = "" if row["variant"] == AS_IT_IS else f", {row['variant']}"
    snr = "" if row["worst_snr_db"] is None else f"{row['worst_snr_db']:.1f} ({row['worst_slot']})"
    return {
        "group": f"{PLACES[recipe.group]}{variant}",
        "format": recipe.name,
        "bits": _bits(row, recipe.group),
        "survives": "yes" if row["survives"] else "no",
        "lost": _lost(row),
        "lost %": "" if row["rise_share"] is None else signed(100 * row["rise_share"], 2),
        "KL": "" if row["kl"] is None else number(row["kl"]),
        "top-1": "" if row["top1"] is None else f"{row['top1']:.1%}",
        "clipped": _share(row["clipped"]),
        "to zero": _share(row["flushed"]),
        "lowest SNR, dB": snr,
        "first not finite or saturated": row["first"] or "",
    }


def formats_table(
    title: str, rows: Sequence[tuple[Recipe, dict[str, Any]]], unit: str, notes: Sequence[str] = ()
) -> Table:
    """A block a target; `unit` is what the loss is counted in: `byte` or `token`."""
    text = pd.DataFrame([_cells(recipe, row) for recipe, row in rows])
    text = text.rename(columns={"lost": f"bits a {unit} lost [95 %]"})
    explained = (
        EMULATION,
        f"bits: of a number with its blocks' scales (recipes: weights/activations/KV cache). survives: finite, and at "
        f"most {SURVIVES:.0%} of FP32's loss lost. The interval is Student's over samples, paired with FP32. "
        "KL (nats a token) and top-1 against FP32's tokens. clipped: beyond the largest number. to zero: not 0 before.",
    )
    return Table(title, text, pd.DataFrame([row for _, row in rows]), (*explained, *notes))
