"""Public benchmarks by name: which file, which questions, which prompt, which text counts.

`python -m rg_jax.evaluate --workdir=RUN --benchmark=NAME` evaluates by one of these protocols:

    slake_published     as the published figures were made: the English questions of validate.json
    slake               the English questions of test.json, on which nothing may be chosen
    vqa_rad_published   as published: the 735 questions of the image-disjoint test file
    vqa_rad             the same file for a run that has never looked at it while training

Asked for a validation split, the published evaluation reads SLAKE's validate.json and, for
VQA-RAD, the test file: what is called test there also chose the checkpoint. The two `_published`
protocols reproduce that, and remove grounding marks as the published code does. The other two are
for figures of your own: a run whose training or validation mixture holds the evaluated split is
refused, and so is one that has seen the same questions in another variant of the data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rg_jax import recipes
from rg_jax.errors import UserError
from rg_jax.evaluation.seen import Contents, Part, seen_in


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One protocol. `config`: the builder's variant; `file`: what the split is made from;
    `questions`: how many the whole set has, `closed` of them closed (None: not known);
    `published`: marks are removed in the published way, and nothing is refused."""

    name: str
    data: str
    config: str
    split: str
    file: str
    task: str
    questions: int
    closed: int | None = None
    published: bool = False
    languages: tuple[str, ...] = ("en",)

    @property
    def prompt(self) -> str:
        """How a question is put, in words."""
        return "line break, question, line break, 'Answer: '"

    def describe(self) -> dict[str, Any]:
        """What a result says of its protocol; goes into `metrics.json` as `set.benchmark`."""
        return {
            "name": self.name,
            "file": self.file,
            "languages": list(self.languages),
            "prompt": self.prompt,
            "marks_removed": "published" if self.published else "ours",
            "questions_in_full": self.questions,
        }

    def part(self) -> dict[str, Any]:
        """The entry for `config.data.test`."""
        return recipes.source(self.data, self.split, {self.task: 1.0}, config=self.config)


_SLAKE = {"data": "slake", "config": "official-en", "task": "slake"}
_VQA_RAD = {
    "data": "vqa_rad",
    "config": "fixed",
    "split": "test",
    "file": "test_fixed_split.json",
    "task": "vqa",
    "questions": 735,
    "closed": 432,
}
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "slake_published",
            split="val",
            file="validate.json",
            questions=1053,
            published=True,
            **_SLAKE,
        ),
        Benchmark("slake", split="test", file="test.json", questions=1061, **_SLAKE),
        Benchmark("vqa_rad_published", published=True, **_VQA_RAD),
        Benchmark("vqa_rad", **_VQA_RAD),
    )
}


def get(name: str) -> Benchmark:
    """The protocol of that name. Raises UserError naming the known ones."""
    try:
        return BENCHMARKS[name]
    except KeyError:
        raise UserError(f"--benchmark={name} is not one of {', '.join(BENCHMARKS)}") from None


def check_honest(
    benchmark: Benchmark, mixtures: Mapping[str, Sequence[Part]], contents: Contents
) -> dict[str, str]:
    """Mixtures of the run that hold the evaluated questions, and how that is known.

    Raises UserError if there are some and the protocol does not allow it.
    """
    seen = seen_in(benchmark.part(), mixtures, contents)
    if seen and not benchmark.published:
        which, reason = next(iter(seen.items()))
        raise UserError(
            f"--benchmark={benchmark.name}: this run's config.data.{which} has seen what is "
            f"evaluated ({reason}), so its figures would not be honest; evaluate it with "
            f"--data={benchmark.data} --split={benchmark.split}, which says so"
        )
    return seen
