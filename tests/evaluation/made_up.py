"""Results on drawn pictures: ellipses as organs, and a model that is sometimes wrong."""

import dataclasses

import numpy as np

from rg_jax.data.tasks import Sample
from rg_jax.evaluation.results import Result, make_result, score_masks
from rg_jax.grounding.boxes import iou
from rg_jax.grounding.format import OURS
from rg_jax.grounding.prompts import prefix
from rg_jax.grounding.spans import Entity, write

# class id → (mention en, mention de, centre x, centre y, half width, half height, grey)
ORGANS = {
    5: ("liver", "Leber", 0.32, 0.42, 0.18, 0.2, 150),
    1: ("spleen", "Milz", 0.74, 0.4, 0.09, 0.12, 185),
    52: ("aorta", "Aorta", 0.52, 0.56, 0.05, 0.05, 225),
    3: ("left kidney", "linke Niere", 0.7, 0.63, 0.07, 0.09, 205),
    29: ("vertebra L3", "Lendenwirbelkörper 3", 0.5, 0.72, 0.08, 0.07, 250),
}


def place(rng: np.random.Generator, class_id: int, spread: float) -> tuple:
    """A normalised box near the organ's usual place."""
    _, _, x, y, w, h, _ = ORGANS[class_id]
    x, y = x + spread * rng.standard_normal(), y + spread * rng.standard_normal()
    w, h = (side * np.exp(2 * spread * rng.standard_normal()) for side in (w, h))
    box = np.clip([x - w, y - h, x + w, y + h], 0, 1)
    return tuple(float(edge) for edge in box)


def picture(boxes: dict, size: int = 64, seed: int = 0) -> np.ndarray:
    """(size, size, 3) uint8: a body with an ellipse in each box."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    grey = np.full((size, size), 14.0)
    grey[((x - 0.5) / 0.46) ** 2 + ((y - 0.5) / 0.38) ** 2 < 1] = 88
    for class_id, (x0, y0, x1, y1) in boxes.items():
        grey[ellipse((x0, y0, x1, y1), size)] = ORGANS[class_id][6]
    grey += 7 * rng.standard_normal(grey.shape)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def sentence(names: list[str], language: str) -> tuple[str, list[tuple[int, int]]]:
    """A caption that names these structures, and where in it they stand."""
    text, spans = {"en": "Shown: ", "de": "Abgebildet: "}[language], []
    for k, name in enumerate(names):
        text += ", " if k else ""
        spans.append((len(text), len(text) + len(name)))
        text += name
    return text + ".", spans


def grounded(text: str, spans, boxes: dict) -> tuple[Entity, ...]:
    """Entities at spans, in the order of the boxes."""
    return tuple(
        Entity(text[a:b], a, b, class_id, box)
        for (a, b), (class_id, box) in zip(spans, boxes.items(), strict=True)
    )


def detect_sample(seed: int, language: str, modality: str = "CT") -> tuple[Sample, dict]:
    """A grounded caption of two to four organs, and the boxes for its picture."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5))
    classes = [int(c) for c in rng.permutation(sorted(ORGANS))[:count]]
    boxes = {c: place(rng, c, 0.03) for c in classes}
    text, spans = sentence([ORGANS[c][language == "de"] for c in classes], language)
    entities = grounded(text, spans, boxes)
    name = f"made-up-{seed:03d}"
    sample = Sample(
        f"{name}/detect/{language}/0",
        name,
        "detect",
        language,
        prefix("detect", language, context="Clinical information: none."),
        write(text, entities, OURS),
        text,
        entities,
        "caption",
        modality,
        {"context_cut": 1} if seed % 7 == 0 else {},
    )
    return sample, boxes


def answer(sample: Sample, seed: int, skill: float) -> str:
    """What a model of some skill in [0, 1] generates: shifted, missing and surplus boxes."""
    rng = np.random.default_rng(1000 + seed)
    kept = [e for e in sample.entities if rng.random() < 0.6 + 0.4 * skill] or sample.entities[:1]
    boxes = {}
    for entity in kept:
        shift = 0.09 * (1 - skill) * rng.standard_normal(4)
        x0, y0, x1, y1 = np.clip(np.asarray(entity.box) + shift, 0, 1)
        boxes[entity.class_id] = (
            float(min(x0, x1)),
            float(min(y0, y1)),
            float(max(x0, x1)),
            float(max(y0, y1)),
        )
    if rng.random() > 0.5 + 0.5 * skill:
        extra = next((c for c in ORGANS if c not in boxes), None)
        if extra is not None:
            boxes[extra] = place(rng, extra, 0.08)
    text, spans = sentence([ORGANS[c][sample.language == "de"] for c in boxes], sample.language)
    return write(text, grounded(text, spans, boxes), OURS)


def results(n: int = 24, skill: float = 0.7) -> tuple[list[Result], dict[str, np.ndarray]]:
    """Results of all kinds and the picture of each, by sample id."""
    found, pictures = [], {}
    for seed in range(n):
        language = ("en", "de")[seed % 2]
        sample, boxes = detect_sample(seed, language, ("CT", "MR")[seed % 3 == 0])
        output = answer(sample, seed, skill if seed % 5 else 0.1)
        if seed % 4 == 2:
            sample, output = question(sample, seed)
        if seed % 8 == 1:
            output = output.replace("</p>", "", 1)  # an unclosed mark
        found.append(make_result(sample, output, OURS))
        pictures[sample.id] = picture(boxes, 64 if seed % 2 else 160, seed)
    return found, pictures


def with_other_words(sample: Sample, mention: str, class_id: int) -> str:
    """Generated text that puts one and the same mention at every place of the reference."""
    text, spans = sentence([mention] * len(sample.entities), "en")
    entities = tuple(
        Entity(mention, a, b, class_id, e.box)
        for (a, b), e in zip(spans, sample.entities, strict=True)
    )
    return write(text, entities, OURS)


def question(sample: Sample, seed: int) -> tuple[Sample, str]:
    """The sample as a plain question, and an answer that is right every other time."""
    closed = seed % 8 == 2
    asked = "Is the liver visible?" if closed else "Which organ is largest?"
    right = "yes" if closed else "The liver."
    made = Sample(
        sample.id.replace("/detect/", "/vqa/"),
        sample.record_id,
        "vqa",
        sample.language,
        prefix("vqa", sample.language, question=asked),
        right,
        right,
        (),
        "yesno" if closed else "open",
        sample.modality,
    )
    wrong = "No" if closed else "The spleen and the aorta"
    return made, right if seed % 3 else wrong


def mean_iou(result: Result) -> float:
    """Mean IoU of the matches, worked out apart from the scorer."""
    pairs = [
        iou(result.sample.entities[m.reference].box, result.entities[m.predicted].box)
        for m in result.score.matches
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def record_of(results: list[Result], pictures: dict[str, np.ndarray]):
    """The function that gives a decoded record by its id: HU for CT, oblong pixels for MR."""
    by_record = {r.sample.record_id: (pictures[r.sample.id], r.sample.modality) for r in results}

    def record(name: str) -> dict:
        grey, modality = by_record[name]
        grey = grey[..., :1]
        found = {"id": name, "modality": modality, "source": {"dataset": "made up"}}
        if modality == "CT":
            image = (2 * grey.astype(np.int16) + 1024 - 130).astype(np.int16)
            return found | {"image": image, "rescale": (1.0, -1024.0), "spacing_mm": (1.0, 1.0)}
        image = 7 * grey.astype(np.uint16)
        return found | {"image": image, "rescale": (1.0, 0.0), "spacing_mm": (1.0, 0.7)}

    return record


def with_masks(result: Result, size: int = 64) -> Result:
    """The result with an ellipse in every box as its mask."""
    sample = dataclasses.replace(
        result.sample,
        marks="masks",
        entities=tuple(dataclasses.replace(e, mask=True) for e in result.sample.entities),
    )
    reference = tuple(ellipse(e.box, size) for e in sample.entities)
    masks = tuple(ellipse(e.box, size) for e in result.entities)
    score = score_masks(sample.entities, reference, result.entities, masks)
    return dataclasses.replace(
        result, sample=sample, reference_masks=reference, masks=masks, mask_score=score
    )


def ellipse(box: tuple, size: int) -> np.ndarray:
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    (x0, y0, x1, y1), tiny = box, 1e-6
    across, down = (2 * x - x0 - x1) / (x1 - x0 + tiny), (2 * y - y0 - y1) / (y1 - y0 + tiny)
    return across**2 + down**2 < 1
