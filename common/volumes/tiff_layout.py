"""Where the pages of a TIFF file lie and what they say they are, from its chain of directories (TIFF 6.0, BigTIFF).

One small read per page; no pixel is touched. ImageJ, OME and tifffile state the order of their pages in the first one's
description.
"""

import dataclasses
import json
import math
import re
import struct
from pathlib import Path
from typing import IO, Literal

import numpy as np

from common.errors import data_error

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION = 256, 257, 258, 259, 262, 270
STRIP_OFFSETS, SAMPLES, STRIP_BYTES, X_RESOLUTION, Y_RESOLUTION = 273, 277, 279, 282, 283
RESOLUTION_UNIT, TILE_WIDTH, SAMPLE_FORMAT = 296, 322, 339
USED_TAGS = frozenset({WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION, STRIP_OFFSETS, SAMPLES, STRIP_BYTES,
                       X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, TILE_WIDTH, SAMPLE_FORMAT})  # fmt: skip
TYPE_CODES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I",
              16: "Q", 17: "q", 18: "Q"}  # fmt: skip
SAMPLE_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # 4: undefined, which programs write for plain bytes
UNCOMPRESSED = 1
BLACK_IS_ZERO = 1

ByteOrder = Literal["<", ">"]
Tags = dict[int, tuple[float, ...] | bytes]


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """What must be the same on all pages."""

    height: int
    width: int
    samples: int  # per pixel
    bits: int
    kind: str  # u, i or f, as numpy calls them
    compression: int
    photometric: int
    tiled: bool

    def __str__(self) -> str:
        names = {"u": "uint", "i": "int", "f": "float"}
        return f"{self.height} x {self.width}, {self.samples} x {names[self.kind]}{self.bits}"


@dataclasses.dataclass(frozen=True)
class TiffLayout:
    """A file's pages: their common layout, and the first byte of each one's pixels where those lie in one piece."""

    page: PageLayout
    pages: int
    byte_order: ByteOrder
    offsets: tuple[int, ...] | range | None  # None: compressed, tiled or scattered strips
    page_shape: tuple[int, ...]  # pages as an array, such as (z,) or (z, c)
    page_axes: str  # "auto", or what the description says: "z", "zc" ...
    spacing_nm: tuple[float, float, float] | None


@dataclasses.dataclass(frozen=True)
class TiffDialect:
    order: ByteOrder
    offset_code: str  # struct code of an offset
    count_code: str  # struct code of the number of entries

    @property
    def entry_bytes(self) -> int:
        return 20 if self.offset_code == "Q" else 12


def read_tiff_layout(path: Path) -> TiffLayout:
    """Walk the directories of a TIFF file; a data error names the first page that differs from page 1."""
    try:
        with path.open("rb") as file:
            return walk_pages(path, file)
    except (struct.error, KeyError, ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise data_error(
            f"{path}: truncated or no TIFF file ({type(error).__name__}: {error}): copy it again"
        ) from error


def walk_pages(path: Path, file: IO[bytes]) -> TiffLayout:
    dialect, position = read_header(path, file)
    first_tags: Tags = {}
    first: PageLayout | None = None
    offsets: list[int | None] = []
    seen: set[int] = set()
    while position and position not in seen:
        seen.add(position)
        tags, position = read_directory(file, dialect, position)
        layout = page_layout(path, tags)
        if first is None:
            first, first_tags = layout, tags
        if layout != first:
            what = f"page {len(offsets) + 1} is {layout} (expected {first}, as on page 1)"
            if dataclasses.replace(layout, compression=first.compression, tiled=first.tiled) == first:
                what = f"page {len(offsets) + 1} is compressed in another way than page 1 (expected one way)"
            raise data_error(f"{path}: {what}: save the stack again with pages of one kind")
        offsets.append(pixel_offset(layout, tags))
    if first is None:
        raise ValueError("no page")
    description = text_of(first_tags)
    if len(offsets) == 1 and offsets[0] is not None and (images := imagej_number(description, "images")) > 1:
        page_bytes = first.height * first.width * first.samples * first.bits // 8  # ImageJ beyond 4 GB: one directory
        offsets = [offsets[0] + k * page_bytes for k in range(images)]
    shape, axes = page_order(path, description, len(offsets))
    return TiffLayout(
        first, len(offsets), dialect.order, in_steps(offsets), shape, axes, stated_spacing(description, first_tags)
    )


def read_header(path: Path, file: IO[bytes]) -> tuple[TiffDialect, int]:
    """The byte order and width of offsets, and where the first directory lies."""
    head = file.read(16)
    orders: dict[bytes, ByteOrder] = {b"II": "<", b"MM": ">"}
    if head[:2] not in orders:
        raise data_error(f"{path}: not a TIFF file (starts with {head[:4]!r}): export it again")
    order = orders[head[:2]]
    (version,) = struct.unpack_from(f"{order}H", head, 2)
    if version == 43:
        return TiffDialect(order, "Q", "Q"), struct.unpack_from(f"{order}Q", head, 8)[0]
    if version != 42:
        raise data_error(f"{path}: TIFF of version {version} (expected 42, or 43 for BigTIFF): export it again")
    return TiffDialect(order, "I", "H"), struct.unpack_from(f"{order}I", head, 4)[0]


def read_directory(file: IO[bytes], dialect: TiffDialect, position: int) -> tuple[Tags, int]:
    """The used tags of one page, and the position of the next directory (0: none)."""
    order, wide = dialect.order, struct.calcsize(f"{dialect.order}{dialect.offset_code}")
    count_bytes = struct.calcsize(f"{order}{dialect.count_code}")
    file.seek(position)
    (count,) = struct.unpack(f"{order}{dialect.count_code}", file.read(count_bytes))
    if count > 4096:
        raise ValueError(f"a directory of {count} entries")
    entries = file.read(count * dialect.entry_bytes + wide)
    (following,) = struct.unpack_from(f"{order}{dialect.offset_code}", entries, count * dialect.entry_bytes)
    tags: Tags = {}
    for start in range(0, count * dialect.entry_bytes, dialect.entry_bytes):
        tag, kind, length = struct.unpack_from(f"{order}HH{dialect.offset_code}", entries, start)
        if tag not in USED_TAGS or kind not in TYPE_CODES:
            continue
        code = TYPE_CODES[kind]
        size = struct.calcsize(f"{order}{code}") * length
        value = entries[start + 4 + wide : start + 4 + 2 * wide]
        if size > wide:
            file.seek(struct.unpack(f"{order}{dialect.offset_code}", value)[0])
            value = file.read(size)
        if code == "s":
            tags[tag] = value[:size]
        elif len(code) == 1:
            tags[tag] = struct.unpack(f"{order}{length}{code}", value[:size])
        else:
            pairs = struct.unpack(f"{order}{2 * length}{code[0]}", value[:size])
            tags[tag] = tuple(a / b if b else 0.0 for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    return tags, following


def numbers(tags: Tags, tag: int, absent: int) -> tuple[int, ...]:
    value = tags[tag] if tag in tags else (absent,)
    return tuple(int(v) for v in value)


def page_layout(path: Path, tags: Tags) -> PageLayout:
    """What a page's tags say of its pixels; a data error for pixels that are no plain numbers."""
    bits, kind = numbers(tags, BITS, 1)[0], numbers(tags, SAMPLE_FORMAT, 1)[0]
    if kind not in SAMPLE_KINDS:
        raise data_error(f"{path}: pixels of sample format {kind} (expected whole or real numbers): convert the stack")
    return PageLayout(
        int(tags[HEIGHT][0]),
        int(tags[WIDTH][0]),
        numbers(tags, SAMPLES, 1)[0],
        bits,
        SAMPLE_KINDS[kind],
        numbers(tags, COMPRESSION, UNCOMPRESSED)[0],
        numbers(tags, PHOTOMETRIC, BLACK_IS_ZERO)[0],
        TILE_WIDTH in tags,
    )


def pixel_offset(page: PageLayout, tags: Tags) -> int | None:
    """The first byte of a page's pixels where they lie plain and in one piece; else None."""
    plain = page.compression == UNCOMPRESSED and not page.tiled and page.samples == 1 and page.bits in (8, 16, 32, 64)
    if (
        not plain
        or page.photometric != BLACK_IS_ZERO
        or STRIP_OFFSETS not in tags
        or (page.kind, page.bits) == ("f", 8)
    ):
        return None
    starts = np.array(tags[STRIP_OFFSETS], np.int64)
    if len(starts) > 1:
        sizes = np.array(numbers(tags, STRIP_BYTES, 0), np.int64)
        if len(sizes) != len(starts) or (np.diff(starts) != sizes[:-1]).any():
            return None
    return int(starts[0])


def in_steps(offsets: list[int | None]) -> tuple[int, ...] | range | None:
    """Equal steps, as nearly all programs write them, take no memory per page."""
    known = [offset for offset in offsets if offset is not None]
    if len(known) < len(offsets):
        return None
    step = known[1] - known[0] if len(known) > 1 else 1
    steps = range(known[0], known[0] + step * len(known), step) if step > 0 else range(0)
    return (
        steps if len(steps) == len(known) and all(a == b for a, b in zip(steps, known, strict=True)) else tuple(known)
    )


def text_of(tags: Tags) -> str:
    value = tags[DESCRIPTION] if DESCRIPTION in tags else b""
    return value.decode("utf-8", errors="replace").rstrip("\0") if isinstance(value, bytes) else ""


def imagej_number(description: str, name: str) -> int:
    found = re.search(rf"^{name}=(\d+)", description, re.MULTILINE)
    return int(found[1]) if found and description.startswith("ImageJ=") else 1


def page_order(path: Path, description: str, pages: int) -> tuple[tuple[int, ...], str]:
    """The pages as an array and its axes, slowest first, as ImageJ, OME or tifffile state them; else one axis, "auto"."""
    lengths: dict[str, int] = {}
    if description.startswith("ImageJ="):
        names = {"t": "frames", "z": "slices", "c": "channels"}  # channels vary fastest
        lengths = {axis: imagej_number(description, name) for axis, name in names.items()}
    elif "<Pixels" in description and (order := re.search(r'DimensionOrder="XY([CZT]{3})"', description)):
        found = {axis: re.search(rf'Size{axis}="(\d+)"', description) for axis in order[1]}
        lengths = {axis.lower(): int(found[axis][1]) if found[axis] else 1 for axis in reversed(order[1])}  # type: ignore[index]
    elif description.startswith("{"):
        return tifffile_order(description, pages)
    if math.prod(lengths.values()) != pages or pages == 1:
        return (pages,), "auto"
    if lengths["t"] > 1 and lengths["z"] == 1:  # a stack that was saved as a film
        lengths["t"], lengths["z"] = 1, lengths["t"]
    if lengths["t"] > 1:
        raise data_error(
            f"{path}: holds {lengths['t']} times of {lengths['z']} sections (expected one): export one time"
        )
    kept = {axis: n for axis, n in lengths.items() if axis == "z" or n > 1}
    return tuple(kept.values()), "".join(kept)


def tifffile_order(description: str, pages: int) -> tuple[tuple[int, ...], str]:
    try:
        stated = json.loads(description)
    except json.JSONDecodeError:
        return (pages,), "auto"
    shape = tuple(stated["shape"][:-2]) if "shape" in stated else ()
    plain = len(shape) == 2 and all(isinstance(n, int) for n in shape) and math.prod(shape) == pages
    return (shape, "auto") if plain else ((pages,), "auto")


def stated_spacing(description: str, tags: Tags) -> tuple[float, float, float] | None:
    """Voxel size z, y, x in nm of an ImageJ stack: spacing and unit in the text, pixels per unit in the tags."""
    spacing = re.search(r"^spacing=([\d.eE+-]+)", description, re.MULTILINE)
    unit = re.search(r"^unit=(\S+)", description, re.MULTILINE)
    nm = {"nm": 1.0, "um": 1e3, "micron": 1e3, "µm": 1e3, "\\u00B5m": 1e3, "mm": 1e6}
    if not (description.startswith("ImageJ=") and spacing and unit) or unit[1] not in nm:
        return None
    if X_RESOLUTION not in tags or Y_RESOLUTION not in tags:
        return None
    x, y = float(tags[X_RESOLUTION][0]), float(tags[Y_RESOLUTION][0])
    if min(x, y) <= 0:
        return None
    return float(spacing[1]) * nm[unit[1]], nm[unit[1]] / y, nm[unit[1]] / x
