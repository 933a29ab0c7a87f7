"""How well a judge agrees with people: Krippendorff's α among raters, Pearson's r with the judge.

Both are functions of sums over items (`bootstrap.Statistic`), so that their intervals come from
resampled items like those of every other figure.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from rg_jax.evaluation.bootstrap import Statistic


def ordinal_alpha(ratings: Float[np.ndarray, "items raters"]) -> Statistic:
    """Krippendorff's α for ordinal ratings (Krippendorff, Content Analysis, 2004).

    NaN is a missing rating; an item with fewer than two cannot show agreement and has no part. 1 is
    perfect agreement, 0 what chance gives. Not defined (NaN) where no item has a part, or all
    ratings are equal. The values are those that occur, whatever their distances: only their order
    counts.
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    k = len(values)
    counts = (ratings[:, :, None] == values).sum(1).astype(np.float64)
    part = counts.sum(1) >= 2
    counts[~part] = 0
    # An item's part in the coincidences: its ordered pairs of ratings over (ratings − 1).
    pairs = counts[:, :, None] * counts[:, None, :]
    diagonal = np.arange(k)
    pairs[:, diagonal, diagonal] -= counts
    pairs /= np.maximum(counts.sum(1) - 1, 1)[:, None, None]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        totals = sums[..., :k]
        coincidences = sums[..., k:].reshape(*sums.shape[:-1], k, k)
        n = totals.sum(-1)
        # Two values are as far apart as ratings lie between them, half of those at either end.
        middles = np.cumsum(totals, axis=-1) - totals / 2
        distances = (middles[..., :, None] - middles[..., None, :]) ** 2
        observed = (coincidences * distances).sum((-2, -1))
        expected = (totals[..., :, None] * totals[..., None, :] * distances).sum((-2, -1))
        undefined = np.full(np.shape(n), np.nan)
        share = np.divide((n - 1) * observed, expected, out=undefined, where=expected > 0)
        return np.asarray(1 - share)

    return Statistic(np.hstack([counts, pairs.reshape(len(counts), k * k)]), of_sums, part)


def pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Statistic:
    """Pearson's r of two columns; an item where either is NaN has no part.

    Not defined (NaN) where one side does not vary.
    """
    part = ~(np.isnan(x) | np.isnan(y))
    # r does not change with the origin, and small numbers keep more digits when squared.
    x, y = (np.where(part, v - v[part].mean() if part.any() else 0.0, 0.0) for v in (x, y))
    columns = np.stack([part.astype(np.float64), x, y, x * x, y * y, x * y], axis=1)
    floor = 1e-12 * max(float((x * x).max(initial=0)), float((y * y).max(initial=0)))

    def of_sums(sums: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
        n = np.maximum(n, 1)
        spread_x, spread_y = sxx - sx * sx / n, syy - sy * sy / n
        varies = (spread_x > floor * n) & (spread_y > floor * n)
        undefined = np.full(np.shape(n), np.nan)
        scale = np.sqrt(np.where(varies, spread_x * spread_y, 1.0))
        r = np.divide(sxy - sx * sy / n, scale, out=undefined, where=varies)
        return np.asarray(np.clip(r, -1, 1))

    return Statistic(columns, of_sums, part)
