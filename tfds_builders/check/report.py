"""What a check found: problems by kind, figures about the records, slices for the contact sheet."""

import collections
from typing import Any

from rg_jax.data.tokenizer import Tokenizer
from tfds_builders.check.sheet import PER_GROUP, Sheet
from tfds_builders.check.statistics import Statistics
from tfds_builders.common import Problem

# Of each kind so many are shown and kept in memory; problems.jsonl has them all.
SHOWN = 5


class Report:
    """Filled while the records go by: `add` takes problems, `see` records."""

    def __init__(
        self,
        name: str,
        limit: int = 0,
        tokenizer: Tokenizer | None = None,
        pictures: int = PER_GROUP,
    ):
        self.name, self.limit = name, limit
        self.tokenizer = tokenizer
        self.counts: collections.Counter[tuple[str, bool]] = collections.Counter()
        # The first different ones of each kind, and how often each was told.
        self.first: dict[tuple[str, bool], dict[Problem, int]] = {}
        self.statistics = Statistics(tokenizer)
        self.sheet = Sheet(pictures)
        self.builder_counts: dict[str, int] = {}
        self.notes: list[str] = []
        self.complete = True
        self.seconds = 0.0

    def add(self, problem: Problem) -> None:
        key = problem.kind, problem.harmful
        self.counts[key] += 1
        first = self.first.setdefault(key, {})
        if problem in first or len(first) < SHOWN:
            first[problem] = first.get(problem, 0) + 1

    def see(self, item: Any, split: str, valid: bool, harmful: bool) -> None:
        """A record of a split. Only a `valid` one, which can be built, has figures."""
        self.statistics.records[split] += 1
        self.statistics.unfit[split] += harmful
        if valid:
            self.statistics.add(item, split)
            self.sheet.add(item, split)

    @property
    def harmful(self) -> int:
        return sum(count for (_, harmful), count in self.counts.items() if harmful)

    @property
    def harmless(self) -> int:
        return self.counts.total() - self.harmful

    def kinds(self, harmful: bool) -> list[tuple[str, int, list[Problem]]]:
        """(kind, count, first problems), the most frequent first."""
        rows = [
            (kind, count, list(self.first[kind, bad]))
            for (kind, bad), count in self.counts.items()
            if bad == harmful
        ]
        return sorted(rows, key=lambda row: (-row[1], row[0]))

    def times(self, problem: Problem) -> int:
        """How often one of the first problems was told: a file may serve several records."""
        return self.first[problem.kind, problem.harmful][problem]

    def repeated(self, problem: Problem) -> str:
        """ " (3 times)", empty for once."""
        times = self.times(problem)
        return f" ({times:,} times)" if times > 1 else ""

    def more(self, kind: str, harmful: bool) -> int:
        """How many problems of a kind are none of the first."""
        return self.counts[kind, harmful] - sum(self.first[kind, harmful].values())

    def remarks(self) -> list[str]:
        """What needs a sentence, from the builder and from the figures."""
        remarks = [*self.notes, *self.statistics.remarks()]
        if self.limit:
            remarks.insert(0, f"only the first {self.limit} records of each split were looked at")
        if not self.complete:
            remarks.insert(0, "interrupted: the rest of the records was not looked at")
        return remarks

    def verdict(self) -> str:
        part = "" if self.complete and not self.limit else " in the part that was looked at"
        if self.harmful:
            noun = "problem" if self.harmful == 1 else "problems"
            return f"{self.harmful:,} {noun} that would harm training{part}"
        return f"nothing that would harm training{part}"

    def lines(self) -> list[str]:
        """The report for a terminal."""
        records = self.statistics.records
        splits = ", ".join(f"{split} {count:,}" for split, count in records.items()) or "none"
        lines = [f"checked {self.name} in {self.seconds:.1f} s: {self.verdict()}"]
        lines.append(f"  records: {splits}")
        for harmful, title in (
            (True, "would harm training, the build refuses or leaves them out:"),
            (False, "harmless (repaired, or left out without loss), or worth a look:"),
        ):
            kinds = self.kinds(harmful)
            if kinds:
                lines.append(title)
            for kind, count, first in kinds:
                lines.append(f"  {kind}: {count:,}")
                lines += [f"    {problem}{self.repeated(problem)}" for problem in first]
                if more := self.more(kind, harmful):
                    lines.append(f"    ... and {more:,} more")
        lines += [f"note: {remark}" for remark in self.remarks()]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The content of check.json."""
        return {
            "data": self.name,
            "complete": self.complete,
            "limit": self.limit,
            "tokenizer": self.tokenizer.sha256 if self.tokenizer else None,
            "seconds": round(self.seconds, 2),
            "would_harm_training": self.harmful,
            "problems": [
                {
                    "kind": kind,
                    "harmful": harmful,
                    "count": count,
                    "first": [
                        {"file": p.file, "detail": p.detail, "times": self.times(p)} for p in first
                    ],
                }
                for harmful in (True, False)
                for kind, count, first in self.kinds(harmful)
            ],
            "counted_by_builder": self.builder_counts,
            "remarks": self.remarks(),
            **self.statistics.as_dict(),
        }
