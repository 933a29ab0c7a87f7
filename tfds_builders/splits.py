"""The split guard: nothing that belongs together may lie in two splits.

A member (a record to be) has keys that say what it belongs with: its slice, its patient, its scan,
its picture. Two members that share a key must be in one split. A builder lists its members before
it reads any pixels and asks `RecordBuilder.guard`, which refuses leaks or moves them to train.
`SameImages` finds the rest while pixels go by: one picture under two ids.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# In the order in which a leak is told: the plainest reason first.
KINDS = ("slice", "image", "picture", "patient", "study", "scan")
SHOWN = 3


class Member(NamedTuple):
    """A record to be. `keys`: (kind, key) pairs, kinds as in KINDS. `file`: what puts it there."""

    id: str
    split: str
    keys: tuple[tuple[str, str], ...]
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Leak:
    """A key that occurs in several splits: {split: its members}."""

    kind: str
    key: str
    where: dict[str, tuple[Member, ...]]

    @property
    def file(self) -> str:
        """The file that lists it in the last split, where it should not be."""
        return list(self.where.values())[-1][0].file

    def __str__(self) -> str:
        if self.kind in ("slice", "image"):
            return f"{self.kind} {self.key} is in {' and in '.join(self.where)}"
        places = (f"{split} ({_names(m.id for m in ms)})" for split, ms in self.where.items())
        # Reports travel further than the data: who the patient is stays out of them.
        if self.kind in ("patient", "study"):
            return f"the same {self.kind} is in {' and in '.join(places)}"
        return f"{self.kind} {self.key} is in {' and in '.join(places)}"


def find_leaks(members: Iterable[Member]) -> list[Leak]:
    """The keys that occur in more than one split, by kind, then in order of appearance.

    A leak that an earlier one explains (the scan of a patient who is told of) is not repeated.
    """
    places: dict[tuple[str, str], dict[str, list[Member]]] = {}
    for member in members:
        for key in member.keys:
            places.setdefault(key, {}).setdefault(member.split, []).append(member)
    leaking = [(key, where) for key, where in places.items() if len(where) > 1]
    leaking.sort(key=lambda item: KINDS.index(item[0][0]))
    leaks, told = [], set()
    for (kind, key), where in leaking:
        found = {(split, m.id) for split, members in where.items() for m in members}
        if not found <= told:
            leaks.append(Leak(kind, key, {split: tuple(ms) for split, ms in where.items()}))
            told |= found
    return leaks


def move_to_train(members: Sequence[Member]) -> tuple[list[Member], list[Member]]:
    """(all members, those that were moved): whatever is tied to two splits goes to train.

    What a moved member shares a key with follows it, however long the chain. A member that is in
    train already (the same id) is not put there twice.
    """
    parent = list(range(len(members)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, member in enumerate(members):
        for key in member.keys:
            parent[root(i)] = root(first.setdefault(key, i))
    splits: dict[int, set[str]] = {}
    for i, member in enumerate(members):
        splits.setdefault(root(i), set()).add(member.split)
    kept, moved = [], []
    in_train = {member.id for member in members if member.split == "train"}
    for i, member in enumerate(members):
        if len(splits[root(i)]) > 1 and member.split != "train":
            moved.append(member)
            if member.id not in in_train:
                in_train.add(member.id)
                kept.append(member._replace(split="train"))
        else:
            kept.append(member)
    return kept, moved


def describe(leaks: Sequence[Leak]) -> str:
    """A sentence part that names the first few."""
    more = f" and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else ""
    return "; ".join(map(str, leaks[:SHOWN])) + more


class SameImages:
    """Which pixels went by, and where; eight bytes are kept of each picture."""

    def __init__(self):
        self._seen: dict[int, tuple[str, str]] = {}

    def before(self, digest: int, split: str, name: str) -> tuple[str, str] | None:
        """(split, name) of the first with the same pixels, None if this is it."""
        if not digest:
            return None
        known = self._seen.setdefault(digest, (split, name))
        return None if known == (split, name) else known


def digest_of(image: np.ndarray) -> int:
    """A number for the pixels of a picture; 0 for one that is all of one value.

    Empty slices look alike in every patient.
    """
    if image.min() == image.max():
        return 0
    data = hashlib.blake2b(level(image).data, digest_size=8)
    data.update(repr((image.shape, image.dtype.str)).encode())
    return int.from_bytes(data.digest(), "little") or 1


def level(image: np.ndarray) -> np.ndarray:
    """The pixels counted from the least of them: another intercept makes no other picture."""
    return np.ascontiguousarray(image - image.min())  # it may wrap round, alike for equal ones


def _names(ids: Iterable[str]) -> str:
    ids = list(dict.fromkeys(ids))
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
