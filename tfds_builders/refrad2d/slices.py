"""One slice of RefRad2D → one common record. Runs in worker processes; imports no TFDS."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.data import dicom
from rg_jax.data.record import Record, encode
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import NUM_CLASSES, SEGMENTED_IN, absent_classes, display
from rg_jax.grounding.boxes import boxes_of_mask, check_box, union_box
from rg_jax.grounding.prompts import grounded_questions
from tfds_builders import packed, splits
from tfds_builders.doubts import doubts
from tfds_builders.problems import Found, Problem
from tfds_builders.refrad2d import texts
from tfds_builders.refrad2d.files import Places

MODALITIES = ("CT", "MR")
# Per slice and language: so many structures that are there are asked for, and so many that are not.
ASKED = 4
UNLIKE = "box unlike its mask"
# A longer list of what is visible does not fit into 200 tokens, and a shorter one would be false.
MAX_LISTED = 12


@dataclasses.dataclass(frozen=True)
class Options:
    """What all jobs of a build share."""

    places: Places
    languages: tuple[str, ...]
    style: str  # of text cleaning
    templates: str  # "sampled", "all" or "none"
    licence: str
    packing: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """One record to be made. `entry` is its row of an index, `row` its row of the parquet.

    `sampled`: a grounded-VQA slice, whose values lie in a file of the segment folder.
    """

    id: str
    slice_id: str
    modality: str
    group: str
    index: str  # the file of `entry`, as it is told
    entry: dict[str, Any] | None
    row: dict[str, Any] | None
    sampled: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job: a record (or packed example) or none, and what there is to tell."""

    record: Record | packed.Packed | None
    problems: tuple[Problem, ...]
    digest: int = 0


def run(work: tuple[Options, Job]) -> Outcome:
    """Make one record. Problems are told in the outcome, a missing package is raised."""
    options, job = work
    problems: list[Problem] = []
    try:
        record = _sampled(options, job, problems) if job.sampled else _slice(options, job, problems)
        # Both check the record; a data check looks at it as it is, and for doubts itself.
        made = packed.pack(record) if options.packing else record
        if options.packing:
            _doubt(record, _place_of(options, job), problems)
        else:
            encode(record)
    except Found as error:
        return Outcome(None, (*problems, error.problem))
    except UserError as error:
        if 'pip install -e ".[' in str(error):
            raise
        return Outcome(None, (*problems, Problem("not a valid record", job.index, str(error))))
    except Exception as error:  # an entry of a form that nobody thought of must not end the build
        reason = " ".join(str(error).split())[:200]
        text = f"{job.id} is not of the form that is expected ({type(error).__name__}: {reason})"
        return Outcome(None, (*problems, Problem("unreadable entry", job.index, text)))
    return Outcome(made, tuple(problems), splits.digest_of(record["image"]))


def _place_of(options: Options, job: Job) -> str:
    """Where to look for a record whose content is at fault, relative to the source."""
    if job.sampled:
        return f"{job.index}: {job.id}"
    return options.places.name(options.places.dicom(job.slice_id))


def _doubt(record: Record, place: str, problems: list[Problem]) -> None:
    """Adds what is doubtful about a record, but for kinds of which it was told already."""
    told = {problem.kind for problem in problems}
    # A slow look, and needless where every box is that of its mask.
    for kind, detail, harmful in doubts(record, places=UNLIKE in told):
        if harmful:
            raise Found(kind, place, detail)
        if kind not in told:
            problems.append(Problem(kind, place, detail, False))


def _slice(options: Options, job: Job, problems: list[Problem]) -> Record:
    places, parquet = options.places, options.places.name(options.places.parquet)
    where = f"{parquet}: {job.slice_id}"
    if job.row is None:
        raise Found("missing file", parquet, f"has no row of slice {job.slice_id}")
    if job.row.get("modality") != job.modality:
        raise Found(
            "unsupported modality"
            if job.row.get("modality") not in MODALITIES
            else "wrong modality",
            where,
            f"modality {job.row.get('modality')!r} in a split of {job.modality}",
        )
    read = _read(places, job, problems)
    record = _empty(options, job, read)
    record["texts"] = texts.texts_of(
        job.row, options.languages, options.style, where, problems.append
    )
    record["qa"] = texts.questions_of(job.row, options.languages, where, problems.append)
    place = f"{job.index}: {job.id}"
    if job.entry is None:
        problems.append(Problem("slice without boxes", place, "is not in the index", False))
        return record
    record["segmentation"], boxes = _places_on(options, job, read.pixels.shape, problems)
    for language, fields in record["texts"].items():
        mentions = texts.mentions_of(job.entry, language, place, problems.append)
        record["entities"] += texts.entities_of(
            fields["caption"], mentions, boxes, language, place, problems.append
        )
    if options.templates == "all":
        _ask(record, boxes, options.languages)
    return record


def _sampled(options: Options, job: Job, problems: list[Problem]) -> Record:
    """A grounded-VQA slice: values instead of stored pixels, no text but template questions."""
    written = (job.entry or {}).get("scan_slice_path")
    if not isinstance(written, str) or not written:
        raise Found("missing file", job.index, f"{job.id} has no scan_slice_path")
    path = options.places.listed(written)
    name = options.places.name(path)
    values = _array(path, name)
    if not np.isfinite(values).all():
        raise Found("unreadable file", name, "holds values that are no numbers")
    header = None
    if job.slice_id and options.places.dicom(job.slice_id).is_file():
        header = _read(options.places, job, [])
        if header.pixels.shape != values.shape:
            header = None
    stored, rescale, rounded = store(values, header.rescale if header else None)
    if rounded:
        text = "values are no whole numbers of any step"
        problems.append(Problem("values rounded to 16 bits", name, text, False))
    read = dicom.Slice(
        stored, rescale, job.modality, header.spacing_mm if header else (0.0, 0.0), None, None
    )
    record = _empty(options, job, read)
    record["segmentation"], boxes = _places_on(options, job, values.shape, problems)
    if not boxes:
        problems.append(
            Problem("slice without boxes", f"{job.index}: {job.id}", "no structure on it", False)
        )
    _ask(record, boxes, options.languages)
    return record


def store(values: np.ndarray, known: tuple[float, float] | None):
    """Values → (int16 pixels, (slope, intercept), whether anything was rounded).

    As whole numbers if they are; else by the rescale that is known of the slice, or by the
    smallest step between two values; else in 65,535 steps over their range.
    """
    values = np.asarray(values, np.float64)
    low, high = float(values.min()), float(values.max())
    steps = np.diff(np.unique(values))
    smallest = float(steps.min()) if steps.size else 1.0
    exact = [(1.0, 0.0), known, (smallest, low), (smallest, low + 2**15 * smallest)]
    for rescale in exact:
        if rescale is None or not rescale[0]:
            continue
        stored = np.rint((values - rescale[1]) / rescale[0])
        fits = stored.min() >= -(2**15) and stored.max() < 2**15
        # Float32 files hold seven digits: closer is no sign of another value.
        if fits and np.allclose(stored * rescale[0] + rescale[1], values, rtol=1e-6, atol=1e-6):
            return stored.astype(np.int16), tuple(map(float, rescale)), False
    slope = (high - low) / (2**16 - 1)
    stored = np.clip(np.rint((values - low) / slope) - 2**15, -(2**15), 2**15 - 1)
    return stored.astype(np.int16), (slope, low + 2**15 * slope), True


def _read(places: Places, job: Job, problems: list[Problem]) -> dicom.Slice:
    path = places.dicom(job.slice_id)
    name = places.name(path)
    if not path.is_file():
        raise Found("missing file", name, f"the slice {job.slice_id} of {job.index} is not there")
    try:
        read = dicom.read_slice(path, name).as_int16()
    except UserError as error:
        text = str(error)
        if 'pip install -e ".[' in text:
            raise
        kind = "no rescale intercept" if "rescale intercept" in text else "unreadable file"
        raise Found(kind, name, text.removeprefix(f"{name}: ")) from error
    if read.modality not in MODALITIES:
        raise Found("unsupported modality", name, f"Modality {read.modality!r} is not CT or MR")
    if read.modality != job.modality:
        raise Found(
            "wrong modality", name, f"Modality {read.modality}, but listed as {job.modality}"
        )
    problems += [Problem(repair, name, repair, False) for repair in read.repairs]
    if read.syntax:
        problems.append(Problem(f"stored as {read.syntax}", name, "decoded", False))
    if read.identifying:
        text = f"not empty: {', '.join(read.identifying)}; no value of them goes into records"
        problems.append(Problem("identifying tags", name, text, False))
    return read


def _empty(options: Options, job: Job, read: dicom.Slice) -> Record:
    body_part = (job.row or {}).get("body_part")
    return {
        "id": job.id,
        "image": read.pixels[..., None],
        "rescale": read.rescale,
        "modality": job.modality,
        "body_part": body_part.strip() if isinstance(body_part, str) else "",
        "spacing_mm": read.spacing_mm,
        "texts": {},
        "qa": [],
        "segmentation": np.zeros((0, 0), np.uint8),
        "entities": [],
        "source": {"dataset": "RefRad2D", "group": job.group, "licence": options.licence},
    }


def _places_on(options: Options, job: Job, shape: tuple[int, ...], problems: list[Problem]):
    """(class map, {class id: box}) of a slice. A mask that is not listed has shape (0, 0).

    Boxes are those of the index, merged per class; the mask's own where the index has none.
    """
    place, places = f"{job.index}: {job.id}", options.places
    entry = job.entry or {}
    boxes = _boxes(entry.get("bboxes"), shape, place, problems)
    if strange := sorted(boxes.keys() - SEGMENTED_IN[job.modality]):
        text = f"class {', '.join(map(str, strange[:5]))} is not segmented in {job.modality}"
        problems.append(Problem("class of another modality", place, text, False))
    written = entry.get("segment_slice_path")
    if not written:
        problems.append(Problem("slice without mask", place, "no segment_slice_path", False))
        return np.zeros((0, 0), np.uint8), boxes
    path = places.listed(str(written))
    mask = class_map(path, places.name(path), shape)
    on_mask = {c: tuple(map(float, box)) for c, box in boxes_of_mask(mask).items()}
    if entry.get("bboxes") is None:
        problems.append(Problem("boxes taken from the mask", place, "no bboxes", False))
        boxes = on_mask
    unlike = [c for c in sorted(boxes.keys() | on_mask.keys()) if boxes.get(c) != on_mask.get(c)]
    if unlike:
        text = f"class {', '.join(map(str, unlike[:5]))}: box and mask differ"
        problems.append(Problem(UNLIKE, place, text, False))
    return mask, boxes


def _boxes(rows: Any, shape, place: str, problems: list[Problem]) -> dict[int, tuple[float, ...]]:
    """{class id: box around all boxes of the class}, from rows [x1, y1, x2, y2, class id]."""
    found: dict[int, list[tuple[float, ...]]] = {}
    for row in rows or ():
        try:
            *box, class_id = (float(value) for value in row)
        except (TypeError, ValueError):
            box, class_id = [], 0.0
        if len(box) != 4:
            raise Found("unreadable file", place, f"bboxes: {row!r} is not x1, y1, x2, y2, class")
        if class_id != int(class_id) or not 1 <= class_id <= NUM_CLASSES:
            raise Found(
                "unknown class",
                place,
                f"bboxes: class {row[4]}; classes go from 1 to {NUM_CLASSES}",
            )
        try:
            check_box(box, shape[1], shape[0])
        except ValueError as error:
            raise Found("box outside the image", place, f"class {int(class_id)}: {error}") from None
        found.setdefault(int(class_id), []).append(tuple(box))
    several = [class_id for class_id, boxes in found.items() if len(boxes) > 1]
    if several:
        text = f"several boxes of class {', '.join(map(str, several[:5]))}"
        problems.append(Problem("boxes merged", place, text, False))
    return {class_id: union_box(boxes) for class_id, boxes in found.items()}


def _array(path: Path, name: str) -> np.ndarray:
    if not path.is_file():
        raise Found("missing file", name, "no such file")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Found("unreadable file", name, f"no array can be read ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "buif":
        raise Found("unreadable file", name, "is not a (height, width) array of numbers")
    if not array.size:
        raise Found("unreadable file", name, "the array is empty")
    return array


def class_map(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of any numeric dtype as uint8 class ids."""
    mask = _array(path, name)
    if mask.shape != tuple(shape):
        raise Found(
            "mask of another shape",
            name,
            f"the mask is {mask.shape}, its slice {tuple(shape)} (height, width)",
        )
    low, high = mask.min(), mask.max()
    if not (low >= 0 and high <= NUM_CLASSES):  # not a number fails too
        worst = high if not high <= NUM_CLASSES else low
        raise Found("unknown class", name, f"holds {worst}; classes go from 1 to {NUM_CLASSES}")
    ids = mask.astype(np.uint8)
    if mask.dtype.kind == "f" and (ids != mask).any():
        raise Found("unknown class", name, "holds values that are no whole numbers")
    return ids


def _ask(record: Record, boxes: dict[int, tuple[float, ...]], languages: tuple[str, ...]) -> None:
    """Add template questions: what is there is answered with its place, what is not is denied.

    Only what the segmentation of the modality could have found is called absent.
    """
    if not boxes:
        return
    for language in languages:
        # The slice decides the draw, not its place in a file nor Python's hash seed.
        seed = hashlib.sha256(f"refrad2d {record['id']} {language}".encode()).digest()
        rng = np.random.default_rng(list(seed))
        present = sorted(boxes)
        missing = absent_classes(present, record["modality"])
        asked = sorted(rng.choice(present, min(ASKED, len(present)), replace=False).tolist())
        denied = sorted(rng.choice(missing, min(len(asked), len(missing)), replace=False).tolist())
        made = grounded_questions(
            _named(asked, language), _named(denied, language), language, rng, 0
        )
        if len(present) <= MAX_LISTED:
            listed = grounded_questions(_named(present, language), [], language, rng)
            made += [question for question in listed if question.kind == "which"]
        for question in made:
            field = f"qa/{len(record['qa'])}/answer"
            record["qa"].append(
                {
                    "language": language,
                    "question": question.question,
                    "answer": question.answer,
                    "type": "grounded",
                    "choices": [],
                }
            )
            record["entities"] += [
                {
                    "language": language,
                    "field": field,
                    "start": start,
                    "end": end,
                    "class_id": class_id,
                    "box": boxes[class_id],
                }
                for start, end, class_id in question.mentions
            ]


def _named(class_ids, language: str) -> list[tuple[int, str]]:
    return [(class_id, display(class_id, language)) for class_id in class_ids]
