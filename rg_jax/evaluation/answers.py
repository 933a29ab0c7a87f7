"""Answers as they come: what makes an evaluation go on where it was stopped.

A file beside the evaluation's folder. Its first line says of which parameters, model and data the
answers are; every further line is the answer to one sample, written as soon as it is there. A
start with other parameters or data begins the file anew. What a killed process left half-written
at the end is cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation.masks import from_runs, to_runs

SUFFIX = ".answers.jsonl"


class Answer(NamedTuple):
    """What a model said to a sample: the marked text, whether it came to its end or was cut off by
    the budget of tokens, what was cut of the prompt, and masks (K, M, M) or None."""

    prediction: str
    ended: bool
    counts: dict[str, int]
    masks: np.ndarray | None = None


class Answers:
    """The answers stored at `path`, for the parameters and data that `of` describes.

    `kept`: answers that were there, by sample id. Raises UserError if another process is at it or
    the file cannot be written. To be closed.
    """

    def __init__(self, path: Path, of: Mapping[str, Any]):
        self.path = path
        self.kept: dict[str, tuple[str, Answer]] = {}
        self.discarded = 0  # answers of other parameters or data
        self._of = json.loads(json.dumps(dict(of)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): choose another folder with --out"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path} is in use by another evaluation: wait for it, or choose another --out"
            ) from None
        except OSError as error:  # some network file systems know no locks
            print(
                f"{path} cannot be locked here ({error.strerror}): nothing keeps a second"
                " evaluation from writing to it at the same time",
                flush=True,
            )
        self._read()

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        same = False
        for number, line in enumerate(self._file):
            try:
                row = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if number == 0:
                    same = row["of"] == self._of
                elif same:
                    self.kept[row["id"]] = (row["asked"], _answer(row))
                else:
                    self.discarded += 1
            except (ValueError, KeyError, TypeError, IndexError):
                break  # torn, and so is whatever stands behind it
            end += len(line)
        if not same:
            end = 0
        self._file.truncate(end)
        self._file.seek(end)
        if not same:
            self._write([{"of": self._of}])

    def get(self, sample: Sample) -> Answer | None:
        """The answer to a sample, if it was asked the same thing."""
        asked, answer = self.kept.get(sample.id, ("", None))
        return answer if asked == digest(sample) else None

    def add(self, answered: Iterable[tuple[Sample, Answer]]) -> None:
        """Store answers; they are on the way to the disk when this returns."""
        rows = []
        for sample, answer in answered:
            self.kept[sample.id] = (digest(sample), answer)
            rows.append(
                {
                    "id": sample.id,
                    "asked": digest(sample),
                    "prediction": answer.prediction,
                    "ended": answer.ended,
                    "counts": answer.counts,
                    "masks": None if answer.masks is None else [to_runs(m) for m in answer.masks],
                }
            )
        self._write(rows)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        self._file.write("".join(lines).encode())
        self._file.flush()

    def close(self) -> None:
        """Brings the file to the disk and lets go of it."""
        os.fsync(self._file.fileno())
        self._file.close()


def digest(sample: Sample) -> str:
    """What was asked: prompt, kind of marks and picture, as a short hash."""
    asked = json.dumps([sample.record_id, sample.prefix, sample.marks])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _answer(row: Mapping[str, Any]) -> Answer:
    masks = row["masks"]
    if masks is not None:
        masks = np.stack([from_runs(runs) for runs in masks])
    return Answer(row["prediction"], bool(row["ended"]), dict(row["counts"]), masks)
