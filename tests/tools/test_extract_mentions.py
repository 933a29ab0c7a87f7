"""Stage b: mentions out of captions, by the dictionary and by a model that lies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_endpoint import FakeEndpoint

from rg_jax.errors import UserError
from rg_jax.grounding import anatomy
from tools import extract_mentions
from tools.extract_mentions import compare, judge, parser, run

ROOT = Path(__file__).parents[2]

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ENGLISH = [
    "The liver and the left kidney are normal.",
    "No abnormality.",
    "Both kidneys are normal, the spleen is enlarged.",
    "Fracture of the T12 vertebra.",
]
GERMAN = [
    "Leber und linke Niere unauffällig.",
    "Kein Befund.",
    "Beide Nieren unauffällig, die Milz ist vergrößert.",
    "Fraktur von BWK 12.",
]


@pytest.fixture
def parquet(tmp_path):
    rows = [
        {"rsopid": f"id{i}", "english": {"CleanedSentence": en}, "german": {"CleanedSentence": de}}
        for i, (en, de) in enumerate(zip(ENGLISH, GERMAN, strict=True))
    ]
    rows += [rows[0], {"rsopid": "empty", "english": {"CleanedSentence": ""}, "german": None}]
    path = tmp_path / "captions.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def stage(out, *flags):
    return run(parser().parse_args([f"--out={out}", "--pause=0.001", *flags]))


def read(out, language="en"):
    return json.loads((out / f"keywords_{language}.json").read_text(encoding="utf-8"))


def test_the_dictionary_needs_no_server(parquet, tmp_path):
    captions, mentions, *_ = stage(tmp_path / "out", f"--parquet={parquet}")
    assert read(tmp_path / "out") == {
        ENGLISH[0]: {"liver": "liver", "left kidney": "kidney_left"},
        ENGLISH[1]: {},
        ENGLISH[2]: {"spleen": "spleen"},
        ENGLISH[3]: {"T12 vertebra": "vertebrae_T12"},
    }
    assert read(tmp_path / "out", "de") == {
        GERMAN[0]: {"Leber": "liver", "linke Niere": "kidney_left"},
        GERMAN[1]: {},
        GERMAN[2]: {"Milz": "spleen"},
        GERMAN[3]: {"BWK 12": "vertebrae_T12"},
    }
    assert captions.kept == {"with mentions": 3, "without a mention": 1}
    assert mentions.kept == {"by the dictionary": 4}
    assert mentions.left_out == {"both sides at once (no single class)": 1}


def test_a_list_of_sentences_and_a_limit(tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps(GERMAN))
    stage(tmp_path, f"--sentences={file}", "--language=de", "--limit=2")
    assert list(read(tmp_path, "de")) == GERMAN[:2]


def test_mentions_stand_in_the_cleaned_caption(tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps(["Zyste,linke\u00a0Niere ."]))
    stage(tmp_path, f"--sentences={file}", "--language=de")
    assert read(tmp_path, "de") == {"Zyste,linke\u00a0Niere .": {"linke Niere": "kidney_left"}}


CAPTION = "The right kidney and the vertebral body are normal, Liver enzymes too."
JUDGED = [
    ("right kidney", "kidney_right", "right kidney", ""),
    (" Right Kidney ", "kidney_right", "right kidney", ""),
    ("vertebral body", "vertebrae_L2", "vertebral body", ""),
    ("vertebral body", "vertebrae", "vertebral body", ""),
    ("right kidney", "kidney_left", "", "mention names another class"),
    ("right kidney", "kidney", "", "class not in the schema"),
    ("right kidney", "Kidney_Right", "", "class not in the schema"),
    ("right kidney", "spleen", "", "mention names another class"),
    ("kidney", "kidney_left", "", "side not in the caption"),
    ("kid", "kidney_right", "", "mention only inside another word"),
    ("rights kidney", "kidney_right", "", "mention not in the caption"),
    ("rechte Niere", "kidney_right", "", "mention not in the caption"),
    ("", "liver", "", "empty mention"),
    ("  ", "liver", "", "empty mention"),
    (".*", "liver", "", "mention not in the caption"),
]


@pytest.mark.parametrize(("mention", "name", "taken", "reason"), JUDGED)
def test_each_mention_is_judged(mention, name, taken, reason):
    assert judge(CAPTION, mention, name, "en") == (taken, reason)


def test_sides_of_a_sentence():
    both = "Cyst on the left, the right one is free; left: kidney."
    assert judge(both, "right one", "kidney_left", "en")[1] == "mention names the other side"
    assert judge("Links Zyste der Niere.", "Niere", "kidney_left", "de") == ("Niere", "")
    assert judge("Mittellappen.", "Mittellappen", "lung_middle_lobe_right", "de")[1] == ""
    assert judge("Die <p bbox= Leber", "<p bbox= Leber", "liver", "de")[1].endswith("mark")


def mentions(*pairs):
    return {"mentions": [{"mention": mention, "class": name} for mention, name in pairs]}


def test_the_model_is_asked_and_only_what_holds_is_taken(parquet, tmp_path):
    said = {
        ENGLISH[0]: mentions(
            ("The liver", "liver"),
            ("LEFT KIDNEY", "kidney_left"),
            ("left kidney", "kidney_left"),
            ("left kidney", "spleen"),
            ("aorta", "aorta"),
            ("kidney", "kidneys"),
        ),
        ENGLISH[1]: mentions(),
        ENGLISH[2]: mentions(("spleen", "spleen"), ("pleen", "spleen")),
        ENGLISH[3]: mentions(("T12", "vertebrae_T11"), ("T12 vertebra", "vertebrae_T12")),
    }
    with FakeEndpoint(lambda body, number: said[body["messages"][1]["content"]]) as fake:
        flags = [f"--parquet={parquet}", "--language=en", f"--url={fake.url}", "--model=m"]
        captions, found, answers = stage(tmp_path, *flags)
        assert sum(fake.counts.values()) == 4  # equal captions once, the empty one never
        system = fake.asked[0]["messages"][0]["content"]
        assert all(entry.name in system for entry in anatomy.CLASSES) and "{" in system
        assert "{{" not in system and "{classes}" not in system
    assert read(tmp_path) == {
        ENGLISH[0]: {"The liver": "liver", "left kidney": "kidney_left"},
        ENGLISH[1]: {},
        ENGLISH[2]: {"spleen": "spleen"},
        ENGLISH[3]: {"T12 vertebra": "vertebrae_T12"},
    }
    assert captions.kept == {"with mentions": 3, "without a mention": 1}
    assert found.kept == {"by the model": 4}
    assert found.left_out == {
        "given twice": 1,
        "mention names another class": 2,
        "mention not in the caption": 1,
        "class not in the schema": 1,
        "mention only inside another word": 1,
    }
    assert answers.kept["new"] == 4


FAULTS = {
    "garbage": "I am sorry, Dave.",
    "HTTP 500": ("status", 500, {}),
    "HTTP 429": ("status", 429, {"Retry-After": "0"}),
    "timeout": ("hang", 20),
    "half JSON": '{"mentions": [{"mention": "liver", "class": "liver"}',
    "another form": {"mentions": [["liver", "liver"]]},
    "no list": {"liver": "liver"},
    "wrong class": mentions(("liver", "hepar")),
    "not there": mentions(("gallbladder", "gallbladder")),
    "function word": mentions(("the", "spleen")),
}
KIND = {
    "garbage": "not JSON",
    "half JSON": "not JSON",
    "another form": "refused answer: not the form asked for",
    "no list": "refused answer: not the form asked for",
    "wrong class": "refused answer: none of its mentions can be used",
    "not there": "refused answer: none of its mentions can be used",
    "function word": "refused answer: none of its mentions can be used",
}


def test_nothing_false_enters_and_every_fault_is_counted(tmp_path):
    captions = {f"The liver, case {name.replace(' ', '-')}.": said for name, said in FAULTS.items()}
    good = [f"The spleen, number {n}." for n in range(6)]
    file = tmp_path / "list.json"
    file.write_text(json.dumps([*captions, *good]))
    broken = True

    def script(body, number):
        caption = body["messages"][1]["content"]
        if caption in captions:
            return captions[caption] if broken else mentions(("liver", "liver"))
        false = [("gallbladder", "gallbladder"), ("number", "hepar")] if caption == good[0] else []
        return mentions(("spleen", "spleen"), *false)

    flags = [f"--sentences={file}", "--language=en", "--model=m", "--retries=1", "--timeout=4"]
    with FakeEndpoint(script) as fake:
        done, found, answers = stage(tmp_path, *flags, f"--url={fake.url}")
        result = read(tmp_path)
        # Left out, not written as captions that name nothing.
        assert not captions.keys() & result.keys()
        assert all(result[caption] == {"spleen": "spleen"} for caption in good)
        expected = {}
        for name in FAULTS:
            expected[KIND.get(name, name)] = expected.get(KIND.get(name, name), 0) + 1
        assert done.left_out == expected
        assert done.kept == {"with mentions": 6} and done.failed == len(FAULTS)
        assert found.left_out == {"class not in the schema": 1, "mention not in the caption": 1}
        faults = {what.removeprefix("failed try, "): n for what, n in answers.noted.items()}
        assert faults == {
            "not JSON": 4,
            "HTTP 500": 2,
            "HTTP 429": 2,
            "timeout": 2,
            "refused answer": 10,
        }
        # Again: only the failed ones are asked, and now they are there.
        broken = False
        fake.counts.clear()
        done, found, answers = stage(tmp_path, *flags, f"--url={fake.url}")
        assert set(fake.counts) == set(captions)
        assert set(fake.counts.values()) == {1} and not done.left_out and len(read(tmp_path)) == 16
        assert sum(one == {"liver": "liver"} for one in read(tmp_path).values()) == len(FAULTS)


def test_killed_at_any_moment_it_ends_like_an_undisturbed_run(tmp_path):
    sentences = [f"The liver and lesion number {n}." for n in range(60)]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(sentences))

    def script(body, number):
        time.sleep(0.02)
        return mentions(("liver", "liver"))

    with FakeEndpoint(script) as fake:
        out = tmp_path / "killed"
        command = [sys.executable, "-m", "tools.extract_mentions", f"--sentences={file}"]
        command += ["--language=en", f"--url={fake.url}", "--model=m", f"--out={out}"]
        command += ["--concurrency=2"]
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 30
        while len(fake.asked) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.1)  # what was under way still arrives at the server
        asked = len(fake.asked)
        assert 20 <= asked < 60 and not (out / "keywords_en.json").exists()
        flags = [f"--sentences={file}", "--language=en", "--model=m", f"--url={fake.url}"]
        stage(out, *flags)
        # At most the two that were under way are asked again.
        assert len(fake.asked) <= 60 + 2
        stage(tmp_path / "whole", *flags)
    killed, whole = (d / "keywords_en.json" for d in (out, tmp_path / "whole"))
    assert killed.read_bytes() == whole.read_bytes()
    assert not list(out.glob(".aside-*"))


def test_precision_and_recall(tmp_path, capsys):
    ours = {"a": {"x": "liver", "y": "spleen"}, "b": {}, "c": {"z": "aorta"}}
    reference = {"a": {"x": "liver", "y": "heart"}, "b": {"w": "aorta"}, "d": {"v": "brain"}}
    first, *rest = compare(ours, reference)
    assert "2 of 3 sentences" in first
    assert "precision 0.5000 (1 of 2), recall 0.3333 (1 of 3)" in first
    assert rest[0] == "  + 'y' as spleen in sentence ca978112ca"
    assert rest[1:] == [
        "  - 'y' as heart in sentence ca978112ca",
        "  - 'w' as aorta in sentence 3e23e81600",
    ]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(ENGLISH))
    (tmp_path / "keywords_en.json").write_text(json.dumps({ENGLISH[0]: {"liver": "liver"}}))
    stage(tmp_path / "out", f"--sentences={file}", "--language=en", f"--compare={tmp_path}")
    assert "precision 0.5000 (1 of 2), recall 1.0000 (1 of 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --parquet or --sentences"),
        (["--parquet=a", "--sentences=b"], "either --parquet or --sentences"),
        (["--parquet=/nowhere.parquet"], "no such file"),
        (["--parquet=/nowhere.parquet", "--language=fr"], "'fr' is not one of en, de"),
        (["--sentences=/nowhere.json"], "of one language"),
        (["--sentences=/nowhere.json", "--language=en"], "cannot be read"),
        (["--parquet=/nowhere.parquet", "--model=m"], "--url"),
        (["--parquet=/nowhere.parquet", "--url=http://127.0.0.1:1/v1"], "name of a model"),
        (["--parquet=/nowhere.parquet", "--url=nonsense", "--model=m"], "must be an address"),
    ],
)
def test_wrong_flags_are_named(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        stage(tmp_path, *flags)


def test_a_damaged_or_other_parquet_is_named(tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="no readable parquet"):
        stage(tmp_path, f"--parquet={bad}")
    pq.write_table(pa.table({"rsopid": ["a"], "english": ["text"]}), bad)
    with pytest.raises(UserError, match="no struct column 'english'"):
        stage(tmp_path, f"--parquet={bad}")


def test_the_prompts_name_the_same_rules():
    english, german = (extract_mentions.instructions(language) for language in ("en", "de"))
    assert english.count("\n- ") == german.count("\n- ") == 7
    assert english.split(": ")[-1] == german.split(": ")[-1]
