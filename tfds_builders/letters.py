"""The letters of texts: whether they came through all the programs before us undamaged.

Builders refuse what the data check fails: both ask here.
"""

import re
from collections.abc import Iterator

from rg_jax.data import record
from rg_jax.data.record import Record


def texts_of(item: Record) -> Iterator[tuple[str, str]]:
    """(where, text) of every text that a model reads or learns to write."""
    for language, row in item["texts"].items():
        for field in record.TEXT_FIELDS:
            yield f"texts/{language}/{field}", row[field]
    for index, row in enumerate(item["qa"]):
        yield f"qa/{index}/question", row["question"]
        yield f"qa/{index}/answer", row["answer"]
        for choice in row["choices"]:
            yield f"qa/{index}/choices", choice


def is_learnt(where: str) -> bool:
    """Whether a model learns to write the text of a place; others it only reads."""
    return where.endswith(("/caption", "/answer"))


def _as_cp1252(byte: int) -> str:
    """How a byte looks when it is taken for Windows-1252; five of them look like Latin-1."""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


# UTF-8 taken for something else, by beginnings that no English or German word holds: as
# Windows-1252 "Ã" (the byte behind it may have become a blank), "Â", "â€" and its like; as MacRoman
# "√"; as DOS "├".
_FOLLOWING = re.escape("".join(_as_cp1252(b) + chr(b) for b in range(0x80, 0xC0)))
_MOJIBAKE = re.compile(
    f"Ã[{_FOLLOWING} ]|Â[{_FOLLOWING}]|â[€‚„†ˆ‰\x80\x82\x84\x86\x88\x89]|ï»¿|ï¿½"
    "|√[§∂ºüÑñúÜ©]|├[^\\s─├]"
)
# Control characters but for tab and line break, half pairs, private use, non-characters.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufff9-\ufffb\ufffe\uffff]"
)
_LEFTOVER = re.compile(
    r"&(?:[a-zA-Z]{2,8}|#x?[0-9a-fA-F]{2,6});|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}"
)


def broken_letters(text: str, raw: bool = False) -> str:
    """What is damaged in the letters of a text, in words; empty if nothing is.

    Replacement characters, control characters, UTF-8 read as another encoding ("LÃ¤sion"),
    leftovers of HTML ("&auml;") or of escapes ("\\u00e4"). In a `raw` text, which is still to be
    cleaned, control characters are let pass: cleaning mends them.
    """
    if (at := text.find("\ufffd")) >= 0:
        return f"U+FFFD, a lost letter, at character {at}"
    if not raw and (match := _UNPRINTABLE.search(text)):
        return f"U+{ord(match[0]):04X}, no printable character, at character {match.start()}"
    if not text.isascii() and (match := _MOJIBAKE.search(text)):
        return f"{match[0]!r} at character {match.start()}: UTF-8 was read as another encoding"
    if match := _LEFTOVER.search(text):
        return f"{match[0]!r} at character {match.start()}: a leftover of HTML or an escape"
    return ""
