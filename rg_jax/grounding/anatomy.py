"""The class schema: 121 anatomical classes, their names in each language, and where ids come from.

Ids 1–117 are those of TotalSegmentator's CT task `total` (v2 names); 118–121 are structures that
only its MR task `total_mr` segments. Id 0 stands for background in class maps and for "no class
of the schema" in entities. The names are data (`classes.json` beside this file), so a language is
added there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from importlib import resources

NUM_CLASSES = 121


@dataclasses.dataclass(frozen=True)
class AnatomyClass:
    """One class: id, schema name, and per language the display name and other mention forms.

    `synonyms` are forms in which reports name the structure (side before or behind, inflected
    forms, abbreviations). They are usable for tagging where no list of mentions is given.
    """

    id: int
    name: str
    display: Mapping[str, str]
    synonyms: Mapping[str, tuple[str, ...]]


def _load() -> tuple[AnatomyClass, ...]:
    text = resources.files(__package__).joinpath("classes.json").read_text(encoding="utf-8")
    return tuple(
        AnatomyClass(
            row["id"],
            row["name"],
            row["display"],
            {language: tuple(forms) for language, forms in row["synonyms"].items()},
        )
        for row in json.loads(text)
    )


CLASSES: tuple[AnatomyClass, ...] = _load()
_BY_NAME = {entry.name: entry for entry in CLASSES}

# TotalSegmentator's `total_mr` id → ours. Lungs, vertebrae and discs are single classes there.
TOTAL_MR_TO_OURS: dict[int, int] = {
    **{i: i for i in range(1, 10)},
    **{10: 118, 11: 119, 12: 15, 13: 18, 14: 19, 15: 20, 16: 21, 17: 22, 18: 25, 19: 121},
    **{20: 120, 21: 79, 22: 51, 23: 52, 24: 63, 25: 64},
    **{i: i + 39 for i in range(26, 40)},
    **{i: i + 40 for i in range(40, 50)},
    50: 90,
}

# What each modality's segmentation task can find at all: only there does "not in the mask" say
# anything about the picture.
SEGMENTED_IN: dict[str, frozenset[int]] = {
    "CT": frozenset(range(1, 118)),
    "MR": frozenset(TOTAL_MR_TO_OURS.values()),
}

# Classes that are parts of one another: if one is present, so is (or may be) the other.
_OVERLAPS = (
    (118, frozenset({10, 11})),  # left lung and its lobes
    (119, frozenset({12, 13, 14})),  # right lung and its lobes
    (121, frozenset(range(26, 51))),  # vertebrae and the single ones
    (25, frozenset({26})),  # the sacrum holds S1
    (2, frozenset({24})),  # kidneys and their cysts
    (3, frozenset({23})),
)


def get(class_id: int) -> AnatomyClass:
    """The class with this id. Raises ValueError for an id outside 1..121."""
    if not 1 <= class_id <= NUM_CLASSES:
        raise ValueError(f"class id {class_id} is not in 1..{NUM_CLASSES}")
    return CLASSES[class_id - 1]


def name_of(class_id: int) -> str:
    """Schema name of an id, e.g. 2 → kidney_right. Raises ValueError for an unknown id."""
    return get(class_id).name


def id_of(name: str) -> int:
    """Id of a schema name. Raises ValueError for an unknown name."""
    try:
        return _BY_NAME[name].id
    except KeyError:
        raise ValueError(f"class {name!r} is not in the schema of {NUM_CLASSES} classes") from None


def display(class_id: int, language: str) -> str:
    """Name for people, e.g. (2, "de") → rechte Niere. Raises ValueError for an unknown one."""
    names = get(class_id).display
    if language not in names:
        raise ValueError(f"class names exist in {', '.join(names)}, not in {language!r}")
    return names[language]


def mentions(class_id: int, language: str) -> tuple[str, ...]:
    """Display name and synonyms of a class: the forms in which texts of a language name it."""
    return (display(class_id, language), *get(class_id).synonyms.get(language, ()))


def absent_classes(present: Collection[int], modality: str) -> tuple[int, ...]:
    """Classes of which a slice may be said not to show them, ids rising.

    Schema minus those present, minus what the modality's segmentation cannot find, minus parts
    and wholes of what is present (a slice with a lung lobe shows the lung). For a modality
    without a segmentation task the whole schema is the base.
    """
    for class_id in present:
        get(class_id)
    excluded = set(present)
    for whole, parts in _OVERLAPS:
        if whole in present:
            excluded |= parts
        if parts & set(present):
            excluded.add(whole)
    base = SEGMENTED_IN.get(modality, frozenset(range(1, NUM_CLASSES + 1)))
    return tuple(sorted(base - excluded))
