"""A tiny archive as stages a and d take it: volumes, masks, mentions, reports; made in the test.

Three scans of 12 x 10 x 8 voxels in different orientations: CT "one" (NIfTI, RAS), CT "two" (a
DICOM series), MR "three" (NIfTI with a header slope, SPL). The liver (class 5) fills a box on
slices 2 to 5, the left kidney (3) one on slices 4 to 6, the spleen (1) none.
"""

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from dicom_files import file as dicom_file  # noqa: E402

SHAPE = (12, 10, 8)
LIVER = (slice(1, 6), slice(2, 8), slice(2, 6))
KIDNEY = (slice(7, 11), slice(5, 9), slice(4, 7))
SENTENCE = ("Liver normal, left kidney with a cyst of 1.2 cm.", "Leber und linke Niere normal.")
SPLEEN = ("The spleen is large.", "Die Milz ist groß.")
# id: scan, axis, index in LPS, texts
SLICES = {
    "aa01": ("one", 2, 3, SENTENCE),
    "aa02": ("one", 2, 5, SENTENCE),
    "ab03": ("one", 2, 0, SENTENCE),  # nothing on it
    "ab04": ("one", 1, 6, SENTENCE),
    "ab05": ("one", 2, 4, SPLEEN),  # what is mentioned is not on it
    "bb01": ("two", 2, 4, SENTENCE),
    "bb02": ("two", 0, 8, SENTENCE),
    "bb03": ("two", 2, 8, SENTENCE),  # outside the volume
    "cc01": ("three", 2, 4, SENTENCE),
    "cc02": ("three", 0, 2, SENTENCE),
    "cc03": ("three", 2, 5, ("", "Leber normal.")),
    "dd01": ("gone", 2, 4, SENTENCE),  # no files
}
MODALITY = {"one": "CT", "two": "CT", "three": "MR", "gone": "CT"}
KEPT = {"aa01", "aa02", "ab04", "bb01", "bb02", "cc01", "cc02", "cc03"}
MENTIONS = {
    "en": {
        SENTENCE[0]: {"liver": "liver", "left kidney": "kidney_left", "aorta": "aorta"},
        SPLEEN[0]: {"spleen": "spleen"},
    },
    "de": {
        SENTENCE[1]: {"Leber": "liver", "linke Niere": "kidney_left"},
        SPLEEN[1]: {"Milz": "spleen"},
        "Leber normal.": {"Leber": "liver"},
    },
}
LPS_AFFINE = np.array([[-2.0, 0, 0, 20], [0, -2, 0, 30], [0, 0, 3, -40], [0, 0, 0, 1]])


def values(scan):
    """The volume in LPS as whole numbers; every voxel has its own."""
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    return array + {"one": -300, "two": 100, "three": 0}[scan]


def classes(scan):
    mask = np.zeros(SHAPE, np.uint8)
    mask[LIVER], mask[KIDNEY] = 5, 3
    return mask


def _turned(array, codes):
    """An array in LPS stored in another orientation, with its affine."""
    image = nibabel.Nifti1Image(array, LPS_AFFINE)
    now = nibabel.io_orientation(LPS_AFFINE)
    target = nibabel.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nibabel.orientations.ornt_transform(now, target))


def _save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)


def write_archive_masks(root: Path) -> None:
    for scan, codes in (("one", "LPS"), ("two", "LAS"), ("three", "RSA")):
        name = "seg_series.nii.gz" if scan == "two" else "seg_scan_clean.nii.gz"
        _save(_turned(classes(scan), codes), root / f"segmentations/{scan}/{name}")


def write_archive(root: Path, masks: bool = True) -> None:
    """Write it below `root`; without `masks` as it is before stage a."""
    _save(_turned(values("one").astype(np.int16), "RAS"), root / "scans/one/scan_clean.nii.gz")
    turned = _turned(values("three") * 0.5 + 10, "SPL")
    turned.set_data_dtype(np.float32)
    _save(turned, root / "scans/three/scan_clean.nii.gz")
    (root / "scans/three/scan_clean.json").write_text('{"Modality": "MR", "PatientID": "K-77"}')
    series = root / "scans/two"
    series.mkdir()
    for z in range(SHAPE[2]):
        pixels = (values("two")[:, :, z].T + 1024).astype(np.uint16)
        place = {"ImagePositionPatient": [-20, -30, -40 + 3 * z], "PixelSpacing": [2, 2]}
        (series / f"{99 - z}.dcm").write_bytes(dicom_file(pixels, PatientID="H-123", **place))
    if masks:
        write_archive_masks(root)
    for kind in ("ct", "mr"):
        index = {}
        for id_, (scan, axis, number, _) in SLICES.items():
            if MODALITY[scan] == kind.upper():
                file = "" if scan == "two" else "scan_clean.nii.gz"
                entry = {"rel_dir": scan, "file": file, "slices": {}}
                place = {"slice_axis": axis, "slice_idx": number}
                index.setdefault(scan, entry)["slices"][id_] = place
        (root / f"scans_index_{kind}.json").write_text(json.dumps(index))
    for language, mentions in MENTIONS.items():
        (root / f"keywords_{language}.json").write_text(json.dumps(mentions))
    rows = []
    for id_, (scan, _, _, texts) in SLICES.items():
        row = {"rsopid": id_, "modality": MODALITY[scan], "body_part": "ABDOMEN"}
        for struct, text in zip(("english", "german"), texts, strict=True):
            row[struct] = {
                "CleanedSentence": text,
                "ReportKlinischeAngabenCleaned": "",
                "ReportFragestellungCleaned": "",
                "dicom_vqa": [],
                "snippet_vqa": [],
            }
        rows.append(row)
    pair = pa.struct([("question", pa.string()), ("answer", pa.string())])
    texts = [
        *((name, pa.string()) for name in ("CleanedSentence", "ReportKlinischeAngabenCleaned")),
        ("ReportFragestellungCleaned", pa.string()),
        *((name, pa.list_(pair)) for name in ("dicom_vqa", "snippet_vqa")),
    ]
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("rsopid", "modality", "body_part")),
            *((name, pa.struct(texts)) for name in ("english", "german")),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "refrad2d_vqa_dataset.parquet")
