"""The report page: complete, self-contained, and safe with any text."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import made_up
import numpy as np
import pytest
from PIL import Image

from rg_jax.errors import UserError
from rg_jax.evaluation import charts, gallery, page
from rg_jax.evaluation.baseline import BlindBaseline
from rg_jax.evaluation.results import make_result
from rg_jax.evaluation.score import score_results
from rg_jax.grounding.format import OURS

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "input"}


class Reader(HTMLParser):
    """Collects links, tags and text, and checks that every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.attributes = set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def results():
    return made_up.results(16)[0]


@pytest.fixture(scope="module")
def metrics(results):
    train = [made_up.detect_sample(500 + k, ("en", "de")[k % 2])[0] for k in range(20)]
    return score_results(
        results, data="made up", split="val", baseline=BlindBaseline.fit(train), resamples=100
    )


def history():
    return [
        {"step": k, "time": 0.0, "train/loss": 3 / (k + 1), "train/loss/detect": 2 / (k + 1),
         "train/lr": 1e-4, "val/loss": None, "val/g_iou": k / 100}
        for k in range(1, 60)
    ]  # fmt: skip


def write(directory, metrics, results, overlays=None, run=None, rows=()):
    path = page.write_page(directory, metrics, results, overlays or {}, run or {"name": "n"}, rows)
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(tmp_path, metrics, results):
    overlays = {r.sample.id: f"overlays/{k}.png" for k, r in enumerate(results)}
    text = write(tmp_path, metrics, results, overlays, {"name": "det", "Step": "7"}, history())
    read = Reader(text)
    assert text.count(page.POLICY) == 1
    bare = text.replace(page.POLICY, "")
    assert "http" not in bare and "//" not in re.sub(r"</?\w+/?>", "", bare)
    assert "url(" not in text and "@import" not in text and "link" not in read.tags
    assert sorted(set(read.links)) == sorted(overlays.values())
    words = " ".join(read.words)
    for expected in (
        "det on made up, val",
        "Not a medical device",
        "95 % interval",
        "blind:",
        "By language",
        "By modality",
        "By class",
        "Counted along the way",
    ):
        assert expected in words, expected
    assert read.tags.count("article") == len(results)
    assert read.tags.count("svg") == 4  # the bars and three curves
    assert f"{100 * metrics['g_iou']['mean']:.1f}" in words
    assert f"{100 * metrics['baseline_g_iou']['mean']:.1f}" in words


def test_markup_in_any_text_is_shown_and_not_run(tmp_path, results):
    sample, _ = made_up.detect_sample(2, "en")
    evil = dataclasses.replace(
        sample, id=EVIL, task="detect", language='en" onload="x', modality=EVIL,
        prefix=EVIL, text=EVIL + sample.text, entities=(), counts={EVIL: 1},
    )  # fmt: skip
    result = make_result(evil, f"{EVIL}<p bbox=<loc0001>{EVIL}", OURS)
    metrics = score_results([result], data=EVIL, split=EVIL, resamples=50)
    link = {EVIL: 'a"><script>.png'}
    rows = [{"step": 1, f"train/loss/{EVIL}": 1.0}, {"step": 2, f"train/loss/{EVIL}": 1.0}]
    text = write(tmp_path, metrics, [result], link, {"name": EVIL, EVIL: EVIL}, rows)
    read = Reader(text)
    assert read.tags.count("script") == 1  # the page's own
    assert not [name for name in read.attributes if name.startswith("on")]
    assert "".join(read.words).count(EVIL) >= 8


def test_mentions_are_coloured_and_marks_are_gone():
    sample, _ = made_up.detect_sample(4, "en")
    result = make_result(sample, sample.target, OURS)
    ious = {m.predicted: m.iou for m in result.score.matches}
    text = gallery.coloured(result.text, result.entities, "p", ious)
    assert text.count("<mark") == len(sample.entities) and "bbox" not in text
    assert re.sub(r"<sup>.*?</sup>|<[^>]+>", "", text) == sample.text


def test_broken_marks_are_shown(tmp_path, metrics, results):
    broken = [r for r in results if r.malformed]
    assert broken
    words = " ".join(Reader(write(tmp_path, metrics, broken)).words)
    assert "Broken marks" in words and "unclosed" in words


def test_the_gallery_runs_from_worst_to_best(tmp_path, metrics, results):
    text = write(tmp_path, metrics, results[::-1])
    shown = re.findall(r'<span class="id">([^<]+)</span>', text)
    assert shown == [r.sample.id for r in sorted(results, key=gallery.badness)]
    values = [gallery.badness(r)[0] for r in sorted(results, key=gallery.badness)]
    assert values == sorted(values) and values[0] < values[-1]


def test_a_large_set_keeps_its_worst_and_best(results):
    ordered = sorted(results, key=gallery.badness)
    chosen = gallery.choose(results, 9)
    assert len(chosen) == len({r.sample.id for r in chosen}) == 9
    assert chosen[:3] == ordered[:3] and chosen[-3:] == ordered[-3:]
    assert chosen == sorted(chosen, key=gallery.badness)
    assert gallery.choose(results, 100) == ordered


def test_overlays_are_files_beside_the_page(tmp_path, results):
    def record(record_id):
        values = np.arange(64 * 48, dtype=np.int16).reshape(64, 48, 1) - 1000
        known = {"image": values, "rescale": (1.0, 0.0), "modality": "CT"}
        return known | {"spacing_mm": (2.0, 1.0)}

    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "0099-left-from-before.png").write_bytes(b"")
    names = gallery.write_overlays(tmp_path, results, record)
    assert sorted(names) == sorted(r.sample.id for r in results)
    files = {f"overlays/{path.name}" for path in (tmp_path / "overlays").iterdir()}
    assert files == set(names.values()) and len(files) == len(results)
    with Image.open(tmp_path / names[results[0].sample.id]) as picture:
        assert picture.width < picture.height / 2
    assert gallery.window_name(record(""), "soft") == "CT soft, width 350 level 40 HU"
    with pytest.raises(UserError, match="bone"):
        gallery.write_overlays(tmp_path, results[:1], record, window="bone")


def test_without_baseline_curves_or_places_the_page_still_stands(tmp_path, results):
    plain = [r for r in results if not r.grounded]
    metrics = score_results(plain, data="vqa", split="test", resamples=50)
    read = Reader(write(tmp_path, metrics, plain))
    assert "svg" not in read.tags and "Closed questions, accuracy" in " ".join(read.words)
    Reader(write(tmp_path, metrics, []))


def published(**fields):
    """A row as `published_figures.comparable` makes them."""
    figure = {"mean": 0.861, "low": 0.84, "high": 0.88, "n": 645}
    row = {"metric": "text_f1_open", "name": "F1, open questions", "ours": figure, "theirs": 0.877}
    row |= {"model": "all + detection", "source": "paper", "protocol": "SLAKE, validate.json"}
    return {**row, "comparable": True, "why": "", **fields}


def test_published_figures_stand_beside_ours_with_a_plain_word(tmp_path, metrics, results):
    why = f"theirs is on validate.json {EVIL}"
    rows = [
        published(comparable=False, why=why, metric="text_accuracy_closed", name="Accuracy"),
        published(), published(theirs=0.991, model="another"),
        published(metric="g_iou", name="G-IoU", ours=None, comparable=False, why="not measured"),
    ]  # fmt: skip
    text = write(tmp_path, {**metrics, "published": rows}, results[:2])
    words = " ".join(Reader(text).words)
    at = words.index("Beside the published figures")
    told = words[at : words.index("Broken down")]
    assert f"Not comparable: {why}." in told and "Comparable." in told
    # What may be compared comes first, the highest of theirs first, and ours beside each.
    positions = [told.index(w) for w in ("F1, open questions", "99.1", "87.7", "Accuracy")]
    assert positions == sorted(positions) and told.count("86.1") == 2
    assert "not measured here: G-IoU" in told
    assert "Beside the published" not in write(tmp_path, metrics, results[:2])


def test_the_terminal_gets_the_same_figures(metrics):
    text = page.summary(metrics)
    assert "made up (val), 16 samples" in text and "exact" in text
    for key in ("g_iou", "baseline_g_iou", "text_accuracy_closed"):
        assert f"{100 * metrics[key]['mean']:6.1f}" in text
    assert "None" not in text and "nan" not in text


def test_what_a_reader_has_to_know_first(tmp_path, metrics, results):
    plain = page.summary(metrics)
    assert "SEEN" not in plain and "PART" not in plain
    reason = "slake/image-en, split train: 3 of 9 questions and captions are the same"
    about = {**metrics["set"], "total": 790, "seen_in_training": {"train": reason}}
    told = {**metrics, "set": about}
    for text in (page.summary(told), write(tmp_path, told, results)):
        assert "SEEN IN TRAINING (config.data.train; " + reason in text
        assert "A PART OF THE SET: 16 of 790 samples" in text


def test_every_figure_of_a_breakdown_has_its_interval_and_n(tmp_path, metrics, results):
    text = write(tmp_path, metrics, results)
    rows = re.findall(r"<tr><td>(?:detect|vqa)</td>(.*?)</tr>", text)
    assert len(rows) == 2
    figures = metrics["by_task"]["detect"]
    cells = [cell for row in rows for cell in re.findall(r"<td>(.*?)</td>", row)]
    for cell in cells:
        assert "–" in cell or re.search(r"\d to -?\d+\.\d, n \d", cell), cell
    low, high, n = (figures["g_iou"][key] for key in ("low", "high", "n"))
    assert f"{100 * low:.1f} to {100 * high:.1f}, n {n}" in text


def test_history_survives_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "train/loss": 1.0}\n{"step": 1, "train/loss": 2.0}\n'
        '{"step": 2, "val/g_iou": 0.5}\n{"step": 3, "tra'
    )
    assert page.read_history(path) == [
        {"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "val/g_iou": 0.5},
    ]  # fmt: skip
    assert page.read_history(tmp_path / "none.jsonl") == []


def test_curves_are_drawn_to_scale():
    svg = ET.fromstring(charts.line_chart("Loss", {"a": [(0, 0.0), (10, 1.0)]}))
    path = next(e for e in svg.iter("path")).get("d")
    (x0, y0), (x1, y1) = (map(float, p.split()) for p in path[1:].split(" L"))
    labels = {e.text: float(e.get("y")) for e in svg.iter("text")}
    assert y0 == pytest.approx(labels["0"] - 3.5, abs=20) and y1 < y0 and x1 > x0
    assert charts.line_chart("Loss", {"a": [(0, float("nan"))], "b": []}) == ""
    one = ET.fromstring(charts.line_chart("Loss", {"a": [(5, 2.0)]}))
    assert list(one.iter("circle"))


def test_long_curves_are_thinned_without_losing_their_ends():
    points = [(float(k), float(k)) for k in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MOST_POINTS and thinned[-1] == points[-1]
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert thinned[0][0] < 40


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 3000, [0, 1000, 2000, 3000]), (2, 2, None)],
)
def test_ticks_are_round_numbers_around_the_values(low, high, expected):
    found = charts.ticks(low, high, 5 if high < 10 else 4)
    assert found[0] <= low and found[-1] >= high
    if expected:
        assert found == pytest.approx(expected)


def test_whiskers_stand_at_the_interval():
    figure = {"mean": 0.5, "low": 0.25, "high": 1.0}
    rows = [("ours", figure, True), ("none", {"mean": None}, False)]
    svg = ET.fromstring(charts.bar_chart(rows))
    bar = next(svg.iter("rect"))
    left, width = float(bar.get("x")), float(bar.get("width"))
    start, end = re.match(r"M([\d.]+) [\d.]+ H([\d.]+)", next(svg.iter("path")).get("d")).groups()
    assert float(start) == pytest.approx(left + width / 2, abs=0.2)
    assert float(end) == pytest.approx(left + 2 * width, abs=0.2)
    assert charts.bar_chart(rows[1:]) == ""
