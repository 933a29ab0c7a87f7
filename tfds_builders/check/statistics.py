"""Counts and histograms over the records of a check, kept in little memory."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rg_jax.data.record import Record
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.grounding import anatomy, spans
from rg_jax.grounding.boxes import area, normalise
from rg_jax.grounding.format import OURS

# Upper ends of the classes of box sizes, as share of the image.
BOX_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

Counts = dict[str, collections.Counter]


class Statistics:
    """Figures by split ("train" → Counter) and distributions (value → how often)."""

    def __init__(self, tokenizer: Tokenizer | None = None):
        self.tokenizer = tokenizer
        self.records: collections.Counter[str] = collections.Counter()
        self.unfit: collections.Counter[str] = collections.Counter()
        self.by_split: dict[str, Counts] = {
            what: collections.defaultdict(collections.Counter)
            for what in ("contents", "modalities", "body_parts", "captions", "questions", "types")
        }
        # Class id → how many entities name it, and in how many masks it is.
        self.entities: Counts = collections.defaultdict(collections.Counter)
        self.masks: collections.Counter[int] = collections.Counter()
        # ("caption en", "tokens") → {length: count}
        self.lengths: dict[tuple[str, str], collections.Counter[int]] = {}
        self.empty: collections.Counter[str] = collections.Counter()
        self.box_shares: collections.Counter[float] = collections.Counter()
        self.image_sizes: collections.Counter[tuple[int, int]] = collections.Counter()
        self.spacings: collections.Counter[tuple[float, float]] = collections.Counter()
        self._groups: dict[str, set[int]] = collections.defaultdict(set)

    def add(self, item: Record, split: str) -> None:
        """Counts a record that `record.encode` accepts."""
        height, width = item["image"].shape[:2]
        self.image_sizes[height, width] += 1
        row, column = item["spacing_mm"]
        self.spacings[round(float(row), 2), round(float(column), 2)] += 1
        self._groups[split].add(hash(str(item["source"]["group"])))
        self._count("modalities", split, item["modality"])
        self._count("body_parts", split, item["body_part"] or "(not given)")
        for language, texts in item["texts"].items():
            self._count("captions", split, language, bool(texts["caption"].strip()))
            for field, text in texts.items():
                self.empty[f"{field} {language}"] += not text.strip()
            context = "\n".join(
                texts[field]
                for field in ("clinical_information", "clinical_question")
                if texts[field].strip()
            )
            self._length(f"caption {language}", texts["caption"])
            self._length(f"clinical context {language}", context)
        for question in item["qa"]:
            self._count("questions", split, question["language"])
            self._count("types", split, question["type"])
            self._length("question", question["question"])
            self._length("answer", question["answer"])
        self._places(item, split, width, height)

    def _places(self, item: Record, split: str, width: int, height: int) -> None:
        boxes = set()
        for entity in item["entities"]:
            self.entities[split][int(entity["class_id"])] += 1
            boxes.add((int(entity["class_id"]), tuple(entity["box"])))
        for _, box in boxes:
            share = area(normalise(box, width, height))
            self.box_shares[next(end for end in BOX_SHARES if share <= end * (1 + 1e-6))] += 1
        mask = item["segmentation"]
        classes = np.flatnonzero(np.bincount(mask.ravel(), minlength=1)) if mask.size else []
        self.masks.update(int(class_id) for class_id in classes if class_id)
        self._count("contents", split, "with a mask", mask.size > 0)
        self._count("contents", split, "with a box", bool(boxes))
        self._count("contents", split, "boxes", True, len(boxes))
        self._count("contents", split, "mentions with a box", True, len(item["entities"]))
        if self.tokenizer is not None:
            self._marked(item, width, height)

    def _marked(self, item: Record, width: int, height: int) -> None:
        """Captions as a detection task would have them written, with their boxes."""
        for language, texts in item["texts"].items():
            entities = [
                spans.Entity(
                    texts["caption"][entity["start"] : entity["end"]],
                    entity["start"],
                    entity["end"],
                    entity["class_id"],
                    normalise(entity["box"], width, height),
                )
                for entity in item["entities"]
                if entity["language"] == language and entity["field"] == "caption"
            ]
            if entities and not spans.has_marks(texts["caption"]):
                self._length(
                    f"caption with boxes {language}", spans.write(texts["caption"], entities, OURS)
                )

    def _count(self, what: str, split: str, key: str, there: bool = True, count: int = 1) -> None:
        self.by_split[what][split][key] += count * there

    def _length(self, what: str, text: str) -> None:
        if not text.strip():
            return
        if self.tokenizer is not None:
            measured = {"tokens": len(self.tokenizer.encode(text))}
        else:
            measured = {"characters": len(text), "words": len(text.split())}
        for unit, length in measured.items():
            self.lengths.setdefault((what, unit), collections.Counter())[length] += 1

    def groups(self, split: str) -> int:
        return len(self._groups[split])

    def classes(self) -> list[tuple[str, dict[str, int], int]]:
        """(name, entities by split, masks) of every class met, the most frequent first."""
        met = {c for counts in self.entities.values() for c in counts} | set(self.masks)
        rows = [
            (
                _class_name(class_id),
                {split: self.entities[split][class_id] for split in self.records},
                self.masks[class_id],
            )
            for class_id in met
        ]
        return sorted(rows, key=lambda row: (-sum(row[1].values()), -row[2], row[0]))

    def remarks(self) -> list[str]:
        """What the figures say that is easily overlooked."""
        remarks = []
        if "train" in self.records:
            unseen = [
                name
                for name, entities, _ in self.classes()
                if not entities["train"] and sum(entities.values())
            ]
            if unseen:
                more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
                remarks.append(
                    "mentioned with a box in other splits, but never in train: "
                    + ", ".join(unseen[:8])
                    + more
                )
        return remarks

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON; distributions by their quantiles and as {value: count}."""
        return {
            "records": dict(self.records),
            "records_with_harmful_problems": dict(self.unfit),
            "groups": {split: len(groups) for split, groups in self._groups.items()},
            **{
                what: {split: dict(counts.most_common()) for split, counts in by_split.items()}
                for what, by_split in self.by_split.items()
            },
            "classes": {
                name: {**entities, "masks": masks} for name, entities, masks in self.classes()
            },
            "empty_fields": {field: count for field, count in self.empty.items() if count},
            "lengths": {
                f"{what} ({unit})": {"unit": unit, **spread(counts), "counts": _sorted(counts)}
                for what, unit, counts in self.measured()
            },
            "box_share_of_image_up_to": _sorted(self.box_shares),
            "image_sizes": {f"{h} x {w}": n for (h, w), n in self.image_sizes.most_common(50)},
            "spacings_mm": {f"{r:g} x {c:g}": n for (r, c), n in self.spacings.most_common(50)},
        }

    def measured(self) -> Iterable[tuple[str, str, collections.Counter[int]]]:
        """(what, unit, {length: count}) of all lengths."""
        return [(what, unit, counts) for (what, unit), counts in sorted(self.lengths.items())]


def spread(counts: Mapping[int, int]) -> dict[str, int | float]:
    """n, mean, median, 95 % quantile and maximum of {value: count}."""
    values = np.array(sorted(counts))
    weights = np.array([counts[value] for value in values.tolist()])
    ends = np.cumsum(weights)

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(ends, share * ends[-1])])

    return {
        "n": int(ends[-1]),
        "mean": round(float((values * weights).sum() / ends[-1]), 2),
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": int(values[-1]),
    }


def _sorted(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts)}


def _class_name(class_id: int) -> str:
    return anatomy.display(class_id, "en") if class_id else "(no class of the schema)"
