"""What is said about a drawn slice: captions, questions and answers in English and German.

Everything follows from the organs as the perfect reader finds them (`drawing.read_slice`), so that
a model that sees perfectly can say exactly this and nothing else. Each class has one name per
language, that of the class schema.
"""

from collections.abc import Sequence

import numpy as np

from rg_jax.grounding.anatomy import display
from rg_jax.grounding.prompts import grounded_questions
from tfds_builders.phantom.drawing import KINDS, Organ

LANGUAGES = ("en", "de")
ORDERS = ("fixed", "longest_first", "shortest_first")
LARGEST_MARGIN = 1.3  # the largest organ is asked for only if it is this much larger than the next

# German adjectives and articles follow the gender of the noun.
_FEMININE = {"small": "kleine", "large": "große"}
_MASCULINE = {"small": "kleiner", "large": "großer"}
_SIZE_WORDS = {
    "en": lambda organ: organ.size,
    "de": lambda organ: (_MASCULINE if organ.name == "stomach" else _FEMININE)[organ.size],
}
_ARTICLE = {
    "en": lambda name: "the",
    "de": lambda name: "der" if name == "stomach" else "die",
}
_WORDS = {
    "en": {
        "slice": "{modality} slice: {organs}.",
        "empty": "{modality} slice without organs.",
        "presence": "Is {article} {name} visible?",
        "count": "How many organs are visible?",
        "modality": "Which modality is this?",
        "largest": "Which organ is the largest?",
        "side": "On which side of the patient is {article} {name}?",
        "choice": "Which of these organs is visible?",
        "yes": "Yes",
        "no": "No",
        "left": "Left",
        "right": "Right",
        "information": ("", "", "Abdominal pain.", "Follow-up.", "Fever."),
        "question": ("", "", "Which organs are visible?", "Size of the organs?"),
    },
    "de": {
        "slice": "{modality}-Schicht: {organs}.",
        "empty": "{modality}-Schicht ohne Organe.",
        "presence": "Ist {article} {name} zu sehen?",
        "count": "Wie viele Organe sind zu sehen?",
        "modality": "Welche Modalität ist das?",
        "largest": "Welches Organ ist das größte?",
        "side": "Auf welcher Seite des Patienten liegt {article} {name}?",
        "choice": "Welches dieser Organe ist zu sehen?",
        "yes": "Ja",
        "no": "Nein",
        "left": "Links",
        "right": "Rechts",
        "information": ("", "", "Bauchschmerzen.", "Verlaufskontrolle.", "Fieber."),
        "question": ("", "", "Welche Organe sind zu sehen?", "Größe der Organe?"),
    },
}


def name_of(organ: str, language: str) -> str:
    """The one name of a class in a language, as it stands in all texts."""
    return display(KINDS[organ].class_id, language)


def in_order(organs: Sequence[Organ], order: str, language: str) -> list[Organ]:
    """The organs as they are to be named: as they come, or by the length of their names.

    The two lengthwise orders are for showing that masks follow their mentions, not their lengths.
    """
    if order == "fixed":
        return list(organs)
    longest = order == "longest_first"
    return sorted(organs, key=lambda o: len(name_of(o.name, language)), reverse=longest)


def caption(organs: Sequence[Organ], modality: str, language: str):
    """The caption and where it names organs: (text, [(start, end, organ)])."""
    words = _WORDS[language]
    if not organs:
        return words["empty"].format(modality=modality), []
    parts, spans = [], []
    position = len(words["slice"].split("{organs}")[0].format(modality=modality))
    for organ in organs:
        size, name = _SIZE_WORDS[language](organ), name_of(organ.name, language)
        start = position + len(size) + 1
        spans.append((start, start + len(name), organ))
        parts.append(f"{size} {name}")
        position = start + len(name) + len(", ")
    return words["slice"].format(modality=modality, organs=", ".join(parts)), spans


def context(language: str, rng: np.random.Generator) -> tuple[str, str]:
    """Clinical information and clinical question; both say nothing about the picture."""
    words = _WORDS[language]
    return tuple(str(rng.choice(words[field])) for field in ("information", "question"))


def questions(
    organs: Sequence[Organ],
    modality: str,
    possible: Sequence[str],
    language: str,
    rng: np.random.Generator,
):
    """Questions with answers, in the form of the record's `qa`, and the spans of the grounded ones.

    `possible`: the organs that this data set draws; absent ones are taken from them. Returns
    (rows, [(index of the row, start, end, organ)]). With the same `rng` state both languages ask
    about the same things.
    """
    words = _WORDS[language]
    by_name = {organ.name: organ for organ in organs}
    absent = [name for name in possible if name not in by_name]

    def name(organ: str) -> str:
        return name_of(organ, language)

    def answer(organ: str) -> str:
        return name(organ)[0].upper() + name(organ)[1:]

    def ask(kind: str, organ: str = "") -> str:
        if not organ:
            return words[kind]
        article = _ARTICLE[language](organ)
        return words[kind].format(article=article, name=name(organ))

    rows = [
        _row(language, ask("modality"), modality, "open"),
        _row(language, ask("count"), str(len(organs)), "open"),
    ]
    # Drawn in every case, needed or not: both languages then stay in step.
    seen, missing, sided, chosen = (rng.random() for _ in range(4))
    order, others = rng.permutation(4), rng.permutation(len(absent))[:3]
    if organs:
        organ = organs[int(seen * len(organs))].name
        rows.append(_row(language, ask("presence", organ), words["yes"], "yesno"))
    if absent:
        organ = absent[int(missing * len(absent))]
        rows.append(_row(language, ask("presence", organ), words["no"], "yesno"))
    by_area = sorted(organs, key=lambda organ: -organ.area)
    if len(organs) > 1 and by_area[0].area >= LARGEST_MARGIN * by_area[1].area:
        rows.append(_row(language, ask("largest"), answer(by_area[0].name), "open"))
    # A kidney tells its side by its name.
    off_centre = [organ for organ in organs if organ.side and not KINDS[organ.name].side]
    if off_centre:
        organ = off_centre[int(sided * len(off_centre))]
        rows.append(_row(language, ask("side", organ.name), words[organ.side], "closed"))
    if organs and len(absent) >= 3:
        right = organs[int(chosen * len(organs))].name
        offered = [right, *(absent[i] for i in others)]
        choices = [answer(offered[i]) for i in order]
        rows.append(_row(language, ask("choice"), answer(right), "multiple", choices))

    present = [(organ.class_id, name(organ.name)) for organ in organs]
    grounded = grounded_questions(
        present, [(KINDS[organ].class_id, name(organ)) for organ in absent], language, rng
    )
    # One of each kind is enough per record: the next record asks about other organs.
    spans = []
    by_class = {organ.class_id: organ for organ in organs}
    for kind, pick in (("yes", chosen), ("no", sided), ("which", 0.0)):
        of_kind = [question for question in grounded if question.kind == kind]
        if not of_kind:
            continue
        question = of_kind[int(pick * len(of_kind))]
        spans += [(len(rows), start, end, by_class[c]) for start, end, c in question.mentions]
        rows.append(_row(language, question.question, question.answer, "grounded"))
    return rows, spans


def _row(language, question, answer, kind, choices=()):
    return {
        "language": language,
        "question": question,
        "answer": answer,
        "type": kind,
        "choices": list(choices),
    }
