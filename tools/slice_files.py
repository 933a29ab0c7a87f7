"""A slice of a volume as a DICOM file: pixels, geometry and a patient key, nothing else."""

import hashlib
import io
import re
import warnings
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from rg_jax.data.identifying import may_be_hospital_number
from rg_jax.data.volume import Plane
from rg_jax.errors import UserError

_STORAGE = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
_CODE = re.compile(r"[A-Z0-9 _]{1,16}")  # what VR CS allows


def rescale_of(values: np.ndarray, modality: str) -> tuple[float, float, bool]:
    """(slope, intercept, exact) with which `values` of a whole volume fit int16 pixels.

    Whole numbers get slope 1, and CT the usual intercept of -1024 where that fits. Multiples of
    1/2 … 1/64 keep their step. Others are rounded to 65,535 steps over their range, and `exact`
    is False. UserError for values that are not finite.
    """
    values = np.asarray(values)
    whole = np.issubdtype(values.dtype, np.integer)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError("the volume holds values that are not finite")
    for slope in (1.0, *(() if whole else (0.5**k for k in range(1, 7)))):
        scaled = values / slope if slope != 1 else values
        if not whole and not (scaled == np.rint(scaled)).all():
            continue
        for intercept in (-1024.0, 0.0) if modality == "CT" else (0.0,):
            if _fits((low - intercept) / slope, (high - intercept) / slope):
                return slope, intercept, True
    # 65,534 steps leave room for the digits that a decimal text of 16 characters drops.
    slope = _decimal((high - low) / 65_534)
    return slope, _decimal((high + low) / 2), False


def _fits(low: float, high: float) -> bool:
    return low >= -(2**15) and high < 2**15


def _decimal(number: float) -> float:
    return float(format_number_as_ds(number))


def uid(*parts: str) -> str:
    """A UID that is the same for the same parts."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def dicom_file(
    id_: str,
    values: np.ndarray,
    rescale: tuple[float, float],
    plane: Plane,
    modality: str,
    patient: str,
    scan: str,
    body_part: str = "",
    number: int = 0,
) -> bytes:
    """The DICOM file of a slice of `values` (H, W), the same bytes for the same input.

    `patient` becomes the PatientID and must be a pseudonym already; of one that may be a hospital's
    own number, the header does not say that the identity was removed. UIDs are made of the keys.
    """
    slope, intercept = rescale
    pixels = np.rint((values.astype(np.float64) - intercept) / slope)
    pixels = np.clip(pixels, -(2**15), 2**15 - 1).astype("<i2")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _STORAGE[modality]
    meta.MediaStorageSOPInstanceUID = uid("image", scan, id_)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_ = Dataset()
    slice_.file_meta = meta
    elements: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY"],
        "SOPClassUID": _STORAGE[modality],
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyDate": "",
        "StudyTime": "",
        "AccessionNumber": "",
        "Modality": modality,
        "Manufacturer": "",
        "ReferringPhysicianName": "",
        "PatientName": "",
        "PatientID": patient
        if len(patient) <= 64
        else hashlib.sha256(patient.encode()).hexdigest(),
        "PatientBirthDate": "",
        "PatientSex": "",
        # Said only of keys that cannot be the number by which a hospital knows somebody.
        **({} if may_be_hospital_number(patient) else {"PatientIdentityRemoved": "YES"}),
        "DeidentificationMethod": "Header rebuilt: only pixel values and geometry kept",
        "SliceThickness": _ds(plane.thickness_mm),
        "StudyInstanceUID": uid("study", patient, scan),
        "SeriesInstanceUID": uid("series", patient, scan),
        "StudyID": "",
        "SeriesNumber": 1,
        "InstanceNumber": number,
        "ImagePositionPatient": [_ds(value) for value in plane.position],
        "ImageOrientationPatient": [_ds(value) for value in plane.orientation],
        "FrameOfReferenceUID": uid("frame", patient, scan),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "PixelSpacing": [_ds(value) for value in plane.spacing_mm],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": _ds(slope),
        "RescaleIntercept": _ds(intercept),
        "PixelData": pixels.tobytes(),
    }
    if modality == "CT":
        elements["RescaleType"] = "HU"
    if _CODE.fullmatch(body_part.strip().upper()):
        elements["BodyPartExamined"] = body_part.strip().upper()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in elements.items():
            setattr(slice_, keyword, value)
        slice_["PixelData"].VR = "OW"
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, slice_, enforce_file_format=True)
    return buffer.getvalue()


def _ds(number: float) -> str:
    # Ten thousandths of a micrometre: what lies below is noise of an affine kept as float32.
    return format_number_as_ds(round(float(number), 7) + 0.0 if abs(number) > 1e-3 else number)
