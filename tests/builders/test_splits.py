"""The split guard, the pool and the writer: what all builders lean on."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import mini_refrad2d as mini
import numpy as np
import pytest
import tensorflow_datasets as tfds
from pool_jobs import double
from tensorflow_datasets.core import shuffle

from rg_jax.data import record
from rg_jax.data.sources import open_source
from rg_jax.errors import UserError
from tfds_builders import parallel, splits, writing
from tfds_builders.__main__ import build
from tfds_builders.phantom.phantom_dataset_builder import Builder as Phantom
from tfds_builders.phantom.phantom_dataset_builder import PhantomConfig
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig
from tfds_builders.splits import Member

ROOT = Path(__file__).parents[2]


def member(name, split, **keys):
    return Member(name, split, tuple(keys.items()), f"{split}.json")


def test_leaks_are_named_once():
    members = [
        member("a", "train", slice="a", patient="P", scan="s"),
        member("b", "train", slice="b", patient="P", scan="s"),
        member("c", "val", slice="c", patient="P", scan="s"),
        member("d", "test", slice="d", patient="Q"),
    ]
    leaks = splits.find_leaks(members)
    assert [str(leak) for leak in leaks] == ["the same patient is in train (a, b) and in val (c)"]
    assert leaks[0].file == "val.json"
    assert splits.find_leaks(members[:2] + members[3:]) == []


def test_what_belongs_to_something_moved_follows_it():
    members = [
        member("a", "train", patient="P"),
        member("b", "val", patient="P", scan="s"),
        member("c", "test", patient="Q", scan="s"),
        member("d", "test", patient="Q"),
        member("e", "test", patient="R"),
        member("e", "val", patient="R"),
        member("f", "val", patient="S"),
    ]
    kept, moved = splits.move_to_train(members)
    assert {(m.id, m.split) for m in kept} == {
        *((name, "train") for name in "abcde"),
        ("f", "val"),
    }
    assert len(kept) == 6 and [m.id for m in moved] == ["b", "c", "d", "e", "e"]
    assert not splits.find_leaks(kept)


def test_pictures_are_told_apart_by_their_pixels():
    seen = splits.SameImages()
    one = np.arange(12, dtype=np.int16).reshape(3, 4, 1)
    assert seen.before(splits.digest_of(one), "train", "a") is None
    assert seen.before(splits.digest_of(one.copy()), "train", "b") == ("train", "a")
    assert seen.before(splits.digest_of(one), "val", "c") == ("train", "a")
    assert seen.before(splits.digest_of(one.reshape(4, 3, 1)), "val", "d") is None
    blank = splits.digest_of(np.zeros_like(one))
    assert [seen.before(blank, split, "e") for split in ("train", "val")] == [None, None]


# --- the guard in a builder ---------------------------------------------------------------------


def same_patient(root):
    """The CT patient of val is that of train."""
    path = mini.dicom_path(root, "cccc33333333")
    mini.write_slice(path, mini.stored_pixels("cccc33333333"), patient="ANON-0001")


def same_slice(root):
    splits_of = {"The liver is normal in size.": ["aaaa11111111"]}
    mini.write_json(mini.split_path(root, "test", "ct"), splits_of)


def same_scan(root):
    change = {"scan_rserid": "scan1"}
    mini.edit_json(mini.index_path(root, "ct"), lambda i: i["cccc33333333"].update(change))


def same_picture(root):
    """The pixels of a training slice under another id and patient in val."""
    path, pixels = mini.dicom_path(root, "cccc33333333"), mini.stored_pixels("aaaa11111111")
    mini.write_slice(path, pixels, patient="ANON-0002")
    mini.save_npy(mini.mask_path(root, "cccc33333333"), mini.mask_of("aaaa11111111")[0])


LEAKS = {
    same_patient: "the same patient is in train (aaaa11111111, aabb22222222, scan1_2_000) and in"
    " val (cccc33333333)",
    same_slice: "slice aaaa11111111 is in train and in test",
    same_scan: "scan scan1 is in train",
    same_picture: "cccc33333333: the same picture, pixel by pixel, as aaaa11111111 of train",
}


@pytest.mark.parametrize("plant", LEAKS, ids=lambda plant: plant.__name__)
def test_leaks_are_refused_with_names_or_moved(tmp_path, capsys, plant):
    mini.write_mini(tmp_path / "source")
    plant(tmp_path / "source")
    argv = (str(tmp_path / "data"), str(tmp_path / "source"))
    with pytest.raises(UserError) as caught:
        build(Builder, RefRad2DConfig(), *argv)
    assert LEAKS[plant] in str(caught.value), caught.value
    assert not list(tmp_path.rglob("dataset_info.json"))
    place = build(Builder, RefRad2DConfig(leaks="move"), *argv)
    builder = tfds.builder_from_directory(place)
    groups, where = {}, {}
    for split in builder.info.splits:
        for item in map(record.decode, builder.as_data_source(split=split)):
            assert groups.setdefault(item["source"]["group"], split) == split
            where[item["id"]] = split
    out = capsys.readouterr().out
    if plant is same_picture:
        assert "cccc33333333" not in where and "left out of val: the same picture" in out
    else:
        name = "aaaa11111111" if plant is same_slice else "cccc33333333"
        assert where[name] == "train" and "moved to train, since it was in several" in out


def test_one_patient_id_for_everybody_is_recognised(tmp_path):
    source = tmp_path / "source"
    mini.write_mini(source)
    for slice_id, made in mini.SLICES.items():
        path, modality = mini.dicom_path(source, slice_id), made["modality"]
        mini.write_slice(path, mini.stored_pixels(slice_id), modality=modality, patient="ANON")
    with pytest.raises(UserError, match="--group_by=scan"):
        build(Builder, RefRad2DConfig(), str(tmp_path / "data"), str(source))
    build(Builder, RefRad2DConfig(group_by="scan"), str(tmp_path / "data"), str(source))


# --- the pool -----------------------------------------------------------------------------------


def alive():
    return multiprocessing.active_children()


def test_the_pool_keeps_order_and_draws_no_further_than_needed():
    drawn = []
    pool = parallel.Pool(2)
    results = pool.map(double, (drawn.append(i) or i for i in range(100, 140)))
    first, pid = next(results)
    assert first == 200 and pid != os.getpid()
    assert len(drawn) <= 2 * parallel.IN_FLIGHT_PER_WORKER + 1
    assert [value for value, _ in results] == list(range(202, 280, 2))
    assert len(alive()) == 2  # kept for the next split
    with pytest.raises(UserError, match="slice 7 is torn"):
        list(pool.map(double, range(20)))
    assert not alive()
    results = pool.map(double, range(100, 140))
    next(results)
    results.close()  # as when the build is interrupted
    assert not alive()
    with pytest.raises(UserError, match="fewer --workers"):
        list(pool.map(double, [1, "die", 2]))
    assert not alive()


def test_the_pool_can_be_ended_in_the_middle_of_large_results():
    """Shared queues hang then: a worker that is ended while it writes holds up the others."""
    for taken in (1, 9, 19):
        results = parallel.Pool(2).map(double, (["x" * 60_000] for _ in range(400)))
        assert all(len(next(results)[0]) == 2 for _ in range(taken))
        results.close()
        assert not alive()


def test_no_workers_is_this_process():
    drawn = []
    results = parallel.Pool(0).map(double, (drawn.append(i) or i for i in range(3)))
    assert next(results) == (0, os.getpid()) and drawn == [0]


# --- writing ------------------------------------------------------------------------------------


def test_a_build_beyond_the_memory_buffer(tmp_path, monkeypatch):
    """TFDS shuffles through files then, with TensorFlow, which is not here; we do it without."""
    config = PhantomConfig(name="c", image_size=32, train=30, val=0, test=2)
    places = []
    for name, limit in (("memory", shuffle.MAX_MEM_BUFFER_SIZE), ("files", 2000)):
        monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", limit)
        monkeypatch.setattr(writing, "_PIECE", 1500)
        places.append(build(Phantom, config, str(tmp_path / name)))
    contents = [{p.name: p.read_bytes() for p in place.glob("*")} for place in places]
    assert contents[0] == contents[1] and "tensorflow" not in sys.modules


SLOW = """
import sys, time
from tfds_builders import __main__ as command, common
encode = common.RecordBuilder._generate_examples
def slowly(self, *args):
    for item in encode(self, *args):
        time.sleep(0.3)
        yield item
common.RecordBuilder._generate_examples = slowly
if __name__ == "__main__":
    command.main(sys.argv[1:])
"""


@pytest.mark.parametrize("workers, seconds", [(0, 0.2), (2, 1.0)])
def test_a_killed_build_leaves_nothing_and_starts_over(tmp_path, capsys, workers, seconds):
    source, data = tmp_path / "source", tmp_path / "data"
    mini.write_mini(source)
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    argv = [sys.executable, str(script), "refrad2d", f"--source={source}", f"--data_dir={data}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*argv, f"--workers={workers}"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not list(data.glob("*/*/incomplete.*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(seconds)
        children = descendants(process.pid)
        assert process.poll() is None
        # As long as it runs, nobody else builds the same set.
        with pytest.raises(UserError, match="is being built by another process"):
            build(Builder, RefRad2DConfig(), str(data), str(source))
    finally:
        process.kill()
        process.wait()
    assert not list(data.rglob("dataset_info.json"))
    with pytest.raises(UserError):
        open_source("refrad2d", "train", data)
    deadline = time.monotonic() + 20
    while any(map(running, children)):
        assert time.monotonic() < deadline, "workers outlive a killed build"
        time.sleep(0.1)
    place = build(Builder, RefRad2DConfig(), str(data), str(source))
    assert "left from an interrupted build" in capsys.readouterr().out
    assert {path.name for path in place.parent.iterdir()} == {place.name}
    whole = build(Builder, RefRad2DConfig(), str(tmp_path / "undisturbed"), str(source))
    for path in whole.iterdir():
        assert path.read_bytes() == (place / path.name).read_bytes(), path.name


def descendants(pid):
    """Process ids below `pid`, from /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
