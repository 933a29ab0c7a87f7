"""A mixture of data sets: what the global sample number g stands for, and how that is made.

g alone decides everything about a sample: which data set and record (each set is shuffled anew
every epoch; sets take turns by weight), and, through a generator keyed by (seed, g), its task,
language, question, context and crop. Neither hosts nor threads nor worker processes nor an
interruption change what is seen.
"""

import dataclasses
import functools
import logging
import threading
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rg_jax.data.augment import AugmentConfig, Draw, draw
from rg_jax.data.images import STYLES, prepare_image
from rg_jax.data.masks import MaskSlots, class_map, classes_in
from rg_jax.data.packing import Packer, Row, pack
from rg_jax.data.sources import RecordSource
from rg_jax.data.tasks import (
    TASK_NAMES,
    Sample,
    choose,
    draw_index,
    get_task,
    make_sample,
)
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import GroundingFormat
from rg_jax.grounding.prompts import CONTEXTS, LAYOUT_OF_TASK, WORDINGS
from rg_jax.host_memory import keep_freed

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# Limits of what a process keeps of finished images and token rows (see `Maker`).
IMAGE_CACHE_BYTES = 512 * 2**20
ROW_CACHE_SIZE = 100_000


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How records become arrays.

    `image_size`: side in pixels. `text_len`: tokens per row. `style`: see `rg_jax.data.images`.
    `augment`: None, True for the standard, a dict of its fields or an AugmentConfig. `languages`:
    those of the mixture. `separator`: "joined" or "apart" (see `packing`). `grounded_first`: the
    paper's mixing rule (see `tasks.choose`). `prefix_len`: tokens of a row in evaluation, None =
    as many as the longest prompt needs. `threads`, `prefetch`: Grain's reading threads per process
    and the batches made in advance; 0 threads makes each batch when it is asked for.
    """

    image_size: int
    text_len: int = 200
    style: str = "medgemma"
    augment: AugmentConfig | Mapping[str, Any] | bool | None = None
    languages: Sequence[str] = ("en", "de")
    separator: str = "joined"
    grounded_first: bool = True
    prefix_len: int | None = None
    mask_slots: int = 0
    mask_size: int = 0
    threads: int = 1
    prefetch: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        object.__setattr__(self, "augment", _augment_config(self.augment))
        for field in ("image_size", "text_len"):
            if getattr(self, field) < 1:
                raise UserError(f"config field {field}={getattr(self, field)} must be positive")
        if self.mask_slots < 0 or (self.mask_slots and self.mask_size < 1):
            raise UserError(
                f"config fields mask_slots={self.mask_slots}, mask_size={self.mask_size}: slots"
                " need a size of at least 1"
            )
        if self.style not in STYLES:
            raise UserError(f"config field style={self.style!r} is not one of {', '.join(STYLES)}")
        if not self.languages:
            raise UserError(f"config field languages is empty; known are {', '.join(WORDINGS)}")
        for language in self.languages:
            if language not in WORDINGS:
                known = ", ".join(WORDINGS)
                raise UserError(f"config field languages: {language!r} is not one of {known}")


def _augment_config(value: Any) -> AugmentConfig | None:
    if value is None or value is False:
        return None
    if value is True:
        return AugmentConfig()
    if isinstance(value, AugmentConfig):
        return value
    try:
        fields = {
            key: tuple(map(float, v)) if isinstance(v, Sequence) else float(v)
            for key, v in dict(value).items()
        }
        return AugmentConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config field augment: {error}") from None


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture: its usable rows, its tasks, its weight.

    `starts`: where in `rows` a group begins of which an epoch takes one; a row each, or the rows
    with one caption. `size`: how many samples the source adds to an epoch of the mixture.
    """

    source: RecordSource
    rows: np.ndarray
    tasks: dict[str, float]
    weight: float
    starts: np.ndarray
    size: int


# What is a sample of a source: a record; a caption, which several slices may share and of which
# one is drawn each time (the paper's way); or a question, where few images have many.
COUNTS = ("records", "captions", "questions")


def open_parts(
    sources: Sequence[Mapping[str, Any]], config: DataConfig, fmt: GroundingFormat
) -> list[Part]:
    """Checks a mixture and finds the usable records of each source; how many are not is logged.

    Records for which no task applies are left out here, never on the way, so that all hosts stay
    in step. Raises UserError for a mixture that cannot be.
    """
    if not sources:
        raise UserError("the mixture has no source")
    parts = []
    for entry in sources:
        source, tasks = entry["source"], {k: float(v) for k, v in dict(entry["tasks"]).items()}
        unknown = set(entry) - {"source", "weight", "tasks", "count"}
        if unknown:
            raise UserError(f"source {source!r}: unknown field {', '.join(sorted(unknown))}")
        for task, weight in tasks.items():
            if get_task(task).has_masks and weight > 0 and not config.mask_slots:
                raise UserError(
                    f"source {source!r}: task {task!r} needs a model with a mask decoder"
                    " (config.masks.kind) and config.masks.slots above 0"
                )
            if not weight >= 0:
                raise UserError(f"source {source!r}: weight {weight} of task {task!r} is negative")
        wanted = [task for task, weight in tasks.items() if weight > 0]
        if not wanted:
            raise UserError(f"source {source!r}: no task has a weight above 0")
        count = entry.get("count", "records")
        if count not in COUNTS:
            raise UserError(f"source {source!r}: count {count!r} is not one of {', '.join(COUNTS)}")
        scan = source.scan(config.languages, fmt)
        rows = scan.usable(wanted)
        left_out = len(source) - len(rows)
        _log.info("%r: %d records used, %d have none of the tasks", source, len(rows), left_out)
        if len(rows) == 0:
            raise UserError(
                f"source {source!r}: no record can be used for {', '.join(wanted)} in"
                f" {', '.join(config.languages)}"
            )
        weight = entry.get("weight")
        starts = np.arange(len(rows))
        if count == "captions":
            rows, starts = _by_caption(rows, scan.captions)
        size = scan.questions(wanted) if count == "questions" else len(starts)
        weight = float(size) if weight is None else float(weight)
        if not 0 < weight < float("inf"):
            raise UserError(f"source {source!r}: weight {weight} must be above 0")
        parts.append(Part(source, rows, tasks, weight, starts, size))
    _check_prompts({task for part in parts for task, weight in part.tasks.items() if weight > 0})
    return parts


def _by_caption(rows: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with those of one caption side by side, and where each caption begins."""
    rows = rows[np.argsort(captions[rows], kind="stable")]
    said = captions[rows]
    return rows, np.flatnonzero(np.concatenate([[True], said[1:] != said[:-1]]))


def _check_prompts(tasks: Set[str]) -> None:
    """Raises UserError for tasks that ask with the same words and want different marks."""
    bare = sorted(task for task in tasks if LAYOUT_OF_TASK[task] == "bare")
    if len(bare) > 1:
        raise UserError(
            f"{' and '.join(bare)} ask in the same words, so that no model can tell which is "
            "wanted: train one of them, or joint_vqa, which answers with both"
        )


class Element(NamedTuple):
    """What `Maker` makes of a sample beside its image: its tokens, its task and the class map that
    its masks are taken from (None if it has none)."""

    row: Row
    task: int
    classes: np.ndarray | None


class Maker:
    """(global sample number, (part, row)) → the sample; its image goes where it is told to. Can be
    pickled.

    For sources that keep their records, what was made without a crop is kept too: a small set
    then costs next to nothing from its second epoch on.
    """

    def __init__(self, parts: Sequence[Part], packer: Packer, config: DataConfig, seed: int):
        self.parts, self.packer, self.config, self.seed = parts, packer, config, seed
        self._scans = [part.source.scan(config.languages, packer.fmt) for part in parts]
        self._make_caches()

    def _make_caches(self) -> None:
        keep_freed()  # a worker process comes by here too
        self._generators = _Generators(self.seed)
        self._available = functools.lru_cache(maxsize=100_000)(
            lambda part, row: self._scans[part].available(row)
        )
        self._rows: dict[tuple, tuple[Row, int]] = {}
        self._images: dict[tuple[int, int], tuple[np.ndarray, np.ndarray | None]] = {}
        self._room = IMAGE_CACHE_BYTES

    def __getstate__(self):
        caches = ("_generators", "_available", "_rows", "_images", "_room")
        return {key: value for key, value in self.__dict__.items() if key not in caches}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_caches()

    def __call__(
        self, number: int, place: tuple[int, int], image: Float[np.ndarray, "S S 3"]
    ) -> Element:
        (p, row), config = place, self.config
        part = self.parts[p]
        rng = self._generators(number)
        available = self._available(p, row)
        task, language = choose(available, part.tasks, config.languages, rng, config.grounded_first)
        index = draw_index(rng, available[task][language])
        context = CONTEXTS[draw_index(rng, len(CONTEXTS))]
        key = (p, row, task, language, index, context)
        keep = part.source.cache and config.augment is None
        made, pixels = (self._rows.get(key), self._images.get(place)) if keep else (None, None)
        if made is None or pixels is None:
            # What is kept may serve another task of the same record later.
            whole = keep or get_task(task).has_masks
            record = part.source[row] if whole else part.source.without_masks(row)
            height, width = record["image"].shape[:2]
            drawn = draw(config.augment, width, height, rng)
        if made is None:
            sample, drawn = self._sample(record, task, language, index, context, drawn)
            made = self.packer.row(sample), TASK_NAMES.index(sample.task)
            if keep and len(self._rows) < ROW_CACHE_SIZE:
                self._rows[key] = made
        if pixels is not None:
            image[...], classes = pixels
            return Element(*made, classes)
        prepare_image(record, config.image_size, config.style, drawn=drawn, out=image)
        classes = class_map(record, config.mask_size, drawn.crop) if whole else None
        size = image.nbytes + (classes.nbytes if classes is not None else 0)
        if keep and size <= self._room:
            self._room -= size
            self._images[place] = image.copy(), classes
        return Element(*made, classes)

    def _sample(self, record, task, language, index, context, drawn: Draw) -> tuple[Sample, Draw]:
        def of(drawn: Draw) -> Sample:
            fmt = self.packer.fmt
            present = classes_in(record, drawn.crop) if get_task(task).has_masks else None
            return make_sample(
                record, task, language, None, fmt, drawn.crop, index, context, present
            )

        sample = of(drawn)
        lost = ("entities_dropped_by_crop", "entities_without_mask")
        is_answer = sample.answer_type != "caption"
        if is_answer and not drawn.crop.is_full and any(sample.counts.get(name) for name in lost):
            # An answer says what is visible: it must not be shown an image without it.
            drawn = drawn.without_crop()
            sample = of(drawn)
            sample.counts["crop_withdrawn"] = 1
        return sample, drawn


class _Generators(threading.local):
    """A generator per global sample number, the same on every host, thread and worker.

    Philox keyed by (seed, number). One object per thread is set anew each time, which costs a
    tenth of making one. What it gives is valid until the next call in the same thread.
    """

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=np.array([seed, 0], np.uint64))
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def __call__(self, number: int) -> np.random.Generator:
        self._start["state"]["key"][1] = number
        self._bits.state = self._start
        return self._generator


def numbered(number: int, place: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """What `Collate` takes of a sample of the mixture."""
    return number, place


class Collate:
    """A host's part of a batch: the samples' numbers and places → arrays. Can be pickled."""

    def __init__(self, maker: Maker, config: DataConfig, tokenizer: Tokenizer):
        self.make, self.side = maker, config.image_size
        self.text_len, self.pad_id = config.text_len, tokenizer.pad_id
        self.slots = MaskSlots(config.mask_slots, config.mask_size, tokenizer)

    def __call__(self, samples: Sequence[tuple[int, tuple[int, int]]]) -> Batch:
        images = np.empty((len(samples), self.side, self.side, 3), np.float32)
        elements = [self.make(*sample, images[i]) for i, sample in enumerate(samples)]
        rows, tasks, maps = zip(*elements, strict=True)
        batch = {
            "image": images,
            **pack(rows, self.text_len, self.pad_id),
            "task": np.array(tasks, np.int32),
            "counts": np.array([row.counts for row in rows], np.int32),
        }
        return batch | self.slots.fill(rows, maps, batch)


class Order:
    """Number within a part's endless stream → (part, row of the source); every epoch its own order.

    An epoch takes every row once, or with `starts` one row, drawn anew, of every group of rows.
    Its order is drawn as a whole and kept: Grain's own shuffle computes each index alone, which
    takes up to a millisecond for a small set.
    """

    def __init__(self, part: int, rows: np.ndarray, seed: int, starts: np.ndarray | None = None):
        self.part, self.rows, self.seed = part, rows, seed
        self.starts = np.arange(len(rows)) if starts is None else starts
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self):
        return {**self.__dict__, "_epochs": {}}

    def __call__(self, number: int) -> tuple[int, int]:
        epoch, index = divmod(number, len(self.starts))
        order = self._epochs.get(epoch)
        if order is None:
            rng = np.random.default_rng((self.seed, self.part, epoch))
            rows = self.rows
            if len(self.starts) < len(rows):
                sizes = np.diff(self.starts, append=len(rows))
                rows = rows[self.starts + (rng.random(len(sizes)) * sizes).astype(np.intp)]
            order = rng.permutation(rows)
            # Batches made in advance straddle two epochs at the most.
            recent = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs = {**recent, epoch: order}
        return self.part, int(order[index])
