"""Percentile bootstrap over samples: seeded, vectorised, in bounded memory.

Everything is reduced to sums. A resample draws n of n samples with replacement, so any figure that
is a function of column sums (a mean, a ratio of counts, a corpus score) is recomputed exactly on
every resample by one product of draw counts and columns. All figures of one call see the same
resamples, and so do two runs in a paired comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Num

AnyArray = np.ndarray | np.generic  # a sum over the last axis of a vector is a scalar

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK_ELEMENTS = 4_000_000  # draws held at once: 32 MB of indices and as much of counts
_BLOCK_COLUMNS = 16


class Interval(TypedDict):
    """A figure with its interval. `n`: samples behind it. With n = 0 the others are None."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


NO_FIGURE = Interval(mean=None, low=None, high=None, n=0)


def resampled_sums(
    columns: Float[np.ndarray, "n m"], resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "resamples m"]:
    """Column sums over each bootstrap resample of the rows.

    The draws depend on `seed` and n only, not on the columns and not on how the work is cut up.
    Raises ValueError for values that are not finite: a missing value is the caller's to express
    (as 0 in numerator and denominator).
    """
    columns = np.asarray(columns, np.float64)
    if not np.isfinite(columns).all():
        raise ValueError("bootstrap columns must be finite")
    n = len(columns)
    if n == 0:
        return np.zeros((resamples, columns.shape[1]))
    rng = np.random.default_rng(seed)
    # How a product rounds depends on its shape: with blocks of one width a column's sums are the
    # same to the last bit, whatever other columns there are.
    width = columns.shape[1]
    padded = np.pad(columns, ((0, 0), (0, -width % _BLOCK_COLUMNS)))
    blocks = [
        np.ascontiguousarray(padded[:, at : at + _BLOCK_COLUMNS])
        for at in range(0, padded.shape[1], _BLOCK_COLUMNS)
    ]
    sums = np.empty((resamples, padded.shape[1]))
    chunk = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        draws = rng.integers(0, n, size=(rows, n))
        draws += np.arange(rows)[:, None] * n
        counts = np.bincount(draws.ravel(), minlength=rows * n).reshape(rows, n)
        counts = counts.astype(np.float64)
        for i, block in enumerate(blocks):
            at = i * _BLOCK_COLUMNS
            np.matmul(counts, block, out=sums[start : start + rows, at : at + _BLOCK_COLUMNS])
    return sums[:, :width]


def interval(
    value: float, resampled: Float[np.ndarray, " resamples"], n: int, level: float = LEVEL
) -> Interval:
    """A figure and the percentiles of its resampled values.

    Resamples on which the figure is not defined (NaN) are left out.
    """
    resampled = resampled[~np.isnan(resampled)]
    if n == 0 or np.isnan(value) or not len(resampled):
        return NO_FIGURE.copy()
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(mean=float(value), low=float(low), high=float(high), n=int(n))


def _divide(numerator: Num[AnyArray, "*n"], denominator: Num[AnyArray, "*n"]) -> np.ndarray:
    empty = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=empty, where=denominator > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic:
    """A figure of a set of samples: a function of the sums of some columns.

    `columns` (n, k): what each sample adds. `of_sums`: (…, k) sums → (…) values, NaN where the
    figure is not defined. `part` (n,): which samples have a part in it.
    """

    columns: Float[np.ndarray, "n k"]
    of_sums: Callable[[np.ndarray], np.ndarray]
    part: Bool[np.ndarray, " n"]

    def rows(self, chosen: np.ndarray | list[int]) -> Statistic:
        """The same figure of some of the samples."""
        return dataclasses.replace(self, columns=self.columns[chosen], part=self.part[chosen])

    @property
    def value(self) -> float:
        """The figure of all samples; NaN if there is none."""
        return float(self.of_sums(self.columns.sum(0)))


def _first_by_second(sums: np.ndarray) -> np.ndarray:
    return _divide(sums[..., 0], sums[..., 1])


def ratio(numerator: Num[np.ndarray, " n"], denominator: Num[np.ndarray, " n"]) -> Statistic:
    """Σ numerator / Σ denominator: precision, recall, a mean over entities.

    A sample with denominator 0 has no part. Raises ValueError for negative denominators.
    """
    columns = np.stack([np.asarray(c, np.float64) for c in (numerator, denominator)], axis=1)
    if (columns[:, 1] < 0).any():
        raise ValueError("a denominator is negative")
    return Statistic(columns, _first_by_second, columns[:, 1] > 0)


def mean(values: Float[np.ndarray, " n"]) -> Statistic:
    """The mean of the samples' values. NaN: the sample has no part."""
    values = np.asarray(values, np.float64)
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0.0), there.astype(np.float64))


def mean_of_ratios(
    numerators: Num[np.ndarray, "n c"], denominators: Num[np.ndarray, "n c"]
) -> Statistic:
    """The mean over c classes of Σ numerator / Σ denominator, over those classes that occur.

    A resample may miss a class altogether; the mean then runs over the classes it holds.
    """
    classes = np.asarray(numerators).shape[1]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        ratios = _divide(sums[..., :classes], sums[..., classes:])
        held = ~np.isnan(ratios)
        return _divide(np.where(held, ratios, 0.0).sum(-1), held.sum(-1).astype(np.float64))

    columns = np.hstack([np.asarray(c, np.float64) for c in (numerators, denominators)])
    return Statistic(columns, of_sums, (columns[:, classes:] > 0).any(1))


def _resampled(
    statistics: Mapping[str, Statistic], resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Every figure on every resample, (resamples,). Columns that figures share are summed once."""
    places: dict[int, int] = {}
    columns, width = [], 0
    for statistic in statistics.values():
        if id(statistic.columns) not in places:
            places[id(statistic.columns)] = width
            columns.append(statistic.columns)
            width += statistic.columns.shape[1]
    if not columns:
        return {}
    sums = resampled_sums(np.hstack(columns), resamples, seed)
    found = {}
    for name, statistic in statistics.items():
        start = places[id(statistic.columns)]
        found[name] = statistic.of_sums(sums[:, start : start + statistic.columns.shape[1]])
    return found


def intervals(
    statistics: Mapping[str, Statistic],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Figures of one set of samples with their intervals, all from the same resamples.

    All statistics have the same samples in the same order; `n` counts those with a part.
    """
    resampled = _resampled(statistics, resamples, seed)
    return {
        name: interval(s.value, resampled[name], int(s.part.sum()), level)
        for name, s in statistics.items()
    }


def differences(
    a: Mapping[str, Statistic],
    b: Mapping[str, Statistic],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """a − b of every figure that both have, for two runs on the same samples in the same order.

    Both runs see the same resamples: what is hard for both does not widen the interval. An
    interval that does not hold 0 says that the runs differ. `n`: samples with a part in either.
    Raises ValueError if the samples are not as many.
    """
    names = [name for name in a if name in b]
    for name in names:
        if len(a[name].part) != len(b[name].part):
            raise ValueError(
                f"a paired comparison needs the same samples: {len(a[name].part)} and "
                f"{len(b[name].part)}"
            )
    ours, theirs = (_resampled({n: s[n] for n in names}, resamples, seed) for s in (a, b))
    return {
        name: interval(
            a[name].value - b[name].value,
            ours[name] - theirs[name],
            int((a[name].part | b[name].part).sum()),
            level,
        )
        for name in names
    }


def bootstrap_means(
    values: Float[np.ndarray, "n k"],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Interval]:
    """Mean of each column with its interval. NaN: the sample has no part in that column."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must be (samples, metrics), not {values.shape}")
    columns = {str(i): mean(column) for i, column in enumerate(values.T)}
    return list(intervals(columns, resamples, seed, level).values())


def bootstrap_mean(
    values: Float[np.ndarray, " n"],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """`bootstrap_means` of one column."""
    return bootstrap_means(np.asarray(values, np.float64)[:, None], resamples, seed, level)[0]
