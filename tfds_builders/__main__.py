"""`python -m tfds_builders NAME --data_dir=DIR [--source=DIR] [flags]`: build a data set.
`python -m tfds_builders check NAME --out=DIR [--source=DIR] [flags]`: look for what is wrong first.

Our own command because `tfds build` imports TensorFlow. Nothing is downloaded. The data set is
written beside its place and renamed when whole: an interrupted build leaves no data set behind.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import io
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from pathlib import Path

from absl import logging

import tfds_builders
from rg_jax.cli import stop
from rg_jax.config import write_aside
from rg_jax.errors import UserError

BUILT_FROM = "built_from.txt"  # in the folder of a data set: tells its source from others


class Parser(argparse.ArgumentParser):
    def error(self, message):  # the default prints the whole usage before the one useful line
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def known_builders() -> list[str]:
    """Names of the folders that hold a builder."""
    folder = Path(tfds_builders.__path__[0])
    return sorted(
        module.name
        for module in pkgutil.iter_modules([str(folder)])
        if (folder / module.name / f"{module.name}_dataset_builder.py").is_file()
    )


def builder_class(name: str):
    """The builder of this name; UserError with the known names if there is none."""
    if name not in known_builders():
        raise UserError(f"no builder is called {name!r}; there are: {', '.join(known_builders())}")
    return importlib.import_module(f"tfds_builders.{name}.{name}_dataset_builder").Builder


def parse(argv: list[str]):
    """Command line → (builder class, config, options)."""
    names = ", ".join(known_builders())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nNAME is one of: {names}.\n'NAME --help' lists its flags.")
        if argv:
            sys.exit(0)
        raise UserError(f"which data set? Say one of: {names}")
    if argv[0].startswith("-"):
        raise UserError(f"the name of a data set comes first ({names}), then the flags")
    cls = builder_class(argv[0])  # imports TFDS: seconds, which a wrong name need not cost
    parser = Parser(
        prog=f"python -m tfds_builders {argv[0]}",
        description=(sys.modules[cls.__module__].__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", required=True, help="where data sets lie")
    parser.add_argument("--config_name", default="", help="name of this variant (default: derived)")
    parser.add_argument("--overwrite", action="store_true", help="rebuild what is already there")
    add_flags(parser, cls)
    options = parser.parse_args(argv[1:])
    if os.sep in options.config_name or options.config_name.startswith("."):
        raise UserError(f"--config_name={options.config_name}: a name, not a path")
    return cls, make_config(cls, options), options


def add_flags(parser: argparse.ArgumentParser, cls) -> None:
    """--source, if the builder reads one, and the flags of its parameters."""
    from tfds_builders import common

    if cls.SOURCE:
        parser.add_argument("--source", required=True, help=cls.SOURCE)
    for field in common.parameters(cls.CONFIG):
        kind, text = type(field.default), field.metadata["help"]
        options = {"default": field.default, "help": f"{text} (default: {field.default})"}
        if kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            if choices := field.metadata["choices"]:
                options["metavar"] = f"{{{','.join(map(str, choices))}}}"
            parser.add_argument(f"--{field.name}", type=kind, **options)


def make_config(cls, options: argparse.Namespace):
    """The builder's config out of the flags; UserError naming one that makes no sense."""
    from tfds_builders import common

    values = {field.name: getattr(options, field.name) for field in common.parameters(cls.CONFIG)}
    return cls.CONFIG(name=getattr(options, "config_name", ""), **values)


def build(cls, config, data_dir: str, source: str | None = None, overwrite: bool = False) -> Path:
    """Build one variant into `data_dir` and print what it holds; returns its folder.

    Already there with the same parameters → says so. Raises UserError for a source or data_dir
    that cannot be used, and if another variant lies under the same name.
    """
    import tensorflow_datasets as tfds

    from tfds_builders import beam

    if cls.SOURCE:
        check_source(cls, source)
    _check_data_dir(data_dir)
    builder = make_builder(cls, config, data_dir)
    place = Path(builder.data_dir)
    if place.exists() and not overwrite:
        built_with = (builder.info.metadata or {}).get("parameters")
        # What a set of before does not speak of was as it is by default.
        usual = type(config)().values()
        if {**usual, **(built_with or {})} != config.values():
            raise UserError(
                f"{place} was built with other parameters ({built_with});"
                " give this one a --config_name, or rebuild with --overwrite"
            )
        if _built_from(place) not in (None, _mark_of(source)):
            raise UserError(
                f"{place} was built from another --source than {source} (or it has moved since);"
                " give this one a --config_name, or rebuild with --overwrite"
            )
        print(f"already built: {place} (--overwrite rebuilds it)")
        return place
    started = time.perf_counter()
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(place))
        # TFDS wants a folder for downloads; there are none.
        downloads = stack.enter_context(tempfile.TemporaryDirectory())
        target = builder
        if place.exists():  # TFDS would delete first and build then; a failed build must not cost
            aside = stack.enter_context(
                tempfile.TemporaryDirectory(dir=place.parent, prefix=".rebuild-")
            )
            target = make_builder(cls, config, aside)
        with contextlib.redirect_stdout(io.StringIO()):  # it talks of downloading
            target.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(
                    try_download_gcs=False,
                    manual_dir=source,
                    beam_options=beam.pipeline_options(config.beam_options)
                    if getattr(config, "beam", False)
                    else None,
                ),
            )
        if target is not builder:
            old = Path(aside) / "replaced"
            os.replace(place, old)
            os.replace(target.data_dir, place)
            shutil.rmtree(old)
    if source:
        write_aside(place / BUILT_FROM, _mark_of(source) + "\n")
    _summary(target, place, time.perf_counter() - started)
    return place


def _mark_of(source: str | None) -> str:
    """Tells one source folder from another, without its name."""
    return hashlib.sha256(os.path.realpath(source or "").encode()).hexdigest()


def _built_from(place: Path) -> str | None:
    """The mark of the source of what is built there; None where nothing says so."""
    try:
        return (place / BUILT_FROM).read_text().strip()
    except OSError:
        return None


@contextlib.contextmanager
def _alone(place: Path):
    """While this build has the place for itself; removes what killed ones have left there."""
    folder = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".building"
    with lock.open("w") as file:
        try:
            fcntl.flock(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # ends with the process, even if killed
        except BlockingIOError:
            raise UserError(f"{place}: is being built by another process at the moment") from None
        for pattern in ("incomplete.*", ".rebuild-*", ".jobs-*"):
            for stale in sorted(folder.glob(pattern)):
                shutil.rmtree(stale)
                print(f"removed {stale}, left from an interrupted build")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for empty in (folder, folder.parent):
                with contextlib.suppress(OSError):  # not empty: something was built
                    empty.rmdir()


def make_builder(cls, config, data_dir: str):
    listed = cls.builder_configs.get(config.name)
    if listed is not None and listed.values() == config.values():
        config = listed  # TFDS takes a listed variant only as the very object
    elif listed is not None:
        raise UserError(
            f"--config_name={config.name} is the name of a variant with other parameters"
            f" ({listed.values()}); choose another"
        )
    return cls(data_dir=data_dir, config=config)


def check_source(cls, source: str | None) -> None:
    folder = Path(source or "")
    if not source or not folder.is_dir():
        raise UserError(f"--source={source}: no such folder; it must be {cls.SOURCE}")
    if not any(folder.iterdir()):
        raise UserError(f"--source={source}: the folder is empty; it must be {cls.SOURCE}")


def _check_data_dir(data_dir: str) -> None:
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise UserError(
            f"--data_dir={data_dir}: cannot be written to ({error.strerror}); choose another folder"
        ) from error


def _summary(builder, place: Path, seconds: float) -> None:
    splits = ", ".join(f"{name} {info.num_examples}" for name, info in builder.info.splits.items())
    size = builder.info.dataset_size / 2**20
    print(f"built {builder.name}/{builder.builder_config.name} in {seconds:.1f} s: {place}")
    print(f"  records: {splits}; {size:.1f} MiB")
    for what, count in builder.counts.items():
        if not what.endswith(" records"):
            print(f"  {what}: {count}")
    for note in builder.notes:
        print(f"  note: {note}")


def main(argv: list[str] | None = None) -> None:
    """The command; a user's mistake ends with one line on stderr and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every variant that is not listed
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["check"]:
            from tfds_builders.check import command as check

            code = check.run(argv[1:])
            sys.stdout.flush()
            sys.exit(code)
        cls, config, options = parse(argv)
        build(
            cls,
            config,
            os.path.expanduser(options.data_dir),
            os.path.expanduser(options.source) if cls.SOURCE else None,
            options.overwrite,
        )
    except UserError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("interrupted; nothing was written", 130)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
