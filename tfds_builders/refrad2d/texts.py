"""Texts of a RefRad2D row: captions, contexts, questions, and where mentions stand in them."""

from collections.abc import Callable, Collection
from typing import Any

from rg_jax.grounding.anatomy import id_of
from rg_jax.grounding.cleaning import clean_text
from rg_jax.grounding.contradictions import contradiction
from rg_jax.grounding.spans import find_mentions
from tfds_builders.letters import broken_letters
from tfds_builders.problems import Found, Problem
from tfds_builders.refrad2d.files import KEYWORDS, STRUCTS

QA_TYPES = ("open", "closed", "yesno", "multiple")
_FIELDS = {
    "caption": "CleanedSentence",
    "clinical_information": "ReportKlinischeAngabenCleaned",
    "clinical_question": "ReportFragestellungCleaned",
}
Report = Callable[[Problem], None]


def texts_of(row: dict[str, Any], languages, style: str, where: str, report: Report):
    """The record's `texts`. `where` names the row in problems."""
    texts = {}
    for language in languages:
        struct = _struct(row, language, where, report)
        if struct is None:
            continue
        fields = {}
        for field, column in _FIELDS.items():
            place = f"{where} {STRUCTS[language]}/{column}"
            text = _text(struct.get(column), place)
            if not text.strip():
                report(Problem("empty field", where, f"{STRUCTS[language]}/{column}", False))
            # Empty is decided first: the published style makes a full stop of it.
            fields[field] = _whole(clean_text(text, style), place) if text.strip() else ""
        texts[language] = fields
    return texts


def questions_of(row: dict[str, Any], languages, where: str, report: Report):
    """The record's `qa`: dicom_vqa, then snippet_vqa, language by language."""
    made = []
    for language in languages:
        struct = _struct(row, language, where, None)
        for column in ("dicom_vqa", "snippet_vqa"):
            rows = (struct or {}).get(column)
            for number, found in enumerate(rows if rows is not None else ()):
                place = f"{STRUCTS[language]}/{column}/{number}"
                question = _question(found, language, f"{where} {place}")
                if question is None:
                    report(Problem("empty field", where, f"{place}: left out", False))
                    continue
                if question["type"] == "multiple" and not question["choices"]:
                    report(Problem("multiple choice without choices", where, place, False))
                made.append(question)
    return made


def _question(found: Any, language: str, place: str) -> dict[str, Any] | None:
    if not isinstance(found, dict):
        raise Found("unreadable file", place, "is no question with fields")
    question = _short(_text(found.get("question"), place), place)
    answer = _short(_text(found.get("answer"), place), place)
    if not question or not answer:
        return None
    kind = _text(found.get("question_type"), place).strip().lower()
    if kind not in QA_TYPES:
        raise Found(
            "unknown question type", place, f"type {kind!r} is not one of {', '.join(QA_TYPES)}"
        )
    rows = found.get("choices")
    choices = [_short(_text(choice, place), place) for choice in (rows if rows is not None else ())]
    return {
        "language": language,
        "question": question,
        "answer": answer,
        "type": kind,
        "choices": [choice.replace("\n", " ") for choice in choices if choice],
    }


def _short(text: str, place: str) -> str:
    """A question, an answer or a choice: cleaned, but "CT" does not become "CT."."""
    cleaned, end = _whole(clean_text(text), place), text.rstrip()
    return cleaned[:-1] if cleaned.endswith(".") and not end.endswith(".") else cleaned


def _struct(row: dict[str, Any], language: str, where: str, report: Report | None):
    struct = row.get(STRUCTS[language])
    if struct is None and report is not None:
        report(Problem("empty field", where, f"no text in {STRUCTS[language]}", False))
    return struct


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Found("unreadable file", place, f"holds a {type(value).__name__}, not a text")
    return _whole(value, place, raw=True)


def _whole(text: str, place: str, raw: bool = False) -> str:
    if damage := broken_letters(text, raw):
        raise Found("encoding damage", place, damage)
    return text


def mentions_of(
    entry: dict[str, Any], language: str, where: str, report: Report
) -> list[tuple[str, int]]:
    """The (mention, class id) pairs that the index lists for a language.

    Those whose own words name another class or side are told and left out. Problems name a mention
    by its number in the list: words of a report do not leave the data.
    """
    mentions = []
    for number, row in enumerate(entry.get(KEYWORDS[language]) or ()):
        place = f"{KEYWORDS[language]}/{number}"
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
            raise Found("unreadable file", where, f"{place} is not [text, class, id]")
        mention, name, class_id = row
        try:
            known = id_of(str(name))
        except ValueError as error:
            raise Found("unknown class", where, f"{place}: {error}") from None
        if known != class_id:
            raise Found(
                "unknown class",
                where,
                f"{place}: class {name} has id {known}, not {class_id}",
            )
        if reason := contradiction(mention, str(name), language):
            report(Problem(f"{reason}, left out", where, f"{place}: class {name}", False))
            continue
        mentions.append((mention, known))
    return mentions


def entities_of(
    caption: str,
    mentions: list[tuple[str, int]],
    boxes: dict[int, tuple[float, ...]],
    language: str,
    where: str,
    report: Report,
) -> list[dict[str, Any]]:
    """The entities of a caption: every occurrence of a mention whose class has a box.

    Sentences begin with capitals and headings shout, so case is ignored. What is not tagged is
    told: a mention that the caption does not hold, or whose class is not on the slice.
    """
    for mention, class_id in dict.fromkeys(mentions):
        place = f"{KEYWORDS[language]}/{mentions.index((mention, class_id))}"
        if not find_mentions(caption, [(mention, class_id)], lambda _: True, ignore_case=True):
            report(Problem("mention not in its text", where, place, False))
        elif not _has_place(mention, mentions, boxes):
            text = f"{place}: class {class_id} is not on the slice"
            report(Problem("mention without mask", where, text, False))
    return [
        {
            "language": language,
            "field": "caption",
            "start": start,
            "end": end,
            "class_id": class_id,
            "box": boxes[class_id],
        }
        for start, end, class_id in find_mentions(caption, mentions, boxes, ignore_case=True)
    ]


def _has_place(mention: str, mentions: list[tuple[str, int]], boxes: Collection[int]) -> bool:
    """Whether any of the classes that a mention is listed with is on the slice."""
    return any(class_id in boxes for other, class_id in mentions if other == mention)
