"""A tiny valid folder in the RefRad2D layout: made-up slices, masks, texts; nothing is wrong in it.

Three CT and three MR slices of 16 to 32 pixels in train, val and test, from five patients, one
sampled slice per modality. The functions below `write_mini` are for tests that plant a defect.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import zstandard
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, generate_uid

SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "rle": RLELossless,
}
# id: modality, split, patient, scan, (height, width), {class: box}, English, German, mentions
# (English text, German text, class name). Classes: 1 spleen, 2 kidney_right, 3 kidney_left,
# 5 liver, 52 aorta. "aaaa11111111" has two parts of class 5; "bbbb22222222" names a spleen that
# is not on it and starts with a mention in capitals.
SLICES: dict[str, dict[str, Any]] = {
    "aaaa11111111": {
        "modality": "CT",
        "split": "train",
        "patient": "ANON-0001",
        "scan": "scan1",
        "shape": (24, 32),
        "boxes": {5: [(2, 3, 10, 12), (12, 4, 15, 8)], 3: [(20, 10, 28, 20)]},
        "text": ("The liver is normal in size.", "Die Leber ist normal groß."),
        "mentions": [("liver", "Leber", "liver")],
    },
    "aabb22222222": {
        "modality": "CT",
        "split": "train",
        "patient": "ANON-0001",
        "scan": "scan1",
        "shape": (24, 32),
        "boxes": {3: [(19, 9, 27, 21)], 2: [(3, 9, 11, 21)]},
        "text": (
            "Left kidney with a cyst of 1.2 cm, spleen not enlarged, left kidney otherwise normal.",
            "Linke Niere mit 1,2 cm großer Zyste, Milz nicht vergrößert.",
        ),
        "mentions": [("left kidney", "linke Niere", "kidney_left"), ("spleen", "Milz", "spleen")],
    },
    "cccc33333333": {
        "modality": "CT",
        "split": "val",
        "patient": "ANON-0002",
        "scan": "scan2",
        "shape": (20, 16),
        "boxes": {52: [(5, 5, 9, 9)], 5: [(0, 0, 5, 20)]},
        "text": ("The aorta is not dilated.", "Die Aorta ist nicht erweitert."),
        "mentions": [("aorta", "Aorta", "aorta")],
    },
    "dddd44444444": {
        "modality": "MR",
        "split": "train",
        "patient": "ANON-0003",
        "scan": "scan3",
        "shape": (16, 20),
        "boxes": {5: [(1, 1, 9, 9)], 1: [(12, 2, 18, 9)]},
        "text": ("Liver and spleen are normal.", "Leber und Milz sind normal."),
        "mentions": [("liver", "Leber", "liver"), ("spleen", "Milz", "spleen")],
    },
    "eeee55555555": {
        "modality": "MR",
        "split": "val",
        "patient": "ANON-0004",
        "scan": "scan4",
        "shape": (16, 20),
        "boxes": {2: [(2, 6, 8, 14)]},
        "text": ("The right kidney is small.", "Die rechte Niere ist klein."),
        "mentions": [("right kidney", "rechte Niere", "kidney_right")],
    },
    "ffff66666666": {
        "modality": "MR",
        "split": "test",
        "patient": "ANON-0005",
        "scan": "scan5",
        "shape": (32, 24),
        "boxes": {52: [(10, 12, 15, 17)]},
        "text": ("The aorta is of normal width.", "Die Aorta ist normal weit."),
        "mentions": [("aorta", "Aorta", "aorta")],
    },
}
SAMPLED = {"ct": "aaaa11111111", "mr": "ffff66666666"}
CLASS_IDS = {"spleen": 1, "kidney_right": 2, "kidney_left": 3, "liver": 5, "aorta": 52}


def write_mini(folder: Path) -> None:
    """Write the whole layout below `folder`, which may exist already."""
    index: dict[str, dict[str, Any]] = {"ct": {}, "mr": {}}
    splits: dict[tuple[str, str], dict[str, list[str]]] = {}
    for number, (slice_id, made) in enumerate(SLICES.items()):
        kind = made["modality"].lower()
        write_slice(
            dicom_path(folder, slice_id),
            stored_pixels(slice_id),
            modality=made["modality"],
            patient=made["patient"],
            slope=1 if kind == "ct" else 0.5,
            intercept=-1024 if kind == "ct" else -50,
            spacing=(3.0, 2.0),
        )
        mask, bboxes = mask_of(slice_id)
        save_npy(mask_path(folder, slice_id), mask.astype(np.float32 if kind == "ct" else np.int64))
        index[kind][slice_id] = {
            "scan_rserid": made["scan"],
            "scan_file": "scan.nii.gz",
            "slice_axis": 2,
            "slice_idx": number,
            "segment_slice_path": str(mask_path(folder, slice_id).relative_to(folder)),
            "keywords_eng": [[en, name, CLASS_IDS[name]] for en, _, name in made["mentions"]],
            "keywords_de": [[de, name, CLASS_IDS[name]] for _, de, name in made["mentions"]],
            "bboxes": bboxes,
        }
        splits.setdefault((made["split"], kind), {})[made["text"][0]] = [slice_id]
    for kind, rows in index.items():
        write_json(index_path(folder, kind), rows)
        source = SAMPLED[kind]
        name = f"{SLICES[source]['scan']}_2_000"
        values = stored_pixels(source).astype(np.float32)
        values = values - 1024 if kind == "ct" else values * np.float32(0.5) - 50
        path = folder / "refrad2d_segment" / "scan_slices_v3" / name[:2] / f"{name}.npy"
        save_npy(path, values)
        sampled = {
            "rsopid": source,
            "modality": kind.upper(),
            "scan_slice_path": str(path.relative_to(folder)),
            "segment_slice_path": rows[source]["segment_slice_path"],
            "bboxes": rows[source]["bboxes"],
            "scan_rserid": SLICES[source]["scan"],
        }
        write_json(sampled_path(folder, kind), {name: sampled})
        for split in ("train", "val", "test"):
            write_json(split_path(folder, split, kind), splits.get((split, kind), {}))
    write_parquet(folder, [parquet_row(slice_id) for slice_id in SLICES])


def stored_pixels(slice_id: str) -> np.ndarray:
    """The (H, W) int16 pixels as stored; every slice has its own."""
    rng = np.random.default_rng(sum(map(ord, slice_id)))
    return rng.integers(-20, 2000, SLICES[slice_id]["shape"]).astype(np.int16)


def mask_of(slice_id: str) -> tuple[np.ndarray, list[list[int]]]:
    """The class map, and a [x1, y1, x2, y2, class] row for each part of a class."""
    mask, rows = np.zeros(SLICES[slice_id]["shape"], np.uint8), []
    for class_id, boxes in SLICES[slice_id]["boxes"].items():
        for x1, y1, x2, y2 in boxes:
            mask[y1:y2, x1:x2] = class_id
            rows.append([x1, y1, x2, y2, class_id])
    return mask, rows


def parquet_row(slice_id: str) -> dict[str, Any]:
    made = SLICES[slice_id]
    row = {"rsopid": slice_id, "modality": made["modality"], "body_part": "abdomen"}
    words = {
        "english": ("Pain.", "Mass?", "Which modality is it?", "Is it normal?", ["yes", "no"]),
        "german": ("Schmerzen.", "Tumor?", "Welche Modalität?", "Ist es normal?", ["ja", "nein"]),
    }
    for (language, (information, asked, first, second, choices)), text in zip(
        words.items(), made["text"], strict=True
    ):
        row[language] = {
            "CleanedSentence": text,
            "ReportKlinischeAngabenCleaned": information,
            "ReportFragestellungCleaned": asked,
            "dicom_vqa": [_question(first, made["modality"], "open", None)],
            "snippet_vqa": [
                _question(second, choices[0], "yesno", None),
                _question(second, choices[0], "multiple", choices),
            ],
        }
    return row


def _question(question: str, answer: str, kind: str, choices: list[str] | None) -> dict[str, Any]:
    return {"question": question, "answer": answer, "question_type": kind, "choices": choices}


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "refrad2d_vqa_dataset.parquet")


def read_parquet(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / "refrad2d_vqa_dataset.parquet").to_pylist()


def edit_parquet(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Let `change` alter the list of rows."""
    rows = read_parquet(folder)
    change(rows)
    write_parquet(folder, rows)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Let `change` alter what the file holds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def save_npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def dicom_path(folder: Path, slice_id: str) -> Path:
    return folder / "dicoms_anon" / slice_id[:2] / f"{slice_id}.dcm.zst"


def mask_path(folder: Path, slice_id: str) -> Path:
    below = Path("refrad2d_segment") / "segmented_slices_v3" / slice_id[:2] / f"{slice_id}.npy"
    return folder / below


def index_path(folder: Path, kind: str) -> Path:
    return folder / "refrad2d_segment" / f"rsopid_2_segment_v3_{kind}.json"


def sampled_path(folder: Path, kind: str) -> Path:
    return folder / "refrad2d_segment" / f"refrad2d_sampled_dataset_v3_{kind}.json"


def split_path(folder: Path, split: str, kind: str) -> Path:
    below = Path("split_v18") / "generated" / f"filtered_{kind}_splits"
    return folder / below / f"snippet2rsopids_{split}_{kind}_only.json"


def write_slice(
    path: Path,
    pixels: np.ndarray,
    *,
    modality: str = "CT",
    patient: str = "ANON-0001",
    slope: float | None = 1,
    intercept: float | None = -1024,
    spacing: tuple[float, float] | None = (3.0, 2.0),
    photometric: str = "MONOCHROME2",
    syntax: str = "explicit",
    **tags: Any,
) -> None:
    """Write one slice as zstandard-compressed DICOM. None leaves a tag out; `tags` are further
    keywords, e.g. PatientName="Doe"."""
    header = Dataset()
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    header.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    header.Modality, header.PatientID = modality, patient
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(pixels.dtype == np.int16)
    if spacing is not None:
        header.PixelSpacing = list(spacing)
    if slope is not None:
        header.RescaleSlope = slope
    if intercept is not None:
        header.RescaleIntercept = intercept
    for keyword, value in tags.items():
        setattr(header, keyword, value)
    meta = header.file_meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = header.SOPClassUID
    meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    plain = "explicit" if syntax == "rle" else syntax
    meta.TransferSyntaxUID = SYNTAXES[plain]
    header.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    header["PixelData"].VR = "OW"
    if syntax == "rle":
        header.compress(SYNTAXES[syntax], generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(buffer, header, enforce_file_format=True)
    path.write_bytes(zstandard.ZstdCompressor().compress(buffer.getvalue()))
