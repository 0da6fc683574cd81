"""From a budget to cells: which sizes, tokens, rates and seeds, and in which order."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from periln.runkit.errors import UsageError
from periln.scripts.study.sizes import SIZES, SMALLEST, Size, larger, size_of

RATES = (0.003, 0.001, 0.01, 0.03, 0.1, 0.0003, 0.3)  # most informative first: the middle, then the edges
COMPARED = ("post", "pre", "peri")
# A design: seeds of E2, of the others, rates. The richest whose cells are long enough is taken.
DESIGNS = ((12, 12, 7), (8, 8, 7), (5, 5, 7), (3, 3, 7), (2, 2, 6), (1, 1, 5), (1, 1, 3))
MOST_SEEDS = {"cpu": 12, "cuda": 5}  # on GPUs further hours go into the size, as in the paper
ENOUGH_STEPS, FEWEST_STEPS = 400, 12
FIRST_ROUND = 3  # seeds that every group gets before any group gets more
PER_PARAMETER = 20  # tokens: a larger size is taken once the smaller one has so many
STEPS_OF_TWO = 4  # steps come in multiples of it: the held-out loss is measured at each quarter
OVERHEAD = {"cpu": 14.0, "cuda": 40.0}  # seconds a cell takes to start, to be measured and to end
INSIDE = {"E1": 12.0, "E4": 12.0, "E5": 12.0}  # seconds of what is measured inside its checkpoint, or asked of it
UNNORMED = {"norm_placement": "peri", "embedding_norm": False}
DEEP: dict[str, tuple[str, dict[str, Any]]] = {  # E1: variant -> (whose best rate, model fields)
    "post": ("post", {"norm_placement": "post"}),
    "pre": ("pre", {"norm_placement": "pre"}),
    "peri": ("peri", {"norm_placement": "peri"}),
    "peri, no embedding norm": ("peri", UNNORMED),
    "peri, no embedding norm, gamma frozen": ("peri", {**UNNORMED, "output_norm_learnable": False}),
    "peri, LayerNorm": ("peri", {"norm_placement": "peri", "norm_type": "layernorm"}),
    "output and QK norm": ("peri", {"norm_placement": "output", "qk_norm": "full"}),
}
STEPS = {"step 0.3": 0.3, "step 0.1": 0.1, "step 1/sqrt(2L)": "1/sqrt(2L)"}  # E4, beside E2's step of 1
SWITCHES: dict[str, dict[str, Any]] = {  # E3, beside E2's own
    "warm-up 30 %": {"optimizer.warmup": 0.3},
    "decay 0": {"optimizer.weight_decay": 0.0},
    "decay 0.3": {"optimizer.weight_decay": 0.3},
    "half the length": {"half": True},
}


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        variant, block: what is compared, and within which cells it is: pairs have the same block and seed.
        rate: the learning rate, or None: that of lowest loss of the placement `like` in E2 at the first seed.
        changes: recipe fields, dotted; `half` halves the length and doubles the batch.
        share: tokens, as a multiple of the base cell's.
    """

    group: str
    variant: str
    block: str
    seed: int
    size: Size
    model: dict[str, Any]
    rate: float | None = None
    like: str = ""
    deep: bool = False
    share: float = 1.0
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = f"{self.group}_{self.variant}_{self.block}_seed{self.seed}".lower()
        return "".join(c if c.isalnum() or c in "._" else "-" for c in words).replace("--", "-")

    def units(self, base: Size) -> float:
        """The work, where the base cell's is 1."""
        return self.share * self.size.cost(self.deep) / base.cost()


def _compared(size: Size, seeds: list[int], rates: tuple[float, ...]) -> Iterator[Cell]:
    middle, edges = rates[:5], rates[5:]
    pairs = [seeds[:1], seeds[1:2]]
    order = [(s, middle) for s in pairs] + [(s, edges) for s in pairs] + [([s], rates) for s in seeds[2:]]
    for some, of in order:
        for seed in some:
            for rate in of:
                for name in COMPARED:
                    yield Cell("E2", name, f"rate {rate:g}", seed, size, {"norm_placement": name}, rate)


def _deep(size: Size, seeds: list[int]) -> Iterator[Cell]:
    for seed in seeds:
        for variant, (like, model) in DEEP.items():
            yield Cell("E1", variant, "deep", seed, size, model, like=like, deep=True)


def _residual_steps(size: Size, seeds: list[int]) -> Iterator[Cell]:
    for seed in seeds:
        for block, step in STEPS.items():
            for name in ("pre", "peri"):
                model = {"norm_placement": name, "residual_scale": step}
                yield Cell("E4", name, block, seed, size, model, like=name)


def _switched(size: Size, seeds: list[int]) -> Iterator[Cell]:
    for seed in seeds:
        for block, changes in SWITCHES.items():
            for name in ("pre", "peri"):
                yield Cell("E3", name, block, seed, size, {"norm_placement": name}, like=name, changes=changes)


def _larger(size: Size, seeds: list[int]) -> Iterator[Cell]:
    above = larger(size)
    bigger = [("size x2", above, 1.0)] if above else []
    for seed in seeds:
        for block, of, share in (("tokens x2", size, 2.0), *bigger, ("tokens x4", size, 4.0)):
            for name in COMPARED:
                yield Cell("E5", name, block, seed, of, {"norm_placement": name}, like=name, share=share)


def cells_of(size: Size, seeds: int, others: int, rates: int, groups: list[str]) -> list[Cell]:
    """The cells of a design, most informative first: every group at its first seeds, then the further seeds."""
    scan, numbers = RATES[:rates], list(range(1, seeds + 1))
    made = {
        "E2": list(_compared(size, numbers, scan)),
        "E1": list(_deep(size, numbers[:others])),
        "E4": list(_residual_steps(size, numbers[:others])),
        "E3": list(_switched(size, numbers[:others])),
        "E5": list(_larger(size, numbers[:others])),
    }
    kept = [cell for group, cells in made.items() if group in groups or group == "E2" for cell in cells]
    return sorted(kept, key=lambda cell: cell.seed > FIRST_ROUND)


@dataclass(frozen=True)
class Design:
    """What was chosen.

    Attributes:
        steps: of the base cell.
        seconds: of each cell, by name, at the rate that was assumed.
    """

    size: Size
    seeds: int
    cells: list[Cell]
    steps: int
    seconds: dict[str, float]
    spare: float

    def steps_of(self, cell: Cell) -> int:
        """The steps of a cell, a multiple of four."""
        per_step = cell.size.step_tokens / self.size.step_tokens
        return max(1, round(self.steps * cell.share / per_step / STEPS_OF_TWO)) * STEPS_OF_TWO

    def tokens_of(self, cell: Cell) -> int:
        return self.steps_of(cell) * cell.size.step_tokens


def _fixed(cells: list[Cell], device: str) -> float:
    return sum(OVERHEAD[device] + INSIDE.get(cell.group, 0.0) for cell in cells)


def choose(
    seconds: float, tokens_per_second: float, at: Size, device: str, groups: list[str], size: Size | None = None
) -> Design:
    """The richest design that the budget allows, and the largest size that it trains on enough tokens.

    Args:
        seconds: core or GPU seconds in all.
        tokens_per_second: of one core or GPU, at the size `at`.
        size: the size asked for; None: chosen.

    Raises:
        UsageError: the budget is too small for the smallest design.
    """
    speed = tokens_per_second * at.cost()  # as FLOPs
    options = [size] if size else SIZES[[s.name for s in SIZES].index(SMALLEST) :]
    found = None
    for seeds, others, rates in DESIGNS:
        if seeds > MOST_SEEDS[device]:
            continue
        for candidate in options:
            cells = cells_of(candidate, seeds, others, rates, groups)
            left = seconds - _fixed(cells, device)
            base = left / sum(cell.units(candidate) for cell in cells)  # seconds of a base cell
            steps = base * speed / candidate.cost() / candidate.step_tokens
            enough = PER_PARAMETER * candidate.parameters() / candidate.step_tokens
            first = candidate is options[0]
            if steps >= (ENOUGH_STEPS if first else max(ENOUGH_STEPS, enough)):
                found = (candidate, seeds, cells, steps)
        if found:
            break
        last = (options[0], seeds, cells_of(options[0], seeds, others, rates, groups))
    if not found:
        candidate, seeds, cells = last
        units = sum(cell.units(candidate) for cell in cells)
        per_step = candidate.step_tokens * candidate.cost() / speed
        steps = (seconds - _fixed(cells, device)) / units / per_step
        if steps < FEWEST_STEPS:
            least = _fixed(cells, device) + units * FEWEST_STEPS * per_step
            raise UsageError(
                f"--budget is too small: the smallest study of size {candidate.name} takes about {least / 60:.0f} "
                f"minutes of one {'core' if device == 'cpu' else 'GPU'} here, and {seconds / 60:.0f} were given"
            )
        found = (candidate, seeds, cells, steps)
    return _designed(*found, speed, seconds, device)


def _designed(
    size: Size, seeds: int, cells: list[Cell], steps: float, speed: float, seconds: float, device: str
) -> Design:
    whole = max(STEPS_OF_TWO, math.floor(steps / STEPS_OF_TWO) * STEPS_OF_TWO)
    design = Design(size, seeds, cells, whole, {}, 0.0)
    for cell in cells:
        work = design.tokens_of(cell) * cell.size.cost(cell.deep) / speed
        design.seconds[cell.name] = work + OVERHEAD[device] + INSIDE.get(cell.group, 0.0)
    return replace(design, spare=seconds - sum(design.seconds.values()))


def size_for(name: str | None, device: str) -> Size:
    """The size that a stated rate is of: the one named, else the smallest that is chosen from."""
    return size_of(name or (SMALLEST if device == "cpu" else "400M"))
