"""The check of a judge against people: from a CSV to figures and a picture."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rg_jax.evaluation.agreement import ordinal_alpha, pearson
from tools import validate_judge
from tools.stages import command


def run(*arguments):
    command(validate_judge.run, validate_judge.parser(), [str(a) for a in arguments])


def ratings(n=60, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 6, (n, 1))
    scores = np.clip(truth + rng.integers(-1, 2, (n, 4)), 1, 5)
    return scores[:, :3].astype(float), scores[:, 3].astype(float)


@pytest.fixture
def table(tmp_path):
    people, judge = ratings()
    lines = ["id,anna,ben,carl,judge"]
    lines += [
        f"q{k}," + ",".join(f"{v:g}" for v in (*row, score))
        for k, (row, score) in enumerate(zip(people, judge, strict=True))
    ]
    path = tmp_path / "ratings.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_figures_and_picture(table, tmp_path, capsys):
    people, judge = ratings()
    run(table, f"--out={tmp_path / 'out'}", "--resamples=400")
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())
    alpha, r = found["alpha_raters"], found["pearson_judge_mean_rater"]
    assert alpha["mean"] == pytest.approx(ordinal_alpha(people).value)
    assert r["mean"] == pytest.approx(np.corrcoef(judge, people.mean(1))[0, 1])
    assert found["pearson_judge_rater"]["ben"]["mean"] == pytest.approx(
        pearson(judge, people[:, 1]).value
    )
    for figure in (alpha, r, found["alpha_raters_and_judge"]):
        assert figure["low"] < figure["mean"] < figure["high"] and figure["n"] == 60
    assert found["raters"] == ["anna", "ben", "carl"] and found["items_without_judge"] == 0
    told = capsys.readouterr().out
    assert f"{alpha['mean']:.3f}" in told and "items: 60 of 60 kept" in told
    svg = ET.parse(tmp_path / "out" / "agreement.svg").getroot()
    circles = [e for e in svg.iter() if e.tag.endswith("circle")]
    counts = [int(e.find("{http://www.w3.org/2000/svg}title").text) for e in circles]
    spots = set(zip(people.mean(1).tolist(), judge.tolist(), strict=True))
    assert sum(counts) == 60 and len(circles) == len(spots)
    text = (tmp_path / "out" / "agreement.svg").read_text()
    assert f"{r['mean']:.3f}" in text and "--ours:#" in text
    first = (tmp_path / "out" / "agreement.json").read_bytes()
    run(table, f"--out={tmp_path / 'again'}", "--resamples=400")
    assert first == (tmp_path / "again" / "agreement.json").read_bytes()


def test_missing_scores_are_counted_and_columns_chosen(tmp_path, capsys):
    path = tmp_path / "r.csv"
    path.write_text(
        "\ufeffcase;comment;a;b;llm\n1;ok;1;1;1\n2;;2;3;2\n3;;4;;4\n4;;;;5\n5;;5;5;\n\n6;;3,5;4;4\n",
        encoding="utf-8",
    )
    out = f"--out={tmp_path}"
    run(path, "--judge=llm", "--raters=a,b", "--item=case", "--resamples=50", out)
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["items"] == 6
    assert found["items_without_judge"] == found["items_without_rating"] == 1
    assert found["ratings_missing"] == 3 and found["alpha_raters"]["n"] == 4
    assert found["pearson_judge_mean_rater"]["n"] == 4
    told = capsys.readouterr().out
    assert "items: 4 of 6 kept" in told and "the judge has no score: 1 (5)" in told
    assert "no rater has a score: 1 (4)" in told


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,a,judge\n1,2,x\n", "line 2, judge: 'x' is no number"),
        ("id,a,judge\n1,2,inf\n", "line 2, judge: 'inf' is no number"),
        ("id,a,judge\n1,2\n", "line 2: has 2 cells, not 3"),
        ("id,a,judge\n1,2,3\n1,2,3\n", "item '1' twice"),
        ("id,a,a,judge\n1,2,3,4\n", "column 'a' twice"),
        ("id,a,b\n1,2,3\n", "no column 'judge'; there are id, a, b"),
        ("id,judge\n1,2\n", "no column of a human rater"),
        ("id,a,judge\n", "one line per item"),
        ("", "one line per item"),
        ("id,a,judge\n1,2,3\n2,2,3\n", "do not vary"),
        ('id,a,judge\n1,2,"3\n', "is no CSV"),
        (b"id,\xff\n", "is not UTF-8"),
    ],
)
def test_a_bad_table_is_one_line_and_writes_nothing(tmp_path, capsys, text, problem):
    path = tmp_path / "r.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        run(path, f"--out={tmp_path}")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and problem in line and "r.csv" in line
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_other_mistakes(tmp_path, table, capsys):
    for arguments, problem in (
        ([tmp_path / "none.csv"], "none.csv: cannot be read"),
        ([table, "--raters=anna,judge"], "must be different columns"),
        ([table, "--raters=dora"], "no column 'dora'"),
        ([table, "--resamples=0"], "--resamples=0"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments, f"--out={tmp_path / 'out'}")
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
