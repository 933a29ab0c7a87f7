"""A build as an Apache Beam pipeline (extra "beam"), for clusters.

TFDS writes what a pipeline yields without TensorFlow; the command only has to hand it one. Jobs
are put into files that the workers read, since a pipeline's own description must stay small; so
source and target lie where every worker finds them under the same path.
"""

import contextlib
import itertools
import os
import pickle
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rg_jax.errors import UserError
from tfds_builders.packed import Packed

JOBS_PER_FILE = 500
_NAMESPACE = "rg_jax"


def load() -> Any:
    """The package; UserError if it is not installed."""
    try:
        import apache_beam
    except ImportError as error:
        raise UserError('--beam needs the package apache-beam: pip install -e ".[beam]"') from error
    return apache_beam


def pipeline_options(text: str) -> Any:
    """The options of `--beam_options`, e.g. "--runner=FlinkRunner --parallelism=64"."""
    load()
    from apache_beam.options.pipeline_options import PipelineOptions

    return PipelineOptions(shlex.split(text))


def examples(
    function: Callable[[Any], Any], jobs: Iterable[Any], folder: Path, split: str, skip_bad: bool
) -> Any:
    """A PTransform that yields (id, example) of every job of a split.

    `function` is a function of a module and returns an outcome with `record` (packed, or None) and
    `problems`. A harmful problem ends the pipeline unless `skip_bad`; every one is counted.
    """
    beam = load()
    paths = list(_write(jobs, folder, split))
    return (
        beam.Create(paths, reshuffle=True)
        | "Read jobs" >> beam.FlatMap(_read)
        | "Spread" >> beam.Reshuffle()
        | "Make records" >> beam.FlatMap(_make, function, split, skip_bad)
    )


def counts(result: Any) -> dict[str, int]:
    """What the workers of a finished pipeline counted."""
    beam = load()
    wanted = beam.metrics.MetricsFilter().with_namespace(_NAMESPACE)
    found = result.metrics().query(wanted)["counters"]
    return {counter.key.metric.name: counter.result for counter in found}


@contextlib.contextmanager
def job_folder(parent: Path) -> Iterator[Path]:
    """A folder for jobs beside the data sets, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".jobs-") as folder:
        yield Path(folder)


def _write(jobs: Iterable[Any], folder: Path, split: str) -> Iterator[str]:
    jobs = iter(jobs)
    for number in itertools.count():
        part = list(itertools.islice(jobs, JOBS_PER_FILE))
        if not part:
            return
        path = folder / f"{split}-{number:06d}"
        path.write_bytes(pickle.dumps(part))
        yield os.fspath(path)


def _read(path: str) -> list[Any]:
    return pickle.loads(Path(path).read_bytes())


def _make(job: Any, function: Callable[[Any], Any], split: str, skip_bad: bool):
    beam = load()
    outcome = function(job)
    for problem in outcome.problems:
        if problem.harmful and not skip_bad:
            raise UserError(f"{problem} (--skip_bad leaves such records out)")
        what = f"left out: {problem.kind}" if problem.harmful else problem.kind
        beam.metrics.Metrics.counter(_NAMESPACE, what).inc()
    if isinstance(outcome.record, Packed):
        beam.metrics.Metrics.counter(_NAMESPACE, f"{split} records").inc()
        yield outcome.record.id, outcome.record.example


def reason(error: BaseException) -> str:
    """The UserError inside what a runner makes of it; empty if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return str(seen).partition(" [while running")[0]
        seen = seen.__cause__ or seen.__context__
    for line in reversed(str(error).splitlines()):
        _, found, rest = line.partition(f"{UserError.__name__}: ")
        if found:
            return rest.partition(" [while running")[0]
    return ""
