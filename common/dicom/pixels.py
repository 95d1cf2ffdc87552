"""Stored pixel values of DICOM images, exactly: uncompressed, RLE, JPEG 2000 and JPEG lossless without any native plug-in."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pictures

from common.dicom.headers import Header
from common.dicom.jpeg_lossless import decode
from common.errors import data_error
from common.extras import extra_package

Values = npt.NDArray[np.int32]
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", BIG_ENDIAN, "")
RLE = "1.2.840.10008.1.2.5"
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream, then its sizes


def decodes(header: Header) -> bool:
    """Whether stored_values knows the transfer syntax."""
    return header.syntax in (*UNCOMPRESSED, RLE, *JPEG_2000, *JPEG_LOSSLESS)


def syntax_name(header: Header) -> str:
    """The transfer syntax in words, JPEG-LS Lossless Image Compression."""
    uid = extra_package("pydicom", f"{header.path}: reading DICOM").uid.UID(header.syntax)
    return f"{uid.name} ({header.syntax})" if uid.name != header.syntax else header.syntax


def stored_values(header: Header) -> Values:
    """The values of an image (y, x) as they are stored, before slope and intercept.

    Raises a data error where pixels are missing, damaged, of another size than the header says, or of a codec that is not
    known here.
    """
    if header.samples != 1 or header.bits_allocated not in (8, 16, 32):
        raise data_error(
            f"{header.path}: {header.samples} samples of {header.bits_allocated} bits per pixel; expected 1 of 8, 16 or 32"
        )
    if not decodes(header):
        raise data_error(
            f"{header.path}: {syntax_name(header)} is not decoded here; convert it (dcmconv, gdcmconv) first"
        )
    try:
        return decoded(header, pixel_data(header))
    except (ValueError, IndexError, struct.error, OSError, EOFError) as error:
        raise data_error(f"{header.path}: damaged pixels ({str(error).partition(chr(10))[0][:160]})") from error


def pixel_data(header: Header) -> Any:
    """The parsed file, with pixels."""
    pydicom = extra_package("pydicom", f"{header.path}: reading DICOM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(header.path, specific_tags=["PixelData", "NumberOfFrames"])
    if "PixelData" not in dataset:
        raise ValueError("no pixels in it")
    return dataset


def decoded(header: Header, dataset: Any) -> Values:
    """The values (y, x) of a parsed file's frame."""
    if header.syntax in UNCOMPRESSED:
        return as_stored(uncompressed(header, dataset.PixelData), header)
    number = int(dataset.NumberOfFrames) if "NumberOfFrames" in dataset and dataset.NumberOfFrames else 1
    encaps = extra_package("pydicom", f"{header.path}: reading DICOM").encaps
    frame = encaps.get_frame(dataset.PixelData, header.frame, number_of_frames=number)
    if header.syntax == RLE:
        return as_stored(run_lengths(frame, header), header)
    if header.syntax in JPEG_2000:
        return jpeg_2000(frame, header.shape)
    return as_stored(decode(frame, header.shape), header)


def uncompressed(header: Header, data: bytes) -> npt.NDArray[np.integer[Any]]:
    """Words (y, x) as they lie in the file."""
    size = header.bits_allocated // 8
    dtype = np.dtype(f"{'>' if header.syntax == BIG_ENDIAN else '<'}u{size}")
    count = header.shape[0] * header.shape[1]
    begin = header.frame * count * size
    if len(data) < begin + count * size:
        raise ValueError(f"{len(data)} bytes of pixels, expected {begin + count * size}: the file is cut off")
    return np.frombuffer(data, dtype, count, begin).reshape(header.shape)


def as_stored(words: npt.NDArray[np.integer[Any]], header: Header) -> Values:
    """The values in the stored bits of words, with their sign."""
    unused = header.high_bit + 1 - header.bits_stored
    if header.is_signed and unused == 0 and header.bits_stored == header.bits_allocated == 16:
        return words.astype(np.uint16).view(np.int16).astype(np.int32)
    mask = (1 << header.bits_stored) - 1
    values = (words.astype(np.int64) >> max(0, unused)) & mask
    if header.is_signed:
        values = np.where(values > mask >> 1, values - mask - 1, values)
    return values.astype(np.int32)


def run_lengths(frame: bytes, header: Header) -> npt.NDArray[np.integer[Any]]:
    """Words (y, x) of an RLE frame: a segment per byte of a word, the most significant first (PS3.5, annex G)."""
    offsets = struct.unpack_from("<16I", frame)
    count, size = header.shape[0] * header.shape[1], header.bits_allocated // 8
    if offsets[0] != size:
        raise ValueError(f"{offsets[0]} segments, expected {size}")
    words: npt.NDArray[np.integer[Any]] = np.zeros(count, np.uint32)
    for k in range(size):
        end = offsets[k + 2] if k + 1 < size else len(frame)
        words = (words << 8) | np.frombuffer(packed_bits(frame[offsets[k + 1] : end], count), np.uint8)
    return words.reshape(header.shape)


def packed_bits(segment: bytes, count: int) -> bytes:
    """The first `count` bytes that a segment of PackBits holds."""
    found, place = bytearray(), 0
    while len(found) < count:
        if place >= len(segment):
            raise ValueError(f"run lengths end after {len(found)} of {count} bytes")
        head = segment[place]
        if head < 128:
            found += segment[place + 1 : place + 2 + head]
            place += 2 + head
        elif head > 128:
            found += segment[place + 1 : place + 2] * (257 - head)
            place += 2
        else:
            place += 1
    return bytes(found[:count])


def jpeg_2000(frame: bytes, shape: tuple[int, int]) -> Values:
    """The values (y, x) of a JPEG 2000 codestream; bits and sign are those of its own header.

    Pillow gives 16 bits, shifted to the left, and an offset of a half where they are signed.
    """
    begin = frame.find(CODESTREAM)
    if begin < 0:
        raise ValueError("no JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack_from(">4I", frame, begin + 8)
    (components,) = struct.unpack_from(">H", frame, begin + 40)
    bits, is_signed = (frame[begin + 42] & 127) + 1, bool(frame[begin + 42] >> 7)
    if (bottom - top, right - left) != shape or components != 1 or bits > 16:
        raise ValueError(f"{components} components of {bottom - top} x {right - left} with {bits} bits, not {shape}")
    with Pictures.open(io.BytesIO(frame)) as picture:
        values = np.asarray(picture).astype(np.int32)
    depth = 16 if picture.mode.startswith("I") else 8
    return (values >> (depth - bits)) - ((1 << (bits - 1)) if is_signed else 0)
