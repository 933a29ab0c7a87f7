"""Weights: convert them, look into them, compare them.

    python -m rg_jax.weights convert SRC DST [--dtype=bfloat16] [--max_shard=5GB]
    python -m rg_jax.weights inspect SRC           (or: inspect --model=3b, by shapes alone)
    python -m rg_jax.weights compare A B           exit code 1 where they differ

SRC, A and B: the folder of a training run, an original .npz (FILE.npz:img: one part), a folder of
Hugging Face (PaliGemma 2, the released RadGrounder, SigLIP), the SigLIP .ckpt. DST: NAME.npz is
written in the original format, any other name becomes a folder for Hugging Face; with
--config=CONFIG it becomes the folder of a run, which `python -m rg_jax.evaluate` opens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rg_jax import cli
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.training import mesh as mesh_lib
from rg_jax.weights import export, listing
from rg_jax.weights.formats import open_weights
from rg_jax.weights.source import Source

USAGE = "python -m rg_jax.weights convert SRC DST | inspect SRC | inspect --model=3b | compare A B"


def main(argv: list[str]) -> None:
    """The command."""
    commands = {"convert": (convert, 2), "inspect": (inspect, 1), "compare": (compare, 2)}
    name, *names = argv[1:] or [""]
    if name not in commands:
        raise UserError(f"what is to be done? {USAGE}")
    command, wanted = commands[name]
    if name == "inspect" and FLAGS.model:
        command, wanted = inspect_variant, 0
    if len(names) != wanted:
        raise UserError(f"{name} takes {wanted} name(s), not {len(names)}: {USAGE}")
    mesh_lib.prepare_backend(steps=False)
    try:
        command(*names)
    except OSError as error:
        # Reading names its files itself; what is left is a target that cannot be made.
        raise UserError(
            f"{error.filename or names[-1]} cannot be written: {error.strerror or error}"
        ) from error


def convert(src: str, dst: str) -> None:
    """SRC in the format that DST's name or --config asks for."""
    source = open_weights(src, num_heads=FLAGS.heads)
    target = Path(dst).expanduser()
    _tell(source)
    if FLAGS.config is not None:
        from rg_jax.weights.run_folder import write_run

        write_run(source, target, FLAGS.config, FLAGS.tokenizer)
    elif target.suffix == ".npz":
        export.to_npz(source, target, dtype=FLAGS.dtype)
    else:
        export.to_folder(
            source,
            target,
            tokenizer_of(source, FLAGS.tokenizer),
            dtype=FLAGS.dtype,
            max_shard=export.parse_size(FLAGS.max_shard),
        )
    count = sum(leaf.size for leaf in source.leaves.values())
    print(f"{target}: {count:,} parameters")


def tokenizer_of(source: Source, given: str | None) -> Tokenizer:
    """The tokenizer that belongs to the source: named by the user, or lying beside it.

    Raises UserError where there is none, or where it is another one (hash, pieces, rows).
    """
    path = given or source.tokenizer_model
    if path is None:
        raise UserError(
            f"{source.path} has no tokenizer beside it; name paligemma_tokenizer.model with "
            "--tokenizer=FILE"
        )
    tokenizer = Tokenizer.load(path, source.extra_tokens or ())
    export.check_tokenizer(source, tokenizer)
    return tokenizer


def inspect(src: str) -> None:
    """All that SRC holds."""
    source = open_weights(src, num_heads=FLAGS.heads)
    print(listing.list_source(source, FLAGS.norms))
    if source.unknown and not source.leaves:
        raise UserError(f"{src}: none of its {len(source.unknown)} arrays is known here")


def inspect_variant() -> None:
    """The architecture of --model by shapes alone."""
    print(listing.list_variant(FLAGS.model, FLAGS.image_size))


def compare(one: str, other: str) -> None:
    """A against B; ends with exit code 1 where they differ."""
    sources = [open_weights(spec, num_heads=FLAGS.heads) for spec in (one, other)]
    equal = different = 0
    for differs, line in listing.compare(*sources):
        equal, different = equal + (not differs), different + differs
        if differs:
            print(line, flush=True)
    print(f"{equal} arrays are equal, {different} differences")
    if different:
        sys.exit(1)


def _tell(source: Source) -> None:
    for note in source.notes:
        print(f"{source.path}: {note}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("dtype", "", "bfloat16, float32 or float16 (default: as SRC keeps it)")
    flags.DEFINE_string("max_shard", "5GB", "bytes per file of a folder, e.g. 5GB or 500MB")
    flags.DEFINE_string("tokenizer", None, "SentencePiece file (default: the one beside SRC)")
    flags.DEFINE_string("model", None, "inspect: a known size (3b, 10b, 28b, tiny)")
    flags.DEFINE_integer("image_size", None, "with --model: pixels")
    flags.DEFINE_integer("heads", None, "heads of an encoder whose file does not say it")
    flags.DEFINE_bool("norms", True, "inspect: also read every array for its norm")
    config_flags.DEFINE_config_file("config", None, "convert: make a run's folder of this config")
    FLAGS = flags.FLAGS
    sys.exit(cli.main(main))
