"""What stands before the target: prompts, contexts, and the template questions of grounded VQA.

Everything a language needs stands in one `Wording`; a new language is a new entry of `WORDINGS`.
A prefix is the whole text before the separator; the separator "\\n" is the tokenizer layer's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from rg_jax.grounding.cleaning import clean_text

CONTEXTS = ("none", "information", "question", "both")
# How the text before the separator is laid out: a context line and a prompt, a question and a
# prompt, or a question alone.
LAYOUT_OF_TASK = {
    "report": "context",
    "detect": "context",
    "segment": "context",
    "joint": "context",
    "vqa": "question",
    "slake": "question",
    "vqa_rad": "question",
    "detect_vqa": "bare",
    "segment_vqa": "bare",
    "joint_vqa": "question",
}


@dataclasses.dataclass(frozen=True)
class Wording:
    """The strings of one language.

    `prompts`: per task. A task that is missing here does not exist in the language.
    `yes_no`: (question, answer if visible, answer if not), each with one {name}.
    `which`: (question, answer), the answer with one {names}. `comma`, `last`: how a list is
    joined. The templates need no article or number, so that they fit any name.
    """

    prompts: Mapping[str, str]
    information_label: str = ""
    question_label: str = ""
    yes_no: tuple[tuple[str, str, str], ...] = ()
    which: tuple[tuple[str, str], ...] = ()
    comma: str = ", "
    last: str = " "


def _answer_prompts(answer: str) -> dict[str, str]:
    bare = {task: "" for task, layout in LAYOUT_OF_TASK.items() if layout == "bare"}
    return {**dict.fromkeys(("vqa", "slake", "vqa_rad"), answer), **bare}


WORDINGS: dict[str, Wording] = {
    "en": Wording(
        prompts={
            "report": "Caption this image:",
            "detect": "Caption this image and detect keywords:",
            "segment": "Caption this image and segment keywords:",
            "joint": "Caption this image, detect and segment keywords:",
            "joint_vqa": "Answer, detect and segment:",
            **_answer_prompts("Answer:"),
        },
        information_label="Clinical information:",
        question_label="Question:",
        yes_no=(
            (
                "Does this image show the following structure: {name}?",
                "Yes, the image shows: {name}.",
                "No, the image does not show: {name}.",
            ),
            (
                "Is the following visible in this image: {name}?",
                "Yes, visible: {name}.",
                "No, not visible: {name}.",
            ),
            (
                "Can this structure be seen here: {name}?",
                "Yes, to be seen here: {name}.",
                "No, not to be seen here: {name}.",
            ),
        ),
        which=(
            ("Which structures are visible in this image?", "Visible in this image: {names}."),
            ("What can be seen in this image?", "Seen in this image: {names}."),
            ("Which structures does this image show?", "The image shows: {names}."),
        ),
        last=" and ",
    ),
    "de": Wording(
        prompts={
            "report": "Beschreibe dieses Bild:",
            "detect": "Beschreibe dieses Bild und detektiere Schlüsselwörter:",
            "segment": "Beschreibe dieses Bild und segmentiere die Schlüsselwörter:",
            "joint": "Beschreibe dieses Bild, detektiere und segmentiere die Schlüsselwörter:",
            "joint_vqa": "Antworte, detektiere und segmentiere:",
            **_answer_prompts("Antwort:"),
        },
        information_label="Klinische angaben:",
        question_label="Fragestellung:",
        yes_no=(
            (
                "Zeigt dieses Bild die folgende Struktur: {name}?",
                "Ja, das Bild zeigt: {name}.",
                "Nein, das Bild zeigt nicht: {name}.",
            ),
            (
                "Ist auf diesem Bild Folgendes sichtbar: {name}?",
                "Ja, sichtbar: {name}.",
                "Nein, nicht sichtbar: {name}.",
            ),
            (
                "Ist diese Struktur hier zu erkennen: {name}?",
                "Ja, hier zu erkennen: {name}.",
                "Nein, hier nicht zu erkennen: {name}.",
            ),
        ),
        which=(
            (
                "Welche Strukturen sind auf diesem Bild sichtbar?",
                "Auf diesem Bild sichtbar: {names}.",
            ),
            ("Was ist auf diesem Bild zu erkennen?", "Auf diesem Bild zu erkennen: {names}."),
            ("Welche Strukturen zeigt dieses Bild?", "Das Bild zeigt: {names}."),
        ),
        last=" und ",
    ),
    # SLAKE asks in Chinese too; there are no reports and no class names in it.
    "zh": Wording(prompts=_answer_prompts("答案：")),
}


def wording(language: str) -> Wording:
    """The strings of a language. Raises ValueError naming the known ones."""
    try:
        return WORDINGS[language]
    except KeyError:
        raise ValueError(f"language {language!r} is not one of {', '.join(WORDINGS)}") from None


def prompt(task: str, language: str) -> str:
    """The prompt of a task, without the blank behind it; empty for grounded VQA."""
    if task not in LAYOUT_OF_TASK:
        raise ValueError(f"task {task!r} is not one of {', '.join(LAYOUT_OF_TASK)}")
    prompts = wording(language).prompts
    if task not in prompts:
        raise ValueError(f"task {task!r} has no prompt in language {language!r}")
    return prompts[task]


def prefix(
    task: str,
    language: str,
    context: str = "",
    question: str = "",
    choices: Sequence[str] = (),
) -> str:
    """The text between BOS and the separator.

    Reports, grounded or not: "\\n" + context + "\\n" + prompt + " ", an empty context leaves its
    line empty. VQA: the question (and the choices, a line each) in the context's place. Grounded
    VQA: "\\n" + question + " ". Raises ValueError for what the task has no place for.
    """
    words = prompt(task, language)
    layout = LAYOUT_OF_TASK[task]
    if layout == "context":
        if question or choices:
            raise ValueError(f"task {task!r} takes a context, not a question or choices")
        return f"\n{context}\n{words} "
    if context:
        raise ValueError(f"task {task!r} takes a question, not a context")
    if not question:
        raise ValueError(f"task {task!r} needs a question")
    if layout == "question":
        lines = "\n".join([question, *choices])
        return f"\n{lines}\n{words} "
    if choices:
        raise ValueError(f"task {task!r} has no choices")
    return f"\n{question} "


def report_context(
    language: str,
    clinical_information: str = "",
    clinical_question: str = "",
    which: str = "both",
    style: str = "ours",
) -> str:
    """The context of a report: the chosen fields, cleaned, each on a line behind its label.

    `which` is one of CONTEXTS. An empty field is left out with its label; if both fields say the
    same it is written once, as clinical information. `style` is that of `clean_text`.
    """
    if which not in CONTEXTS:
        raise ValueError(f"context {which!r} is not one of {', '.join(CONTEXTS)}")
    words = wording(language)
    fields = []
    for kind, label, text in (
        ("information", words.information_label, clinical_information),
        ("question", words.question_label, clinical_question),
    ):
        # Empty is decided before cleaning: the published style turns it into a full stop.
        if which in (kind, "both") and text.strip():
            cleaned = clean_text(text, style)
            if cleaned and cleaned not in [known for _, known in fields]:
                fields.append((label, cleaned))
    return "\n".join(f"{label} {text}" for label, text in fields)


@dataclasses.dataclass(frozen=True)
class GroundedQuestion:
    """A template question; `mentions` are (start, end, class_id) in the answer, in text order.

    `kind`: "yes" and "no" ask for one structure, "which" for all. "no" answers have no mention.
    """

    kind: str
    question: str
    answer: str
    mentions: tuple[tuple[int, int, int], ...] = ()


def _fill(template: str, slot: str, names: Sequence[tuple[int, str]], words: Wording):
    """The template with the names in its slot, and where each name stands."""
    position = template.index(slot)
    before, after = template[:position], template[position + len(slot) :]
    text, mentions = before, []
    for i, (class_id, name) in enumerate(names):
        if i:
            text += words.last if i == len(names) - 1 else words.comma
        mentions.append((len(text), len(text) + len(name), class_id))
        text += name
    return text + after, tuple(mentions)


def grounded_questions(
    present: Sequence[tuple[int, str]],
    absent: Sequence[tuple[int, str]],
    language: str,
    rng: np.random.Generator,
    max_listed: int | None = None,
) -> list[GroundedQuestion]:
    """Questions about which structures are visible, with answers that claim nothing absent.

    `present` and `absent` are (class id, name as it shall be written); the caller chooses how
    many (see `anatomy.absent_classes`). One "yes" question per present and one "no" question per
    absent structure, and one "which" question that lists all present ones, in the order given;
    none if nothing is present or more than `max_listed` are, since a list cut short would be
    false. `rng` picks the wording. Raises ValueError if a name is both present and absent.
    """
    words = wording(language)
    if not words.yes_no or not words.which:
        raise ValueError(f"language {language!r} has no templates for grounded questions")
    both = {name for _, name in present} & {name for _, name in absent}
    if both:
        raise ValueError(f"both present and absent: {', '.join(sorted(both))}")
    made = []
    for structure in present:
        question, yes, _ = words.yes_no[int(rng.integers(len(words.yes_no)))]
        answer, mentions = _fill(yes, "{name}", [structure], words)
        made.append(
            GroundedQuestion("yes", question.replace("{name}", structure[1]), answer, mentions)
        )
    for structure in absent:
        question, _, no = words.yes_no[int(rng.integers(len(words.yes_no)))]
        answer, _ = _fill(no, "{name}", [structure], words)
        made.append(GroundedQuestion("no", question.replace("{name}", structure[1]), answer))
    if present and (max_listed is None or len(present) <= max_listed):
        question, listing = words.which[int(rng.integers(len(words.which)))]
        answer, mentions = _fill(listing, "{names}", present, words)
        made.append(GroundedQuestion("which", question, answer, mentions))
    return made
