"""How fast slices become records, beside what published loaders do for every sample of training.

    python -m tools.bench_build --source=DIR [--seconds=10] [--memory_slices=4000] [--json=FILE]

DIR is in the RefRad2D layout. Timed over the same slices, one after the other in one process:

    published loading   imitation of the published data loader, for every sample of every epoch:
                        zstandard, pydicom, float rescale, windows, bilinear resize to 224
    our build           once: read, record, encode (nothing is compressed or written)
    our packed build    the same with the pixels laid out, ready to be written
    our loading         for every sample: stored record → model input of 224

A figure is slices per second of processor time, so that other processes do not disturb it; the
median of several passes. Small slices say little about a scanner's 512 x 512, hence a line for each
size. What is done once for a source (indexes, the reports, whose slice is whose by its header) is
counted in the lines of all slices. Then a longer build of the same slices under new ids, with the
memory it takes.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from rg_jax.cli import stop
from rg_jax.data import sources
from rg_jax.data.images import prepare_image
from rg_jax.data.record import Record
from rg_jax.errors import UserError
from tfds_builders import __main__ as build_command
from tfds_builders.refrad2d import files
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig

SIZE = 224
WINDOWS = ((2250.0, -100.0), (350.0, 40.0), (80.0, 40.0))  # (width, level) in HU
# Sampled slices have no DICOM of their own: both sides see the same slices without them.
CONFIG = {"templates": "none"}


def main(argv: list[str] | None = None) -> None:
    parser = build_command.Parser(
        prog="python -m tools.bench_build",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, help=Builder.SOURCE)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each way of reading")
    parser.add_argument(
        "--memory_slices", type=int, default=4000, help="slices of the longer build; 0 = none"
    )
    parser.add_argument(
        "--buffer_mib",
        type=int,
        default=32,
        help="TFDS's shuffle buffer in that build (its own"
        " default is 1000 MiB, which would take as many slices to fill)",
    )
    parser.add_argument("--json", default="", help="write the figures to this file too")
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every variant that is not listed
    try:
        options = parser.parse_args(argv)
        source = Path(os.path.expanduser(options.source))
        build_command.check_source(Builder, str(source))
        figures = bench(source, options.seconds)
        print(table(figures))
        if options.memory_slices:
            figures["memory"] = memory(source, options.memory_slices, options.buffer_mib)
            print(memory_table(figures["memory"]))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    except UserError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("interrupted", 130)


# --- speed -------------------------------------------------------------------------------------


def bench(source: Path, seconds: float) -> dict[str, Any]:
    """Slices per second of each way; raises UserError for a source that cannot be built."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            build_command.build(Builder, RefRad2DConfig(**CONFIG), folder, str(source))
        name = f"refrad2d/{RefRad2DConfig(**CONFIG).name}"
        stored = [sources.open_source(name, split, folder) for split in _splits(folder, name)]
        ids = [(item["id"], item["modality"]) for part in stored for item in _items(part)]
        resize, by = resizer()
        places = _places(source)
        paths = [(places.dicom(slice_id), modality) for slice_id, modality in ids]
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "published loading": lambda: (load_published(*path, resize) for path in paths),
            "our build": lambda: _records(source, folder, packing=False),
            "our packed build": lambda: _records(source, folder, packing=True),
            "our loading": lambda: (
                prepare_image(item, SIZE)[0] for part in stored for item in _items(part)
            ),
        }
        sizes = {item["id"]: item["image"].shape[:2] for part in stored for item in _items(part)}
        keys = [sizes[slice_id] for slice_id, _ in ids]
        spent = {way: measure(run, keys, seconds) for way, run in ways.items()}
    figures: dict[str, Any] = {"slices": len(ids), "resize": by, "all": rows(spent)}
    figures["by_size"] = {
        f"{height} x {width}": {
            "slices": keys.count((height, width)),
            **rows({way: {size: found[size]} for way, found in spent.items()}),
        }
        for height, width in sorted(set(keys))
        for size in [(height, width)]
    }
    return figures


def measure(
    run: Callable[[], Iterator[Any]], keys: list[Any], seconds: float
) -> dict[Any, tuple[int, float]]:
    """{key: (slices, processor seconds of a pass)}; None is what was done before the first slice.

    `run` starts a pass, whose items are those of `keys` in their order; a first item None stands
    for the work before. Passes until `seconds` are over, one at least; the first, in which all is
    imported and cached, does not count.
    """
    passes: list[collections.Counter[Any]] = []
    ends = 0.0
    while len(passes) < 2 or time.perf_counter() < ends:
        spent: collections.Counter[Any] = collections.Counter()
        waiting = iter(keys)
        last = time.process_time()
        for item in run():
            now = time.process_time()
            spent[None if item is None else next(waiting)] += now - last
            last = now
        if next(waiting, None) is not None:
            raise UserError("the source changed while it was read")
        passes.append(spent)
        ends = ends or time.perf_counter() + seconds
    counts = collections.Counter(keys)
    return {
        key: (counts[key], float(np.median([spent[key] for spent in passes[1:]])))
        for key in [None, *counts]
    }


def rows(spent: dict[str, dict[Any, tuple[int, float]]]) -> dict[str, dict[str, float]]:
    """Slices per second, milliseconds and ratio of each way; the first way is 1."""
    found: dict[str, dict[str, float]] = {}
    for way, parts in spent.items():
        count = sum(count for count, _ in parts.values())
        seconds = max(sum(seconds for _, seconds in parts.values()), 1e-9)
        found[way] = {"per_second": count / seconds, "milliseconds": 1000 * seconds / count}
    base = next(iter(found.values()))["per_second"]
    for row in found.values():
        row["ratio"] = row["per_second"] / base
    return found


def load_published(path: Path, modality: str, resize: Callable) -> Float[np.ndarray, "3 S S"]:
    """One sample as published loaders make it, from the file on disk to the model's pixels."""
    import pydicom
    import zstandard

    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as packed_file:
        header = pydicom.dcmread(io.BytesIO(packed_file.read()))
    values = header.pixel_array.astype(np.float32)
    slope = float(getattr(header, "RescaleSlope", 1))
    values = values * slope + float(getattr(header, "RescaleIntercept", 0))
    if modality == "CT":
        values = np.clip(values, -1000, None)
        channels = []
        for width, level in WINDOWS:
            low, high = level - width / 2, level + width / 2
            cut = np.clip(values, low, high)
            channels.append((cut - low) / (high - low + 1e-5))
        picture = np.stack(channels)
    else:
        low, high = values.min(), values.max()
        picture = np.repeat(((values - low) / (high - low + 1e-5))[None], 3, axis=0)
    return resize(picture * 2 - 1)


def resizer() -> tuple[Callable, str]:
    """(function of (C, H, W) → (C, S, S), what it is): torch if it is there, else NumPy."""
    try:
        import torch
    except ImportError:
        return resize_numpy, "NumPy (torch is not installed)"
    torch.set_num_threads(1)

    def resize(picture):
        batch = torch.from_numpy(picture.astype(np.float32))[None]
        return torch.nn.functional.interpolate(
            batch, size=(SIZE, SIZE), mode="bilinear", align_corners=False
        )[0].numpy()

    return resize, f"torch {torch.__version__}, one thread"


def resize_numpy(picture: Float[np.ndarray, "C H W"]) -> Float[np.ndarray, "C S S"]:
    """Bilinear, half-pixel centres, no antialiasing, first along the rows."""
    for axis in (1, 2):
        length = picture.shape[axis]
        at = np.clip((np.arange(SIZE) + 0.5) * length / SIZE - 0.5, 0, length - 1)
        first = at.astype(int)
        second = np.minimum(first + 1, length - 1)
        share = (at - first).astype(np.float32).reshape((-1, 1) if axis == 1 else (-1,))
        picture = picture.take(first, axis) * (1 - share) + picture.take(second, axis) * share
    return picture.astype(np.float32)


def table(figures: dict[str, Any]) -> str:
    """All slices, then each size."""
    lines = [f"published resize by {figures['resize']}"]
    parts = {f"all {figures['slices']} slices": figures["all"]}
    for size, found in figures["by_size"].items():
        ways = {way: row for way, row in found.items() if way != "slices"}
        parts[f"{found['slices']} slices of {size}"] = ways
    for title, found in parts.items():
        lines.append(f"{title:<28}{'slices/s per core':>18}{'ms per slice':>14}{'ratio':>8}")
        for way, row in found.items():
            lines.append(
                f"  {way:<26}{row['per_second']:>18.1f}{row['milliseconds']:>14.2f}"
                f"{row['ratio']:>7.1f}x"
            )
    return "\n".join(lines)


def _records(source: Path, folder: str, packing: bool) -> Iterator[Any]:
    """None once the builder knows what it will read, then its records or packed examples."""
    builder = build_command.make_builder(Builder, RefRad2DConfig(**CONFIG), folder)
    builder.packing = packing
    splits = builder.splits(source)
    yield None
    for records in splits.values():
        yield from records


def _places(source: Path) -> files.Places:
    config = RefRad2DConfig(**CONFIG)
    return files.Places(
        source,
        source / config.dicom_dir,
        source / config.parquet,
        source / config.segment_dir,
        source / config.split_dir,
    )


def _splits(folder: str, name: str) -> list[str]:
    info = next((Path(folder) / name).glob("*/dataset_info.json"))
    return [split["name"] for split in json.loads(info.read_text())["splits"]]


def _items(part: Any) -> Iterator[Record]:
    return (part[row] for row in range(len(part)))


# --- memory ------------------------------------------------------------------------------------


def memory(source: Path, slices: int, buffer_mib: int) -> dict[str, Any]:
    """Build about `slices` slices in a process of its own, and how its memory went.

    `resident_mib`: [records read, MiB] from beginning to end. `growth_mib`: how much more it was at
    most in the last third of the reading than in the second. Raises UserError if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        layout = Path(folder) / "layout"
        made = repeat_layout(source, layout, slices)
        code = "import sys; from tools.bench_build import child; child(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(layout), folder, str(buffer_mib)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(f"the longer build failed: {done.stderr.strip()[-400:]}")
    samples = json.loads(done.stdout.splitlines()[-1])
    reading = [(count / made, mib) for count, mib in samples if 0 < count < made]
    second = [mib for share, mib in reading if 1 / 3 <= share < 2 / 3]
    third = [mib for share, mib in reading if share >= 2 / 3]
    return {
        "slices": made,
        "buffer_mib": buffer_mib,
        "resident_mib": samples[:: max(1, len(samples) // 200)],
        "peak_mib": max(mib for _, mib in samples),
        "growth_mib": max(third) - max(second) if second and third else None,
    }


def repeat_layout(source: Path, layout: Path, slices: int) -> int:
    """A layout whose slices are those of `source`, again and again under new ids; their number.

    Slices are links to the files, masks are named where they lie.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    here = _places(source)
    there = _places(layout)
    rows = pq.read_table(here.parquet).to_pylist()
    listed: dict[tuple[str, str], dict[str, list[str]]] = {}
    for kind in ("ct", "mr"):
        for split in files.SPLITS:
            if here.split(split, kind).is_file():
                listed[split, kind], _ = files.read_split(here.split(split, kind))
    once = sum(len(ids) for captions in listed.values() for ids in captions.values())
    if not once:
        raise UserError(f"{here.splits}: the split files list no slice")
    copies = range(max(1, round(slices / once)))
    for (split, kind), captions in listed.items():
        content = {
            caption: [_copy(slice_id, copy) for copy in copies for slice_id in ids]
            for caption, ids in captions.items()
        }
        _write(there.split(split, kind), content)
        for ids in captions.values():
            for slice_id in ids:
                for copy in copies:
                    link = there.dicom(_copy(slice_id, copy))
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(here.dicom(slice_id).resolve())
    for kind in ("ct", "mr"):
        if here.index(kind).is_file():
            entries = files.read_json(here.index(kind), dict)
            for entry in entries.values():
                if entry.get("segment_slice_path"):
                    mask = here.listed(entry["segment_slice_path"])
                    entry["segment_slice_path"] = str(mask.resolve())
            content = {_copy(i, copy): entry for i, entry in entries.items() for copy in copies}
            _write(there.index(kind), content)
    schema = pq.read_schema(here.parquet)
    with pq.ParquetWriter(there.parquet, schema) as writer:
        for copy in copies:
            part = [{**row, "rsopid": _copy(row["rsopid"], copy)} for row in rows]
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
    return once * len(copies)


def _copy(slice_id: str, copy: int) -> str:
    return f"{slice_id}x{copy}"


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def child(layout: str, folder: str, buffer_mib: str) -> None:
    """Builds `layout` and prints [[records read, resident MiB], ...] as its last line."""
    from tensorflow_datasets.core import shuffle

    shuffle.MAX_MEM_BUFFER_SIZE = int(buffer_mib) << 20
    made, built = [], threading.Event()
    make = build_command.make_builder

    def make_builder(*args):
        made.append(make(*args))
        return made[-1]

    samples: list[tuple[int, float]] = []

    def watch() -> None:
        ended = False
        while not ended:  # once more at the end, however short the build
            ended = built.wait(0.1)
            count = sum(n for what, n in made[-1].counts.items() if what.endswith(" records"))
            samples.append((count, resident_mib()))

    build_command.make_builder = make_builder
    config = RefRad2DConfig(**CONFIG)
    watcher = None
    try:
        make_builder(Builder, config, folder)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        build_command.build(Builder, config, folder, layout)
    finally:
        built.set()
        if watcher is not None:
            watcher.join()
    print(json.dumps(samples))


def resident_mib() -> float:
    """Memory of this process, as the system counts it; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_table(figures: dict[str, Any]) -> str:
    """Resident memory at quarters of the reading, its peak and its growth."""
    reading = [row for row in figures["resident_mib"] if 0 < row[0] < figures["slices"]]
    shown = [reading[round(k * (len(reading) - 1) / 4)] for k in range(5)] if reading else []
    growth = figures["growth_mib"]
    lines = [
        f"a build of {figures['slices']:,} slices, shuffle buffer {figures['buffer_mib']} MiB",
        *(f"  after {count:>8,} slices {mib:8.0f} MiB resident" for count, mib in shown),
        f"  peak, writing included {figures['peak_mib']:8.0f} MiB",
    ]
    if growth is not None:
        lines.append(f"  last third of the reading over the second: {growth:+.1f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
