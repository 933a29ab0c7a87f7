"""Kill a stage at every kind of moment and see whether a rerun ends as an undisturbed run does.

A driver process imports the stage once and forks a child for each run. In the child the moments
before and after each rename, and halfway through each line of a journal, are counted; at the
chosen one the child kills itself with SIGKILL. Called as
    python interrupting.py MODULE OUT NUMBER ARGUMENT...
with "{out}" in the arguments standing for the folder of the result. It prints what it did and
fails if anything differs.
"""

import filecmp
import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

from tools import stages


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _count_moments(die_at):
    """From here on moments are counted; at the one of this number the process dies."""
    seen = [0]

    def moment():
        seen[0] += 1
        if seen[0] == die_at:
            _kill()

    replace, write = os.replace, stages.Journal._write

    def watched_replace(source, target):
        moment()
        replace(source, target)
        moment()

    def torn_write(journal, line):
        if seen[0] + 1 == die_at:
            journal._file.write(b'{"key": "to')
            journal._file.flush()
        moment()
        write(journal, line)

    os.replace, stages.Journal._write = watched_replace, torn_write
    os.fsync = lambda handle: None  # a killed process does not need it, and it takes most time
    return seen


def run(module, arguments, die_at=0):
    """Run in a child; returns (its wait status, number of moments if it lived)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            if die_at:
                os.dup2(nowhere.fileno(), 2)
        seen = _count_moments(die_at)
        code = 1
        try:
            module.main(arguments)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os.write(writing, str(seen[0]).encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    return os.waitpid(child, 0)[1], int(told or 0)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def same(left, right):
    names = files(left)
    assert names == files(right), set(names) ^ set(files(right))
    _, differing, failed = filecmp.cmpfiles(left, right, names, shallow=False)
    assert not differing and not failed, (differing, failed)


def main(name, out, number, *arguments):
    module = importlib.import_module(name)
    for package in ("nibabel", "pyarrow.parquet", "pydicom.pixels", "tqdm", "zstandard"):
        importlib.import_module(package)  # here, or each child would
    expected, tried = Path(out) / "undisturbed", Path(out) / "disturbed"
    prepared = Path(out) / "prepared"  # what the result's folder holds before the first run

    def begin(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if prepared.is_dir():
            shutil.copytree(prepared, folder)

    def filled(folder):
        return [argument.replace("{out}", str(folder)) for argument in arguments]

    begin(expected)
    status, moments = run(module, filled(expected))
    # 1: it went to its end, and something in what it was given could not be done.
    assert os.WEXITSTATUS(status) in (0, 1) and moments > 1, (status, moments)
    again, few = run(module, filled(expected))
    assert again == status
    number = min(int(number), moments)
    for k in range(number):
        die_at = 1 + k * (moments - 1) // max(number - 1, 1)
        begin(tried)
        status, _ = run(module, filled(tried), die_at)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, die_at
        status, _ = run(module, filled(tried))
        assert os.WEXITSTATUS(status) in (0, 1), die_at
        same(expected, tried)
    # Killed again and again, each time a little later: it must get to the end.
    begin(tried)
    kills, killed = 0, True
    while killed:
        assert kills <= moments, "no progress"
        status, _ = run(module, filled(tried), 13 * (kills + 1))
        killed = os.WIFSIGNALED(status)
        kills += killed
    same(expected, tried)
    print(f"moments {moments}, in a second run {few}; killed at {number} and {kills} in a row")


if __name__ == "__main__":
    main(*sys.argv[1:])
