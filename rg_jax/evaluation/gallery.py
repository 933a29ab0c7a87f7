"""The gallery of the report page: which samples it shows, their pictures, one card for each."""

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rg_jax.config import write_aside
from rg_jax.data.images import MR_PERCENTILES, WINDOWS, display_image
from rg_jax.evaluation import text_metrics
from rg_jax.evaluation.judge import Verdict
from rg_jax.evaluation.overlays import draw
from rg_jax.evaluation.results import Result
from rg_jax.evaluation.viewer import (
    NO_CLASS,
    NO_PICTURES,
    Pictures,
    class_key,
    class_label,
    layers,
    script_of,
)
from rg_jax.grounding import anatomy
from rg_jax.grounding.spans import Entity

# Broken marks told per sample; a young model breaks all of them.
MOST_BROKEN = 4


def badness(result: Result) -> tuple[float, str]:
    """Sort key, worst first: G-IoU where the reference has places, else token F1.

    Without reference places an entity is a false one, and such a sample counts as 0.
    """
    if result.grounded:
        value = result.score.g_iou or 0.0
    elif result.entities:
        value = 0.0
    else:
        value = text_metrics.f1(text_metrics.final_answer(result.text), result.sample.text)
    return value, result.sample.id


def choose(results: Iterable[Result], most: int = 120) -> list[Result]:
    """Results for the gallery, worst first: all, or the worst third, the best third and an even
    selection of what lies between."""
    ordered = sorted(results, key=badness)
    if len(ordered) <= most:
        return ordered
    third = most // 3
    middle = most - 2 * third
    between = ordered[third : len(ordered) - third]
    picked = [between[int((k + 0.5) * len(between) / middle)] for k in range(middle)]
    return [*ordered[:third], *picked, *ordered[len(ordered) - third :]]


def window_name(record: Mapping[str, Any], window: str) -> str:
    """What `display_image` shows of a record, in words."""
    if record["image"].shape[2] == 3:
        return f"{record['modality']}, picture as it is".lstrip(", ")
    if record["modality"] == "CT":
        width, level = WINDOWS[window]
        return f"CT {window}, width {width:g} level {level:g} HU"
    low, high = MR_PERCENTILES
    return f"{record['modality']}, percentiles {low:g} to {high:g}".lstrip(", ")


def write_overlays(
    directory: str | Path,
    results: Iterable[Result],
    record_of: Callable[[str], Mapping[str, Any]],
    window: str = "soft",
) -> dict[str, str]:
    """Draw each result into `directory/overlays/`; returns sample id → path below `directory`.

    `record_of` gives the decoded record of a record id. PNGs that an earlier evaluation left in
    that folder are removed. Raises UserError for an unknown CT window.
    """
    folder = Path(directory) / "overlays"
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for number, result in enumerate(results):
        record = record_of(result.sample.record_id)
        row, column = (float(mm) for mm in record.get("spacing_mm", (0.0, 0.0)))
        png = draw(
            display_image(record, window),
            result.sample.entities,
            result.entities,
            matches=[(m.reference, m.predicted, m.iou) for m in result.score.matches],
            reference_masks=result.reference_masks,
            predicted_masks=result.masks,
            language=result.sample.language,
            window=window_name(record, window),
            spacing_mm=(row, column),
        )
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", result.sample.id)[-80:]
        name = f"{number:04d}-{readable}.png"
        write_aside(folder / name, png)
        names[result.sample.id] = f"overlays/{name}"
    for stale in folder.glob("*.png"):
        if f"overlays/{stale.name}" not in names.values():
            stale.unlink()
    return names


def gallery(
    results: Sequence[Result],
    overlays: Mapping[str, str],
    n: int,
    pictures: Pictures = NO_PICTURES,
    judged: Mapping[str, Verdict] | None = None,
) -> str:
    """The section of the page: filters, one card per result, the values of their pictures.

    `n` samples were evaluated. `overlays`: sample id → drawn picture. `pictures`: values by record
    id; a record without any is shown as drawn. `judged`: sample id → a judge's verdict.
    """
    if not results:
        return ""
    numbers = {name: number for number, name in enumerate(pictures.values)}
    cards = "\n".join(
        card(
            result,
            overlays.get(result.sample.id),
            pictures.values.get(result.sample.record_id),
            numbers.get(result.sample.record_id),
            (judged or {}).get(result.sample.id),
        )
        for result in results
    )
    return (
        f"<section><h2>Samples, worst to best</h2>{_about(results, n, pictures)}"
        f'{_filters(results)}<div class="cards">{cards}</div>'
        '<p class="soft" id="f-none" hidden>No sample is left by these filters.</p></section>'
        + "\n".join(script_of(numbers[name], values) for name, values in pictures.values.items())
    )


def _about(results: Sequence[Result], n: int, pictures: Pictures) -> str:
    """How the gallery is to be read, and what of the set it does not show."""
    notes = []
    if len(results) < n:
        notes.append(
            f"{len(results):,} of {n:,} samples are shown: the worst, the best, and an even "
            "selection between."
        )
    if pictures.reduced:
        notes.append(
            f"To keep this page small, {pictures.reduced:,} of {len(pictures.values):,} pictures "
            "are held here at a lower resolution."
        )
    if pictures.left_out:
        notes.append(
            f"{len(pictures.left_out):,} pictures found no room here and are shown as drawn, "
            "without a window to set."
        )
    return (
        '<p class="soft small">Reference <mark class="r">green, solid</mark>, prediction '
        '<mark class="p">red, dashed</mark>; the small number is the IoU of a matched entity in '
        "%, – marks one without counterpart. Samples whose reference holds no place are ordered "
        f"by token F1, and by 0 if places were predicted. {' '.join(notes)}</p>"
    )


def _options(names: Mapping[str, str]) -> str:
    return "".join(
        f'<option value="{_attribute(value)}">{html.escape(name)}</option>'
        for value, name in sorted(names.items(), key=lambda item: item[1].casefold())
    )


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)


def _filters(results: Sequence[Result]) -> str:
    """What the page's script needs to choose, order and switch; hidden without it."""
    columns = {
        "task": {r.sample.task: r.sample.task for r in results},
        "modality": {_modality(r): _modality(r) for r in results},
        "language": {r.sample.language: r.sample.language for r in results},
        "class": {key: class_label(key) for r in results for key in _classes(r)},
    }
    selects = "".join(
        f'<label>{name.capitalize()} <select id="f-{name}"><option value="">all</option>'
        f"{_options(values)}</select></label>"
        for name, values in columns.items()
    )
    switched = [("reference", "Reference"), ("prediction", "Prediction"), ("boxes", "Boxes")]
    if any(r.masks or r.reference_masks for r in results):
        switched.append(("masks", "Masks"))
    switches = "".join(
        f'<label><input type="checkbox" data-layer="{key}" checked>{name}</label>'
        for key, name in [*switched, ("labels", "Labels")]
    )
    return (
        f'<div class="filters" hidden><div class="row">{selects}'
        '<label>Order <select id="f-order"><option value="worst">worst first</option>'
        '<option value="best">best first</option></select></label>'
        '<button type="button" id="f-reset">Show all</button>'
        '<span class="soft" id="f-shown" role="status"></span></div>'
        f'<div class="row switches"><span class="soft">On the pictures</span>{switches}'
        '<span class="soft tip">drag a picture with the mouse to set its window, double-click to '
        "set it back</span></div>"
        '<p class="soft small" id="f-old" hidden>This browser cannot unpack the pictures\' values: '
        "they are shown as drawn.</p></div>"
    )


def _modality(result: Result) -> str:
    return result.sample.modality or "unknown"


def _classes(result: Result) -> list[str]:
    """Schema names of the classes that the reference or the prediction holds."""
    found = {class_key(e) for e in (*result.sample.entities, *result.entities)}
    return sorted(found - {NO_CLASS})


def card(
    result: Result,
    overlay: str | None,
    values: Mapping[str, Any] | None = None,
    number: int | None = None,
    verdict: Verdict | None = None,
) -> str:
    """One result: picture, prompt, both texts with coloured mentions, and what was broken.

    `values`: its picture's, which the page holds under `number`.
    """
    sample, score = result.sample, result.score
    if result.grounded:
        figure = f"G-IoU {100 * (score.g_iou or 0):.1f}"
    elif result.entities:
        figure = f"{len(result.entities)} false entit{'y' if len(result.entities) == 1 else 'ies'}"
    else:
        figure = f"F1 {100 * badness(result)[0]:.1f}"
    facts = [sample.task, sample.language, sample.modality, sample.answer_type]
    by_reference = {m.reference: m.iou for m in score.matches}
    by_predicted = {m.predicted: m.iou for m in score.matches}
    broken = ""
    if result.malformed:
        shown = result.malformed[:MOST_BROKEN]
        marks = ", ".join(
            f"{html.escape(m.kind)} <code>{html.escape(m.snippet[:60])}</code>" for m in shown
        )
        if len(result.malformed) > len(shown):
            marks += f" and {len(result.malformed) - len(shown)} more"
        broken = f'<div class="broken">Broken marks: {marks}</div>'
    counted = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sample.counts.items())
    counted = f'<div class="tag">{html.escape(counted)}</div>' if counted else ""
    language = _attribute(sample.language)
    data = {
        "task": sample.task,
        "language": sample.language,
        "modality": _modality(result),
        "classes": " ".join(_classes(result)),
        "picture": "" if number is None else str(number),
    }
    attributes = " ".join(f'data-{key}="{_attribute(value)}"' for key, value in data.items())
    return (
        f'<article class="card" {attributes}>{_picture(result, overlay, values)}'
        f'<div class="body"><h4><span class="id">{html.escape(sample.id)}</span>'
        f"<b>{figure}</b></h4>"
        f'<div class="tag">{html.escape(" · ".join(f for f in facts if f))}</div>'
        f'<h5>Prompt</h5><div class="prompt">{html.escape(sample.prefix.strip())}</div>'
        f'<h5>Generated</h5><div class="words" lang="{language}">'
        f"{coloured(result.text, result.entities, 'p', by_predicted)}</div>"
        f'<h5>Reference</h5><div class="words" lang="{language}">'
        f"{coloured(sample.text, sample.entities, 'r', by_reference)}</div>"
        f"{_verdict(verdict)}{broken}{counted}</div></article>"
    )


def _verdict(verdict: Verdict | None) -> str:
    """What a judge said of the answer, or why it said nothing that counts."""
    if verdict is None:
        return ""
    if verdict.score is None:
        return f'<div class="broken">No LLMScore: {html.escape(verdict.failure)}</div>'
    return (
        f"<h5>LLMScore {verdict.score} of 5</h5>"
        f'<div class="prompt">{html.escape(verdict.reason)}</div>'
    )


def _picture(result: Result, overlay: str | None, values: Mapping[str, Any] | None) -> str:
    """The drawn picture and, where the page holds its values, the layers that lie on them."""
    if not overlay and values is None:
        return ""
    drawn = ""
    if overlay:
        link = _attribute(overlay)
        alt = _attribute(f"Boxes of {result.sample.id}")
        drawn = f'<a class="drawn" href="{link}"><img src="{link}" alt="{alt}" loading="lazy"></a>'
    if values is None:
        return f'<div class="view">{drawn}</div>'
    wide, tall = values["view"]
    return (
        f'<div class="view">{drawn}<div class="stage" style="--ratio:{wide / tall:.4f}">'
        f"{layers(result, values['view'])}</div></div>"
    )


def coloured(
    text: str, entities: Sequence[Entity], side: str, iou_of: Mapping[int, float] | None
) -> str:
    """A text as HTML with its mentions coloured; `side` is "r" (reference) or "p" (predicted).

    `iou_of` gives the IoU of the matched ones; None: there is nothing that they could match.
    """
    if not text.strip():
        return '<span class="soft">(nothing)</span>'
    parts, position = [], 0
    for k, entity in sorted(enumerate(entities), key=lambda item: item[1].start):
        what = [anatomy.name_of(entity.class_id) if entity.class_id else "no class"]
        if entity.box is not None:
            what.append("box " + ", ".join(f"{edge:.3f}" for edge in entity.box))
        number = ""
        if iou_of is not None:
            matched = k in iou_of
            what.append(f"IoU {iou_of[k]:.2f}" if matched else "no counterpart")
            number = f"<sup>{100 * iou_of[k]:.0f}</sup>" if matched else "<sup>–</sup>"
        parts += [
            html.escape(text[position : entity.start]),
            f'<mark class="{side}" title="{html.escape("; ".join(what), quote=True)}">'
            f"{html.escape(text[entity.start : entity.end])}{number}</mark>",
        ]
        position = entity.end
    return "".join([*parts, html.escape(text[position:])])
