"""Stage c: questions from metadata by rule, from findings by a model that lies; grounded ones."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint

from rg_jax.errors import UserError
from rg_jax.grounding import anatomy, prompts
from tools import slice_questions, write_vqa
from tools.slice_questions import Known, place_of, questions
from tools.stages import Summary
from tools.write_vqa import checked, parser, run

ROOT = Path(__file__).parents[2]
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GOOD = {
    "pairs": [
        {"question": "Is it big?", "answer": "yes.", "type": "yesno", "choices": None},
        {"question": "Is it small?", "answer": "No", "type": "yesno", "choices": []},
        {"question": "What is it?", "answer": "The liver", "type": "open", "choices": None},
        {"question": "How long is it?", "answer": "12.5 cm", "type": "open", "choices": None},
        {
            "question": "Which organ?",
            "answer": "Liver",
            "type": "multiple",
            "choices": ["Spleen", "Liver", "Lung"],
        },
    ]
}
GERMAN = json.loads(
    json.dumps(GOOD).replace('"yes."', '"ja"').replace('"No"', '"Nein"').replace("12.5", "12,5")
)
CAPTION = {"en": "Liver of 12.5 cm, case {}.", "de": "Leber von 12,5 cm, Fall {}."}


def rows(count=4):
    return [
        {
            "rsopid": f"{n:012x}",
            "modality": "CT" if n % 2 else "MR",
            "body_part": "ABDOMEN",
            "english": {"CleanedSentence": CAPTION["en"].format(n), "ReportX": "kept"},
            "german": {"CleanedSentence": CAPTION["de"].format(n), "ReportX": "bleibt"},
            "other": n,
        }
        for n in range(count)
    ]


def save(path, items):
    pq.write_table(pa.Table.from_pylist(items), path)
    return path


def stage(source, out, *flags):
    """The stage on the findings; wordings of metadata questions have tests of their own."""
    always = [f"--parquet={source}", f"--out={out}", "--pause=0.001", "--wordings=0"]
    return run(parser().parse_args([*always, *flags]))


def read(path):
    return pq.read_table(path).to_pylist()


def well_formed(pair, language):
    assert set(pair) == {"question", "answer", "question_type", "choices"}
    assert pair["question"].endswith("?") and pair["answer"].strip()
    assert pair["question_type"] in ("open", "closed", "yesno", "multiple")
    if pair["question_type"] == "yesno":
        assert pair["answer"] in {"en": ("Yes", "No"), "de": ("Ja", "Nein")}[language]
    if pair["question_type"] == "multiple":
        assert pair["answer"] in pair["choices"] and len(set(pair["choices"])) > 1
    else:
        assert pair["choices"] is None
    assert "{" not in pair["question"] + pair["answer"]


def test_without_a_server_the_metadata_is_asked_for(tmp_path):
    source = save(tmp_path / "in.parquet", rows())
    slices, findings = stage(source, tmp_path / "out.parquet")
    result = read(tmp_path / "out.parquet")
    for before, after in zip(rows(), result, strict=True):
        assert {k: after[k] for k in ("rsopid", "modality", "other")} == {
            k: before[k] for k in ("rsopid", "modality", "other")
        }
        for name, language in (("english", "en"), ("german", "de")):
            assert after[name]["CleanedSentence"] == before[name]["CleanedSentence"]
            assert after[name]["ReportX"] == before[name]["ReportX"]
            assert len(after[name]["dicom_vqa"]) == 3 and after[name]["snippet_vqa"] == []
            for pair in after[name]["dicom_vqa"]:
                well_formed(pair, language)
                assert after["rsopid"] not in json.dumps(pair)
        types = [[p["question_type"] for p in after[n]["dicom_vqa"]] for n in ("english", "german")]
        assert types[0] == types[1]
    assert slices.kept == {"pairs by rule": 24} and not slices.left_out
    assert findings.left_out == {"no endpoint (--url)": 8}
    # The form of the official parquet, whatever the rows hold.
    pair = pq.read_schema(tmp_path / "out.parquet").field("english").type.field("snippet_vqa").type
    assert [field.name for field in pair.value_type] == [
        "question",
        "answer",
        "question_type",
        "choices",
    ]


FACTS = {
    "modality": ["CT", "MR"],
    "body_part": list(slice_questions.BODY_PARTS["en"]),
    "plane": ["axial", "coronal", "sagittal"],
    "left_at": ["left", "right"],
}


def test_what_the_rules_say_is_true():
    """Answers follow from the metadata alone: worked out here from the words of the question."""
    seen = set()
    for seed in range(400):
        known = Known(*(values[seed % len(values)] for values in FACTS.values()))
        made = questions(known, seed)
        assert made == questions(known, seed)
        for language, pairs in made.items():
            assert len(pairs) == 3 and len({p["question"] for p in pairs}) == 3
            words = {
                fact: slice_questions.WORDS[fact][language][getattr(known, fact)] for fact in FACTS
            }
            for pair in pairs:
                well_formed(pair, language)
                seen.add((language, pair["question_type"], pair["answer"]))
                if pair["question_type"] != "yesno":
                    assert pair["answer"] in words.values()
                    if pair["choices"]:
                        # Exactly one choice is right.
                        assert sum(choice in words.values() for choice in pair["choices"]) == 1
                    continue
                named = pair["question"].rstrip("?").replace(":", " ").split()
                right = any(word in named for word in words.values())
                if "Seite" in pair["question"] or "patient's left" in pair["question"]:
                    right = words["left_at"] == named[-1]
                assert right == (pair["answer"] in ("Yes", "Ja")), (known, pair)
    assert {("en", "yesno", "Yes"), ("en", "yesno", "No"), ("de", "closed", "MRT")} <= seen
    assert {("de", "multiple", "koronar"), ("en", "open", "Pelvis")} <= seen


@pytest.mark.parametrize(
    ("known", "count"),
    [
        (Known(), 0),
        (Known(left_at="right"), 2),
        (Known(modality="CT"), 3),
        (Known("MR", "", "axial", ""), 3),
    ],
)
def test_only_what_is_known_is_asked_for(known, count):
    for seed in range(30):
        made = questions(known, seed)
        assert [len(pairs) for pairs in made.values()] == [count] * 2
        assert len({pair["question"] for pair in made["en"]}) == count


def test_a_body_region_that_shares_ground_is_not_denied():
    for seed in range(300):
        for pair in questions(Known(body_part="ABDOMEN"), seed)["en"]:
            text = pair["question"] + " ".join(pair["choices"] or ())
            assert not any(word in text for word in ("Pelvis", "Spine", "Chest"))


@pytest.mark.parametrize(
    ("orientation", "place"),
    [
        ((1, 0, 0, 0, 1, 0), ("axial", "right")),
        ((-1, 0, 0, 0, 1, 0), ("axial", "left")),
        ((1, 0, 0, 0, 0, -1), ("coronal", "right")),
        ((0, 1, 0, 0, 0, -1), ("sagittal", "")),
        ((0.98, 0.17, 0, -0.17, 0.98, 0), ("axial", "right")),
        ((0.707, 0.707, 0, 0, 0, -1), ("", "")),
        (None, ("", "")),
    ],
)
def test_plane_and_side_of_an_orientation(orientation, place):
    assert place_of(orientation) == place


def test_plane_from_the_index_and_unknown_metadata_is_counted(tmp_path):
    items = rows(3)
    items[1] |= {"modality": "PT", "body_part": "TOE"}
    items[2] |= {"modality": None, "body_part": None}
    source = save(tmp_path / "in.parquet", items)
    index = tmp_path / "index.json"
    slices = {items[0]["rsopid"]: {"slice_axis": 1, "slice_idx": 3}}
    index.write_text(json.dumps({"scan": {"slices": slices}}))
    told, _ = stage(source, tmp_path / "out.parquet", f"--index={index}", "--language=en")
    assert told.noted == {
        "modality not asked for: PT": 1,
        "body part not asked for: TOE": 1,
        "modality not asked for: empty": 1,
        "body part not asked for: empty": 1,
    }
    assert told.kept == {"pairs by rule": 3} and sum(told.left_out.values()) == 6
    asked = [p["question"] for p in read(tmp_path / "out.parquet")[0]["english"]["dicom_vqa"]]
    assert any("slice" in q or "patient's left" in q for q in asked)
    assert "dicom_vqa" not in read(tmp_path / "out.parquet")[0]["german"]


def test_plane_from_the_dicom_header(tmp_path, monkeypatch):
    def read_slice(path):
        assert path == tmp_path / "00" / "000000000000.dcm.zst"
        return SimpleNamespace(orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))

    monkeypatch.setattr("rg_jax.data.dicom.read_slice", read_slice)
    (tmp_path / "00").mkdir()
    (tmp_path / "00" / "000000000000.dcm.zst").touch()
    summary = Summary("x")
    assert write_vqa.Places("", str(tmp_path), summary).of("0" * 12) == ("sagittal", "")
    monkeypatch.undo()
    # That file is empty: not known, and said so.
    assert write_vqa.Places("", str(tmp_path), summary).of("0" * 12) == ("", "")
    assert sum(summary.noted.values()) == 1


def test_the_slices_of_the_small_corpus_are_axial(tmp_path):
    root = os.environ.get("REFRAD2D_ROOT")
    if not root:
        pytest.skip("REFRAD2D_ROOT does not point to refrad2d_mini")
    source = Path(root) / "refrad2d_vqa_dataset.parquet"
    out = tmp_path / "out.parquet"
    told, _ = stage(source, out, f"--dicom_dir={root}/dicoms_anon", "--replace")
    result = read(out)
    assert not told.noted and told.kept == {"pairs by rule": 6 * len(result)}
    assert pq.read_schema(out) == pq.read_schema(source)
    for row in result:
        for pair in row["english"]["dicom_vqa"]:
            well_formed(pair, "en")
            if "plane" in pair["question"]:
                assert pair["answer"] == "axial"
            if pair["question"].startswith("On which side"):
                assert pair["answer"] == "Right"  # as radiologists look at it
        assert len(row["english"]["snippet_vqa"]) == 2  # those of the corpus stay


def test_five_pairs_of_the_model_in_both_languages(tmp_path):
    source = save(tmp_path / "in.parquet", [*rows(2), rows(1)[0] | {"rsopid": "same caption"}])

    def script(body, number):
        return GERMAN if "Deutsch" in body["messages"][0]["content"] else GOOD

    with FakeEndpoint(script) as fake:
        flags = [f"--url={fake.url}", "--model=m"]
        _, findings, answers = stage(source, tmp_path / "out.parquet", *flags)
        assert sum(fake.counts.values()) == 4  # the shared caption is asked for once
    assert findings.kept == {"captions with five pairs by the model": 6}
    for row in read(tmp_path / "out.parquet"):
        for name, language in (("english", "en"), ("german", "de")):
            pairs = row[name]["snippet_vqa"]
            assert [p["question_type"] for p in pairs] == [
                "yesno",
                "yesno",
                "open",
                "open",
                "multiple",
            ]
            for pair in pairs:
                well_formed(pair, language)


def changed(index, **fields):
    copy = json.loads(json.dumps(GOOD))
    copy["pairs"][index] |= fields
    return copy


REFUSED = [
    ({"pairs": GOOD["pairs"][:4]}, "not five pairs"),
    ({"pairs": []}, "not five pairs"),
    ({"questions": []}, "not the form asked for"),
    ([GOOD], "not the form asked for"),
    (changed(0, type="essay"), "not the form asked for"),
    (changed(0, answer=3), "not the form asked for"),
    (changed(0, answer="Probably"), "yes/no question with another answer"),
    (changed(0, answer="Ja"), "yes/no question with another answer"),
    (changed(2, answer="  "), "empty question or answer"),
    (changed(2, question=""), "empty question or answer"),
    (changed(2, question="Name it."), "no question mark"),
    (changed(1, question="is it BIG?"), "a question twice"),
    (changed(3, answer="13 cm"), "number that the caption does not give"),
    (changed(4, answer="Heart"), "choices without the answer"),
    (changed(4, choices=["Liver"]), "choices too few, too many or twice"),
    (changed(4, choices=["Liver", "liver"]), "choices too few, too many or twice"),
    (changed(4, choices=["Liver", " "]), "choices without the answer"),
    (changed(4, choices=None), "choices too few, too many or twice"),
    (changed(4, type="open"), "choices where there are none"),
    (changed(4, type="open", choices=None), "a type of question is missing"),
    (changed(2, answer="Mr. Smith"), "identifying text"),
    (changed(2, question="Was Frau Meier 2019 here?"), "identifying text"),
    (changed(2, answer="born in May"), "identifying text"),
    (changed(2, answer="on 12.03.2021"), "identifying text"),
    (changed(2, answer="12345678"), "identifying text"),
    (changed(2, answer="a 64-year-old"), "identifying text"),
    (changed(4, choices=["Dr. Who", "Liver"]), "identifying text"),
]


@pytest.mark.parametrize(("answer", "reason"), REFUSED)
def test_one_bad_pair_and_the_answer_is_refused(answer, reason):
    with pytest.raises(ValueError, match=reason):
        checked(answer, "Liver of 12.5 cm.", "en")


def test_medical_words_do_not_look_like_persons():
    for words in ("MS lesions in T2", "Th12", "3.5 x 2.1 x 4.0 cm", "BWK 12", "Grad 3"):
        assert not write_vqa.IDENTIFYING.search(words)


FAULTS = {
    "garbage": ("Well…", "not JSON"),
    "500": (("status", 500, {}), "HTTP 500"),
    "429": (("status", 429, {"Retry-After": "0"}), "HTTP 429"),
    "timeout": (("hang", 20), "timeout"),
    "half": (json.dumps(GOOD)[:200], "not JSON"),
    "no answer": (changed(4, answer="Heart"), "refused answer: choices without the answer"),
    "person": (changed(2, answer="Mr. Smith"), "refused answer: identifying text"),
}


def test_nothing_false_enters_and_a_rerun_asks_for_the_rest(tmp_path):
    items = rows(len(FAULTS) + 3)
    source = save(tmp_path / "in.parquet", items)
    bad = {
        row["english"]["CleanedSentence"]: fault
        for row, (fault, _) in zip(items, FAULTS.values(), strict=False)
    }

    def script(body, number):
        return bad.get(body["messages"][1]["content"], GOOD)

    flags = ["--model=m", "--language=en", "--retries=1", "--timeout=1.5"]
    with FakeEndpoint(script) as fake:
        out = tmp_path / "out.parquet"
        _, findings, _ = stage(source, out, *flags, f"--url={fake.url}")
        counts = [len(row["english"]["snippet_vqa"]) for row in read(out)]
        assert counts == [0] * len(FAULTS) + [5] * 3
        assert findings.left_out == {
            kind: sum(k == kind for _, k in FAULTS.values()) for _, kind in FAULTS.values()
        }
        asked = set(bad)
        bad.clear()
        fake.counts.clear()
        _, findings, _ = stage(source, out, *flags, f"--url={fake.url}")
        assert set(fake.counts) == asked and set(fake.counts.values()) == {1}
        assert not findings.left_out
        assert {len(row["english"]["snippet_vqa"]) for row in read(out)} == {5}


def test_filled_lists_stay_unless_they_are_to_be_replaced(tmp_path):
    there = [{"question": "Old?", "answer": "Yes", "question_type": "yesno", "choices": None}]
    items = rows(2)
    items[0]["english"] |= {"dicom_vqa": there, "snippet_vqa": there}
    items[1]["english"] |= {"dicom_vqa": [], "snippet_vqa": None}
    source = save(tmp_path / "in.parquet", items)
    out = tmp_path / "out.parquet"
    slices, findings = stage(source, out, "--language=en")
    first, second = (row["english"] for row in read(out))
    assert first["dicom_vqa"] == first["snippet_vqa"] == there
    assert len(second["dicom_vqa"]) == 3 and second["snippet_vqa"] == []
    assert slices.kept == {"pairs that were there": 1, "pairs by rule": 3}
    assert findings.kept == {"captions whose pairs were there": 1}
    stage(source, out, "--language=en", "--replace")
    first, _ = (row["english"] for row in read(out))
    # Without a model there is nothing to put in the place of the findings' questions.
    assert len(first["dicom_vqa"]) == 3 and first["snippet_vqa"] == there
    with FakeEndpoint(lambda body, number: GOOD) as fake:
        flags = ["--language=en", "--replace", f"--url={fake.url}", "--model=m"]
        stage(source, out, *flags)
        assert len(read(out)[0]["english"]["snippet_vqa"]) == 5


def test_limit_empty_captions_and_rows_without_a_language(tmp_path):
    items = rows(5)
    items[0]["english"]["CleanedSentence"] = ""
    items[1]["german"] = None
    source = save(tmp_path / "in.parquet", items)
    with FakeEndpoint(lambda b, n: GERMAN if "Leber" in b["messages"][1]["content"] else GOOD) as f:
        flags = ["--limit=3", f"--url={f.url}", "--model=m"]
        _, findings, _ = stage(source, tmp_path / "out.parquet", *flags)
        assert sum(f.counts.values()) == 4
    assert findings.left_out == {"empty caption": 1}
    result = read(tmp_path / "out.parquet")
    assert len(result) == 3 and result[1]["german"] is None
    assert (
        result[0]["english"]["snippet_vqa"] == [] and len(result[0]["german"]["snippet_vqa"]) == 5
    )


def test_ids_as_the_pandas_index(tmp_path):
    table = pa.Table.from_pylist(rows(2))
    names = ["__index_level_0__", *table.column_names[1:]]
    table = table.rename_columns(names)
    metadata = {b"pandas": json.dumps({"index_columns": ["__index_level_0__"]}).encode()}
    source = tmp_path / "in.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), source)
    stage(source, tmp_path / "out.parquet")
    result = pq.read_table(tmp_path / "out.parquet")
    assert result.column_names == names and b"pandas" in result.schema.metadata
    assert len(result.to_pylist()[0]["english"]["dicom_vqa"]) == 3


def test_killed_at_any_moment_it_ends_like_an_undisturbed_run(tmp_path):
    source = save(tmp_path / "in.parquet", rows(40))

    def script(body, number):
        time.sleep(0.02)
        return GOOD

    with FakeEndpoint(script) as fake:
        flags = [f"--url={fake.url}", "--model=m", "--language=en", "--concurrency=2"]
        flags.append("--wordings=0")
        out = tmp_path / "killed" / "out.parquet"
        command = [sys.executable, "-m", "tools.write_vqa", f"--parquet={source}", f"--out={out}"]
        process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while len(fake.asked) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        assert 12 <= len(fake.asked) < 40 and not out.exists()
        stage(source, out, *flags)
        assert len(fake.asked) <= 40 + 2
        stage(source, tmp_path / "whole" / "out.parquet", *flags)
    assert out.read_bytes() == (tmp_path / "whole" / "out.parquet").read_bytes()
    assert not list(out.parent.glob(".aside-*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out=/tmp/x"], "must be the path of a .parquet"),
        (["--dicom_dir=/nowhere"], "no such folder"),
        (["--index=/nowhere.json"], "cannot be read"),
        (["--language=xx"], "'xx' is not one of"),
        (["--model=m"], "--url"),
        (["--wordings=-1"], "must be 0 or more"),
    ],
)
def test_wrong_flags_are_named(tmp_path, flags, words):
    source = save(tmp_path / "in.parquet", rows(1))
    with pytest.raises(UserError, match=words):
        stage(source, tmp_path / "out.parquet", *flags)


def test_a_parquet_without_ids_is_named(tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows(1)).drop_columns(["rsopid"]), source)
    with pytest.raises(UserError, match="rsopid"):
        stage(source, tmp_path / "out.parquet")


class EveryDraw(np.random.Generator):
    """A random generator that gives each wording in turn, so that none is missed."""

    def __init__(self, number):
        super().__init__(np.random.PCG64(0))
        self.number = number

    def integers(self, count):
        return self.number % count


@pytest.mark.parametrize("modality", ["CT", "MR", "XR"])
@pytest.mark.parametrize("language", ["en", "de"])
def test_grounded_questions_never_claim_an_absent_structure(language, modality):
    """All wordings, with none, one and several structures present, and every absent one."""
    yes, no = {"en": ("Yes", "No"), "de": ("Ja", "Nein")}[language]
    for number, ids in itertools.product(range(6), [(), (5,), (1, 2, 5), (10, 51), (118, 121)]):
        absent = [(i, anatomy.display(i, language)) for i in anatomy.absent_classes(ids, modality)]
        present = [(i, anatomy.display(i, language)) for i in ids]
        made = prompts.grounded_questions(present, absent, language, EveryDraw(number))
        assert len(made) == len(present) + len(absent) + bool(present)
        for question in made:
            claimed = {class_id for _, _, class_id in question.mentions}
            assert claimed <= set(ids)
            if question.answer.startswith(no):
                assert not question.mentions
                continue
            # An answer that affirms: every name of an absent structure in it is part of a present
            # one's name, or the answer claims what is not there.
            rest = question.answer
            for start, end, _ in sorted(question.mentions, reverse=True):
                rest = rest[:start] + rest[end:]
            assert claimed and not any(name in rest for _, name in absent)
        if not ids:
            assert made and not any(q.answer.startswith(yes) or q.mentions for q in made)
            assert not prompts.grounded_questions([], [], language, EveryDraw(number))
