"""The study's statistics. Each takes plain numbers and gives plain numbers; none draws at random."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import betaincinv, expit, stdtr, stdtrit
from scipy.stats import binomtest

FORMS = ("constant", "power", "exponential")
LEAST_POINTS = 6  # for AICc of three parameters (two of the form, and the variance)


@dataclass(frozen=True)
class Estimate:
    """A mean or share with its 95 % interval, two-sided p against the null, and how many numbers it rests on."""

    value: float
    low: float
    high: float
    p: float
    n: int


# --- depth ---------------------------------------------------------------------------------------------------
def aicc(residuals: np.ndarray, parameters: int) -> float:
    """Akaike's criterion for least squares, corrected for few points (Hurvich and Tsai, 1989).

    `parameters` counts the error's variance. inf where the points do not suffice.
    """
    n = len(residuals)
    if n <= parameters + 1:
        return math.inf
    mean_square = max(float((residuals**2).mean()), 1e-12)  # a perfect fit: no form beats another by rounding
    return n * math.log(mean_square) + 2 * parameters + 2 * parameters * (parameters + 1) / (n - parameters - 1)


def depth_form(values: Sequence[float | None]) -> dict[str, float | str | None]:
    """How a positive statistic goes with the layer, by AICc of fits to its logarithm.

    log v = a (constant), a + b log(l) (power: b is its exponent; 1 is linear) or a + b l (exponential: b is its rate
    a layer), l from 1. The embedding is left out by the caller.

    Returns:
        form, and for each form `aicc_FORM`; exponent, rate, and growth (last over first). form None: too few points,
        or one that is not positive.
    """
    if len(values) < LEAST_POINTS or any(v is None or not math.isfinite(v) or v <= 0 for v in values):
        return {"form": None, "exponent": None, "rate": None, "growth": None}
    y = np.log(np.array(values, dtype=float))
    layer = np.arange(1, len(y) + 1, dtype=float)
    found: dict[str, float | str | None] = {"aicc_constant": aicc(y - y.mean(), 2)}
    for form, x, name in (("power", np.log(layer), "exponent"), ("exponential", layer, "rate")):
        slope, intercept = np.polyfit(x, y, 1)
        found[f"aicc_{form}"] = aicc(y - intercept - slope * x, 3)
        found[name] = float(slope)
    found["form"] = min(FORMS, key=lambda form: float(found[f"aicc_{form}"] or 0.0))
    return found | {"growth": float(math.exp(y[-1] - y[0]))}


def log_slope(values: Sequence[float | None]) -> float | None:
    """Slope of log(value) over the layer, a layer; None with fewer than three positive values."""
    points = [(i, math.log(v)) for i, v in enumerate(values, start=1) if v is not None and math.isfinite(v) and v > 0]
    if len(points) < 3:
        return None
    layers, logs = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    return float(np.polyfit(layers, logs, 1)[0])


def log_spread(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation of log(value) over the layers; None with fewer than two positive values."""
    logs = [math.log(v) for v in values if v is not None and math.isfinite(v) and v > 0]
    return float(np.std(logs, ddof=1)) if len(logs) >= 2 else None


# --- pairs ---------------------------------------------------------------------------------------------------
def t_estimate(values: Sequence[float], null: float = 0.0) -> Estimate:
    """Mean with its t interval, and the two-sided p of `null`; NaN for fewer than two values."""
    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return _t(mean, error, n - 1, null, n)


def _t(mean: float, error: float, df: int, null: float, n: int) -> Estimate:
    half = float(stdtrit(df, 0.975)) * error
    if error == 0:
        return Estimate(mean, mean, mean, 1.0 if mean == null else 0.0, n)
    return Estimate(mean, mean - half, mean + half, 2 * float(stdtr(df, -abs(mean - null) / error)), n)


def pooled_estimates(blocks: Sequence[Sequence[float]]) -> list[Estimate]:
    """For each block of differences its mean with a t interval, by the standard deviation pooled over all blocks.

    Few seeds at each of many rates: the pooled variance has the sum of the blocks' degrees of freedom.
    """
    df = sum(len(block) - 1 for block in blocks if len(block))
    if df < 1:
        return [
            Estimate(float(np.mean(b)) if len(b) else math.nan, math.nan, math.nan, math.nan, len(b)) for b in blocks
        ]
    squares = sum(float(((np.array(b) - np.mean(b)) ** 2).sum()) for b in blocks if len(b))
    deviation = math.sqrt(squares / df)
    empty = Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    return [_t(float(np.mean(b)), deviation / math.sqrt(len(b)), df, 0.0, len(b)) if len(b) else empty for b in blocks]


def equivalence(values: Sequence[float], margin: float) -> float:
    """p of two one-sided t tests (TOST): that the mean lies within (-margin, margin); NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    error, mean = float(np.std(values, ddof=1)) / math.sqrt(n), float(np.mean(values))
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    return float(stdtr(n - 1, (abs(mean) - margin) / error))


def share(successes: int, n: int, null: float = 0.5) -> Estimate:
    """A share with its Clopper-Pearson interval and the exact two-sided p of `null`."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, 0.025))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 0.975))
    return Estimate(successes / n, low, high, float(binomtest(successes, n, null).pvalue), n)


def variance_ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """log of var(a) / var(b) with its F interval, and the two-sided p that it is 0; NaN for fewer than two each."""
    from scipy.stats import f

    n, m = len(a), len(b)
    if n < 2 or m < 2 or np.var(a) == 0 or np.var(b) == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, min(n, m))
    ratio = float(np.var(a, ddof=1) / np.var(b, ddof=1))
    low, high = (math.log(ratio / float(f.ppf(q, n - 1, m - 1))) for q in (0.975, 0.025))
    tail = float(f.cdf(ratio, n - 1, m - 1))
    return Estimate(math.log(ratio), low, high, 2 * min(tail, 1 - tail), min(n, m))


# --- learning rates --------------------------------------------------------------------------------------------
def sensitivity(losses: dict[float, float | None], initial: float) -> float | None:
    """Learning-rate sensitivity (Wortsman et al., 2309.14322, section 2.2): mean over rates of min(l(rate), l0) - l*.

    l* is the lowest loss of all, l0 the loss at initialization, which is that of a diverged run (None).
    """
    values = [min(x, initial) if x is not None else initial for x in losses.values()]
    return float(np.mean(values) - min(values)) if values else None


def half_rate(rates: Sequence[float], diverged: Sequence[bool]) -> Estimate:
    """log10 of the rate at which half of the runs diverge, with its 95 % profile likelihood interval.

    Logistic regression of divergence on log10(rate), penalized as Firth (1993) does with the square root of the
    information's determinant: finite where every rate diverges always or never. The slope is at least 0. An end of
    the interval that lies beyond two decades outside the rates is infinite. `p` is NaN; n is the number of runs.
    """
    x, y = np.log10(np.array(rates, dtype=float)), np.array(diverged, dtype=float)
    nothing = Estimate(math.nan, -math.inf, math.inf, math.nan, len(x))
    if len(x) < 3 or len(np.unique(x)) < 2:
        return nothing
    if not y.any():
        return Estimate(math.inf, float(x.max()), math.inf, math.nan, len(x))
    if y.all():
        return Estimate(-math.inf, -math.inf, float(x.min()), math.nan, len(x))
    reach = (float(x.min()) - 2, float(x.max()) + 2)

    def loss(middle: float, steep: float) -> float:
        z = np.exp(steep) * (x - middle)
        p = expit(z)
        weight = p * (1 - p)
        likelihood = -np.logaddexp(0, -z) @ y - np.logaddexp(0, z) @ (1 - y)
        s0, s1, s2 = weight.sum(), weight @ x, weight @ x**2
        information = max(float(s0 * s2 - s1 * s1), 1e-300)
        return float(-likelihood - 0.5 * math.log(information))

    def profile(middle: float) -> float:
        grid = np.linspace(-1.5, 4.0, 23)
        at = min(grid, key=lambda steep: loss(middle, steep))
        found = minimize(lambda v: loss(middle, float(np.clip(v[0], -1.5, 4.0))), [at], method="Nelder-Mead")
        return float(found.fun)

    middles = np.linspace(*reach, 81)
    profiles = np.array([profile(m) for m in middles])
    best = int(profiles.argmin())
    near = np.linspace(middles[max(best - 1, 0)], middles[min(best + 1, 80)], 21)
    middle = float(min(near, key=profile))
    limit = profile(middle) + 1.920729  # half of chi-squared's 95 % quantile

    def end(side: np.ndarray, outer: float) -> float:
        over = next((m for m in side if profile(m) > limit), None)
        return outer if over is None else float(brentq(lambda m: profile(m) - limit, middle, over, xtol=1e-4))

    low = end(middles[middles < middle][::-1], -math.inf)
    high = end(middles[middles > middle], math.inf)
    return Estimate(middle, low, high, math.nan, len(x))


def difference_of(a: Estimate, b: Estimate) -> Estimate:
    """a - b of independent estimates, by the method of variance estimates recovery (Zou and Donner, 2008).

    `p` follows from the half of the interval on the side of 0, as of a normal distribution.
    """
    if not (math.isfinite(a.value) and math.isfinite(b.value)):
        low, high = a.low - b.high, a.high - b.low
        value = a.value - b.value if not (math.isinf(a.value) and math.isinf(b.value)) else math.nan
        return Estimate(value, low, high, math.nan, min(a.n, b.n))
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    half = value - low if value > 0 else high - value
    p = math.erfc(abs(value) / (half / 1.959964) / math.sqrt(2)) if half > 0 and math.isfinite(half) else math.nan
    return Estimate(value, low, high, p, min(a.n, b.n))


# --- many at once ------------------------------------------------------------------------------------------------
def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays NaN and counts for nothing."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, largest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
