"""Other words for the questions on a slice, by a language model; the rule's answers stay.

A rule knows few wordings, and a model trained on them learns to expect those. So each question that
the rule puts is given to the endpoint once, which words it anew several times, and each slice draws
one of the wordings. What a model says is taken only if it can be seen to ask the same: it names
the same values (CT, axial, Abdomen …) and no other, speaks of the same subject and of no other, is
of the same form, denies nothing, and holds no number and nothing that may identify someone. So the
answer stays true whatever the model writes, and it is not given away.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from rg_jax.endpoint import Answer, Endpoint, Request
from tools import texts
from tools.slice_questions import WORDS, Pair
from tools.stages import Summary

INSTRUCTIONS = {
    "en": """You reword a question about a radiological image. You get the question and its answer.

Write exactly {count} other wordings of the question that ask the same, so that the answer stays
right word for word.

Rules:
- Every wording is one question in plain English and ends in a question mark; no wording twice.
- Names in the question (CT, axial, Abdomen …) stay in it, spelled the same; no others come in.
- The answer is not given away.
- Nothing is denied ("not", "without").
- No numbers, no names of persons, no dates.

Answer with JSON alone: {{"questions": ["...", ...]}}""",
    "de": """Du formulierst eine Frage zu einem radiologischen Bild um. Du bekommst die Frage und
ihre Antwort.

Schreibe genau {count} andere Formulierungen der Frage auf Deutsch, die dasselbe fragen, sodass die
Antwort Wort für Wort richtig bleibt.

Regeln:
- Jede ist eine Frage in einfachem Deutsch und endet mit einem Fragezeichen; keine zweimal.
- Namen in der Frage (CT, axial, Abdomen …) bleiben darin, gleich geschrieben; keine kommen hinzu.
- Die Antwort wird nicht verraten.
- Nichts wird verneint ("nicht", "kein", "ohne").
- Keine Zahlen, keine Namen von Personen, keine Daten.

Antworte nur mit JSON: {{"questions": ["...", ...]}}""",
}
SCHEMA = {
    "type": "object",
    "properties": {"questions": {"type": "array", "items": {"type": "string"}}},
    "required": ["questions"],
    "additionalProperties": False,
}
# By what a question shows its subject. The side of the patient is small, that of the image capital.
SUBJECTS = {
    "en": {
        "modality": r"modalit|imaging|technique|method|scan|acquired|taken|recorded|used",
        "body_part": r"region|body|anatom|examin|area",
        "plane": r"plane|orient|slice|cut|view",
        "left_at": r"(?-i:\bleft\b)",
    },
    "de": {
        "modality": r"modalit|bildgebung|verfahren|technik|methode|aufgenommen|aufnahme|verwend",
        "body_part": r"region|körper|anatom|untersucht|bereich",
        "plane": r"ebene|orientier|schnitt|schicht|ausricht",
        "left_at": r"(?-i:\blink)",
    },
}
# What another subject is spoken of by.
FOREIGN = {
    "en": {
        "modality": r"plane|region|body|patient",
        "body_part": r"plane|modalit|patient's (?:left|right)",
        "plane": r"modalit|region|body|patient's (?:left|right)",
        "left_at": r"plane|modalit|region|body|(?-i:\bright\b)",
    },
    "de": {
        "modality": r"ebene|region|körper|patient",
        "body_part": r"ebene|modalit|(?:linke|rechte)\w* seite",
        "plane": r"modalit|verfahren|region|körper|(?:linke|rechte)\w* seite",
        "left_at": r"ebene|modalit|verfahren|region|körper|(?-i:\brecht)",
    },
}
_EITHER = {"en": re.compile(r"\bor\b", re.I), "de": re.compile(r"\boder\b", re.I)}
_ASKING = {
    "en": re.compile(r"\b(?:what|which|how|where)\b", re.I),
    "de": re.compile(r"\b(?:welch\w*|was|wie|womit|wo|worin|wodurch)\b", re.I),
}
_DENIED = {
    "en": re.compile(r"\b(?:not?|never|without|neither|nor|other than|except|non)\b|n't\b", re.I),
    "de": re.compile(r"\b(?:nicht|kein\w*|nie|ohne|weder|außer|anders|statt)\b", re.I),
}


def names_in(question: str, language: str) -> dict[str, set[str]]:
    """{fact: the values that the question names}, case aside; sides only as single capitals."""
    found: dict[str, set[str]] = {}
    for fact, tables in WORDS.items():
        flags = re.NOFLAG if fact == "left_at" else re.IGNORECASE
        found[fact] = {
            key
            for key, name in tables[language].items()
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", question, flags)
        }
    return found


def _form(question: str, language: str) -> str:
    if _EITHER[language].search(question):
        return "one of two"
    return "open" if _ASKING[language].search(question) else "yes or no"


def refusal(wording: str, question: str, fact: str, language: str, identifying: re.Pattern) -> str:
    """Why a wording cannot stand for `question`, which asks for `fact`; "" if it can."""
    if not wording.endswith("?") or wording.count("?") > 1:
        return "no single question"
    if identifying.search(wording) or re.search(r"\d", wording):
        return "number or identifying text"
    if _DENIED[language].search(wording) and not _DENIED[language].search(question):
        return "denial"
    if _form(wording, language) != _form(question, language):
        return "another form of question"
    if names_in(wording, language) != names_in(question, language):
        return "other names than in the question"
    if not re.search(SUBJECTS[language][fact], wording, re.IGNORECASE) or re.search(
        FOREIGN[language][fact], wording, re.IGNORECASE
    ):
        return "another subject"
    return ""


class Wordings:
    """The wordings of each question, asked for once; without an endpoint only the rule's own."""

    def __init__(
        self,
        endpoint: Endpoint | None,
        count: int,
        identifying: re.Pattern,
        summary: Summary,
    ):
        self.endpoint = endpoint if count else None
        self.count = count
        self.identifying = identifying
        self.summary = summary
        self._known: dict[tuple[str, str], list[str]] = {}

    def learn(self, questions: Iterable[tuple[str, str, Pair]]) -> None:
        """Ask for the wordings of the (language, fact, pair) that are not known yet."""
        if self.endpoint is None:
            return
        new: dict[tuple[str, str], tuple[str, Pair]] = {}
        for language, fact, pair in questions:
            key = (language, str(pair["question"]))
            if key not in self._known:
                new.setdefault(key, (fact, pair))
        requests = [
            self._request(language, fact, pair) for (language, _), (fact, pair) in new.items()
        ]
        answers = self.endpoint.ask_all(requests)
        for (language, question), answer in zip(new, answers, strict=True):
            wordings: list[str] = []
            if isinstance(answer, Answer):
                fact = new[language, question][0]
                for wording in answer.value:
                    if reason := self._refusal(wording, question, fact, language):
                        self.summary.note(f"wording refused: {reason}", question)
                    else:
                        wordings.append(wording)
            else:
                self.summary.note(f"no other wording: {texts.reason_of(answer)}", question)
            self._known[language, question] = [question, *dict.fromkeys(wordings)]

    def of(self, language: str, pair: Pair, seed: int) -> Pair:
        """The pair in one of the wordings that are known of its question; `seed` draws."""
        known = self._known.get((language, str(pair["question"])), [pair["question"]])
        return {**pair, "question": known[seed % len(known)]}

    def _refusal(self, wording: str, question: str, fact: str, language: str) -> str:
        return refusal(wording, question, fact, language, self.identifying)

    def _request(self, language: str, fact: str, pair: Pair) -> Request:
        question = str(pair["question"])

        def check(value: Any) -> list[str]:
            found = value.get("questions") if isinstance(value, dict) else None
            if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
                raise ValueError("not the form asked for")
            wordings = [" ".join(one.split()) for one in found]
            reasons = [self._refusal(one, question, fact, language) for one in wordings]
            if all(reasons):
                raise ValueError(reasons[0] if reasons else "no wording")
            return wordings

        asked = {"question": question, "answer": pair["answer"]}
        if pair["choices"]:
            asked["choices"] = pair["choices"]
        messages = [
            {"role": "system", "content": INSTRUCTIONS[language].format(count=self.count)},
            {"role": "user", "content": json.dumps(asked, ensure_ascii=False)},
        ]
        return Request(messages, SCHEMA, check)
