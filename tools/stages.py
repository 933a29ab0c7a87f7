"""What all stages share: whole files only, progress, resuming, a summary, the frame of a command.

A stage is a loop over items in a fixed order. Each result is written aside and renamed
(`write_aside`), so that SIGKILL at any moment leaves whole files only, and a rerun skips what is
already there. Small results (one line of JSON each) go to a `Journal` instead, from which the
final file is written once all are in. What becomes of every item is counted in a `Summary`.

    def run(options):
        summary = Summary("scans")
        for scan in progress(scans, "segment", unit="scan"):
            if not usable(scan):
                summary.leave_out("missing volume", scan.path)
                continue
            with write_aside(target) as path:
                save(path)
            summary.keep("segmented")
        return summary

    if __name__ == "__main__":
        command(run, parser)
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from rg_jax.cli import FULL, stop
from rg_jax.errors import UserError
from tfds_builders.refrad2d.files import each_once

T = TypeVar("T")

# Left-overs of a killed run carry this in their name; nothing reads them, `clear_aside` deletes.
ASIDE = ".aside-"


@contextlib.contextmanager
def write_aside(path: str | os.PathLike, sync: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` when the block ends well.

    It has the suffixes of `path` (writers choose their format by them). On an error it is removed
    and `path` stays as it was. `sync=False` spares the wait for the disk: still safe when the
    process is killed, but not when the power goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=ASIDE, suffix=suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        # A rename that reaches the disk before the content would leave an empty file after a
        # power cut, and the rerun would take it for done.
        if sync:
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
        # mkstemp lets nobody else read; a data set is to be read by a group.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# A file where a folder should be, or a place where nobody may write.
NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENOENT)


def write_bytes(path: str | os.PathLike, content: bytes, sync: bool = True) -> None:
    """Write a file aside, then rename it into place."""
    with write_aside(path, sync) as aside:
        aside.write_bytes(content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON (UTF-8, one space of indent, order kept) aside, then rename it into place."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def write_json_items(path: str | os.PathLike, items: Iterable[tuple[str, Any]]) -> None:
    """`write_json` of the dict of these items, of which one at a time is held in memory."""
    with write_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        mark = "{"
        for key, value in items:
            text = json.dumps({key: value}, ensure_ascii=False, indent=1)
            file.write(mark + text[1:-2])
            mark = ","
        file.write("{}\n" if mark == "{" else "\n}\n")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. UserError naming the file if it is missing or damaged.

    Damaged is also an object that names two of its entries alike.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error


@contextlib.contextmanager
def write_folder_aside(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to that takes the place of `path` when the block ends well.

    For files that make sense only together. What was at `path` is deleted before the rename: in
    between there is nothing, but never a mixture.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=ASIDE))
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o777 & ~umask)
        yield aside
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def clear_aside(folder: str | os.PathLike) -> int:
    """Delete what killed runs left half-written under `folder`; returns how many there were."""
    leftovers = list(Path(folder).rglob(f"{ASIDE}*"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return len(leftovers)


def need(packages: Iterable[str], extra: str = "data") -> None:
    """UserError naming the extra if one of `packages` (by import name) is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f'needs the package {package}: pip install -e ".[{extra}]"')


def fingerprint(*values: Any) -> str:
    """A short key of JSON-able settings and inputs: the same ones give the same key."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def progress(items: Iterable[T], what: str, unit: str = "item", total: int | None = None):
    """`items`, with a bar on stderr: done of total, rate, time left.

    Where stderr is no terminal (a log file) it is a line at most every ten seconds.
    """
    from tqdm import tqdm

    if total is None and isinstance(items, Sized):
        total = len(items)
    plain = not sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        file=sys.stderr,
        mininterval=10 if plain else 0.1,
        ascii=plain,
        dynamic_ncols=not plain,
    )


class Summary:
    """What became of the items: counts of the kept ones, counts by reason of the others.

    `examples` places are remembered for each reason, so that a count can be followed up.
    """

    def __init__(self, items: str, examples: int = 3):
        self.items = items
        self.examples = examples
        self.kept: collections.Counter[str] = collections.Counter()
        self.left_out: collections.Counter[str] = collections.Counter()
        self.noted: collections.Counter[str] = collections.Counter()
        self.places: dict[str, list[str]] = {}
        self.failed = 0

    def keep(self, how: str = "kept", count: int = 1) -> None:
        """Count items that are in the result; `how` tells "done now" from "was there"."""
        self.kept[how] += count

    def leave_out(self, reason: str, place: object = "", count: int = 1) -> None:
        """Count items that are not in the result, with the file or id of the culprit."""
        self.left_out[reason] += count
        self._remember(reason, place)

    def fail(self, reason: str, place: object = "") -> None:
        """Leave out an item that should be in the result: the command then ends with code 1."""
        self.leave_out(reason, place)
        self.failed += 1

    def note(self, what: str, place: object = "", count: int = 1) -> None:
        """Count something worth knowing (a repair, a fall-back) about items that are kept."""
        if not count:
            return
        self.noted[what] += count
        self._remember(what, place)

    def _remember(self, reason: str, place: object) -> None:
        places = self.places.setdefault(reason, [])
        if str(place) and len(places) < self.examples:
            places.append(str(place))

    def lines(self) -> list[str]:
        """The summary as lines of text: kept, left out by reason, notes."""
        kept, left_out = sum(self.kept.values()), sum(self.left_out.values())
        lines = [f"{self.items}: {kept} of {kept + left_out} kept"]
        lines += [f"  {how}: {count}" for how, count in self.kept.items()]
        for sign, counts in (("left out, ", self.left_out), ("note, ", self.noted)):
            for reason, count in counts.most_common():
                places = ", ".join(self.places[reason])
                more = ", …" if places and count > len(self.places[reason]) else ""
                lines.append(
                    f"  {sign}{reason}: {count}" + (f" ({places}{more})" if places else "")
                )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON-able data, for a file beside the result."""
        return {
            "items": self.items,
            "kept": dict(self.kept),
            "left_out": dict(self.left_out),
            "noted": dict(self.noted),
            "places": self.places,
        }


class Journal:
    """Results of finished items, one line of JSON each, kept through SIGKILL.

    `settings` is anything JSON-able that decides the results (inputs, prompts, model). A journal
    that was begun with other settings is not mixed with these: it is started anew, and
    `discarded` tells how many results that cost. A torn last line (the process died within it) is
    dropped. Use it as a dict that can only grow; results are read back in the order of the items,
    never of the file, so an interrupted run ends like an undisturbed one.
    """

    def __init__(self, path: str | os.PathLike, settings: Any):
        self.path = Path(path)
        # Where the line of each key begins: results stay on the disk, so that a long run takes
        # little memory.
        self._starts: dict[str, int] = {}
        self.discarded = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by `close`)
        _lock(self._file, self.path)
        header = {"settings": fingerprint(settings)}
        lines = self._lines()
        _, first, whole = next(lines, (0, None, 0))
        if first == header:
            for start, line, whole in lines:  # noqa: B007 (its last value is used)
                self._starts[line["key"]] = start
            # What follows the last whole line would glue itself to the next result.
            if whole < self._file.seek(0, os.SEEK_END):
                self._file.truncate(whole)
        else:
            self.discarded = sum(1 for _ in lines)
            self._file.truncate(0)
            self._write(header)

    def _lines(self) -> Iterator[tuple[int, Any, int]]:
        """(start, content, end) of the whole lines."""
        end = 0
        self._file.seek(0)
        for line in self._file:
            start, end = end, end + len(line)
            try:
                if not line.endswith(b"\n"):
                    return
                content = json.loads(line)
            except ValueError:
                return
            yield start, content, end

    def _write(self, line: Any) -> None:
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._starts

    def __getitem__(self, key: str) -> Any:
        self._file.seek(self._starts[key])
        return json.loads(self._file.readline())["value"]

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._starts))

    def forget(self, keys: Iterable[str]) -> None:
        """Take results out of the file for good; by a whole new one that takes its place."""
        if not (gone := set(keys)):
            return
        with write_aside(self.path) as aside, aside.open("wb") as file:
            self._file.seek(0)
            file.write(self._file.readline())
            starts = {}
            for key, start in self._starts.items():
                if key not in gone:
                    starts[key] = file.tell()
                    self._file.seek(start)
                    file.write(self._file.readline())
        self._file.close()
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by `close`)
        _lock(self._file, self.path)
        self._starts = starts

    def add(self, key: str, value: Any) -> None:
        """Keep the result of an item; it survives the process from here on."""
        start = self._file.seek(0, os.SEEK_END)
        self._write({"key": key, "value": value})
        self._starts[key] = start

    def close(self, remove: bool = False) -> None:
        """End writing; `remove` once the final file stands."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)


def _lock(file: Any, path: Path) -> None:
    """Keeps two runs from writing to one journal; the system lets go when the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path}: another run is writing here; wait until it has ended") from None
    except OSError:  # file systems without locks: it is a convenience
        pass


class Parser(argparse.ArgumentParser):
    """Flags of a stage; a wrong one is a UserError (one line), not the whole usage."""

    def __init__(self, module_doc: str | None, **kwargs: Any):
        super().__init__(
            description=(module_doc or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )
        self.add_argument(
            "--limit", type=int, default=0, help="stop after so many items (default: 0, all)"
        )

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, *args, **kwargs):
        options = super().parse_args(*args, **kwargs)
        if options.limit < 0:
            raise UserError(f"--limit={options.limit}: 0 for all, or a number above it")
        return options


def command(
    run: Callable[[argparse.Namespace], Iterable[Summary] | Summary],
    parser: Parser,
    argv: list[str] | None = None,
) -> None:
    """Parse flags, run the stage, print its summaries.

    A UserError or a full disk ends with one line on stderr and exit code 2, Ctrl-C with 130; a run
    that left out all there was (a wrong folder, mostly), or in which something failed that may go
    well when it is run again, with 1.
    """
    try:
        summaries = run(parser.parse_args(argv))
    except UserError as error:
        stop(str(error))
    except OSError as error:
        if error.errno not in (*FULL, *NOT_A_FOLDER):
            raise
        stop(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on from here", 130)
    else:
        summaries = [summaries] if isinstance(summaries, Summary) else list(summaries)
        for summary in summaries:
            print("\n".join(summary.lines()))
        if any(s.left_out.total() for s in summaries) and not any(
            s.kept.total() for s in summaries
        ):
            stop("nothing could be kept; the reasons stand above", 1)
        if failed := sum(s.failed for s in summaries):
            stop(f"{failed} could not be done; the reasons stand above", 1)
