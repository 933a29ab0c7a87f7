"""The frame around every command: what is told in one line, and what is not told at all."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from rg_jax import cli


def test_cut_off_writers_are_silent_and_everything_else_is_not(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    cli._silence_broken_saves()
    for error in (RuntimeError("Event loop is closed"), GeneratorExit(), ValueError("other")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [type(one.exc_value) for one in heard] == [ValueError]


def test_every_line_of_a_message_is_marked(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.stop("first\nsecond\n")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"


BASE = "def get_config(arg=None):\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("def get_config(arg=None)\n    return 1\n", "line 1: SyntaxError: expected ':'"),
        (BASE + "    import no_such_module\n", "line 2: ModuleNotFoundError: No module named"),
        (BASE + "    return {}['gone']\n", "line 2: KeyError"),
        ("x = 1\n", "has no get_config(arg)"),
        (None, "no such file"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(tmp_path, text, told):
    """With the file, the line and the reason."""
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-m", "rg_jax.train", f"--config={path}", f"--workdir={tmp_path}/w"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert str(path) in lines[0] and told in lines[0]


def test_an_unknown_field_is_told_with_its_whole_path(tmp_path):
    command = [sys.executable, "-m", "rg_jax.train", f"--workdir={tmp_path}/w"]
    command += ["--config=configs/det.py:demo", "--config.optimizer.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--config.optimizer.lrr" in done.stderr
    assert len(done.stderr.splitlines()) == 1
