"""The page of a data check, and the files beside it: problems.jsonl, check.json, sheet/*.png.

Looks like the report page of an evaluation and is made of its parts: one static index.html that
loads nothing from anywhere. It holds ids of records, slices and captions, but no patient keys.
"""

import contextlib
import dataclasses
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rg_jax.config import write_aside
from rg_jax.evaluation.charts import histogram
from rg_jax.evaluation.gallery import coloured
from rg_jax.evaluation.page import NOTICE, document
from tfds_builders.check.report import Report
from tfds_builders.check.sheet import Card
from tfds_builders.check.statistics import BOX_SHARES, spread
from tfds_builders.common import Problem

NAME, PROBLEMS, FIGURES, SHEET = "index.html", "problems.jsonl", "check.json", "sheet"
_BARS = 24


@contextlib.contextmanager
def problem_file(out: Path) -> Iterator[Callable[[Problem], None]]:
    """Gives a function that writes a problem as a line of JSON.

    Written line by line, since there may be millions; renamed into place when the block ends.
    """
    aside = out / f".{PROBLEMS}.{os.getpid()}.tmp"
    try:
        with open(aside, "w", encoding="utf-8") as file:

            def write(problem: Problem) -> None:
                json.dump(dataclasses.asdict(problem), file, ensure_ascii=True)
                file.write("\n")

            yield write
        os.replace(aside, out / PROBLEMS)
    finally:
        aside.unlink(missing_ok=True)


def write(out: Path, report: Report) -> Path:
    """Write the contact sheet's pictures, check.json and index.html; the page last."""
    cards = report.sheet.cards()
    pictures = _write_pictures(out / SHEET, cards)
    figures = json.dumps(report.as_dict(), ensure_ascii=False, indent=1)
    write_aside(out / FIGURES, figures + "\n")
    body = [
        _head(report),
        _problems(report),
        _remarks(report),
        _records(report),
        _lengths(report),
        _classes(report),
        _builder_counts(report),
        _sheet(cards, pictures),
        f"<footer><p>{html.escape(NOTICE)}</p><p>Made by rg_jax.</p></footer>",
    ]
    write_aside(out / NAME, document(f"Data check of {report.name}", body))
    for stale in (out / SHEET).glob("*.png"):
        if f"{SHEET}/{stale.name}" not in pictures:
            stale.unlink()
    return out / NAME


def _write_pictures(folder: Path, cards: Sequence[Card]) -> list[str]:
    folder.mkdir(exist_ok=True)
    names = []
    for number, card in enumerate(cards):
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", card.record_id)[-60:]
        names.append(f"{SHEET}/{number:03d}-{readable}.png")
        write_aside(folder.parent / names[-1], card.png)
    return names


# --- parts of the page -----------------------------------------------------------------------


def _head(report: Report) -> str:
    records = report.statistics.records
    lengths = "characters and words (no tokenizer file was given)"
    if report.tokenizer is not None:
        lengths = f"tokens of the SentencePiece file {report.tokenizer.sha256[:12]}…"
    rows = {
        "Records": f"{records.total():,}",
        "Splits": ", ".join(f"{split} {count:,}" for split, count in records.items()) or "none",
        "Would harm training": f"{report.harmful:,}",
        "Harmless or worth a look": f"{report.harmless:,}",
        "Text lengths in": lengths,
        "Time": f"{report.seconds:,.1f} s",
    }
    terms = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in rows.items()
    )
    verdict = report.verdict()
    side = "p" if report.harmful else "r"
    return (
        f"<header><h1>Data check of {html.escape(report.name)}</h1>"
        f'<p><mark class="{side}">{html.escape(verdict[0].upper() + verdict[1:])}</mark></p>'
        f'<dl class="facts">{terms}</dl><p class="notice">{html.escape(NOTICE)} This page shows '
        "slices and captions: handle it as you handle the data.</p></header>"
    )


def _problems(report: Report) -> str:
    groups = (
        (True, "Would harm training", "The build refuses these, or leaves them out with a flag."),
        (
            False,
            "Harmless, or worth a look",
            "Repaired, left out without loss, or valid but unusual.",
        ),
    )
    parts = []
    for harmful, title, what in groups:
        kinds = report.kinds(harmful)
        if not kinds:
            parts.append(f'<h3>{title}</h3><p class="soft">None.</p>')
            continue
        rows = []
        for kind, count, first in kinds:
            shown = "".join(
                f'<div class="small"><code>{html.escape(p.file)}</code> {html.escape(p.detail)}'
                f"{report.repeated(p)}</div>"
                for p in first
            )
            if more := report.more(kind, harmful):
                shown += f'<div class="small soft">… and {more:,} more</div>'
            rows.append(
                f'<tr><td class="top">{html.escape(kind)}</td><td class="top main">{count:,}</td>'
                f'<td class="wide">{shown}</td></tr>'
            )
        parts.append(
            f'<h3>{title}</h3><p class="small soft">{what}</p><table><tbody>{"".join(rows)}'
            "</tbody></table>"
        )
    css = (
        "<style>td.top { vertical-align:top; } td.wide { text-align:left; white-space:normal; "
        "overflow-wrap:anywhere; }</style>"
    )
    return (
        f"{css}<section><h2>Problems</h2>{''.join(parts)}"
        f'<p class="small soft">All of them, one a line: <a href="{PROBLEMS}">{PROBLEMS}</a>; '
        f'these figures as JSON: <a href="{FIGURES}">{FIGURES}</a>.</p></section>'
    )


def _remarks(report: Report) -> str:
    lines = "".join(f"<li>{html.escape(remark)}</li>" for remark in report.remarks())
    return f"<section><h2>Remarks</h2><ul>{lines}</ul></section>" if lines else ""


def _records(report: Report) -> str:
    figures = report.statistics
    splits = list(figures.records)
    if not splits:
        return ""
    rows = [
        ("records", [figures.records[split] for split in splits]),
        ("of these with a problem that would harm", [figures.unfit[split] for split in splits]),
        ("patients or studies (groups)", [figures.groups(split) for split in splits]),
    ]
    titles = {
        "contents": "Contents",
        "modalities": "Modality",
        "captions": "Captions by language",
        "questions": "Questions by language",
        "types": "Questions by type",
        "body_parts": "Body part",
    }
    groups: list[tuple[str, list[tuple[str, list[int]]]]] = [("", rows)]
    for what, title in titles.items():
        by_split = figures.by_split[what]
        totals: dict[str, int] = {}
        for counts in by_split.values():
            for key, count in counts.items():
                totals[key] = totals.get(key, 0) + count
        keys = list(totals) if what == "contents" else sorted(totals, key=lambda k: -totals[k])
        found = [(key, [by_split[split][key] for split in splits]) for key in keys[:12]]
        if len(keys) > 12:
            found.append(
                (
                    f"{len(keys) - 12} others",
                    [sum(by_split[split][key] for key in keys[12:]) for split in splits],
                )
            )
        if found:
            groups.append((title, found))
    empty = {field: count for field, count in sorted(figures.empty.items()) if count}
    fields = "".join(
        f"<div><dt>{html.escape(field.replace('_', ' '))}</dt><dd>{count:,}</dd></div>"
        for field, count in empty.items()
    )
    return (
        f"<section><h2>Records</h2>{_table(splits, groups)}"
        + (f'<h3>Empty texts</h3><dl class="counts">{fields}</dl>' if fields else "")
        + "</section>"
    )


def _table(splits: Sequence[str], groups) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *splits, "all"))
    rows = []
    for title, found in groups:
        if title:
            rows.append(
                f'<tr class="head"><td colspan="{len(splits) + 2}">{html.escape(title)}</td></tr>'
            )
        for key, counts in found:
            cells = "".join(f"<td>{count:,}</td>" for count in counts)
            rows.append(
                f'<tr><td>{html.escape(key)}</td>{cells}<td class="main">{sum(counts):,}</td></tr>'
            )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _lengths(report: Report) -> str:
    figures = report.statistics
    charts = [
        histogram(f"{what[0].upper() + what[1:]}, {unit}", bars_of(counts), unit=unit)
        for what, unit, counts in figures.measured()
        if unit != "characters"
    ]
    names = ["0", *(f"{100 * end:g}" for end in BOX_SHARES)]
    shares = [
        (f"{low}–{high}", figures.box_shares[end])
        for low, high, end in zip(names, names[1:], BOX_SHARES, strict=False)
    ]
    if figures.box_shares:
        charts.append(histogram("Boxes by share of the image", shares, unit="% of the image"))
    sizes = figures.image_sizes.most_common(12)
    if sizes:
        charts.append(
            histogram(
                "Images by size",
                [(f"{h}×{w}", count) for (h, w), count in sorted(sizes)],
                unit="height × width"
                + ("" if len(figures.image_sizes) <= 12 else ", 12 most frequent"),
            )
        )
    if not charts:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(what)} <span class='ci'>{unit}</span></td>"
        + "".join(f"<td>{value:,}</td>" for value in spread(counts).values())
        + "</tr>"
        for what, unit, counts in figures.measured()
    )
    heads = "".join(f"<th>{n}</th>" for n in ("", "texts", "mean", "median", "95 %", "longest"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    drawn = "".join(f"<div>{chart}</div>" for chart in charts)
    how = "The last bar holds all that is longer than 99 % of the texts."
    return (
        f'<section><h2>Lengths and sizes</h2><p class="small soft">{how}</p>'
        f'<div class="curves">{drawn}</div>{table}</section>'
    )


def bars_of(counts: Mapping[int, int], most: int = _BARS) -> list[tuple[str, int]]:
    """{length: count} → at most `most` + 1 bars of equal width; the last takes the longest 1 %."""
    if not counts:
        return []
    total, seen, end = sum(counts.values()), 0, 0
    for length in sorted(counts):
        seen, end = seen + counts[length], length
        if seen >= 0.99 * total:
            break
    step = next(s for s in _steps() if (end + 1) / s <= most)
    bars = [0] * (end // step + 1)
    longer = 0
    for length, count in counts.items():
        if length <= end:
            bars[length // step] += count
        else:
            longer += count
    found = [
        (str(k * step) if step == 1 else f"{k * step}–{(k + 1) * step - 1}", count)
        for k, count in enumerate(bars)
    ]
    return [*found, (f"> {end}", longer)] if longer else found


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _classes(report: Report) -> str:
    figures = report.statistics
    classes, splits = figures.classes(), list(figures.records)
    if not classes:
        return ""
    most = max(1, *(sum(entities.values()) for _, entities, _ in classes))
    heads = ["", *splits, "all mentions", "masks"]
    rows = []
    for name, entities, masks in classes:
        total = sum(entities.values())
        cells = "".join(f"<td>{entities[split]:,}</td>" for split in splits)
        rows.append(
            f"<tr><td>{html.escape(name)}</td>{cells}<td>{total:,}"
            f'<span class="meter"><i style="width:{100 * total / most:.0f}%"></i></span></td>'
            f"<td>{masks:,}</td></tr>"
        )
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return (
        "<section><h2>Classes</h2>"
        '<p class="small soft">Mentions with a box, in captions and answers of all languages, and '
        "masks that hold the class.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _builder_counts(report: Report) -> str:
    if not report.builder_counts:
        return ""
    rows = "".join(
        f"<div><dt>{html.escape(what)}</dt><dd>{count:,}</dd></div>"
        for what, count in report.builder_counts.items()
    )
    return (
        '<section><h2>Counted by the builder</h2><p class="soft small">What was cut, skipped or '
        f'repaired on the way to the records.</p><dl class="counts">{rows}</dl></section>'
    )


def _sheet(cards: Sequence[Card], pictures: Sequence[str]) -> str:
    if not cards:
        return ""
    shown = "".join(_card(card, name) for card, name in zip(cards, pictures, strict=True))
    return (
        "<section><h2>Contact sheet</h2>"
        '<p class="soft small">An even choice of every split and modality. Do boxes and tint lie '
        "on what they name, is the patient's right on the left, are the grey values as usual?</p>"
        f'<div class="cards">{shown}</div></section>'
    )


def _card(card: Card, picture: str) -> str:
    link = html.escape(picture, quote=True)
    alt = html.escape(f"Boxes of {card.record_id}", quote=True)
    texts = "".join(
        f'<h5>{html.escape(language)}</h5><div class="words" lang="{html.escape(language)}">'
        f"{coloured(text, entities, 'r', None)}</div>"
        for language, text, entities in card.texts
    )
    if card.hidden:
        texts = '<div class="broken">Texts not shown: they may hold a date, a name or an id.</div>'
    return (
        f'<article class="card"><a href="{link}"><img src="{link}" alt="{alt}" loading="lazy">'
        f'</a><div class="body"><h4><span class="id">{html.escape(card.record_id)}</span></h4>'
        f'<div class="tag">{html.escape(" · ".join(fact for fact in card.facts if fact))}</div>'
        f"{texts}</div></article>"
    )
