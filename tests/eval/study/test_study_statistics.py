"""The study's statistics against SciPy, against hand values, and at their edges."""

import math

import numpy as np
import pytest
from scipy import stats

from periln.eval.study import statistics as s

VALUES = [0.31, -0.12, 0.44, 0.27, 0.05]


def test_a_t_estimate_is_scipys():
    found, expected = s.t_estimate(VALUES), stats.ttest_1samp(VALUES, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert (found.value, found.low, found.high, found.p) == pytest.approx((np.mean(VALUES), low, high, expected.pvalue))
    assert math.isnan(s.t_estimate([1.0]).p) and s.t_estimate([1.0]).n == 1


def test_pooled_estimates_take_the_spread_of_all_blocks():
    blocks = [[1.0, 3.0], [10.0, 14.0, 12.0]]
    pooled = math.sqrt((2.0 + 8.0) / 3)  # sums of squares 2 and 8, one and two degrees of freedom
    first, second = s.pooled_estimates(blocks)
    assert first.high - first.value == pytest.approx(stats.t.ppf(0.975, 3) * pooled / math.sqrt(2))
    assert second.p == pytest.approx(2 * stats.t.sf(12.0 / (pooled / math.sqrt(3)), 3))


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    below = stats.ttest_1samp(VALUES, -0.5, alternative="greater").pvalue
    above = stats.ttest_1samp(VALUES, 0.5, alternative="less").pvalue
    assert s.equivalence(VALUES, 0.5) == pytest.approx(max(below, above))
    assert s.equivalence(VALUES, 0.1) > 0.5


@pytest.mark.parametrize(("k", "n"), [(0, 6), (5, 6), (6, 6), (3, 7)])
def test_a_share_has_the_exact_interval(k, n):
    found, expected = s.share(k, n), stats.binomtest(k, n, 0.5)
    interval = expected.proportion_ci(0.95, "exact")
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert s.holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([2.0**layer for layer in range(16)], "exponential"),
        ([3.0 * layer for layer in range(1, 17)], "power"),
        ([1.0 + 0.02 * (-1) ** layer for layer in range(16)], "constant"),
    ],
)
def test_the_form_over_depth(values, form):
    rng = np.random.default_rng(0)
    noisy = [[value * math.exp(0.05 * rng.normal()) for value in values] for _ in range(40)]
    assert s.depth_form(values)["form"] == form
    # A constant is taken for a slope now and then: a criterion is no test.
    assert sum(s.depth_form(some)["form"] == form for some in noisy) >= 30


def test_the_form_gives_exponent_and_rate():
    assert s.depth_form([3.0 * layer for layer in range(1, 17)])["exponent"] == pytest.approx(1.0)
    assert s.depth_form([2.0**layer for layer in range(16)])["rate"] == pytest.approx(math.log(2))
    assert s.depth_form([1.0, 2.0, 3.0])["form"] is None
    assert s.depth_form([1.0, 2.0, None, 4.0, 5.0, 6.0, 7.0])["form"] is None


def test_aicc_by_hand():
    residuals = np.array([1.0, -1.0] * 5)
    assert s.aicc(residuals, 2) == pytest.approx(10 * math.log(1.0) + 4 + 2 * 2 * 3 / 7)
    assert s.aicc(residuals[:3], 2) == math.inf


def test_sensitivity_counts_a_diverged_run_as_the_loss_at_the_start():
    losses = {0.001: 3.0, 0.01: 2.0, 0.1: None, 0.3: 9.0}
    assert s.sensitivity(losses, 5.0) == pytest.approx((3 + 2 + 5 + 5) / 4 - 2)


def test_the_rate_at_which_half_diverge():
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3] * 5
    lost = [False, False, False, False, True, True] * 5
    found = s.half_rate(rates, lost)
    assert math.log10(0.03) < found.value < math.log10(0.1)
    assert found.low < found.value < found.high and math.isfinite(found.low)
    fewer = s.half_rate(rates[:6], lost[:6])
    assert fewer.high - fewer.low > found.high - found.low
    assert s.half_rate(rates, [False] * 30).value == math.inf
    assert s.half_rate(rates, [True] * 30).value == -math.inf


def test_the_difference_of_two_estimates_by_hand():
    a, b = s.Estimate(3.0, 2.0, 5.0, math.nan, 9), s.Estimate(1.0, 0.5, 1.5, math.nan, 9)
    found = s.difference_of(a, b)
    assert (found.low, found.high) == pytest.approx((2 - math.hypot(1, 0.5), 2 + math.hypot(2, 0.5)))


def test_the_ratio_of_variances_is_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=8), 2 * rng.normal(size=8)
    found = s.variance_ratio(list(a), list(b))
    ratio = np.var(a, ddof=1) / np.var(b, ddof=1)
    assert found.value == pytest.approx(math.log(ratio))
    assert found.p == pytest.approx(2 * min(stats.f.cdf(ratio, 7, 7), stats.f.sf(ratio, 7, 7)))
