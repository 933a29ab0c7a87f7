"""Tasks: one record → what is asked and what is to be answered.

    report       caption                        "Caption this image:"
    detect       caption with its places        "Caption this image and detect keywords:"
    vqa          the record's questions         question + "Answer:"
    detect_vqa   its grounded questions         question alone; answers with their places
    slake        all its own questions          question + "Answer:"; answers with their places
    segment      caption with its masks         "Caption this image and segment keywords:"
    segment_vqa  its grounded questions         question alone; answers with their masks
    joint        caption with boxes and masks   "Caption this image, detect and segment keywords:"
    joint_vqa    its grounded questions         question + "Answer, detect and segment:"; both

A task is one function that lists what a record offers for it in one language, as `Draft`s; it is
added by writing that function and naming it in a config. Everything else (drawing one, context,
boxes, marks, what happens when no box is left) is the same for all and stands in `make_sample`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rg_jax.data.augment import Crop
from rg_jax.errors import UserError
from rg_jax.grounding import prompts
from rg_jax.grounding.format import GroundingFormat
from rg_jax.grounding.spans import Entity, has_marks, write

Record = dict[str, Any]

# What is counted per sample; a batch holds one column for each, so that nothing is lost with
# worker processes or a resumed run.
COUNTER_NAMES = (
    "context_cut",
    "target_cut",
    "entities_dropped_by_cut",
    "entities_dropped_by_crop",
    "entities_without_class",
    "detect_became_report",
    "crop_withdrawn",
    "entities_without_mask",
    "masks_without_slot",
    "masks_without_pixel",
)
# What a task writes into its targets: nothing, boxes, masks or both.
MARKS = ("", "boxes", "masks", "both")


class Draft(NamedTuple):
    """One thing that a task could ask of a record.

    `field`: the text that is the target, "caption" or "qa/<index>/answer". `marks`: how its
    entities are written, one of MARKS. `place_needed`: whether it makes no sense without one.
    `question` and `choices` are empty for a caption, which has a context instead. `answer_type`:
    that of the question, "caption" for a caption.
    """

    task: str
    field: str
    text: str
    marks: str = ""
    place_needed: bool = False
    question: str = ""
    choices: tuple[str, ...] = ()
    answer_type: str = "caption"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training or evaluation sample, still without image and tokens.

    `prefix` is the text before the separator, `context` the part of it that may be cut. `target`
    is the marked text, `text` the same without marks, `marks` one of MARKS. `entities` are those
    that are marked: spans in `text`, boxes normalised to the crop; those with `mask` have the mask
    of their class. `counts`: COUNTER_NAMES that are not 0.
    """

    id: str
    record_id: str
    task: str
    language: str
    prefix: str
    target: str
    text: str
    entities: tuple[Entity, ...] = ()
    answer_type: str = ""
    modality: str = ""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    context: str = ""
    marks: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's name, its function, whether it is a caption with places (see `choose`), and
    whether its targets may have masks."""

    name: str
    drafts: Callable[[Record, str, GroundingFormat], list[Draft]]
    grounded_caption: bool
    has_masks: bool


TASKS: dict[str, Task] = {}


def _task(grounded_caption: bool = False, has_masks: bool = False):
    def register(function):
        name = function.__name__
        TASKS[name] = Task(name, function, grounded_caption, has_masks)
        return function

    return register


@_task()
def report(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The caption, without places."""
    caption = record["texts"].get(language, {}).get("caption", "")
    return [Draft("report", "caption", caption)] if caption.strip() else []


@_task(grounded_caption=True)
def detect(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The caption with its places, if it has any that the format can write."""
    return _grounded_caption("detect", "boxes", record, language, fmt)


@_task()
def vqa(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """Every question that is not a grounded one; answers without places."""
    return [d for d in _questions("vqa", record, language) if d.answer_type != "grounded"]


@_task()
def detect_vqa(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The grounded template questions. A denied structure's answer has no place."""
    return _grounded_questions("detect_vqa", "boxes", record, language, fmt)


@_task()
def slake(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The data set's own questions with SLAKE's prompt (its template questions: detect_vqa).

    Answers that have places are written with them where the format has box marks.
    """
    drafts = _questions("slake", record, language, marks="boxes" if fmt.has_boxes else "")
    return [d for d in drafts if d.answer_type != "grounded"]


@_task(grounded_caption=True, has_masks=True)
def segment(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The caption with its masks, if it names a structure that has one."""
    return _grounded_caption("segment", "masks", record, language, fmt)


@_task(has_masks=True)
def segment_vqa(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The grounded template questions, answered with masks; of records that have masks."""
    if not record["segmentation"].size:
        return []
    return _grounded_questions("segment_vqa", "masks", record, language, fmt)


@_task(grounded_caption=True, has_masks=True)
def joint(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The caption with box and mask of each structure that has both, and the box of the others."""
    if not record["segmentation"].size:
        return []
    return _grounded_caption("joint", "both", record, language, fmt)


@_task(has_masks=True)
def joint_vqa(record: Record, language: str, fmt: GroundingFormat) -> list[Draft]:
    """The grounded template questions, answered with box and mask; of records that have masks.

    It has a prompt of its own, so that one model can be asked for boxes, masks or both.
    """
    if not record["segmentation"].size:
        return []
    return _grounded_questions("joint_vqa", "both", record, language, fmt)


def _can_write(fmt: GroundingFormat, marks: str) -> bool:
    return {"boxes": fmt.has_boxes, "masks": fmt.has_masks}.get(
        marks, fmt.has_boxes and fmt.has_masks
    )


def _grounded_questions(task, marks, record, language, fmt) -> list[Draft]:
    if not _can_write(fmt, marks):
        return []
    # The bare prompt of grounded questions has no room for choices, and they have none.
    found = _questions(task, record, language, marks=marks)
    return [draft for draft in found if draft.answer_type == "grounded"]


def _grounded_caption(task, marks, record, language, fmt) -> list[Draft]:
    rows = _entities(record, language, "caption")
    if not _can_write(fmt, marks) or not any(_writable(row, fmt, marks, record) for row in rows):
        return []
    caption = record["texts"][language]["caption"]
    return [Draft(task, "caption", caption, marks=marks, place_needed=True)]


def _questions(task: str, record: Record, language: str, marks: str = "") -> list[Draft]:
    return [
        Draft(
            task,
            f"qa/{index}/answer",
            qa["answer"],
            marks=marks,
            question=qa["question"],
            choices=tuple(qa["choices"]) if qa["type"] == "multiple" else (),
            answer_type=qa["type"],
        )
        for index, qa in enumerate(record["qa"])
        if qa["language"] == language and qa["answer"].strip()
    ]


TASK_NAMES = tuple(TASKS)


def get_task(name: str) -> Task:
    """The task of that name. Raises UserError naming the known ones."""
    if name not in TASKS:
        raise UserError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name]


def drafts(
    record: Record, task: str, language: str, fmt: GroundingFormat
) -> tuple[list[Draft], int]:
    """What `task` can ask of a record in a language, and how many are left out for their text.

    A text that already holds something that looks like a mark cannot be a target: it would teach
    broken marks. In a prompt such text does no harm.
    """
    if task not in prompts.wording(language).prompts:
        return [], 0
    found = get_task(task).drafts(record, language, fmt)
    # Every mark has a "<": a look for it is cheap, and a scan comes here for every text there is.
    kept = [draft for draft in found if "<" not in draft.text or not has_marks(draft.text)]
    return kept, len(found) - len(kept)


def choose(
    available: Mapping[str, Collection[str]],
    task_weights: Mapping[str, float],
    languages: Sequence[str],
    rng: np.random.Generator,
    grounded_first: bool,
) -> tuple[str, str]:
    """Draws task and language for one sample of a record.

    `available`: per task the languages in which the record can do it (see `availability`).
    `grounded_first` is the paper's rule: a record with a grounded caption in every language of the
    mixture always does that task; one without does the others. Within what is left, tasks are
    drawn by weight and languages evenly. Raises UserError if nothing is left.
    """
    possible = [t for t, weight in task_weights.items() if weight > 0 and available.get(t)]
    if grounded_first:
        grounded = [t for t in possible if TASKS[t].grounded_caption]
        everywhere = [t for t in grounded if set(languages) <= set(available[t])]
        plain = [t for t in possible if t not in grounded]
        # With nothing but grounded captions, a record grounded in one language still takes part.
        possible = everywhere or plain or grounded
    if not possible:
        raise UserError("no task of the mixture applies to this record")
    task = possible[0]
    if len(possible) > 1:
        left = rng.random() * sum(task_weights[t] for t in possible)
        for task in possible:
            left -= task_weights[task]
            if left < 0:
                break
    spoken = [language for language in languages if language in available[task]]
    return task, spoken[draw_index(rng, len(spoken))]


def draw_index(rng: np.random.Generator, count: int) -> int:
    """An index below `count`, evenly; always exactly one draw, so that later ones stay put."""
    return int(rng.random() * count)


def availability(
    record: Record, tasks: Sequence[str], languages: Sequence[str], fmt: GroundingFormat
) -> dict[str, list[str]]:
    """Per task the languages in which a record can do it."""
    return {t: [lang for lang in languages if drafts(record, t, lang, fmt)[0]] for t in tasks}


def make_sample(
    record: Record,
    task: str,
    language: str,
    rng: np.random.Generator | None,
    fmt: GroundingFormat,
    crop: Crop | None = None,
    index: int | None = None,
    context: str | None = None,
    present: Collection[int] | None = None,
) -> Sample:
    """One sample of a record for a task that applies to it.

    `index` picks one of the task's drafts (the question); None draws one, or takes the first if
    there is no `rng`. `context` is what a caption is given (one of prompts.CONTEXTS); None draws
    it, or gives both fields if there is no `rng`. `crop` is the shown part of the image: boxes are
    relative to it. `present`: the classes that have pixels in it, None = every class named; an
    entity of another class has no mask. A grounded caption that keeps no place becomes a report,
    with its prompt.
    Raises UserError naming the record if the task does not apply or its spans are wrong.
    """
    found, _ = drafts(record, task, language, fmt)
    if not found:
        raise UserError(f"record {record['id']}: task {task!r} does not apply in {language!r}")
    if index is None:
        index = 0 if rng is None else draw_index(rng, len(found))
    if context is None:
        context = "both" if rng is None else prompts.CONTEXTS[draw_index(rng, 4)]
    draft, counts = found[index], {}
    entities: list[Entity] = []
    if draft.marks:
        entities = _placed(record, draft, language, fmt, crop, counts, present)
        if draft.place_needed and not entities:
            counts["detect_became_report"] = 1
            draft = report(record, language, fmt)[0]
    if draft.question:
        prefix = prompts.prefix(
            draft.task, language, question=draft.question, choices=draft.choices
        )
        shown = "\n".join([draft.question, *draft.choices])
    else:
        text = record["texts"][language]
        shown = prompts.report_context(
            language, text["clinical_information"], text["clinical_question"], context
        )
        prefix = prompts.prefix(draft.task, language, context=shown)
    try:
        target = write_marks(draft.text, entities, fmt, draft.marks)
    except ValueError as error:
        raise UserError(f"record {record['id']}: {draft.field} in {language!r}: {error}") from None
    return Sample(
        id=f"{record['id']}/{task}/{language}/{index}",
        record_id=record["id"],
        task=draft.task,
        language=language,
        prefix=prefix,
        target=target,
        text=draft.text,
        entities=tuple(entities),
        answer_type=draft.answer_type,
        modality=record["modality"],
        counts=counts,
        context=shown,
        marks=draft.marks,
    )


def write_marks(text: str, entities: Sequence[Entity], fmt: GroundingFormat, marks: str) -> str:
    """`text` with its entities written as `marks` says (one of MARKS)."""
    if not entities or not marks:
        return text
    return write(text, entities, fmt, boxes=marks != "masks", masks=marks != "boxes")


def _entities(record: Record, language: str, field: str) -> list[dict[str, Any]]:
    rows = record["entities"]
    return [row for row in rows if row["field"] == field and row["language"] == language]


def _writable(row: Mapping[str, Any], fmt: GroundingFormat, marks: str, record: Record) -> bool:
    if marks == "masks":
        return row["class_id"] != 0 and record["segmentation"].size > 0
    return fmt.has_boxes and (row["class_id"] != 0 or not fmt.id_required)


def _placed(
    record: Record,
    draft: Draft,
    language: str,
    fmt: GroundingFormat,
    crop: Crop | None,
    counts: dict[str, int],
    present: Collection[int] | None,
) -> list[Entity]:
    """The entities of a draft's text that can be written, in text order; others are counted."""
    if crop is None:
        height, width = record["image"].shape[:2]
        crop = Crop.full(width, height)
    kept: list[Entity] = []
    dropped = dict.fromkeys(
        ("entities_without_class", "entities_dropped_by_crop", "entities_without_mask"), 0
    )
    for row in _entities(record, language, draft.field):
        start, end, class_id = row["start"], row["end"], row["class_id"]
        if not _writable(row, fmt, draft.marks, record):
            dropped["entities_without_class"] += 1
            continue
        box = crop.place(row["box"])
        if box is None:
            dropped["entities_dropped_by_crop"] += 1
            continue
        mask = draft.marks != "boxes" and class_id != 0 and (present is None or class_id in present)
        if draft.marks != "boxes" and not mask:
            dropped["entities_without_mask"] += 1
            if draft.marks == "masks":
                continue
        kept.append(Entity(draft.text[start:end], start, end, class_id, box, mask))
    counts.update({name: count for name, count in dropped.items() if count})
    return sorted(kept, key=lambda entity: entity.start)
