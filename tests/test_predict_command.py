"""A slice from a file gets the answer that evaluation gave it; nothing of its header leaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from rg_jax import predict
from rg_jax.data import sources
from rg_jax.errors import UserError

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent / "data"))

import dicom_files  # noqa: E402

PLACE = (2, None)


def read(path, modality="", frame=None, place=PLACE):
    return predict.read_image(path, 0, modality=modality, frame=frame, place=place)


def test_a_dicom_file_is_answered_as_its_record_was(finished_run, phantom_dir, tmp_path):
    rows = (finished_run / "eval/phantom-test/predictions.jsonl").read_text().splitlines()
    row = next(r for r in map(json.loads, rows) if r["language"] == "en")
    source = sources.open_source("phantom", "test", str(phantom_dir))
    record = source[source.row_of(row["record_id"])]
    slope, intercept = record["rescale"]
    made = dicom_files.dataset(
        record["image"][..., 0],
        Modality=record["modality"],
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        PatientID="SECRET-1",
    )
    path = tmp_path / "Mustermann_Max.dcm"
    path.write_bytes(dicom_files.content(made))
    texts, out = record["texts"]["en"], tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rg_jax.predict", f"--workdir={finished_run}"),
            *(f"--image={path}", f"--out={out}", "--task=detect", "--language=en"),
            f"--question={texts['clinical_question']}",
            f"--information={texts['clinical_information']}",
        ],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (said,) = json.loads((out / "predictions.json").read_text())
    assert said["prompt"] == row["prompt"] and said["text"] == row["prediction_text"]
    assert "Not a medical device" in said["notice"]
    with Image.open(out / "0000.png") as picture:
        assert max(picture.size) >= 512
    for leak in ("Mustermann", "SECRET"):
        assert leak not in (out / "predictions.json").read_text() + done.stdout
        assert not [name for name in os.listdir(out) if leak in name]


def test_a_volume_gives_its_slice_in_radiological_order(tmp_path):
    values = np.arange(4 * 5 * 3).reshape(4, 5, 3).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii.gz")  # RAS
    record = read(tmp_path / "v.nii.gz", "CT", place=(2, 1))
    np.testing.assert_array_equal(record["image"][..., 0], values[::-1, ::-1, 1].T)
    assert record["image"].shape == (5, 4, 1) and record["modality"] == "CT"
    for place, said in (((2, None), "add --index=0 … 2"), ((3, 0), "--axis=3"), ((2, 9), "0 … 2")):
        with pytest.raises(UserError, match=said):
            read(tmp_path / "v.nii.gz", "CT", place=place)
    with pytest.raises(UserError, match="--modality"):
        read(tmp_path / "v.nii.gz")


def test_pictures_and_what_is_none(tmp_path):
    Image.new("L", (7, 5), 9).save(tmp_path / "p.png")
    record = read(tmp_path / "p.png")
    assert record["image"].shape == (5, 7, 3) and record["modality"] == "unknown"
    (tmp_path / "cut.png").write_bytes((tmp_path / "p.png").read_bytes()[:30])
    (tmp_path / "slice.dcm").write_bytes(dicom_files.file(np.zeros((4, 4), np.int16)))
    for name, modality, said in (
        ("cut.png", "", "cut.png: cannot be read as a picture"),
        ("none.dcm", "", "none.dcm"),
        ("slice.dcm", "MR", "is CT, not --modality=MR"),
    ):
        with pytest.raises(UserError, match=said):
            read(tmp_path / name, modality)


def test_a_question_is_needed_where_one_belongs():
    record = {"id": "0000", "modality": "CT"}
    with pytest.raises(UserError, match="--task=vqa --language=en: .* needs a question"):
        predict.make_prompt(record, "vqa", "en", "")
    with pytest.raises(UserError, match="'retort' is not one of"):
        predict.make_prompt(record, "retort", "en", "")
    asked = predict.make_prompt(record, "detect_vqa", "de", "Was?")
    assert asked.prefix == "\nWas? " and asked.context == "Was?"


def test_places_are_told_in_pixels_of_the_file():
    record = {"id": "0003", "image": np.zeros((50, 200, 1), np.int16)}
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    entity = predict.Entity("liver", 0, 5, 5, (0.1, 0.2, 0.5, 1.0), True)
    sample = predict.make_prompt({"id": "0003", "modality": "CT"}, "joint", "en", "")
    said = predict.to_json(record, sample, predict.Answer("liver", (entity,), (mask,), 1))
    (row,) = said["entities"]
    assert row["box_px"] == [20.0, 10.0, 100.0, 50.0] and row["class"] == "liver"
    assert row["mask"] == {"size": [4, 4], "runs": [6, 1, 9]}
    assert said["image"] == 3 and said["malformed_marks"] == 1


def test_a_picture_of_16_bits_is_refused(tmp_path):
    """As 8 bits nearly all of it would be white."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(path)
    with pytest.raises(UserError, match="more than 8 bits per pixel"):
        read(path)
