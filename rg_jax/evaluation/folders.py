"""Folders that are replaced as a whole: a reader sees the old one or the new one, never a part."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from rg_jax.errors import UserError


def check_replaceable(out: Path, ours: Collection[str], what: str) -> None:
    """Raises UserError if `out` holds any file but `ours`: then no `what` has written it."""
    try:
        others = sorted(p.name for p in out.iterdir() if p.name not in ours)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{out} is no folder to write to ({error.strerror})") from error
    if others:
        raise UserError(
            f"{out} holds {others[0]!r}, which no {what} has written: name a new folder with --out"
        )


def asides(out: Path) -> tuple[Path, Path]:
    """Where a folder is made before it becomes `out`, and where the former `out` waits meanwhile.

    What killed processes have left in such places is removed; a folder that one of them had moved
    away, and not yet replaced, is put back.
    """
    aside, old = (out.with_name(f".{out.name}.{which}.aside") for which in ("new", "old"))
    if old.exists() and not out.exists():
        os.replace(old, out)
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    return aside, old


def swap(aside: Path, old: Path, out: Path) -> None:
    """Puts a folder that is whole into the place of the one that may be there."""
    if out.exists():
        os.replace(out, old)
    os.replace(aside, out)
    shutil.rmtree(old, ignore_errors=True)
