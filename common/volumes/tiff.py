"""TIFF stacks: plain pages are mapped into memory, compressed ones decoded page by page."""

import dataclasses
import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.errors import data_error
from common.extras import extra_package
from common.files import parsing
from common.volumes.axes import arrange
from common.volumes.slices import UNREADABLE_IMAGE, grey_pixels
from common.volumes.tiff_layout import (
    COMPRESSION,
    STRIP_BYTES,
    STRIP_OFFSETS,
    PageLayout,
    TiffLayout,
    read_tiff_layout,
)
from common.volumes.volume import StoredBox, Volume, first_line
from common.volumes.voxel_size import ANGSTROM_PER, spacing_in_angstrom

TIFF_SUFFIXES = (".tif", ".tiff")
RGB = 2
DEFLATE = (8, 32946)  # of the tag COMPRESSION
TILE_OFFSETS, TILE_BYTES = 324, 325
UNDECODED = "copy it again, or save it uncompressed"
SAMPLE_DTYPES = {("u", bits): "u1" for bits in (1, 2, 4)}  # fewer bits become grey levels 0 to 255
SAMPLE_DTYPES |= {(kind, 8 * n): f"{kind}{n}" for kind, sizes in (("u", (1, 2, 4, 8)), ("i", (1, 2, 4, 8)), ("f", (2, 4, 8)))
                  for n in sizes}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TiffStack(Volume):
    """Pages as an array (pages, height, width), or (z, c, height, width) where the file says so."""

    page_shape: tuple[int, ...]
    height_width: tuple[int, int]

    def _read_stored(self, box: StoredBox) -> npt.NDArray[Any]:
        *leading, rows, columns = box
        if len(leading) < len(self.page_shape):  # one page, opened as "yx"
            leading = [slice(0, 1)] * len(self.page_shape)
        places = itertools.product(*(range(r.start, r.stop) for r in leading))
        pages = [int(np.ravel_multi_index(place, self.page_shape)) for place in places]
        pixels = self._read_pages(pages, rows, columns)  # (page, y, x)
        lengths = [r.stop - r.start for r in box]
        return pixels.reshape(lengths)

    def _read_pages(self, pages: list[int], rows: slice, columns: slice) -> npt.NDArray[Any]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MappedTiff(TiffStack):
    """Plain pixels, each page in one piece."""

    stored_dtype: np.dtype[Any]
    offsets: tuple[int, ...] | range = dataclasses.field(repr=False)

    def _read_pages(self, pages: list[int], rows: slice, columns: slice) -> npt.NDArray[Any]:
        content = np.memmap(self.path, np.uint8, "r")
        pixels = np.empty((len(pages), rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for i, page in enumerate(pages):
            whole = np.ndarray(self.height_width, self.stored_dtype, content, self.offsets[page])
            pixels[i] = whole[rows, columns]
        return pixels


@dataclasses.dataclass(frozen=True)
class PillowTiff(TiffStack):
    """Pages that Pillow decodes (8 bit, uint16, 32 bit; LZW, deflate, JPEG and others); colour becomes grey."""

    def _read_pages(self, pages: list[int], rows: slice, columns: slice) -> npt.NDArray[Any]:
        pixels = np.empty((len(pages), rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        page = 0
        try:
            with Image.open(self.path) as image:
                for i, page in enumerate(pages):
                    image.seek(page)
                    check_sums(image, self.path, page)
                    whole = grey_pixels(image)
                    pixels[i] = exact(whole, self.dtype)[rows, columns]
        except (*UNREADABLE_IMAGE, EOFError) as error:
            raise data_error(
                f"{self.path}: page {page + 1} cannot be decoded ({first_line(error)}): save it again"
            ) from error
        return pixels


def check_sums(image: Image.Image, path: Path, page: int) -> None:
    """A data error where a deflated page's check sums are wrong: Pillow's decoder never looks at them."""
    tags = image.tag_v2  # type: ignore[attr-defined]  # of a TIFF
    if tags[COMPRESSION] not in DEFLATE:
        return
    places = (STRIP_OFFSETS, STRIP_BYTES) if STRIP_OFFSETS in tags else (TILE_OFFSETS, TILE_BYTES)
    with path.open("rb") as file:
        for offset, length in zip(*(tags[place] for place in places), strict=True):
            file.seek(offset)
            try:
                zlib.decompress(file.read(length))
            except zlib.error as error:
                raise data_error(f"{path}: page {page + 1} is damaged ({error}): copy the file again") from error


@dataclasses.dataclass(frozen=True)
class TifffileTiff(TiffStack):
    """Pages that need tifffile: other numbers of bits, and scattered strips."""

    def _read_pages(self, pages: list[int], rows: slice, columns: slice) -> npt.NDArray[Any]:
        tifffile = extra_package("tifffile", f"{self.path}: reading this kind of TIFF")
        pixels = np.empty((len(pages), rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        with parsing(self.path, UNDECODED), tifffile.TiffFile(self.path) as file:
            for i, page in enumerate(pages):
                pixels[i] = file.pages[page].asarray()[rows, columns]
        return pixels


def exact(pixels: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Pixels in the file's own dtype: Pillow hands out uint32 as int32, int8 as uint8 and int16 as int32."""
    return pixels.view(dtype) if pixels.dtype.itemsize == dtype.itemsize and pixels.dtype.kind in "iu" else pixels


def open_tiff(path: Path, axes: str) -> TiffStack:
    """A multi-page TIFF or BigTIFF [page, y, x]; all pages must have one size and kind of pixel.

    Errors: a data error for a damaged file or a page that differs, a config error where tifffile is needed and absent.
    """
    layout = read_tiff_layout(path)
    page = layout.page
    stored_shape = (*layout.page_shape, page.height, page.width)
    if axes in ("yx", "xy") and layout.pages == 1:
        stored_shape = stored_shape[-2:]
    own_axes = "auto" if layout.page_axes == "auto" else f"{layout.page_axes}yx"
    meaning, shape, channels = arrange(str(path), stored_shape, axes, own_axes)
    spacing = None
    if layout.spacing_nm is not None:
        spacing = spacing_in_angstrom("zyx", layout.spacing_nm, ANGSTROM_PER["nm"])
    if (page.kind, page.bits) not in SAMPLE_DTYPES:
        raise data_error(f"{path}: pages are {page} (expected 8, 16, 32 or 64 bits): convert the stack")
    grey8 = page.bits < 8 or (page.samples > 1 and page.photometric == RGB and page.bits == 8)
    dtype = np.dtype(np.uint8) if grey8 else np.dtype(SAMPLE_DTYPES[page.kind, page.bits])
    contract = (path, meaning, shape, channels, dtype, spacing, layout.page_shape, (page.height, page.width))
    if layout.offsets is not None:
        check_length(path, layout)
        return MappedTiff(*contract, dtype.newbyteorder(layout.byte_order), layout.offsets)
    if page.samples > 1 and not grey8:
        found = f"{page.samples} samples of {page.bits} bits per pixel"
        raise data_error(f"{path}: {found} (expected 1, or 8-bit RGB): save the channels as pages")
    misread = layout.byte_order == ">" and page.bits > 8  # Pillow swaps the bytes of compressed samples twice
    if not misread and pillow_can(path, page):
        return PillowTiff(*contract)
    check_tifffile(path, page)
    return TifffileTiff(*contract)


def check_length(path: Path, layout: TiffLayout) -> None:
    assert layout.offsets is not None
    page_bytes = layout.page.height * layout.page.width * layout.page.bits // 8
    expected, found = max(layout.offsets) + page_bytes, path.stat().st_size
    if found < expected:
        raise data_error(
            f"{path}: {found} bytes (expected {expected}, {layout.pages} pages): it is cut short; copy it again"
        )


def pillow_can(path: Path, page: PageLayout) -> bool:
    """Whether Pillow opens the first page and hands out its pixels without loss."""
    lossless = {("u", 8), ("i", 8), ("u", 16), ("i", 16), ("u", 32), ("i", 32), ("f", 32)}
    if page.bits >= 8 and (page.kind, page.bits) not in lossless:
        return False
    try:
        with Image.open(path):
            return True
    except UNREADABLE_IMAGE:
        return False


def check_tifffile(path: Path, page: PageLayout) -> None:
    """A config error where tifffile is absent, a data error where it cannot decode this compression either."""
    tifffile = extra_package(
        "tifffile", f"{path}: reading TIFF of {page.kind}{page.bits}, compression {page.compression},"
    )
    with parsing(path, UNDECODED), tifffile.TiffFile(path) as file:
        _ = file.pages[0].decode  # the property looks for the codec
