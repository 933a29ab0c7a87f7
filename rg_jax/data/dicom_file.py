"""DICOM files: parsing, access to the header, pixels as stored.

pydicom (extra "data") parses; its plug-ins (extra "codecs") decode compressed transfer syntaxes.
Every failure is a UserError that names the file. What the numbers mean is `dicom`'s part.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.errors import UserError

_ZSTD = b"\x28\xb5\x2f\xfd"
_GZIP = b"\x1f\x8b"


class Header:
    """Access to a parsed header that names file and element when something cannot be read."""

    def __init__(self, dataset: Any, name: str):
        self.dataset = dataset
        self.name = name

    def fail(self, problem: str) -> None:
        raise UserError(f"{self.name}: {problem}")

    def get(self, keyword: str, frame: int = 0, group: str = "") -> Any:
        """An element's value, None if it is missing or empty.

        With `group`, a multi-frame file's functional groups are asked first.
        """
        try:
            if group:
                for place, index in (
                    ("PerFrameFunctionalGroupsSequence", frame),
                    ("SharedFunctionalGroupsSequence", 0),
                ):
                    items = self.dataset.get(place) or ()
                    inner = items[index].get(group) if index < len(items) else None
                    value = inner[0].get(keyword) if inner else None
                    if value is not None and str(value) != "":
                        return value
            value = self.dataset.get(keyword)
        except Exception as error:  # values are parsed on access, and may hold anything
            raise UserError(f"{self.name}: {keyword} cannot be read ({words(error)})") from error
        return None if value is None or str(value) == "" else value

    def text(self, keyword: str) -> str:
        return str(self.get(keyword) or "").strip()

    def whole(self, keyword: str, default: int | None = None) -> int:
        value = self.get(keyword)
        if value is None:
            if default is None:
                self.fail(f"has no {keyword}; the pixels cannot be read without it")
            return int(default)  # type: ignore[arg-type]
        try:
            return int(value)
        except (TypeError, ValueError):
            raise UserError(f"{self.name}: {keyword} is {value!r}, not a whole number") from None

    def number(self, keyword: str, frame: int = 0, group: str = "") -> float | None:
        value = self.get(keyword, frame, group)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{keyword} is {value!r}, not a finite number")
        return number

    def numbers(self, keyword: str, count: int, frame: int, group: str) -> tuple[float, ...] | None:
        """Floats, None if missing. ValueError (of which UserError is one) if they are no such."""
        value = self.get(keyword, frame, group)
        if value is None:
            return None
        values = tuple(float(number) for number in value)
        if len(values) != count or not all(map(math.isfinite, values)):
            raise ValueError(f"{keyword}: not {count} finite numbers")
        return values

    def frames(self) -> int:
        frames = self.whole("NumberOfFrames", 1)
        if frames < 1:
            self.fail(f"NumberOfFrames is {frames}")
        return frames


def open_file(data: bytes | Path, name: str) -> Header:
    name = name or (str(data) if isinstance(data, Path) else "DICOM data")
    content = _content(data, name)
    try:
        import pydicom
        from pydicom.filebase import DicomBytesIO
    except ImportError as error:
        raise UserError(f'{name}: needs the package pydicom: pip install -e ".[data]"') from error
    try:
        with quiet():
            # `force`: archives hold files without preamble and file meta.
            dataset = pydicom.dcmread(DicomBytesIO(content), force=True)
            rows = dataset.get("Rows")
    except Exception as error:  # a parser fed with arbitrary bytes fails in arbitrary ways
        raise UserError(f"{name}: cannot be read as DICOM ({words(error)})") from error
    if rows is None and content[128:132] != b"DICM":
        raise UserError(f"{name}: is no DICOM image")
    for keyword in ("FloatPixelData", "DoubleFloatPixelData"):
        if keyword in dataset:
            raise UserError(f"{name}: holds {keyword}; only whole numbers of 16 bits are read")
    if "PixelData" not in dataset:
        raise UserError(f"{name}: holds no pixel data: truncated, or no image")
    return Header(dataset, name)


def _content(data: bytes | Path, name: str) -> bytes:
    if isinstance(data, Path):
        try:
            data = data.read_bytes()
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    if data.startswith(_ZSTD):
        data = _decompress(data, name)
    if not data:
        raise UserError(f"{name}: the file is empty")
    if data.startswith(_GZIP):
        raise UserError(f"{name}: is gzip, not DICOM; decompress it, or compress it as .dcm.zst")
    return data


def _decompress(data: bytes, name: str) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f'{name}: needs the package zstandard: pip install -e ".[data]"') from error
    parts = []
    try:
        while data:
            # The streaming form, because it tells a whole frame from a cut one.
            decompressor = zstandard.ZstdDecompressor().decompressobj()
            parts.append(decompressor.decompress(data))
            if not decompressor.eof:
                raise UserError(f"{name}: the zstandard data is truncated; copy the file again")
            data = decompressor.unused_data
    except zstandard.ZstdError as error:
        raise UserError(f"{name}: the zstandard data is damaged ({error})") from error
    return b"".join(parts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    # pydicom warns of every irregular value; what matters here is checked here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def stored_pixels(header: Header, frame: int) -> np.ndarray:
    """(H, W) int16 or uint16 of one frame, as stored."""
    interpretation = header.text("PhotometricInterpretation")
    if header.whole("SamplesPerPixel", 1) != 1 or not interpretation.startswith("MONOCHROME"):
        header.fail(
            f"is a colour image or of no stated kind ({interpretation or 'no'}"
            " PhotometricInterpretation); only grey ones are read"
        )
    rows, columns = header.whole("Rows"), header.whole("Columns")
    allocated = header.whole("BitsAllocated")
    stored = header.whole("BitsStored")
    signed = header.whole("PixelRepresentation")
    if not (0 < stored <= allocated and rows > 0 and columns > 0 and signed in (0, 1)):
        header.fail(
            f"{rows} x {columns} pixels of {stored} in {allocated} bits, representation {signed}:"
            " no such image"
        )
    dataset = header.dataset
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    data = dataset["PixelData"]
    if syntax is None and data.is_undefined_length:
        header.fail("its pixels are compressed but it names no transfer syntax; repair the header")
    if syntax is not None and not syntax.is_transfer_syntax:
        header.fail(f"{syntax} is no transfer syntax; repair the header")
    if allocated != 16 or (syntax is not None and syntax.is_compressed and not syntax.is_deflated):
        pixels = _decode(header, syntax, frame)
        if pixels.shape != (rows, columns):
            header.fail(f"decodes to {pixels.shape} where the header says {(rows, columns)}")
        return narrow(header, pixels)
    size = rows * columns * 2
    values = data.value
    if len(values) < (frame + 1) * size:
        header.fail(f"is truncated: {len(values)} bytes of pixels, {(frame + 1) * size} are needed")
    little = dataset.original_encoding[1] is not False
    raw = np.frombuffer(values, "<u2" if little else ">u2", rows * columns, frame * size)
    raw = raw.astype(np.uint16)
    unused = 15 - header.whole("HighBit", stored - 1)
    if unused < 0 or unused + stored > 16:
        header.fail(f"HighBit does not fit {stored} bits stored in {allocated}")
    pixels = raw.view(np.int16) if signed else raw
    if stored < 16:  # overlays and other tenants may live in the bits around the stored ones
        raw <<= unused
        pixels >>= 16 - stored
    return pixels.reshape(rows, columns)


def _decode(header: Header, syntax: Any, frame: int) -> np.ndarray:
    """Pixels by pydicom's decoders: all that is compressed, or not of 16 bits."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if syntax is None:
        implicit, little = header.dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        syntax = syntax if little is not False else ExplicitVRBigEndian
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        header.fail(f"transfer syntax {syntax.name} ({syntax}) holds no image that can be read")
    if not decoder.is_available:
        needed = "; ".join(decoder.missing_dependencies)
        header.fail(
            f'transfer syntax {syntax.name} needs a plug-in ({needed}): pip install -e ".[codecs]"'
        )
    plugins = sorted(
        decoder.available_plugins, key=lambda name: (name != "pydicom", name == "gdcm")
    )
    # On damaged data GDCM can end the whole process, so it is asked only where no other can be.
    plugins = [name for name in plugins if name != "gdcm"] or plugins or [""]  # "": needs none
    failures = []
    for plugin in plugins:
        try:
            return decoder.as_array(header.dataset, index=frame, raw=True, decoding_plugin=plugin)[
                0
            ]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # codecs have errors of their own, Rust's panic among them
            failures.append(words(error))
    missing = "; ".join(decoder.missing_dependencies)
    hint = f'; not installed: {missing}: pip install -e ".[codecs]"' if missing else ""
    header.fail(f"its pixels ({syntax.name}) cannot be decoded: {' / '.join(failures)}{hint}")
    raise AssertionError  # not reached: keeps the type checker honest


def narrow(header: Header, pixels: np.ndarray) -> np.ndarray:
    """The same numbers as int16 (signed ones) or uint16."""
    if not np.issubdtype(pixels.dtype, np.integer):
        header.fail(f"holds {pixels.dtype} pixels; only whole numbers are read")
    low, high = int(pixels.min()), int(pixels.max())
    dtype = np.int16 if np.issubdtype(pixels.dtype, np.signedinteger) else np.uint16
    if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        header.fail(f"holds values from {low} to {high}, more than 16 bits can")
    return pixels.astype(dtype)
