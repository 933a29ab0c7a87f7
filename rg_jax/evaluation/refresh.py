"""Writing an evaluation's page anew without model and data, when figures were added to it.

Beside `predictions.jsonl` and `metrics.json` an evaluation's folder keeps `page.json`: the facts at
the head of its page, which samples the gallery shows, their drawn pictures and their values.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rg_jax.config import write_aside
from rg_jax.errors import UserError
from rg_jax.evaluation import gallery, judge, page
from rg_jax.evaluation.published_figures import comparable
from rg_jax.evaluation.results import Result, read_results
from rg_jax.evaluation.score import write_metrics
from rg_jax.evaluation.viewer import Pictures

MATERIAL_FILE = "page.json"


def keep_material(
    directory: str | Path,
    run: Mapping[str, str],
    shown: Sequence[Result],
    overlays: Mapping[str, str],
    pictures: Pictures,
) -> None:
    """Write `page.json`. The arguments are those of `page.write_page`."""
    material = {
        "run": dict(run),
        "shown": [result.sample.id for result in shown],
        "overlays": dict(overlays),
        "pictures": pictures._asdict(),
    }
    text = json.dumps(material, ensure_ascii=False, allow_nan=False)
    write_aside(Path(directory) / MATERIAL_FILE, text + "\n")


def run_of(folder: Path) -> Path | None:
    """The run to which an evaluation's folder belongs: RUN of RUN/eval/<data>-<split>."""
    root = folder.absolute().parent.parent
    return root if (root / "config.json").exists() else None


def read_folder(folder: Path) -> tuple[list[Result], dict[str, Any]]:
    """Predictions and figures of an evaluation. Raises UserError naming what is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name that of an evaluation, RUN/eval/NAME")
    results = read_results(folder / "predictions.jsonl")
    return results, _read_json(folder / "metrics.json")


def refresh(folder: Path, metrics: Mapping[str, Any], results: Sequence[Result]) -> list[Path]:
    """Write new figures of an evaluation and its page; returns the pages.

    `results`: all of the evaluation. A page of an older version, without `page.json`, gets a
    gallery without pictures. Where the run's own figures are those of this evaluation, they and its
    page are written too. Published figures are compared again, as there may be more to compare.
    """
    before = _read_json(folder / "metrics.json")
    metrics = dict(metrics)
    if "published" in metrics:
        metrics["published"] = comparable(metrics)
    if (folder / MATERIAL_FILE).exists():
        material = _read_json(folder / MATERIAL_FILE)
        chosen = set(material["shown"])
        shown = [result for result in results if result.sample.id in chosen]
    else:
        material = {"run": {}, "overlays": {}, "pictures": {"values": {}}}
        shown = gallery.choose(results)
    pictures = Pictures(**material["pictures"])
    verdicts = judge.read_verdicts(folder / judge.VERDICTS_FILE)
    root = run_of(folder)
    history = page.read_history(root / "metrics.jsonl") if root else []

    def write(directory: Path, prefix: str) -> Path:
        overlays = {name: prefix + place for name, place in material["overlays"].items()}
        write_metrics(directory / "metrics.json", metrics)
        return page.write_page(
            directory, metrics, shown, overlays, material["run"], history, pictures, verdicts
        )

    pages = [write(folder, "")]
    # The root last: whether it shows this evaluation is known only from the figures it had.
    if root and (root / "metrics.json").exists() and _read_json(root / "metrics.json") == before:
        pages.append(write(root, f"{folder.absolute().relative_to(root).as_posix()}/"))
    return pages


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run the evaluation first") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); run the evaluation again") from None
