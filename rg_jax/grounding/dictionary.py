"""Finds the structures that a report names, without a server: names, synonyms, sides, numbers.

The forms are data (`synonyms.json` beside this file, and the names in `classes.json`), so that a
language or a synonym is added there. How `synonyms.json` is written:

- `single`: class → its forms. A form may begin with `~` (a side next to it belongs to the mention
  but does not decide the class: "right liver lobe") and may hold one `#` (segment numbers:
  "segment VII", "VII/VIII", "4a").
- `paired`: stem of two classes → nouns, "forms of one / forms of several". A noun is a mention
  only with its side before or behind it; the class is stem + "_left" or "_right". `of_side`: nouns
  that hold their side ({side}).
- `rib`, `vertebra`: patterns over their numbers ({n}, {ordinal}, {level}, {region}, {short}).
- `compounds`: a structure and what is found in it ("Leberzyste", "hepatic cyst"): each of the
  heads with each of the tails, with `join` between them. A head's target with {side} needs its side
  like a noun of `paired`. The forms above go first ("Nierenzyste" is a class of its own). A tail
  behind a hyphen is no obstacle either ("Leber-Metastase", "LWK-1-Fraktur").
- `between`, `between_after`: words that may stand between a side and its noun. `not_before`,
  `not_after`, `numbers_not_…`: neighbours with which a form means something else ("liver enzymes",
  "thyroid cartilage", "L5 nerve root").

What is never a mention: a noun inside another word that no compound makes (Leberwerte, hepatic,
Leber-MRT); a paired organ without its side; an unlisted part whose whole follows ("splenic flexure
of the colon" is "colon"); T1 and T2 alone, which are sequences or tumour stages as often; levels
and ranges between two numbers ("L4/5", "BWK 11-12").
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

from rg_jax.grounding import anatomy

_TOKEN = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"(?:VIII|VII|VI|IV|V|III|II|I|[1-8])[ab]?")  # of a segment of the liver
# A number behind or before it, joined by one of these, makes "L4" a level or a range.
_RANGE_AFTER = re.compile(r"\s?[/–-]\s?[A-Za-z]{0,3}\s?\d|[.,]\d")
_RANGE_BEFORE = re.compile(r"\d\s?[/–-]\s?\Z")
_HYPHENATED = re.compile(r"[-\u2010](?:([^\W\d_]\w*)|\s)")
_SIDES = ("left", "right")


@dataclasses.dataclass(frozen=True)
class Found:
    """A structure named in a text: where, in which words, and its class.

    `classes` holds two names where both sides are meant ("both kidneys"), right before left as in
    the schema; otherwise one.
    """

    start: int
    end: int
    text: str
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Token:
    text: str
    folded: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Form:
    """Tokens of a form and what they name. `target` holds {side} where the side decides."""

    tokens: tuple[str, ...]
    target: str
    side: str = "fixed"  # "fixed" | "optional" (~) | "needed" | "plural" (needs both)
    numbered: bool = False  # ends in the number of a vertebra: ranges and roots are refused


@dataclasses.dataclass(frozen=True)
class _Candidate:
    first: int  # tokens, the last one exclusive
    last: int
    core: int  # where the noun ends and a side behind it begins
    classes: tuple[str, ...]


def _tokens(text: str) -> list[_Token]:
    return [
        _Token(match.group(), match.group().casefold(), match.start(), match.end())
        for match in _TOKEN.finditer(text)
    ]


def _split(form: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(form))


def _is_exact(token: str) -> bool:
    """Abbreviations and levels are told from ordinary words by their case."""
    return token.isupper() and len(token) > 1


class _Dictionary:
    """All forms of one language, and the matcher."""

    def __init__(self, language: str, words: dict[str, Any]):
        self.words = words
        self.not_before = {word.casefold() for word in words["not_before"]}
        self.not_after = {word.casefold() for word in words["not_after"]}
        self.numbers_not_before = {word.casefold() for word in words["numbers_not_before"]}
        self.numbers_not_after = {word.casefold() for word in words["numbers_not_after"]}
        between = words["between"]
        self.between = {word.casefold() for word in between["words"]}
        self.endings = tuple(between["endings"])
        self.never_between = {word.casefold() for word in between["never"]}
        self.between_after = {word.casefold() for word in words["between_after"]}
        self.tails = tuple(
            tail.casefold()
            for group in words["compounds"]
            for tails in group["tails"]
            for tail in _listed(tails)
        )
        self.of = [tuple(words_of.casefold().split()) for words_of in words["of"]]
        # The longest side first, so that "left and right" is not read as "right".
        self.before, self.after = (
            sorted(
                (
                    (tuple(token.casefold() for token in _split(form)), side)
                    for side, places in words["sides"].items()
                    for form in places[place]
                ),
                key=lambda entry: -len(entry[0]),
            )
            for place in ("before", "after")
        )
        self.by_first: dict[str, list[_Form]] = {}
        known: dict[tuple[str, ...], _Form] = {}
        for form in _forms(words):
            other = known.setdefault(form.tokens, form)
            if other.target != form.target:
                raise ValueError(
                    f"{language} form {' '.join(form.tokens)!r} names both {other.target} and"
                    f" {form.target}"
                )
            if other is form:
                self._add(form)
        for form in _compound_forms(words):
            if known.setdefault(form.tokens, form) is form:
                self._add(form)
        # The schema's own forms, as far as the rules above do not find them.
        for text, form in _schema_forms(language):
            found = [one.classes for one in self.find(text, both=True) if one.text == text]
            if not found:
                self._add(form)
            elif found[0] != (form.target,):
                raise ValueError(f"{language} form {text!r} names {found[0]} and {form.target}")

    def _add(self, form: _Form) -> None:
        for name in _classes(form.target, "both"):
            anatomy.id_of(name)  # a slip in the data file shows at once
        self.by_first.setdefault(form.tokens[0].casefold(), []).append(form)

    def __len__(self) -> int:
        return sum(len(forms) for forms in self.by_first.values())

    def find(self, text: str, both: bool) -> list[Found]:
        tokens = _tokens(text)
        candidates = [
            candidate
            for i in range(len(tokens))
            for candidate in self._candidates(text, tokens, i)
            if both or len(candidate.classes) == 1
        ]
        candidates = [
            one
            for one in candidates
            if not _belongs_to_next(one, candidates) and not self._is_part(one, tokens, candidates)
        ]
        found, position = [], 0
        for one in sorted(candidates, key=lambda c: (c.first, -c.last)):
            if one.first >= position:
                start, end = tokens[one.first].start, tokens[one.last - 1].end
                found.append(Found(start, end, text[start:end], one.classes))
                position = one.last
        return found

    def _is_part(self, one: _Candidate, tokens: list[_Token], candidates: list[_Candidate]) -> bool:
        """Of "the splenic flexure of the colon" the colon is the mention: it is named itself."""
        for words in self.of:
            end = one.last + len(words)
            if tuple(token.folded for token in tokens[one.last : end]) == words and any(
                other.first == end and other.classes == one.classes for other in candidates
            ):
                return True
        return False

    def _candidates(self, text: str, tokens: list[_Token], i: int) -> Iterator[_Candidate]:
        for form in self.by_first.get(tokens[i].folded, ()):
            end = _match(form.tokens, tokens, i)
            if not end:
                continue
            for one in self._with_side(form, tokens, i, end):
                if not self._refused(form, text, tokens, one):
                    yield one

    def _with_side(
        self, form: _Form, tokens: list[_Token], first: int, last: int
    ) -> Iterator[_Candidate]:
        if form.side == "fixed":
            yield _Candidate(first, last, last, (form.target,))
            return
        start, side = self._side_before(tokens, first)
        end = last
        if not side:
            end, side = self._side_after(tokens, last)
        if form.side == "optional":
            yield _Candidate(start, end, last, (form.target,))
        elif form.side == "plural":
            if side in ("", "both"):
                yield _Candidate(start, end, last, _classes(form.target, "both"))
        elif side:
            yield _Candidate(start, end, last, _classes(form.target, side))
        # "left and right kidney": where only single sides are wanted, the nearer one counts.
        if side == "both" and form.side == "needed" and start < first:
            nearer = tokens[first - 1].folded
            for words, one_side in self.before:
                if words == (nearer,) and one_side in _SIDES:
                    yield _Candidate(first - 1, last, last, _classes(form.target, one_side))

    def _side_before(self, tokens: list[_Token], first: int) -> tuple[int, str]:
        for skipped in range(3):  # at most two words between
            end = first - skipped
            if skipped and (end < 0 or not self._is_between(tokens[end])):
                break
            for words, side in self.before:
                start = end - len(words)
                if start >= 0 and all(
                    tokens[start + k].folded == word for k, word in enumerate(words)
                ):
                    return start, side
        return first, ""

    def _is_between(self, token: _Token) -> bool:
        if token.folded in self.between:
            return True
        # An inflected adjective: lower case, with an ending, no article and no preposition.
        return (
            len(token.text) > 3
            and token.text.islower()
            and token.text.endswith(self.endings or ("\0",))
            and token.folded not in self.never_between
        )

    def _side_after(self, tokens: list[_Token], last: int) -> tuple[int, str]:
        starts = [last]
        if last < len(tokens) and tokens[last].folded in self.between_after:
            starts.append(last + 1)
        for start in starts:
            for words, side in self.after:
                end = start + len(words)
                if end <= len(tokens) and all(
                    tokens[start + k].folded == word for k, word in enumerate(words)
                ):
                    return end, side
        return last, ""

    def _refused(self, form: _Form, text: str, tokens: list[_Token], one: _Candidate) -> bool:
        start, end = tokens[one.first].start, tokens[one.last - 1].end
        # Part of a compound: "Leber-MRT", "Leber- und Nierenwerte", but not "Leber-Metastase".
        after = _HYPHENATED.match(text, end)
        if after and not (after[1] and after[1].casefold().endswith(self.tails or ("\0",))):
            return True
        if not self.words["hyphen_before"] and re.search(r"\w[-\u2010]\Z", text[:start]):
            return True
        next_word = tokens[one.last].folded if one.last < len(tokens) else ""
        last_word = tokens[one.first - 1].folded if one.first else ""
        if next_word in self.not_before or last_word in self.not_after:
            return True
        if not form.numbered:
            return False
        return bool(
            next_word in self.numbers_not_before
            or last_word in self.numbers_not_after
            or _RANGE_AFTER.match(text, end)
            or _RANGE_BEFORE.search(text[:start])
        )


def _match(pattern: tuple[str, ...], tokens: list[_Token], i: int) -> int:
    """Where the pattern ends if it stands at token i, else 0. `#` takes a run of numbers."""
    for part in pattern:
        if part == "#":
            end = _numbers(tokens, i)
            if end == i:
                return 0
            i = end
        elif i < len(tokens) and (
            tokens[i].text == part or (tokens[i].folded == part.casefold() and not _is_exact(part))
        ):
            i += 1
        else:
            return 0
    return i


def _numbers(tokens: list[_Token], i: int) -> int:
    """The end of "VII", "VII/VIII", "VI and VII", "4a, 4b" at token i (i itself if none)."""
    end = i
    while end < len(tokens) and _NUMBER.fullmatch(tokens[end].text):
        end += 1
        joined = end < len(tokens) and tokens[end].text in (
            *"/,-–",
            "and",
            "und",
            "or",
            "oder",
            "bis",
            "to",
        )
        if not (joined and end + 1 < len(tokens) and _NUMBER.fullmatch(tokens[end + 1].text)):
            break
        end += 1
    return end


def _belongs_to_next(one: _Candidate, candidates: list[_Candidate]) -> bool:
    """Whether what follows the noun is the beginning of another structure's name.

    "lung right lower lobe" holds no "lung right"; "Wirbelkörpers LWK 2" names one vertebra.
    """
    if one.classes == ("vertebrae",):
        return any(
            other.first == one.last and other.classes[0].startswith("vertebrae_")
            for other in candidates
        )
    return one.core < one.last and any(
        one.core <= other.first < one.last and other.last > one.last for other in candidates
    )


def _classes(target: str, side: str) -> tuple[str, ...]:
    if "{side}" not in target:
        return (target,)
    sides = ("right", "left") if side == "both" else (side,)
    return tuple(target.replace("{side}", one) for one in sides)


def _schema_forms(language: str) -> Iterator[tuple[str, _Form]]:
    for entry in anatomy.CLASSES:
        numbered = entry.name.startswith("vertebrae_")
        for text in anatomy.mentions(entry.id, language):
            yield text, _Form(_split(text), entry.name, numbered=numbered and text[-1].isdigit())


def _listed(forms: str) -> list[str]:
    return [form.strip() for form in forms.split(",") if form.strip()]


def _forms(words: dict[str, Any]) -> Iterator[_Form]:
    for name, forms in words["single"].items():
        for form in forms:
            side = "optional" if form.startswith("~") else "fixed"
            yield _Form(_split(form.lstrip("~")), name, side)  # `#` is a token of its own
    for stem, nouns in words["paired"].items():
        for noun in nouns:
            one, _, several = noun.partition("/")
            for form in _listed(one):
                yield _Form(_split(form), stem + "_{side}", "needed")
            for form in _listed(several):
                yield _Form(_split(form), stem + "_{side}", "plural")
    for stem, forms in words["of_side"].items():
        for form, side, word in _each_side(forms, words):
            yield _Form(_split(form.replace("{side}", word)), f"{stem}_{side}")
    yield from _rib_forms(words)
    yield from _vertebra_forms(words)


def _compound_forms(words: dict[str, Any]) -> Iterator[_Form]:
    for group in words["compounds"]:
        tails = [tail for tails in group["tails"] for tail in _listed(tails)]
        for target, heads in group["heads"].items():
            side = "needed" if "{side}" in target else "fixed"
            for head, tail in itertools.product(heads, tails):
                yield _Form(_split(head + group["join"] + tail), target, side)


def _each_side(forms: Iterable[str], words: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for form, side in itertools.product(forms, _SIDES):
        for word in words["sides"][side]["before"]:
            yield form, side, word


def _rib_forms(words: dict[str, Any]) -> Iterator[_Form]:
    for n, ordinals in enumerate(words["ordinals"], start=1):
        for ordinal in _listed(ordinals):
            for form in words["rib"]["plain"]:
                filled = form.replace("{ordinal}", ordinal).replace("{n}", str(n))
                yield _Form(_split(filled), f"rib_{{side}}_{n}", "needed")
            for form, side, word in _each_side(words["rib"]["with_side"], words):
                filled = form.replace("{ordinal}", ordinal).replace("{side}", word)
                yield _Form(_split(filled), f"rib_{side}_{n}")


def _vertebra_forms(words: dict[str, Any]) -> Iterator[_Form]:
    table = words["vertebra"]
    counts = {"C": 7, "T": 12, "L": 5, "S": 1}
    for region, count in counts.items():
        for n in range(1, count + 1):
            levels = [
                form.replace("{letter}", letter).replace("{n}", str(n))
                for letter in table[region]["letters"]
                for form in table["level"]
            ]
            slots = {
                "{level}": levels,
                "{ordinal}": _listed(words["ordinals"][n - 1]),
                "{region}": table[region]["regions"],
                "{short}": table[region]["short"],
            }
            for form in table["forms"]:
                used = [slot for slot in slots if slot in form]
                for values in itertools.product(*(slots[slot] for slot in used)):
                    filled = form.replace("{n}", str(n))
                    for slot, value in zip(used, values, strict=True):
                        filled = filled.replace(slot, value)
                    yield _Form(
                        _split(filled), f"vertebrae_{region}{n}", numbered=filled[-1].isdigit()
                    )
            for entry in table["bare"]:
                form, _, span = entry.partition(" ") if "-" in entry else (entry, "", "")
                low, high = map(int, span.split("-")) if span else (1, count)
                letter = form.replace("{n}", "").strip()
                if letter in table[region]["letters"] and low <= n <= high:
                    filled = form.replace("{n}", str(n))
                    yield _Form(_split(filled), f"vertebrae_{region}{n}", numbered=True)


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("synonyms.json").read_text(encoding="utf-8")
    return json.loads(text)


def languages() -> tuple[str, ...]:
    """Codes of the languages there are forms for."""
    return tuple(_tables())


@functools.cache
def _dictionary(language: str) -> _Dictionary:
    if language not in _tables():
        raise ValueError(f"the dictionary knows {', '.join(_tables())}, not {language!r}")
    return _Dictionary(language, _tables()[language])


def find(text: str, language: str, both: bool = False) -> list[Found]:
    """The structures named in `text`, in text order, leftmost-longest, none overlapping.

    `both`: also where both sides are named at once ("both kidneys", "the lungs"); such a mention
    has two classes. Raises ValueError for a language without forms.
    """
    return _dictionary(language).find(text, both)


def mentions(text: str, language: str) -> dict[str, str]:
    """{mention as it stands in the text: class name}, each once (case aside), in text order."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for one in find(text, language):
        if one.text.casefold() not in seen:
            seen.add(one.text.casefold())
            found[one.text] = one.classes[0]
    return found
