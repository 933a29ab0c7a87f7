"""Stage d: volumes, masks, mentions and reports → a folder in the official RefRad2D layout.

    python -m tools.build_slices --root=DIR --out=DIR

The root holds scans_index_{ct,mr}.json, scans/, segmentations/ (stage a), keywords_{en,de}.json
(stage b), the reports parquet (stage c) and, if there is one, a folder of split JSONs; each can be
given its own path. A slice is kept if at least one structure that its sentence mentions is on it
(the strict filter). Slices are cut in LPS and written as .dcm.zst with a header of pixels,
geometry and patient key only, or taken from existing ones (--dicom_dir).

Patients: "patient" in the index, else --patients, else the PatientID of the DICOM series or of
the volume's .json, which is never written out (the first scan of that patient stands for it), else
the scan stands for itself. Without split JSONs they are made by patient, from --seed.

Every slice is written whole or not at all and noted in OUT/build_slices.jsonl; after an
interruption, at any moment, the same command goes on from there. The split JSONs come last: a
folder without them is no data set yet.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.data.dicom import read_slice
from rg_jax.data.identifying import may_be_hospital_number, may_be_pseudonym
from rg_jax.data.volume import Volume, plane_of, slice_of, to_lps, union_boxes
from rg_jax.errors import UserError
from tfds_builders.refrad2d.files import KEYWORDS, SPLITS, STRUCTS, Places, Reports
from tools import scans as scans_
from tools.layout import SAMPLED_FOLDER, make_splits, sampled_slices, take_splits, write_reports
from tools.mentions import Mentions, kept_mentions
from tools.scans import Scan
from tools.segment_volumes import checked_mask
from tools.stages import (
    Journal,
    Parser,
    Summary,
    clear_aside,
    command,
    fingerprint,
    need,
    progress,
    read_json,
    write_bytes,
    write_folder_aside,
    write_json,
    write_json_items,
)

KINDS = {"ct": "CT", "mr": "MR"}
VERSION = 1  # of what a result in the journal means
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


class Left(Exception):  # noqa: N818 (no error: the slice is counted and left out)
    """A slice that is left out: the reason under which it is counted, and the culprit."""

    def __init__(self, reason: str, place: object):
        super().__init__(reason)
        self.reason, self.place = reason, str(place)


def parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.build_slices")
    add = parser.add_argument
    add("--root", required=True, help="folder of the input")
    add("--out", required=True, help="folder of the data set to be, not the root")
    add("--scans", default="", help="volumes (default: ROOT/scans)")
    add("--segmentations", default="", help="masks (default: ROOT/segmentations)")
    add("--index_dir", default="", help="folder of scans_index_{ct,mr}.json (default: ROOT)")
    add("--keywords", default="", help="folder of keywords_{en,de}.json (default: ROOT)")
    add("--parquet", default="", help="reports (default: ROOT/refrad2d_vqa_dataset.parquet)")
    add("--splits", default="", help="split JSONs (default: ROOT/split_v18/generated if there)")
    add("--dicom_dir", default="", help="take slices from here, {id[:2]}/{id}.dcm.zst")
    add("--patients", default="", help="JSON {scan: patient key}; keys must be pseudonyms")
    add("--languages", default="en,de", help="of the reports: en, de or both (default: en,de)")
    add("--modalities", default="ct,mr", help="ct, mr or both (default: ct,mr)")
    add("--seed", type=int, default=0, help="for splits that are made here (default: 0)")
    add("--shares", default="0.8,0.1,0.1", help="train,val,test by patients (same default)")
    add("--sampled", type=int, default=2, help="slices per scan for grounded questions")
    add("--sampled_dir", default="", help="take their choice from refrad2d_sampled_dataset_v3_*")
    return parser


def places_of(folder: Path) -> Places:
    return Places(
        folder,
        folder / "dicoms_anon",
        folder / "refrad2d_vqa_dataset.parquet",
        folder / "refrad2d_segment",
        folder / "split_v18" / "generated",
    )


class Build:
    """One run of the stage: its inputs, its journal, what it writes."""

    def __init__(self, options: argparse.Namespace):
        need(("pydicom", "zstandard", "nibabel", "pyarrow"))
        self.options = options
        self.root, self.out = Path(options.root), Path(options.out)
        if not self.root.is_dir():
            raise UserError(f"--root={self.root}: no such folder")
        if self.out.resolve() == self.root.resolve():
            raise UserError(f"--out={self.out}: is the root; the result needs its own folder")
        self.places = places_of(self.out)
        self.dicoms = Path(options.dicom_dir) if options.dicom_dir else None
        if self.dicoms and not self.dicoms.is_dir():
            raise UserError(f"--dicom_dir={self.dicoms}: no such folder")
        self.kinds = [kind for kind in options.modalities.split(",") if kind]
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise UserError(f"--modalities={options.modalities}: ct, mr or ct,mr")
        self.shares = _shares(options.shares)
        self.split_input = self._split_input()
        self.parquet = Path(options.parquet or self.root / self.places.parquet.name)
        self.mentions = Mentions(Path(options.keywords or self.root))
        self.scans = self._read_scans()
        self.patients = scans_.name_patients(self.scans, options.patients)
        languages = tuple(code for code in options.languages.split(",") if code)
        if not languages or set(languages) - set(STRUCTS):
            raise UserError(f"--languages={options.languages}: en, de or en,de")
        self.reports = Reports(self.parquet, languages)
        self.summaries = [Summary(f"{KINDS[kind]} slices") for kind in self.kinds]
        listed = Counter(id_ for kind in self.kinds for s in self.scans[kind] for id_ in s.slices)
        self.repeated = {id_ for id_, count in listed.items() if count > 1}

    # Inputs

    def _split_input(self) -> Path | None:
        if self.options.splits:
            folder = Path(self.options.splits)
            if not folder.is_dir():
                raise UserError(f"--splits={folder}: no such folder")
            return folder
        folder = self.root / "split_v18" / "generated"
        return folder if folder.is_dir() else None

    def _read_scans(self) -> dict[str, list[Scan]]:
        scans = Path(self.options.scans or self.root / "scans")
        masks = Path(self.options.segmentations or self.root / "segmentations")
        folder = Path(self.options.index_dir or self.root)
        there = [kind for kind in self.kinds if (folder / f"scans_index_{kind}.json").is_file()]
        for kind in self.kinds:
            if kind not in there:
                hint = f"; --modalities={','.join(there)} leaves {kind} out" if there else ""
                raise UserError(f"{folder / f'scans_index_{kind}.json'}: no such file{hint}")
        return {
            kind: scans_.read_index(folder / f"scans_index_{kind}.json", KINDS[kind], scans, masks)
            for kind in self.kinds
        }

    # Slices

    def run(self) -> list[Summary]:
        clear_aside(self.out)
        self.journal = Journal(self.out / "build_slices.jsonl", VERSION)
        work = list(self._work())
        with progress(None, "build slices", "slice", len(work)) as bar:
            for kind, scan, ids in _by_scan(work):
                self._do_scan(kind, scan, ids, bar)
        kept = self._collect(work)
        if not any(kept.values()):
            return self.summaries
        final = self._final()
        key = "the JSON files"
        if self._recorded(key) != final or not self.places.splits.is_dir():
            self._unfinish()
            self._write_final(kept)
            self.journal.add(key, {"inputs": final})
        self._remove_others(kept, key)
        self.journal.close()
        return self.summaries

    def _remove_others(self, kept: dict[str, dict[str, Any]], final: str) -> None:
        """Files of slices that an earlier run made and this one does not keep, and their results.

        A patient who is withdrawn must not stay. A run of a part of the slices removes nothing.
        """
        if self.options.limit or set(self.kinds) != set(KINDS):
            return
        work = {id_ for kind in self.kinds for scan in self.scans[kind] for id_ in scan.slices}
        stay = {id_ for results in kept.values() for id_ in results}
        gone = [id_ for id_ in self.journal if id_ not in stay and id_ != final]
        removed = 0
        for id_ in gone:
            paths = [
                path for path in (self.places.dicom(id_), self._mask_path(id_)) if path.exists()
            ]
            for path in paths:
                path.unlink()
            removed += bool(paths)
        self.summaries[-1].note("slices of an earlier run removed", "", removed)
        sampled = {name for kind in self.kinds for name in read_json(self.places.sampled(kind))}
        for path in (self.places.segment / SAMPLED_FOLDER).rglob("*.npy"):
            if path.stem not in sampled:
                path.unlink()
        self.journal.forget(id_ for id_ in gone if id_ not in work)

    def _recorded(self, key: str) -> str | None:
        return self.journal[key]["inputs"] if key in self.journal else None

    def _unfinish(self) -> None:
        """From here on the folder is no data set, until the split JSONs are back."""
        shutil.rmtree(self.places.splits.parent, ignore_errors=True)

    def _work(self) -> Iterable[tuple[str, Scan, str]]:
        left = self.options.limit or sys.maxsize
        for kind in self.kinds:
            for scan in self.scans[kind]:
                for id_ in list(scan.slices)[:left]:
                    yield kind, scan, id_
                left -= min(left, len(scan.slices))

    def _do_scan(self, kind: str, scan: Scan, ids: list[str], bar: Any) -> None:
        stamp = scans_.stamp(scan)
        inputs = {id_: self._inputs(kind, scan, id_, stamp) for id_ in ids}
        todo = [id_ for id_ in ids if not self._done(id_, inputs[id_])]
        bar.update(len(ids) - len(todo))
        if not todo:
            return
        self._unfinish()
        try:
            volumes: _Loaded | Left = self._load(scan)
        except Left as left:
            volumes = left
        for id_ in todo:
            result: dict[str, Any] = {"inputs": inputs[id_]}
            try:
                if isinstance(volumes, Left):
                    raise volumes
                result |= self._slice(kind, scan, id_, volumes)
            except Left as left:
                result |= {"left_out": left.reason, "place": left.place}
            self.journal.add(id_, result)
            bar.update()

    def _inputs(self, kind: str, scan: Scan, id_: str, stamp: list[Any]) -> str:
        row = self.reports.get(id_) or {}
        texts = {
            code: (row.get(name) or {}).get("CleanedSentence") for code, name in STRUCTS.items()
        }
        mentions = [self.mentions.of(code, text or "") for code, text in texts.items()]
        existing = None
        if self.dicoms and (path := _path(self.dicoms, id_, ".dcm.zst")).is_file():
            existing = [path.stat().st_size, path.stat().st_mtime_ns]
        patient = self.patients[kind, scan.name]
        return fingerprint(
            *(kind, scan.name, scan.slices[id_], stamp, patient, id_ in self.repeated),
            *(texts, mentions, row.get("modality"), row.get("body_part")),
            *(bool(self.dicoms), existing),
        )

    def _done(self, id_: str, inputs: str) -> bool:
        if self._recorded(id_) != inputs:
            return False
        return "left_out" in self.journal[id_] or (
            self.places.dicom(id_).is_file() and self._mask_path(id_).is_file()
        )

    def _mask_path(self, id_: str) -> Path:
        return _path(self.places.segment / "segmented_slices_v3", id_, ".npy")

    def _load(self, scan: Scan) -> "_Loaded":
        for path in (scan.volume, scan.mask):
            if not path.exists():
                raise Left("missing file", path)
        try:
            volume, _ = scans_.load(scan)
            mask = checked_mask(scan, volume)
            volume = to_lps(volume)
            from tools.slice_files import rescale_of

            slope, intercept, exact = rescale_of(volume.array, scan.modality)
        except UserError as error:
            raise Left(_kind_of(str(error)), error) from error
        return _Loaded(volume, mask, (slope, intercept), exact)

    def _slice(self, kind: str, scan: Scan, id_: str, loaded: "_Loaded") -> dict[str, Any]:
        axis, index = scan.slices[id_]
        where = f"{scan.name}: {id_}"
        if id_ in self.repeated:
            raise Left("duplicate id", where)
        if not _ID.fullmatch(id_):
            raise Left("id that is no file name", where)
        row = self.reports.get(id_)
        if row is None:
            raise Left("no report", where)
        if id_ in self.reports.repeated:
            raise Left("reports that differ", where)
        if str(row.get("modality") or scan.modality).upper() != scan.modality:
            raise Left("report of another modality", where)
        try:
            if index < 0:
                raise IndexError
            mask = slice_of(loaded.mask, axis, index)
        except (IndexError, UserError):
            raise Left("slice outside the volume", f"{where}: axis {axis}, index {index}") from None
        present = set(map(int, np.unique(mask))) - {0}
        notes: list[str] = [] if loaded.exact else ["values rounded to 16 bits"]
        keywords, mentioned, captions, unanswered = {}, 0, 0, 0
        for language, struct in STRUCTS.items():
            text = str((row.get(struct) or {}).get("CleanedSentence") or "")
            captions += bool(text.strip())
            mentions = self.mentions.of(language, text)
            if mentions is None:
                unanswered, mentions = unanswered + 1, {}
                notes.append(f"sentence ({language}) that stage b has not answered")
            mentioned += len(mentions)
            keywords[KEYWORDS[language]] = kept_mentions(text, mentions, present, notes, language)
        if not captions:
            raise Left("no sentence in the report", where)
        if not mentioned and unanswered:
            raise Left("sentence without an answer of stage b", where)
        if not mentioned:
            raise Left("sentence without mentions", where)
        if not any(keywords.values()):
            raise Left("no mentioned structure on the slice", where)
        patient = self._write_slice(kind, scan, id_, loaded, row, notes)
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(mask))
        write_bytes(self._mask_path(id_), buffer.getvalue(), sync=False)
        entry = {
            "scan_rserid": scan.name,
            "scan_file": scan.file,
            "slice_axis": axis,
            "slice_idx": index,
            "segment_scan_path": f"segmentations/{scan.name}/{scan.mask.name}",
            "segment_slice_path": self._relative(self._mask_path(id_)),
            **keywords,
            "bboxes": [list(box) for box in union_boxes(mask)],
        }
        return {"entry": entry, "patient": patient, "notes": notes}

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def _write_slice(
        self,
        kind: str,
        scan: Scan,
        id_: str,
        loaded: "_Loaded",
        row: dict[str, Any],
        notes: list[str],
    ) -> str:
        """Write the slice file; returns the patient key that it bears."""
        import zstandard

        axis, index = scan.slices[id_]
        values, plane = slice_of(loaded.volume, axis, index), plane_of(loaded.volume, axis, index)
        patient = self.patients[kind, scan.name]
        if self.dicoms is None:
            from tools.slice_files import dicom_file

            content = dicom_file(
                *(id_, values, loaded.rescale, plane, scan.modality, patient, scan.name),
                body_part=str(row.get("body_part") or ""),
                number=index + 1,
            )
            if may_be_hospital_number(patient):
                notes.append("patient key that may be a hospital's own number, in the PatientID")
            content = zstandard.ZstdCompressor(level=9).compress(content)
        else:
            path = _path(self.dicoms, id_, ".dcm.zst")
            if not path.is_file():
                raise Left("missing file", path)
            content = path.read_bytes()
            try:
                existing = read_slice(content, str(path))
            except UserError as error:
                raise Left("unreadable file", error) from error
            theirs = existing.pixels * existing.rescale[0] + existing.rescale[1]
            step = max(abs(existing.rescale[0]), abs(loaded.rescale[0]))
            if theirs.shape != values.shape or np.abs(theirs - values).max() > step:
                raise Left("slice file unlike its place in the volume", path)
            notes += existing.repairs
            if existing.identifying:
                notes.append("identifying tags in a slice file that was taken as it is")
            if existing.patient:
                patient = existing.patient
                if not may_be_pseudonym(patient) or may_be_hospital_number(patient):
                    # The file keeps what it has, but the journal and the summary do not learn it.
                    digest = hashlib.sha256(patient.encode()).hexdigest()
                    patient = f"patient-{digest[:12]}-0"
        write_bytes(self.places.dicom(id_), content, sync=False)
        return patient

    # The JSON files

    def _collect(self, work: list[tuple[str, Scan, str]]) -> dict[str, dict[str, Any]]:
        """kind → {id: {"patient"}} of the slices that are kept; counts them all.

        The rest of their results stays in the journal: an archive may have a million.
        """
        kept: dict[str, dict[str, Any]] = {kind: {} for kind in self.kinds}
        same: dict[str, dict[str, str]] = {}
        digest = hashlib.sha256()
        for (kind, _, id_), summary in (
            (item, self.summaries[self.kinds.index(item[0])]) for item in work
        ):
            result = self.journal[id_]
            if "left_out" in result:
                summary.leave_out(result["left_out"], result["place"])
                continue
            summary.keep("with a mentioned structure on it")
            for note in result["notes"]:
                summary.note(note, id_)
            patient = result["patient"]
            kept[kind][id_] = same.setdefault(patient, {"patient": patient})
            digest.update(json.dumps([kind, id_, result], sort_keys=True).encode())
        self.digest = digest.hexdigest()
        return kept

    def _final(self) -> str:
        splits = (
            sorted(self.split_input.rglob("snippet2rsopids_*.json")) if self.split_input else []
        )
        stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in (*splits, self.parquet)]
        chosen = (
            self.options.languages,
            self.options.seed,
            self.shares,
            self.options.sampled,
            self.options.sampled_dir,
        )
        return fingerprint(self.digest, stamps, chosen)

    def _write_final(self, kept: dict[str, dict[str, Any]]) -> None:
        modality_of = {id_: KINDS[kind] for kind in self.kinds for id_ in kept[kind]}
        write_reports(self.parquet, self.places.parquet, modality_of)
        chosen = Path(self.options.sampled_dir) if self.options.sampled_dir else None
        for kind, summary in zip(self.kinds, self.summaries, strict=True):
            entries = _Entries(self.journal, kept[kind])
            write_json_items(self.places.index(kind), entries.items())
            sampled = sampled_slices(
                self.places, kind, KINDS[kind], entries, self.options.sampled, chosen, summary
            )
            write_json(self.places.sampled(kind), sampled)
        if self.split_input:
            splits = take_splits(self.split_input, kept, self.summaries)
        else:
            splits = make_splits(
                kept, self._captions(kept), self.shares, self.options.seed, self.summaries
            )
        with write_folder_aside(self.places.splits.parent) as aside:
            target = dataclasses.replace(self.places, splits=aside / self.places.splits.name)
            for kind in self.kinds:
                for split in SPLITS:
                    write_json(target.split(split, kind), splits[kind][split])

    def _captions(self, kept: dict[str, dict[str, Any]]) -> dict[str, str]:
        captions = {}
        for kind in self.kinds:
            for id_ in kept[kind]:
                row = self.reports.get(id_) or {}
                texts = ((row.get(name) or {}).get("CleanedSentence") for name in STRUCTS.values())
                captions[id_] = next(text for text in texts if text and text.strip())
        return captions


class _Entries(Mapping[str, dict[str, Any]]):
    """The index entries of kept slices, read from the journal one by one."""

    def __init__(self, journal: Journal, ids: Mapping[str, Any]):
        self._journal, self._ids = journal, ids

    def __getitem__(self, id_: str) -> dict[str, Any]:
        if id_ not in self._ids:
            raise KeyError(id_)
        return self._journal[id_]["entry"]

    def __contains__(self, id_: object) -> bool:
        return id_ in self._ids

    def __iter__(self):
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A scan in LPS: values, class ids, the rescale of its slices, whether that is exact."""

    volume: Volume
    mask: Volume
    rescale: tuple[float, float]
    exact: bool


def _kind_of(error: str) -> str:
    if " voxels, its volume " in error or "beside its volume" in error:
        return "mask of another shape"
    if "unknown to the task" in error or "not whole" in error or "negative label" in error:
        return "unknown class"
    return "unreadable file"


def _path(folder: Path, id_: str, suffix: str) -> Path:
    return folder / id_[:2] / f"{id_}{suffix}"


def _by_scan(work: Iterable[tuple[str, Scan, str]]):
    grouped: dict[tuple[str, str], tuple[str, Scan, list[str]]] = {}
    for kind, scan, id_ in work:
        grouped.setdefault((kind, scan.name), (kind, scan, []))[2].append(id_)
    return grouped.values()


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"--shares={text}: three shares for train,val,test that add up to 1")
    return shares


def run(options: argparse.Namespace) -> list[Summary]:
    if options.sampled < 0:
        raise UserError(f"--sampled={options.sampled}: must be 0 or more")
    summaries = Build(options).run()
    if not any(sum(summary.kept.values()) for summary in summaries):
        lines = "; ".join(line.strip() for summary in summaries for line in summary.lines())
        raise UserError(f"no slice is left, so nothing was written: {lines}")
    return summaries


def main(argv: list[str] | None = None) -> None:
    command(run, parser(), argv)


if __name__ == "__main__":
    main(sys.argv[1:])
