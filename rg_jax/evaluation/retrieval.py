"""Which caption fits an image best, which image a caption? Recall at k; equal captions are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rg_jax.evaluation.bootstrap import RESAMPLES, bootstrap_means

RANKS = (1, 5, 10)
_ROWS = 1024  # compared with all others at a time


def retrieval_metrics(
    images: Float[np.ndarray, "N W"],
    texts: Float[np.ndarray, "N W"],
    captions: Sequence[str],
    languages: Sequence[str],
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Recall of N images and their N captions, both ways, each figure with its interval and n.

    `images`, `texts`: unit vectors; row i of both belong together. Searched is among the rows of
    the same language. A hit at k: among the k best is one whose caption reads the same, whichever
    image it was written for. `image_to_text_recall@k`, `text_to_image_recall@k`; `chance`, what a
    random choice of one would hit; `by_language`, the same for each. Ties go to the earlier row.
    """
    columns: dict[str, np.ndarray] = {}
    spoken = np.asarray(languages, object).astype(str)
    for language in np.unique(spoken):
        rows = np.flatnonzero(spoken == language)
        _, group = np.unique([captions[row] for row in rows], return_inverse=True)
        for name, values in _hits(images[rows], texts[rows], group).items():
            columns.setdefault(name, np.zeros(len(spoken)))[rows] = values
    table = np.stack(list(columns.values()), axis=1)

    def figures(chosen):
        return dict(zip(columns, bootstrap_means(table[chosen], resamples), strict=True))

    by_language = {name: figures(spoken == name) for name in np.unique(spoken).tolist()}
    return figures(slice(None)) | {"by_language": by_language}


def _hits(images, texts, group) -> dict[str, np.ndarray]:
    """Per row whether it was found; `group`: rows with the same number have equal captions."""
    sizes = np.bincount(group)
    found = {"chance": sizes[group] / len(group)}
    for name, asked, offered in (
        ("image_to_text", images, texts),
        ("text_to_image", texts, images),
    ):
        right = []
        for start in range(0, len(asked), _ROWS):
            scores = asked[start : start + _ROWS].astype(np.float64) @ offered.T.astype(np.float64)
            best = np.argsort(-scores, axis=1, kind="stable")[:, : max(RANKS)]
            right.append(group[best] == group[start : start + _ROWS, None])
        right = np.concatenate(right)
        for k in RANKS:
            found[f"{name}_recall@{k}"] = right[:, :k].any(axis=1).astype(np.float64)
    return found
