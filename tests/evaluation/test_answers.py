"""The store of answers: what is written is read back, whatever a kill has left of it."""

import json

import numpy as np
import pytest

from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation.answers import Answer, Answers

OF = {"parameters": "abc", "data": ["phantom", "test"]}


def sample(name, prefix="\nq\nAnswer: "):
    return Sample(name, f"record-{name}", "vqa", "en", prefix, "liver", "liver")


def answer(text, masks=False):
    found = np.zeros((2, 4, 4), bool) if masks else None
    if masks:
        found[1, 1:3, 2] = True
    return Answer(text, text != "cut", {"context_cut": 1} if text == "cut" else {}, found)


def same(a, b):
    masks = (a.masks is None) == (b.masks is None) and (
        a.masks is None or np.array_equal(a.masks, b.masks)
    )
    return a[:3] == b[:3] and masks


def filled(path, of=OF):
    store = Answers(path, of)
    store.add([(sample("a"), answer("the liver\u2028 über\n")), (sample("b"), answer("cut"))])
    store.add([(sample("c"), answer("<seg>liver</seg>", masks=True))])
    store.close()
    return path


def test_answers_are_read_back(tmp_path):
    store = Answers(filled(tmp_path / "x.answers.jsonl"), OF)
    assert same(store.get(sample("a")), answer("the liver\u2028 über\n"))
    assert same(store.get(sample("b")), answer("cut"))
    assert same(store.get(sample("c")), answer("<seg>liver</seg>", masks=True))
    assert store.get(sample("d")) is None and store.discarded == 0


@pytest.mark.parametrize("cut", [1, 7, 60, 200, 290])
def test_a_torn_end_is_cut_off_and_written_again(tmp_path, cut):
    whole = filled(tmp_path / "whole").read_bytes()
    path = tmp_path / "torn"
    path.write_bytes(whole[:-cut])
    with_rest = Answers(path, OF)
    kept = set(with_rest.kept)
    assert kept == {n for n in "abc" if same_line(whole, n, len(whole) - cut)}
    missing = [n for n in "abc" if n not in kept]
    assert missing
    texts = {"a": "the liver\u2028 über\n", "b": "cut", "c": "<seg>liver</seg>"}
    for name in missing:
        with_rest.add([(sample(name), answer(texts[name], masks=name == "c"))])
    with_rest.close()
    assert path.read_bytes() == whole


def same_line(whole, name, size):
    """Whether the line of a sample lies whole within the first `size` bytes."""
    end = 0
    for line in whole.splitlines(keepends=True):
        end += len(line)
        if json.loads(line).get("id") == name:
            return end <= size
    raise AssertionError(name)


def test_damage_in_the_middle_costs_what_stands_behind_it(tmp_path):
    path = filled(tmp_path / "x")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    store = Answers(path, OF)
    assert set(store.kept) == {"a"}
    store.close()
    assert path.read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize("of", [{**OF, "parameters": "abd"}, {**OF, "rows": 3}, {}])
def test_answers_of_other_weights_or_data_are_never_taken(tmp_path, of):
    path = filled(tmp_path / "x")
    store = Answers(path, of)
    assert not store.kept and store.discarded == 3
    store.close()
    assert len(path.read_text().splitlines()) == 1


def test_another_question_under_the_same_name_is_asked_again(tmp_path):
    store = Answers(filled(tmp_path / "x"), OF)
    assert store.get(sample("a", prefix="\nanother\nAnswer: ")) is None
    assert store.get(sample("a")) is not None


def test_two_evaluations_do_not_share_a_file(tmp_path):
    first = Answers(tmp_path / "x", OF)
    with pytest.raises(UserError, match="in use by another evaluation"):
        Answers(tmp_path / "x", OF)
    first.close()
    Answers(tmp_path / "x", OF).close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        Answers(tmp_path / "file" / "x", OF)
