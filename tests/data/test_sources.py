"""Data sets on disk: what is read, what a scan finds, and what is said when something is wrong."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from fabricate import make_record

from rg_jax.data import record as records
from rg_jax.data import sources
from rg_jax.data.sources import open_source
from rg_jax.data.tasks import TASK_NAMES, drafts
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS, PUBLISHED_SEGMENTATION


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], np.ndarray):
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype
        else:
            assert a[key] == b[key], key


def test_records_come_back_as_they_were(train, pictures):
    for source, options in ((train, {}), (pictures, {"modality": "XR", "languages": ("en",)})):
        seed = 4 if options else 0
        for row in range(len(source)):
            record = source[row]
            same(record, make_record(int(record["id"][-4:]), seed=seed, **options))
            assert source.row_of(record["id"]) == row


def test_our_reader_and_that_of_tfds_agree(train):
    import tensorflow_datasets as tfds

    stored = tfds.builder_from_directory(train.directory).as_data_source("train")
    for row in range(5):
        same(train[row], records.decode(stored[row]))


def test_light_reading_leaves_only_the_pixels_out(train):
    full, light = train[3], train.light(3)
    assert light["image"].shape == full["image"].shape and not light["image"].any()
    assert light["segmentation"].shape == full["segmentation"].shape
    pixels = ("image", "segmentation")
    same({k: v for k, v in light.items() if k not in pixels},
         {k: v for k, v in full.items() if k not in pixels})  # fmt: skip


def test_reading_without_masks_leaves_only_them_out(train):
    full, part = train[3], train.without_masks(3)
    assert full["segmentation"].any() and not part["segmentation"].any()
    assert part["segmentation"].shape == full["segmentation"].shape
    same({k: v for k, v in part.items() if k != "segmentation"},
         {k: v for k, v in full.items() if k != "segmentation"})  # fmt: skip


def test_caching_keeps_records(data_dir):
    source = open_source("made_up", "train", data_dir, cache=True)
    assert source[2] is source[2] is source.light(2) is source.without_masks(2)
    assert source.without_masks(1) is source[1]  # what is kept is kept whole
    copy = pickle.loads(pickle.dumps(source))
    assert copy.cache and len(copy) == len(source) and copy[2] is not source[2]
    assert copy[2]["id"] == source[2]["id"]


def test_split_slices(data_dir):
    assert len(open_source("made_up", "train[:10]", data_dir)) == 10
    assert len(open_source("made_up:1.0.0", "val", data_dir)) == 5


def test_what_is_not_there_names_the_command(data_dir, tmp_path):
    command = "python -m tfds_builders phantom --data_dir="
    with pytest.raises(UserError, match=f"data set 'phantom'.*{command}{data_dir}"):
        open_source("phantom", "train", data_dir)
    with pytest.raises(UserError, match=f"{command}{tmp_path}/nowhere"):
        open_source("phantom/64", "train", tmp_path / "nowhere")
    with pytest.raises(UserError, match="'made_up:9.9.9' is not in"):
        open_source("made_up:9.9.9", "train", data_dir)
    with pytest.raises(UserError, match="no split 'trian'; it has: .*train"):
        open_source("made_up", "trian", data_dir)
    with pytest.raises(UserError, match=r"train\[:0\]' is empty.*larger part"):
        open_source("made_up", "train[:0]", data_dir)
    with pytest.raises(UserError, match=r"'train\[80\]' names no part"):
        open_source("made_up", "train[80]", data_dir)


@pytest.fixture
def broken(data_dir, tmp_path):
    """A copy of the data set to damage; gives the version's directory and the copy's root."""
    shutil.copytree(data_dir / "made_up", tmp_path / "made_up")
    return tmp_path / "made_up" / "1.0.0", tmp_path


def test_a_broken_off_build_is_no_data_set(broken):
    directory, root = broken
    directory.rename(directory.with_name("incomplete.ABC_1.0.0"))
    with pytest.raises(UserError, match="is not in .*python -m tfds_builders made_up"):
        open_source("made_up", "train", root)


def test_the_newest_version_and_configurations(broken):
    directory, root = broken
    shutil.copytree(directory, directory.with_name("1.0.10"))
    shutil.copytree(directory, directory.with_name("1.0.9"))
    assert open_source("made_up", "val", root).directory.name == "1.0.10"
    for config in ("a", "b"):
        shutil.copytree(directory, root / "made_up" / config / "1.0.0")
    for version in ("1.0.0", "1.0.9", "1.0.10"):
        shutil.rmtree(root / "made_up" / version)
    with pytest.raises(UserError, match="several configurations.*made_up/a, made_up/b"):
        open_source("made_up", "val", root)
    assert len(open_source("made_up/b", "val", root)) == 5


@pytest.mark.parametrize("damage", ["info", "missing file", "short file"])
def test_a_damaged_data_set(broken, damage):
    directory, root = broken
    file = next(directory.glob("*train*array_record*"))
    if damage == "info":
        (directory / "dataset_info.json").write_text("{")
    elif damage == "missing file":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="python -m tfds_builders made_up"):
        open_source("made_up", "train", root)[0]


def damage_pixels(monkeypatch, source, record_id):
    """Spoils the stored pixels of one record, as a bad disk would."""
    from tensorflow_datasets.proto import tf_example_pb2

    class Damaged:
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, row):
            example = tf_example_pb2.Example.FromString(bytes(self.inner[row]))
            stored = example.features.feature
            if stored["id"].bytes_list.value[0] == record_id.encode():
                value = stored["image/value"].bytes_list.value
                value[0] = value[0][: len(value[0]) // 2]
            return example.SerializeToString()

    monkeypatch.setattr(source, "_raw", Damaged(source._raw))


def test_a_damaged_image_names_record_and_data_set(data_dir, monkeypatch):
    source = open_source("made_up", "train", data_dir)
    damage_pixels(monkeypatch, source, "rec0_0005")
    row = source.row_of("rec0_0005")
    with pytest.raises(UserError, match="rec0_0005 of data set made_up, split train.*tfds_build"):
        source[row]
    assert source.light(row)["id"] == "rec0_0005"
    assert source[row - 1]["id"]


def test_the_scan_counts_what_applies(train):
    for fmt in (OURS, PUBLISHED_SEGMENTATION):
        scan = train.scan(("en", "de"), fmt)
        for row in range(0, len(train), 7):
            record = train[row]
            for task in TASK_NAMES:
                for language in ("en", "de"):
                    number = len(drafts(record, task, language, fmt)[0])
                    assert scan.available(row).get(task, {}).get(language, 0) == number
    assert scan is train.scan(("en", "de"), fmt)
    assert len(scan.usable(["report"])) == len(train) and len(scan.usable(["detect"])) == 0


def test_unusable_records_are_found(data_dir):
    mixed = open_source("made_up", "mixed", data_dir)
    usable = mixed.scan(("en", "de"), OURS).usable(["report", "detect"])
    assert sorted(mixed[int(i)]["id"] for i in usable) == [f"rec2_{i:04d}" for i in range(4)]


def test_texts_with_marks_are_counted_and_logged(data_dir, monkeypatch, caplog):
    source = open_source("made_up", "val", data_dir)
    light = source.light

    def with_mark(row):
        record = light(row)
        if row == 2:
            record["texts"]["en"]["caption"] = "a </p> in it"
        return record

    monkeypatch.setattr(source, "light", with_mark)
    scan = source.scan(("en",), OURS)
    assert scan.marked == 1 and len(scan.usable(["report"])) == 4
    assert "1 texts look like grounding marks" in caplog.text


def test_a_large_set_keeps_its_scan(broken, monkeypatch, caplog):
    directory, root = broken
    monkeypatch.setattr(sources, "SCAN_FILE_FROM", 10)
    first = open_source("made_up", "train", root).scan(("en",), OURS)
    (file,) = directory.glob("scan-*.npz")

    def never(row):
        raise AssertionError("scanned again")

    source = open_source("made_up", "train", root)
    monkeypatch.setattr(source, "light", never)
    assert (source.scan(("en",), OURS).counts == first.counts).all()
    # Another question is another scan, and a damaged file is not believed.
    source = open_source("made_up", "train", root)
    source.scan(("de",), OURS)
    assert len(list(directory.glob("scan-*.npz"))) == 2
    file.write_bytes(file.read_bytes()[:50])
    source = open_source("made_up", "train", root)
    assert (source.scan(("en",), OURS).counts == first.counts).all()
    assert "scanned again" in caplog.text
    assert not list(directory.glob(".scan*"))


def test_reading_imports_no_tensorflow(data_dir):
    code = (
        "import sys, json\n"
        "from rg_jax.data.sources import open_source\n"
        "from rg_jax.data import pipeline\n"
        f"print(open_source('made_up', 'train', {str(data_dir)!r})[0]['id'])\n"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'jax')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [m for m in json.loads(done.stdout.splitlines()[-1]) if m.startswith("tensorflow")]
