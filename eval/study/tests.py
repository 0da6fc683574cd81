"""The tests that claims name: each takes a part of a claim and the results, and gives an outcome."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from periln.eval.study.measures import MEASURES, Cell, stream_variance
from periln.eval.study.statistics import (
    Estimate,
    depth_form,
    difference_of,
    equivalence,
    half_rate,
    holm,
    pooled_estimates,
    sensitivity,
    share,
    t_estimate,
    variance_ratio,
)

Part = dict[str, Any]
NONE = Estimate(math.nan, math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Outcome:
    """What a test found.

    Attributes:
        estimate: effect, interval, p, and pairs or runs.
        favours: 1 where the effect is on the claim's side, -1 against it, 0 where neither can be said.
        unit: of the effect.
        seeds: those that it rests on.
        details: lines for the report.
        certain: one case decides, whatever p is (a counterexample).
    """

    estimate: Estimate
    favours: int
    unit: str
    seeds: tuple[int, ...] = ()
    details: tuple[str, ...] = ()
    certain: bool = False


class Results:
    """The cells' results, and how a part of a claim selects among them."""

    def __init__(self, cells: list[Cell], best: dict[str, float | None]):
        self.cells, self.best = cells, best

    def of(self, where: dict[str, Any]) -> list[Cell]:
        """Cells whose fields have the values asked for; block `best`: E2's at the best rate; lists: one of them."""
        found = []
        for cell in self.cells:
            for name, value in where.items():
                if name == "block" and value == "best":
                    ok = cell["rate"] == self.best.get(cell["variant"])
                elif name == "blocks":
                    ok = cell["block"] in value
                else:
                    ok = cell[name] in value if isinstance(value, list) else cell[name] == value
                if not ok:
                    break
            else:
                found.append(cell)
        return found

    def pairs(self, a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Cell, Cell]]:
        """Cells of the same seed and data, and of the same block where the part does not name the blocks."""
        fixed = "block" in a or "block" in b

        def key(cell: Cell) -> tuple:
            return (cell["seed"], cell["data"], "" if fixed else cell["block"])

        others = {key(cell): cell for cell in self.of(b)}
        return sorted(
            ((cell, others[key(cell)]) for cell in self.of(a) if key(cell) in others),
            key=lambda pair: (pair[0]["block"], pair[0]["seed"]),
        )


def _seeds(cells: list[Cell]) -> tuple[int, ...]:
    return tuple(sorted({cell["seed"] for cell in cells}))


def _side(estimate: Estimate, sign: int) -> int:
    """1 where the estimate has the sign wanted, -1 where the opposite."""
    if math.isnan(estimate.value) or estimate.value == 0:
        return 0
    return 1 if (estimate.value > 0) == (sign > 0) else -1


def _differences(results: Results, part: Part) -> tuple[list[float], list[Cell]]:
    measure, _ = MEASURES[part["measure"]]
    values, used = [], []
    for one, other in results.pairs(part["a"], part["b"]):
        x, y = measure(one), measure(other)
        if x is not None and y is not None:
            values.append(x - y)
            used.append(one)
    return values, used


def _lost(results: Results, part: Part) -> tuple[str, ...]:
    """One line where pairs have no difference because a run diverged: what is left are the runs that survived."""
    measure, _ = MEASURES[part["measure"]]
    pairs = results.pairs(part["a"], part["b"])
    ends = [[pair[i] for pair in pairs if pair[i]["status"] == "diverged" and measure(pair[i]) is None] for i in (0, 1)]
    told = [f"{len(of)} of {len(pairs)} runs of {of[0]['variant']} diverged" for of in ends if of]
    return (f"{' and '.join(told)}: a pair with one has no difference",) if told else ()


def less(results: Results, part: Part) -> Outcome:
    """a below b: paired differences, their mean with a t interval. Of several blocks, a seed's mean over its blocks."""
    values, used = _differences(results, part)
    by_seed: dict[int, list[float]] = {}
    for value, cell in zip(values, used, strict=True):
        by_seed.setdefault(cell["seed"], []).append(value)
    estimate = t_estimate([float(np.mean(of)) for of in by_seed.values()])
    seeds, lost = tuple(sorted(by_seed)), _lost(results, part)
    return Outcome(estimate, _side(estimate, -1), MEASURES[part["measure"]][1], seeds, lost)


def gap(results: Results, part: Part) -> Outcome:
    """The size of a - b below that of `than`'s, seed by seed."""
    near, used = _differences(results, part)
    far, others = _differences(results, part | part["than"])
    beside = {cell["seed"]: value for cell, value in zip(others, far, strict=True)}
    pairs = [
        (c["seed"], abs(v) - abs(beside[c["seed"]])) for c, v in zip(used, near, strict=True) if c["seed"] in beside
    ]
    estimate = t_estimate([value for _, value in pairs])
    seeds, lost = tuple(seed for seed, _ in pairs), _lost(results, part) + _lost(results, part | part["than"])
    return Outcome(estimate, _side(estimate, -1), MEASURES[part["measure"]][1], seeds, lost)


def sign(results: Results, part: Part) -> Outcome:
    """The mean of a measure above (1) or below (-1) 0; sign 0: anything but 0."""
    measure, unit = MEASURES[part["measure"]]
    cells = [cell for cell in results.of(part["where"]) if measure(cell) is not None]
    estimate = t_estimate([float(measure(cell) or 0.0) for cell in cells])
    favours = 1 if part["sign"] == 0 and not math.isnan(estimate.value) else _side(estimate, part["sign"])
    return Outcome(estimate, favours, unit, _seeds(cells))


def same(results: Results, part: Part) -> Outcome:
    """|a - b| below the margin: two one-sided tests; against it where the interval lies outside the margin."""
    values, used = _differences(results, part)
    estimate, margin = t_estimate(values), part["margin"]
    lost = _lost(results, part)
    if estimate.n < 2:
        return Outcome(estimate, 0, MEASURES[part["measure"]][1], _seeds(used), lost)
    outside = estimate.low > margin or estimate.high < -margin
    p = t_estimate(values, math.copysign(margin, estimate.value)).p / 2 if outside else equivalence(values, margin)
    return Outcome(replace(estimate, p=p), -1 if outside else 1, MEASURES[part["measure"]][1], _seeds(used), lost)


def form(results: Results, part: Part) -> Outcome:
    """The variance's form over depth at the end is one of those named, in more than half of the runs.

    `most`: the largest exponent that a power may have to count; linear is 1.
    """
    cells = [cell for cell in results.of(part["where"]) if cell["status"] == "completed"]
    fits = [(cell, depth_form(stream_variance(cell, True) or [])) for cell in cells]
    fits = [(cell, fit) for cell, fit in fits if fit["form"] is not None]
    most = part.get("most", math.inf)

    def counts(fit: dict[str, Any]) -> bool:
        return fit["form"] in part["forms"] and (fit["form"] != "power" or fit["exponent"] <= most)

    details = tuple(
        f"seed {cell['seed']}: {fit['form']}, exponent {fit['exponent']:.2f}, rate {fit['rate']:.3f} a layer, "
        f"last over first {fit['growth']:.3g}"
        for cell, fit in fits
    )
    estimate = share(sum(counts(fit) for _, fit in fits), len(fits))
    favours = 0 if not fits or estimate.value == 0.5 else 1 if estimate.value > 0.5 else -1
    return Outcome(estimate, favours, "of runs", _seeds([cell for cell, _ in fits]), details)


def every(results: Results, part: Part) -> Outcome:
    """a below b in every block: by the standard deviation pooled over the blocks, Holm over them.

    The outcome's p is the largest of the blocks' where all favour the claim, else the smallest of those against it,
    adjusted. Pairs of which one run diverged have no difference. Where a block has such pairs alone, and one side's
    runs are those that diverged, it counts for the other side with the p of Fisher's exact test. A block in which both
    runs of every pair diverged says nothing.
    """
    measure, unit = MEASURES[part["measure"]]
    blocks: dict[str, list[float]] = {}
    told, fates, seeds = [], {}, set()
    pairs: dict[str, list[tuple[Cell, Cell]]] = {}
    for one, other in results.pairs(part["a"], part["b"]):
        pairs.setdefault(one["block"], []).append((one, other))
        seeds.add(one["seed"])
    for block, of in pairs.items():
        lost = [sum(pair[i]["status"] == "diverged" for pair in of) for i in (0, 1)]
        if lost == [0, len(of)] or lost == [len(of), 0]:
            p = 2 / math.comb(2 * len(of), len(of))  # Fisher's exact test, n of n against 0 of n
            fates[block] = Estimate(math.inf if lost[0] else -math.inf, math.nan, math.nan, p, len(of))
            told.append(f"{block}: every run of {of[0][lost[0] == 0]['variant']} diverged, none of the other's")
            continue
        values = [(measure(a), measure(b)) for a, b in of]
        whole = [x - y for x, y in values if x is not None and y is not None]
        if whole:
            blocks[block] = whole
        if any(lost):
            told.append(f"{block}: {lost[0]} and {lost[1]} of {len(of)} runs diverged")
    estimates = dict(zip(blocks, pooled_estimates(list(blocks.values())), strict=True))
    lines = [f"{b}: {e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}], {e.n} pairs" for b, e in estimates.items()]
    estimates |= fates
    ps = dict(zip(estimates, holm([e.p for e in estimates.values()]), strict=True))
    if not estimates:
        return Outcome(NONE, 0, unit, tuple(sorted(seeds)), tuple(told))
    against = [b for b, e in estimates.items() if e.value >= 0]
    if against:
        chosen = min(against, key=lambda b: (math.isnan(ps[b]), ps[b]))
        found = replace(estimates[chosen], p=ps[chosen])
        return Outcome(found, -1, f"{unit} ({chosen})", tuple(sorted(seeds)), (*lines, *told))
    chosen = max(ps, key=lambda b: (math.isnan(ps[b]), ps[b]))
    p = max(ps.values()) if not any(map(math.isnan, ps.values())) else math.nan
    return Outcome(replace(estimates[chosen], p=p), 1, f"{unit} ({chosen})", tuple(sorted(seeds)), (*lines, *told))


def _scans(cells: list[Cell]) -> dict[tuple[int, str], dict[float, Cell]]:
    found: dict[tuple[int, str], dict[float, Cell]] = {}
    for cell in cells:
        found.setdefault((cell["seed"], cell["data"]), {})[cell["rate"]] = cell
    return found


def _scan_differences(results: Results, part: Part, of: Callable[[list[Cell]], float | None], unit: str) -> Outcome:
    """A number of a whole scan of rates: a's minus b's, over the rates that both have, seed by seed."""
    ones, others = _scans(results.of(part["a"])), _scans(results.of(part["b"]))
    values, seeds = [], []
    for key in sorted(ones.keys() & others.keys()):
        rates = sorted(ones[key].keys() & others[key].keys())
        x, y = (of([scan[key][rate] for rate in rates]) for scan in (ones, others))
        if len(rates) >= 3 and x is not None and y is not None:
            values.append(x - y)
            seeds.append(key[0])
    estimate = t_estimate(values)
    return Outcome(estimate, _side(estimate, -1), unit, tuple(seeds))


def lr_sensitivity(results: Results, part: Part) -> Outcome:
    """a's learning-rate sensitivity (2309.14322) below b's, over the rates that both have, seed by seed."""

    def of(cells: list[Cell]) -> float | None:
        starts = [cell["initial_loss"] for cell in cells if cell["initial_loss"] is not None]
        return sensitivity({c["rate"]: c["heldout_loss"] for c in cells}, max(starts)) if starts else None

    return _scan_differences(results, part, of, "nats a token")


def best_rate(results: Results, part: Part) -> Outcome:
    """log10 of a's best rate below b's, seed by seed."""

    def of(cells: list[Cell]) -> float | None:
        alive = [cell for cell in cells if cell["heldout_loss"] is not None]
        return math.log10(min(alive, key=lambda cell: (cell["heldout_loss"], cell["rate"]))["rate"]) if alive else None

    return _scan_differences(results, part, of, "decades of the rate")


def half_rates(results: Results, part: Part) -> Outcome:
    """The rate at which half of a's runs diverge above b's: logistic fits, in decades."""
    cells = [results.of(part[side]) for side in ("a", "b")]
    fits = [half_rate([c["rate"] for c in of], [c["status"] == "diverged" for c in of]) for of in cells]
    estimate = difference_of(*fits)
    lines = tuple(
        f"{of[0]['variant']}: 10^{fit.value:.2f} [10^{fit.low:.2f}, 10^{fit.high:.2f}] of {fit.n} runs"
        for of, fit in zip(cells, fits, strict=True)
        if of
    )
    return Outcome(estimate, _side(estimate, 1), "decades of the rate", _seeds(cells[0] + cells[1]), lines)


def never(results: Results, part: Part) -> Outcome:
    """No cell has it: one that has it decides against the claim; n without have p = 0.5^n."""
    measure, unit = MEASURES[part["measure"]]
    cells = [cell for cell in results.of(part["where"]) if measure(cell) is not None]
    bad = [cell["cell"] for cell in cells if measure(cell)]
    estimate = share(len(bad), len(cells))
    if not cells:
        return Outcome(NONE, 0, unit)
    if bad:
        return Outcome(estimate, -1, unit, _seeds(cells), tuple(bad[:5]), certain=True)
    return Outcome(replace(estimate, p=0.5 ** len(cells)), 1, unit, _seeds(cells))


def ever(results: Results, part: Part) -> Outcome:
    """Some cell has it: one decides for the claim; n without have p = 0.5^n against it."""
    found = never(results, part)
    return replace(found, favours=-found.favours)


def spread(results: Results, part: Part) -> Outcome:
    """a's variance between seeds below b's: the F interval of the logarithm of their ratio."""
    measure = MEASURES[part["measure"]][0]
    of = [[cell for cell in results.of(part[side]) if measure(cell) is not None] for side in ("a", "b")]
    estimate = variance_ratio(*([float(measure(cell) or 0.0) for cell in cells] for cells in of))
    return Outcome(estimate, _side(estimate, -1), "log of the ratio of variances", _seeds(of[0]))


TESTS: dict[str, Callable[[Results, Part], Outcome]] = {
    "less": less,
    "gap": gap,
    "sign": sign,
    "same": same,
    "form": form,
    "every": every,
    "sensitivity": lr_sensitivity,
    "best_rate": best_rate,
    "half_rate": half_rates,
    "never": never,
    "ever": ever,
    "spread": spread,
}
