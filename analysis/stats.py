"""Means over seeds, and how far to trust them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats as distributions


@dataclass(frozen=True)
class Estimate:
    """A mean, its sample standard deviation, and its 95 % interval; n = 1 has neither spread nor interval."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, standard deviation (n - 1), and Student's interval of the mean; None of no values.

    It takes the values to be normally distributed. A bootstrap would not, but has nothing to resample where seeds
    are few: at n = 3 its 95 % interval holds the mean of a normal distribution in 75 % of all cases.
    """
    n = len(values)
    if n < 2:
        return Estimate(1, values[0]) if n else None
    mean, sd = fmean(values), stdev(values)
    half = student_half_width(n, sd, n - 1)
    return Estimate(n, mean, sd, mean - half, mean + half)


def student_half_width(n: int, sd: float, degrees: int, intervals: int = 1) -> float:
    """Half of Student's 95 % interval of the mean of n values whose sd is known with so many degrees of freedom.

    Several `intervals` of that width all hold at once in at least 95 % of all cases (Bonferroni).
    """
    return float(distributions.t.ppf(1 - 0.025 / intervals, degrees)) * sd / n**0.5


def verdict(mean: float, half: float | None) -> str:
    """Where the interval mean ± half of a difference lies: better, worse, or not shown; nothing without an interval."""
    if half is None:
        return ""
    if mean > half:
        return "better"
    return "worse" if mean < -half else "not shown"


def f_limit(degrees: int, others: int, tests: int) -> float:
    """What a ratio of mean squares with these degrees of freedom exceeds by chance in 5 % of all sets of tests."""
    return float(distributions.f.ppf(1 - 0.05 / tests, degrees, others))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The estimate of ours - theirs over the seeds (the keys) that both have; None without a common seed."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
