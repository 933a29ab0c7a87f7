"""DICOM files read as radiology software does: one slice, or a series as a volume.

`read_slice` gives pixels as stored and the two numbers that make them HU (DICOM PS3.3, C.11.1).
What a header leaves open is decided here alone, and every decision that changes or guesses
something is told in `Slice.repairs`, so that builders can count it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from rg_jax.data.dicom_file import Header, narrow, open_file, quiet, stored_pixels, words
from rg_jax.data.identifying import identifying_keywords
from rg_jax.data.volume import Volume
from rg_jax.errors import UserError

INVERTED = "MONOCHROME1 inverted"
SLOPE_ASSUMED = "missing slope taken as 1"
INTERCEPT_ASSUMED = "missing intercept taken as 0"
LUT_APPLIED = "modality LUT applied"
BAD_SPACING = "unusable spacing taken as unknown"
BAD_GEOMETRY = "unusable orientation or position taken as unknown"

# Where multi-frame files keep what single slices have at the top of their header.
_VALUES = "PixelValueTransformationSequence"
_MEASURES = "PixelMeasuresSequence"
_ORIENTATION = "PlaneOrientationSequence"
_POSITION = "PlanePositionSequence"


@dataclasses.dataclass(frozen=True)
class Slice:
    """One image with what is needed to use it.

    `pixels` (H, W) are int16 or uint16 as stored, but MONOCHROME1 is inverted already and a
    modality LUT applied; pixel * rescale[0] + rescale[1] is the value (HU for CT). `spacing_mm` is
    (row, column), (0, 0) if unknown. `orientation` is the direction of a row, then of a column;
    `position` the centre of the first pixel; both in LPS. `identifying` holds the DICOM keywords,
    never the values, of elements that may identify someone. `patient` is the PatientID, the key
    by which to split; empty if there is none. `syntax` names the transfer syntax where it is not
    the plain one ("RLE Lossless", "Implicit VR Little Endian").
    """

    pixels: Integer[np.ndarray, "H W"]
    rescale: tuple[float, float]
    modality: str
    spacing_mm: tuple[float, float]
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    repairs: tuple[str, ...] = ()
    identifying: tuple[str, ...] = ()
    patient: str = ""
    syntax: str = ""

    def as_int16(self) -> Slice:
        """The same values with int16 pixels: uint16 beyond the range of int16 is moved, exactly."""
        if self.pixels.dtype == np.int16:
            return self
        if self.pixels.max(initial=0) <= np.iinfo(np.int16).max:
            return dataclasses.replace(self, pixels=self.pixels.astype(np.int16))
        moved = (self.pixels.astype(np.int32) - 2**15).astype(np.int16)
        slope, intercept = self.rescale
        return dataclasses.replace(self, pixels=moved, rescale=(slope, intercept + 2**15 * slope))


def read_slice(data: bytes | Path, name: str = "", frame: int | None = None) -> Slice:
    """Read a DICOM image, plain or zstandard-compressed (told by its content).

    `data` is a path or the file's bytes; `name` stands in messages (default: the path). `frame`
    counts from 0 and must be given for a file of several frames. Raises UserError, naming the
    file, for whatever is no single grey image with a stated meaning: unreadable or truncated,
    several frames and none chosen, colour, float, values beyond 16 bits, a CT without rescale
    intercept, a transfer syntax without its plug-in.
    """
    header = open_file(data, name)
    frames = header.frames()
    if frame is None:
        if frames > 1:
            header.fail(f"holds {frames} frames; say which one (frame=0 … {frames - 1})")
        frame = 0
    if not 0 <= frame < frames:
        header.fail(f"has no frame {frame}; its frames are 0 … {frames - 1}")
    return _slice(header, frame)


def read_series(folder: str | Path) -> Volume:
    """A folder of the slices of one series → volume (X, Y, Z) of values (HU), affine to RAS+.

    All files count but hidden ones and a DICOMDIR; a multi-frame file gives all its frames. They
    are sorted by position along the normal, never by name or number. Raises UserError for
    anything that would make a wrong volume: several series, other sizes, orientations or
    spacings, no position, a slice twice, a gap, slices that do not lie on a line, or MONOCHROME1
    with a modality LUT.
    """
    return read_series_of(folder)[0]


def files_of_series(folder: str | Path) -> list[Path]:
    """The files of a series, by name: all of its folder but hidden ones and a DICOMDIR."""
    found = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(p for p in found if p.name[0] != "." and p.name.upper() != "DICOMDIR")


def read_series_of(folder: str | Path) -> tuple[Volume, str]:
    """`read_series` and the PatientID that all its slices bear ("" where there is none)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a DICOM series is a folder of its slices")
    slices: list[tuple[str, Slice]] = []
    series: set[str] = set()
    thickness = 0.0
    for path in files_of_series(folder):
        header = open_file(path, "")
        uid = header.text("SeriesInstanceUID")
        series |= {uid} if uid else set()
        for frame in range(header.frames()):
            slices.append((path.name, _slice(header, frame)))
            for keyword in ("SliceThickness", "SpacingBetweenSlices"):
                thickness = header.number(keyword, frame, _MEASURES) or thickness
    if not slices:
        raise UserError(f"{folder}: holds no files; a DICOM series is a folder of its slices")
    if len(series) > 1:
        raise UserError(f"{folder}: holds {len(series)} series; give each its own folder")
    patients = {piece.patient for _, piece in slices}
    if len(patients) > 1:
        raise UserError(f"{folder}: holds slices of {len(patients)} patients; separate them")
    return _stack(folder, _inverted_alike(folder, slices), abs(thickness)), patients.pop()


def _inverted_alike(folder: Path, slices: list[tuple[str, Slice]]) -> list[tuple[str, Slice]]:
    """Inverted slices of a series about one value, that of all: each about its own differ.

    Inverting about minimum + maximum leaves both as they are: they can be read off the result,
    but not behind a look-up table. UserError for that, unless there is one slice alone.
    """
    inverted = [i for i, (_, s) in enumerate(slices) if INVERTED in s.repairs]
    if not inverted or len(slices) == 1:
        return slices
    for i in inverted:
        name, piece = slices[i]
        if LUT_APPLIED in piece.repairs:
            raise UserError(
                f"{folder / name}: MONOCHROME1 with a modality LUT in a series: its slices cannot"
                " be inverted alike; export the series as MONOCHROME2"
            )
    ends = {i: (int(slices[i][1].pixels.min()), int(slices[i][1].pixels.max())) for i in inverted}
    middle = min(low for low, _ in ends.values()) + max(high for _, high in ends.values())
    alike = list(slices)
    for i, (low, high) in ends.items():
        name, piece = slices[i]
        moved = piece.pixels.astype(np.int32) + (middle - low - high)
        alike[i] = name, dataclasses.replace(piece, pixels=moved.astype(piece.pixels.dtype))
    return alike


# One image


def _slice(header: Header, frame: int) -> Slice:
    with quiet():
        repairs: list[str] = []
        pixels = stored_pixels(header, frame)
        if header.text("PhotometricInterpretation") == "MONOCHROME1":
            low, high = int(pixels.min()), int(pixels.max())
            pixels = (low + high - pixels.astype(np.int32)).astype(pixels.dtype)
            repairs.append(INVERTED)
        modality = header.text("Modality").upper()
        if header.get("ModalityLUTSequence"):
            pixels = _modality_lut(header, pixels, modality)
            rescale = (1.0, 0.0)
            repairs.append(LUT_APPLIED)
        else:
            rescale = _rescale(header, frame, modality, repairs)
        return Slice(
            np.ascontiguousarray(pixels),
            rescale,
            modality,
            _spacing(header, frame, repairs),
            *_geometry(header, frame, repairs),
            repairs=tuple(repairs),
            identifying=identifying_keywords(header.dataset),
            patient=header.text("PatientID"),
            syntax=_syntax(header),
        )


def _syntax(header: Header) -> str:
    """The name of an unusual transfer syntax; empty for the plain one, and where none is given."""
    meta = getattr(header.dataset, "file_meta", None)
    syntax = getattr(meta, "TransferSyntaxUID", None)
    if syntax is None or syntax == "1.2.840.10008.1.2.1":  # explicit VR, little endian
        return ""
    return syntax.name


def _rescale(header: Header, frame: int, modality: str, repairs: list[str]) -> tuple[float, float]:
    slope = header.number("RescaleSlope", frame, _VALUES)
    intercept = header.number("RescaleIntercept", frame, _VALUES)
    if intercept is None and modality == "CT":
        header.fail(
            "CT without rescale intercept: its values cannot be turned into HU; repair the header"
            " or leave the file out"
        )
    if slope == 0:
        header.fail("RescaleSlope is 0, which makes every pixel the same")
    if slope is None and intercept is not None:
        repairs.append(SLOPE_ASSUMED)
    if intercept is None and slope is not None:
        repairs.append(INTERCEPT_ASSUMED)
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def _modality_lut(header: Header, pixels: np.ndarray, modality: str) -> np.ndarray:
    item = header.dataset.ModalityLUTSequence[0]
    if modality == "CT" and str(item.get("ModalityLUTType") or "") != "HU":
        header.fail("CT whose modality LUT does not give HU; its values have no known meaning")
    try:
        from pydicom.pixels.processing import apply_modality_lut

        mapped = apply_modality_lut(pixels, header.dataset)
    except Exception as error:
        raise UserError(
            f"{header.name}: its modality LUT cannot be applied ({words(error)})"
        ) from error
    return narrow(header, mapped)


def _spacing(header: Header, frame: int, repairs: list[str]) -> tuple[float, float]:
    try:
        spacing = header.numbers("PixelSpacing", 2, frame, _MEASURES) or (0.0, 0.0)
        usable = spacing == (0.0, 0.0) or min(spacing) > 0
    except (TypeError, ValueError):
        usable = False
    if not usable:
        repairs.append(BAD_SPACING)
        return 0.0, 0.0
    return spacing[0], spacing[1]


def _geometry(header: Header, frame: int, repairs: list[str]):
    try:
        orientation = header.numbers("ImageOrientationPatient", 6, frame, _ORIENTATION)
        position = header.numbers("ImagePositionPatient", 3, frame, _POSITION)
        if orientation is not None:
            axes = np.array(orientation).reshape(2, 3)
            if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
                raise ValueError("not two perpendicular directions")
    except (TypeError, ValueError):
        repairs.append(BAD_GEOMETRY)
        return None, None
    return orientation, position


# A series


def _stack(folder: Path, slices: list[tuple[str, Slice]], thickness: float) -> Volume:
    first_name, first = slices[0]
    for name, piece in slices:
        if piece.orientation is None or piece.position is None or piece.spacing_mm == (0, 0):
            raise UserError(
                f"{folder / name}: no usable orientation, position or pixel spacing, so its place"
                " in the volume is unknown"
            )
        for what, same in (
            ("size", piece.pixels.shape == first.pixels.shape),
            ("modality", piece.modality == first.modality),
            ("pixel spacing", np.allclose(piece.spacing_mm, first.spacing_mm, rtol=1e-3)),
            ("orientation", np.allclose(piece.orientation, first.orientation, atol=1e-3)),
        ):
            if not same:
                raise UserError(
                    f"{folder / name}: another {what} than {first_name}; give each series its own"
                    " folder, without localizers"
                )
    axes = np.array(first.orientation, np.float64).reshape(2, 3)
    normal = np.cross(axes[0], axes[1])
    slices = sorted(slices, key=lambda item: float(normal @ np.array(item[1].position)))
    positions = np.array([piece.position for _, piece in slices], np.float64)
    step = normal * (thickness or 1.0)
    if len(slices) > 1:
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
        _check_grid(folder, [name for name, _ in slices], positions, normal, step)
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * first.spacing_mm[1]
    affine[:3, 1] = axes[1] * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # LPS → RAS
    affine += 0.0  # no negative zeros
    array = np.stack([_values(piece).T for _, piece in slices], axis=-1)
    return Volume(array, affine, first.modality)


def _check_grid(
    folder: Path, names: list[str], positions: np.ndarray, normal: np.ndarray, step: np.ndarray
) -> None:
    along = np.diff(positions @ normal)
    typical = float(np.median(along))
    for i, distance in enumerate(along):
        pair = f"{folder}: {names[i]} and {names[i + 1]}"
        if distance < 1e-3:
            raise UserError(f"{pair} lie at the same place; keep one of them")
        if abs(distance - typical) > 0.1 * typical:
            raise UserError(
                f"{pair} are {distance:.3g} mm apart where the others are {typical:.3g} mm:"
                " a slice is missing or does not belong here"
            )
    off = np.abs(positions - positions[0] - np.arange(len(positions))[:, None] * step).max(axis=1)
    worst = int(off.argmax())
    if off[worst] > 0.25 * typical:
        raise UserError(
            f"{folder / names[worst]}: lies {off[worst]:.3g} mm beside the line of the other"
            " slices; the series is no regular grid"
        )


def _values(piece: Slice) -> np.ndarray:
    """Values after the rescale: whole numbers stay so, others become float32."""
    slope, intercept = piece.rescale
    if slope == int(slope) and intercept == int(intercept):
        return piece.pixels.astype(np.int32) * int(slope) + int(intercept)
    return (piece.pixels * slope + intercept).astype(np.float32)
