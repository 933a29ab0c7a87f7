"""The section of the report page that sets published figures beside ours.

The rows come from `metrics.json` ("published", see `published_figures`). A figure that was measured
on something else is shown all the same, with a plain word on why the two may not be compared.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rg_jax.evaluation.published_figures import SOURCES


def published(rows: Sequence[Mapping[str, Any]]) -> str:
    """The section as HTML; empty where nothing is published for this data set.

    Figures are shown in %, those of the metrics that were measured here first; the others are
    only named.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["metric"], []).append(row)
    measured = [group for group in groups.values() if group[0]["ours"]]
    missing = [group[0]["name"] for group in groups.values() if not group[0]["ours"]]
    if not groups:
        return ""
    parts = [
        "<section><h2>Beside the published figures</h2>",
        f'<p class="soft small">{_protocols(rows)}</p>',
    ]
    # What may be compared stands first, whatever the order of the rows.
    measured.sort(key=lambda group: not any(row["comparable"] for row in group))
    if measured:
        parts.append('<div class="groups">' + "".join(_group(group) for group in measured))
        parts.append("</div>")
    if missing:
        parts.append(
            '<p class="soft small">Published, but not measured here: '
            f"{html.escape('; '.join(missing))}.</p>"
        )
    return "".join([*parts, "</section>"])


def _protocols(rows: Sequence[Mapping[str, Any]]) -> str:
    protocols = "; ".join(dict.fromkeys(row["protocol"] for row in rows))
    sources = "; ".join(SOURCES.get(s, s) for s in dict.fromkeys(row["source"] for row in rows))
    return html.escape(f"Theirs on {protocols}. From: {sources}. All figures in %.")


def _group(rows: Sequence[Mapping[str, Any]]) -> str:
    """One metric: ours with its interval, then theirs from best to worst."""
    ours = rows[0]["ours"]
    lines = [
        '<tr class="ours"><td>this model</td>'
        f'<td class="main">{100 * ours["mean"]:.1f}</td><td class="ci">'
        f"{100 * ours['low']:.1f} to {100 * ours['high']:.1f}, n={ours['n']:,}</td></tr>"
    ]
    reasons = list(dict.fromkeys((row["comparable"], row["why"]) for row in rows))
    for row in sorted(rows, key=lambda row: -row["theirs"]):
        word = "" if len(reasons) == 1 else html.escape(_word(row["comparable"], row["why"]))
        lines.append(
            f"<tr><td>{html.escape(row['model'])}</td><td>{100 * row['theirs']:.1f}</td>"
            f'<td class="ci why">{word}</td></tr>'
        )
    said = ""
    if len(reasons) == 1:
        said = f'<p class="small">{html.escape(_word(*reasons[0]))}</p>'
    return (
        f"<div><h3>{html.escape(rows[0]['name'])}</h3>{said}"
        f"<table><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _word(comparable: bool, why: str) -> str:
    if comparable:
        return f"Comparable; {why}." if why else "Comparable."
    return f"Not comparable: {why}."
