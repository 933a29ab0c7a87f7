"""Mixtures of data sets → batches of arrays: endless, deterministic, resumable, split over hosts.

Global batch b holds the samples b·B … (b+1)·B-1 of the mixture (see `mixture`); host p of P makes
the p-th part of it. For evaluation a split is taken in order, once, without drawing anything.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from rg_jax.data.images import prepare_image
from rg_jax.data.masks import MaskSlots, class_map, classes_in
from rg_jax.data.mixture import Batch, Collate, DataConfig, Maker, Order, numbered, open_parts
from rg_jax.data.packing import Packer, pack
from rg_jax.data.sources import RecordSource
from rg_jax.data.tasks import TASK_NAMES, Sample, get_task, make_sample
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import GroundingFormat

# Samples of a source: more than anybody draws, and a mixture of rare sources (their number over
# their weight) still has a length that Python can count.
_ENDLESS = 1 << 40


def count_usable(
    sources: Sequence[Mapping[str, Any]], config: DataConfig, fmt: GroundingFormat
) -> int:
    """What an epoch is: records of a mixture that at least one of its tasks applies to.

    Sources may count by captions or by questions instead, see `mixture.COUNTS`.
    """
    return sum(part.size for part in open_parts(sources, config, fmt))


def train_iterator(
    sources: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    fmt: GroundingFormat,
    config: DataConfig,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> "TrainIterator":
    """Endless batches of a mixture, as a Grain iterator.

    `sources`: a list of {"source": RecordSource, "tasks": {task: weight}, "weight": number}; a
    source without weight (or None) counts by its usable records, or by what "count" says (see
    `mixture.COUNTS`). `batch_size` is the global one;
    what comes out is this host's part of it, B = batch_size / process_count rows:

    image (B, S, S, 3) float32, text / mask_ar / mask_loss (B, T) int32, mask_input (B, T) bool,
    task (B,) int32 into `tasks.TASK_NAMES`, counts (B, C) int32 with `tasks.COUNTER_NAMES`; with
    mask slots also those of `masks.MaskSlots`.

    `workers`: processes that make the batches, 0 = threads of this one. Raises UserError for a
    mixture that cannot be; while iterating, for a record that cannot be read.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} cannot be split evenly over {process_count} processes"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must lie between 0 and 2^32 - 1")
    parts = open_parts(sources, config, fmt)
    packer = Packer(tokenizer, fmt, config.text_len, config.separator)
    for part in parts:
        packer.check_room([t for t, w in part.tasks.items() if w > 0], config.languages)
    numbers = grain.MapDataset.range(_ENDLESS)
    streams = [numbers.map(Order(i, p.rows, seed, p.starts)) for i, p in enumerate(parts)]
    mixed = grain.MapDataset.mix(streams, weights=[part.weight for part in parts])
    samples = mixed.map_with_index(numbered).batch(batch_size // process_count, batch_fn=list)
    batches = samples.map(Collate(Maker(parts, packer, config, seed), config, tokenizer))
    order = {
        "seed": seed,
        "batch_size": batch_size,
        "sources": [
            [part.source.name, part.source.split, len(part.starts), part.weight] for part in parts
        ],
    }
    return TrainIterator(batches[process_index::process_count], order, config, workers)


class TrainIterator(grain.DatasetIterator):
    """Grain iterator whose state is the number of batches handed out.

    A state therefore fits any number of hosts, threads and worker processes; batches made in
    advance are no part of it. It also holds what fixes the order of samples (seed, batch size,
    sources with weights): a state of another order is refused with UserError.
    Works with `grain.checkpoint.CheckpointSave` / `CheckpointRestore`.
    """

    def __init__(
        self, batches: grain.MapDataset, order: dict[str, Any], config: DataConfig, workers: int
    ):
        super().__init__()
        self._batches, self._workers = batches, workers
        self._order = json.loads(json.dumps(order))
        self._options = grain.ReadOptions(
            num_threads=config.threads,
            prefetch_buffer_size=max(config.prefetch, config.threads) if config.threads else 0,
        )
        self._next, self._inner = 0, None
        if workers:
            _parse_flags()

    def _start(self) -> grain.DatasetIterator:
        if self._inner is None:
            rest = self._batches[self._next :].to_iter_dataset(self._options)
            if self._workers:
                options = grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=2
                )
                rest = rest.mp_prefetch(options)
            self._inner = iter(rest)
        return self._inner

    def __next__(self) -> Batch:
        self._assert_not_closed()
        batch = next(self._start())
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on exactly here; plain JSON values."""
        return {"next_batch": self._next, "order": self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a state was taken. Raises UserError for a state of another order."""
        for field, value in self._order.items():
            saved = state.get("order", {}).get(field)
            if saved != value:
                raise UserError(
                    f"the data state was saved with {field} {saved}, now it is {value}: samples"
                    " would come in another order; start a new run"
                )
        self._stop()
        self._next = int(state["next_batch"])

    def start_prefetch(self) -> None:
        """Begins to make batches before the first is asked for."""
        self._start().start_prefetch()

    def close(self) -> None:
        """Ends threads and worker processes."""
        if not self._closed:
            self._stop()
        super().close()

    def _stop(self) -> None:
        if getattr(self, "_inner", None) is not None:
            self._inner.close()
            self._inner = None


def _parse_flags() -> None:
    # Grain hands the command line's flags on to its workers and insists that they were parsed.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["rg_jax"])


def eval_samples(
    source: RecordSource,
    tasks: Sequence[str] | Mapping[str, float],
    languages: Sequence[str],
    fmt: GroundingFormat,
    config: DataConfig,
    limit: int | None = None,
) -> list[Sample]:
    """Every sample of a split: each record × task that applies × language × question, in order.

    Nothing is drawn: whole image, both fields of the context. Sorted by task, language, question
    number, record. `limit` takes that many, spread evenly over this order (so every task and
    language keeps its share). Raises UserError if nothing applies.
    """
    names = [t for t in tasks if not isinstance(tasks, Mapping) or tasks[t] > 0]
    for name in names:
        get_task(name)
    counts = source.scan(tuple(languages), fmt).counts
    order = []
    for name in names:
        for i, language in enumerate(languages):
            column = counts[:, TASK_NAMES.index(name), i]
            for question in range(int(column.max())):
                rows = np.flatnonzero(column > question)
                order += [(int(row), name, language, question) for row in rows]
    if not order:
        raise UserError(
            f"source {source!r}: no record can be used for {', '.join(names) or 'no task'} in"
            f" {', '.join(languages)}"
        )
    if limit is not None and limit < len(order):
        if limit < 1:
            raise UserError(f"limit {limit} must be positive")
        order = [order[i * len(order) // limit] for i in range(limit)]
    return [
        _whole_sample(source, row, name, language, question, fmt)
        for row, name, language, question in order
    ]


def _whole_sample(source, row, task, language, question, fmt) -> Sample:
    """A sample that shows the whole image; only masks need a look at the pixels."""
    if not get_task(task).has_masks:
        return make_sample(source.light(row), task, language, None, fmt, index=question)
    record = source[row]
    present = classes_in(record)
    return make_sample(record, task, language, None, fmt, index=question, present=present)


def prompt_length(
    samples: Sequence[Sample], tokenizer: Tokenizer, config: DataConfig, fmt: GroundingFormat
) -> int:
    """Tokens of a row that the longest prompt needs, a multiple of 16, at most text_len."""
    packer = Packer(tokenizer, fmt, config.text_len, config.separator)
    longest = max(len(packer.prefix(sample.prefix)) for sample in samples)
    return min(-(-longest // 16) * 16, config.text_len)


def eval_batches(
    samples: Sequence[Sample],
    source: RecordSource,
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    fmt: GroundingFormat | None = None,
    process_index: int = 0,
    process_count: int = 1,
    targets: bool = False,
) -> Iterator[Batch]:
    """Batches of images and prompts for generation, all of one shape, in the samples' order.

    image (B, S, S, 3) float32, text (B, P) int32 (BOS, prefix, separator, padding), mask_input
    (B, P) bool, task (B,), counts (B, C), index (B,) int32: the place in `samples`, -1 for a row
    that only fills up the last batch (it repeats the first sample). B is this host's part of
    `batch_size`. P is `config.prefix_len`, or `prompt_length`.

    With `targets` the rows are as in training, of text_len tokens with mask_ar and mask_loss, and
    masks where there are mask slots, to measure the loss of the same samples.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} cannot be split evenly over {process_count} processes"
        )
    if not samples:
        return
    fmt = fmt or GroundingFormat(extra_tokens=tokenizer.extra_tokens)
    packer = Packer(tokenizer, fmt, config.text_len, config.separator)
    length = config.text_len
    if not targets:
        length = config.prefix_len or prompt_length(samples, tokenizer, config, fmt)
    slots = MaskSlots(config.mask_slots if targets else 0, config.mask_size, tokenizer)
    local = batch_size // process_count
    for start in range(0, len(samples), batch_size):
        first = start + process_index * local
        index = [i if i < len(samples) else -1 for i in range(first, first + local)]
        chosen = [samples[max(i, 0)] for i in index]
        rows = [packer.row(s) if targets else packer.prompt(s, length) for s in chosen]
        arrays = pack(rows, length, tokenizer.pad_id)
        images, maps = {s.record_id: None for s in chosen}, {}
        for name in images:
            record = source[source.row_of(name)]
            images[name], _ = prepare_image(record, config.image_size, config.style)
            maps[name] = class_map(record, config.mask_size)
        counts = np.array([row.counts for row in rows], np.int32)
        if targets:
            arrays |= slots.fill(
                rows, [maps[s.record_id] for s in chosen], arrays | {"counts": counts}
            )
        yield {
            "image": np.stack([images[s.record_id] for s in chosen]),
            **(arrays if targets else {k: arrays[k] for k in ("text", "mask_input")}),
            "task": np.array([TASK_NAMES.index(s.task) for s in chosen], np.int32),
            "counts": counts,
            "index": np.array(index, np.int32),
        }
