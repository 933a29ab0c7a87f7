"""Cleaning of report sentences, context fields, questions and answers.

Two styles. "ours" mends Unicode and the spacing around punctuation without tearing numbers and
abbreviations apart; cleaning twice changes nothing. "published" does what the published data
preparation does, flaws included ("1.2 cm" → "1. 2 cm", "" → "."), for comparisons with it and for
models trained on such text.
"""

from __future__ import annotations

import re
import unicodedata

# What Windows-1252 means by the codes that Latin-1 leaves to control characters: text that was
# once decoded wrongly. Quotes and dashes become the ones a report is typed with.
_WINDOWS_1252 = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
_WINDOWS_1252 |= dict.fromkeys((0x82, 0x91, 0x92), "'") | dict.fromkeys((0x84, 0x93, 0x94), '"')
_WINDOWS_1252 |= dict.fromkeys((0x96, 0x97), "-") | {0x85: "..."}
_LINE_BREAKS = "\u2028\u2029"


class _Characters(dict[int, str]):
    """Replacement per code point for `str.translate`, worked out on first sight."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if code in _WINDOWS_1252:
            replacement = _WINDOWS_1252[code]
        elif character == "\n" or character in _LINE_BREAKS:
            replacement = "\n"
        elif character in "\t\v\f" or category == "Zs":  # NBSP and all the other blanks
            replacement = " "
        elif category in ("Cc", "Cf"):  # soft hyphen, zero-width, direction marks, controls
            replacement = ""
        else:
            replacement = character
        self[code] = replacement
        return replacement


_CHARACTERS = _Characters()
# The published replacements know "Š" as "S" and leave tabs alone.
_CHARACTERS_PUBLISHED = _Characters({9: "\t", 0x8A: "S", 0x9A: "s", 0x8E: "Z", 0x9E: "z"})

_LETTER = r"[^\W\d_]"
_MARK_BEFORE_LETTER = re.compile(rf"[.,:;!?](?={_LETTER})")
_SINGLE_LETTER_BEFORE = re.compile(rf"(?<!\w){_LETTER}\Z")
_SINGLE_LETTER_AFTER = re.compile(rf"{_LETTER}\.")


def clean_text(text: str, style: str = "ours") -> str:
    """Clean one text; see `clean_ours` and `clean_published`. Raises ValueError for a style."""
    if style == "ours":
        return clean_ours(text)
    if style == "published":
        return clean_published(text)
    raise ValueError(f"clean_text: style {style!r} is not 'ours' or 'published'")


def _spaced(match: re.Match[str]) -> str:
    """A mark and a blank, unless the mark stands inside an abbreviation such as z.B. or i.e."""
    text, start, end = match.string, match.start(), match.end()
    inside = (
        match.group() == "."
        and _SINGLE_LETTER_BEFORE.search(text, max(0, start - 2), start)
        and _SINGLE_LETTER_AFTER.match(text, end)
    )
    return match.group() if inside else match.group() + " "


def clean_ours(text: str) -> str:
    """Clean by our own rules.

    Unicode first (composed form, odd blanks and invisible characters, Windows-1252 leftovers);
    runs of blanks become one, blanks around line breaks and before .,:;!? go; the text ends in
    one of .!? (a dangling , : ; gives way to a full stop); a blank follows a mark only where a
    letter follows it and it is not inside an abbreviation of single letters. Empty stays empty.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CHARACTERS)
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r" +", " ", text)
    text = re.sub(r" ?\n[ \n]*", "\n", text)
    text = re.sub(r"[ \n]+(?=[.,:;!?])", "", text)
    text = re.sub(r"[\s,:;]+\Z", "", text.strip())
    if not text:
        return ""
    if not re.search(r"[.!?][\"'“”«»]*\Z", text):
        text += "."
    return _MARK_BEFORE_LETTER.sub(_spaced, text)


def clean_published(text: str) -> str:
    """Clean exactly as the published preparation does, flaws included.

    The order is part of it: punctuation first, characters last, so that it is not idempotent.
    """
    text = re.sub(r"\s+([.,:;!?])", r"\1", text)
    text = re.sub(r"([.,:;!?])(?=[^\s.,:;!?])", r"\1 ", text)
    text = re.sub(r"\s+\n", "\n", text).strip()
    if not text.endswith((".", "!", "?")):
        text += "."
    return text.translate(_CHARACTERS_PUBLISHED)
