"""Published figures of RadGrounder, and which of them may stand beside ours.

`comparable(metrics)` takes the content of a `metrics.json` and returns one row for each published
figure of the same data set, in this form (it is stored in `metrics.json` under "published"):

    {"metric": "text_f1_open",        key of our figure at the top level of the same metrics.json
     "name": "F1, open questions",    for people
     "ours": {"mean", "low", "high", "n"} or null (not measured here),
     "theirs": 0.877,                 on the scale of ours: shares in [0, 1], CIDEr as it is
     "model": "all + detection, …",   which published model
     "source": "paper" or "released", a key of SOURCES
     "protocol": "…",                 on what theirs was measured
     "comparable": true or false,
     "why": ""}                       if not comparable: why, in plain words; else a caveat or ""

Scores of a judge are added to `metrics.json` later than the rest: call the function again then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rg_jax.evaluation import benchmarks

SOURCES = {
    "paper": "RadGrounder, MICCAI 2026, arXiv 2606.20477, table of results",
    "released": "figures that the authors give with the released checkpoints",
}
NAMES = {
    "text_cider_caption": "CIDEr, reports",
    "llm_score_caption": "LLMScore, reports",
    "text_f1_open": "F1, open questions",
    "text_f1_closed": "F1, closed questions",
    "text_f1_questions": "F1, open and closed questions together",
    "text_accuracy_open": "Accuracy, open questions",
    "text_accuracy_closed": "Accuracy, closed questions",
    "text_accuracy_questions": "Accuracy, open and closed questions together",
    "text_cider_open": "CIDEr, open questions",
    "text_cider_closed": "CIDEr, closed questions",
    "text_cider_questions": "CIDEr, open and closed questions together",
    "llm_score_open": "LLMScore, open questions",
    "llm_score_closed": "LLMScore, closed questions",
    "llm_score_questions": "LLMScore, open and closed questions together",
    "g_iou": "G-IoU",
}


class Figure(NamedTuple):
    """A published figure: data set, our key for it, value on our scale, model, source."""

    data: str
    metric: str
    value: float
    model: str
    source: str


# Columns of the paper's table: (data set, our key). Its figures are in %, None: not given.
_PAPER_COLUMNS = (
    ("refrad2d", "text_cider_caption"),
    ("refrad2d", "llm_score_caption"),
    ("refrad2d", "text_f1_open"),
    ("refrad2d", "g_iou"),
    ("slake", "text_f1_open"),
    ("slake", "text_accuracy_closed"),
    ("vqa_rad", "text_f1_questions"),
    ("vqa_rad", "text_accuracy_closed"),
)
_PAPER_ROWS: dict[str, tuple[float | None, ...]] = {
    "all + detection, frozen adapted SigLIP": (37.5, 30.3, 48.9, 43.6, 87.7, 90.3, 50.7, 64.7),
    "all + detection, adapted SigLIP unfrozen": (34.6, 28.0, 47.8, 43.4, 88.4, 90.8, 48.7, 62.7),
    "all + detection, original SigLIP unfrozen": (36.9, 29.9, 49.2, 45.2, 87.6, 91.7, 50.2, 64.5),
    "all + segmentation": (36.9, 30.1, 50.4, 36.9, 86.4, 89.6, 50.4, 65.9),
    "report + VQA only": (39.0, 30.7, 49.2, None, 19.2, 63.0, 39.6, 52.9),
    "SLAKE + VQA-RAD only": (0.1, 1.5, 15.7, None, 86.9, 88.4, 47.9, 68.1),
    "all, no grounding": (37.3, 30.6, 50.1, None, 87.2, 90.8, 49.2, 63.2),
    "report + VQA + detection": (39.2, 30.6, 49.1, 43.6, 18.3, 58.8, 40.2, 52.9),
    "PaliGemma 2 3B, untrained": (0.6, 2.6, 12.7, None, 24.5, 58.1, 37.9, 55.6),
    "Gemma 3 4B": (0.1, 21.7, 5.5, None, 40.2, 53.0, 33.6, 33.6),
    "MedGemma 4B": (0.4, 21.8, 9.0, None, 72.3, 87.6, 49.9, 69.1),
}
# Released checkpoints: CIDEr, F1, accuracy as they are, LLMScore from 1 to 5.
_RELEASED_COLUMNS = ("text_cider", "text_f1", "text_accuracy", "llm_score")
_RELEASED_ROWS: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("detection", "slake", "open", (3.00, 0.87, 0.83, 4.52)),
    ("detection", "slake", "closed", (2.33, 0.91, 0.91, 4.65)),
    ("detection", "vqa_rad", "questions", (0.99, 0.50, 0.44, 3.22)),
    ("detection", "vqa_rad", "open", (0.625, 0.281, 0.149, 2.63)),
    ("detection", "vqa_rad", "closed", (1.250, 0.659, 0.648, 3.64)),
    ("segmentation", "slake", "open", (3.02, 0.86, 0.82, 4.49)),
    ("segmentation", "slake", "closed", (2.29, 0.90, 0.90, 4.59)),
    ("segmentation", "vqa_rad", "questions", (1.00, 0.50, 0.45, 3.30)),
    ("segmentation", "vqa_rad", "open", (0.552, 0.268, 0.139, 2.76)),
    ("segmentation", "vqa_rad", "closed", (1.307, 0.670, 0.660, 3.68)),
)


def _table() -> tuple[Figure, ...]:
    figures = [
        Figure(data, metric, round(value / 100, 6), model, "paper")
        for model, row in _PAPER_ROWS.items()
        for (data, metric), value in zip(_PAPER_COLUMNS, row, strict=True)
        if value is not None
    ]
    for model, data, kind, row in _RELEASED_ROWS:
        for metric, value in zip(_RELEASED_COLUMNS, row, strict=True):
            value = round((value - 1) / 4, 6) if metric == "llm_score" else value
            figures.append(
                Figure(data, f"{metric}_{kind}", value, f"released {model} checkpoint", "released")
            )
    return tuple(figures)


FIGURES = _table()
_PROTOCOLS = {
    "slake": "SLAKE 1.0, English questions of validate.json (1,053)",
    "vqa_rad": "VQA-RAD, image-disjoint test file (735 questions, 432 of them closed)",
    "refrad2d": "RefRad2D test set, 2,000 samples a task, private",
}
_CAVEATS = {
    "slake": "validation questions, on which checkpoints may have been chosen",
    "vqa_rad": "theirs chose the checkpoint on these very questions",
}


def comparable(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each published figure of this data set; see the head of this file."""
    data = str(metrics["set"]["data"]).partition("/")[0]
    rows = []
    for figure in FIGURES:
        if figure.data != data:
            continue
        ours = metrics.get(figure.metric)
        ours = ours if ours and ours.get("n") else None
        why = _why_not(figure, metrics, ours)
        rows.append(
            {
                "metric": figure.metric,
                "name": NAMES[figure.metric],
                "ours": ours,
                "theirs": figure.value,
                "model": figure.model,
                "source": figure.source,
                "protocol": _PROTOCOLS[data],
                "comparable": not why,
                "why": why or _caveat(data, metrics["set"]),
            }
        )
    return rows


def _caveat(data: str, about: Mapping[str, Any]) -> str:
    seen = (
        "this run has seen these questions while training" if about.get("seen_in_training") else ""
    )
    return "; ".join(filter(None, (_CAVEATS.get(data, ""), seen)))


def summary(metrics: Mapping[str, Any]) -> str:
    """The published figures beside ours for a terminal, in %; those not comparable in one line."""
    rows = metrics.get("published", [])
    fitting = [row for row in rows if row["comparable"]]
    lines = []
    if fitting:
        lines.append("published figures beside ours, in %:")
    for row in fitting:
        figure, theirs = row["ours"], 100 * row["theirs"]
        ours = (
            f"{100 * figure['mean']:6.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
        )
        lines.append(
            f"  {row['name']:<45}{ours:<24} n={figure['n']}  {theirs:6.1f}  {row['model']}"
        )
    for why in dict.fromkeys(row["why"] for row in rows if not row["comparable"]):
        which = dict.fromkeys(row["name"] for row in rows if row["why"] == why)
        lines.append(f"not beside ours ({why}): published {', '.join(which)}")
    lines += [f"caveat: {why}" for why in dict.fromkeys(r["why"] for r in fitting) if why]
    return "\n".join(lines)


def _why_not(figure: Figure, metrics: Mapping[str, Any], ours: Mapping | None) -> str:
    """Why two figures may not be compared; empty if they may."""
    about = metrics["set"]
    if ours is None:
        return "not measured here"
    if figure.data == "refrad2d":
        if figure.metric == "g_iou":
            return (
                "theirs is by a scorer that mixes up places, with embeddinggemma-300m, on a test "
                f"set that is not public; ours by definition {about['definition']}, mentions "
                f"compared by {about['embedder']}"
            )
        return "the published test set is not public: these are other pictures"
    protocol = benchmarks.BENCHMARKS[f"{figure.data}_published"]
    if about["split"].partition("[")[0] != protocol.split:
        return f"theirs is on {protocol.file}, ours on the split {about['split']}"
    if (about.get("benchmark") or {}).get("name") not in (protocol.name, figure.data):
        return f"not by the published protocol: run --benchmark={protocol.name}"
    if about["n"] != protocol.questions:
        return f"not the whole set: {about['n']:,} of {protocol.questions:,} questions"
    return ""
