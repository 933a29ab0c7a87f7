"""How fast records become ready batches, beside what published loaders do, on the same slices.

    python -m tools.bench_data [--slices=48] [--size=512] [--workers=2] [--step_seconds=S] [--json]

Slices are drawn phantoms of `--size` pixels, written once as zstandard-compressed DICOM and once as
a data set of ours. Timed in turns, in one process:

    published    imitation of the published loader, one thread: zstandard, pydicom, float rescale,
                 windows, bilinear resize (torch where it is installed), tokenising, padding,
                 stacking
    ours         the pipeline of `rg_jax.train` without threads or workers: stored record → image,
                 task, marks, tokens, packed and stacked; nothing is kept between epochs
    ours, n workers    the same in n processes

Per core means samples per second of processor time. `--step_seconds` is a measured train step (of
`--batch` samples, see `tools.bench_train`): is it fed? `--json` prints one object and nothing else.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.data import pipeline
from rg_jax.data.sources import open_source
from rg_jax.data.tokenizer import Tokenizer, train_tokenizer
from rg_jax.grounding.format import OURS, GroundingFormat
from tools import bench_setup as setup
from tools.bench_build import SIZE, load_published, resizer

TASKS = {"detect": 1.0, "report": 0.5, "vqa": 0.5}
TEXT_LEN = 200
LANGUAGES = ("en", "de")


def main(argv: list[str] | None = None) -> None:
    parser = setup.Parser("bench_data", __doc__, json_flag=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--slices", type=int, default=48, help="how many are drawn")
    parser.add_argument("--size", type=int, default=512, help="their side in pixels")
    parser.add_argument("--batch", type=int, default=16, help="samples of a batch")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes over all slices")
    parser.add_argument("--workers", type=int, default=0, help="also with so many processes")
    parser.add_argument("--step_seconds", type=float, default=0.0, help="a train step to feed")

    def work():
        options = parser.parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):
            figures = bench(options)
        print(json.dumps(figures, indent=1) if options.json else table(figures))

    setup.run_command(work)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; `ratio_per_core` is ours over published by processor time."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source, paths = make_slices(root, options.slices, options.size)
        records = [source[row] for row in range(len(source))]
        texts = [row["caption"] for record in records for row in record["texts"].values()]
        train_tokenizer(texts, root / "tokenizer.model", 4096, num_loc=OURS.bins)
        tokenizer = Tokenizer.load(root / "tokenizer.model", OURS.extra_tokens)
        resize, by = resizer()
        captions = [record["texts"]["en"]["caption"] for record in records]
        modalities = [record["modality"] for record in records]
        del records
        passes = -(-options.slices // options.batch)

        def published():
            samples = zip(paths, modalities, captions, strict=True)
            for _ in published_batches(samples, tokenizer, resize, options.batch):
                pass

        with contextlib.closing(our_batches(source, tokenizer, options.batch, 0)) as batches:

            def ours():
                for _ in range(passes):
                    next(batches)

            spent = setup.interleave({"ours": ours, "published": published}, options.rounds)
        samples = {"ours": passes * options.batch, "published": options.slices}
        ways = {name: rate(setup.summary(taken), samples[name]) for name, taken in spent.items()}
        if options.workers:
            name = f"ours, {options.workers} workers"
            ways[name] = workers_rate(source, tokenizer, options, passes)
    per_core = [ways[name]["per_second_and_core"] for name in ("ours", "published")]
    wall = [ways[name]["per_second"] for name in ("ours", "published")]
    figures = {
        "slices": options.slices,
        "size": options.size,
        "batch": options.batch,
        "published_resize": by,
        "ways": ways,
        "ratio_per_core": per_core[0] / per_core[1],
        "ratio_wall": wall[0] / wall[1],
        "cores": len(os.sched_getaffinity(0)),
        "versions": setup.versions("grain", "pydicom", "zstandard", "torch"),
    }
    if options.step_seconds:
        needed = options.batch / options.step_seconds
        best = max(way["per_second"] for name, way in ways.items() if name != "published")
        figures["train_step"] = {
            "samples_per_second": needed,
            "cores_needed": needed / per_core[0],
            "fed": best >= needed,
        }
    return figures


def rate(times: dict[str, Any], samples: int) -> dict[str, float]:
    """Samples per second by the clock and by processor time."""
    return {
        "per_second": samples / times["seconds"],
        "per_second_and_core": samples / max(times["processor_seconds"], 1e-9),
        "milliseconds_of_processor": 1000 * times["processor_seconds"] / samples,
    }


def workers_rate(source, tokenizer, options, passes: int) -> dict[str, float]:
    """By the clock; the processes' own time is not seen from here."""
    with contextlib.closing(
        our_batches(source, tokenizer, options.batch, options.workers)
    ) as batches:
        # What was made in advance while nobody looked must not count.
        for _ in range(4 * options.workers):
            next(batches)
        started = time.perf_counter()
        count = passes * options.rounds
        for _ in range(count):
            next(batches)
        seconds = time.perf_counter() - started
    per_second = count * options.batch / seconds
    return {"per_second": per_second, "per_second_and_core": per_second / options.workers}


# ---------------------------------------------------------------- the two ways


def our_batches(source, tokenizer: Tokenizer, batch: int, workers: int) -> Iterator[Any]:
    """The training pipeline of the detection recipe; without workers all in this thread."""
    config = pipeline.DataConfig(
        image_size=SIZE, text_len=TEXT_LEN, languages=LANGUAGES, threads=0 if not workers else 1
    )
    parts = [{"source": source, "tasks": TASKS}]
    fmt: GroundingFormat = OURS
    return pipeline.train_iterator(parts, tokenizer, fmt, config, batch, seed=0, workers=workers)


def published_batches(
    samples, tokenizer: Tokenizer, resize: Callable, batch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every sample from its file on disk; tokens padded to the longest, pixels stacked."""
    pending: list[tuple[np.ndarray, list[int]]] = []
    for path, modality, caption in samples:
        pixels = load_published(path, modality, resize)
        tokens = tokenizer.encode(f"Report the findings.\n{caption}")
        pending.append((pixels, tokens[:TEXT_LEN]))
        if len(pending) == batch:
            yield _stack(pending)
            pending = []
    if pending:
        yield _stack(pending)


def _stack(pending) -> dict[str, np.ndarray]:
    length = max(len(tokens) for _, tokens in pending)
    text = np.zeros((len(pending), length), np.int64)
    for row, (_, tokens) in zip(text, pending, strict=True):
        row[: len(tokens)] = tokens
    return {"pixel_values": np.stack([p for p, _ in pending]), "input_ids": text}


# ---------------------------------------------------------------- the slices


def make_slices(root: Path, count: int, size: int) -> tuple[Any, list[Path]]:
    """Phantoms as a data set of ours, and the same pixels as `.dcm.zst` files in its order."""
    from tfds_builders import __main__ as command
    from tfds_builders.phantom.phantom_dataset_builder import Builder, PhantomConfig

    config = PhantomConfig(name="bench", image_size=size, train=count, val=0, test=0)
    command.build(Builder, config, str(root))
    source = open_source("phantom/bench", "train", root)
    paths = []
    for row in range(len(source)):
        record = source[row]
        path = root / f"{record['id']}.dcm.zst"
        path.write_bytes(dicom_of(record))
        paths.append(path)
    return source, paths


def dicom_of(record: dict[str, Any]) -> bytes:
    """A record's pixels as a DICOM file, zstandard-compressed."""
    import io

    import pydicom
    import zstandard
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    pixels = np.ascontiguousarray(record["image"][..., 0]).astype(np.int16)
    file.Modality, file.PatientID, file.PatientName = record["modality"], "phantom", "phantom"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.PixelRepresentation = 1
    file.RescaleSlope, file.RescaleIntercept = (float(v) for v in record["rescale"])
    file.PixelData = pixels.tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def table(figures: dict[str, Any]) -> str:
    """A line for each way, then the ratios."""
    lines = [
        f"{figures['slices']} slices of {figures['size']} x {figures['size']},"
        f" published resize by {figures['published_resize']}",
        f"{'':<22}{'samples/s':>12}{'per core':>12}{'ms of a core':>14}",
    ]
    for name, way in figures["ways"].items():
        spent = way.get("milliseconds_of_processor")
        lines.append(
            f"{name:<22}{way['per_second']:>12.1f}{way['per_second_and_core']:>12.1f}"
            + (f"{spent:>14.2f}" if spent else "")
        )
    lines.append(
        f"ours is {figures['ratio_per_core']:.2f}x per core, {figures['ratio_wall']:.2f}x by clock"
    )
    if "train_step" in figures:
        step = figures["train_step"]
        lines.append(
            f"the train step takes {step['samples_per_second']:.1f} samples/s:"
            f" {step['cores_needed']:.2f} cores, {'fed' if step['fed'] else 'NOT fed'}"
        )
    return "\n".join([*lines, str(figures["versions"])])


if __name__ == "__main__":
    main()
