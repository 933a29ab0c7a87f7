"""One image, or a few, through a trained model: a report or an answer, and where it says so.

    python -m rg_jax.predict --workdir=RUN --image=FILE[,FILE…] --out=DIR
                             [--task=detect] [--language=en] [--question="Is the liver visible?"]

FILE is a DICOM slice (plain or zstandard), a NIfTI volume or the folder of a DICOM series (then
--index says which slice, --axis along which axis of the patient), or an ordinary picture. Writes
DIR/predictions.json and a picture with the places for each image, numbered in the order given:
neither holds a file's name or anything else of its header. For research only, no medical device.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from rg_jax import cli
from rg_jax import run as run_lib
from rg_jax.config import write_aside
from rg_jax.data.dicom import Slice, read_series, read_slice
from rg_jax.data.images import display_image
from rg_jax.data.pipeline import eval_batches
from rg_jax.data.tasks import Record, Sample, get_task
from rg_jax.data.volume import Volume, plane_of, read_nifti, slice_of, to_lps
from rg_jax.errors import UserError
from rg_jax.evaluation import overlays
from rg_jax.evaluation.answering import setting
from rg_jax.evaluation.gallery import window_name
from rg_jax.evaluation.masks import box_of, predicted_masks, to_runs
from rg_jax.evaluation.page import NOTICE
from rg_jax.evaluation.predictor import Predictor, detokenise
from rg_jax.grounding import anatomy, prompts
from rg_jax.grounding.spans import Entity, parse
from rg_jax.run import open_run
from rg_jax.training import mesh as mesh_lib

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says of one image; `masks` stand beside `entities`, None for those without."""

    text: str
    entities: tuple[Entity, ...]
    masks: tuple[np.ndarray | None, ...]
    malformed: int
    cut: bool = False  # at the most tokens that are generated, before it came to an end


def read_image(path: Path, number: int, *, modality: str, frame: int | None, place) -> Record:
    """A file as a record without texts. `place`: (axis, index) of a slice in a volume, in LPS.

    Raises UserError, naming the file, for what is no image or leaves open which slice is meant.
    """
    if path.is_dir():
        item = _of_volume(read_series(path), path, place)
    elif path.name.endswith((".nii", ".nii.gz")):
        if modality not in ("CT", "MR"):
            raise UserError(f"{path}: NIfTI does not say what it shows; add --modality=CT or MR")
        item = _of_volume(read_nifti(path, modality), path, place)
    elif path.suffix.lower() in PICTURES:
        try:
            with Image.open(path) as picture:
                deep = picture.mode.startswith(("I", "F"))
                pixels = None if deep else np.asarray(picture.convert("RGB"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a picture ({error})") from error
        if pixels is None:
            # As 8 bits nearly all of them would be white, and what their values mean nobody says.
            raise UserError(
                f"{path}: has more than 8 bits per pixel; give the DICOM slice or the NIfTI volume"
                " that it comes from, or a picture of 8 bits in the window that you want"
            )
        item = {"image": pixels, "rescale": (1.0, 0.0), "modality": modality or "unknown"}
        item["spacing_mm"] = (0.0, 0.0)
    else:
        item = _of_slice(read_slice(path, frame=frame), path, modality)
    return {
        **item,
        "id": f"{number:04d}",
        "segmentation": np.zeros((0, 0), np.uint8),
        "source": {"dataset": "", "group": "", "licence": ""},
    }


def _of_slice(piece: Slice, path: Path, modality: str) -> dict[str, Any]:
    if modality and piece.modality and modality != piece.modality:
        raise UserError(f"{path} is {piece.modality}, not --modality={modality}")
    if not (piece.modality or modality):
        raise UserError(f"{path}: the header names no modality; add --modality=CT or MR")
    return {
        "image": piece.pixels[..., None],
        "rescale": piece.rescale,
        "modality": piece.modality or modality,
        "spacing_mm": piece.spacing_mm,
    }


def _of_volume(volume: Volume, path: Path, place: tuple[int, int | None]) -> dict[str, Any]:
    axis, index = place
    volume = to_lps(volume)
    if axis not in (0, 1, 2):
        raise UserError(f"--axis={axis}: 0 is sagittal, 1 coronal, 2 axial")
    length = volume.array.shape[axis]
    if index is None or not 0 <= index < length:
        raise UserError(
            f"{path} has {length} slices along axis {axis}: add --index=0 … {length - 1}"
        )
    values = slice_of(volume, axis, index)
    return {
        "image": np.ascontiguousarray(values, np.float32)[..., None],
        "rescale": (1.0, 0.0),
        "modality": volume.modality,
        "spacing_mm": plane_of(volume, axis, index).spacing_mm,
    }


def make_prompt(
    record: Record, task: str, language: str, question: str, information: str = ""
) -> Sample:
    """The sample that asks a record for a task; for a caption `question` is the clinical one.

    Raises UserError if the task needs a question, or does not exist in the language.
    """
    get_task(task)
    try:
        if prompts.LAYOUT_OF_TASK[task] == "context":
            context = prompts.report_context(language, information, question)
            prefix = prompts.prefix(task, language, context=context)
        else:
            context = question
            prefix = prompts.prefix(task, language, question=question)
    except ValueError as error:
        raise UserError(f"--task={task} --language={language}: {error}") from None
    return Sample(
        id=record["id"],
        record_id=record["id"],
        task=task,
        language=language,
        prefix=prefix,
        target="",
        text="",
        modality=record["modality"],
        context=context,
    )


class _Images:
    """Records by their id, as the pipeline asks for them."""

    def __init__(self, records: Sequence[Record]):
        self.rows = {record["id"]: row for row, record in enumerate(records)}
        self.records = records

    def row_of(self, name: str) -> int:
        return self.rows[name]

    def __getitem__(self, row: int) -> Record:
        return self.records[row]


def answer(
    run: run_lib.Run, params: dict[str, Any], records: Sequence[Record], samples: Sequence[Sample]
) -> list[Answer]:
    """What the model says of each record, by its own grounding format."""
    config = run.config
    # A single image need not wait for the rows of a whole program.
    rows = min(setting(config, "rows"), -(-len(samples) // run.mesh.size))
    predictor = Predictor(run, config.eval.max_new_tokens or config.data.text_len, rows)
    prepared = predictor.prepare(params)
    batches = eval_batches(
        samples,
        _Images(records),
        run.tokenizer,
        run_lib.data_config(config),
        predictor.unit,
        fmt=run.fmt,
    )
    answers: list[Answer] = []
    for batch in batches:
        for row in predictor(prepared, batch, left=len(samples) - len(answers)):
            text, ended = detokenise(row.tokens, run.tokenizer)
            read = parse(text, run.fmt)
            found = (
                predicted_masks(row.masks, read.mask_indices)
                if row.masks is not None
                else (None,) * len(read.entities)
            )
            entities = tuple(
                dataclasses.replace(e, box=box_of(mask))
                if e.box is None and mask is not None
                else e
                for e, mask in zip(read.entities, found, strict=True)
            )
            answers.append(Answer(read.text, entities, found, len(read.malformed), not ended))
    return answers


def to_json(record: Record, sample: Sample, said: Answer) -> dict[str, Any]:
    """An answer as plain values; boxes in pixels of the image as it is stored, x first."""
    height, width = record["image"].shape[:2]
    scale = (width, height, width, height)
    rows = []
    for entity, mask in zip(said.entities, said.masks, strict=True):
        box = entity.box
        rows.append(
            {
                "mention": entity.mention,
                "start": entity.start,
                "end": entity.end,
                "class": anatomy.name_of(entity.class_id) if entity.class_id else None,
                "box_px": None if box is None else [e * s for e, s in zip(box, scale, strict=True)],
                "mask": None if mask is None else to_runs(mask),
            }
        )
    return {
        "image": int(record["id"]),
        "task": sample.task,
        "language": sample.language,
        "prompt": sample.prefix,
        "text": said.text,
        "entities": rows,
        "malformed_marks": said.malformed,
        "cut_at_token_limit": said.cut,
        "notice": NOTICE,
    }


def overlay(record: Record, sample: Sample, said: Answer) -> bytes:
    """The image with what the model marked on it, as PNG."""
    return overlays.draw(
        display_image(record),
        (),
        said.entities,
        predicted_masks=said.masks,
        language=sample.language,
        window=window_name(record, "soft"),
        spacing_mm=record["spacing_mm"],
    )


def main(argv: list[str]) -> None:
    """The command."""
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    for name in ("workdir", "image", "out"):
        if not getattr(FLAGS, name):
            raise UserError(f"--{name} is needed; --help tells what it is")
    records = [
        read_image(
            Path(name).expanduser(),
            number,
            modality=FLAGS.modality.upper(),
            frame=FLAGS.frame,
            place=(FLAGS.axis, FLAGS.index),
        )
        for number, name in enumerate(FLAGS.image)
    ]
    samples = [
        make_prompt(record, FLAGS.task, FLAGS.language, FLAGS.question, FLAGS.information)
        for record in records
    ]
    mesh_lib.prepare_backend()
    run, params, step = open_run(Path(FLAGS.workdir).expanduser(), FLAGS.step)
    if run.config.objective != "text":
        raise UserError(
            f"--workdir={FLAGS.workdir}: this run has trained an encoder, which says nothing"
        )
    if get_task(FLAGS.task).has_masks and run.model.config.masks is None:
        raise UserError(f"--task={FLAGS.task}: this run has no mask decoder; try --task=detect")
    answers = answer(run, params, records, samples)

    out = Path(FLAGS.out).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror})") from error
    rows = []
    for record, sample, said in zip(records, samples, answers, strict=True):
        write_aside(out / f"{record['id']}.png", overlay(record, sample, said))
        rows.append({**to_json(record, sample, said), "step": step})
        cut = " … (cut at the most tokens that are generated)" if said.cut else ""
        print(f"{record['id']}: {said.text or '(nothing)'}{cut}")
    write_aside(out / "predictions.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"places and pictures: {out}\n{NOTICE}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a training run")
    flags.DEFINE_list("image", None, "files, separated by commas")
    flags.DEFINE_string("out", None, "folder for predictions.json and the pictures")
    flags.DEFINE_string("task", "detect", "report, detect, segment, joint, vqa, …")
    flags.DEFINE_string("language", "en", "language of the prompt")
    flags.DEFINE_string("question", "", "the question (vqa, …), or the clinical question")
    flags.DEFINE_string("information", "", "clinical information, for reports")
    flags.DEFINE_string("modality", "", "CT or MR, where the file does not say it")
    flags.DEFINE_integer("frame", None, "which frame of a multi-frame DICOM file, from 0")
    flags.DEFINE_integer("axis", 2, "slices of a volume: 0 sagittal, 1 coronal, 2 axial")
    flags.DEFINE_integer("index", None, "which slice of a volume, from 0, in LPS order")
    flags.DEFINE_integer("step", None, "checkpoint (default: the newest)")
    FLAGS = flags.FLAGS
    sys.exit(cli.main(main))
