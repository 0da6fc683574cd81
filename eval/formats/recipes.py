"""What is measured, as data: formats and scalings of one target at a time, and the usual recipes of several."""

from collections.abc import Iterable
from typing import NamedTuple

from periln.runkit.number_format import ALL_FORMATS

NONE, TENSOR, ROW, CHANNEL, BLOCK = "none", "tensor", "row", "channel", "block"
SCALINGS = (NONE, TENSOR, ROW, CHANNEL, BLOCK)
GROUP = 128  # numbers a block in formats without their own block
WEIGHTS, ACTIVATIONS, STREAM, KV = "weights", "activations", "stream", "kv"
TARGETS = (WEIGHTS, ACTIVATIONS, STREAM, KV)
RECIPES = "recipes"  # the block of the table with several targets at once
UNROUNDED_BITS = 32.0


class Scaled(NamedTuple):
    """A format, and over which numbers a scale is shared.

    `none`: a plain cast. `tensor`: a weight matrix, or a sequence's tensor. `row`: an output channel of a weight; a
    token (and head) elsewhere. `channel`: an input channel of a weight; a channel over all tokens of a sequence
    elsewhere. `block`: the format's own block along the inner dimension, or `GROUP` numbers.
    """

    format: str
    scaling: str

    def words(self, target: str) -> str:
        """`INT8 per token`; for a weight, `per row`."""
        if ALL_FORMATS[self.format].block or self.scaling == NONE:
            return self.format
        shared = "token" if self.scaling == ROW and target != WEIGHTS else self.scaling
        return f"{self.format} per {shared}" + (f" of {GROUP}" if self.scaling == BLOCK else "")

    @property
    def block(self) -> int:
        return ALL_FORMATS[self.format].block or GROUP

    @property
    def bits(self) -> float:
        """Bits a number, including the scales of blocks but not one scale for a row, channel or tensor."""
        row = ALL_FORMATS[self.format]
        if self.scaling != BLOCK:
            return row.bits
        return row.bits + (8 / row.block if row.block else 32 / GROUP)


class Recipe(NamedTuple):
    """What is rounded to what; `group` is the target if there is only one, else `RECIPES`."""

    group: str
    name: str
    cells: dict[str, Scaled]
    quick: bool = True

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def bits(self) -> tuple[float, ...]:
        """Bits a number of every target: weights, activations, stream, KV cache; 32 where it is left in FP32."""
        return tuple(self.cells[t].bits if t in self.cells else UNROUNDED_BITS for t in TARGETS)


# A row: format, the scalings of the quick table, those that the full one adds.
_ONE_AT_A_TIME: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    WEIGHTS: (
        ("FP16", (), (NONE,)),
        ("BF16", (NONE,), ()),
        ("FP8 E4M3", (ROW,), (NONE, TENSOR)),
        ("FP8 E5M2", (), (NONE, ROW)),
        ("MXFP8", (BLOCK,), ()),
        ("INT8", (ROW,), (TENSOR,)),
        ("INT4", (ROW, BLOCK), ()),
        ("MXFP4", (BLOCK,), ()),
        ("NVFP4", (BLOCK,), ()),
    ),
    ACTIVATIONS: (
        ("FP16", (NONE,), ()),
        ("BF16", (NONE,), ()),
        ("FP8 E4M3", (TENSOR, ROW), (NONE, CHANNEL)),
        ("FP8 E5M2", (), (NONE, TENSOR, ROW)),
        ("MXFP8", (BLOCK,), ()),
        ("INT8", (TENSOR, ROW, CHANNEL), ()),
        ("INT4", (ROW, CHANNEL), (TENSOR, BLOCK)),
        ("MXFP4", (BLOCK,), ()),
        ("NVFP4", (BLOCK,), ()),
    ),
    STREAM: (
        ("FP16", (NONE,), ()),
        ("BF16", (NONE,), ()),
        ("FP8 E4M3", (NONE, ROW), (TENSOR, CHANNEL)),
        ("FP8 E5M2", (NONE,), (TENSOR, ROW)),
        ("MXFP8", (BLOCK,), ()),
        ("INT8", (TENSOR, ROW, CHANNEL), ()),
        ("INT4", (), (ROW, CHANNEL)),
        ("MXFP4", (), (BLOCK,)),
        ("NVFP4", (), (BLOCK,)),
    ),
    KV: (
        ("FP16", (), (NONE,)),
        ("BF16", (), (NONE,)),
        ("FP8 E4M3", (NONE, ROW), (TENSOR, CHANNEL)),
        ("FP8 E5M2", (NONE,), (ROW,)),
        ("MXFP8", (), (BLOCK,)),
        ("INT8", (ROW,), (TENSOR, CHANNEL)),
        ("INT4", (ROW, CHANNEL), ()),
        ("MXFP4", (), (BLOCK,)),
        ("NVFP4", (BLOCK,), ()),
    ),
}


def _same(format: str, scaling: str, *targets: str) -> dict[str, Scaled]:
    return dict.fromkeys(targets, Scaled(format, scaling))


_BF16 = _same("BF16", NONE, *TARGETS)
# Deployed recipes keep in BF16 what they do not round further.
_USUAL = (
    Recipe(RECIPES, "FP16 all", _same("FP16", NONE, *TARGETS)),
    Recipe(RECIPES, "BF16 all", _BF16),
    Recipe(RECIPES, "FP8 all", _BF16 | _same("FP8 E4M3", ROW, WEIGHTS, ACTIVATIONS, KV)),
    Recipe(RECIPES, "MXFP8 W8A8", _BF16 | _same("MXFP8", BLOCK, WEIGHTS, ACTIVATIONS)),
    Recipe(RECIPES, "INT8 W8A8", _BF16 | _same("INT8", ROW, WEIGHTS, ACTIVATIONS)),
    Recipe(RECIPES, "INT8 W8A8 per tensor", _BF16 | _same("INT8", TENSOR, WEIGHTS, ACTIVATIONS), quick=False),
    Recipe(RECIPES, "INT8 KV8", _BF16 | _same("INT8", ROW, KV)),
    Recipe(RECIPES, "INT4 W4A16", _BF16 | _same("INT4", BLOCK, WEIGHTS)),
    Recipe(RECIPES, "INT4 W4A8", _BF16 | _same("INT4", BLOCK, WEIGHTS) | _same("INT8", ROW, ACTIVATIONS), quick=False),
    Recipe(RECIPES, "MXFP4 W4A4", _BF16 | _same("MXFP4", BLOCK, WEIGHTS, ACTIVATIONS)),
    Recipe(RECIPES, "NVFP4 W4A4", _BF16 | _same("NVFP4", BLOCK, WEIGHTS, ACTIVATIONS)),
)


def _single() -> Iterable[Recipe]:
    for target, rows in _ONE_AT_A_TIME.items():
        for format, quick, more in rows:
            for scaling in (s for s in SCALINGS if s in quick or s in more):
                scaled = Scaled(format, scaling)
                yield Recipe(target, scaled.words(target), {target: scaled}, scaling in quick)


ROWS: tuple[Recipe, ...] = (*_single(), *_USUAL)
GROUPS = (*TARGETS, RECIPES)


def chosen(full: bool, groups: Iterable[str] = GROUPS, formats: Iterable[str] = ()) -> list[Recipe]:
    """The rows of the table; with `formats` only those that use one of them."""
    wanted, named = set(groups), set(formats)
    return [
        row
        for row in ROWS
        if row.group in wanted
        and (full or row.quick)
        and (not named or named & {cell.format for cell in row.cells.values()})
    ]
