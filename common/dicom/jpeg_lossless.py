"""JPEG lossless (ITU-T T.81, process 14, all seven predictors) in numpy: one component of up to 16 bits, bit for bit.

The only part that must go symbol by symbol is where each begins; code lengths are looked up at every bit position at once, the
rest is done for all symbols together.
"""

import dataclasses
import struct

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
SOF3, DHT, SOS, DRI, EOI = 0xC3, 0xC4, 0xDA, 0xDD, 0xD9
STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
WINDOW = 16  # bits of the longest code


@dataclasses.dataclass(frozen=True)
class Scan:
    """What the markers before the coded data say."""

    shape: tuple[int, int]  # y, x
    precision: int  # bits of a sample
    predictor: int  # 1..7
    point_transform: int  # bits that were shifted out
    rows_per_interval: int  # 0: no restart markers
    lengths: npt.NDArray[np.int64]  # (65536,) bits of the code that a window begins with; 0: no code
    categories: npt.NDArray[np.int64]  # (65536,) bits of the difference that follows
    data: bytes  # coded, with stuffed zeros and restart markers


def decode(stream: bytes, shape: tuple[int, int]) -> Ints:
    """The samples (y, x) of a stream, 0 .. 2^precision - 1.

    Raises ValueError where the stream is damaged, is no lossless JPEG of one component, or is of another shape.
    """
    scan = parse(stream)
    if scan.shape != shape:
        raise ValueError(f"an image of {scan.shape[0]} x {scan.shape[1]} where the header says {shape[0]} x {shape[1]}")
    rows = scan.rows_per_interval or shape[0]
    parts = intervals(scan.data) if scan.rows_per_interval else [scan.data]
    if len(parts) < -(-shape[0] // rows):
        raise ValueError(f"{len(parts)} restart intervals of {rows} rows for {shape[0]} rows")
    found = []
    for first, part in zip(range(0, shape[0], rows), parts, strict=False):
        size = (min(rows, shape[0] - first), shape[1])
        found.append(reconstructed(differences(part, size[0] * size[1], scan).reshape(size), scan))
    return np.asarray(np.concatenate(found) << scan.point_transform, np.int64)


def parse(stream: bytes) -> Scan:
    """Read the markers up to the scan."""
    if stream[:2] != b"\xff\xd8":
        raise ValueError("no JPEG stream")
    tables: dict[int, tuple[Ints, Ints]] = {}
    place, frame, interval = 2, None, 0
    while place + 4 <= len(stream):
        if stream[place] != 0xFF:
            raise ValueError(f"no marker at byte {place}")
        marker = stream[place + 1]
        if marker == 0xFF or marker in STANDALONE:  # fill bytes may come before a marker
            place += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", stream, place + 2)
        body = stream[place + 4 : place + 2 + length]
        place += 2 + length
        if marker == DHT:
            tables |= huffman_tables(body)
        elif marker == DRI:
            (interval,) = struct.unpack_from(">H", body)
        elif marker == SOF3:
            frame = struct.unpack_from(">BHHB", body)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            raise ValueError(f"JPEG of another process (marker FF{marker:02X}), not lossless with Huffman codes")
        elif marker == SOS:
            if frame is None:
                raise ValueError("a scan before its frame")
            return scan_of(body, frame, tables, interval, stream[place:])
    raise ValueError("no scan in it")


def scan_of(
    body: bytes,
    frame: tuple[int, int, int, int],
    tables: dict[int, tuple[Ints, Ints]],
    interval: int,
    data: bytes,
) -> Scan:
    """The scan of a header's body."""
    precision, height, width, components = frame
    if components != 1 or body[0] != 1:
        raise ValueError(f"{components} components; expected 1")
    table, predictor, point_transform = body[2] >> 4, body[3], body[5] & 15
    if table not in tables or not 1 <= predictor <= 7 or not 2 <= precision <= 16:
        raise ValueError(f"table {table}, predictor {predictor}, {precision} bits: not a lossless scan")
    if interval and interval % width:
        raise ValueError(f"restart interval {interval} is no multiple of the {width} columns")
    return Scan((height, width), precision, predictor, point_transform, interval // width, *tables[table], data)


def huffman_tables(body: bytes) -> dict[int, tuple[Ints, Ints]]:
    """Tables by number: for every window of 16 bits the length of the code that it begins with, and the category."""
    found = {}
    while len(body) >= 17:
        counts, number = body[1:17], body[0] & 15
        symbols = body[17 : 17 + sum(counts)]
        lengths, categories = np.zeros(1 << WINDOW, np.int64), np.zeros(1 << WINDOW, np.int64)
        code, at = 0, 0
        for length, count in enumerate(counts, 1):
            for symbol in symbols[at : at + count]:
                begin = code << (WINDOW - length)
                lengths[begin : begin + (1 << (WINDOW - length))] = length
                categories[begin : begin + (1 << (WINDOW - length))] = min(symbol, 16)
                code += 1
            at += count
            code <<= 1
        found[number] = (lengths, categories)
        body = body[17 + sum(counts) :]
    return found


def intervals(data: bytes) -> list[bytes]:
    """The parts between restart markers."""
    coded = np.frombuffer(data, np.uint8)
    marks = np.flatnonzero((coded[:-1] == 0xFF) & (coded[1:] >= 0xD0) & (coded[1:] <= 0xD7))
    begins = [0, *(marks + 2).tolist()]
    return [data[begin:end] for begin, end in zip(begins, [*marks.tolist(), len(data)], strict=True)]


def differences(data: bytes, count: int, scan: Scan) -> Ints:
    """The differences (count,) that coded data holds."""
    coded = without_stuffing(data)
    padded = np.concatenate([coded, np.zeros(8, np.uint8)]).astype(np.int64)
    three = (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]
    windows = ((three[: len(coded), None] >> (8 - np.arange(8))) & 0xFFFF).ravel()  # (bits,)
    steps = scan.lengths + np.where(scan.categories == 16, 0, scan.categories)
    steps[scan.lengths == 0] = 1 << 40  # no code: the next place is beyond the end
    begins = np.empty(count, np.int64)
    following, place, bits = memoryview(steps[windows]), 0, len(windows)
    for k in range(count):  # where a symbol begins is known once the one before is
        if place >= bits:
            raise ValueError(f"the coded data end after {k} of {count} samples")
        begins[k] = place
        place += following[place]
    if place > bits:
        raise ValueError("the coded data end within the last sample")
    own = windows[begins]
    category = scan.categories[own]
    return extended(padded, begins + scan.lengths[own], category)


def without_stuffing(data: bytes) -> npt.NDArray[np.uint8]:
    """Coded bytes up to the first marker, without the zero that follows each FF."""
    coded = np.frombuffer(data, np.uint8)
    high = np.flatnonzero(coded[:-1] == 0xFF)
    ends = high[coded[high + 1] != 0]
    coded = coded[: ends[0]] if len(ends) else coded
    kept = np.ones(len(coded), np.bool_)
    stuffed = high[high + 1 < len(coded)] + 1
    kept[stuffed] = False
    return coded[kept]


def extended(padded: Ints, place: Ints, category: Ints) -> Ints:
    """Differences of `category` bits that begin at bit `place` (T.81, F.2.2.1 EXTEND); category 16 is 32768."""
    byte, shift = place >> 3, place & 7
    word = (padded[byte] << 16) | (padded[byte + 1] << 8) | padded[byte + 2]
    bits = np.where(category == 16, 0, category)
    value = (word >> (24 - shift - bits)) & ((1 << bits) - 1)
    negative = (bits > 0) & (value < (1 << np.maximum(bits - 1, 0)))
    value = np.where(negative, value - (1 << bits) + 1, value)
    return np.asarray(np.where(category == 16, 32768, value), np.int64)


def reconstructed(difference: Ints, scan: Scan) -> Ints:
    """Samples (y, x) of differences (y, x) of an interval, modulo 2^16 (T.81, H.1.2.1 and table H.1)."""
    rows = difference.copy()
    rows[0, 0] += 1 << (scan.precision - scan.point_transform - 1)
    rows[0] = np.cumsum(rows[0]) & 0xFFFF
    if scan.predictor == 1:
        rows[:, 0] = np.cumsum(rows[:, 0]) & 0xFFFF
        return np.cumsum(rows, 1) & 0xFFFF if len(rows) == 1 else _rows_from_left(rows)
    for y in range(1, len(rows)):
        above = rows[y - 1]
        rows[y, 0] = (rows[y, 0] + above[0]) & 0xFFFF
        rows[y, 1:] = _row(rows[y], above, scan.predictor) & 0xFFFF
    return rows


def _rows_from_left(rows: Ints) -> Ints:
    """Rows whose first row and first column are samples and whose others are differences to the left."""
    below = np.cumsum(rows[1:], 1) & 0xFFFF
    return np.concatenate([rows[:1], below])


def _row(row: Ints, above: Ints, predictor: int) -> Ints:
    """Samples 1.. of a row whose first one is known, of its differences and the row above."""
    if predictor == 2:
        return row[1:] + above[1:]
    if predictor == 3:
        return row[1:] + above[:-1]
    if predictor in (4, 5):
        slope = above[1:] - above[:-1]
        return np.asarray(row[0] + np.cumsum(row[1:] + (slope if predictor == 4 else slope >> 1)), np.int64)
    left, found = int(row[0]), []
    for difference, over, corner in zip(row[1:].tolist(), above[1:].tolist(), above[:-1].tolist(), strict=True):
        guess = over + ((left - corner) >> 1) if predictor == 6 else (left + over) >> 1
        left = (difference + guess) & 0xFFFF
        found.append(left)
    return np.array(found, np.int64)
