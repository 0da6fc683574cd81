"""The table's rows from the records, and sentences about them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from periln.eval.formats.measure import paired_rise
from periln.eval.formats.recipes import (
    ACTIVATIONS,
    CHANNEL,
    GROUPS,
    NONE,
    RECIPES,
    ROW,
    STREAM,
    TENSOR,
    Recipe,
    Scaled,
)
from periln.eval.formats.words import AS_IT_IS, CURED, PLACES
from periln.eval.text_table import signed

SURVIVES = 0.10  # of FP32's loss: a row whose loss rises by at most this much, and stays finite, survives
WITHIN = 0.01  # of it: as good as FP32
Cell = tuple[str, Recipe, dict[str, Any]]  # variant, row, record


def place(slot: dict[str, Any], target: bool = True) -> str:
    """`stream after mlp, layer 8`; products by the last part of their names, and without the target if it is known."""
    words = "+".join(part.rpartition(".")[2] for part in slot["slot"].split("+"))
    words = f"{PLACES[slot['target']]} {words}" if target else words
    return words if slot["layer"] == 0 else f"{words}, layer {slot['layer']}"


def first_lost(recipe: Recipe, record: dict[str, Any]) -> str | None:
    """The first tensor of a pass that is not finite, or saturates under a plain cast, with layer and slot."""
    for slot in record["slots"]:
        if slot["non_finite"]:
            return f"not finite: {place(slot)}"
        if recipe.cells[slot["target"]].scaling == NONE and slot["clipped"]:
            return f"saturates: {place(slot)}"
    return None if record["finite"] else "not finite: the logits"


def _share(slots: Sequence[dict[str, Any]], name: str) -> float:
    total = sum(s["elements"] for s in slots)
    return sum(s[name] * s["elements"] for s in slots) / total if total else 0.0


def row_of(cell: Cell, reference: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    """One row of formats.csv. Rises are in bits a byte (a token without a tokenizer); None where it is not finite."""
    variant, recipe, record = cell
    slots, total = record["slots"], sum(reference)
    rise, low, high = (None,) * 3
    if record["finite"]:
        rise, low, high = paired_rise(record["nats"], reference, sizes)
    base = paired_rise(reference, [0.0] * len(reference), sizes)[0] if total else 0.0
    ratio = None if rise is None or not base else rise / base
    most = rise if high is None else high
    heard = [s for s in slots if s["snr_db"] is not None]
    worst = min(heard, key=lambda s: s["snr_db"], default=None)
    return {
        "variant": variant,
        "group": recipe.group,
        "row": recipe.name,
        **{f"bits_{target}": bits for target, bits in zip(GROUPS, recipe.bits, strict=False)},
        "survives": ratio is not None and ratio <= SURVIVES,
        "within": most is not None and bool(base) and most / base <= WITHIN,
        "rise": rise,
        "rise_low": low,
        "rise_high": high,
        "rise_share": ratio,
        "kl": record["kl"],
        "top1": record["top1"],
        "first": first_lost(recipe, record),
        "clipped": _share(slots, "clipped"),
        "flushed": _share(slots, "flushed"),
        "worst_snr_db": None if worst is None else worst["snr_db"],
        "worst_slot": None if worst is None else place(worst, recipe.group == RECIPES),
    }


def cheapest(cells: Iterable[tuple[Recipe, dict[str, Any]]]) -> dict[str, str | None]:
    """The row of each group with the fewest bits among those within 1 % of FP32's loss; None where there is none.

    Fewest for the weights first, then for activations, KV cache and stream; of equals, the smaller rise. A scale for
    each channel of activations or stream is a diagnosis, since no product can factor it out of its sum: it does not
    count.
    """
    found: dict[str, str | None] = {}
    by_group: dict[str, list[tuple[Recipe, dict[str, Any]]]] = {}
    for recipe, row in cells:
        diagnosis = any(t in (ACTIVATIONS, STREAM) and cell.scaling == CHANNEL for t, cell in recipe.cells.items())
        if row["variant"] == AS_IT_IS and not diagnosis:
            by_group.setdefault(recipe.group, []).append((recipe, row))
    for group, members in by_group.items():
        good = [(_cost(recipe), row["rise"], recipe.name) for recipe, row in members if row["within"]]
        found[group] = min(good)[2] if good else None
    return found


def _cost(recipe: Recipe) -> tuple[float, ...]:
    weights, activations, stream, kv = recipe.bits
    return weights, activations, kv, stream


def _percent(row: dict[str, Any]) -> str:
    if row["rise_share"] is None:
        return "not finite"
    return f"{signed(100 * row['rise_share'], 2 if row['rise_share'] < 1 else 0)}%"


def said(cells: Sequence[tuple[Recipe, dict[str, Any]]], found: dict[str, str | None]) -> list[str]:
    """What the table shows, in sentences."""
    sentences = []
    for group in (g for g in GROUPS if g in found):
        what = "recipe" if group == RECIPES else f"format of the {PLACES[group]}"
        name = found[group]
        head = f"The cheapest {what} within {WITHIN:.0%} of FP32's loss"
        sentences.append(f"{head}: {name}." if name else f"{head}: none of those measured.")
    rows = {(row["variant"], recipe.group, recipe.name): row for recipe, row in cells}
    for target in (ACTIVATIONS, STREAM):
        sentences += _outliers(rows, target)
    for (variant, group, name), row in rows.items():
        before = rows.get((AS_IT_IS, group, name))
        if variant == CURED and before is not None and name.startswith("FP16"):
            lost = "" if before["first"] is None else f" ({before['first']})"
            what = f"{PLACES[group]} in {name}" if group != RECIPES else name
            sentences.append(f"{what}: {_percent(before)}{lost} before the cure, {_percent(row)} after it.")
    return sentences


def _outliers(rows: dict[tuple[str, str, str], dict[str, Any]], target: str) -> list[str]:
    """Whether separate scales for tokens or channels recover what one scale loses."""
    names = [Scaled("INT8", scaling).words(target) for scaling in (TENSOR, ROW, CHANNEL)]
    of = [rows[key] for name in names if (key := (AS_IT_IS, target, name)) in rows]
    if len(of) < len(names):
        return []
    tensor, row, channel = of
    head = (
        f"The {PLACES[target]} in INT8 with a scale per tensor, token and channel: "
        f"{_percent(tensor)}, {_percent(row)} and {_percent(channel)} of the loss"
    )
    whole, *shared = (math.inf if r["rise"] is None else r["rise"] for r in (tensor, row, channel))
    if whole <= 0 or (tensor["within"] and channel["within"]):
        return [f"{head}."]
    best = min(shared)
    share = 0.0 if best == math.inf else 1.0 if whole == math.inf else min(1.0, 1 - best / whole)
    if share >= 0.5:
        which = "tokens" if best == shared[0] else "channels"
        return [f"{head}: outliers decide, and separate scales for {which} recover {share:.0%} of the loss."]
    return [f"{head}: a few tokens or channels do not decide."]
