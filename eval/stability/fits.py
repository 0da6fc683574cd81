"""How a statistic depends on depth or training: constant, linear or exponential, and how well each fits."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

EVEN = 2.0  # a statistic whose largest value is less than twice its smallest is called constant


def _r2(y: np.ndarray, fitted: np.ndarray) -> float:
    """1 - residual over total sum of squares; 0 for data without spread that is fitted no better than by its mean."""
    total = float(((y - y.mean()) ** 2).sum())
    residual = float(((y - fitted) ** 2).sum())
    return 1 - residual / total if total > 0 else 0.0


def _exponential(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """a, b of y = a exp(b x), least squares on y itself, from the fit to log y."""
    slope, intercept = np.polyfit(x, np.log(y), 1)
    start = (math.exp(intercept), slope)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            (a, b), _ = curve_fit(lambda t, a, b: a * np.exp(np.clip(b * t, -300, 300)), x, y, p0=start, maxfev=5000)
        return float(a), float(b)
    except (RuntimeError, ValueError):
        return start


def fit_growth(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Fit y over x as c, as a + b x and as a exp(b x), each by least squares on y, with R^2 of each.

    R^2 of a constant is 0 by its definition, so `spread` (largest over smallest) is given as well. `best` is "constant"
    where the spread is below 2, else the better R^2 of the other two. None where there are fewer than three finite,
    positive values.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    at, values = (np.array([p[i] for p in points], dtype=float) for i in (0, 1))
    if len(values) < 3 or not (values > 0).all():
        return {"constant": None, "linear": None, "exponential": None, "spread": None, "best": None}
    slope, intercept = np.polyfit(at, values, 1)
    a, b = _exponential(at, values)
    with np.errstate(over="ignore"):
        exponential = a * np.exp(np.clip(b * at, -300, 300))
    linear = {"intercept": float(intercept), "slope": float(slope), "r2": _r2(values, intercept + slope * at)}
    curved = {"factor": a, "rate": b, "r2": _r2(values, exponential)}
    spread = float(values.max() / values.min())
    best = "constant" if spread < EVEN else "linear" if linear["r2"] >= curved["r2"] else "exponential"
    return {
        "constant": {"value": float(values.mean()), "r2": _r2(values, np.full_like(values, values.mean()))},
        "linear": linear,
        "exponential": curved,
        "spread": spread,
        "best": best,
    }
