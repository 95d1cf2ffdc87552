"""JPEG lossless: what an encoder of the standard's tables writes comes back bit for bit, with every predictor."""

import struct

import numpy as np
import pytest

from common.dicom.jpeg_lossless import decode

CODES = {category: (category + 1, (1 << (category + 1)) - 2) for category in range(16)} | {16: (17 - 1, 0xFFFE)}


def predicted(image: np.ndarray, y: int, x: int, first: int, predictor: int, bits: int) -> int:
    """Table H.1, written out."""
    if y == first and x == 0:
        return 1 << (bits - 1)
    if y == first:
        return int(image[y, x - 1])
    if x == 0:
        return int(image[y - 1, x])
    a, b, c = int(image[y, x - 1]), int(image[y - 1, x]), int(image[y - 1, x - 1])
    return [a, b, c, a + b - c, a + ((b - c) >> 1), b + ((a - c) >> 1), (a + b) >> 1][predictor - 1]


def encode(image: np.ndarray, bits: int, predictor: int, rows_per_interval: int) -> bytes:
    """A stream with a Huffman table of unary codes."""
    lengths = [1] * 15 + [2]  # of codes of 1..15 bits one each, of 16 bits two
    symbols = [*range(15), 15, 16]
    table = b"\x00" + bytes(lengths) + bytes(symbols)
    codes, code = {}, 0
    at = 0
    for length, count in enumerate(lengths, 1):
        for symbol in symbols[at : at + count]:
            codes[symbol] = f"{code:0{length}b}"
            code += 1
        at += count
        code <<= 1
    height, width = image.shape
    segments = []
    for first in range(0, height, rows_per_interval or height):
        text = []
        for y in range(first, min(height, first + (rows_per_interval or height))):
            for x in range(width):
                difference = (int(image[y, x]) - predicted(image, y, x, first, predictor, bits)) & 0xFFFF
                difference -= 65536 if difference > 32768 else 0
                category = abs(difference).bit_length()
                text.append(codes[category])
                if 0 < category < 16:
                    value = difference if difference > 0 else difference + (1 << category) - 1
                    text.append(f"{value:0{category}b}")
        joined = "".join(text)
        joined += "1" * (-len(joined) % 8)
        segments.append(
            bytes(int(joined[k : k + 8], 2) for k in range(0, len(joined), 8)).replace(b"\xff", b"\xff\x00")
        )
    data = b"".join(part + bytes([0xFF, 0xD0 + k % 8]) for k, part in enumerate(segments[:-1])) + segments[-1]

    def marker(code: int, body: bytes) -> bytes:
        return bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body

    restart = marker(0xDD, struct.pack(">H", rows_per_interval * width)) if rows_per_interval else b""
    frame = marker(0xC3, struct.pack(">BHHB", bits, height, width, 1) + bytes([1, 0x11, 0]))
    scan = marker(0xDA, bytes([1, 1, 0, predictor, 0, 0]))
    return b"\xff\xd8" + marker(0xC4, table) + restart + frame + scan + data + b"\xff\xd9"


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize(("bits", "rows"), [(16, 0), (12, 0), (16, 3), (8, 4)])
def test_every_predictor_bit_for_bit(predictor: int, bits: int, rows: int) -> None:
    random = np.random.default_rng(predictor + bits)
    smooth = np.cumsum(random.integers(-9, 10, (11, 17)), 1) + (1 << (bits - 1))
    for image in (random.integers(0, 1 << bits, (11, 17)), smooth & ((1 << bits) - 1), np.zeros((11, 17), int)):
        assert np.array_equal(decode(encode(image, bits, predictor, rows), image.shape), image)


def test_damage_is_an_error_and_no_picture() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (16, 16))
    stream = encode(image, 16, 1, 0)
    with pytest.raises(ValueError, match="end"):
        decode(stream[: len(stream) // 2], (16, 16))
    with pytest.raises(ValueError, match="16 x 16 where the header says 16 x 17"):
        decode(stream, (16, 17))
    with pytest.raises(ValueError, match="another process"):
        decode(stream.replace(b"\xff\xc3", b"\xff\xc0"), (16, 16))
    with pytest.raises(ValueError, match="no JPEG"):
        decode(b"", (16, 16))
