"""refrad2d as an Apache Beam pipeline, with Beam's local runner (extra "beam")."""

import sys

import mini_refrad2d as mini
import pytest

from rg_jax.errors import UserError
from tfds_builders import beam
from tfds_builders.__main__ import build
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig


@pytest.fixture
def source(tmp_path):
    mini.write_mini(tmp_path / "source")
    return tmp_path / "source"


def test_without_the_package_the_extra_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"-e ..\[beam\]"):
        build(Builder, RefRad2DConfig(beam=True), str(tmp_path / "data"), str(source))
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_a_pipeline_writes_what_a_build_writes(source, tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="the extra beam is not installed")
    mini.write_json(mini.split_path(source, "test", "ct"), {"x": ["gone00000000"]})
    places, told = [], []
    for name, run in (("plain", False), ("pipeline", True)):
        config = RefRad2DConfig(skip_bad=True, beam=run)
        places.append(build(Builder, config, str(tmp_path / name), str(source)))
        told.append(capsys.readouterr().out)
    contents = [{path.name: path.read_bytes() for path in place.iterdir()} for place in places]
    assert contents[0] == contents[1] and len(contents[0]) == 7
    assert {path.name for path in places[1].parent.iterdir()} == {places[1].name}
    for line in ("left out: missing file: 1", "boxes merged: 2", "mention without mask: 2"):
        assert line in told[0] and line in told[1], told[1]
    assert "tensorflow" not in sys.modules


def test_a_defect_ends_the_pipeline_in_one_line(source, tmp_path):
    pytest.importorskip("apache_beam", reason="the extra beam is not installed")
    mini.dicom_path(source, "eeee55555555").unlink()
    with pytest.raises(UserError) as caught:
        build(Builder, RefRad2DConfig(beam=True), str(tmp_path / "data"), str(source))
    assert "eeee55555555.dcm.zst" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("dataset_info.json"))


@pytest.mark.parametrize(
    "wrapped",
    [
        RuntimeError("Traceback\n  x\nrg_jax.errors.UserError: a.dcm: is torn [while running 'M']"),
        UserError("a.dcm: is torn [while running 'M']"),
    ],
)
def test_the_reason_inside_what_a_runner_says(wrapped):
    assert beam.reason(wrapped) == "a.dcm: is torn"
    assert beam.reason(RuntimeError("out of memory")) == ""
