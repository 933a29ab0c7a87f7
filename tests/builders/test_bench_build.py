"""The build benchmark: its imitation computes what ours computes, and its figures add up."""

import io
import json
import re

import mini_refrad2d as mini
import numpy as np
import pydicom
import pytest
import zstandard

from rg_jax.data.images import prepare_image
from tools import bench_build


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    mini.write_mini(folder)
    return folder


@pytest.mark.parametrize("slice_id", ["aaaa11111111", "dddd44444444"])
def test_the_imitation_makes_the_same_pixels_as_our_loading(source, slice_id):
    path = mini.dicom_path(source, slice_id)
    header = pydicom.dcmread(io.BytesIO(zstandard.decompress(path.read_bytes())))
    resize, _ = bench_build.resizer()
    published = bench_build.load_published(path, header.Modality, resize)
    item = {
        "id": slice_id,
        "image": mini.stored_pixels(slice_id)[..., None],
        "rescale": (float(header.RescaleSlope), float(header.RescaleIntercept)),
        "modality": header.Modality,
    }
    ours, _ = prepare_image(item, bench_build.SIZE)
    assert published.shape == (3, 224, 224) and published.dtype == np.float32
    np.testing.assert_allclose(published.transpose(1, 2, 0), ours, atol=2e-4)


def test_figures_of_all_ways(source, tmp_path, capsys):
    target = tmp_path / "figures.json"
    bench_build.main(
        [f"--source={source}", "--seconds=0", "--memory_slices=30", f"--json={target}"]
    )
    figures = json.loads(target.read_text())
    ways = ["published loading", "our build", "our packed build", "our loading"]
    assert list(figures["all"]) == ways and figures["slices"] == 6
    for row in figures["all"].values():
        assert row["per_second"] == pytest.approx(1000 / row["milliseconds"])
    base = figures["all"]["published loading"]["per_second"]
    assert figures["all"]["our build"]["ratio"] == pytest.approx(
        figures["all"]["our build"]["per_second"] / base
    )
    sizes = {size: found["slices"] for size, found in figures["by_size"].items()}
    assert sizes == {"24 x 32": 2, "20 x 16": 1, "16 x 20": 2, "32 x 24": 1}
    out = capsys.readouterr().out
    for way in ways:
        assert len(re.findall(rf"^  {way} +[\d.]+ +[\d.]+ +[\d.]+x$", out, re.MULTILINE)) == 5
    assert figures["memory"]["slices"] == 30 and figures["memory"]["peak_mib"] > 20
    assert "a build of 30 slices, shuffle buffer 32 MiB" in out


def test_measure_gives_each_key_its_time():
    ticks = iter(range(1000))
    clock = pytest.MonkeyPatch()
    clock.setattr(bench_build.time, "process_time", lambda: float(next(ticks)))
    try:
        spent = bench_build.measure(lambda: iter([None, 1, 1, 1]), ["a", "b", "a"], 0)
    finally:
        clock.undo()
    assert spent == {None: (0, 1.0), "a": (2, 2.0), "b": (1, 1.0)}
    found = bench_build.rows({"x": spent, "y": {"a": (4, 1.0)}})
    assert found["x"] == {"per_second": 0.75, "milliseconds": 4000 / 3, "ratio": 1.0}
    assert found["y"]["ratio"] == pytest.approx(4 / 0.75)


def test_a_repeated_layout_is_the_same_under_new_ids(source, tmp_path):
    made = bench_build.repeat_layout(source, tmp_path / "more", 17)
    assert made == 18
    listed = json.loads(mini.split_path(tmp_path / "more", "train", "mr").read_text())
    assert sum(listed.values(), []) == [f"dddd44444444x{k}" for k in range(3)]
    assert len(mini.read_parquet(tmp_path / "more")) == 18
    first = mini.dicom_path(tmp_path / "more", "dddd44444444x2")
    assert first.read_bytes() == mini.dicom_path(source, "dddd44444444").read_bytes()


@pytest.mark.parametrize(
    "argv, words",
    [(["--source=/no/such"], "/no/such"), ([], "--source"), (["--source=x", "--sorce=x"], "sorce")],
)
def test_mistakes_end_in_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        bench_build.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1
