"""Questions about a slice that its metadata answers: no server, no model, nothing to get wrong.

What can be asked of depends on what is known: the modality and the examined body part stand in the
parquet, plane and side come from the DICOM header or from the index of slices.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

PER_SLICE = 3
Pair = dict[str, object]  # question, answer, question_type, choices


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a slice; "" where it is not. `left_at`: where the patient's left lies."""

    modality: str = ""  # CT, MR
    body_part: str = ""  # DICOM's BodyPartExamined
    plane: str = ""  # axial, coronal, sagittal
    left_at: str = ""  # left, right


YES_NO = {"en": ("Yes", "No"), "de": ("Ja", "Nein")}
MODALITIES = {
    "en": {"CT": "CT", "MR": "MR", "XR": "X-ray", "US": "ultrasound"},
    "de": {"CT": "CT", "MR": "MRT", "XR": "Röntgen", "US": "Ultraschall"},
}
# By what stands in BodyPartExamined.
BODY_PARTS = {
    "en": {
        "ABDOMEN": "Abdomen",
        "CHEST": "Chest",
        "PELVIS": "Pelvis",
        "HEAD": "Head",
        "NECK": "Neck",
        "SPINE": "Spine",
        "KNEE": "Knee",
        "SHOULDER": "Shoulder",
        "HIP": "Hip",
        "HEART": "Heart",
    },
    "de": {
        "ABDOMEN": "Abdomen",
        "CHEST": "Thorax",
        "PELVIS": "Becken",
        "HEAD": "Kopf",
        "NECK": "Hals",
        "SPINE": "Wirbelsäule",
        "KNEE": "Knie",
        "SHOULDER": "Schulter",
        "HIP": "Hüfte",
        "HEART": "Herz",
    },
}
SAME_PART = {
    "THORAX": "CHEST",
    "LUNG": "CHEST",
    "BRAIN": "HEAD",
    "SKULL": "HEAD",
    "CSPINE": "SPINE",
    "TSPINE": "SPINE",
    "LSPINE": "SPINE",
    "SSPINE": "SPINE",
    "WHOLESPINE": "SPINE",
    "ABD": "ABDOMEN",
    "LIVER": "ABDOMEN",
    "KIDNEY": "ABDOMEN",
    "PROSTATE": "PELVIS",
    "BLADDER": "PELVIS",
}
PLANES = {
    "en": {"axial": "axial", "coronal": "coronal", "sagittal": "sagittal"},
    "de": {"axial": "axial", "coronal": "koronar", "sagittal": "sagittal"},
}
HANDS = {
    "en": {"left": "Left", "right": "Right"},
    "de": {"left": "Links", "right": "Rechts"},
}
WORDS = {"modality": MODALITIES, "body_part": BODY_PARTS, "plane": PLANES, "left_at": HANDS}
# Regions that share ground: of one it cannot be said that the other was not examined.
OVERLAPS = (
    {"ABDOMEN", "PELVIS", "SPINE"},
    {"CHEST", "HEART", "SPINE", "SHOULDER"},
    {"ABDOMEN", "CHEST"},
    {"NECK", "HEAD", "SPINE"},
    {"NECK", "CHEST", "SHOULDER"},
    {"PELVIS", "HIP", "SPINE"},
)
# Wordings by fact and type of question; {x}: the value asked for, {a}, {b}: two to choose from.
QUESTIONS: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]] = {
    "en": {
        "modality": {
            "open": ("Which imaging modality was used?", "With what kind of imaging was it taken?"),
            "yesno": ("Is this a slice of this modality: {x}?", "Was it taken with {x}?"),
            "multiple": ("Which modality is this image from?",),
            "closed": ("Was {a} or {b} used?",),
        },
        "body_part": {
            "open": ("Which body region was examined?",),
            "yesno": ("Was this body region examined: {x}?",),
            "multiple": ("Which of these body regions was examined?",),
            "closed": ("Which region was examined, {a} or {b}?",),
        },
        "plane": {
            "open": ("What is the plane of this slice?",),
            "yesno": ("Is this slice {x}?",),
            "multiple": ("In which plane is this slice?",),
            "closed": ("Is this slice {a} or {b}?",),
        },
        "left_at": {
            "closed": ("On which side of the image is the patient's left?",),
            "yesno": ("Is the patient's left on this side of the image: {x}?",),
        },
    },
    "de": {
        "modality": {
            "open": (
                "Welches Bildgebungsverfahren wurde verwendet?",
                "Womit wurde es aufgenommen?",
            ),
            "yesno": (
                "Ist dies eine Schicht aus diesem Verfahren: {x}?",
                "Wurde es mit {x} aufgenommen?",
            ),
            "multiple": ("Aus welchem Verfahren stammt dieses Bild?",),
            "closed": ("Wurde {a} oder {b} verwendet?",),
        },
        "body_part": {
            "open": ("Welche Körperregion wurde untersucht?",),
            "yesno": ("Wurde diese Körperregion untersucht: {x}?",),
            "multiple": ("Welche dieser Körperregionen wurde untersucht?",),
            "closed": ("Welche Region wurde untersucht, {a} oder {b}?",),
        },
        "plane": {
            "open": ("Welche Ebene hat diese Schicht?",),
            "yesno": ("Ist diese Schicht {x}?",),
            "multiple": ("In welcher Ebene liegt diese Schicht?",),
            "closed": ("Ist diese Schicht {a} oder {b}?",),
        },
        "left_at": {
            "closed": ("Auf welcher Seite des Bildes liegt die linke Seite des Patienten?",),
            "yesno": ("Liegt die linke Seite des Patienten auf dieser Bildseite: {x}?",),
        },
    },
}


def known_part(body_part: str) -> str:
    """The entry of BODY_PARTS for what stands in BodyPartExamined, "" if there is none."""
    word = "".join(body_part.upper().replace("_", " ").split())
    word = SAME_PART.get(word, word)
    return word if word in BODY_PARTS["en"] else ""


def plan(known: Known, seed: int) -> list[tuple[str, str, int]]:
    """What is asked of a slice: up to three (fact, type of question, seed of its draws).

    Each fact that is known is asked for once before one is asked for again, then in another type
    of question. Fewer than three only where nothing else is known. `seed` decides; equal seeds ask
    the same.
    """
    rng = random.Random(seed)
    facts = [field.name for field in dataclasses.fields(known) if getattr(known, field.name)]
    chosen: list[tuple[str, str]] = []
    rng.shuffle(facts)
    kinds = {fact: sorted(QUESTIONS["en"][fact]) for fact in facts}
    for fact in facts:
        rng.shuffle(kinds[fact])
    while len(chosen) < PER_SLICE and any(kinds.values()):
        for fact in facts:
            if kinds[fact] and len(chosen) < PER_SLICE:
                fresh = [kind for kind in kinds[fact] if kind not in {k for _, k in chosen}]
                kind = (fresh or kinds[fact])[0]
                kinds[fact].remove(kind)
                chosen.append((fact, kind))
    return [(fact, kind, rng.getrandbits(32)) for fact, kind in chosen]


def questions(known: Known, seed: int) -> dict[str, list[Pair]]:
    """{language: the pairs of the `plan`}, the same ones in each language.

    Raises KeyError for a modality, part or plane without a name.
    """
    return {
        language: [
            _pair(fact, kind, getattr(known, fact), language, random.Random(draw))
            for fact, kind, draw in plan(known, seed)
        ]
        for language in QUESTIONS
    }


def _pair(fact: str, kind: str, value: str, language: str, rng: random.Random) -> Pair:
    """One question. `rng` is in the same state for every language, so the draws are the same."""
    names = WORDS[fact][language]
    right = names[value]
    wrong = [key for key in WORDS[fact]["en"] if key != value]
    if fact == "body_part":
        wrong = [key for key in wrong if not any({key, value} <= shared for shared in OVERLAPS)]
    others = rng.sample(wrong, min(3, len(wrong)))
    if fact == "modality" and kind != "multiple":
        others = ["MR" if value == "CT" else "CT"]  # "CT or ultrasound?" teaches nothing
    wording = QUESTIONS[language][fact][kind]
    text = wording[rng.randrange(len(wording))]
    two = [right, names[others[0]]]
    rng.shuffle(two)
    choices: list[str] | None = None
    answer = right
    if kind == "yesno":
        asked = rng.random() < 0.5
        text = text.replace("{x}", right if asked else names[others[0]])
        answer = YES_NO[language][0 if asked else 1]
    elif kind == "closed":
        text = text.replace("{a}", two[0]).replace("{b}", two[1])
    elif kind == "multiple":
        order = [value, *others]
        rng.shuffle(order)
        choices = [names[key] for key in order]
    return {"question": text, "answer": answer, "question_type": kind, "choices": choices}


def place_of(orientation: Sequence[float] | None) -> tuple[str, str]:
    """(plane, where the patient's left lies) of DICOM's ImageOrientationPatient; "" if unclear.

    Oblique slices are of the plane whose normal is nearest, if within 30 degrees. The patient's
    left is +x of DICOM's axes; it is told where rows run along x.
    """
    if orientation is None or len(orientation) != 6:
        return "", ""
    row, column = orientation[:3], orientation[3:]
    normal = [
        row[1] * column[2] - row[2] * column[1],
        row[2] * column[0] - row[0] * column[2],
        row[0] * column[1] - row[1] * column[0],
    ]
    axis = max(range(3), key=lambda i: abs(normal[i]))
    if abs(normal[axis]) < 0.866:
        return "", ""
    left_at = ""
    if abs(row[0]) > 0.866:
        left_at = "right" if row[0] > 0 else "left"
    return ("sagittal", "coronal", "axial")[axis], left_at
