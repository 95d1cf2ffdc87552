"""What colour alone says: 18 numbers per image and the nearest neighbour among them, the baseline of every figure here.

Stain and camera differ from laboratory day to laboratory day, so colour finds the patient; a classifier must beat it on
patients that it has not seen.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Pictures

from common.errors import data_error
from common.logbook import progress

Floats = npt.NDArray[np.float64]
SIZE = (350, 230)  # pixels across and down that colours are taken from
PERCENTILES = (5, 25, 50, 75, 95)
# linear RGB with sRGB's primaries -> XYZ, each row divided by the D65 white of 2 degrees (IEC 61966-2-1, CIE 15)
WHITE = (0.95047, 1.0, 1.08883)
TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
DARK = (6 / 29) ** 3  # where CIE Lab's cube root gives way to a line


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """An image as RGB bytes (height, width, 3); a data error names a file that is none."""
    try:
        with Pictures.open(path) as picture:
            pixels: npt.NDArray[np.uint8] = np.asarray(opaque(picture).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Pictures.DecompressionBombError) as error:
        raise data_error(f"{path}: cannot be read as an image ({error}); copy it again") from error
    return pixels


def opaque(picture: Pictures.Image) -> Pictures.Image:
    """A picture of 8 bits without transparency: 16 bits are scaled, what shines through is white."""
    if picture.mode.startswith("I"):  # Pillow's own conversion clips at 255
        return Pictures.fromarray((np.asarray(picture).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        return Pictures.alpha_composite(Pictures.new("RGBA", picture.size, "white"), coloured)
    return picture


def lab(pixels: npt.NDArray[np.uint8]) -> Floats:
    """sRGB bytes (..., 3) -> CIE L*a*b* (..., 3) for D65."""
    scaled = np.arange(256) / 255
    linear = np.where(scaled > 0.04045, ((scaled + 0.055) / 1.055) ** 2.4, scaled / 12.92)[pixels]
    relative = linear @ (TO_XYZ / np.array(WHITE)[:, None]).T  # (..., 3) X, Y, Z of white
    bent = np.where(relative > DARK, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(bent, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def colour_numbers(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Percentiles and standard deviation of L*, a* and b* of an image (height, width, 3), taken at SIZE; (18,)."""
    small = np.asarray(Pictures.fromarray(pixels).resize(SIZE, Pictures.Resampling.BOX))
    channels = lab(small).reshape(-1, 3)
    return np.concatenate([np.percentile(channels, PERCENTILES, axis=0), channels.std(0)[None]]).T.ravel()


def colour_table(paths: Iterable[Path], number: int) -> Floats:
    """The colour numbers of `number` files, (number, 18), standardised over the files."""
    shown = progress(paths, "reading colours", number, True)
    return standardised(np.array([colour_numbers(read_picture(path)) for path in shown]))


def standardised(rows: Floats) -> Floats:
    """Rows (n, 18) with mean 0 and deviation 1 in each column; a column of one value becomes 0."""
    deviation = rows.std(0)
    return np.asarray((rows - rows.mean(0)) / np.where(deviation > 0, deviation, 1), np.float64)


def nearest(queries: Floats, references: Floats, allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The nearest of the references (m, 18) that a query (n, 18) may have (n, m); -1 where it may have none; (n,)."""
    squared = (queries**2).sum(1)[:, None] + (references**2).sum(1) - 2 * queries @ references.T
    squared = np.where(allowed, squared, np.inf)
    return np.where(allowed.any(1), squared.argmin(1), -1)
