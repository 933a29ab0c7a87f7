"""Groups of patients: the same in every build with one key, not to be had without it."""

import hashlib
import itertools
import stat
import threading

import mini_refrad2d as mini
import pytest
import tensorflow_datasets as tfds

from rg_jax.data import record
from rg_jax.errors import UserError
from tfds_builders import pseudonyms
from tfds_builders.__main__ import build
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig


def groups(source, data_dir, **values):
    """{record id: group} of a build."""
    place = build(Builder, RefRad2DConfig(**values), str(data_dir), str(source))
    builder = tfds.builder_from_directory(place)
    items = (
        record.decode(item) for s in builder.info.splits for item in builder.as_data_source(split=s)
    )
    return {item["id"]: item["source"]["group"] for item in items}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    mini.write_mini(folder)
    return folder


def test_the_same_key_gives_the_same_groups_in_every_variant(source, tmp_path, capsys):
    key = str(tmp_path / "deep" / "key")
    first = groups(source, tmp_path / "1", group_key=key)
    assert f"made a key for the groups of patients, {key}" in capsys.readouterr().out
    assert groups(source, tmp_path / "2", group_key=key) == first
    assert "made a key" not in capsys.readouterr().out
    some = groups(source, tmp_path / "3", group_key=key, modalities="mr", templates="none")
    assert some == {id_: first[id_] for id_ in some}
    assert first["aaaa11111111"] == first["aabb22222222"] != first["cccc33333333"]
    assert groups(source, tmp_path / "4", group_key=key + "2") != first


def test_groups_cannot_be_had_by_hashing_all_patient_ids(source, tmp_path):
    found = set(groups(source, tmp_path / "data").values())
    patients = {made["patient"] for made in mini.SLICES.values()}
    spellings = (f"{prefix}{patient}" for prefix in ("", "rg_jax group ") for patient in patients)
    for text, name in itertools.product(spellings, ("sha256", "sha1", "md5", "blake2b")):
        assert not any(hashlib.new(name, text.encode()).hexdigest().startswith(g) for g in found)
    # The key is in no file of the data set.
    key = pseudonyms.default_path().read_text().strip()
    for path in (tmp_path / "data").rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes()


def test_a_key_is_made_once_for_its_owner_alone(tmp_path):
    path, found = tmp_path / "a" / "key", []
    threads = [
        threading.Thread(target=lambda: found.append(pseudonyms.site_key(path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key for key, _ in found}) == 1 and sum(made for _, made in found) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("content", ["", "secret", "ab" * 31, "ä" * 64])
def test_what_is_no_key_is_refused(tmp_path, content):
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(UserError, match=r"key: is no key of groups .* --group_key"):
        pseudonyms.site_key(path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--group_key names another place"):
        pseudonyms.site_key(tmp_path / "file" / "key")
