"""The FP16 cure before the formats: which rows it can change, and the rewrite in memory."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from periln.eval.formats.recipes import ACTIVATIONS, NONE, STREAM, TENSOR, Recipe, Scaled
from periln.eval.fp16.cure import Wish, cure
from periln.eval.texts.samples import Samples
from periln.runkit.errors import UserError

SAMPLES = 4  # from which the exponents are chosen
_CONTROLS = {(target, Scaled("INT8", TENSOR).words(target)) for target in (ACTIVATIONS, STREAM)}


def rows_that_change(rows: Iterable[Recipe]) -> list[Recipe]:
    """Rows with a plain cast to a format of FP16's range or less, and two controls.

    A scale follows the powers of two that the cure moves, and BF16 has FP32's range: the other rows stay as they are.
    """
    return [
        row
        for row in rows
        if (row.group, row.name) in _CONTROLS
        or any(cell.scaling == NONE and cell.format != "BF16" for cell in row.cells.values())
    ]


def cure_in_place(model: nn.Module, samples: Samples, batch_size: int) -> dict[str, Any]:
    """Rewrite the model (FP32) for a finite forward pass in FP16; `refused` says why it is unchanged, if it is."""
    device = next(model.parameters()).device
    batches = list(samples.batches(batch_size, device, SAMPLES))
    try:
        record, _, _ = cure(model, batches, Wish(backward=False))
    except UserError as why:
        return {"refused": str(why)}
    if not record["needed"]:
        return {"refused": "in FP16 its forward pass is finite with room to spare, so nothing has to move"}
    return {"refused": None, "exponents": record["exponents"], "fp32_difference": record["differences"]["fp32"]}
