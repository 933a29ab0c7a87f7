"""The list of scans that the stages share: where volumes and masks lie, and whose they are.

scans_index_{ct,mr}.json: {scan: {"rel_dir", "file", "slices": {id: {"slice_axis", "slice_idx"}}}}
    and, if known, "patient": a key to split by.
scans/{rel_dir}/{file}: a NIfTI file, or a folder with the files of one DICOM series.
scans/{rel_dir}/{stem}.json: may say {"Modality", "PatientID"} of a NIfTI file.
segmentations/{scan}/seg_{file}: labels of TotalSegmentator, with its own ids, as NIfTI.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from rg_jax.data.dicom import files_of_series, read_series_of, read_slice
from rg_jax.data.identifying import may_be_pseudonym
from rg_jax.data.volume import TASK_OF, Volume, read_nifti
from rg_jax.errors import UserError
from tools.stages import read_json

NIFTI = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True)
class Scan:
    """One volume: its name in the index, "CT" or "MR", its files, its slices {id: (axis, index)}.

    `patient` is what the index says; empty if nothing.
    """

    name: str
    modality: str
    file: str
    volume: Path
    mask: Path
    slices: dict[str, tuple[int, int]]
    patient: str = ""

    @property
    def is_series(self) -> bool:
        return self.volume.is_dir()

    @property
    def sidecar(self) -> Path:
        return self.volume.with_name(_stem(self.volume.name) + ".json")


def _stem(name: str) -> str:
    return next((name.removesuffix(end) for end in NIFTI if name.endswith(end)), name)


def read_index(path: Path, modality: str, scans: Path, segmentations: Path) -> list[Scan]:
    """The scans of an index, in its order. UserError naming file and scan for anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no {{scan: …}}")
    return [
        _scan(path, name, entry, modality, scans, segmentations) for name, entry in content.items()
    ]


def _scan(
    path: Path, name: str, entry: Any, modality: str, scans: Path, segmentations: Path
) -> Scan:
    try:
        if "/" in name or name.startswith(".") or not name:
            raise ValueError("its name cannot be that of a folder")
        file = str(entry.get("file") or "").strip("/")
        relative = str(entry.get("rel_dir", name))
        slices = {
            str(id_): (int(place["slice_axis"]), int(place["slice_idx"]))
            for id_, place in entry.get("slices", {}).items()
        }
        patient = str(entry.get("patient") or "").strip()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: scan {name!r} is not {{rel_dir, file, slices: {{id: {{slice_axis,"
            f" slice_idx}}}}}} ({type(error).__name__}: {error})"
        ) from error
    volume = scans / relative / file if file else scans / relative
    mask = f"seg_{_stem(file.replace('/', '_')) or 'series'}.nii.gz"
    return Scan(name, modality, file, volume, segmentations / name / mask, slices, patient)


def load(scan: Scan) -> tuple[Volume, str]:
    """The volume of a scan and the PatientID beside it ("" if there is none).

    Raises UserError for a file that is missing or unreadable, or of another modality than the
    index says.
    """
    if scan.is_series:
        volume, patient = read_series_of(scan.volume)
        found = volume.modality
    else:
        volume = read_nifti(scan.volume, scan.modality)
        found, patient = _sidecar(scan)
    if found and found != scan.modality:
        raise UserError(f"{scan.volume}: is {found}, but listed as {scan.modality}")
    return dataclasses.replace(volume, modality=scan.modality), patient


def _sidecar(scan: Scan) -> tuple[str, str]:
    if not scan.sidecar.is_file():
        return "", ""
    content = read_json(scan.sidecar)
    if not isinstance(content, dict):
        raise UserError(f"{scan.sidecar}: holds no {{name: value}}")
    return (
        str(content.get("Modality") or "").strip().upper(),
        str(content.get("PatientID") or "").strip(),
    )


def patient_of(scan: Scan) -> str:
    """The PatientID of a scan before its volume is read: of a file of the series, or the sidecar.

    Files are tried until one can be read. Empty where none names a patient, or where nothing can
    be read at all: that shows when the volume is.
    """
    try:
        if not scan.is_series:
            return _sidecar(scan)[1]
        files = files_of_series(scan.volume)
    except (UserError, OSError):
        return ""
    for path in files:
        try:
            patient = read_slice(path, frame=0).patient
        except UserError:
            continue
        if patient:
            return patient
    return ""


def name_patients(scans: dict[str, list[Scan]], given: str) -> dict[tuple[str, str], str]:
    """(kind, scan) → the key to split by: the index's, that of the JSON file `given`, or a scan.

    Where neither says one, PatientIDs of raw headers tell which scans belong together, and the
    name of the first of these scans stands for them: an id of the archive must not leave it.
    """
    listed = read_json(given) if given else {}
    if not isinstance(listed, dict):
        raise UserError(f"--patients={given}: is not {{scan: patient}}")
    named: dict[tuple[str, str], str] = {}
    first: dict[str, str] = {}
    for kind, found in scans.items():
        for scan in found:
            key = scan.patient or str(listed.get(scan.name, "")).strip()
            if key and not may_be_pseudonym(key):
                where = f"--patients={given}" if not scan.patient else "the index"
                raise UserError(
                    f"{where}: the patient key of {scan.name} may be a name (no digit, two"
                    " words, a date); keys must be pseudonyms: they go into the slices"
                )
            if not key:
                raw = patient_of(scan)
                key = first.setdefault(raw, scan.name) if raw else scan.name
                if not may_be_pseudonym(key):
                    key = f"scan-{hashlib.sha256(key.encode()).hexdigest()[:12]}-0"
            named[kind, scan.name] = key
    return named


def stamp(scan: Scan) -> list[Any]:
    """What changes when one of the files of a scan does: their names, sizes and times."""
    paths = [scan.mask, scan.sidecar]
    paths += sorted(scan.volume.iterdir()) if scan.is_series else [scan.volume]
    found = []
    for path in paths:
        try:
            state = path.stat()
            found.append([path.name, state.st_size, state.st_mtime_ns])
        except OSError:
            found.append([path.name, None, None])
    return found


def modality_named(path: Path) -> str:
    """CT or MR from the name of an index, scans_index_ct.json. UserError if it tells neither."""
    for modality in TASK_OF:
        if path.stem.lower().endswith(f"_{modality.lower()}"):
            return modality
    raise UserError(
        f"{path}: its name ends in neither _ct nor _mr; --modality=CT or MR says what it lists"
    )
