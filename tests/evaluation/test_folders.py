"""Folders replaced as a whole, also by a process that is killed between the two steps."""

import os

import pytest

from rg_jax.evaluation.folders import asides, swap


def make(folder, word):
    folder.mkdir()
    (folder / "word").write_text(word)


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_kill_costs_no_folder(tmp_path, monkeypatch, killed_after):
    """After a kill at any step the former or the new folder is there, once the next one begins."""
    out = tmp_path / "out"
    make(out, "former")
    aside, old = asides(out)
    make(aside, "new")
    steps, replace = [], os.replace

    def dying(*names):
        if len(steps) == killed_after:
            raise KeyboardInterrupt
        steps.append(names)
        replace(*names)

    monkeypatch.setattr(os, "replace", dying)
    if killed_after < 2:
        with pytest.raises(KeyboardInterrupt):
            swap(aside, old, out)
    else:
        swap(aside, old, out)
    monkeypatch.undo()
    aside, old = asides(out)
    assert not aside.exists() and not old.exists()
    assert (out / "word").read_text() == ("new" if killed_after == 2 else "former")
