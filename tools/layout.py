"""The parts of the RefRad2D layout that are made of all kept slices: splits and sampled slices."""

import hashlib
import io
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.data.dicom import read_slice
from rg_jax.errors import UserError
from tfds_builders.refrad2d.files import COLUMNS, SPLITS, Places, id_column, read_split
from tools.stages import Summary, read_json, write_aside, write_bytes

SAMPLED_FOLDER = "scan_slices_v3"  # of the values of slices for grounded questions
Kept = dict[str, dict[str, Any]]  # kind → {id: result}
Splits = dict[str, dict[str, dict[str, list[str]]]]  # kind → split → {caption: ids}


def write_reports(source: Path, target: Path, modality_of: Mapping[str, str]) -> None:
    """The rows and columns of a parquet that the layout has: no other slice, nothing beside it.

    `modality_of`: the slices that are kept; "CT" or "MR", as builders want it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        key = id_column(file.schema_arrow)
        columns = [name for name in (key, *COLUMNS) if name in file.schema_arrow.names]
        fields = {name: file.schema_arrow.field(name).remove_metadata() for name in columns}
        fields |= {
            key: pa.field("rsopid", pa.string()),
            "modality": pa.field("modality", pa.string()),
        }
        schema = pa.schema([fields[name] for name in columns])
        wanted = pa.array(list(modality_of), pa.string())
        written: set[str] = set()
        with write_aside(target) as aside, pq.ParquetWriter(aside, schema) as writer:
            for batch in file.iter_batches(columns=columns):
                rows = batch.select(columns)
                rows = rows.filter(pc.is_in(rows.column(key).cast(pa.string()), wanted))
                ids = rows.column(key).cast(pa.string()).to_pylist()
                # An equal row may stand there twice.
                first = [id_ not in written and not written.add(id_) for id_ in ids]
                rows, ids = rows.filter(pa.array(first, pa.bool_())), list(compress(ids, first))
                made = {key: ids, "modality": [modality_of[id_] for id_ in ids]}
                arrays = [
                    pa.array(made[name], pa.string()) if name in made else rows.column(name)
                    for name in columns
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def take_splits(folder: Path, kept: Kept, summaries: list[Summary]) -> Splits:
    """The given split JSONs without the slices that are not kept, and without empty captions."""
    splits: Splits = {}
    whose: dict[str, dict[str, str]] = {}  # patient → split → one of the slices
    for (kind, results), summary in zip(kept.items(), summaries, strict=True):
        splits[kind] = {}
        seen: set[str] = set()
        for split in SPLITS:
            filtered = {}
            path = _find(folder, split, kind)
            captions, faults = read_split(path)
            if faults:
                raise UserError(f"{path}: {faults[0]}")
            for caption, ids in captions.items():
                left = [id_ for id_ in ids if id_ in results]
                summary.note("in the split JSONs but not kept", "", len(ids) - len(left))
                if left:
                    filtered[caption] = left
                seen.update(left)
                for id_ in left:
                    whose.setdefault(results[id_]["patient"], {}).setdefault(split, id_)
            splits[kind][split] = filtered
        summary.note("kept, but in no split", "", len(results.keys() - seen))
    # Told by their slices: who the patients are stays out of the output.
    leaking = sorted(" and ".join(found.values()) for found in whose.values() if len(found) > 1)
    summaries[-1].note(
        "patients in several splits, which no build takes", ", ".join(leaking[:3]), len(leaking)
    )
    return splits


def _find(folder: Path, split: str, kind: str) -> Path:
    name = f"snippet2rsopids_{split}_{kind}_only.json"
    tries = [folder / f"filtered_{kind}_splits", folder / f"{kind}_splits", folder]
    return next((t / name for t in tries if (t / name).is_file()), tries[0] / name)


def make_splits(
    kept: Kept,
    captions: dict[str, str],
    shares: tuple[float, ...],
    seed: int,
    summaries: list[Summary],
) -> Splits:
    """Splits by patient, the same for the same patients, shares and seed, whatever their order.

    Of three patients or more with the same modalities, every split with a share gets at least one;
    so it does of all the others together.
    """
    # Patients with the same modalities are shared out among themselves, so that a rare modality is
    # in every split too.
    kinds_of: dict[str, set[str]] = {}
    for kind, results in kept.items():
        for result in results.values():
            kinds_of.setdefault(result["patient"], set()).add(kind)
    alike: dict[tuple[str, ...], list[str]] = {}
    for patient in sorted(kinds_of):
        alike.setdefault(tuple(sorted(kinds_of[patient])), []).append(patient)
    large = [patients for patients in alike.values() if len(patients) >= len(SPLITS)]
    rest = [p for patients in alike.values() if len(patients) < len(SPLITS) for p in patients]
    split_of: dict[str, str] = {}
    for patients in (*large, rest):
        split_of |= _shared_out(patients, shares, seed)
    splits: Splits = {kind: {split: {} for split in SPLITS} for kind in kept}
    for (kind, results), summary in zip(kept.items(), summaries, strict=True):
        for id_, result in results.items():
            split = split_of[result["patient"]]
            splits[kind][split].setdefault(captions[id_], []).append(id_)
            summary.note(f"in {split}, by patient with seed {seed}")
        for split, share in zip(SPLITS, shares, strict=True):
            if share and results and not splits[kind][split]:
                number = len({result["patient"] for result in results.values()})
                summary.note(f"no slice in {split}: {number} patients of this modality for all")
    return splits


def _shared_out(patients: list[str], shares: tuple[float, ...], seed: int) -> dict[str, str]:
    """patient → split; with as many patients as splits, each split with a share gets one."""
    ranked = sorted(patients, key=lambda p: hashlib.sha256(f"{seed}\0{p}".encode()).digest())
    counts = [round(share * len(ranked)) for share in shares]
    if len(ranked) >= len(SPLITS):
        counts = [
            max(count, 1) if share else 0 for count, share in zip(counts, shares, strict=True)
        ]
    largest = max(range(len(shares)), key=shares.__getitem__)
    counts[largest] += len(ranked) - sum(counts)
    split_of, start = {}, 0
    for split, count in zip(SPLITS, counts, strict=True):
        split_of |= dict.fromkeys(ranked[start : start + count], split)
        start += count
    return split_of


def sampled_slices(
    places: Places,
    kind: str,
    modality: str,
    entries: Mapping[str, dict[str, Any]],
    per_scan: int,
    chosen: Path | None,
    summary: Summary,
) -> dict[str, dict[str, Any]]:
    """The slices for grounded questions: their entries; writes their values as .npy float32.

    `per_scan` kept slices of each scan, evenly spread; or those that another list in `chosen`
    names, as far as they are kept.
    """
    wanted: list[str] = []
    if chosen is not None:
        listed = read_json(chosen / f"refrad2d_sampled_dataset_v3_{kind}.json")
        wanted = [str(row.get("rsopid")) for row in listed.values()]
        summary.note("sampled slices not kept", "", sum(id_ not in entries for id_ in wanted))
    else:
        of_scan: dict[str, list[str]] = {}
        for id_, entry in entries.items():
            of_scan.setdefault(entry["scan_rserid"], []).append(id_)
        for ids in of_scan.values():
            count = min(per_scan, len(ids))
            picks = sorted({(2 * k + 1) * len(ids) // (2 * count) for k in range(count)})
            wanted += [ids[pick] for pick in picks]
    sampled = {}
    for id_ in wanted:
        if id_ not in entries:
            continue
        entry = entries[id_]
        scan, axis, index = (entry[key] for key in ("scan_rserid", "slice_axis", "slice_idx"))
        name = f"{scan}_{axis}_{index:03d}"
        path = places.segment / SAMPLED_FOLDER / name[:2] / f"{name}.npy"
        read = read_slice(places.dicom(id_))
        buffer = io.BytesIO()
        np.save(buffer, (read.pixels * read.rescale[0] + read.rescale[1]).astype(np.float32))
        write_bytes(path, buffer.getvalue(), sync=False)
        sampled[name] = {
            "rsopid": id_,
            "scan_rserid": scan,
            "modality": modality,
            "slice_axis": axis,
            "slice_idx": index,
            "scan_slice_path": path.relative_to(places.source).as_posix(),
            "segment_slice_path": entry["segment_slice_path"],
            "bboxes": entry["bboxes"],
        }
    return sampled
