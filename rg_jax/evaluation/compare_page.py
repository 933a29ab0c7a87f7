"""How a comparison of two evaluations is shown: a table for a terminal, and a page."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rg_jax.config import write_aside
from rg_jax.evaluation.gallery import badness, coloured, write_overlays
from rg_jax.evaluation.page import NAMES, NOTICE, document
from rg_jax.evaluation.results import Result

STYLE = """<style>
.pair { display:grid; grid-template-columns:1fr 1fr; gap:0 14px; } .pair img { width:100%;
  height:auto; display:block; } .pair a { display:block; background:#0c0e12; }
.both { border:1px solid var(--line); border-radius:8px; padding:12px 14px 14px; margin-top:14px; }
.both h4 { margin:0; font-size:14px; overflow-wrap:anywhere; }
td.clear { font-weight:700; }
@media (max-width:640px) { .pair { grid-template-columns:1fr; gap:12px 0; } }
</style>"""
# Names that the report page has no use for.
MORE_NAMES = {
    "text_cider": "CIDEr",
    "text_bleu1": "BLEU-1",
    "text_bleu4": "BLEU-4",
    "text_rouge_l": "ROUGE-L",
    "text_f1": "token F1",
    "text_accuracy": "accuracy",
    "text_recall": "recall",
}
KIND_NAMES = {
    "caption": "Captions",
    "open": "Open questions",
    "closed": "Closed questions",
    "grounded": "Grounded questions",
    "questions": "All questions",
}


def name_of(metric: str) -> str:
    """A figure's name for people."""
    for key, words in MORE_NAMES.items():
        kind = metric.removeprefix(f"{key}_")
        if metric.startswith(f"{key}_") and kind in KIND_NAMES:
            return f"{KIND_NAMES[kind]}, {words}"
    return NAMES.get(metric, metric.replace("_", " "))


def is_clear(difference: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference leaves 0 out."""
    return bool(difference["n"]) and (difference["low"] > 0 or difference["high"] < 0)


def summary(compared: Mapping[str, Any]) -> str:
    """The comparison for a terminal, in %, one figure a line; * marks a clear difference."""
    a, b = compared["a"], compared["b"]
    about, settings = a["set"], compared["settings"]
    lines = [
        f"{about['data']} ({about['split']}), {compared['n']:,} shared samples, "
        f"{compared['same_text']:,} with the same answer; figures in %",
        f"A = {a['label']}{_step(a)}, B = {b['label']}{_step(b)}; G-IoU definition: "
        f"{settings['definition']}, mentions compared: {settings['embedder']}",
        *(f"they also differ in: {note}" for note in compared["notes"]),
        f"  {'':<40}{'A':>7}{'B':>8}   {'B − A':>7}  95 % interval, paired      n",
    ]
    for metric, row in compared["metrics"].items():
        gap = row["difference"]
        if not gap["n"]:
            continue
        values = "".join(f"{_percent(row[side]['mean']):>8}" for side in ("a", "b"))
        interval = f"[{100 * gap['low']:+6.1f}, {100 * gap['high']:+6.1f}]"
        lines.append(
            f"  {name_of(metric):<39}{values}  {100 * gap['mean']:+8.1f}  {interval}"
            f"{' *' if is_clear(gap) else '  '}{gap['n']:>12,}"
        )
    lines.append("  * the interval leaves out 0")
    return "\n".join(lines)


def write_page(
    directory: Path,
    compared: Mapping[str, Any],
    shown_a: Sequence[Result],
    shown_b: Sequence[Result],
    record_of: Callable[[str], Mapping[str, Any]] | None,
    why_none: str = "",
) -> Path:
    """Write `directory/index.html` and the pictures below `a/` and `b/`; returns the page.

    `shown_a`, `shown_b`: the same samples of both, in the order in which they are shown.
    `record_of` gives the record of a record id; None: no pictures, and `why_none` is told.
    """
    pictures: list[dict[str, str]] = [{}, {}]
    if record_of is not None:
        for k, (side, shown) in enumerate((("a", shown_a), ("b", shown_b))):
            paths = write_overlays(directory / side, shown, record_of)
            pictures[k] = {name: f"{side}/{path}" for name, path in paths.items()}
    a, b = compared["a"], compared["b"]
    title = f"{a['label']} and {b['label']} on {a['set']['data']}, {a['set']['split']}"
    body = [
        STYLE,
        _head(title, compared),
        _table("Figures of all shared samples", compared["metrics"]),
        _groups(compared),
        _cards(compared, shown_a, shown_b, pictures, why_none),
        f"<footer><p>{html.escape(NOTICE)}</p><p>Made by rg_jax.</p></footer>",
    ]
    write_aside(directory / "index.html", document(title, body))
    return directory / "index.html"


def _step(side: Mapping[str, Any]) -> str:
    step = side["set"].get("step")
    return "" if step is None else f" at step {step:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _head(title: str, compared: Mapping[str, Any]) -> str:
    settings = compared["settings"]
    rows = {
        f"A: {compared['a']['label']}": f"{compared['a']['set']['n']:,} samples"
        + _step(compared["a"]),
        f"B: {compared['b']['label']}": f"{compared['b']['set']['n']:,} samples"
        + _step(compared["b"]),
        "Shared samples": f"{compared['n']:,}",
        "Same answer": f"{compared['same_text']:,}",
        "G-IoU definition": settings["definition"],
        "Mentions compared by": settings["embedder"],
    }
    terms = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in rows.items()
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in compared["notes"])
    notes = f"<p>The two also differ in:</p><ul>{notes}</ul>" if notes else ""
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<dl class="facts">{terms}</dl>{notes}<p class="notice">{html.escape(NOTICE)}</p></header>'
    )


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    cells = []
    for metric, row in rows.items():
        gap = row["difference"]
        if not gap["n"]:
            continue
        mark = ' class="clear"' if is_clear(gap) else ""
        cells.append(
            f"<tr><td>{html.escape(name_of(metric))}</td><td>{_percent(row['a']['mean'])}</td>"
            f"<td>{_percent(row['b']['mean'])}</td><td{mark}>{_signed(gap['mean'])}</td>"
            f"<td{mark}>{_signed(gap['low'])} to {_signed(gap['high'])}</td>"
            f"<td>{gap['n']:,}</td></tr>"
        )
    if not cells:
        return ""
    return (
        f"<section><h2>{html.escape(title)}</h2><table><thead><tr><th></th><th>A</th><th>B</th>"
        "<th>B − A</th><th>95 % interval</th><th>n</th></tr></thead><tbody>"
        + "".join(cells)
        + '</tbody></table><p class="small soft">In %. Paired bootstrap: both on the same '
        "resamples. Bold: the interval leaves out 0.</p></section>"
    )


def _groups(compared: Mapping[str, Any]) -> str:
    """The clear differences within tasks, languages, modalities, answer types and classes."""
    found: dict[str, Mapping[str, Any]] = {}
    for group in ("task", "language", "modality", "answer_type", "class"):
        groups = compared.get(f"by_{group}", {})
        if len(groups) < 2:
            continue
        for value, rows in groups.items():
            for metric, row in rows.items():
                if is_clear(row["difference"]):
                    words = group.replace("_", " ")
                    found[f"{words} {value.replace('_', ' ')}: {name_of(metric)}"] = row
    return _table("Clear differences within groups", found)


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _cards(
    compared: Mapping[str, Any],
    shown_a: Sequence[Result],
    shown_b: Sequence[Result],
    pictures: Sequence[Mapping[str, str]],
    why_none: str,
) -> str:
    if not shown_a:
        nowhere = "<p>Nowhere: all scores are the same.</p>"
        return f"<section><h2>Where they disagree</h2>{nowhere}</section>"
    told = f" No pictures: {html.escape(why_none)}." if why_none else ""
    cards = "\n".join(
        _card(first, second, [paths.get(first.sample.id) for paths in pictures])
        for first, second in zip(shown_a, shown_b, strict=True)
    )
    return (
        '<section><h2>Where they disagree most</h2><p class="soft small">'
        f"{len(shown_a):,} of {len(compared['disagreements']):,} samples on which the two score "
        'differently, the widest gap first. Reference <mark class="r">green, solid</mark>, '
        'prediction <mark class="p">red, dashed</mark>. The score is G-IoU where the reference has '
        f"places, else token F1, and 0 if places were predicted that should not be.{told}</p>"
        f"{cards}</section>"
    )


def _card(first: Result, second: Result, pictures: Sequence[str | None]) -> str:
    sample = first.sample
    facts = [sample.task, sample.language, sample.modality, sample.answer_type]
    language = html.escape(sample.language, quote=True)
    columns = []
    for side, result, picture in zip("AB", (first, second), pictures, strict=True):
        shown = ""
        if picture:
            link = html.escape(picture, quote=True)
            shown = f'<a href="{link}"><img src="{link}" alt="Places by {side}" loading="lazy"></a>'
        by_predicted = {m.predicted: m.iou for m in result.score.matches}
        words = coloured(result.text, result.entities, "p", by_predicted)
        broken = f'<div class="broken">{len(result.malformed)} broken marks</div>'
        columns.append(
            f"<div>{shown}<h5>{side}, {100 * badness(result)[0]:.1f}</h5>"
            f'<div class="words" lang="{language}">{words}</div>'
            f"{broken if result.malformed else ''}</div>"
        )
    return (
        f'<article class="both"><h4>{html.escape(sample.id)}</h4>'
        f'<div class="tag">{html.escape(" · ".join(fact for fact in facts if fact))}</div>'
        f'<div class="prompt">{html.escape(sample.prefix.strip())}</div>'
        f'<h5>Reference</h5><div class="words" lang="{language}">'
        f"{coloured(sample.text, sample.entities, 'r', None)}</div>"
        f'<div class="pair">{"".join(columns)}</div></article>'
    )
