import numpy as np
import pytest

from analysis.stats import Estimate, estimate, paired_difference


def test_mean_standard_deviation_and_students_interval_by_hand():
    found = estimate([90.0, 91.0, 95.0])
    assert found.n == 3
    assert found.mean == pytest.approx(92.0)
    assert found.sd == pytest.approx(7**0.5)  # (4 + 1 + 9) / (3 - 1)
    assert found.low == pytest.approx(
        92 - 4.3027 * (7 / 3) ** 0.5, abs=1e-3
    )  # 97.5 % of t with 2 degrees
    assert found.high == pytest.approx(184 - found.low)


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_holds_the_mean_of_normal_values_in_95_percent_of_all_cases(n):
    generator = np.random.default_rng(1)
    found = [estimate(generator.normal(size=n).tolist()) for _ in range(2000)]
    assert np.mean([e.low <= 0 <= e.high for e in found]) == pytest.approx(0.95, abs=0.015)


def test_equal_values_have_a_point_for_an_interval():
    assert estimate([92.5] * 4) == Estimate(4, 92.5, 0.0, 92.5, 92.5)


def test_one_value_has_neither_spread_nor_interval_and_none_no_estimate():
    assert estimate([92.0]) == Estimate(1, 92.0, None, None, None)
    assert estimate([]) is None


def test_paired_difference_by_hand_over_common_seeds_only():
    found = paired_difference({0: 92.0, 1: 93.0, 2: 99.0}, {1: 90.0, 0: 91.0, 7: 1.0})  # +1 and +3
    assert (found.n, found.mean, found.sd) == (2, 2.0, pytest.approx(2**0.5))
    assert (found.low, found.high) == (
        pytest.approx(2 - 12.706, abs=1e-3),
        pytest.approx(2 + 12.706, abs=1e-3),
    )
    assert paired_difference({0: 92.0}, {1: 90.0}) is None
