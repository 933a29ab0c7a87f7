"""Scores of a generated text against its reference, one pair at a time.

All three take plain text (marks already removed) and return a number in [0, 1]. They are the
published metrics, odd corners included, so that figures can stand beside published ones; the
corners are named at each function.
"""

import re
import string
from collections import Counter

_NOT_SIMPLE = re.compile("[^a-zA-Z0-9äöüÄÖÜß ]+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FINAL_ANSWER = "Final Answer:"


def final_answer(text: str) -> str:
    """What counts of an answer: the part after its last "Final Answer:", or all of it."""
    return text.rpartition(_FINAL_ANSWER)[2].strip() if _FINAL_ANSWER in text else text


def simple(text: str) -> str:
    """Lower-cased text in which every run of other characters than letters (English and German)
    and digits is one blank.

    Any text written wholly in another script becomes empty.
    """
    return " ".join(_NOT_SIMPLE.sub(" ", text).lower().split())


def squad_tokens(text: str) -> list[str]:
    """Words as SQuAD counts them: lower case, ASCII punctuation deleted, articles dropped.

    Punctuation leaves no blank behind: "X-ray" is one word, and "3.5" is the word "35". The
    English articles are dropped from German text too ("an" is a German preposition).
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _overlap(a: list[str], b: list[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def f1(candidate: str, reference: str) -> float:
    """Bag-of-words F1 of SQuAD (Rajpurkar et al. 2016), on both texts as written."""
    ours, theirs = squad_tokens(candidate), squad_tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = _overlap(ours, theirs)
    if shared == 0:
        return 0.0
    precision, recall_ = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall_ / (precision + recall_)


def accuracy(candidate: str, reference: str) -> float:
    """1 if both texts are equal once `simple`, else 0.

    Two texts of which nothing is left are equal by this rule, see `comparable`.
    """
    return float(simple(candidate) == simple(reference))


def recall(candidate: str, reference: str) -> float:
    """Share of the reference's words that the candidate holds, both made `simple` first.

    Unlike in `f1`, "X-ray" is two words here.
    """
    ours, theirs = squad_tokens(simple(candidate)), squad_tokens(simple(reference))
    if not theirs:
        return float(not ours)
    return _overlap(ours, theirs) / len(theirs)


def comparable(candidate: str, reference: str) -> bool:
    """False if `accuracy` calls two different texts equal because nothing of either is left.

    That is so for answers in a script that `simple` does not know, Chinese for one; whoever
    averages accuracies counts these pairs.
    """
    blank = not simple(candidate) and not simple(reference)
    return not (blank and candidate.strip() != reference.strip())
