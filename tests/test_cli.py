"""The frame around every command: what is told in one line, and what is not told at all."""

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
