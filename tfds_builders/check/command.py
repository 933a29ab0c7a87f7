"""`python -m tfds_builders check NAME --out=DIR [--source=DIR] [flags]`: is this fit to train on?

Reads the whole source with the builder's own code, makes every record as the build would, and
lists every problem with its file: the first of each kind on the terminal, all of them in
OUT/problems.jsonl, figures and a contact sheet in OUT/index.html, the same as OUT/check.json.
Nothing is built. Exit code 1 if there is a problem that would harm training.
"""

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rg_jax.data.record import Record
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS
from tfds_builders import __main__ as build_command
from tfds_builders.check import page
from tfds_builders.check.records import Seen, examine
from tfds_builders.check.report import Report
from tfds_builders.check.sheet import PER_GROUP
from tfds_builders.common import Problem, RecordBuilder

INTERRUPTED = 130


def run(argv: list[str]) -> int:
    """The command: returns its exit code. Raises UserError for a user's mistake."""
    cls, config, options = parse(argv)
    tokenizer = None
    if options.tokenizer:
        tokenizer = Tokenizer.load(os.path.expanduser(options.tokenizer), OURS.extra_tokens)
    source = None
    if cls.SOURCE:
        source = Path(os.path.expanduser(options.source))
        build_command.check_source(cls, str(source))
    out = _folder(options.out)
    with tempfile.TemporaryDirectory() as nothing:  # TFDS wants a place; none is written to
        builder = build_command.make_builder(cls, config, nothing)
        report = check(builder, source, out, tokenizer, options.limit, options.pictures)
    print("\n".join(report.lines()))
    print(f"page: {out / page.NAME}; all problems: {out / page.PROBLEMS}")
    if not report.complete:
        print("error: interrupted; what was looked at until then is in there", file=sys.stderr)
        return INTERRUPTED
    return 1 if report.harmful else 0


def parse(argv: list[str]):
    """Command line behind the word check → (builder class, config, options)."""
    names = ", ".join(build_command.known_builders())
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"{__doc__.strip()}\n\nNAME is one of: {names}.\n'check NAME --help' lists its flags."
        )
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"check: the name of a data set comes first ({names}), then the flags")
    cls = build_command.builder_class(argv[0])
    parser = build_command.Parser(
        prog=f"python -m tfds_builders check {argv[0]}",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder for the page and the lists")
    parser.add_argument(
        "--tokenizer",
        default="",
        help="a SentencePiece file: lengths are counted in its tokens (default: in words)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="records of each split to look at (default: 0, all)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=PER_GROUP,
        help="slices of each split and modality on the contact sheet (default: %(default)s)",
    )
    build_command.add_flags(parser, cls)
    options = parser.parse_args(argv[1:])
    if options.limit < 0:
        raise UserError(f"--limit={options.limit}: 0 for all, or a number above it")
    if options.pictures < 0:
        raise UserError(f"--pictures={options.pictures}: 0 for none, or a number above it")
    return cls, build_command.make_config(cls, options), options


def check(
    builder: RecordBuilder,
    source: Path | None,
    out: Path,
    tokenizer: Tokenizer | None = None,
    limit: int = 0,
    pictures: int = PER_GROUP,
) -> Report:
    """Look at every record of `builder` and write what is found to `out`; nothing is built.

    `pictures` of each split and modality go onto the contact sheet.
    Goes on to the end whatever it meets; Ctrl-C ends it early, which the report then says.
    """
    started = time.perf_counter()
    builder.problems = []
    name = f"{builder.name}/{builder.builder_config.name}"
    report = Report(name, limit, tokenizer, pictures)
    seen = Seen()
    with page.problem_file(out) as write:

        def take(problems: Iterable[Problem]) -> None:
            for problem in problems:
                problem = _relative(problem, source)
                report.add(problem)
                write(problem)

        def drain() -> set[tuple[str, str]]:
            """Takes what the builder has found; returns the kinds and files of it."""
            # Emptied, so that memory does not grow with what is wrong.
            found, builder.problems[:] = list(builder.problems), []
            take(found)
            for problem in found:
                seen.tell(problem)
            return {(problem.kind, problem.file) for problem in found}

        try:
            for split, item in _records(builder, source, limit, take):
                told = drain()
                file = builder.place_of(item) if isinstance(item, dict) else f"split {split}"
                problems, valid = examine(item, file)
                problems += seen.look(item, split, file)
                take(problem for problem in problems if (problem.kind, problem.file) not in told)
                report.see(item, split, valid, any(problem.harmful for problem in problems))
        except KeyboardInterrupt:
            report.complete = False
        drain()
        if report.complete and not report.statistics.records and not report.harmful:
            take([Problem("no records", str(source or builder.name), "there is nothing to build")])
    report.builder_counts = {what: n for what, n in builder.counts.items() if n}
    report.notes = [_below(source, note) for note in builder.notes]
    report.seconds = time.perf_counter() - started
    page.write(out, report)
    return report


def _records(
    builder: RecordBuilder, source: Path | None, limit: int, take
) -> Iterator[tuple[str, Any]]:
    """(split, record) of all splits, with a progress bar; an error ends its split, no more."""

    def told(where: str, error: Exception) -> None:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        take([Problem("reading ended early", where, text or type(error).__name__)])

    try:
        splits = builder.splits(source)
    except Exception as error:
        told(str(source or builder.name), error)
        return
    if splits and (without := builder.without_train(splits)):
        take([Problem("no train split", str(source or builder.name), without)])
    sizes = [_size(builder, split, records, limit) for split, records in splits.items()]
    total = None if None in sizes else sum(sizes)
    plain = not sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=f"check {builder.name}",
        unit=" records",
        mininterval=10 if plain else 0.1,
        delay=10 if plain else 0,  # a log file is told of long checks only
        ascii=plain,
    ) as bar:
        for split, records in splits.items():
            records, met, whole = iter(records), 0, False
            try:
                for item in itertools.islice(records, limit or None):
                    met += 1
                    yield split, item
                    bar.update()
                whole = True
            except Exception as error:
                told(f"split {split}", error)
            finally:
                with contextlib.suppress(Exception):
                    getattr(records, "close", lambda: None)()  # ends the workers of a pool
            if whole and not met:
                text = "none of its records can be used"
                take([Problem("empty split", f"split {split}", text, split == "train")])


def _size(builder: RecordBuilder, split: str, records: Iterable[Record], limit: int) -> int | None:
    """How many records a split will have, as far as its builder knows; for the progress bar."""
    size = builder.expected.get(split)
    if size is None and hasattr(records, "__len__"):
        size = len(records)  # type: ignore[arg-type]
    return size if size is None or not limit else min(size, limit)


def _relative(problem: Problem, source: Path | None) -> Problem:
    """File names below the source are told from there, also within the detail."""
    return Problem(
        problem.kind,
        _below(source, problem.file),
        _below(source, problem.detail),
        problem.harmful,
    )


def _below(source: Path | None, text: str) -> str:
    """A text in which paths begin below the source."""
    return text if source is None else text.replace(f"{source}{os.sep}", "")


def _folder(path: str) -> Path:
    out = Path(os.path.expanduser(path))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out={path}: cannot be written to ({error.strerror}); choose another folder"
        ) from error
    return out
