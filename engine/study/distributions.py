"""Student's t, its noncentral form, Fisher's F and the signed-rank distribution, in numpy and math alone."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ITERATIONS = 300  # of the continued fraction; it converges in about sqrt(max(a, b)) steps
_TINY = 1e-300
_HALVINGS = 200  # of an interval that is searched for a quantile: float64 is exhausted before
_CHI_POINTS = 2001  # at which the noncentral t is integrated


def incomplete_beta(a: float, b: float, x: float | Array) -> Array:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (modified Lentz).

    Args:
        a, b: above 0.
        x: in 0-1, any shape.
    """
    x = np.asarray(x, dtype=np.float64)
    mirrored = x > (a + 1) / (a + b + 2)  # where the fraction converges slowly, I_x(a, b) = 1 - I_(1-x)(b, a)
    p, q, z = np.where(mirrored, b, a), np.where(mirrored, a, b), np.where(mirrored, 1 - x, x)
    with np.errstate(divide="ignore"):
        log_front = p * np.log(z) + q * np.log1p(-z) - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    value = np.exp(log_front) / p * _beta_fraction(p, q, z)
    return np.where(mirrored, 1 - value, value)


def t_cdf(t: float | Array, df: float) -> Array:
    """P(T <= t) of Student's t with ``df`` degrees of freedom."""
    tail = t_two_sided(t, df) / 2
    return np.where(np.asarray(t) > 0, 1 - tail, tail)


def t_two_sided(t: float | Array, df: float) -> Array:
    """P(|T| >= |t|), the two-sided p-value, accurate however small."""
    t = np.asarray(t, dtype=np.float64)
    with np.errstate(over="ignore"):
        return incomplete_beta(df / 2, 0.5, np.where(np.isinf(t), 0.0, df / (df + t * t)))


def f_upper(f: float, df: float, df_rest: float) -> float:
    """P(F >= f) of Fisher's F with ``df`` and ``df_rest`` degrees of freedom."""
    return float(incomplete_beta(df_rest / 2, df / 2, df_rest / (df_rest + df * f)))


@cache
def t_quantile(p: float, df: float) -> float:
    """The t below which a share ``p`` in 0-1 lies."""
    if p == 0.5:
        return 0.0
    sign, tail = (1.0, 1 - p) if p > 0.5 else (-1.0, p)
    high = 1.0
    while t_two_sided(high, df) > 2 * tail:
        high *= 2
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 2 * tail else (low, middle)
    return sign * (low + high) / 2


def noncentral_t_power(critical: float, df: int, shift: float) -> float:
    """P(|T'| > critical) of the noncentral t: the power of a two-sided t-test.

    T' = (Z + shift) / S with S = sqrt(chi2(df) / df), integrated over S.

    Args:
        critical: above 0.
        df: degrees of freedom.
        shift: noncentrality, the true mean over its standard error.
    """
    spread = 12 / math.sqrt(2 * df)  # S has about mean 1 and deviation 1 / sqrt(2 df)
    s = np.linspace(max(1e-9, 1 - spread), 1 + spread, _CHI_POINTS)
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * np.log(s) - df * s * s / 2
    outside = normal_cdf(shift - critical * s) + normal_cdf(-shift - critical * s)
    return float(_simpson(np.exp(log_density) * outside, float(s[1] - s[0])))


def normal_cdf(x: Array) -> Array:
    """P(Z <= x)."""
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.ravel(x)]).reshape(np.shape(x))


@cache
def shift_of_power(critical: float, df: int, power: float) -> float:
    """The noncentrality at which a two-sided t-test has this power."""
    low, high = 0.0, 1.0
    while noncentral_t_power(critical, df, high) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if noncentral_t_power(critical, df, middle) < power else (low, middle)
    return (low + high) / 2


def signed_rank_p(differences: Array) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test, exact whatever ties there are.

    Zeros are dropped, equal magnitudes share their mean rank, and the distribution is that of all 2^n signs of these ranks (counted, not
    sampled). 1 where nothing but zeros is left.

    Args:
        differences: (n,) finite.

    Source:
        Wilcoxon 1945; ties and zeros as in Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, 3.1.
    """
    values = differences[differences != 0]
    if not len(values):
        return 1.0
    doubled = np.rint(2 * mean_ranks(np.abs(values))).astype(np.int64)  # whole numbers, as mean ranks are halves
    total = int(doubled.sum())
    chance = np.zeros(total + 1)  # of each sum of the doubled ranks of positive differences
    chance[0] = 1.0
    for rank in doubled:
        moved = chance / 2
        chance = moved.copy()
        chance[rank:] += moved[: total + 1 - rank]
    positive = int(doubled[values > 0].sum())
    extreme = min(positive, total - positive)
    return float(min(1.0, 2 * chance[: extreme + 1].sum()))


def mean_ranks(values: Array) -> Array:
    """Ranks from 1 (n,); equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _beta_fraction(a: Array, b: Array, x: Array) -> Array:
    c = np.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    h = d
    for m in range(1, _ITERATIONS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = h
        for step in (even, odd):
            d = 1 / _away_from_zero(1 + step * d)
            c = _away_from_zero(1 + step / c)
            h = h * d * c
        if np.all(np.abs(h - before) <= 4e-16 * np.abs(h)):  # as near as rounding lets it come
            break
    return h


def _away_from_zero(x: Array) -> Array:
    return np.where(np.abs(x) < _TINY, _TINY, x)


def _simpson(values: Array, step: float) -> Array:
    """Integral over an odd number of evenly spaced points."""
    return step / 3 * (values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum())
