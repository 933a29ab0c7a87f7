"""What all stages share: whole files or none, journals that survive, summaries, one-line errors."""

import argparse
import json

import pytest

from rg_jax.errors import UserError
from tools import stages
from tools.stages import Journal, Parser, Summary, command, write_aside, write_folder_aside


def test_write_aside_leaves_whole_files_only(tmp_path):
    target = tmp_path / "deep" / "mask.nii.gz"
    with write_aside(target) as aside:
        assert aside.name.endswith(".nii.gz") and aside.parent == target.parent
        aside.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and target.stat().st_mode & 0o044
    with pytest.raises(RuntimeError), write_aside(target) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["mask.nii.gz"]


def test_folders_are_replaced_as_a_whole(tmp_path):
    target = tmp_path / "splits"
    for content in ("a", "b"):
        with write_folder_aside(target) as aside:
            (aside / content).touch()
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(RuntimeError), write_folder_aside(target) as aside:
        (aside / "c").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b"]


def test_left_overs_of_killed_runs_are_cleared(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"{stages.ASIDE}1.json").touch()
    (tmp_path / f"{stages.ASIDE}2").mkdir()
    (tmp_path / f"{stages.ASIDE}2" / "in").touch()
    (tmp_path / "kept.json").touch()
    assert stages.clear_aside(tmp_path) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept.json"]


def test_journal_survives_at_every_byte(tmp_path):
    path = tmp_path / "j.jsonl"
    with_all = Journal(path, {"model": "m"})
    for i in range(3):
        with_all.add(f"item {i}", {"ä": [i, "\n"]})
    with_all.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path, {"model": "m"})
        assert len(journal) == max(sum(end <= cut for end in ends) - 1, 0)
        for i in range(3):
            if f"item {i}" not in journal:
                journal.add(f"item {i}", {"ä": [i, "\n"]})
            assert journal[f"item {i}"] == {"ä": [i, "\n"]}
        journal.close()
        assert path.read_bytes() == whole


def test_journal_of_other_settings_is_not_mixed(tmp_path):
    journal = Journal(tmp_path / "j", {"model": "a"})
    journal.add("x", 1)
    journal.close()
    other = Journal(tmp_path / "j", {"model": "b"})
    assert "x" not in other and other.discarded == 1
    with pytest.raises(UserError, match="another run"):
        Journal(tmp_path / "j", {"model": "b"})
    other.close(remove=True)
    assert not (tmp_path / "j").exists()


def test_results_of_a_journal_stay_on_the_disk(tmp_path):
    journal = Journal(tmp_path / "j", 1)
    for number in range(100):
        journal.add(str(number), [number] * 1000)
    assert journal["17"][0] == 17 and journal["99"][-1] == 99
    journal.add("100", "after reading")
    assert len(journal) == 101 and journal["100"] == "after reading"
    held = [value for value in vars(journal).values() if isinstance(value, dict)]
    assert [type(start) for found in held for start in found.values()] == [int] * 101


@pytest.mark.parametrize("value", [{}, {"ä": [1, {"b": None}]}, {"a": "x\ny", "b": {}, "c": []}])
def test_json_by_items_is_the_same_json(tmp_path, value):
    stages.write_json(tmp_path / "whole.json", value)
    stages.write_json_items(tmp_path / "items.json", iter(value.items()))
    assert (tmp_path / "items.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_summary_counts_and_names_places():
    summary = Summary("scans", examples=2)
    summary.keep("segmented", 2)
    for name in "abc":
        summary.leave_out("missing file", name)
    summary.note("nothing", count=0)
    summary.note("values rounded", "d")
    assert summary.lines() == [
        "scans: 2 of 5 kept",
        "  segmented: 2",
        "  left out, missing file: 3 (a, b, …)",
        "  note, values rounded: 1 (d)",
    ]
    json.dumps(summary.as_dict())


def test_command_ends_with_one_line(capsys):
    def run(options: argparse.Namespace):
        if options.limit == 1:
            raise UserError("file x: does not do")
        if options.limit == 2:
            raise KeyboardInterrupt
        summary = Summary("items")
        if options.limit == 3:
            summary.leave_out("no such file", "x.nii.gz")
        else:
            summary.keep()
        return summary

    command(run, Parser("Does things."), [])
    assert capsys.readouterr().out == "items: 1 of 1 kept\n  kept: 1\n"
    for flag, code, words in (
        ("--limit=1", 2, "error: file x: does not do\n"),
        ("--limit=2", 130, "error: interrupted; the same command goes on from here\n"),
        ("--lim=2", 2, "error: unrecognized arguments: --lim=2 (--help lists the flags)\n"),
        ("--limit=-3", 2, "error: --limit=-3: 0 for all, or a number above it\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(run, Parser("Does things."), [flag])
        assert stop.value.code == code and capsys.readouterr().err == words
    with pytest.raises(SystemExit) as stop:
        command(run, Parser("Does things."), ["--limit=3"])
    told = capsys.readouterr()
    assert stop.value.code == 1 and "left out, no such file: 1 (x.nii.gz)" in told.out
    assert told.err == "error: nothing could be kept; the reasons stand above\n"


def test_missing_package_is_named():
    with pytest.raises(UserError, match=r'no_such_package: pip install -e "\.\[beam\]"'):
        stages.need(("json", "no_such_package"), "beam")


def test_bad_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"a\.json: is not JSON"):
        stages.read_json(path)
    with pytest.raises(UserError, match=r"b\.json: cannot be read"):
        stages.read_json(tmp_path / "b.json")
