"""Agreement among raters: a published example, the definition by loops, limits and intervals."""

import math

import numpy as np
import pytest

from rg_jax.evaluation.agreement import ordinal_alpha, pearson
from rg_jax.evaluation.bootstrap import intervals

NAN = math.nan


def by_definition(ratings) -> float:
    """α pair by pair, with the ordinal distance written out."""
    units = [[v for v in row if not math.isnan(v)] for row in ratings.tolist()]
    units = [unit for unit in units if len(unit) > 1]
    everything = [v for unit in units for v in unit]
    values = sorted(set(everything))

    def distance(a, b):
        a, b = min(a, b), max(a, b)
        between = sum(everything.count(v) for v in values if a <= v <= b)
        return (between - (everything.count(a) + everything.count(b)) / 2) ** 2

    observed = sum(
        distance(unit[i], unit[j]) / (len(unit) - 1)
        for unit in units
        for i in range(len(unit))
        for j in range(len(unit))
        if i != j
    ) / len(everything)
    n = len(everything)
    expected = sum(
        distance(everything[i], everything[j]) for i in range(n) for j in range(n) if i != j
    ) / (n * (n - 1))
    return 1 - observed / expected


def test_the_published_example():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers,
    twelve units, missing values; α for ordinal data is 0.815."""
    table = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
            [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
        ]
    ).T
    alpha = ordinal_alpha(table)
    assert alpha.value == pytest.approx(0.815, abs=5e-4)
    assert int(alpha.part.sum()) == 11  # the last unit has one rating


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_definition_on_any_table(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 6, (15, 1))
    ratings = np.clip(truth + rng.integers(-2, 3, (15, 2 + seed % 3)), 1, 5).astype(np.float64)
    ratings = ratings if seed % 2 else ratings * 1.5 - 7  # only the order of values counts
    ratings[rng.random(ratings.shape) < 0.05 * seed] = NAN
    assert ordinal_alpha(ratings).value == pytest.approx(by_definition(ratings), abs=1e-12)


def test_limits_of_agreement():
    same = np.tile(np.arange(5.0)[:, None], (1, 3))
    assert ordinal_alpha(same).value == 1.0
    assert ordinal_alpha(same[:, :2] * [1, -1] + [0, 4]).value < -0.5
    rng = np.random.default_rng(0)
    assert abs(ordinal_alpha(rng.integers(1, 6, (4000, 3)).astype(float)).value) < 0.03
    assert math.isnan(ordinal_alpha(np.full((6, 2), 3.0)).value)
    assert math.isnan(ordinal_alpha(np.array([[1, NAN], [NAN, 2]])).value)
    assert math.isnan(ordinal_alpha(np.full((0, 2), 3.0)).value)


@pytest.mark.parametrize("seed", range(4))
def test_pearson_is_that_of_numpy(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=40) * 10.0**seed + 1e6
    y = 0.5 * x + rng.normal(size=40) * 10.0**seed
    x[:3] = NAN
    expected = np.corrcoef(x[3:], y[3:])[0, 1]
    assert pearson(x, y).value == pytest.approx(expected, abs=1e-9)
    assert int(pearson(x, y).part.sum()) == 37
    assert pearson(x[3:], x[3:]).value == pytest.approx(1) and pearson(x[3:], -x[3:]).value == -1
    assert math.isnan(pearson(np.full(9, 3.0), np.arange(9.0)).value)
    assert math.isnan(pearson(np.full(3, NAN), np.arange(3.0)).value)


def test_intervals_are_those_of_resampled_tables():
    """The bootstrap by sums is the bootstrap by tables: each resample computed anew."""
    rng = np.random.default_rng(5)
    truth = rng.integers(1, 6, (40, 1))
    ratings = np.clip(truth + rng.integers(-1, 2, (40, 3)), 1, 5).astype(np.float64)
    judge = np.clip(truth[:, 0] + rng.integers(-1, 2, 40), 1, 5).astype(np.float64)
    mean = ratings.mean(1)
    found = intervals({"a": ordinal_alpha(ratings), "r": pearson(judge, mean)}, 500, seed=3)
    draws = np.random.default_rng(3).integers(0, 40, (500, 40))
    alphas = [ordinal_alpha(ratings[rows]).value for rows in draws]
    rs = [np.corrcoef(judge[rows], mean[rows])[0, 1] for rows in draws]
    for name, values in (("a", alphas), ("r", rs)):
        low, high = np.percentile(values, [2.5, 97.5])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high), abs=1e-9)
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]
        assert found[name]["n"] == 40
