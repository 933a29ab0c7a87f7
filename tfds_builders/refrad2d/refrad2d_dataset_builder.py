"""refrad2d: CT and MR slices with report sentences, boxes and masks, in the RefRad2D layout.

For a hospital's own data laid out for the published code. One record per slice of the split files:
its sentence, clinical context and questions in each language, and the mentions of the sentence
with class and box. The slices for grounded VQA become records with template questions. Pieces that
lie elsewhere are named by their own flags, from --source or from the current folder.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rg_jax.data.record import Record
from rg_jax.errors import UserError
from tfds_builders import common, parallel, pseudonyms
from tfds_builders.common import Problem
from tfds_builders.packed import Packed
from tfds_builders.refrad2d import files, slices
from tfds_builders.splits import Member, SameImages

KINDS = ("ct", "mr")
# Ids are read from so many headers per job: one alone is too little work to send.
HEADERS_PER_JOB = 64

# What a sampled slice may share with a listed one, from the slice itself to the patient.
NEAREST = ("slice", "image", "scan", "study", "patient")


@dataclasses.dataclass(eq=False, kw_only=True)
class RefRad2DConfig(common.RecordConfig):
    """Parameters. The name tells what is not at its default; paths are kept with the data set."""

    modalities: str = common.parameter("ct,mr", "ct, mr or ct,mr")
    languages: str = common.parameter("en,de", "languages of the texts to keep: en, de or en,de")
    templates: str = common.parameter(
        "sampled",
        "grounded template questions: on the slices sampled for them, on all that have boxes (and"
        " the sampled ones), or none, which leaves the sampled slices out",
        ("sampled", "all", "none"),
    )
    leaks: str = common.parameter(
        "refuse",
        "slices, pictures or patients in several splits: refuse to build, or move them to train",
        ("refuse", "move"),
    )
    group_by: str = common.parameter(
        "patient",
        "what must not lie in two splits, besides the slice: patient (PatientID of the DICOM, the"
        " study and the scan), or scan where PatientID says nothing",
        ("patient", "scan"),
    )
    clean: str = common.parameter("ours", "style of text cleaning", ("ours", "published"))
    skip_bad: bool = common.parameter(
        False, "leave out slices that cannot be used instead of stopping"
    )
    hash_groups: bool = common.parameter(
        True, "keep a keyed hash instead of the PatientID as the group of a record"
    )
    group_key: str = common.parameter(
        "",
        "the file with the key of these hashes, made if it is not there: the same key gives the"
        " same groups; keep it away from the records (default: ~/.config/rg_jax/group_key)",
        role="stored",
    )
    split_dir: str = common.parameter(
        "split_v18/generated", "the folder with filtered_{ct,mr}_splits/", role="stored"
    )
    dicom_dir: str = common.parameter("dicoms_anon", "the folder of the slices", role="stored")
    parquet: str = common.parameter(
        "refrad2d_vqa_dataset.parquet", "reports and questions", role="stored"
    )
    segment_dir: str = common.parameter(
        "refrad2d_segment", "the folder of the index JSONs and masks", role="stored"
    )
    licence: str = common.parameter("private", "kept in every record", role="stored")
    workers: int = common.parameter(
        0, "processes that read slices; 0 = the one that writes", role="run"
    )
    beam: bool = common.parameter(
        False, "run as an Apache Beam pipeline instead, e.g. on a cluster", role="run"
    )
    beam_options: str = common.parameter(
        "", "options of the pipeline, e.g. '--runner=FlinkRunner --parallelism=64'", role="run"
    )

    def validate(self) -> None:
        for flag, known in (("modalities", KINDS), ("languages", tuple(files.STRUCTS))):
            chosen = getattr(self, flag).split(",")
            for value in chosen:
                if value not in known:
                    raise UserError(f"--{flag}: {value!r} is not one of {', '.join(known)}")
            if len(set(chosen)) < len(chosen):
                raise UserError(f"--{flag}={getattr(self, flag)}: says the same twice")
        if self.workers < 0:
            raise UserError(f"--workers={self.workers}: must be 0 or more")
        if self.beam_options and not self.beam:
            raise UserError("--beam_options: goes with --beam")
        if not self.licence.strip():
            raise UserError("--licence: must not be empty")


class Builder(common.RecordBuilder):
    """CT and MR slices with sentences, questions, boxes and masks in the RefRad2D layout."""

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = RefRad2DConfig
    SOURCE = "the root of the RefRad2D layout, with dicoms_anon/, the parquet and the JSON files"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "RefRad2D is not public; the source is a folder in its layout."
    IMAGE_DTYPE = "int16"
    CHANNELS = 1

    def splits(self, source: Path) -> dict[str, Iterator[Record | Packed]]:
        config = self.builder_config
        self._places = places = self._find(source)
        self._options = slices.Options(
            places,
            tuple(config.languages.split(",")),
            config.clean,
            config.templates,
            config.licence.strip(),
            self.packing,
        )
        self._reports = files.Reports(places.parquet, self._options.languages)
        for slice_id in self._reports.repeated:
            name = places.name(places.parquet)
            self.report(Problem("duplicate id", name, f"rows of {slice_id} differ", harmful=True))
        for column in self._reports.foreign:
            name = places.name(places.parquet)
            text = f"{column}: nothing of it goes into records"
            self.report(Problem("column that the layout does not have", name, text, harmful=False))
        self._index: dict[str, dict[str, Any]] = {}
        self._sampled: dict[str, tuple[str, dict[str, Any]]] = {}
        self._modality: dict[str, str] = {}
        self._without_index: set[str] = set()
        self._key = self._group_key() if config.hash_groups else b""
        self._pool = parallel.Pool(config.workers)
        try:
            members = self._members()
            if not members:
                raise UserError(f"{places.splits}: the split files list no slice")
            kept = self.guard(members, self._hint(members))
        except BaseException:
            self._pool.close()
            raise
        self._images = SameImages()
        self._seconds, self._done = 0.0, 0
        made, self._ids = {}, {}
        for split in files.SPLITS:
            # Without its index each slice would be a problem of its own.
            ids = [
                member.id
                for member in kept
                if member.split == split
                and self._modality.get(member.id) not in self._without_index
            ]
            if ids:
                self._ids[split] = ids
                made[split] = self._records(split, ids)
        self.expected = {split: len(ids) for split, ids in self._ids.items()}
        if config.beam:
            self._pool.close()
            self.notes.append(
                "a pipeline does not compare pictures across splits, as other builds do"
            )
        return made

    def jobs(self, split: str):
        return slices.run, self._work(self._ids[split])

    def place_of(self, item: Record) -> str:
        if item["id"] in self._sampled:
            return (
                f"{self._places.name(self._places.sampled(item['modality'].lower()))}: {item['id']}"
            )
        return self._places.name(self._places.dicom(item["id"]))

    def _find(self, source: Path) -> files.Places:
        found = {}
        for flag in ("dicom_dir", "parquet", "segment_dir", "split_dir"):
            given = Path(getattr(self.builder_config, flag)).expanduser()
            below = source / given  # an absolute path stays what it is
            place = below if below.exists() or not given.exists() else given.absolute()
            if not (place.is_file() if flag == "parquet" else place.is_dir()):
                what = "file" if flag == "parquet" else "folder"
                raise UserError(f"{place}: no such {what}; --{flag} names another place")
            found[flag] = place
        return files.Places(
            source, found["dicom_dir"], found["parquet"], found["segment_dir"], found["split_dir"]
        )

    def _group_key(self) -> bytes:
        if self.problems is not None:  # a data check compares groups and keeps none
            return pseudonyms.temporary_key()
        given = self.builder_config.group_key
        path = Path(given).expanduser() if given else pseudonyms.default_path()
        key, made = pseudonyms.site_key(path)
        if made:
            self.notes.append(
                f"made a key for the groups of patients, {path}: keep it for later builds, and"
                " away from the records"
            )
        return key

    def _members(self) -> list[Member]:
        """What the split files list, then the sampled slices, with what each belongs to."""
        places, listed = self._places, []
        for kind in self.builder_config.modalities.split(","):
            paths = {split: places.split(split, kind) for split in files.SPLITS}
            missing = [places.name(path) for path in paths.values() if not path.is_file()]
            if len(missing) == len(paths):
                raise UserError(
                    f"{missing[0]}: no such file, nor those of the other splits;"
                    f" --modalities leaves {kind} out, --split_dir names another folder"
                )
            self.notes += [f"{name} is not there: no such split" for name in missing]
            index = self.or_problem(files.read_json, places.index(kind), dict)
            if index is None:  # a data check: leaks are looked for, but no record can be made
                self._without_index.add(kind)
                index = {}
            self._index[kind] = index
            for split, path in paths.items():
                if path.is_file():
                    listed += self._listed(split, kind, path)
        sampled = []
        if self.builder_config.templates != "none":
            for kind in self.builder_config.modalities.split(","):
                if places.sampled(kind).is_file():
                    sampled += self._listed_sampled(kind, listed)
                else:
                    name = places.name(places.sampled(kind))
                    self.notes.append(f"{name} is not there: no slices for grounded questions")
        # Many ids, many headers: the longest part of what is done before the first record.
        ids = list(dict.fromkeys(slice_id for _, slice_id, _, _ in (*listed, *sampled)))
        belongings = self._belongings(ids)
        self._group: dict[str, str] = {}
        members = [self._member(row, belongings) for row in listed]
        return members + self._place_sampled(sampled, members, belongings)

    def _listed(self, split: str, kind: str, path: Path):
        """(record id, slice id, split, file) of a split file; an id that it repeats, once."""
        name, seen = self._places.name(path), set()
        captions, faults = self.or_problem(files.read_split, path) or ({}, [])
        for fault in faults:
            self.report(Problem("unreadable entry", name, fault))
        for ids in captions.values():
            for slice_id in ids:
                if slice_id in self._reports.repeated:
                    continue  # told already; which of its rows is right, nobody knows
                if slice_id in seen:
                    self.report(Problem("duplicate id", name, f"{slice_id} twice", harmful=False))
                    continue
                seen.add(slice_id)
                other = self._modality.setdefault(slice_id, kind)
                if other != kind:
                    text = f"{slice_id} is listed as {other} too"
                    self.report(Problem("duplicate id", name, text))
                    continue
                yield slice_id, slice_id, split, name

    def _listed_sampled(self, kind: str, listed):
        path = self._places.sampled(kind)
        name = self._places.name(path)
        known = {record_id for record_id, *_ in listed}
        entries = self.or_problem(files.read_json, path, dict) or {}
        for record_id, entry in entries.items():
            if not isinstance(entry, dict):
                self.report(Problem("unreadable file", name, f"{record_id} is no object"))
            elif str(entry.get("modality", kind)).lower() != kind:
                text = f"{record_id} has modality {entry['modality']!r}"
                self.report(Problem("wrong modality", name, text))
            elif not files.is_slice_id(record_id):
                self.report(Problem("unreadable entry", name, "an id that is no file name"))
            elif record_id in known or record_id in self._sampled:
                self.report(Problem("duplicate id", name, f"{record_id} is a slice too"))
            else:
                self._sampled[record_id] = (kind, entry)
                yield record_id, str(entry.get("rsopid") or ""), "", name

    def _belongings(self, ids: list[str]) -> dict[str, dict[str, str]]:
        """What the headers of the slices say: {slice id: {"patient", "study", "image"}}."""
        paths = [(slice_id, self._places.dicom(slice_id)) for slice_id in ids if slice_id]
        parts = [paths[at : at + HEADERS_PER_JOB] for at in range(0, len(paths), HEADERS_PER_JOB)]
        read: dict[str, dict[str, str] | None] = {}
        for part in self._pool.map(_headers, parts):
            read.update(part)
        # What cannot be read is told of when its pixels are.
        found = {slice_id: keys for slice_id, keys in read.items() if keys is not None}
        without = sum("patient" not in keys for keys in found.values())
        if without and self.builder_config.group_by == "patient":
            self.counts["slices without PatientID, grouped by scan"] += without
            self.notes.append(f"{without} slices have no PatientID: their scan is kept together")
        return found

    def _member(self, row, belongings) -> Member:
        record_id, slice_id, split, name = row
        keys = dict(belongings.get(slice_id, {}))
        scan = self._scan(record_id)
        if self.builder_config.group_by == "scan":
            keys = {"image": keys["image"]} if "image" in keys else {}
        if scan:
            keys["scan"] = scan
        group = keys.get("patient") or keys.get("scan") or keys.get("study") or record_id
        if self.builder_config.hash_groups:
            group = pseudonyms.pseudonym(self._key, group)
        self._group[record_id] = group
        if slice_id:
            keys["slice"] = slice_id
        return Member(record_id, split, tuple(keys.items()), name)

    def _scan(self, record_id: str) -> str:
        if record_id in self._sampled:
            entry = self._sampled[record_id][1]
        else:
            entry = self._index[self._modality[record_id]].get(record_id)
        return str(entry.get("scan_rserid") or "") if isinstance(entry, dict) else ""

    def _place_sampled(self, sampled, members, belongings) -> list[Member]:
        """Sampled slices lie where their slice, patient or scan does; elsewhere unknown: train."""
        split_of: dict[tuple[str, str], str] = {}
        for member in members:
            for key in member.keys:
                split_of.setdefault(key, member.split)
        placed = []
        for row in sampled:
            member = self._member(row, belongings)
            # The closest relative first: where only the patient is known, others of the patient
            # may lie anywhere, and that is told as the leak that it is.
            near = sorted(member.keys, key=lambda key: NEAREST.index(key[0]))
            found = [split_of[key] for key in near if key in split_of]
            if not found:
                self.counts["sampled slices of no known split, put into train"] += 1
            placed.append(member._replace(split=found[0] if found else "train"))
        return placed

    def _hint(self, members: list[Member]) -> str:
        """Why everything may seem to be one patient's."""
        patients = {key for m in members for kind, key in m.keys if kind == "patient"}
        scans = {key for m in members for kind, key in m.keys if kind == "scan"}
        if len(patients) == 1 and len(scans) > 1:
            return " (all slices have the same PatientID: --group_by=scan if it says nothing)"
        return ""

    def _work(self, ids: list[str]) -> Iterator[tuple[slices.Options, slices.Job]]:
        places = self._places
        for record_id in ids:
            if record_id in self._sampled:
                kind, entry = self._sampled[record_id]
                slice_id, row = str(entry.get("rsopid") or ""), None
                index = places.name(places.sampled(kind))
            else:
                kind, slice_id = self._modality[record_id], record_id
                index = places.name(places.index(kind))
                entry, row = self._index[kind].get(record_id), self._reports.get(record_id)
            job = slices.Job(
                record_id,
                slice_id,
                kind.upper(),
                self._group[record_id],
                index,
                entry,
                row,
                record_id in self._sampled,
            )
            yield self._options, job

    def _records(self, split: str, ids: list[str]) -> Iterator[Record | Packed]:
        """The records of a split, read by the pool. Every problem is told where it was found."""
        started = time.perf_counter()
        with contextlib.closing(self._pool.map(slices.run, self._work(ids))) as outcomes:
            for record_id, outcome in zip(ids, outcomes, strict=True):
                for problem in outcome.problems:
                    self.report(problem)
                self._done += 1
                if outcome.record is None or self._twin(outcome, split, record_id):
                    continue
                yield outcome.record
        self._seconds += time.perf_counter() - started
        if split == list(self.expected)[-1]:
            self._pool.close()
            workers = self.builder_config.workers
            processes = f"{workers} worker processes" if workers else "one process"
            # A data check looks longer at each record than a build does: no rate of the build.
            if self.problems is None:
                self.notes.append(
                    f"{self._done} slices in {self._seconds:.1f} s:"
                    f" {self._done / max(self._seconds, 1e-9):.0f} slices/s with {processes}"
                )

    def _twin(self, outcome: slices.Outcome, split: str, record_id: str) -> bool:
        # A data check compares the pictures itself.
        return self.problems is None and self.same_image(
            self._images, outcome.digest, split, record_id
        )


def _headers(part: list[tuple[str, Path]]) -> dict[str, dict[str, str] | None]:
    return {slice_id: files.belongings(path) for slice_id, path in part}
