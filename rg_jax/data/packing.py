"""Samples → rows of token ids of fixed length, within the text budget.

    text        [BOS] prefix "\\n" target [EOS] PAD …
    mask_ar       0     0     0     1      1    0       1 = causal, 0 = seen by the whole prefix
    mask_loss     0     0     0     1      1    0       1 = has a loss
    mask_input    1     1     1     1      1    0       0 = padding, seen by nobody

Too long: the context is cut first, down to half of the budget, then the target; both at word
boundaries, never inside a span, and EOS always stays. Every cut is counted.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from rg_jax.data.tasks import COUNTER_NAMES, Sample, write_marks
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding import prompts
from rg_jax.grounding.format import GroundingFormat
from rg_jax.grounding.spans import Entity

SEPARATOR = "\n"
# "joined": prefix and separator are one string for the tokenizer. "apart": the separator is
# encoded by itself, as big_vision does; the two differ where a piece spans both.
SEPARATOR_MODES = ("joined", "apart")

# Where a text may be cut: at a blank, at its end, and on both sides of a character of a script
# without blanks.
_NO_BLANKS = r"[\u3040-\u30ff\u3400-\u9fff]"
_BOUNDARY = re.compile(rf"(?=\s)|(?<={_NO_BLANKS})|(?={_NO_BLANKS})")


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample's tokens: `prefix` with BOS and separator, `target` with EOS, and its counters.

    `mask_classes`: the class of the mask at each `</seg>` of the target, in text order.
    """

    prefix: np.ndarray
    target: np.ndarray
    counts: tuple[int, ...]
    mask_classes: tuple[int, ...] = ()


class Packer:
    """Lays samples out as rows of `text_len` tokens. Can be pickled.

    Raises UserError if the tokenizer cannot write what the grounding format needs.
    """

    def __init__(
        self, tokenizer: Tokenizer, fmt: GroundingFormat, text_len: int, separator: str = "joined"
    ):
        if separator not in SEPARATOR_MODES:
            raise UserError(f"separator {separator!r} is not one of {', '.join(SEPARATOR_MODES)}")
        if tokenizer.extra_tokens != fmt.extra_tokens:
            raise UserError(
                f"tokenizer has the extra tokens {list(tokenizer.extra_tokens)}, the grounding"
                f" format {list(fmt.extra_tokens)}: load it with those of the format"
            )
        if fmt.has_boxes and len(tokenizer.loc_ids) < fmt.bins:
            raise UserError(
                f"grounding format has {fmt.bins} bins, the tokenizer only"
                f" {len(tokenizer.loc_ids)} loc pieces: choose fewer bins or another tokenizer"
            )
        self.tokenizer, self.fmt = tokenizer, fmt
        self.text_len, self.separator = text_len, separator
        self._make_caches()

    def _make_caches(self) -> None:
        # Templates and captions come again every epoch, so the same text is encoded over and over.
        self._encode = functools.lru_cache(maxsize=20_000)(self.tokenizer.encode)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_encode"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_caches()

    def check_room(self, tasks: Iterable[str], languages: Iterable[str]) -> None:
        """Raises UserError if a task's prompt, without any context, fills the whole budget."""
        for task, language in itertools.product(tasks, languages):
            if task in prompts.wording(language).prompts:
                needed = len(self.prefix(f"\n\n{prompts.prompt(task, language)} ")) + 1
                if needed >= self.text_len:
                    raise UserError(
                        f"text_len {self.text_len} is too small: the prompt of task {task!r} in"
                        f" {language!r} alone takes {needed} tokens of this tokenizer"
                    )

    def prefix(self, text: str) -> np.ndarray:
        """BOS, the prefix, the separator: token ids, int32."""
        bos = self.tokenizer.bos_id
        if self.separator == "joined":
            return np.array([bos, *self._encode(text + SEPARATOR)], np.int32)
        return np.array([bos, *self._encode(text), *self._encode(SEPARATOR)], np.int32)

    def target(self, text: str) -> np.ndarray:
        """The target and EOS: token ids, int32."""
        return np.array([*self._encode(text), self.tokenizer.eos_id], np.int32)

    def row(self, sample: Sample) -> Row:
        """A sample's tokens within the budget.

        Raises UserError if not even the bare prompt and EOS fit.
        """
        counts = dict(sample.counts)
        prefix, target = self.prefix(sample.prefix), self.target(sample.target)
        entities = sample.entities
        if len(prefix) + len(target) > self.text_len:
            room = max(self.text_len - len(target), self.text_len // 2)
            prefix = self._cut_context(sample, prefix, room, counts)
            room = self.text_len - len(prefix)
            target, entities = self._cut_target(sample, target, room, counts)
        masks = tuple(e.class_id for e in entities if e.mask and sample.marks in ("masks", "both"))
        numbers = tuple(counts.get(name, 0) for name in COUNTER_NAMES)
        return Row(prefix, target, numbers, masks)

    def prompt(self, sample: Sample, length: int) -> Row:
        """A sample's prefix alone, its context cut to fit `length` (for generation)."""
        counts: dict[str, int] = {}
        prefix = self._cut_context(sample, self.prefix(sample.prefix), length, counts)
        if len(prefix) > length:
            raise UserError(self._too_small(sample, len(prefix), length))
        return Row(prefix, prefix[:0], tuple(counts.get(name, 0) for name in COUNTER_NAMES))

    def _cut_context(
        self, sample: Sample, prefix: np.ndarray, room: int, counts: dict[str, int]
    ) -> np.ndarray:
        if len(prefix) <= room or not sample.context:
            return prefix
        # The prefix is a line break, the context, and the rest with the prompt.
        rest = sample.prefix[1 + len(sample.context) :]

        def attempt(end: int) -> np.ndarray:
            return self.prefix("\n" + sample.context[:end].rstrip() + rest)

        counts["context_cut"] = 1
        return _longest(_boundaries(sample.context), attempt, room)

    def _cut_target(
        self, sample: Sample, target: np.ndarray, room: int, counts: dict[str, int]
    ) -> tuple[np.ndarray, Sequence[Entity]]:
        """The target's tokens cut to `room`, and the entities that are left in it."""
        if len(target) <= room:
            return target, sample.entities
        if room < 1:
            raise UserError(self._too_small(sample, self.text_len - room + 1, self.text_len))
        ends = [
            end
            for end in _boundaries(sample.text)
            if not any(e.start < end < e.end for e in sample.entities)
        ]
        kept: list[Entity] = []

        def attempt(end: int) -> np.ndarray:
            # Blanks at the end go, but never those inside a span.
            entities = [e for e in sample.entities if e.end <= end]
            floor = max((e.end for e in entities), default=0)
            end = max(floor, len(sample.text[:end].rstrip()))
            kept[:] = entities
            return self.target(write_marks(sample.text[:end], entities, self.fmt, sample.marks))

        counts["target_cut"] = 1
        target = _longest(ends, attempt, room)
        dropped = len(sample.entities) - len(kept)
        if dropped:
            counts["entities_dropped_by_cut"] = dropped
        return target, kept

    def _too_small(self, sample: Sample, needed: int, length: int) -> str:
        return (
            f"text_len {length} is too small: the bare prompt of task {sample.task!r} (record"
            f" {sample.record_id}) takes {needed} tokens"
        )


def _boundaries(text: str) -> list[int]:
    """Where a text may be cut, rising: 0, word boundaries, and just before its end."""
    ends = sorted({0, *(match.start() for match in _BOUNDARY.finditer(text))})
    return [end for end in ends if end < len(text)] or [0]


def _longest(ends: Sequence[int], attempt, room: int) -> np.ndarray:
    """Tokens of the longest cut that fits; of the shortest one (ends[0]) if none does.

    The number of tokens rises with the length but for single tokens (a piece can span the cut), so
    what the search by halves finds is checked, and shortened where needed.
    """
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if len(attempt(ends[middle])) <= room:
            low = middle
        else:
            high = middle - 1
    while low > 0 and len(attempt(ends[low])) > room:
        low -= 1
    return attempt(ends[low])


def pack(
    rows: Sequence[Row], length: int, pad_id: int
) -> dict[str, Int32[np.ndarray, "B T"] | Bool[np.ndarray, "B T"]]:
    """Rows → arrays `text`, `mask_ar`, `mask_loss` (int32) and `mask_input` (bool), padded."""
    prefix = np.array([len(row.prefix) for row in rows])
    total = prefix + np.array([len(row.target) for row in rows])
    column = np.arange(length)
    valid = column < total[:, None]
    target = valid & (column >= prefix[:, None])
    text = np.full((len(rows), length), pad_id, np.int32)
    # In row-major order the valid places are exactly the rows' tokens one after the other.
    text[valid] = np.concatenate([part for row in rows for part in (row.prefix, row.target)])
    loss = target.astype(np.int32)
    return {"text": text, "mask_ar": loss, "mask_loss": loss.copy(), "mask_input": valid}
