"""DICOM files: what they mean, what is repaired and counted, what is refused and how."""

import builtins
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
import zstandard
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from rg_jax.data import dicom
from rg_jax.data.dicom import read_series, read_series_of, read_slice
from rg_jax.data.identifying import may_be_hospital_number, may_be_pseudonym
from rg_jax.data.volume import read_nifti, slice_of, to_lps
from rg_jax.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from dicom_files import content, dataset, file  # noqa: E402

EXAMPLES = os.environ.get("TOTALSEG_EXAMPLES", "")
RAMP = np.arange(-6, 6, dtype=np.int16).reshape(3, 4)


def of_pydicom(name: str) -> Path:
    """A file that comes with pydicom itself; nothing is downloaded."""
    return Path(pydicom.data.__file__).parent / "test_files" / name


def test_slice_as_written():
    got = read_slice(file(RAMP))
    np.testing.assert_array_equal(got.pixels, RAMP)
    assert got.pixels.dtype == np.int16
    assert (got.rescale, got.modality, got.spacing_mm) == ((1, -1024), "CT", (2, 3))
    assert got.orientation == (1, 0, 0, 0, 1, 0) and got.position == (-10, -20, 30)
    assert got.patient == "ANON-1" and got.repairs == () and got.identifying == ()


def test_compressed_file_is_told_by_its_content(tmp_path):
    path = tmp_path / "named.anyhow"
    path.write_bytes(zstandard.ZstdCompressor().compress(file(RAMP)))
    np.testing.assert_array_equal(read_slice(path).pixels, RAMP)
    plain = tmp_path / "plain.dcm.zst"
    plain.write_bytes(file(RAMP))
    np.testing.assert_array_equal(read_slice(plain).pixels, RAMP)
    whole = path.read_bytes()
    for cut in range(1, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"named\.anyhow: "):
            read_slice(path)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8, np.int8])
def test_transfer_syntaxes(syntax, dtype):
    pixels = np.arange(35).reshape(5, 7).astype(dtype)
    made = dataset(pixels, syntax)
    if syntax.is_implicit_VR:
        np.testing.assert_array_equal(read_slice(content(made, bare=True)).pixels, pixels)
    if syntax is ExplicitVRBigEndian and pixels.itemsize == 1:
        # OB in big endian files is a plain row of bytes; the odd length is padded.
        made.PixelData = pixels.tobytes() + b"\0"
    got = read_slice(content(made))
    np.testing.assert_array_equal(got.pixels, pixels)
    assert got.pixels.dtype == (np.int16 if np.dtype(dtype).kind == "i" else np.uint16)


def test_unused_bits_are_not_part_of_the_value():
    low = np.array([[0x0FFF, 0x0800, 0x07FF, 0x0001]], np.uint16)
    overlay = low | 0xA000
    words = {"BitsStored": 12, "HighBit": 11}
    unsigned = read_slice(file(overlay, **words))
    np.testing.assert_array_equal(unsigned.pixels, low)
    signed = read_slice(file(overlay, **words, PixelRepresentation=1))
    np.testing.assert_array_equal(signed.pixels, [[-1, -2048, 2047, 1]])
    high = read_slice(file((low << 4) | 0x000B, BitsStored=12, HighBit=15))
    np.testing.assert_array_equal(high.pixels, low)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_monochrome1_is_inverted_before_the_rescale(dtype):
    pixels = np.array([[3, 7], [100, 40]], dtype)
    got = read_slice(file(pixels, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(got.pixels, 103 - pixels)
    assert got.pixels.dtype == dtype and got.repairs == ("MONOCHROME1 inverted",)
    extremes = np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max]], dtype)
    got = read_slice(file(extremes, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(got.pixels, extremes[:, ::-1])


@pytest.mark.parametrize(
    ("elements", "rescale", "repairs"),
    [
        ({"RescaleSlope": None}, (1, -1024), ("missing slope taken as 1",)),
        ({"RescaleSlope": ""}, (1, -1024), ("missing slope taken as 1",)),
        ({"RescaleSlope": 0.5}, (0.5, -1024), ()),
        ({"Modality": "MR", "RescaleSlope": None, "RescaleIntercept": None}, (1, 0), ()),
        (
            {"Modality": "MR", "RescaleSlope": 2, "RescaleIntercept": None},
            (2, 0),
            ("missing intercept taken as 0",),
        ),
        ({"Modality": "US", "RescaleSlope": None, "RescaleIntercept": None}, (1, 0), ()),
    ],
)
def test_missing_rescale(elements, rescale, repairs):
    got = read_slice(file(RAMP, **elements))
    assert (got.rescale, got.repairs) == (rescale, repairs)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"RescaleIntercept": None}, "rescale intercept"),
        ({"RescaleIntercept": ""}, "rescale intercept"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"PixelData": RAMP.tobytes()[:-2]}, "truncated"),
        ({"PixelData": None}, "no pixel data"),
        ({"BitsStored": 17}, "no such image"),
        ({"HighBit": 3, "BitsStored": 12}, "HighBit"),
        ({"Rows": 0}, "no such image"),
        ({"PixelRepresentation": None}, "PixelRepresentation"),
    ],
)
def test_refused_with_the_file_named(elements, words):
    with pytest.raises(UserError, match=rf"^ab/cd\.dcm: .*{words}"):
        read_slice(file(RAMP, **elements), "ab/cd.dcm")


@pytest.mark.parametrize("junk", [b"", b"hello" * 50, b"\0" * 400, b"\x1f\x8b1234", b"\xff" * 200])
def test_no_dicom(junk, tmp_path):
    path = tmp_path / "junk.dcm"
    path.write_bytes(junk)
    with pytest.raises(UserError, match=r"junk\.dcm: "):
        read_slice(path)
    with pytest.raises(UserError, match="absent"):
        read_slice(tmp_path / "absent.dcm")


def test_truncation_anywhere_is_an_error():
    whole = file(np.arange(400, dtype=np.int16).reshape(20, 20))
    for cut in range(0, len(whole), 13):
        with pytest.raises(UserError):
            read_slice(whole[:cut])


def test_frames_must_be_chosen():
    frames = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    data = file(frames)
    with pytest.raises(UserError, match="holds 2 frames"):
        read_slice(data)
    for index in range(2):
        np.testing.assert_array_equal(read_slice(data, frame=index).pixels, frames[index])
    for index in (2, -1):
        with pytest.raises(UserError, match="no frame"):
            read_slice(data, frame=index)
    with pytest.raises(UserError, match="no frame 1"):
        read_slice(file(RAMP), frame=1)


def item(**elements) -> Sequence:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return Sequence([made])


def enhanced(frames=3):
    """A multi-frame file with rescale, spacing and place in functional groups only."""
    pixels = np.arange(frames * 12, dtype=np.int16).reshape(frames, 3, 4)
    made = dataset(
        pixels,
        **dict.fromkeys(
            ("RescaleSlope", "RescaleIntercept", "PixelSpacing"),
        ),
        ImageOrientationPatient=None,
        ImagePositionPatient=None,
    )
    made.SharedFunctionalGroupsSequence = item(
        PixelMeasuresSequence=item(PixelSpacing=[0.5, 0.75], SliceThickness=4),
        PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    groups = [
        item(
            PixelValueTransformationSequence=item(RescaleSlope=1, RescaleIntercept=-1000 - k),
            PlanePositionSequence=item(ImagePositionPatient=[1, 2, 4 * k]),
        )[0]
        for k in range(frames)
    ]
    made.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return pixels, content(made)


def test_functional_groups_of_each_frame():
    _, data = enhanced()
    got = read_slice(data, frame=2)
    assert got.rescale == (1, -1002) and got.position == (1, 2, 8)
    assert got.spacing_mm == (0.5, 0.75) and got.orientation == (1, 0, 0, 0, 1, 0)


def lut(kind="HU", first=0, values=(500, 400, 300)):
    made = Dataset()
    made.LUTDescriptor = [len(values), first, 16]
    made.LUTData = list(values)
    made["LUTData"].VR = "US"
    made["LUTDescriptor"].VR = "US"
    made.ModalityLUTType = kind
    return Sequence([made])


def test_modality_lut_is_applied():
    pixels = np.array([[0, 1, 2, 9]], np.uint16)
    elements = {"RescaleSlope": None, "RescaleIntercept": None}
    got = read_slice(file(pixels, ModalityLUTSequence=lut(), **elements))
    np.testing.assert_array_equal(got.pixels, [[500, 400, 300, 300]])  # beyond the end: the last
    assert got.rescale == (1, 0) and got.repairs == ("modality LUT applied",)
    with pytest.raises(UserError, match="does not give HU"):
        read_slice(file(pixels, ModalityLUTSequence=lut("US"), **elements))
    got = read_slice(file(pixels, ModalityLUTSequence=lut("US"), Modality="MR", **elements))
    assert got.pixels[0, 0] == 500


def test_values_beyond_sixteen_bits():
    wide = np.array([[1, 70000]], np.uint32)
    with pytest.raises(UserError, match="from 1 to 70000"):
        read_slice(file(wide))
    fits = read_slice(file(np.array([[1, 60000]], np.uint32)))
    assert fits.pixels.dtype == np.uint16 and fits.pixels.max() == 60000
    made = dataset(RAMP, PixelData=None)
    made.FloatPixelData = b"\0" * 48
    with pytest.raises(UserError, match="FloatPixelData"):
        read_slice(content(made))


def test_as_int16_keeps_the_values():
    for pixels in (np.array([[0, 65535]], np.uint16), np.array([[0, 32767]], np.uint16), RAMP):
        got = read_slice(file(pixels, RescaleSlope=0.5))
        moved = got.as_int16()
        assert moved.pixels.dtype == np.int16
        before, after = (s.pixels * s.rescale[0] + s.rescale[1] for s in (got, moved))
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("elements", "repair"),
    [
        ({"PixelSpacing": [0, 1]}, dicom.BAD_SPACING),
        ({"PixelSpacing": [-1, 1]}, dicom.BAD_SPACING),
        ({"PixelSpacing": 3}, dicom.BAD_SPACING),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, dicom.BAD_GEOMETRY),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, dicom.BAD_GEOMETRY),
    ],
)
def test_unusable_geometry_is_unknown_and_told(elements, repair):
    got = read_slice(file(RAMP, **elements))
    assert got.repairs == (repair,)
    assert got.spacing_mm == (0, 0) or got.orientation is None


def test_missing_geometry_is_unknown():
    absent = ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient")
    got = read_slice(file(RAMP, **dict.fromkeys(absent)))
    assert (got.spacing_mm, got.orientation, got.position) == ((0, 0), None, None)
    assert got.repairs == ()


# Identifying elements: keywords only, and not what anonymisers leave.


@pytest.mark.parametrize("removed", ["YES", "NO"])
@pytest.mark.parametrize(
    ("elements", "found"),
    [
        ({"PatientName": "ANON^0001"}, ()),
        ({"PatientName": "Anonymous"}, ()),
        ({"PatientName": "Mustermann^Max"}, ("PatientName",)),
        ({"PatientBirthDate": "19510203"}, ("PatientBirthDate",)),
        ({"PatientBirthDate": ""}, ()),
        ({"StudyDate": "20240105", "PatientBirthDate": "19000101"}, ("StudyDate",)),
        ({"ReferringPhysicianName": "Dr^House"}, ("ReferringPhysicianName",)),
        ({"InstitutionName": "Spital"}, ("InstitutionName",)),
        ({"AccessionNumber": "A123"}, ("AccessionNumber",)),
        ({"BurnedInAnnotation": "YES"}, ("BurnedInAnnotation",)),
        ({"PatientBirthDate": "19700101"}, ("PatientBirthDate",)),
        ({"PatientID": "Mueller Hans"}, ("PatientID",)),
        ({"PatientID": "Mueller^Hans 1960"}, ("PatientID",)),
        ({"PatientName": "Mueller, Hans 7"}, ("PatientName",)),
        ({"PatientID": "Mueller 2.3.1960"}, ("PatientID",)),
    ],
)
def test_identifying_elements(elements, found, removed):
    got = read_slice(file(RAMP, PatientIdentityRemoved=removed, **elements))
    assert got.identifying == found
    assert not any(str(value) in str(got.identifying) for value in elements.values() if value)


def test_identifying_elements_in_sequences_and_ids():
    data = file(RAMP, RequestAttributesSequence=item(RequestingPhysician="Who^Dr"))
    assert read_slice(data).identifying == ("RequestingPhysician",)
    assert read_slice(file(RAMP, PatientID="HOSP77812x")).identifying == ("PatientID",)
    # Bare numbers are what hospitals number their patients with.
    assert read_slice(file(RAMP, PatientID="0012345678")).identifying == ("PatientID",)
    assert read_slice(file(RAMP, PatientID="ANON-0012345678")).identifying == ()
    assert read_slice(file(RAMP, DischargeDate="20240131")).identifying == ("DischargeDate",)
    hidden = file(RAMP, PatientID="HOSP77812x", PatientIdentityRemoved="YES")
    assert read_slice(hidden).identifying == ()  # told to be a pseudonym


@pytest.mark.parametrize(
    "elements, found",
    [
        ({"StudyDescription": "Verlauf Frau Mueller geb. 1960"}, ("StudyDescription",)),
        ({"StudyDescription": "CT Thorax", "ProtocolName": "Abdomen"}, ()),
        ({"StudyID": "4711"}, ("StudyID",)),
        ({"StudyID": "1"}, ()),
        ({"ServiceEpisodeID": "77-8812"}, ("ServiceEpisodeID",)),
        ({"PatientID": "4711234", "PatientIdentityRemoved": "YES"}, ("PatientID",)),
    ],
)
def test_texts_and_numbers_that_lead_to_somebody(elements, found):
    assert read_slice(file(RAMP, **elements)).identifying == found


def test_overlays_and_the_file_meta_are_looked_at():
    made = dataset(RAMP)
    made.add_new(0x60004000, "LT", "Doe Jane")
    made.file_meta.SourceApplicationEntityTitle = "SPITAL_CT2"
    assert read_slice(content(made)).identifying == (
        "OverlayComments",
        "SourceApplicationEntityTitle",
    )


def test_private_elements_are_told():
    made = dataset(RAMP)
    block = made.private_block(0x0029, "SOMEBODY", create=True)
    assert read_slice(content(made)).identifying == ()  # the name of a block says nothing
    block.add_new(0x01, "LO", "")
    assert read_slice(content(made)).identifying == ()
    block.add_new(0x02, "LO", "Doe^Jane")
    assert read_slice(content(made)).identifying == ("private elements",)
    inner = item(StudyDescription="x")
    inner[0].private_block(0x0029, "SOMEBODY", create=True).add_new(0x03, "UN", b"Doe")
    nested = dataset(RAMP, RequestAttributesSequence=inner)
    assert read_slice(content(nested)).identifying == ("private elements",)


@pytest.mark.parametrize("key", ["s0011", "LIDC-IDRI-0001", "HOSP77812x", "case 3", "ab20121031cd"])
def test_keys_that_are_no_names(key):
    assert may_be_pseudonym(key) and not may_be_hospital_number(key)


# Everything that pydicom carries


def shipped() -> list[Path]:
    root = Path(pydicom.data.__file__).parent
    return sorted(
        path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    )


def test_every_file_of_pydicom_decodes_or_is_refused():
    """Compared with the array of pydicom, whose way for plain 16 bits is not ours."""
    read, refused = [], {}
    for path in shipped():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got = read_slice(path)
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused[path.name] = str(error)
                continue
            expected = pydicom.dcmread(path, force=True).pixel_array.astype(np.int64)
        if "MONOCHROME1 inverted" in got.repairs:
            expected = expected.min() + expected.max() - expected
        np.testing.assert_array_equal(got.pixels, expected, err_msg=str(path))
        read.append(path.name)
    # A broken reader would refuse them all.
    assert len(read) >= 60
    for name in ("CT_small.dcm", "MR_small_padded.dcm", "image_dfl.dcm", "693_J2KI.dcm", "6154"):
        assert name in read, refused.get(name)
    for name, words in {
        "MR_truncated.dcm": "truncated",
        "rtplan.dcm": "no pixel data",
        "rtdose.dcm": "frames",
        "rtdose_1frame.dcm": "more than 16 bits",
        "examples_rgb_color.dcm": "colour",
        "zipMR.gz": "gzip",
        "README.txt": "no DICOM image",
    }.items():
        assert words in refused[name]


@pytest.mark.parametrize(
    "name", [*("RLE", "implicit", "bigendian", "expb", "jp2klossless", "jpeg_ls_lossless")]
)
def test_lossless_forms_of_one_image_are_equal(name):
    plain = read_slice(of_pydicom("MR_small.dcm"))
    other = read_slice(of_pydicom(f"MR_small_{name}.dcm"))
    np.testing.assert_array_equal(other.pixels, plain.pixels)
    assert (other.rescale, other.spacing_mm) == (plain.rescale, plain.spacing_mm)


def test_own_rle_file():
    made = dataset(np.arange(-32, 32, dtype=np.int16).reshape(8, 8))
    made.compress(RLELossless)
    got = read_slice(content(made))
    np.testing.assert_array_equal(got.pixels, np.arange(-32, 32).reshape(8, 8))


def test_missing_codec_is_named(monkeypatch):
    from pydicom.pixels.decoders import base

    monkeypatch.setattr(base.Decoder, "is_available", property(lambda self: False))
    monkeypatch.setattr(base.Decoder, "missing_dependencies", property(lambda self: ["p - q>=1"]))
    with pytest.raises(UserError, match=r"JPEG 2000.*p - q>=1.*-e ..\[codecs\]"):
        read_slice(of_pydicom("MR_small_jp2klossless.dcm"))
    read_slice(of_pydicom("MR_small.dcm"))  # needs none


@pytest.mark.parametrize(
    ("package", "data"), [("pydicom", b"x"), ("zstandard", b"\x28\xb5\x2f\xfd")]
)
def test_missing_package_is_named(monkeypatch, package, data):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{package}.*-e ..\[data\]"):
        read_slice(data)


# Series


def write_series(folder, count=4, **elements):
    folder.mkdir(exist_ok=True)
    volume = np.arange(count * 12, dtype=np.int16).reshape(count, 3, 4)
    for k in range(count):
        # Names against the order of the positions; and the highest slice first in the array.
        path = folder / f"im{count - k}.dcm"
        path.write_bytes(file(volume[k], ImagePositionPatient=[-10, -20, 30 + 2.5 * k], **elements))
    return volume


def test_series_is_sorted_by_position(tmp_path):
    pixels = write_series(tmp_path / "s")
    (tmp_path / "s" / ".hidden").write_text("no DICOM")
    volume, patient = read_series_of(tmp_path / "s")
    assert patient == "ANON-1" and volume.modality == "CT"
    assert volume.array.shape == (4, 3, 4)
    np.testing.assert_array_equal(volume.array, pixels.transpose(2, 1, 0) - 1024)
    # (x, y, z) = (1, 2, 3) lies 3 mm · 1 to the left, 2 mm · 2 to the back, 2.5 mm · 3 up.
    np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], [10 - 3, 20 - 4, 30 + 7.5, 1])


def test_an_inverted_series_is_inverted_about_one_value(tmp_path):
    """Not every slice about its own: the same tissue would differ from slice to slice."""
    plain = write_series(tmp_path / "plain")
    write_series(tmp_path / "inverted", PhotometricInterpretation="MONOCHROME1")
    volume, ours = read_series(tmp_path / "plain"), read_series(tmp_path / "inverted")
    middle = int(plain.min()) + int(plain.max()) - 2 * 1024
    np.testing.assert_array_equal(ours.array, middle - volume.array)


def test_a_series_that_cannot_be_inverted_alike_is_refused(tmp_path):
    table = {"ModalityLUTSequence": lut(), "RescaleSlope": None, "RescaleIntercept": None}
    write_series(tmp_path / "one", 1, PhotometricInterpretation="MONOCHROME1", **table)
    assert read_series(tmp_path / "one").array.shape == (4, 3, 1)
    write_series(tmp_path / "two", 2, PhotometricInterpretation="MONOCHROME1", **table)
    with pytest.raises(UserError, match=r"im\d.dcm: MONOCHROME1 with a modality LUT.*MONOCHROME2"):
        read_series(tmp_path / "two")


def test_slices_of_a_series_are_the_slices_of_its_volume(tmp_path):
    for orientation in ([1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, -1, 0]):
        pixels = write_series(tmp_path / "s", ImageOrientationPatient=orientation)
        volume = to_lps(read_series(tmp_path / "s"))
        up = pixels[:, :: orientation[4], :: orientation[0]] - 1024
        for k in range(4):
            np.testing.assert_array_equal(slice_of(volume, 2, k), up[k])


def test_series_with_tilted_gantry_and_of_one_slice(tmp_path):
    folder = tmp_path / "s"
    write_series(folder)
    for k, path in enumerate(sorted(folder.iterdir())):
        made = pydicom.dcmread(path)
        made.ImagePositionPatient = [-10, -20 + 0.4 * k, 30 + 2.5 * k]
        made.save_as(path)
    np.testing.assert_allclose(read_series(folder).affine[:3, 2], [0, -0.4, 2.5])
    one = tmp_path / "one"
    write_series(one, 1, SliceThickness=7)
    assert read_series(one).affine[2, 2] == 7


def test_multi_frame_file_is_a_series(tmp_path):
    pixels, data = enhanced()
    (tmp_path / "enhanced.dcm").write_bytes(data)
    volume = read_series(tmp_path)
    assert volume.affine[2, 2] == 4
    np.testing.assert_array_equal(volume.array[..., 2], pixels[2].T - 1002)


def change(folder, **elements):
    path = sorted(folder.iterdir())[1]
    made = pydicom.dcmread(path)
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    made.save_as(path)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"ImagePositionPatient": [-10, -20, 30]}, "same place"),
        ({"ImagePositionPatient": [-10, -20, 36]}, "apart"),
        ({"ImagePositionPatient": [-10, -19, 35]}, "beside the line"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "orientation"),
        ({"PixelSpacing": [2, 2.9]}, "pixel spacing"),
        ({"ImagePositionPatient": None}, "no usable orientation"),
        ({"Rows": 2}, "size"),
        ({"Modality": "MR"}, "modality"),
        ({"PatientID": "ANON-2"}, "2 patients"),
        ({"SeriesInstanceUID": "1.2.3"}, "2 series"),
    ],
)
def test_series_that_are_no_volume(tmp_path, elements, words):
    write_series(tmp_path / "s", SeriesInstanceUID="1.2")
    change(tmp_path / "s", **elements)
    with pytest.raises(UserError, match=rf"{tmp_path / 's'}.*{words}"):
        read_series(tmp_path / "s")


def test_missing_slice_and_empty_folder(tmp_path):
    write_series(tmp_path / "s", 5)
    (tmp_path / "s" / "im3.dcm").unlink()
    with pytest.raises(UserError, match="a slice is missing"):
        read_series(tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no files"):
        read_series(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        read_series(tmp_path / "absent")


def test_empty_uids_do_not_matter(tmp_path):
    write_series(tmp_path / "s", SOPClassUID="", SeriesInstanceUID="", StudyInstanceUID="")
    assert read_series(tmp_path / "s").array.shape == (4, 3, 4)


@pytest.mark.skipif(not EXAMPLES, reason="TOTALSEG_EXAMPLES is not set: no real DICOM series")
def test_real_series_lies_under_its_masks():
    root = Path(EXAMPLES)
    volume = to_lps(read_series(root / "example_ct_dicom"))
    mask = to_lps(read_nifti(root / "example_seg_dicom.nii.gz"))
    assert volume.array.shape == mask.array.shape
    np.testing.assert_allclose(volume.affine, mask.affine, atol=1e-3)
    means = {organ: volume.array[mask.array == organ].mean() for organ in (5, 1, 52)}
    assert 88.5 < means[5] < 90.5  # enhanced liver
    # Any flip puts the masks onto other tissue.
    for axis in range(3):
        flipped = np.flip(mask.array, axis)
        spread = [volume.array[m == 5].std() for m in (mask.array, flipped)]
        assert spread[0] < 60 and (axis == 2 or spread[1] > 2 * spread[0])


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_damaged_files_never_end_the_process(name):
    """Whatever a codec does with them (GDCM may abort, Rust panics): a slice or a UserError."""
    whole = of_pydicom(name).read_bytes()
    start = whole.rfind(b"\xfe\xff\x00\xe0") + 8
    outcomes = set()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        damaged = bytearray(whole)
        end = start + 120 if seed % 2 else len(damaged) - 16
        for place in rng.integers(start if seed % 3 else 132, end, 4):
            damaged[place] = rng.integers(0, 256)
        try:
            outcomes.add(read_slice(bytes(damaged)).pixels.shape)
        except UserError as error:
            outcomes.add("refused")
            assert "\n" not in str(error)
    assert "refused" in outcomes
