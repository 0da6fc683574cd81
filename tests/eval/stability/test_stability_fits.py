"""Constant, linear, exponential: the planted law is the one that is found."""

import math

import numpy as np
import pandas as pd
import pytest

from periln.eval.stability.fits import fit_growth
from periln.eval.stability.verdict import _growth

DEPTH = np.arange(25)


@pytest.mark.parametrize(
    ("law", "y"),
    [
        ("constant", 1.0 + 0.05 * np.sin(DEPTH)),
        ("linear", 1.0 + 2.0 * DEPTH),
        ("exponential", 0.5 * np.exp(0.3 * DEPTH)),
    ],
)
def test_the_planted_law_fits_best(law, y):
    fit = fit_growth(DEPTH, y)
    assert fit["best"] == law
    if law != "constant":
        assert fit[law]["r2"] == pytest.approx(1.0, abs=1e-9)
        other = "linear" if law == "exponential" else "exponential"
        assert fit[other]["r2"] < 0.99
    assert fit["constant"]["r2"] == pytest.approx(0.0, abs=1e-12)


def test_the_fitted_numbers_are_those_of_the_law():
    linear = fit_growth(DEPTH, 3.0 + 2.0 * DEPTH)["linear"]
    assert (linear["intercept"], linear["slope"]) == pytest.approx((3.0, 2.0))
    exponential = fit_growth(DEPTH, 0.5 * np.exp(0.3 * DEPTH))["exponential"]
    assert (exponential["factor"], exponential["rate"]) == pytest.approx((0.5, 0.3))


def test_what_cannot_be_fitted_is_left_open():
    assert fit_growth([0, 1], [1.0, 2.0])["best"] is None
    assert fit_growth(DEPTH, -1.0 - DEPTH)["best"] is None
    y = 1.0 + 2.0 * DEPTH
    y[3] = math.nan
    assert fit_growth(DEPTH, y)["best"] == "linear"


def test_a_poor_fit_is_not_called_a_description():
    rows = [(0, layer, "embedding" if layer == 0 else "mlp", "stream", "variance") for layer in range(6)]
    for values, said in (
        ([1, 9, 8, 9, 8, 9], "neither linear nor exponential"),
        ([1, 3, 5, 7, 9, 11], "called linear"),
    ):
        table = pd.DataFrame(
            [(*row, value) for row, value in zip(rows, values, strict=True)],
            columns=["step", "layer", "sublayer", "tensor", "stat", "value"],
        )
        assert said in _growth({"fits": {"variance": fit_growth(range(6), values)}}, table)
