"""What the stages that work on texts share: captions out of a parquet, flags of the endpoint."""

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rg_jax.endpoint import Endpoint, Failure
from rg_jax.errors import UserError
from tools.stages import ASIDE, Parser, Summary

COLUMN = {"en": "english", "de": "german"}  # of the RefRad2D parquet, by language
CHUNK = 512  # requests that are held in memory at once


def parquet_module():
    """pyarrow.parquet; UserError naming the extra if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('parquet files need pyarrow: pip install -e ".[data]"') from error
    return pyarrow.parquet


def open_parquet(path: str | Path):
    """A pyarrow ParquetFile. UserError naming the file if it is missing or damaged."""
    parquet = parquet_module()
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError as error:
        raise UserError(f"--parquet={path}: no such file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"--parquet={path}: is no readable parquet ({error})") from error


def language_field(schema: Any, language: str, path: str | Path):
    """The struct column of a language. UserError naming the column if it is not there."""
    import pyarrow

    name = COLUMN[language]
    index = schema.get_field_index(name)
    if index < 0 or not pyarrow.types.is_struct(schema.field(index).type):
        raise UserError(
            f"--parquet={path}: has no struct column {name!r} (language {language}); say which"
            " languages there are with --language"
        )
    field = schema.field(index)
    if field.type.get_field_index("CleanedSentence") < 0:
        raise UserError(f"--parquet={path}: column {name!r} has no field CleanedSentence")
    return field


def captions(path: str | Path, language: str, limit: int = 0) -> Iterator[str]:
    """The report sentences of a language, row by row; a missing one is ""."""
    file = open_parquet(path)
    language_field(file.schema_arrow, language, path)
    given = 0
    for batch in file.iter_batches(columns=[f"{COLUMN[language]}.CleanedSentence"]):
        for row in batch.column(0).to_pylist():
            yield (row or {}).get("CleanedSentence") or ""
            given += 1
            if limit and given == limit:
                return


def languages_of(text: str) -> list[str]:
    """ "en,de" → ["en", "de"]. UserError for an unknown one or none."""
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for language in chosen:
        if language not in COLUMN:
            raise UserError(f"--language={text}: {language!r} is not one of {', '.join(COLUMN)}")
    if not chosen:
        raise UserError(f"--language={text}: say one or more of {', '.join(COLUMN)}")
    return list(dict.fromkeys(chosen))


def add_endpoint_flags(parser: Parser) -> None:
    group = parser.add_argument_group("a language model (any OpenAI-compatible chat endpoint)")
    group.add_argument("--url", default="", help="its address, e.g. http://localhost:8000/v1")
    group.add_argument("--model", default="", help="the model's name there")
    group.add_argument("--key_env", default="", help="environment variable with the API key")
    group.add_argument("--timeout", type=float, default=120, help="seconds for one reply")
    group.add_argument("--retries", type=int, default=5, help="further tries after a failed one")
    group.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    group.add_argument("--pause", type=float, default=1, help="seconds before the first retry")
    group.add_argument(
        "--answers", default="", help="folder of kept answers (default: answers beside the output)"
    )


def endpoint_of(options: argparse.Namespace, folder: Path) -> Endpoint | None:
    """The endpoint that the flags describe; None without --url, and then nothing is asked."""
    if not options.url:
        if options.model or options.key_env:
            raise UserError("--model and --key_env need an endpoint: --url")
        return None
    return Endpoint(
        options.url,
        options.model,
        key_env=options.key_env,
        timeout=options.timeout,
        retries=options.retries,
        concurrency=options.concurrency,
        pause=options.pause,
        cache_dir=options.answers or folder / "answers",
    )


def token_of(sentence: str) -> str:
    """What stands for a sentence of a report where people look: the start of its hash.

    Summaries go to terminals and logs, which are no place for what is said about a patient.
    """
    return f"sentence {hashlib.sha256(sentence.encode()).hexdigest()[:10]}"


def reason_of(failure: Failure) -> str:
    """Under what a failure is counted: refused answers by what was wrong with them."""
    if failure.kind == "refused answer":
        return f"{failure.kind}: {failure.detail}"
    return failure.kind


def tries(endpoint: Endpoint) -> Summary:
    """What was asked in this run, and what of it failed (and was mostly got over)."""
    summary = Summary("answers")
    summary.keep("new", endpoint.answered)
    summary.keep("from before, or given to an equal request", endpoint.cached)
    for kind, count in sorted(endpoint.faults.items()):
        summary.note(f"failed try, {kind}", count=count)
    return summary


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run of ours left half-written in `folder`."""
    for leftover in folder.glob(f"{ASIDE}*"):
        leftover.unlink(missing_ok=True)


def chunks(items: Iterable, size: int = CHUNK) -> Iterator[list]:
    part = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def draw(*values: object) -> int:
    """A number from the values alone: the same on every machine and in every run."""
    text = "\0".join(map(str, values))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
