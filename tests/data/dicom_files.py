"""Tiny DICOM files made for tests."""

import io

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


def dataset(pixels, syntax=ExplicitVRLittleEndian, **elements) -> FileDataset:
    """A CT slice of `pixels` (H, W) or (frames, H, W); `elements` replace or (None) remove."""
    pixels = np.asarray(pixels)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = CT_STORAGE
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    little = syntax.is_little_endian
    made.SOPClassUID = CT_STORAGE
    made.Modality = "CT"
    made.PatientID = "ANON-1"
    made.SamplesPerPixel = 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.Rows, made.Columns = pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelSpacing = [2, 3]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.ImagePositionPatient = [-10, -20, 30]
    made.RescaleSlope, made.RescaleIntercept = 1, -1024
    if pixels.ndim == 3:
        made.NumberOfFrames = len(pixels)
    made.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    made["PixelData"].VR = "OW" if bits > 8 else "OB"
    for keyword, value in elements.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    return made


def content(made: FileDataset, bare: bool = False) -> bytes:
    """The file's bytes; `bare` leaves out preamble and file meta."""
    buffer = io.BytesIO()
    if bare:
        syntax = made.file_meta.TransferSyntaxUID
        pydicom.dcmwrite(
            buffer,
            pydicom.Dataset(made),
            implicit_vr=syntax.is_implicit_VR,
            little_endian=syntax.is_little_endian,
            enforce_file_format=False,
        )
    else:
        pydicom.dcmwrite(buffer, made, enforce_file_format=False)
    return buffer.getvalue()


def file(pixels, **elements) -> bytes:
    return content(dataset(pixels, **elements))
