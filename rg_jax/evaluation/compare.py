"""Two evaluations of one data set against each other: paired differences, and where they disagree.

Both are cut down to the samples that they share, scored in the same way, and resampled together:
what is hard for both does not hide a difference. Written are `compare.json`, and `index.html` with
the samples on which the two differ most.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rg_jax import run as run_lib
from rg_jax.config import write_aside
from rg_jax.data.sources import RecordSource, open_source
from rg_jax.errors import UserError
from rg_jax.evaluation import compare_page, figures
from rg_jax.evaluation.bootstrap import RESAMPLES, Statistic, differences, intervals
from rg_jax.evaluation.embedder import Embedder, load_embedder
from rg_jax.evaluation.folders import asides, check_replaceable, swap
from rg_jax.evaluation.gallery import badness
from rg_jax.evaluation.giou import DEFINITIONS
from rg_jax.evaluation.results import Result, read_results, rescore
from rg_jax.evaluation.score import GROUPS, rows_by
from rg_jax.grounding import anatomy

SHOWN = 40  # samples on the page
OURS = ("compare.json", "index.html", "a", "b")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation's folder as it was written: `about` is `set` of its metrics.json."""

    label: str
    folder: Path
    about: dict[str, Any]
    results: dict[str, Result]

    def __str__(self) -> str:
        return f"{self.label}: {self.about['data']} {self.about['split']}, {len(self.results):,}"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two evaluations on the samples that they share, both in the order of the sample ids."""

    a: Evaluation
    b: Evaluation
    results_a: list[Result]
    results_b: list[Result]
    notes: list[str]  # in what else the two differ

    @property
    def only(self) -> tuple[int, int]:
        """How many samples only the one and only the other has."""
        shared = len(self.results_a)
        return len(self.a.results) - shared, len(self.b.results) - shared

    def rescored(self, embedder: Embedder, definition: str) -> Pair:
        """Both scored in one and the same way."""
        a, b = (
            [rescore(result, embedder, definition) for result in results]
            for results in (self.results_a, self.results_b)
        )
        return dataclasses.replace(self, results_a=a, results_b=b)


def evaluations(path: Path) -> dict[str, Path]:
    """The evaluations of a run's folder by name, or the one that `path` itself is.

    Raises UserError if there is none.
    """
    if (path / "predictions.jsonl").is_file():
        return {path.name: path}
    found = {p.parent.name: p.parent for p in sorted(path.glob("eval/*/predictions.jsonl"))}
    if not found:
        raise UserError(
            f"{path} holds no evaluation: name the folder of a run that was evaluated (python -m "
            "rg_jax.evaluate --workdir=RUN), or a folder with predictions.jsonl"
        )
    return found


def read(folder: Path, label: str) -> Evaluation:
    """An evaluation from its folder. Raises UserError naming the file that cannot be read."""
    try:
        about = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["set"]
    except OSError as error:
        raise UserError(f"cannot read {folder / 'metrics.json'}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'metrics.json'} is no evaluation's: run the evaluation again"
        ) from None
    results = read_results(folder / "predictions.jsonl")
    return Evaluation(label, folder, about, {r.sample.id: r for r in results})


def pair_up(a: Evaluation, b: Evaluation) -> Pair:
    """The two on the samples that they share.

    Raises UserError, saying what differs, if they share none or their references are not the same.
    """
    notes = []
    if not a.results.keys() & b.results.keys():
        b, tasks = _renamed(a, b)
        notes += tasks
    shared = sorted(a.results.keys() & b.results.keys())
    if not shared:
        raise UserError(f"the two share no sample ({a}; {b}): evaluate both on one data set")
    other = [name for name in shared if _asked(a.results[name]) != _asked(b.results[name])]
    if other:
        raise UserError(
            f"{len(other)} of {len(shared)} shared samples have other references in the two, for "
            f"example {other[0]}: they were evaluated on data that was built otherwise"
        )
    for field in ("data", "split", "definition", "embedder", "benchmark", "marks_removed"):
        first, second = (_told(side.about.get(field)) for side in (a, b))
        if first != second:
            notes.append(f"{field}: {first} and {second}")
    prompts = sum(a.results[n].sample.prefix != b.results[n].sample.prefix for n in shared)
    if prompts:
        notes.append(f"{prompts:,} of {len(shared):,} samples were put with other prompts")
    pair = Pair(a, b, [a.results[n] for n in shared], [b.results[n] for n in shared], notes)
    for side, count in zip((a, b), pair.only, strict=True):
        if count:
            notes.append(f"{count:,} samples only in {side.label}: left out")
    return pair


def _asked(result: Result) -> tuple:
    """What is wanted: a text and the places in it, whether by box or by mask."""
    sample = result.sample
    places = tuple((e.start, e.end, e.class_id, e.box) for e in sample.entities)
    return sample.text, places, sample.answer_type, sample.language


def _renamed(a: Evaluation, b: Evaluation) -> tuple[Evaluation, list[str]]:
    """`b` with the names of `a`'s samples, where one task was asked for in the place of another.

    So a model that answers with boxes can be held against one that answers with boxes and masks:
    records, languages and question numbers are the same, only the task in the names differs.
    """

    def without_task(result: Result) -> tuple[str, str, str]:
        sample = result.sample
        return sample.record_id, sample.language, sample.id.rpartition("/")[2]

    names = {without_task(result): name for name, result in a.results.items()}
    found = {}
    for name, result in b.results.items():
        name = names.get(without_task(result), name)
        found[name] = dataclasses.replace(
            result, sample=dataclasses.replace(result.sample, id=name)
        )
    if len(names) < len(a.results) or len(found) < len(b.results):
        return b, []  # several tasks each: which belongs to which is not said
    tasks = (", ".join(sorted({r.sample.task for r in side.results.values()})) for side in (a, b))
    return dataclasses.replace(b, results=found), [f"task: {' and '.join(tasks)}"]


def _told(value: Any) -> Any:
    return value.get("name") if isinstance(value, Mapping) else value


def score(
    pair: Pair,
    embedder: Embedder,
    definition: str = "paper",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of compare.json: every figure of both and the difference b − a, with intervals.

    The whole shared set, then by task, language, modality, answer type, class and definition.
    `embedder`, `definition`: those that both were scored with.
    """
    removers = [side.about.get("marks_removed", "ours") for side in (pair.a, pair.b)]
    remover = removers[0] if removers[0] == removers[1] else "ours"
    both = (pair.results_a, pair.results_b)
    tables = [
        figures.statistics(results, embedder=embedder, definition=definition, remover=remover)
        for results in both
    ]
    bootstrap = {"resamples": resamples, "seed": seed}
    plain, by_definition, by_class = figures.split(_against(*tables, **bootstrap))
    of_groups = [figures.split(table)[0] for table in tables]
    samples = [result.sample for result in pair.results_a]
    gaps = [
        (sample.id, badness(first)[0], badness(second)[0])
        for sample, first, second in zip(samples, *both, strict=True)
    ]
    gaps.sort(key=lambda gap: (-abs(gap[2] - gap[1]), gap[0]))
    return {
        "a": {"label": pair.a.label, "set": pair.a.about},
        "b": {"label": pair.b.label, "set": pair.b.about},
        "n": len(samples),
        "only_in_a": pair.only[0],
        "only_in_b": pair.only[1],
        "notes": pair.notes,
        "settings": {
            "difference": "b - a",
            "definition": definition,
            "embedder": embedder.name,
            "marks_removed": remover,
            **bootstrap,
        },
        "metrics": plain,
        **{
            f"by_{group}": {
                value: _against(
                    *({n: s.rows(rows) for n, s in table.items()} for table in of_groups),
                    **bootstrap,
                )
                for value, rows in rows_by(samples, key).items()
            }
            for group, key in GROUPS.items()
        },
        "by_class": {anatomy.name_of(c): found for c, found in by_class.items()},
        "by_definition": by_definition,
        "same_text": sum(
            first.prediction == second.prediction for first, second in zip(*both, strict=True)
        ),
        "disagreements": [
            {"id": name, "a": ours, "b": theirs} for name, ours, theirs in gaps if ours != theirs
        ],
    }


def _against(
    a: Mapping[str, Statistic], b: Mapping[str, Statistic], **bootstrap: int
) -> dict[str, dict[str, Any]]:
    """Name → {"a", "b", "difference"}; figures that neither has are left out."""
    names = [n for n in a if n in b and (a[n].part.any() or b[n].part.any())]
    first, second = ({n: side[n] for n in names} for side in (a, b))
    columns = [intervals(first, **bootstrap), intervals(second, **bootstrap)]
    gaps = differences(second, first, **bootstrap)
    return {n: {"a": columns[0][n], "b": columns[1][n], "difference": gaps[n]} for n in names}


def compare(
    first: Path,
    second: Path,
    out: Path | None = None,
    *,
    name: str | None = None,
    split: str | None = None,
    embedder: str | None = None,
    definition: str | None = None,
    data_dir: str | None = None,
) -> list[dict[str, Any]]:
    """What `python -m rg_jax.evaluate compare` does; returns the content of each compare.json.

    Of two runs' folders every evaluation that both have is compared (`name`, `split`: only those
    of a data set and split), each into a folder of its own below `out` if there are several;
    `out` defaults to runs/compare/A_B. `embedder`, `definition`: those of A's evaluation if not
    given. `data_dir`: where the pictures' data set lies, if not where the run says.
    """
    pairs = _pairs(first, second, name, split)
    out = out or Path("runs") / "compare" / "_".join(_labels(first, second))
    found = []
    for folder_name, pair in pairs.items():
        place = out / folder_name if len(pairs) > 1 else out
        check_replaceable(place, OURS, "comparison")
        about = pair.a.about
        chosen = definition or about["definition"]
        if chosen not in DEFINITIONS:
            raise UserError(f"--definition={chosen} is not one of {', '.join(DEFINITIONS)}")
        likeness = load_embedder(embedder or about["embedder"])
        pair = pair.rescored(likeness, chosen)
        compared = score(pair, likeness, chosen, about["resamples"])
        print(compare_page.summary(compared), flush=True)
        _write(pair, compared, place, data_dir)
        print(f"page: {place / 'index.html'}", flush=True)
        found.append(compared)
    return found


def _labels(first: Path, second: Path) -> tuple[str, str]:
    """Two short names that differ: the runs' folders, else A and B before them."""

    def one(path: Path) -> str:
        path = path.absolute()
        return path.parent.parent.name if path.parent.name == "eval" else path.name

    a, b = one(first), one(second)
    return (a, b) if a != b else (f"A-{a}", f"B-{b}")


def _pairs(first: Path, second: Path, name: str | None, split: str | None) -> dict[str, Pair]:
    labels = _labels(first, second)
    sides = []
    for path, label in zip((first, second), labels, strict=True):
        read_ones = {k: read(folder, label) for k, folder in evaluations(path).items()}
        sides.append(
            {
                k: e
                for k, e in read_ones.items()
                if (name is None or name in (e.about["data"], e.about["data"].partition("/")[0]))
                and (split is None or split == e.about["split"])
            }
        )
    a, b = sides
    if len(a) == 1 and len(b) == 1:
        (key, one), (_, other) = *a.items(), *b.items()
        return {key: pair_up(one, other)}
    shared = [key for key in a if key in b]
    if not shared:
        has = "; ".join(
            f"{label} has {', '.join(side) or 'none'}"
            for label, side in zip(labels, sides, strict=True)
        )
        raise UserError(f"the two have no evaluation of the same name ({has})")
    for label, side in zip(labels, sides, strict=True):
        alone = [key for key in side if key not in shared]
        if alone:
            print(f"only in {label}, not compared: {', '.join(alone)}")
    return {key: pair_up(a[key], b[key]) for key in shared}


def _write(pair: Pair, compared: Mapping[str, Any], out: Path, data_dir: str | None) -> None:
    """compare.json and the page with its pictures, aside and then renamed into place."""
    aside, old = asides(out)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): give another --out"
        ) from error
    text = json.dumps(compared, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(aside / "compare.json", text)
    shown = [gap["id"] for gap in compared["disagreements"][:SHOWN]]
    sides = []
    for results in (pair.results_a, pair.results_b):
        by_id = {result.sample.id: result for result in results}
        sides.append([by_id[name] for name in shown])
    record_of, why_none = _records(pair, data_dir)
    compare_page.write_page(aside, compared, *sides, record_of, why_none)
    swap(aside, old, out)


def _records(pair: Pair, data_dir: str | None) -> tuple[Callable[[str], Mapping] | None, str]:
    """How to get a record by its id, or None and why the page has no pictures."""
    about = pair.a.about
    where = data_dir
    for side in (pair.a, pair.b):
        root = side.folder.absolute().parent.parent
        if where is None and (root / run_lib.CONFIG_FILE).is_file():
            where = run_lib.load_config(root).data.dir
    if where is None:
        return None, "it is not known where the data set lies: give --data_dir"
    try:
        source: RecordSource = open_source(about["data"], about["split"], where)
    except UserError as error:
        return None, str(error)
    return (lambda name: source[source.row_of(name)]), ""
