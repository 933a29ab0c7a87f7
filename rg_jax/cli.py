"""The frame around every command: flags in, one line out for a user's mistake."""

import errno
import logging as logging_std
import os
import re
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from rg_jax.errors import UserError

# A disk that is full, or that nobody may write to, is no defect of ours wherever it shows.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(run: Callable[[list[str]], object]) -> None:
    """Parses flags and calls `run(argv)`.

    A wrong flag, a wrong config argument or a UserError ends with one line on stderr and exit
    code 2, Ctrl-C with 130. Anything else is a defect of ours and keeps its traceback.
    """

    def guarded(argv: list[str]) -> object:
        # Orbax and TFDS log every step of theirs through absl, and tracebacks of what fails in a
        # thread of theirs: that is raised again where it can be told in one line.
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().setLevel("CRITICAL")
        _silence_broken_saves()
        try:
            return run(argv)
        except UserError as error:
            stop(str(error))
        except OSError as error:
            if error.errno is None and "Failed loading config file" in str(error):
                # Told only now, when the first field is asked for; its last line names the file.
                _stop_without_file(_config_file(argv) or _config_file(sys.argv))
                stop(f"--config: {str(error).splitlines()[-1].strip()}")
            if error.errno not in FULL:
                raise
            stop(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
        except KeyboardInterrupt:
            stop("interrupted; the same command goes on from the last checkpoint", 130)

    try:
        app.run(guarded, flags_parser=_parse)
    except SystemExit:
        if any(flag in sys.argv[1:] for flag in ("--help", "-help", "-h", "--helpfull")):
            sys.exit(0)  # absl calls help a failure
        raise


def _silence_broken_saves() -> None:
    """A save that fails is raised where it can be told in one line.

    Before that, each of Orbax's array writers that is cut off in the middle tells of it by a
    traceback of its own, through the two ways that nobody can catch.
    """
    logging_std.getLogger("asyncio").setLevel("CRITICAL")
    usual = sys.unraisablehook

    def hook(unraisable) -> None:
        error = unraisable.exc_value
        cut_off = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
        if not cut_off and not isinstance(error, GeneratorExit):
            usual(unraisable)

    sys.unraisablehook = hook


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        file = _config_file(argv)
        # A config file's own UserError comes wrapped, with its traceback as text.
        _, wrapped, message = str(error).rpartition(f"{UserError.__name__}: ")
        if isinstance(error, UserError) or wrapped:
            stop(message if wrapped else str(error))
        if place := _place_in(file, error):
            stop(f"--config: {file}, {place}: {type(error).__name__}: {_first_line(error)}")
        _stop_without_file(file)
        if "has no attribute 'get_config'" in str(error):
            stop(f"--config: {file} has no get_config(arg), which makes the config")
        if isinstance(error, (AttributeError, KeyError, TypeError)):
            # How ml_collections tells of a field that is not there or cannot be set from a flag.
            # The text is that of a KeyError in it, quoted once more.
            text = re.sub(r"[\\'\"]", "", str(error).replace("\\n", ". "))
            text = f"{text or type(error).__name__}{_flags_of(text, argv)}"
            stop(f"--config: no such field: {text}")
        unset = re.search(r"NoneType'> of field (\S+) is not supported", str(error))
        if unset:
            stop(
                f"--{unset[1]}: this field is unset and cannot be set by a flag; set it in a config"
                " file, or by an argument of the config (configs/det.py:steps=500)"
            )
        if isinstance(error, (flags.Error, OSError)):
            stop(str(error))
        raise


def _stop_without_file(file: str) -> None:
    if file and not os.path.isfile(file):
        stop(f"--config={file}: no such file")


def _config_file(argv: list[str]) -> str:
    """The file that --config names, without its argument; "" without one."""
    given = [a for a in argv if a.startswith(("--config=", "-config="))]
    return given[-1].partition("=")[2].partition(":")[0] if given else ""


def _place_in(file: str, error: BaseException) -> str:
    """Where in the config file an error arose, "line 3", or "" if it was not there."""
    if not file:
        return ""
    if isinstance(error, SyntaxError) and error.filename and _same_file(error.filename, file):
        return f"line {error.lineno}"
    inside = [f for f in traceback.extract_tb(error.__traceback__) if _same_file(f.filename, file)]
    return f"line {inside[-1].lineno}" if inside else ""


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _first_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


def _flags_of(text: str, argv: list[str]) -> str:
    """Of "lrr. Did you mean …" the flags that name it: " (--config.optimizer.lrr)"."""
    field = text.split(".")[0].split(" ")[0]
    named = [a.partition("=")[0] for a in argv if a.startswith("--config.")]
    named = [a for a in named if field and field in a.split(".")]
    return f" ({', '.join(named)})" if named else ""


def stop(message: str, code: int = 2) -> None:
    """Prints `message` (each of its lines marked as an error) and exits."""
    sys.stdout.flush()
    for line in message.strip().splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
