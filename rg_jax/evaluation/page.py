"""The report page of an evaluation: one static `index.html` beside its `overlays/`.

It opens from disk, loads nothing from anywhere and works without scripts (the one script filters
the gallery). Everything that comes from data or a model is escaped.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rg_jax.config import write_aside
from rg_jax.evaluation.charts import bar_chart, line_chart
from rg_jax.evaluation.gallery import badness, gallery
from rg_jax.evaluation.judge import Verdict
from rg_jax.evaluation.page_assets import SCRIPT, STYLE
from rg_jax.evaluation.published_table import published
from rg_jax.evaluation.results import Result
from rg_jax.evaluation.viewer import NO_PICTURES, Pictures, class_label

NOTICE = (
    "Not a medical device. For research only: this output must not be used for diagnosis, "
    "treatment or any other clinical decision."
)

# What the page may load: pictures that lie beside it or in it, and nothing from a network.
_MAY_LOAD = (
    "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)
POLICY = f'<meta http-equiv="Content-Security-Policy" content="{_MAY_LOAD}">'

# Metric, its name for people, and what it is; the first group has a blind baseline.
GROUNDING = (
    ("g_iou", "G-IoU", "overlap × likeness of matched mentions, missing and surplus count 0"),
    ("matched_iou", "IoU of matched entities", "boxes alone, where the mention was found"),
    ("precision", "Precision of entities", "share of predicted entities with a counterpart"),
    ("recall", "Recall of entities", "share of reference entities with a counterpart"),
    ("f1", "F1 of entities", ""),
    ("precision_50", "Precision at IoU ≥ 0.5", ""),
    ("recall_50", "Recall at IoU ≥ 0.5", ""),
    ("f1_50", "F1 at IoU ≥ 0.5", ""),
    ("miou", "Mean IoU over classes", "unmatched entities count 0"),
    ("false_entity_rate", "False entities", "samples without places that were given some"),
)
MASKS = (
    ("mask_g_iou", "Mask G-IoU", "as G-IoU, with masks for boxes"),
    ("mask_dice", "Dice of matched entities", "masks alone, where the mention was found"),
    ("mask_matched_iou", "Mask IoU of matched entities", ""),
    ("mask_f1_50", "F1 at mask IoU ≥ 0.5", ""),
    ("mask_dice_over_classes", "Mean Dice over classes", "unmatched entities count 0"),
    ("mask_miou", "Mean mask IoU over classes", "unmatched entities count 0"),
    ("mask_box_g_iou", "G-IoU of boxes around masks", "on one scale with boxes that were written"),
    (
        "mask_g_iou_published_segmentation",
        "Mask G-IoU as published",
        "forgives missing and surplus ones",
    ),
)
TEXT = (
    ("text_f1_caption", "Captions, token F1", ""),
    ("text_cider_caption", "Captions, CIDEr", "× 100; weighs words by this very set"),
    ("text_bleu1_caption", "Captions, BLEU-1", "of the whole set"),
    ("text_bleu4_caption", "Captions, BLEU-4", "of the whole set"),
    ("text_rouge_l_caption", "Captions, ROUGE-L", ""),
    ("text_f1_open", "Open questions, token F1", ""),
    ("text_recall_open", "Open questions, recall", ""),
    ("text_accuracy_open", "Open questions, exact", ""),
    ("text_cider_open", "Open questions, CIDEr", "× 100; weighs words by this very set"),
    ("text_bleu1_open", "Open questions, BLEU-1", "of the whole set"),
    ("text_rouge_l_open", "Open questions, ROUGE-L", ""),
    ("text_f1_questions", "Open and closed questions, token F1", "as some papers print it"),
    ("text_accuracy_closed", "Closed questions, accuracy", "exactly the reference"),
    ("text_f1_closed", "Closed questions, token F1", ""),
    ("text_f1_grounded", "Grounded questions, token F1", ""),
    ("llm_score_caption", "Captions, LLMScore", "a language model on text alone, (score − 1) / 4"),
    ("llm_score_open", "Open questions, LLMScore", ""),
    ("llm_score_closed", "Closed questions, LLMScore", ""),
    ("llm_score_questions", "Open and closed questions, LLMScore", ""),
    ("llm_score_grounded", "Grounded questions, LLMScore", ""),
    ("malformed_rate", "Outputs with a broken mark", ""),
)
NAMES = {key: name for key, name, _ in (*GROUNDING, *MASKS, *TEXT)} | {
    "baseline_g_iou": "blind: constant answer",
    "baseline_told_mentions_g_iou": "blind: told the mentions",
}
BASELINES = ("baseline", "baseline_told_mentions")
DEFINED = ("g_iou", "matched_iou", "precision", "recall")
GROUP_COLUMNS = (
    "g_iou",
    "baseline_g_iou",
    "baseline_told_mentions_g_iou",
    "matched_iou",
    "f1",
    "mask_g_iou",
    "mask_dice",
    "text_f1_caption",
    "text_f1_open",
    "text_accuracy_closed",
    "text_f1_grounded",
    "llm_score_caption",
    "llm_score_open",
    "llm_score_closed",
    "malformed_rate",
)


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`, by step; of a step written twice the last value counts.

    A half-written last line is left out; a missing file gives no lines.
    """
    path = Path(path)
    if not path.exists():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            by_step.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            continue
    return [by_step[step] for step in sorted(by_step)]


def write_page(
    directory: str | Path,
    metrics: Mapping[str, Any],
    results: Sequence[Result],
    overlays: Mapping[str, str],
    run: Mapping[str, str],
    history: Sequence[Mapping[str, Any]] = (),
    pictures: Pictures = NO_PICTURES,
    judged: Mapping[str, Verdict] | None = None,
) -> Path:
    """Write `directory/index.html` and return its path.

    `metrics`: content of `metrics.json`. `results`: those of the gallery, see `gallery.choose`.
    `overlays`: sample id → picture, relative to `directory`; samples without one are shown without.
    `run`: facts for the head of the page in their order, "name" becomes the title (weights, step,
    CT window, licence of the data …). `history`: see `read_history`. `pictures`: the values behind
    the gallery's pictures, see `viewer.gather`. `judged`: a judge's verdicts by sample id.
    """
    directory = Path(directory)
    about = metrics["set"]
    facts = dict(run)
    name = facts.pop("name", "rg_jax")
    title = f"{name} on {about['data']}, {about['split']}"
    body = [
        _head(title, about, metrics, facts),
        _main_figures(metrics),
        published(metrics.get("published") or ()),
        _curves(history),
        _breakdown(metrics),
        _counts(metrics["counts"]),
        gallery(sorted(results, key=badness), overlays, about["n"], pictures, judged),
        f"<footer><p>{html.escape(NOTICE)}</p><p>Made by rg_jax.</p></footer>",
    ]
    write_aside(directory / "index.html", document(title, body, SCRIPT))
    return directory / "index.html"


def document(title: str, body: Iterable[str], script: str = "") -> str:
    """A whole page in our dress out of the parts of its body, which are HTML; empty ones fall out.

    Style and script stand in the page itself, so that it opens from disk without network.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + (POLICY if script else "")
        + f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def summary(metrics: Mapping[str, Any]) -> str:
    """The main figures for a terminal, one a line with interval and n."""
    about = metrics["set"]
    lines = [
        f"{about['data']} ({about['split']}), {_of_all(about)} samples; figures in %, "
        f"95 % interval; G-IoU definition: {about['definition']}, mentions compared: "
        f"{about['embedder']}",
        *reservations(about),
    ]
    rows = [(key, name) for key, name, _ in GROUNDING]
    rows[1:1] = [(f"{b}_g_iou", NAMES[f"{b}_g_iou"]) for b in BASELINES]
    rows += [(key, name) for key, name, _ in (*MASKS, *TEXT)]
    for key, name in rows:
        figure = metrics.get(key)
        if figure and figure["n"]:
            low, high = 100 * figure["low"], 100 * figure["high"]
            interval = f"[{low:5.1f}, {high:5.1f}]"
            failed = f", {figure['n_failed']} failed" if figure.get("n_failed") else ""
            lines.append(
                f"  {name:<35}{100 * figure['mean']:6.1f}  {interval}  n={figure['n']}{failed}"
            )
    return "\n".join(lines)


def reservations(about: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before the figures: sentences, for page and terminal."""
    said = [
        f"SEEN IN TRAINING (config.data.{name}; {reason}): these figures say what the model "
        "remembers, not how it reads new pictures."
        for name, reason in (about.get("seen_in_training") or {}).items()
    ]
    if about.get("total", about["n"]) > about["n"]:
        said.append(f"A PART OF THE SET: {_of_all(about)} samples, spread evenly over it.")
    return said


def _of_all(about: Mapping[str, Any]) -> str:
    total = about.get("total", about["n"])
    return f"{about['n']:,}" + (f" of {total:,}" if total > about["n"] else "")


# --- parts of the page -----------------------------------------------------------------------


def _head(title: str, about: Mapping[str, Any], metrics, facts: Mapping[str, str]) -> str:
    rows = {
        "Data": about["data"],
        "Split": about["split"],
        "Samples": f"{_of_all(about)} on {metrics['counts']['records']:,} pictures",
        **facts,
        "G-IoU definition": about["definition"],
        "Mentions compared by": about["embedder"],
    }
    if judge := metrics.get("judge"):
        failed = sum(judge["failed"].values())
        rows["LLMScore by"] = f"{judge['model']}" + (f", {failed:,} without a score" * bool(failed))
    terms = "".join(
        f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd></div>"
        for k, v in rows.items()
    )
    warnings = "".join(
        f'<p class="notice warning">{html.escape(said)}</p>' for said in reservations(about)
    )
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<dl class="facts">{terms}</dl>{warnings}<p class="notice">{html.escape(NOTICE)}</p>'
        "</header>"
    )


def _number(figure: Mapping[str, Any] | None, interval: bool = False) -> str:
    if not figure or not figure.get("n"):
        return '<span class="soft">–</span>'
    text = f"{100 * figure['mean']:.1f}"
    if interval:
        text += f' <span class="ci">{_span(figure)}</span>'
    return text


def _cell(figure: Mapping[str, Any] | None) -> str:
    """A figure over its interval and n, for tables in which every cell has its own."""
    if not figure or not figure.get("n"):
        return "<td>" + _number(figure) + "</td>"
    return (
        f"<td>{_number(figure)}{_failed(figure)}"
        f'<span class="ci below">{_span(figure)}, n {figure["n"]:,}</span></td>'
    )


def _failed(figure: Mapping[str, Any]) -> str:
    """How many samples a judge left without a score, where there are some."""
    failed = figure.get("n_failed")
    return f' <span class="ci">+{failed:,} failed</span>' if failed else ""


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _span(figure: Mapping[str, Any]) -> str:
    return f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f}"


def _main_figures(metrics: Mapping[str, Any]) -> str:
    about = metrics["set"]
    rivals = [b for b in BASELINES if f"{b}_g_iou" in metrics]
    parts = [f"<section><h2>Results</h2>{_against_blind(metrics, rivals)}"]
    heads = ["", "this model", "95 % interval", "n"]
    heads += [NAMES[f"{b}_g_iou"] for b in rivals]
    rows = []
    for title, group in (("Grounding", GROUNDING), ("Masks", MASKS), ("Text", TEXT)):
        there = [row for row in group if (metrics.get(row[0]) or {}).get("n")]
        if there:
            rows.append(f'<tr class="head"><td colspan="{len(heads)}">{title}</td></tr>')
        for key, name, what in there:
            figure = metrics[key]
            note = f' <span class="ci note">{html.escape(what)}</span>' if what else ""
            cells = [
                f"<td>{html.escape(name)}{note}</td>",
                f'<td class="main">{_number(figure)}</td>',
                f"<td>{_span(figure)}</td><td>{figure['n']:,}{_failed(figure)}</td>",
            ]
            cells += [
                f"<td>{_number(metrics[f'{b}_metrics'].get(key), interval=True)}</td>"
                for b in rivals
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    table = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    exact = ""
    if about["embedder"] == "exact":
        exact = (
            " Mentions are alike (1) if they are the same text or class, else not (0): such "
            "figures are not on one scale with those made with a sentence-embedding model."
        )
    parts.append(f"<table><thead><tr>{table}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
    parts.append(
        f'<p class="small soft">All figures in %. Intervals: percentile bootstrap over samples, '
        f"{about['resamples']:,} resamples, seed {about['seed']}. G-IoU is the mean over samples "
        f"whose reference holds entities; precision counts all samples.{exact}</p></section>"
    )
    return "".join(parts)


def _against_blind(metrics: Mapping[str, Any], rivals: Sequence[str]) -> str:
    """The chart of the model beside the blind baselines, and what the difference says."""
    if not rivals or not metrics["g_iou"]["n"]:
        return ""
    rows = [("G-IoU, this model", metrics["g_iou"], True)]
    rows += [(NAMES[f"{b}_g_iou"], metrics[f"{b}_g_iou"], False) for b in rivals]
    said = []
    for b in rivals:
        over = metrics[f"g_iou_over_{b}"]
        if not over["n"]:
            continue
        verdict = "above" if over["low"] > 0 else "below" if over["high"] < 0 else ""
        verdict = f"clearly {verdict}" if verdict else "not clearly different from"
        said.append(
            f"{verdict} <i>{html.escape(NAMES[f'{b}_g_iou'])}</i> (difference "
            f"{_signed(over['mean'])}, interval {_signed(over['low'])} to {_signed(over['high'])})"
        )
    return (
        bar_chart(rows)
        + f"<p>On the same samples the model is {'; '.join(said)}.</p>"
        + '<p class="small soft">The blind baselines see no picture and are fitted on training '
        "samples. The constant answer names the same structures at their mean boxes every time; "
        "the other is told the reference's mentions and puts each at the mean box of its class."
        "</p>"
    )


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""

    def points(key: str) -> list[tuple[float, float]]:
        rows = ((row["step"], row.get(key)) for row in history)
        return [
            (float(step), float(value))
            for step, value in rows
            if isinstance(value, int | float) and math.isfinite(value)
        ]

    keys = sorted({key for row in history for key in row})
    losses = {"all": points("train/loss"), "validation": points("val/loss")}
    losses |= {
        key.removeprefix("train/loss/"): points(key)
        for key in keys
        if key.startswith("train/loss/")
    }
    scores = {
        NAMES.get(key.removeprefix("val/"), key.removeprefix("val/")): points(key)
        for key in keys
        if key in ("val/g_iou", "val/matched_iou", "val/mask_g_iou", "val/mask_dice")
    }
    charts = [
        line_chart("Loss", losses),
        line_chart("Validation G-IoU, %", scores, percent=True),
        line_chart("Dice loss of masks", {"dice": points("train/mask_dice")}),
        line_chart("Learning rate", {"lr": points("train/lr")}),
    ]
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    figures = "".join(f"<div>{chart}</div>" for chart in charts)
    return f'<section><h2>Training</h2><div class="curves">{figures}</div></section>'


def _breakdown(metrics: Mapping[str, Any]) -> str:
    tables = []
    for group in ("task", "language", "modality", "answer_type"):
        found = metrics.get(f"by_{group}", {})
        columns = [c for c in GROUP_COLUMNS if any(row.get(c) for row in found.values())]
        if not columns:
            continue
        head = "".join(f"<th>{html.escape(NAMES[c])}</th>" for c in columns)
        rows = "".join(
            f"<tr><td>{html.escape(value)}</td>"
            + "".join(_cell(figures.get(c)) for c in columns)
            + "</tr>"
            for value, figures in found.items()
        )
        tables.append(
            f"<h3>By {group.replace('_', ' ')}</h3>"
            f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
    if definitions := metrics.get("by_definition"):
        rows = "".join(
            f"<tr><td>{html.escape(name.replace('_', ' '))}</td>"
            + "".join(_cell(found.get(c)) for c in DEFINED)
            + "</tr>"
            for name, found in definitions.items()
        )
        head = "".join(f"<th>{html.escape(NAMES[c])}</th>" for c in DEFINED)
        tables.append(
            "<h3>By definition of G-IoU: not on one scale</h3>"
            f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
    classes = [(name, row) for name, row in metrics.get("by_class", {}).items() if "iou" in row]
    classes.sort(key=lambda item: (-item[1]["iou"]["n"], item[0]))
    if classes:
        dice = any("mask_dice" in figures for _, figures in classes)
        told = any("baseline_told_mentions_iou" in figures for _, figures in classes)
        rows = "".join(
            f"<tr><td>{html.escape(class_label(name))}</td><td>{figures['iou']['n']:,}</td>"
            f"<td>{_number(figures['iou'], interval=True)}"
            f'<span class="meter"><i style="width:{100 * figures["iou"]["mean"]:.0f}%"></i></span>'
            "</td>"
            + (_cell(figures.get("baseline_told_mentions_iou")) if told else "")
            + (_cell(figures.get("mask_dice")) if dice else "")
            + "</tr>"
            for name, figures in classes
        )
        extra = f"<th>{NAMES['baseline_told_mentions_g_iou']}</th>" if told else ""
        extra += "<th>Dice of masks</th>" if dice else ""
        tables.append(
            "<h3>By class: mean IoU over reference entities, unmatched ones 0</h3>"
            f"<table><thead><tr><th></th><th>samples</th><th>IoU</th>{extra}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
    return f"<section><h2>Broken down</h2>{''.join(tables)}</section>" if tables else ""


def _counts(counts: Mapping[str, int]) -> str:
    rows = "".join(
        f"<div><dt>{html.escape(name.replace('_', ' '))}</dt><dd>{value:,}</dd></div>"
        for name, value in counts.items()
    )
    return (
        "<section><h2>Counted along the way</h2>"
        '<p class="soft small">What was evaluated, and whatever was cut, left out or could not be '
        f'read.</p><dl class="counts">{rows}</dl></section>'
    )
