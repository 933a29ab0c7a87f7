"""The frame around every command: flags in, one line out for a user's mistake."""

import errno
import logging as logging_std
import re
import sys
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
    except (AttributeError, KeyError, TypeError) as error:
        # How ml_collections tells of a field that is not there or cannot be set from a flag.
        # The text is that of a KeyError in it, quoted once more.
        text = re.sub(r"[\\'\"]", "", str(error).replace("\\n", ". "))
        stop(f"--config: no such field: {text or type(error).__name__}")
        raise
    except (flags.Error, UserError, OSError) as error:
        unset = re.search(r"NoneType'> of field (\S+) is not supported", str(error))
        if unset:
            stop(
                f"--{unset[1]}: this field is unset and cannot be set by a flag; set it in a config"
                " file, or by an argument of the config (configs/det.py:steps=500)"
            )
        # A config file's own error comes wrapped, with its traceback as text.
        _, wrapped, message = str(error).rpartition(f"{UserError.__name__}: ")
        stop(message if wrapped else str(error))
        raise  # not reached: keeps the type checker honest


def stop(message: str, code: int = 2) -> None:
    """Prints `message` (each of its lines marked as an error) and exits."""
    sys.stdout.flush()
    for line in message.strip().splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
