"""Made-up records and data sets for the tests of the data path: small, seeded, of every kind."""

from pathlib import Path

import numpy as np

from rg_jax.data import record as records

WORDS = {
    "en": ["The", "liver", "spleen", "kidney", "is", "enlarged", "and", "bright", "12 mm"],
    "de": ["Die", "Leber", "Milz", "Niere", "ist", "vergrößert", "und", "hell", "1,2 cm"],
}
ORGANS = {
    "en": {"liver": 5, "spleen": 1, "kidney": 2},
    "de": {"Leber": 5, "Milz": 1, "Niere": 2},
}


def make_record(
    index: int,
    *,
    seed: int = 0,
    languages: tuple[str, ...] = ("en", "de"),
    modality: str = "CT",
    height: int = 40,
    width: int = 48,
    grounded: bool = True,
    questions: int = 2,
    words: int = 12,
    class_free: bool = False,
) -> records.Record:
    """A record with a caption per language (its organs tagged and boxed), context and questions."""
    rng = np.random.default_rng([seed, index])
    picture = modality in ("XR", "picture")
    if picture:
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    else:
        image = rng.integers(0, 2000, (height, width, 1)).astype(np.int16)
    texts, qa, entities = {}, [], []
    boxes = {}
    for class_id in (1, 2, 5):
        x, y = rng.integers(0, width - 12), rng.integers(0, height - 12)
        w, h = rng.integers(2, 12, 2)
        boxes[class_id] = tuple(float(v) for v in (x, y, x + w, y + h))
    for language in languages:
        organs = ORGANS.get(language, ORGANS["en"])
        vocabulary = WORDS.get(language, WORDS["en"])
        caption = " ".join(rng.choice(vocabulary, words)) + f" {next(iter(organs))} {index}."
        texts[language] = {
            "caption": caption,
            "clinical_information": " ".join(rng.choice(vocabulary, 5)),
            "clinical_question": " ".join(rng.choice(vocabulary, 4)) + "?",
        }
        if grounded:
            entities += tag(caption, organs, boxes, language, "caption", class_free)
        for number in range(questions):
            kind = ("open", "yesno", "multiple")[number % 3]
            choices = list(organs) if kind == "multiple" else []
            answer = rng.choice(vocabulary[1:4])
            qa.append(
                {
                    "language": language,
                    "question": f"What is {number} of {index}?",
                    "answer": str(answer),
                    "type": kind,
                    "choices": choices,
                }
            )
        if grounded:
            name = next(iter(organs))
            answer = f"Yes, the {name} is visible."
            qa.append(
                {
                    "language": language,
                    "question": f"Is the {name} visible?",
                    "answer": answer,
                    "type": "grounded",
                    "choices": [],
                }
            )
            field = f"qa/{len(qa) - 1}/answer"
            entities += tag(answer, organs, boxes, language, field, class_free)
    segmentation = np.zeros((height, width), np.uint8)
    for class_id, (x0, y0, x1, y1) in boxes.items():
        segmentation[int(y0) : int(y1), int(x0) : int(x1)] = class_id
    return {
        "id": f"rec{seed}_{index:04d}",
        "image": image,
        "rescale": (1.0, 0.0 if picture else -1024.0),
        "modality": modality,
        "body_part": "abdomen",
        "spacing_mm": (0.8, 0.8),
        "texts": texts,
        "qa": qa,
        "segmentation": segmentation if grounded else np.zeros((0, 0), np.uint8),
        "entities": entities,
        "source": {"dataset": "made_up", "group": f"p{index}", "licence": "none"},
    }


def tag(text, organs, boxes, language, field, class_free=False):
    """Every occurrence of every organ as an entity of the record."""
    found = []
    for name, class_id in organs.items():
        start = text.find(name)
        while start >= 0:
            found.append(
                {
                    "language": language,
                    "field": field,
                    "start": start,
                    "end": start + len(name),
                    "class_id": 0 if class_free else class_id,
                    "box": boxes[class_id],
                }
            )
            start = text.find(name, start + len(name))
    return sorted(found, key=lambda e: e["start"])


def write_dataset(
    data_dir: Path, splits: dict[str, list[records.Record]], name: str = "made_up"
) -> None:
    """Stores records as a TFDS data set that `open_source(name, split, data_dir)` can read."""
    import tensorflow_datasets as tfds

    first = next(record for rows in splits.values() for record in rows)
    features = records.features(first["image"].dtype.name, first["image"].shape[2])

    class MadeUp(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            for row in rows:
                yield row["id"], records.encode(row)

    MadeUp.name = name
    builder = MadeUp(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
