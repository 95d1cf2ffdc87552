"""Sections as image files: a folder of them, or a single one; colour becomes 8-bit grey."""

import dataclasses
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from common.errors import UserError, config_error, data_error
from common.volumes.axes import AUTO, arrange
from common.volumes.volume import StoredBox, Volume

SLICE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
SINGLE_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

KEPT_IMAGE_MODES: dict[str, np.dtype[Any]] = {  # Pillow's modes of more than 8 bits; all others become 8-bit grey
    "I;16": np.dtype(np.uint16),
    "I;16L": np.dtype(np.uint16),
    "I;16B": np.dtype(np.uint16),
    "I;16N": np.dtype(np.uint16),
    "I": np.dtype(np.int32),
    "F": np.dtype(np.float32),
}
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339  # tags of TIFF
# what Pillow raises on bad files
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error, zlib.error,
                    OverflowError, MemoryError, Image.DecompressionBombError)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sections(Volume):
    """One image file per section; the file's own array is [section, height, width], or [height, width] of a single one."""

    height_width: tuple[int, int]
    slices: tuple[Path, ...] = dataclasses.field(repr=False)

    def _read_stored(self, box: StoredBox) -> npt.NDArray[Any]:
        *sections, rows, columns = box
        chosen = self.slices[sections[0]] if sections else self.slices
        stored = np.empty((len(chosen), rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for i, path in enumerate(chosen):
            stored[i] = self._decode(path)[rows, columns]
        return stored if sections else stored[0]

    def _decode(self, path: Path) -> npt.NDArray[Any]:
        try:
            with Image.open(path) as image:
                self._compare(path, image)
                return grey_pixels(image)
        except UNREADABLE_IMAGE as error:
            raise unreadable_slice(path, error) from error

    def _compare(self, path: Path, image: ImageFile.ImageFile) -> None:
        height, width, dtype = image_layout(image)
        if (height, width) != self.height_width:
            expected = f"{self.height_width[0]} x {self.height_width[1]}, as in {self.slices[0].name}"
            raise data_error(f"{path}: height x width {height} x {width} (expected {expected}): re-export this slice")
        if dtype != self.dtype:
            expected = f"{self.dtype}, as in {self.slices[0].name}"
            raise data_error(f"{path}: {dtype} pixels (expected {expected}): re-export this slice")
        pages = getattr(image, "n_frames", 1)  # formats of a single image do not have the attribute
        if pages != 1:
            raise data_error(f"{path}: {pages} pages (expected 1): export one file per slice")


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts numbers in names by value (9.jpg before 10.jpg); equal values, as 01 and 1, by the name itself."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))), name


def open_slice_folder(folder: Path, axes: str) -> Sections:
    """A folder of slices in natural order of their names; only the first one's header is read."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in SLICE_SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise data_error(f"{folder}: no slices (expected slice_0000{SLICE_SUFFIXES[0]} ... or {SLICE_SUFFIXES[1:]})")
    suffixes = sorted({path.suffix.lower() for path in found})
    if len(suffixes) > 1:
        raise data_error(f"{folder}: slices of {len(suffixes)} kinds {suffixes} (expected one): move the others away")
    slices = tuple(sorted(found, key=lambda path: natural_key(path.name)))
    height, width, dtype = first_layout(slices[0])
    meaning, shape, channels = arrange(str(folder), (len(slices), height, width), axes, AUTO)
    return Sections(folder, meaning, shape, channels, dtype, None, (height, width), slices)


def open_single_image(path: Path, axes: str) -> Sections:
    """One image file [y, x] as a volume of one section."""
    height, width, dtype = first_layout(path)
    meaning, shape, channels = arrange(str(path), (height, width), axes, AUTO)
    return Sections(path, meaning, shape, channels, dtype, None, (height, width), (path,))


def first_layout(path: Path) -> tuple[int, int, np.dtype[Any]]:
    try:
        with Image.open(path) as image:
            return image_layout(image)
    except UNREADABLE_IMAGE as error:
        raise unreadable_slice(path, error) from error


def image_layout(image: ImageFile.ImageFile) -> tuple[int, int, np.dtype[Any]]:
    """Height, width and dtype of an image's pixels once they are grey; from its header alone."""
    dtype = KEPT_IMAGE_MODES[image.mode] if image.mode in KEPT_IMAGE_MODES else np.dtype(np.uint8)
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if dtype.itemsize > 1 and tags.prefix == b"MM" and image.info["compression"] != "raw":
            raise ValueError("compressed big-endian samples of more than 8 bits, which Pillow misreads")
        unsigned = SAMPLE_FORMAT not in tags or tags[SAMPLE_FORMAT][0] == 1
        if image.mode == "I" and unsigned and tags[BITS_PER_SAMPLE][0] == 32:
            dtype = np.dtype(np.uint32)  # Pillow knows 32-bit integers only as signed ones
    return image.height, image.width, dtype


def grey_pixels(image: ImageFile.ImageFile) -> npt.NDArray[Any]:
    """An image's pixels [y, x]."""
    dtype = image_layout(image)[2]
    pixels = np.asarray(image if image.mode in KEPT_IMAGE_MODES else image.convert("L"))
    return pixels.view(dtype) if dtype == np.uint32 else pixels


def unreadable_slice(path: Path, error: BaseException) -> UserError:
    return data_error(f"{path}: not a readable image ({error}): re-copy or re-export this slice")


def write_slice_folder(volume: npt.NDArray[np.uint8], folder: Path, suffix: str, jpeg_quality: int) -> None:
    """Write [z, y, x] grey levels as slice_0000.jpg (or .png, exact) ...; the folder appears once it is complete.

    jpeg_quality: 1 to 95, the highest that Pillow advises. What a killed call left behind is overwritten by the next.
    """
    assert volume.ndim == 3 and volume.dtype == np.uint8, f"Expected 3D uint8, got {volume.ndim}D {volume.dtype}"
    if suffix not in (".jpg", ".png"):
        raise config_error(f"{folder}: cannot write slices as '{suffix}' (expected .jpg or .png)")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise config_error(f"{folder}: exists already (expected a new or empty folder): remove it or choose another")
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for z, image in enumerate(volume):
            Image.fromarray(image).save(unfinished / f"slice_{z:04d}{suffix}", quality=jpeg_quality)
        unfinished.replace(folder)
    except OSError as error:
        raise data_error(f"{folder}: cannot be written ({error.strerror}); what was finished before is kept") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
