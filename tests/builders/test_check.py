"""The data check on a builder whose records are spoiled one by one: each fault under its kind.

What builders themselves find in files is in test_check_refrad2d.py.
"""

import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rg_jax.errors import UserError
from rg_jax.evaluation.charts import histogram
from tfds_builders import __main__ as command
from tfds_builders import common
from tfds_builders.check import page
from tfds_builders.check.command import check
from tfds_builders.check.records import examine
from tfds_builders.check.statistics import spread
from tfds_builders.doubts import personal
from tfds_builders.letters import broken_letters
from tfds_builders.phantom.phantom_dataset_builder import PhantomConfig, make_record

PHANTOM = PhantomConfig(image_size=32)
SPLITS = {"train": 3, "val": 2, "test": 1}


def run(capsys, *argv):
    """The command in this process: (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        command.main(list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def phantom(split="train", index=0):
    """A record with both captions, questions, a mask and at least one entity in a caption."""
    return make_record(PHANTOM, split, index)


class Spoiled(common.RecordBuilder, skip_registration=True):
    """Phantoms, changed by `change(split, index, record)`; its return value is the record."""

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = common.RecordConfig
    IMAGE_DTYPE, CHANNELS = "int16", 1
    change = staticmethod(lambda split, index, item: item)

    def splits(self, source):
        self.expected = dict(SPLITS)
        return {split: self._records(split, count) for split, count in SPLITS.items()}

    def _records(self, split, count):
        for index in range(count):
            item = self.change(split, index, phantom(split, index))
            if isinstance(item, common.Problem):
                self.report(item)
                continue
            yield item


def checked(tmp_path, change, **options):
    """(report, problems as dicts) of phantoms changed by `change`."""
    builder = Spoiled(config=common.RecordConfig(name="made"), data_dir=str(tmp_path / "none"))
    builder.change = change
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    # Drawing takes longer than all the rest.
    report = check(builder, None, out, **{"pictures": 0, **options})
    lines = (out / page.PROBLEMS).read_text().splitlines()
    assert not (tmp_path / "none").exists()  # nothing is built
    return report, [json.loads(line) for line in lines]


def spoil(change, split="train", index=1):
    """Changes that one record in place."""

    def changed(at_split, at_index, item):
        if (at_split, at_index) == (split, index):
            change(item)
        return item

    return changed


def first_entity(**values):
    return lambda item: item["entities"][0].update(values)


def caption(text):
    def change(item):
        item["texts"]["de"]["caption"] = text
        item["entities"] = [e for e in item["entities"] if e["language"] == "en"]

    return change


def half_a_word(item):
    item["entities"][0]["end"] = item["entities"][0]["start"] + 3


def bad_mask(item):
    item["segmentation"] = np.zeros((30, 32), np.uint8)


def bad_class_in_mask(item):
    item["segmentation"] = np.full((32, 32), 122, np.uint8)


def bad_question(item):
    item["qa"][1]["answer"] = "  "
    item["entities"] = [e for e in item["entities"] if e["field"] != "qa/1/answer"]


def lost_in_a_question(item):
    item["qa"][0]["question"] = "Is it da\ufffdk?"


def intercept_forgotten(item):
    """HU from -1024 on, told as if they were stored values: a few pixels of noise below zero."""
    values = item["image"].astype(np.float64) * item["rescale"][0] + item["rescale"][1] + 1024
    values.flat[0] = -40
    item["image"], item["rescale"] = np.rint(values).astype(np.int16), (1.0, 0.0)
    item["modality"] = "CT"


def maybe(item):
    item["qa"][0] |= {"type": "yesno", "answer": "Maybe three."}
    item["entities"] = [e for e in item["entities"] if e["field"] != "qa/0/answer"]


def none_of_the_choices(item):
    item["qa"][0] |= {"type": "multiple", "answer": "Paw", "choices": ["Leg", "Arm"]}
    item["entities"] = [e for e in item["entities"] if e["field"] != "qa/0/answer"]


HARMFUL = {
    "span behind the text": ("span outside its text", first_entity(end=5000)),
    "span that is empty": ("span outside its text", first_entity(start=4, end=4)),
    "span in no text": ("span outside its text", first_entity(field="qa/99/answer")),
    "box": ("box outside the image", first_entity(box=(0.0, 0.0, 33.0, 5.0))),
    "box swapped": ("box outside the image", first_entity(box=(9.0, 0.0, 3.0, 5.0))),
    "no box": ("not a valid record", first_entity(box=None)),
    "class": ("unknown class", first_entity(class_id=122)),
    "class in mask": ("unknown class", bad_class_in_mask),
    "mask": ("mask of another shape", bad_mask),
    "spacing": ("bad spacing", lambda item: item.update(spacing_mm=(-1.0, 1.0))),
    "spacing nan": ("bad spacing", lambda item: item.update(spacing_mm=(float("nan"), 1.0))),
    "question": ("empty field", bad_question),
    "mojibake": ("encoding damage", caption("Keine LÃ¤sion der Leber.")),
    "lost letter": ("encoding damage", caption("Keine L\ufffdsion.")),
    "control character": ("encoding damage", caption("Keine\x07 Läsion.")),
    "image": ("not a valid record", lambda item: item.update(image=None)),
    "box beside its mask": ("box does not fit its mask", first_entity(box=(0.0, 0.0, 2.0, 2.0))),
    "dtype": ("not a valid record", lambda item: item.update(image=item["image"] * 1.0)),
    "missing field": ("not a valid record", lambda item: item.pop("rescale")),
    "entities": ("not a valid record", lambda item: item.update(entities=None)),
}
HARMLESS = {
    "spacing": ("bad spacing", lambda item: item.update(spacing_mm=(300.0, 1.0))),
    "half a spacing": ("bad spacing", lambda item: item.update(spacing_mm=(0.0, 1.0))),
    "no spacing": ("bad spacing", lambda item: item.update(spacing_mm=(0.0, 0.0))),
    "mask without the class": (
        "mention without mask",
        lambda item: item.update(segmentation=item["segmentation"] * 0),
    ),
    "mask upside down": (
        "box does not fit its mask",
        lambda item: item.update(segmentation=np.ascontiguousarray(item["segmentation"][::-1])),
    ),
    "date": ("perhaps a date in a text", caption("Verlauf zu 12.03.2019.")),
    "name": ("perhaps a name in a text", caption("Befund an Dr. Muster.")),
    "identifier": ("perhaps an identifier in a text", caption("Fall 20394857.")),
    "mark": ("looks like a grounding mark", caption("Die <loc0001> Leber.")),
    "lost letter in a question": ("encoding damage", lost_in_a_question),
    "half a word": ("span cuts a word", half_a_word),
    "intercept": ("implausible CT values", intercept_forgotten),
    "yes or no": ("yes/no question with another answer", maybe),
    "choices": ("answer that is none of the choices", none_of_the_choices),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_fault_is_told_with_its_record_and_the_check_goes_on(tmp_path, name):
    kind, change = HARMFUL[name]
    report, problems = checked(tmp_path, spoil(change))
    harmful = [p for p in problems if p["harmful"]]
    assert {p["kind"] for p in harmful} == {kind}, problems
    assert {p["file"] for p in harmful} == {f"record {phantom('train', 1)['id']}"}
    assert report.harmful == len(harmful) and report.complete
    assert report.statistics.records == SPLITS and +report.statistics.unfit == {"train": 1}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_doubt_is_told_and_harms_nothing(tmp_path, name):
    kind, change = HARMLESS[name]
    report, problems = checked(tmp_path, spoil(change))
    assert {p["kind"] for p in problems} == {kind}, problems
    assert not report.harmful and report.statistics.records == SPLITS
    assert report.statistics.unfit.total() == 0


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    report, problems = checked(tmp_path, lambda split, index, item: item)
    assert problems == [] and report.harmful == 0 and report.complete


def test_all_problems_of_a_record_are_told(tmp_path):
    def change(item):
        item["entities"][0].update(end=5000, class_id=500)
        item["entities"][1].update(box=(0.0, 0.0, 99.0, 5.0))
        bad_mask(item)

    _, problems = checked(tmp_path, spoil(change))
    assert sorted(p["kind"] for p in problems) == [
        "box outside the image",
        "mask of another shape",
        "span outside its text",
        "unknown class",
    ]


def same_as_first(*fields):
    """The first val record takes fields of the first train record."""

    def change(split, index, item):
        if (split, index) == ("val", 0):
            item.update({field: phantom()[field] for field in fields})
        return item

    return change


@pytest.mark.parametrize("field, words", [("id", "same id"), ("source", "patient or study")])
def test_leakage_between_splits(tmp_path, field, words):
    _, problems = checked(tmp_path, same_as_first(field))
    assert [(p["kind"], p["harmful"]) for p in problems] == [("leakage between splits", True)]
    assert words in problems[0]["detail"] and "train" in problems[0]["detail"]


def test_the_same_picture_in_two_splits(tmp_path):
    _, problems = checked(tmp_path, same_as_first("image", "segmentation", "entities", "texts"))
    problems = [p for p in problems if p["harmful"] and p["kind"] == "leakage between splits"]
    assert len(problems) == 1 and phantom()["id"] in problems[0]["detail"]
    assert problems[0]["file"] == f"record {phantom('val')['id']}"


def test_blank_pictures_are_no_leak(tmp_path):
    def change(split, index, item):
        item["image"] = item["image"] * 0
        return item

    report, problems = checked(tmp_path, change)
    assert {(p["kind"], p["harmful"]) for p in problems} == {("blank image", True)}
    assert len(problems) == 6


def test_the_same_id_twice_in_one_split(tmp_path):
    _, problems = checked(tmp_path, spoil(lambda item: item.update(id=phantom()["id"])))
    assert [(p["kind"], p["harmful"]) for p in problems] == [("duplicate id", True)]


def test_what_a_builder_reports_is_kept_with_its_file(tmp_path):
    bad = common.Problem("unreadable file", "a/b.dcm", "is torn")
    fine = common.Problem("boxes merged", "a/c.json", "two", harmful=False)

    def change(split, index, item):
        return {("train", 0): bad, ("test", 0): fine}.get((split, index), item)

    report, problems = checked(tmp_path, change)
    assert sorted(p["file"] for p in problems) == ["a/b.dcm", "a/c.json", "split test"]
    empty = [p for p in problems if p["file"] == "split test"]
    assert [(p["kind"], p["harmful"]) for p in empty] == [("empty split", False)]
    assert report.harmful == 1 and report.statistics.records == {"train": 2, "val": 2}
    assert report.builder_counts["left out: unreadable file"] == 1
    text = "\n".join(report.lines())
    assert "a/b.dcm: is torn" in text and "boxes merged: 1" in text


@pytest.mark.parametrize("error", [UserError("slice is torn"), ZeroDivisionError("whoops")])
def test_a_reader_that_breaks_ends_its_split_only(tmp_path, error):
    def change(split, index, item):
        if (split, index) == ("train", 1):
            raise error
        return item

    report, problems = checked(tmp_path, change)
    assert [(p["kind"], p["file"]) for p in problems] == [("reading ended early", "split train")]
    assert str(error) in problems[0]["detail"] and problems[0]["harmful"]
    assert report.statistics.records == {"train": 1, "val": 2, "test": 1}


def test_no_records_are_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(Spoiled, "splits", lambda self, source: {})
    report, problems = checked(tmp_path, None)
    assert [p["kind"] for p in problems] == ["no records"] and report.harmful == 1
    assert (tmp_path / "out" / page.NAME).exists()


def test_interrupted_tells_so_and_keeps_what_was_found(tmp_path):
    def change(split, index, item):
        if (split, index) == ("val", 1):
            raise KeyboardInterrupt
        if (split, index) == ("train", 0):
            bad_mask(item)
        return item

    report, problems = checked(tmp_path, change)
    assert not report.complete and len(problems) == 1
    figures = json.loads((tmp_path / "out" / page.FIGURES).read_text())
    assert figures["complete"] is False and figures["records"] == {"train": 3, "val": 1}
    html = (tmp_path / "out" / page.NAME).read_text()
    assert "interrupted" in html and "in the part that was looked at" in html


def test_limit_looks_at_the_first_of_each_split_and_says_so(tmp_path):
    report, _ = checked(tmp_path, lambda s, i, item: item, limit=1)
    assert report.statistics.records == {"train": 1, "val": 1, "test": 1}
    assert "only the first 1 records" in "\n".join(report.lines())


def test_only_the_first_of_a_kind_are_kept_but_all_are_written(tmp_path):
    def change(split, index, item):
        item["spacing_mm"] = (300.0, 1.0)
        return item

    report, problems = checked(tmp_path, change)
    assert len(problems) == 6
    assert [(kind, n, len(first)) for kind, n, first in report.kinds(False)] == [
        ("bad spacing", 6, 5)
    ]
    assert "... and 1 more" in "\n".join(report.lines())


def test_the_same_problem_is_listed_once_with_its_count(tmp_path):
    bad = common.Problem("missing file", "a/mask.npy", "no such file")

    def change(split, index, item):
        return bad if split == "train" or (split, index) == ("val", 0) else item

    report, problems = checked(tmp_path, change)
    assert len(problems) - 1 == 4  # but for the split that is left empty
    text = "\n".join(report.lines())
    assert text.count("a/mask.npy") == 1 and "a/mask.npy: no such file (4 times)" in text
    assert "missing file: 4" in text and " more" not in text
    html = (tmp_path / "out" / page.NAME).read_text()
    assert html.count("a/mask.npy") == 1 and "no such file (4 times)" in html
    figures = json.loads((tmp_path / "out" / page.FIGURES).read_text())
    row = next(row for row in figures["problems"] if row["kind"] == "missing file")
    assert row["count"] == 4 and [first["times"] for first in row["first"]] == [4]


def test_figures(tmp_path):
    report, _ = checked(tmp_path, lambda split, index, item: item)
    figures = json.loads((tmp_path / "out" / page.FIGURES).read_text())
    items = [phantom(split, index) for split, n in SPLITS.items() for index in range(n)]
    assert sum(figures["records"].values()) == len(items) == 6
    assert sum(sum(c.values()) for c in figures["types"].values()) == sum(
        len(item["qa"]) for item in items
    )
    assert sum(
        row["train"] + row["val"] + row["test"] for row in figures["classes"].values()
    ) == sum(len(item["entities"]) for item in items)
    assert figures["groups"] == SPLITS
    assert figures["image_sizes"] == {"32 x 32": 6}
    assert figures["modalities"].keys() == SPLITS.keys()
    words = [len(item["texts"]["de"]["caption"].split()) for item in items]
    length = figures["lengths"]["caption de (words)"]
    assert (
        length["n"] == 6
        and length["max"] == max(words)
        and length["mean"] == pytest.approx(sum(words) / 6, abs=0.01)
    )
    assert sum(length["counts"].values()) == 6
    assert "characters" in figures["lengths"]["caption de (characters)"]["unit"]
    assert sum(figures["box_share_of_image_up_to"].values()) == sum(
        len({(e["class_id"], e["box"]) for e in item["entities"]}) for item in items
    )


def test_spread():
    assert spread({1: 98, 10: 1, 50: 1}) == {
        "n": 100,
        "mean": 1.58,
        "median": 1,
        "p95": 1,
        "max": 50,
    }
    assert page.bars_of({}) == []
    assert page.bars_of({3: 2}) == [("0", 0), ("1", 0), ("2", 0), ("3", 2)]
    bars = page.bars_of({1: 600, 49: 390, 1000: 10})
    assert bars[-1] == ("> 49", 10) and sum(n for _, n in bars) == 1000
    assert bars[0] == ("0–4", 600) and len(bars) <= 26


def test_histogram():
    assert histogram("Nothing", []) == ""
    drawn = histogram("<b>", [("0–9", 5), ("10–19", 0), ("> 19", 10)], unit="words")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill', drawn)]
    assert len(heights) == 3 and heights[1] == 0 and heights[2] == pytest.approx(2 * heights[0])
    assert "<b>" not in drawn and "&gt; 19: 10" in drawn and ">words<" in drawn


def test_the_page_needs_no_network_and_tells_no_patient_keys(tmp_path):
    def change(split, index, item):
        item["source"] = {**item["source"], "group": "Muster-1960"}
        if index == 0:
            caption("Geboren 12.03.1960.")(item)
        return item

    checked(tmp_path, change, pictures=8)
    out = tmp_path / "out"
    html = (out / page.NAME).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!sheet/|problems|check)[^\"]*", html)
    assert "http" not in html and "@import" not in html and "Not a medical device" in html
    for path in (out / page.NAME, out / page.PROBLEMS, out / page.FIGURES):
        assert "Muster" not in path.read_text() and "1960" not in path.read_text(), path
    pictures = sorted(f"sheet/{p.name}" for p in (out / "sheet").iterdir())
    assert pictures == sorted(set(re.findall(r'src="([^"]+)"', html))) and len(pictures) == 6
    assert html.count("Texts not shown") == 3 and html.count("<h5>de</h5>") == 3


def test_stale_pictures_go_and_content_is_escaped(tmp_path):
    (tmp_path / "out" / "sheet").mkdir(parents=True)
    (tmp_path / "out" / "sheet" / "999-old.png").write_bytes(b"old")

    def change(item):
        item["body_part"] = "<script>alert(1)</script>"

    checked(tmp_path, spoil(change), pictures=8)
    assert not (tmp_path / "out" / "sheet" / "999-old.png").exists()
    html = (tmp_path / "out" / page.NAME).read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_two_runs_write_the_same(tmp_path):
    texts = []
    for run_of in ("a", "b"):
        (tmp_path / run_of).mkdir()
        checked(tmp_path / run_of, lambda split, index, item: item, pictures=1)
        out = tmp_path / run_of / "out"
        shown = {p.name: p.read_bytes() for p in (out / "sheet").iterdir()}
        html = re.sub(r"[\d.]+ s</dd>", "", (out / page.NAME).read_text())
        texts.append((shown, html))
    assert texts[0] == texts[1]


def test_command_with_tokenizer_and_exit_codes(tmp_path, capsys, monkeypatch):
    from rg_jax.data.tokenizer import train_tokenizer
    from tfds_builders.phantom import phantom_dataset_builder

    model = tmp_path / "tok.model"
    train_tokenizer(["the liver is normal", "die Leber ist normal"] * 20, model, 1600)
    small = ["--train=3", "--val=1", "--test=1", "--image_size=32", "--pictures=0"]
    argv = ["check", "phantom", f"--out={tmp_path / 'out'}", *small]
    code, out, err = run(capsys, *argv, f"--tokenizer={model}")
    assert code == 0 and "nothing that would harm training" in out, err
    figures = json.loads((tmp_path / "out" / page.FIGURES).read_text())
    lengths = figures["lengths"]
    assert figures["tokenizer"] and all(row["unit"] == "tokens" for row in lengths.values())
    assert (
        lengths["caption with boxes en (tokens)"]["max"]
        >= lengths["caption en (tokens)"]["max"] + 5
    )

    make = phantom_dataset_builder.make_record

    def broken(config, split, index):
        item = make(config, split, index)
        if split == "val":
            bad_mask(item)
        return item

    monkeypatch.setattr(phantom_dataset_builder, "make_record", broken)
    code, out, err = run(capsys, *argv)
    assert code == 1 and "mask of another shape: 1" in out and "phantom-0-val-000000" in out

    def interrupted(config, split, index):
        if split == "val":
            raise KeyboardInterrupt
        return make(config, split, index)

    monkeypatch.setattr(phantom_dataset_builder, "make_record", interrupted)
    code, out, err = run(capsys, *argv)
    assert code == 130 and err == "error: interrupted; what was looked at until then is in there\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "comes first"),
        (["--out=x", "phantom"], "comes first"),
        (["phantoms", "--out=x"], "no builder is called 'phantoms'"),
        (["phantom"], "--out"),
        (["phantom", "--out=x", "--trian=4"], "--trian"),
        (["phantom", "--out=x", "--limit=-1"], "--limit=-1"),
        (["phantom", "--out=x", "--pictures=-1"], "--pictures=-1"),
        (["phantom", "--out=x", "--modality=pet"], "--modality=pet"),
        (["phantom", "--out=x", "--tokenizer=/no/such"], "/no/such"),
        (["phantom", "--out=x", "--data_dir=y"], "--data_dir"),
        (["slake", "--out=x"], "--source"),
        (["slake", "--out=x", "--source=/no/such"], "--source=/no/such"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "check", *argv)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "check", "phantom", f"--out={tmp_path / 'file' / 'below'}")
    assert code == 2 and "--out=" in err and err.count("\n") == 1


def test_help(capsys):
    code, out, _ = run(capsys, "check", "--help")
    assert code == 0 and "slake" in out and "problems.jsonl" in out
    code, out, _ = run(capsys, "check", "phantom", "--help")
    assert code == 0 and "--image_size" in out and "--tokenizer" in out and "--out" in out


def test_examine_never_raises():
    for junk in ({}, {"id": "x"}, {"id": 3}, {**phantom(), "texts": [1]}, {**phantom(), "qa": {}}):
        assert any(problem.harmful for problem in examine(junk, "f")[0]), junk
        assert not examine(junk, "f")[1]


@pytest.mark.parametrize(
    "text",
    [
        "LÃ¤sion",
        "KÃ¶rper",
        "grÃ¶ÃŸer",
        "Ã„hnlich",
        "Ãœbergang",
        "3 Â°C",
        "â€žLeberâ€œ",
        "â€“",
        "L√§sion",
        "gr├Â¶sser",
        "ï»¿Leber",
        "L&auml;sion",
        "L\\u00e4sion",
        "L\\xe4sion",
        "\ufffd",
        "a\x00b",
        "a\x96b",
        "\ue000",
    ],
)
def test_broken_letters(text):
    assert broken_letters(text)


@pytest.mark.parametrize(
    "text",
    [
        "Läsion der Größe 1,2 cm, Übergang Ähnlich ÖÄÜ ß",
        "„Leber“ – normal … 5 µm ≥ 3 × 2 mm, 37 °C",
        "a & b; R&D; Tc-99m",
        "Zeile\nnächste\tSpalte",
        "DÉCOLLÉ «été» naïve Àgé",
        "x = √2, ├─ tree",
        "左肺和肝脏",
        "C:\\user",
        "",
    ],
)
def test_whole_letters(text):
    assert broken_letters(text) == ""


def test_umlauts_broken_in_any_of_the_usual_ways_are_seen():
    """Whatever letter: UTF-8 read as Windows-1252 or Latin-1, once or twice."""
    for letter in "äöüÄÖÜßéèêàçµ°±²³½„“”–—…’•€":
        broken = letter
        for _ in range(2):
            data = broken.encode()
            broken = "".join(
                bytes([b]).decode("cp1252", "replace").replace("\ufffd", chr(b)) for b in data
            )
            assert broken_letters(f"x {broken} y"), (letter, broken)
        assert broken_letters(letter) == ""


@pytest.mark.parametrize(
    "text, what",
    [
        ("am 12.03.2019", "a date"),
        ("am 12. 03. 2019", "a date"),
        ("vom 1.2.19", "a date"),
        ("on 2019-03-12", "a date"),
        ("on 3/12/2019", "a date"),
        ("March 2019", "a date"),
        ("Herr Muster", "a name"),
        ("Dr. med. Muster", "a name"),
        ("Mrs. Smith", "a name"),
        ("case 12345678", "an identifier"),
        ("1.2.840.10008.5.1.4", "an identifier"),
        ("a@b.org", "an identifier"),
    ],
)
def test_personal(text, what):
    assert [found for found, _ in personal(text)] == [what]


@pytest.mark.parametrize(
    "text",
    [
        "Zyste von 1.2 cm in Segment 4/8, Th12.1, BWK 12.",
        "12,5 x 10.3 x 8 mm, 10.000 Einheiten, 12:30",
        "Frauen und Herren, dramatic, professor",
        "the liver may be normal, 5 mm",
    ],
)
def test_nothing_personal(text):
    assert personal(text) == []
