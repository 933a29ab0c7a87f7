"""One evaluation from start to end: generate, read the places, score, draw, write the page."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax

from rg_jax import run as run_lib
from rg_jax.config import write_aside
from rg_jax.data.pipeline import eval_samples
from rg_jax.errors import UserError
from rg_jax.evaluation import answers, gallery, page, refresh, viewer
from rg_jax.evaluation.answering import (
    EvalSet,
    answer_all,
    identity,
    make_predictor,
    open_sets,
    results_of,
    setting,
)
from rg_jax.evaluation.answers import Answers
from rg_jax.evaluation.baseline import BlindBaseline
from rg_jax.evaluation.embedder import Embedder, load_embedder
from rg_jax.evaluation.folders import asides, check_replaceable, swap
from rg_jax.evaluation.giou import DEFINITIONS
from rg_jax.evaluation.predictor import Params, Predictor, fingerprint
from rg_jax.evaluation.results import Result, write_results
from rg_jax.evaluation.score import score_results, write_metrics
from rg_jax.evaluation.seen import contents_of, mixtures_of, seen_in
from rg_jax.training import mesh as mesh_lib

BASELINE_FILE = "blind_baseline.json"
# Per task. Mean boxes and the best constant answer do not change beyond this many samples.
BASELINE_SAMPLES = 20_000


def blind_baseline(run: run_lib.Run, workdir: Path | None) -> BlindBaseline | None:
    """What can be scored without looking, fitted on training samples of the evaluated tasks.

    Kept in the run's folder (None: nowhere) for these data sets and tasks, so that a later
    evaluation of the same needs no training data. None where no training sample has a place.
    """
    path = workdir / BASELINE_FILE if workdir else Path(os.devnull)
    tasks: dict[str, set[str]] = {}
    for part in run.config.data.test:
        tasks.setdefault(part["name"], set()).update(part["tasks"])
    fitted_for = {
        "tasks": {name: sorted(found) for name, found in sorted(tasks.items())},
        "languages": list(run.config.data.languages),
    }
    try:
        kept = json.loads(path.read_text())
        if kept["fitted_for"] == fitted_for:
            return BlindBaseline.from_json(kept["baseline"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, of an older form, or damaged: it is fitted again
    samples = []
    for part in _training_parts(run, tasks):
        source = part["source"]
        for task in sorted(tasks.get(source.name.partition("/")[0], ())):
            samples += eval_samples(
                source,
                [task],
                run.config.data.languages,
                run.fmt,
                run_lib.data_config(run.config),
                limit=BASELINE_SAMPLES,
            )
    grounded = [s for s in samples if s.entities]
    if not grounded:
        return None
    baseline = BlindBaseline.fit(grounded)
    if workdir and jax.process_index() == 0:
        kept = {"fitted_for": fitted_for, "baseline": baseline.to_json()}
        try:
            write_aside(path, json.dumps(kept) + "\n")
        except OSError:  # somebody else's folder
            print(f"{path} cannot be written: the blind baseline will be fitted again next time")
    return baseline


def _training_parts(run: run_lib.Run, names: Collection[str]) -> list[dict]:
    """The training sets of the evaluated data sets; what is not there is told and left out."""
    config = run.config.copy_and_resolve_references()
    wanted = [part for part in config.data.train if part["name"] in names]
    if not wanted:
        return []
    with config.unlocked():
        config.data.train = wanted
    try:
        return run_lib.open_parts(config, "train")
    except UserError as error:
        print(f"no blind baseline beside the figures, its training samples are missing: {error}")
        return []


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters and where they are from: `facts` for people, `about` for `metrics.json`."""

    params: Params
    facts: dict[str, str]
    about: dict[str, Any]


def of_step(run: run_lib.Run, params: Params, step: int) -> Weights:
    """The parameters of a training run at a step."""
    start = run.config.weights or "random weights"
    return Weights(params, {"Step": f"{step:,}", "Start": start}, {"step": step})


def evaluate(
    run: run_lib.Run,
    predictor: Predictor,
    prepared: Params,
    weights: Weights,
    evaluated: EvalSet,
    out: Path,
    *,
    baseline: BlindBaseline | None,
    about: Mapping[str, Any],
    embedder: Embedder | None = None,
    remover: str = "ours",
    workdir: Path | None = None,
) -> dict:
    """Answers and scores one set, writes its folder and returns the content of metrics.json.

    Answers are stored beside `out` as they come, so that an evaluation that is stopped goes on,
    and one that is repeated generates nothing. With `workdir` its own page and figures become
    those of this evaluation. Only host 0 reads, scores and writes; the others return {}.
    """
    chief = jax.process_index() == 0
    path = out.with_name(out.name + answers.SUFFIX)

    def open_store() -> Answers | None:
        if not chief:
            return None
        check_replaceable(out, OURS, "evaluation")
        return Answers(path, identity(run, evaluated, about["parameters"]))

    store = mesh_lib.host0_first(open_store)
    # It is held until the folder is written: no other evaluation is at this place meanwhile.
    with closing(store) if store else nullcontext():
        if store and store.discarded:
            print(f"{path}: {store.discarded} answers of other weights or data are discarded")
        found = answer_all(run, predictor, prepared, evaluated, store)
        if not chief:
            return {}
        definition = setting(run.config, "definition")
        results = results_of(run, evaluated, found, embedder, definition)
        metrics = score_results(
            results,
            data=evaluated.data,
            split=evaluated.split,
            embedder=embedder,
            definition=definition,
            remover=remover,
            baseline=baseline,
            resamples=run.config.eval.bootstrap,
            about={**weights.about, **about, "total": evaluated.total},
        )
        write_folder(run, evaluated, results, metrics, out, weights.facts, workdir)
    return metrics


# What an evaluation's folder may hold: nothing else is ever replaced.
OURS = (
    "predictions.jsonl",
    "metrics.json",
    "index.html",
    "overlays",
    "page.json",
    "judge.jsonl",
)


def write_folder(
    run, evaluated: EvalSet, results: list[Result], metrics, out: Path, facts, workdir: Path | None
) -> None:
    """predictions.jsonl, metrics.json, overlays and page, aside and then renamed into place."""
    aside, old = asides(out)
    (aside / "overlays").mkdir(parents=True)
    write_results(aside / "predictions.jsonl", results)
    write_metrics(aside / "metrics.json", metrics)
    shown = gallery.choose(results, run.config.eval.gallery)

    def record_of(name: str):
        return evaluated.source[evaluated.source.row_of(name)]

    overlays = gallery.write_overlays(aside, shown, record_of)
    pictures = viewer.gather([result.sample.record_id for result in shown], record_of)
    facts = {
        "name": run.config.name or "rg_jax",
        **facts,
        "Boxes": f"{run.fmt.bins} bins, {run.fmt.box_order}",
    }
    history = page.read_history(workdir / "metrics.jsonl") if workdir else []
    page.write_page(aside, metrics, shown, overlays, facts, history, pictures)
    refresh.keep_material(aside, facts, shown, overlays, pictures)
    swap(aside, old, out)
    if workdir and out.is_relative_to(workdir):
        # The run's own page and figures are those of the last evaluation.
        write_metrics(workdir / "metrics.json", metrics)
        nested = {k: f"{out.relative_to(workdir).as_posix()}/{v}" for k, v in overlays.items()}
        page.write_page(workdir, metrics, shown, nested, facts, history, pictures)


def check_scoring(config) -> Embedder:
    """The embedder of `config.eval`. Raises UserError if it is not there, or for a definition of
    G-IoU that is none: a training would learn of it only at its end."""
    definition = setting(config, "definition")
    if definition not in DEFINITIONS:
        raise UserError(f"definition {definition!r} is not one of {', '.join(DEFINITIONS)}")
    return load_embedder(setting(config, "embedder"))


def evaluate_all(
    run: run_lib.Run,
    params: Params,
    workdir: Path,
    which: str,
    limit: int,
    step: int,
) -> dict:
    """Evaluates every set of `config.data.<which>` at the end of training, into the run's folder;
    returns the metrics of the last one."""
    mixtures = mixtures_of(run.config)
    weights = of_step(run, params, step)
    return evaluate_sets(run, weights, which, limit, workdir=workdir, mixtures=mixtures)


def evaluate_sets(
    run: run_lib.Run,
    weights: Weights,
    which: str,
    limit: int,
    *,
    workdir: Path | None = None,
    out: Path | None = None,
    name: str | None = None,
    mixtures: Mapping[str, Sequence[Mapping]] | None = None,
    data_dirs: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    embedder: Embedder | None = None,
    remover: str = "ours",
) -> dict:
    """Evaluates every set of `config.data.<which>`; returns the metrics of the last one.

    Into `out` (one folder below it for each set if there are several), else `workdir`/eval, in a
    folder called `name` or after data and split. `mixtures`: the train and val mixtures of the
    run, so that a result can say whether its samples were seen; None: nobody knows them. They lie
    in the data folder of the config, or in one of `data_dirs`.
    `embedder`: that of the config, if it is loaded already.
    """
    embedder = embedder or check_scoring(run.config)
    sets = open_sets(run, which, limit)
    baseline = blind_baseline(run, workdir)
    predictor = make_predictor(run)
    prepared = predictor.prepare(weights.params)
    about = {"parameters": fingerprint(weights.params)[:16], **dict(about or {})}
    # Where the run has its data from, and where they lie now.
    folders = dict.fromkeys([run.config.data.dir, *data_dirs])
    metrics = {}
    for part, evaluated in zip(run.config.data[which], sets, strict=True):
        place = name or f"{evaluated.data}-{evaluated.split}".replace("/", "-")
        folder = workdir / "eval" / place if out is None else out / place if len(sets) > 1 else out
        told = dict(about)
        if mixtures is not None:
            told["seen_in_training"] = seen_in(part, mixtures, contents_of(folders))
        metrics = evaluate(
            run,
            predictor,
            prepared,
            weights,
            evaluated,
            folder,
            baseline=baseline,
            about=told,
            embedder=embedder,
            remover=remover,
            workdir=workdir,
        )
        if metrics:
            print(page.summary(metrics))
            print(f"report page: {folder / 'index.html'}", flush=True)
    return metrics
