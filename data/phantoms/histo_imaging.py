"""A place photographed: dye per pixel at one magnification, light through it, a camera."""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from data.phantoms.histo_scene import Floats, Scene, from_place
from data.phantoms.histo_settings import HistoPhantom

# optical density of R, G, B, unit vectors (Ruifrok & Johnston 2001)
HAEMATOXYLIN, EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)
EDGE = 0.35  # pixels over which a nucleus fades
USUAL_COVER = 0.1  # share of a place that nuclei cover
BLUE_CYTOPLASM = 0.05  # of a nucleus' dye, in epithelium


@dataclasses.dataclass(frozen=True, eq=False)
class Staining:
    """A slide's dyes and lamp."""

    haematoxylin: Floats  # (3,) optical density per amount
    eosin: Floats  # (3,)
    haematoxylin_strength: float  # optical density of a nucleus at the usual cover
    eosin_strength: float  # of full cytoplasm
    white: Floats  # (3,)


def draw_staining(settings: HistoPhantom, rng: np.random.Generator) -> Staining:
    """An accession's staining, whatever its class."""
    directions = []
    for direction in (HAEMATOXYLIN, EOSIN):
        bent = np.maximum(np.array(direction) + rng.normal(0, settings.direction_deviation, 3), 0.02)
        directions.append(bent / np.linalg.norm(bent))
    low, high = settings.haematoxylin_strength
    strength = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    white = rng.uniform(*settings.white) + settings.tint * rng.standard_normal(3)
    return Staining(
        directions[0], directions[1], strength, float(rng.uniform(*settings.eosin_strength)),
        np.clip(white, 0.5, 1),
    )  # fmt: skip


def of_slide(staining: Staining, settings: HistoPhantom, rng: np.random.Generator) -> Staining:
    """The same on one of the accession's slides."""
    factor = np.exp(settings.slide_deviation * rng.standard_normal(2))
    return dataclasses.replace(
        staining,
        haematoxylin_strength=staining.haematoxylin_strength * float(factor[0]),
        eosin_strength=staining.eosin_strength * float(factor[1]),
    )


def haematoxylin_amount(settings: HistoPhantom, scene: Scene, staining: Staining) -> float:
    """Optical density of a nucleus: the slide's, less where nuclei cover more of the whole place."""
    covered = np.pi * (scene.nuclear_axes.prod(1) * scene.nuclear_depth).sum() / (scene.extent[0] * scene.extent[1])
    share = (USUAL_COVER / max(covered, 1e-3)) ** settings.compensation
    return float(np.clip(staining.haematoxylin_strength * share, 0.3, 3.0))


def photograph(
    settings: HistoPhantom,
    scene: Scene,
    staining: Staining,
    corner: tuple[float, float],
    width: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint8]:
    """RGB bytes (y, x, 3) of the part of a place that begins at a corner y, x and is `width` wide; in micrometres."""
    height, across = settings.size
    pixel = width / across
    rows = np.asarray(corner[0] + (np.arange(height) + 0.5) * pixel, np.float64)
    columns = np.asarray(corner[1] + (np.arange(across) + 0.5) * pixel, np.float64)
    epithelium, enclosed = epithelium_at(scene, rows, columns, pixel)
    fibres = waves_at(scene.waves, rows, columns, pixel)
    nuclei = nuclei_at(scene, corner, pixel, settings.size)
    grain = waves_at(chromatin(scene), rows, columns, pixel)
    dye = haematoxylin_amount(settings, scene, staining)
    blue = dye * (nuclei * (1 + 0.8 * grain) + BLUE_CYTOPLASM * epithelium)
    stroma = np.clip(1 - epithelium - enclosed, 0, 1) * (1 - scene.pool)
    pink = staining.eosin_strength * (
        0.70 * epithelium * (1 + 0.3 * grain) + stroma * np.clip(0.5 + 1.6 * fibres, 0.05, 1.2)
    )
    pink = pink * (1 - 0.6 * np.minimum(nuclei, 1))
    density = blue[..., None] * staining.haematoxylin + pink[..., None] * staining.eosin
    light = staining.white * np.exp(-np.maximum(density, 0))
    blur = rng.uniform(*settings.defocus_pixel)
    light = scipy.ndimage.gaussian_filter(light, (blur, blur, 0))
    light += rng.uniform(*settings.noise) * rng.standard_normal(light.shape)
    return np.clip(np.round(255 * light), 0, 255).astype(np.uint8)


def epithelium_at(scene: Scene, rows: Floats, columns: Floats, pixel: float) -> tuple[Floats, Floats]:
    """Share of each pixel that is epithelium, and that is a gland's empty middle; (y, x) each."""
    epithelium = np.zeros((len(rows), len(columns)))
    enclosed = np.zeros_like(epithelium)
    for gland, (centre, radius, stretch) in enumerate(zip(scene.centres, scene.radii, scene.stretch, strict=True)):
        reach = 1.8 * radius * np.sqrt(stretch)
        y = slice(*np.searchsorted(rows, (centre[0] - reach, centre[0] + reach)))
        x = slice(*np.searchsorted(columns, (centre[1] - reach, centre[1] + reach)))
        if y.start == y.stop or x.start == x.stop:
            continue
        points = np.stack(np.meshgrid(rows[y], columns[x], indexing="ij"), -1)
        distance, _ = from_place(scene, gland, points)
        sharp = radius / max(pixel, 1.5)  # pixels, or cell borders, per radius
        whole = 1 / (1 + np.exp(np.clip(-(1 - distance) * 4 * sharp, -50, 50)))
        empty = 1 / (1 + np.exp(np.clip(-(scene.lumen[gland] - distance) * 4 * sharp, -50, 50)))
        empty = empty if scene.lumen[gland] > 0.05 else np.zeros_like(empty)
        epithelium[y, x] = np.maximum(epithelium[y, x], whole - empty)
        enclosed[y, x] = np.maximum(enclosed[y, x], empty)
    return np.maximum(epithelium, 0), enclosed


def waves_at(waves: Floats, rows: Floats, columns: Floats, pixel: float) -> Floats:
    """The sum of plane waves (y, x), about -0.5 to 0.5; what is finer than a pixel averages out."""
    total = np.zeros((len(rows), len(columns)))
    for along_y, along_x, phase, amplitude in waves:
        passed = np.exp(-(along_y**2 + along_x**2) * pixel**2 / 8)
        if passed > 0.02:
            by_row, by_column = np.exp(1j * (along_y * rows + phase)), np.exp(1j * along_x * columns)
            total += amplitude * passed * (by_row[:, None] * by_column).real
    return total


def chromatin(scene: Scene) -> Floats:
    """Grain of 2 to 20 micrometres, in every direction: the fibres' waves, shorter and turned about."""
    turn = np.linspace(0, 2 * np.pi, len(scene.waves), endpoint=False)
    number = np.hypot(scene.waves[:, 0], scene.waves[:, 1]) * 4.5
    return np.stack([number * np.sin(turn), number * np.cos(turn), scene.waves[:, 2], scene.waves[:, 3]], 1)


def nuclei_at(scene: Scene, corner: tuple[float, float], pixel: float, size: tuple[int, int]) -> Floats:
    """Dye of nuclei per pixel (y, x): about 1 inside one, by area where they are smaller than pixels."""
    place = (scene.nuclei - corner) / pixel - 0.5
    axes = scene.nuclear_axes / pixel
    margin = 2 * axes.max(initial=1)
    seen = ((place > -margin) & (place < np.array(size) + margin)).all(1)
    place, axes, turn, depth = place[seen], axes[seen], scene.nuclear_turn[seen], scene.nuclear_depth[seen]
    drawn = np.sqrt(axes**2 + EDGE**2)
    depth = depth * (axes.prod(1) / drawn.prod(1))
    half = int(np.ceil(drawn.max(initial=1) + 2 * EDGE))
    steps = np.arange(-half, half + 1)
    corners = np.round(place).astype(np.int64)
    dy = (corners[:, :1] + steps - place[:, :1])[:, :, None]
    dx = (corners[:, 1:] + steps - place[:, 1:])[:, None, :]
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    across, along = dy * cos - dx * sin, dy * sin + dx * cos
    outside = np.hypot(across / drawn[:, 0, None, None], along / drawn[:, 1, None, None]) - 1
    covered = depth[:, None, None] / (1 + np.exp(np.clip(outside * drawn.min(1)[:, None, None] / EDGE * 2, -50, 50)))
    canvas = np.zeros((size[0] + 2 * half, size[1] + 2 * half))
    y = np.clip(corners[:, :1] + steps + half, -1, canvas.shape[0])
    x = np.clip(corners[:, 1:] + steps + half, -1, canvas.shape[1])
    valid = ((y >= 0) & (y < canvas.shape[0]))[:, :, None] & ((x >= 0) & (x < canvas.shape[1]))[:, None, :]
    flat = y[:, :, None] * canvas.shape[1] + x[:, None, :]
    canvas += np.bincount(flat[valid], covered[valid], canvas.size).reshape(canvas.shape)
    return np.minimum(canvas[half:-half, half:-half], 1.8)
