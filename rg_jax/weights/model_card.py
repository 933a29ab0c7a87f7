"""The README of an exported model: what it is, what it was trained on, how it writes places."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rg_jax import run as run_lib
from rg_jax.errors import UserError
from rg_jax.grounding.format import BOX_OPEN, MASK_OPEN, GroundingFormat
from rg_jax.grounding.prompts import WORDINGS
from rg_jax.model.config import ModelConfig, count_params
from rg_jax.weights.source import Source

# Metrics that a card shows, where an evaluation has them; all others lie in metrics.json.
_SHOWN = {
    "g_iou": "G-IoU",  # of the boxes around masks where only masks are written, see _title
    "f1_50": "F1 at IoU ≥ 0.5",
    "mask_g_iou": "Mask G-IoU",
    "mask_dice": "Dice of matched entities",
    "text_f1_caption": "Captions, token F1",
    "text_f1_open": "Open questions, token F1",
    "text_accuracy_closed": "Closed questions, accuracy",
    "baseline_g_iou": "G-IoU of the best constant answer (never sees a picture)",
}


def facts_of_run(folder: Path, config: Any, step: int) -> dict[str, Any]:
    """What a card tells of a run: data, split, metrics, as its folder has them.

    No path and nothing of a patient is among them.
    """
    facts: dict[str, Any] = {"name": config.name or "rg_jax", "step": step}
    facts["from_scratch"] = _from_scratch(folder, config)
    facts["image_style"] = config.data.image_style
    facts["languages"] = list(config.data.languages)
    for which in ("train", "val", "test"):
        facts[which] = _parts(config, which)
    facts["earlier"] = list(dict.fromkeys(_earlier(folder, config)))
    tasks = dict.fromkeys(task for part in config.data.train for task in part["tasks"])
    facts["tasks"] = list(tasks)
    facts["prompts"] = {
        task: {
            language: WORDINGS[language].prompts[task]
            for language in config.data.languages
            if WORDINGS[language].prompts.get(task)
        }
        for task in tasks
    }
    path = folder / "metrics.json"
    if path.is_file():
        try:
            facts["metrics"] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            facts["metrics_damaged"] = True
    return facts


def _parts(config: Any, which: str) -> list[str]:
    """The data of "train", "val" or "test", as a card names them."""

    def name(part: Any) -> str:
        return f"{part['name']}/{part['config']}" if part.get("config") else part["name"]

    return [
        f"{name(part)} ({part['split']}): {', '.join(part['tasks'])}" for part in config.data[which]
    ]


def _starts(folder: Path, config: Any) -> list[tuple[Path, Any] | None]:
    """(folder, config) of the runs that a run began with; None for other weights.

    A run that cannot be found any more counts as another model's weights.
    """
    found: list[tuple[Path, Any] | None] = []
    for path in filter(None, (config.weights, config.encoder_weights)):
        start = Path(path) if Path(path).is_absolute() else Path.cwd() / path
        try:
            known = (start / "config.json").is_file() and start.resolve() != folder.resolve()
            found.append((start, run_lib.load_config(start)) if known else None)
        except (OSError, UserError):
            found.append(None)
    return found


def _from_scratch(folder: Path, config: Any) -> bool:
    """Whether nothing of another model is in these weights, through all runs before this one."""
    return all(start is not None and _from_scratch(*start) for start in _starts(folder, config))


def _earlier(folder: Path, config: Any) -> Iterator[str]:
    """What the runs before this one were trained on, the first run first."""
    for start in _starts(folder, config):
        if start is not None:
            yield from _earlier(*start)
            yield from _parts(start[1], "train")


def model_card(source: Source, model: ModelConfig, dtype: str) -> str:
    """The card as Markdown, with the header that model hubs read."""
    facts = source.facts
    name = facts.get("name", Path(source.path).name)
    scratch = facts.get("from_scratch", False)
    licence = (
        "It was trained from random weights."
        if scratch
        else "It derives from Google's PaliGemma 2, whose Gemma licence applies, unless the weights"
        " it began with were another's: then theirs applies."
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        f"license: {'other' if scratch else 'gemma'}",
        "tags: [radiology, visual-grounding, paligemma2]",
        "---",
        "",
        f"# {name}",
        "",
        "**Not a medical device.** For research only: what it writes must not be used for "
        "diagnosis, treatment or any other clinical decision.",
        "",
        f"PaliGemma 2 with {count_params(model):,} parameters, {model.img.image_size} pixels, "
        f"{dtype}, exported by rg_jax. {licence}",
        "",
        "## Data",
        "",
        *_data(facts),
        "",
        "## Figures",
        "",
        *_metrics(facts),
        "",
        "## How it writes places",
        "",
        *_format(source.fmt, facts),
        "",
        "## Use",
        "",
        *_use(source, model, facts),
    ]
    return "\n".join(lines) + "\n"


def _data(facts: Mapping[str, Any]) -> list[str]:
    if "train" not in facts:
        return ["Converted from other weights: their own card says what they were trained on."]
    rows = [f"- before, by the run it began with: {part}" for part in facts.get("earlier", ())]
    rows += [f"- {which}: {part}" for which in ("train", "val", "test") for part in facts[which]]
    rows += [f"- languages: {', '.join(facts['languages'])}", f"- step: {facts['step']:,}"]
    return rows


def _metrics(facts: Mapping[str, Any]) -> list[str]:
    metrics = facts.get("metrics")
    if facts.get("metrics_damaged"):
        return ["The run's metrics.json is damaged: no figures can be shown."]
    if not metrics:
        return ["Not evaluated by this project."]
    where = metrics.get("set", {})
    told = ", ".join(f"{k} {where[k]}" for k in ("data", "split", "step") if k in where)
    if where.get("n", 0) < where.get("total", 0):
        told += f"; a part of the set, {where['n']:,} of {where['total']:,} samples"
    rows = [
        f"Measured on: {told or 'the last evaluated set'}. 95 % bootstrap interval.",
        "",
        "| figure | mean | interval | n |",
        "|---|---|---|---|",
    ]
    for key, title in _SHOWN.items():
        value = metrics.get(key)
        if isinstance(value, dict) and value.get("n") and value.get("mean") is not None:
            low, high = (f"{100 * value[end]:.1f}" for end in ("low", "high"))
            title = _title(key, title, facts)
            rows.append(f"| {title} | {100 * value['mean']:.1f} | {low} – {high} | {value['n']} |")
    return rows


def _title(key: str, title: str, facts: Mapping[str, Any]) -> str:
    """A model that writes no boxes is measured by those around its masks: the card says so."""
    around = key in ("g_iou", "f1_50") and not _writes(facts, "box") and _writes(facts, "mask")
    return f"{title}, of the boxes around its masks" if around else title


def _writes(facts: Mapping[str, Any], what: str) -> bool:
    """Whether a task that was trained writes boxes ("box") or masks ("mask"); unknown: yes."""
    if not facts.get("tasks"):
        return True
    tasks = {"box": ("detect", "joint", "slake"), "mask": ("segment", "joint")}[what]
    return any(task.startswith(tasks) for task in facts["tasks"])


def _format(fmt: GroundingFormat | None, facts: Mapping[str, Any]) -> list[str]:
    if fmt is None:
        return ["It adds no tokens; `<loc0000>` … `<loc1023>` are PaliGemma's own."]
    rows = [
        f"- extra tokens behind `<image>`, in the order of their ids: "
        f"{', '.join(f'`{token}`' for token in fmt.extra_tokens)}"
    ]
    boxes = BOX_OPEN in fmt.extra_tokens and _writes(facts, "box")
    masks = MASK_OPEN in fmt.extra_tokens and _writes(facts, "mask")
    if boxes:
        a, b = (
            ("y_min x_min", "y_max x_max")
            if fmt.box_order == "yxyx"
            else ("x_min y_min", "x_max y_max")
        )
        rows += [
            "- `<p bbox=<locA><locB><locC><locD> id=<segNNN>>mention</p>`: "
            f"{a} {b} in {fmt.bins} bins per side; NNN: the class",
            "- a mark without ` id=` is "
            + ("malformed" if fmt.id_required else "an entity outside the classes"),
        ]
    if masks:
        rows.append("- `<seg>mention</seg>`: the k-th `</seg>` belongs to the k-th mask")
    if boxes and masks and any(task.startswith("joint") for task in facts.get("tasks", ())):
        rows.append(
            "- asked for both, `<p bbox=… id=…><seg>mention</seg></p>`: a box and a mask of one "
            "mention"
        )
    rows += _prompts(facts)
    return [*rows, "", "The same stands in `grounding_format.json`."]


def _prompts(facts: Mapping[str, Any]) -> list[str]:
    """How each trained task is asked for: without these very words it is not recognised."""
    return [
        f"- prompt of `{task}` ({language}): `{text}`"
        for task in facts.get("tasks", ())
        for language, text in sorted(facts.get("prompts", {}).get(task, {}).items())
    ]


def _use(source: Source, model: ModelConfig, facts: Mapping[str, Any]) -> list[str]:
    style = facts.get("image_style")
    pixels = (
        f"Trained on slices normalised in the style `{style}` (see rg_jax/data/images.py): give "
        "such `pixel_values` in [-1, 1]; the image processor beside it is for ordinary pictures."
        if style
        else "`pixel_values` lie in [-1, 1]."
    )
    rows = [
        "```python",
        "from transformers import AutoProcessor, PaliGemmaForConditionalGeneration",
        "",
        "model = PaliGemmaForConditionalGeneration.from_pretrained(",
        '    FOLDER, attn_implementation="eager"',
        ")",
        "processor = AutoProcessor.from_pretrained(FOLDER)",
        'inputs = processor(images=image, text="<image>" + prompt, return_tensors="pt")',
        "inputs.pop('labels', None)",
        "```",
        "",
        f"- {pixels}",
        "- `token_type_ids` (the processor gives them) must reach the model: without them it reads "
        "the prompt causally, which it was not trained for.",
        '- `attn_implementation="eager"`: other kernels leave out the attention soft-cap.',
        f"- The logits are {_cap(model)}; `final_logit_softcapping` in config.json says so.",
    ]
    if source.masks is not None:
        rows.append(
            f"- The mask decoder (kind `{source.masks.kind}`) lies in `mask_decoder.safetensors`; "
            "rg_jax reads it, `transformers` does not know it."
        )
    return rows


def _cap(model: ModelConfig) -> str:
    cap = model.llm.final_softcap
    return "not capped" if cap is None else f"capped at {cap:g}"
