import numpy as np
import pytest

from analysis.stats import SMALL_N, Estimate, estimate, paired_difference, student


def test_mean_and_standard_deviation_by_hand():
    found = estimate([90.0, 91.0, 95.0])
    assert found.n == 3
    assert found.mean == pytest.approx(92.0)
    assert found.sd == pytest.approx(7**0.5)  # (4 + 1 + 9) / (3 - 1)


def test_the_interval_of_two_values_is_their_range():
    found = estimate([1.0, 3.0])  # resampled means: 1 and 3 in a quarter of all cases each, else 2
    assert (found.low, found.high) == (1.0, 3.0)


def test_the_interval_is_the_2_5_and_97_5_percentile_of_resampled_means():
    values = [0.0] * 50 + [1.0] * 50  # resampled means: binomial, 0.5 +- 1.96 * 0.05
    found = estimate(values)
    assert found.low == pytest.approx(0.40, abs=0.011)
    assert found.high == pytest.approx(0.60, abs=0.011)


def test_equal_values_have_a_point_for_an_interval():
    assert estimate([92.5] * 4) == Estimate(4, 92.5, 0.0, 92.5, 92.5)


def test_one_value_has_neither_spread_nor_interval_and_none_no_estimate():
    assert estimate([92.0]) == Estimate(1, 92.0, None, None, None)
    assert estimate([]) is None


def test_the_same_values_give_the_same_interval():
    assert estimate([90.0, 91.0, 95.0]) == estimate([90.0, 91.0, 95.0])


def test_paired_difference_by_hand_over_common_seeds_only():
    found = paired_difference({0: 92.0, 1: 93.0, 2: 99.0}, {1: 90.0, 0: 91.0, 7: 1.0})  # +1 and +3
    assert found == Estimate(2, 2.0, pytest.approx(2**0.5), 1.0, 3.0)
    assert paired_difference({0: 92.0}, {1: 90.0}) is None


def test_students_interval_by_hand():
    low, high = student(3, 92.0, 7**0.5)
    assert (low, high) == (pytest.approx(92 - 4.3027 * (7 / 3) ** 0.5, abs=1e-3), pytest.approx(184 - low))
    assert student(4, 92.5, 0.0) == (92.5, 92.5)


@pytest.mark.parametrize(("n", "covered", "factor"), [(3, 0.75, 2.48), (5, 0.83, 1.24)])
def test_what_is_printed_about_few_seeds_is_true(n, covered, factor):
    generator = np.random.default_rng(1)
    found = [estimate(generator.normal(size=n)) for _ in range(1000)]
    assert np.mean([e.low <= 0 <= e.high for e in found]) == pytest.approx(covered, abs=0.03)
    assert f"{100 * covered:.0f} %" in SMALL_N
    low, high = zip(*(student(e.n, e.mean, e.sd) for e in found), strict=True)
    assert np.mean((np.array(low) <= 0) & (np.array(high) >= 0)) == pytest.approx(0.95, abs=0.02)
    assert student(n, 0.0, 1.0)[1] == pytest.approx(factor, abs=0.005)
    assert f"mean ± {factor} sd with n = {n}" in SMALL_N
