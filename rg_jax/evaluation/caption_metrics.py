"""CIDEr, BLEU and ROUGE-L of texts with one reference each.

They are the figures of pycocoevalcap, the tool that captioning papers use, without its Java
tokenizer: texts are taken as they stand, so case and punctuation count ("liver." is not "liver").
Written here since no kept library gives these numbers: sacrebleu and NLTK smooth BLEU otherwise,
rouge-score weighs precision and recall evenly, CIDEr is in none, and pycocoevalcap itself has had
no release for years and wants a Java runtime. The golden tests hold every number to it.

CIDEr weighs n-grams by how many references of the *evaluated set* hold them: the same answer
scores otherwise in another set, and 0 in a set of one. Its scale is 0 to 10.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

MOST_WORDS = 4  # the longest n-gram
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
# How the reference tool keeps its quotients finite.
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9
BLEU_COUNTS = 2 * MOST_WORDS + 2

Gram = tuple[str, ...]


def _grams(text: str) -> Counter[Gram]:
    """How often each run of 1 to 4 words occurs; words lie between white space."""
    words = text.split()
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, MOST_WORDS + 1)
        for start in range(len(words) - size + 1)
    )


def cider(candidates: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, " n"]:
    """CIDEr-D of every candidate (Vedantam et al. 2015), 0 to 10; the corpus value is the mean.

    The references are the corpus from which n-grams get their weights. Raises ValueError if the
    two differ in length.
    """
    pairs = list(zip(candidates, references, strict=True))
    told = [_grams(reference) for reference in references]
    held_by: Counter[Gram] = Counter()
    for grams in told:
        held_by.update(grams.keys())
    log_corpus = math.log(len(pairs)) if pairs else 0.0

    def weighted(grams: Counter[Gram]) -> tuple[list[dict[Gram, float]], list[float]]:
        by_size: list[dict[Gram, float]] = [{} for _ in range(MOST_WORDS)]
        for gram, count in grams.items():
            rarity = log_corpus - math.log(max(1, held_by[gram]))
            by_size[len(gram) - 1][gram] = count * rarity
        return by_size, [math.sqrt(sum(v * v for v in part.values())) for part in by_size]

    scores = np.zeros(len(pairs))
    for i, ((candidate, _), reference_grams) in enumerate(zip(pairs, told, strict=True)):
        candidate_grams = _grams(candidate)
        ours, our_norms = weighted(candidate_grams)
        theirs, their_norms = weighted(reference_grams)
        # A text's length is counted in its pairs of words.
        lengths = [
            sum(count for gram, count in grams.items() if len(gram) == 2)
            for grams in (candidate_grams, reference_grams)
        ]
        penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * CIDER_SIGMA**2))
        total = 0.0
        for size in range(MOST_WORDS):
            shared = sum(
                min(weight, theirs[size].get(gram, 0.0)) * theirs[size].get(gram, 0.0)
                for gram, weight in ours[size].items()
            )
            norm = our_norms[size] * their_norms[size]
            total += shared / norm if norm else shared
        scores[i] = 10.0 * penalty * total / MOST_WORDS
    return scores


def bleu_counts(candidate: str, reference: str) -> Int[np.ndarray, " counts"]:
    """What BLEU is made of, for one text: correct n-grams and n-grams at all, each for 1 to 4
    words, then the lengths of candidate and reference in words. They add up over a corpus."""
    ours, theirs = _grams(candidate), _grams(reference)
    correct, lengths = [0] * MOST_WORDS, [len(text.split()) for text in (candidate, reference)]
    for gram, count in (ours & theirs).items():
        correct[len(gram) - 1] += count
    there = [max(0, lengths[0] - size) for size in range(MOST_WORDS)]
    return np.array([*correct, *there, *lengths], np.int64)


def bleu(counts: Num[np.ndarray, "*b counts"]) -> Float[np.ndarray, "*b 4"]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) from summed `bleu_counts`.

    A text shorter than four words has no BLEU-4 to speak of, even where it is all right.
    """
    counts = np.asarray(counts, np.float64)
    correct, there = counts[..., :MOST_WORDS], counts[..., MOST_WORDS : 2 * MOST_WORDS]
    precision = (correct + _BLEU_TINY) / (there + _BLEU_SMALL)
    sizes = np.arange(1, MOST_WORDS + 1)
    score = np.cumprod(precision, axis=-1) ** (1 / sizes)
    ratio = (counts[..., -2:-1] + _BLEU_TINY) / (counts[..., -1:] + _BLEU_SMALL)
    with np.errstate(over="ignore"):
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return score * brevity


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): the longest common subsequence of words, recall weighed 1.2².

    Words lie between single blanks, so two blanks have an empty word between them; an empty text
    is one empty word.
    """
    ours, theirs = candidate.split(" "), reference.split(" ")
    common = _longest_common(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel: bit j of `row` is 0 where the table's row rises at b[j] (Hyyrö 2004).
    """
    places: dict[str, int] = defaultdict(int)
    for j, word in enumerate(b):
        places[word] |= 1 << j
    everything = (1 << len(b)) - 1
    row = everything
    for word in a:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & everything
    return len(b) - row.bit_count()
