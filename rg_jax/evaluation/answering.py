"""From a run and a data set to the model's answers, and from answers to results."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rg_jax import recipes
from rg_jax import run as run_lib
from rg_jax.data.pipeline import eval_batches, eval_samples, prompt_length
from rg_jax.data.sources import RecordSource
from rg_jax.data.tasks import COUNTER_NAMES, Sample
from rg_jax.evaluation.answers import Answer, Answers
from rg_jax.evaluation.embedder import Embedder
from rg_jax.evaluation.masks import reference_masks
from rg_jax.evaluation.predictor import Params, Predictor, detokenise
from rg_jax.evaluation.results import Result, make_result


class EvalSet(NamedTuple):
    """Samples of one data set and split, out of `total`."""

    data: str
    split: str
    source: RecordSource
    samples: list[Sample]
    total: int


def open_sets(run: run_lib.Run, which: str, limit: int) -> list[EvalSet]:
    """The samples of `config.data.<which>`, at most `limit` of each set (0: all)."""
    sets = []
    for part in run_lib.open_parts(run.config, which):
        source = part["source"]
        samples = eval_samples(
            source,
            part["tasks"],
            run.config.data.languages,
            run.fmt,
            run_lib.data_config(run.config),
            limit=limit or None,
        )
        wanted = [task for task, weight in part["tasks"].items() if weight > 0]
        total = source.scan(run.config.data.languages, run.fmt).questions(wanted)
        sets.append(EvalSet(source.name, source.split, source, samples, total))
    return sets


def setting(config, name: str) -> Any:
    """`config.eval.<name>`; its default for a run that was made before there was such a field."""
    return config.eval.get(name, recipes.base().eval[name])


def batch_size_of(run: run_lib.Run) -> int:
    """`config.eval.batch_size`, or that of a training micro-batch, filled up to the devices."""
    config = run.config
    size = config.eval.batch_size or max(1, config.batch_size // config.accumulation)
    return _filled_up(size, run.mesh.size)


def _filled_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def make_predictor(run: run_lib.Run) -> Predictor:
    """Greedy decoding as `config.eval` says."""
    tokens = run.config.eval.max_new_tokens or run.config.data.text_len
    return Predictor(run, tokens, setting(run.config, "rows"))


def answer_all(
    run: run_lib.Run,
    predictor: Predictor,
    prepared: Params,
    evaluated: EvalSet,
    store: Answers | None = None,
    show_progress: bool = True,
) -> dict[str, Answer]:
    """The model's answer to every sample, by sample id, with a progress bar.

    With a `store` only what is not in it is generated, and is put into it as it comes. The store
    is that of host 0; without one every host returns all answers, with one only host 0 does.
    """
    samples = evaluated.samples
    chief = jax.process_index() == 0
    kept = [store.get(s) if store else None for s in samples]
    found = {s.id: a for s, a in zip(samples, kept, strict=True) if a is not None}
    there = np.array([answer is not None for answer in kept], bool)
    if jax.process_count() > 1:
        there = np.asarray(multihost_utils.broadcast_one_to_all(there), bool)
    todo = [sample for sample, known in zip(samples, there.tolist(), strict=True) if not known]
    config = run_lib.data_config(run.config)
    # That of the whole set, however many samples are left: other shapes are rounded otherwise.
    length = prompt_length(samples, run.tokenizer, config, run.fmt)
    size = _filled_up(batch_size_of(run), predictor.unit)
    batches = eval_batches(
        todo,
        evaluated.source,
        run.tokenizer,
        dataclasses.replace(config, prefix_len=length),
        size,
        fmt=run.fmt,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    name = f"{evaluated.data} {evaluated.split}"
    with tqdm(
        total=len(samples),
        initial=len(samples) - len(todo),
        desc=name,
        unit="sample",
        disable=not (show_progress and chief),
    ) as bar:
        for number, batch in enumerate(batches):
            fresh = []
            for row in predictor(prepared, batch, left=len(todo) - number * size):
                text, ended = detokenise(row.tokens, run.tokenizer)
                cut = {n: int(c) for n, c in zip(COUNTER_NAMES, row.counts, strict=True) if c}
                sample = todo[row.index]
                # Masks of samples that are not asked for any would only be kept and never read.
                masks = row.masks if sample.marks in ("masks", "both") else None
                fresh.append((sample, Answer(text, ended, cut, masks)))
                if len(fresh) == predictor.unit:
                    _keep(store, fresh, found, bar)
            _keep(store, fresh, found, bar)
    return found


def _keep(store: Answers | None, fresh: list, found: dict[str, Answer], bar: tqdm) -> None:
    if store is not None:
        store.add(fresh)
    found.update((sample.id, answer) for sample, answer in fresh)
    bar.update(len(fresh))
    fresh.clear()


def results_of(
    run: run_lib.Run,
    evaluated: EvalSet,
    found: Mapping[str, Answer],
    embedder: Embedder | None = None,
    definition: str = "paper",
) -> list[Result]:
    """Answers → results: places read by the run's grounding format, and scored."""
    size = run_lib.data_config(run.config).mask_size
    results = []
    for sample in evaluated.samples:
        answer, given = found[sample.id], {}
        counts = {**sample.counts, **answer.counts}
        if not answer.ended:
            counts["answer_cut"] = 1
        if answer.masks is not None:
            record = evaluated.source[evaluated.source.row_of(sample.record_id)]
            wanted = reference_masks(record, sample, size)
            given = {"masks": answer.masks, "reference_masks": wanted}
        sample = dataclasses.replace(sample, counts=counts)
        results.append(
            make_result(sample, answer.prediction, run.fmt, embedder, definition, **given)
        )
    return results


def _ends_of(path: Path) -> str:
    """A hash of a file's first and last 64 KiB: whole data sets would take minutes to read."""
    with path.open("rb") as file:
        first = file.read(2**16)
        file.seek(max(path.stat().st_size - 2**16, 0))
        return hashlib.blake2b(first + file.read(2**16), digest_size=16).hexdigest()


def identity(run: run_lib.Run, evaluated: EvalSet, parameters: str) -> dict[str, Any]:
    """All that decides what is answered to a sample, as plain JSON: answers of another identity
    are never taken for these. Batch size, devices and where things lie are no part of it."""
    config = run.config
    data = dataclasses.asdict(run_lib.data_config(config))
    kept = ("image_size", "text_len", "style", "separator", "mask_slots", "mask_size")
    files = sorted(evaluated.source.directory.glob("*"))
    return {
        "parameters": parameters,
        "model": config.model.to_dict() | {"remat": ""},
        "masks": config.masks.to_dict(),
        "grounding": run.fmt.to_json(),
        "tokenizer": hashlib.sha256(run.tokenizer.model_bytes).hexdigest(),
        "prepared": {name: data[name] for name in kept},
        "prompt_length": prompt_length(
            evaluated.samples, run.tokenizer, run_lib.data_config(config), run.fmt
        ),
        "max_new_tokens": config.eval.max_new_tokens or config.data.text_len,
        "rows": setting(config, "rows"),
        "data": [evaluated.data, evaluated.split],
        "files": [
            [f.name, f.stat().st_size, _ends_of(f)]
            for f in files
            if "array_record" in f.name or f.suffix == ".json"
        ],
    }
