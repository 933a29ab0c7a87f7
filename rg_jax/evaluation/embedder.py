"""How alike two mentions are: the part of G-IoU that can be swapped.

The published figures use a sentence-embedding model (google/embeddinggemma-300m). The default
needs no network and no weights: the same text or the same class is 1, everything else 0. The two
give figures on different scales, so every report names the one it used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from rg_jax.errors import UserError

Mention = tuple[str, int]  # text, class id (0 = none)


@runtime_checkable
class Embedder(Protocol):
    """Similarities of mentions. `name` goes into every report."""

    name: str

    def similarity(
        self, reference: Sequence[Mention], predicted: Sequence[Mention]
    ) -> Float[np.ndarray, "n m"]:
        """Similarity of every reference (rows) to every prediction (columns), at most 1."""
        ...


class ExactEmbedder:
    """1 for the same text regardless of case or for the same class of the schema, else 0."""

    name = "exact"

    def similarity(
        self, reference: Sequence[Mention], predicted: Sequence[Mention]
    ) -> Float[np.ndarray, "n m"]:
        """See `Embedder`. Class id 0 means "no class" and equals nothing."""
        table = np.zeros((len(reference), len(predicted)))
        for i, (text, class_id) in enumerate(reference):
            for j, (other, other_id) in enumerate(predicted):
                same_class = class_id != 0 and class_id == other_id
                table[i, j] = float(same_class or text.lower() == other.lower())
        return table


class VectorEmbedder:
    """Cosine of text embeddings of the lower-cased mentions; class ids play no part.

    `encode` maps a list of strings to one vector each, (n, d); it is asked once per distinct text.
    """

    def __init__(self, encode: Callable[[list[str]], np.ndarray], name: str) -> None:
        self.name = name
        self._encode = encode
        self._known: dict[str, np.ndarray] = {}

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors = np.asarray(self._encode(new), np.float64)
            if vectors.ndim != 2 or len(vectors) != len(new):
                raise ValueError(
                    f"embedder {self.name}: {len(new)} texts gave an array {vectors.shape}"
                )
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.where(norms > 0, norms, 1.0)
            self._known.update(zip(new, vectors, strict=True))
        return np.stack([self._known[text] for text in texts])

    def similarity(
        self, reference: Sequence[Mention], predicted: Sequence[Mention]
    ) -> Float[np.ndarray, "n m"]:
        """See `Embedder`: cosines in [-1, 1], float64."""
        if not reference or not predicted:
            return np.zeros((len(reference), len(predicted)))
        rows = self._vectors([text.lower() for text, _ in reference])
        columns = self._vectors([text.lower() for text, _ in predicted])
        return rows @ columns.T


def load_embedder(name: str = "exact") -> Embedder:
    """The embedder a config names: "exact", or a sentence-transformers model (folder or name).

    A model is looked for on this machine only: nothing is downloaded in the middle of an
    evaluation. Texts are encoded one by one, so that a vector does not depend on what else is
    evaluated. Raises UserError if sentence-transformers or the model is not there.
    """
    if name == "exact":
        return ExactEmbedder()
    if name.startswith(("/", ".", "~")) and not os.path.isdir(os.path.expanduser(name)):
        raise UserError(f"embedder {name}: no such folder")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            f"embedder {name!r} needs the package sentence-transformers: "
            "pip install -e \".[embed]\", or use the embedder 'exact'"
        ) from None
    try:
        model = SentenceTransformer(os.path.expanduser(name), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"embedder {name!r} is neither a model's folder nor a model that was downloaded to "
            f"this machine ({reason}); download it first: hf download {name}"
        ) from error

    def encode(texts: list[str]) -> np.ndarray:
        vectors = model.encode(texts, batch_size=1, show_progress_bar=False)
        return np.asarray(vectors, np.float64)

    return VectorEmbedder(encode, name)
