"""`python -m tfds_builders`: what it prints, and how it fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from rg_jax.errors import UserError
from tfds_builders import __main__ as command
from tfds_builders.phantom import phantom_dataset_builder as phantom

ROOT = Path(__file__).parents[2]
SMALL = ["--train=4", "--val=2", "--test=2"]


def run(capsys, *argv):
    """The command in this process: (exit code, stdout, stderr)."""
    code = 0
    try:
        command.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_as_a_command_without_network(tmp_path):
    """In a process of its own, as a user runs it, with every way out refused."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "sys.argv = ['tfds_builders', 'phantom', '--train=4', '--val=0', '--test=1',\n"
        f"            '--data_dir={tmp_path}']\n"
        "import runpy\n"
        "runpy.run_module('tfds_builders', run_name='__main__')\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "records: train 4, test 1" in done.stdout
    assert done.stderr == ""
    kept = {path.parts[0] for path in files(tmp_path)}
    assert kept == {"phantom"}


def test_built_then_already_built_then_overwritten(tmp_path, capsys):
    argv = ["phantom", f"--data_dir={tmp_path}", *SMALL]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "built phantom/64-train_4-val_2-test_2" in out
    info = next(tmp_path.rglob("dataset_info.json"))
    before = info.stat().st_ino
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "already built" in out and "--overwrite" in out
    assert info.stat().st_ino == before
    code, out, _ = run(capsys, *argv, "--overwrite")
    assert code == 0 and "records: train 4, val 2, test 2" in out
    assert info.stat().st_ino != before
    assert {path.name for path in tmp_path.iterdir()} == {"phantom"}  # nothing left aside


def test_other_parameters_under_one_name_are_refused(tmp_path, capsys):
    argv = ["phantom", f"--data_dir={tmp_path}", "--config_name=mine"]
    assert run(capsys, *argv, *SMALL)[0] == 0
    code, _, err = run(capsys, *argv, *SMALL, "--seed=5")
    assert code == 2 and "other parameters" in err and err.count("\n") == 1
    code, _, err = run(capsys, "phantom", f"--data_dir={tmp_path}", "--config_name=ct64", *SMALL)
    assert code == 2 and "--config_name=ct64" in err


def broken(monkeypatch, error):
    """Lets the second test record fail: train is written by then."""
    make = phantom.make_record

    def make_record(config, split, index):
        if (split, index) == ("test", 1):
            raise error
        return make(config, split, index)

    monkeypatch.setattr(phantom, "make_record", make_record)


@pytest.mark.parametrize(
    "error, code", [(UserError("slice 1 is torn"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_broken_off_build_leaves_no_data_set(tmp_path, capsys, monkeypatch, error, code):
    broken(monkeypatch, error)
    got, _, err = run(capsys, "phantom", f"--data_dir={tmp_path}", *SMALL)
    assert got == code and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.rglob("dataset_info.json"))
    assert not list(tmp_path.rglob("*.array_record*"))


def test_a_failed_overwrite_keeps_the_old_data_set(tmp_path, capsys, monkeypatch):
    argv = ["phantom", f"--data_dir={tmp_path}", *SMALL]
    assert run(capsys, *argv)[0] == 0
    before = files(tmp_path)
    broken(monkeypatch, UserError("slice 1 is torn"))
    assert run(capsys, *argv, "--overwrite")[0] == 2
    assert files(tmp_path) == before


def test_a_killed_build_is_not_taken_for_whole(tmp_path, capsys):
    """What TFDS leaves when it is killed lies under another name, and is told of."""
    argv = ["phantom", f"--data_dir={tmp_path}", "--config_name=mine", *SMALL]
    left = tmp_path / "phantom" / "mine" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "phantom-train.array_record-00000-of-00001").write_bytes(b"half")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "left from an interrupted build" in out and "records: train 4" in out


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "phantom, refrad2d, slake, vqa_rad"),
        (["phantoms", "--data_dir=x"], "phantom, refrad2d, slake, vqa_rad"),
        (["--data_dir=x", "phantom"], "comes first"),
        (["phantom"], "--data_dir"),
        (["phantom", "--data_dir=x", "--trian=4"], "--trian"),
        (["phantom", "--data_dir=x", "--train=many"], "--train"),
        (["phantom", "--data_dir=x", "--config_name=a/b"], "--config_name=a/b"),
        (["phantom", "--data_dir=x", "--modality=pet"], "--modality=pet"),
        (["slake", "--data_dir=x"], "--source"),
        (["slake", "--data_dir=x", "--source=/no/such"], "--source=/no/such"),
        (["slake", "--data_dir=x", "--source="], "--source="),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_empty_source_and_unwritable_data_dir(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    argv = ["slake", f"--data_dir={tmp_path / 'd'}", f"--source={tmp_path / 'empty'}"]
    code, _, err = run(capsys, *argv)
    assert code == 2 and "is empty" in err and err.count("\n") == 1
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "phantom", f"--data_dir={tmp_path / 'file' / 'below'}", *SMALL)
    assert code == 2 and "--data_dir=" in err and err.count("\n") == 1


def test_read_only_data_dir(tmp_path, capsys, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    code, _, err = run(capsys, "phantom", f"--data_dir={tmp_path}", *SMALL)
    assert code == 2 and "cannot be written to (Permission denied)" in err


def test_help_lists_flags_and_names(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "phantom" in out and "slake" in out
    code, out, _ = run(capsys, "phantom", "--help")
    assert code == 0 and "--image_size" in out and "default: 64" in out


def test_two_ids_alike_are_refused(tmp_path, capsys, monkeypatch):
    make = phantom.make_record
    monkeypatch.setattr(phantom, "make_record", lambda config, split, i: make(config, split, 0))
    code, _, err = run(capsys, "phantom", f"--data_dir={tmp_path}", *SMALL)
    assert code == 2 and "occurs twice" in err


def test_a_listed_variant_is_what_tfds_would_build():
    """`tfds build --config=ct64` and our command mean the same variant."""
    cls, config, _ = command.parse(["phantom", "--data_dir=x", "--modality=ct"])
    assert cls.builder_configs[config.name].values() == config.values()
    assert cls.name == "phantom"
