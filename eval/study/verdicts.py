"""From results to verdicts: every part of every claim tested, Holm over all of them, a line each."""

import math
from dataclasses import dataclass
from typing import Any

from periln.eval.study.measures import MEASURES
from periln.eval.study.statistics import holm
from periln.eval.study.tests import TESTS, Outcome, Results
from periln.runkit.errors import UserError

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
UNTESTABLE = "not testable here"
POWER = 1.959964 + 0.841621  # normal quantiles of a two-sided 5 % and of 80 % power


@dataclass(frozen=True)
class PartVerdict:
    """One part of a claim."""

    words: str
    verdict: str
    outcome: Outcome | None
    adjusted: float

    def record(self) -> dict[str, Any]:
        """As verdicts.json has it."""
        head: dict[str, Any] = {"words": self.words, "verdict": self.verdict}
        if self.outcome is None:
            return head
        e = self.outcome.estimate
        numbers = {"effect": e.value, "low": e.low, "high": e.high, "p": e.p, "p_holm": self.adjusted}
        rounded = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in numbers.items()}
        more = {"unit": self.outcome.unit, "n": e.n, "seeds": list(self.outcome.seeds)}
        return head | rounded | more | {"details": list(self.outcome.details)}


@dataclass(frozen=True)
class Verdict:
    """A claim's: the parts', and what would change it."""

    name: str
    words: str
    verdict: str
    figure: str | None
    parts: tuple[PartVerdict, ...]
    change: str

    def record(self) -> dict[str, Any]:
        head = {"claim": self.name, "words": self.words, "verdict": self.verdict, "figure": self.figure}
        return head | {"parts": [part.record() for part in self.parts], "what_would_change_it": self.change}


def check_claims(claims: dict[str, Any]) -> None:
    """Raise UserError for a claim that names a test or a measure that there is not."""
    for name, claim in claims["claims"].items():
        for part in claim["parts"]:
            if part["test"] not in TESTS or part.get("measure", "loss") not in MEASURES:
                raise UserError(f"claims.yaml, {name}: unknown test or measure {part['test']}, {part.get('measure')}")


def _part_verdict(outcome: Outcome, adjusted: float, alpha: float) -> str:
    if outcome.favours == 0 or (math.isnan(adjusted) and not outcome.certain):
        return UNDECIDED
    if not outcome.certain and adjusted >= alpha:
        return UNDECIDED
    return SUPPORTED if outcome.favours > 0 else CONTRADICTED


def judge(claims: dict[str, Any], results: Results) -> list[Verdict]:
    """The verdict on every claim."""
    check_claims(claims)
    found: list[tuple[str, dict[str, Any], Outcome]] = []
    for name, claim in claims["claims"].items():
        if not claim.get("untestable"):
            found += [(name, part, TESTS[part["test"]](results, part)) for part in claim["parts"]]
    adjusted = holm([outcome.estimate.p for _, _, outcome in found])
    verdicts = []
    for name, claim in claims["claims"].items():
        if claim.get("untestable"):
            why = f"It {claim['untestable']}."
            verdicts.append(Verdict(name, claim["words"], UNTESTABLE, None, (), why))
            continue
        parts = tuple(
            PartVerdict(part["words"], _part_verdict(outcome, p, claims["alpha"]), outcome, p)
            for (of, part, outcome), p in zip(found, adjusted, strict=True)
            if of == name
        )
        kinds = {part.verdict for part in parts}
        whole = CONTRADICTED if CONTRADICTED in kinds else SUPPORTED if kinds == {SUPPORTED} else UNDECIDED
        verdicts.append(Verdict(name, claim["words"], whole, claim.get("figure"), parts, _change(parts, whole)))
    return verdicts


def _change(parts: tuple[PartVerdict, ...], whole: str) -> str:
    """What would change the verdict, in words."""
    if whole == SUPPORTED:
        return "A part whose interval lies on the other side of 0, or a counterexample where none was found."
    if whole == CONTRADICTED:
        against = [part.words for part in parts if part.verdict == CONTRADICTED]
        return f"The opposite sign, or no counterexample, in: {'; '.join(against)}."
    said = []
    for part in parts:
        if part.verdict == UNDECIDED and part.outcome is not None:
            said.append(f"{part.words}: {_needed(part.outcome)}")
    return "; ".join(said) + "." if said else "More seeds."


def _needed(outcome: Outcome) -> str:
    e = outcome.estimate
    if e.n == 0:
        return "runs that do not diverge" if outcome.details else "no run of it yet"
    if e.n < 2 or not math.isfinite(e.value) or not (math.isfinite(e.low) and math.isfinite(e.high)):
        return (
            "two pairs at least, for an interval" if e.n < 2 else "rates at which some runs diverge and others do not"
        )
    if not outcome.unit.startswith("of ") and e.value != 0:
        from scipy.special import stdtrit

        deviation = (e.high - e.low) / 2 / float(stdtrit(e.n - 1, 0.975)) * math.sqrt(e.n)
        pairs = max(3, math.ceil((POWER * deviation / abs(e.value)) ** 2) + 2)
        more = f"about {pairs} pairs, were the difference as it is now" if pairs <= 1000 else "more than 1,000 pairs"
        return f"{more} (it has {e.n})"
    return f"more than the {e.n} runs it has"
