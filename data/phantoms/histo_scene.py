"""A place of a slide in micrometres: glands or nests, nuclei and fibres, seen at any magnification."""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.spatial

from data.phantoms.histo_settings import HistoPhantom, Spread

Floats = npt.NDArray[np.float64]
RATIO = 10.0  # width of the field at 40X, in fields at 400X
WAVES = 28  # plane waves that fibres are made of
HARMONICS = 5  # of a gland's outline


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a subtype's epithelium lies, in micrometres and shares."""

    gland_radius: tuple[float, float]
    cover: float  # share of the place that epithelium and what it encloses takes
    lumen: tuple[float, float]  # radius of the empty middle, in shares of the gland's
    stretch: tuple[float, float]  # length of a gland over its width
    stroma_cells: float  # nuclei of stroma, of the usual number
    pool: float  # how pale the surroundings are: mucin, or a fibroadenoma's myxoid stroma


ARCHITECTURES = {
    "A": Architecture((28, 60), 0.40, (0.25, 0.55), (1.0, 1.5), 1.0, 0.0),
    "F": Architecture((50, 110), 0.25, (0.15, 0.50), (1.5, 3.2), 1.4, 0.4),
    "PT": Architecture((80, 160), 0.28, (0.30, 0.70), (1.6, 3.5), 2.0, 0.1),
    "TA": Architecture((30, 48), 0.50, (0.30, 0.55), (1.0, 1.2), 0.8, 0.0),
    "DC": Architecture((40, 120), 0.42, (0.00, 0.45), (1.0, 1.8), 1.2, 0.0),
    "LC": Architecture((24, 44), 0.36, (0.00, 0.40), (1.4, 3.4), 1.4, 0.0),
    "MC": Architecture((45, 110), 0.28, (0.10, 0.50), (1.0, 1.6), 0.6, 0.4),
    "PC": Architecture((60, 140), 0.40, (0.30, 0.65), (1.3, 2.6), 0.9, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Tissue:
    """What is drawn once per accession."""

    subtype: str
    nuclear_radius: float  # micrometres
    pleomorphism: float  # deviation of log radius
    crowding: float  # of benign's mean number of nuclei per area
    disorder: float  # of outlines, in shares of the radius
    cover: float  # share of a place that glands take


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A place, in micrometres from its corner; rows are glands and nuclei, and plane waves."""

    extent: tuple[float, float]  # y, x
    centres: Floats  # (g, 2) y, x
    radii: Floats  # (g,)
    stretch: Floats  # (g,)
    turn: Floats  # (g,) radians
    lumen: Floats  # (g,) shares
    outline: Floats  # (g, HARMONICS, 2) amplitudes and phases
    nuclei: Floats  # (n, 2) y, x
    nuclear_axes: Floats  # (n, 2) half axes
    nuclear_turn: Floats  # (n,)
    nuclear_depth: Floats  # (n,) of dye, about 1
    waves: Floats  # (WAVES, 4): wave number y, x per micrometre, phase, amplitude
    pool: float


def draw_tissue(settings: HistoPhantom, label: int, subtype: str, rng: np.random.Generator) -> Tissue:
    """An accession's tissue."""

    nuclei, glands = (1.0, settings.partial) if rng.random() < 0.5 else (settings.partial, 1.0)

    def normal(spread: tuple[Spread, Spread], share: float, lowest: float) -> float:
        mean, deviation = (
            benign + label * share * (malignant - benign) for benign, malignant in zip(*spread, strict=True)
        )
        return max(lowest, float(rng.normal(mean, deviation)))

    return Tissue(
        subtype,
        normal(settings.nuclear_radius_micrometre, nuclei, 1.8),
        normal(settings.pleomorphism, nuclei, 0.03),
        normal(settings.crowding, nuclei, 0.4),
        normal(settings.disorder, glands, 0.02),
        min(0.6, ARCHITECTURES[subtype].cover * float(rng.uniform(*settings.cover_factor))),
    )


def draw_scene(settings: HistoPhantom, tissue: Tissue, rng: np.random.Generator) -> Scene:
    """A place as large as a photograph at 40X."""
    width = settings.field_micrometre * RATIO
    extent = width * settings.size[0] / settings.size[1], width
    plan = ARCHITECTURES[tissue.subtype]
    centres, radii = scattered(extent, plan, tissue.cover, rng)
    count = len(radii)
    amplitude = tissue.disorder * rng.normal(0, 1, (count, HARMONICS)) / np.arange(2, 2 + HARMONICS) ** 0.5
    outline = np.stack([amplitude * 0.6, rng.uniform(0, 2 * np.pi, (count, HARMONICS))], -1)
    glands = Scene(
        extent, centres, radii, rng.uniform(*plan.stretch, count), rng.uniform(0, np.pi, count),
        rng.uniform(*plan.lumen, count), outline, np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), np.zeros(0),
        draw_waves(rng), plan.pool,
    )  # fmt: skip
    return with_nuclei(glands, tissue, plan, rng)


def scattered(
    extent: tuple[float, float], plan: Architecture, cover: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Centres (g, 2) and radii (g,) of glands that hardly overlap and cover about a share of the place."""
    area, centres, radii = extent[0] * extent[1], np.zeros((0, 2)), np.zeros(0)
    for _ in range(4000):
        radius = rng.uniform(*plan.gland_radius)
        centre = rng.uniform(-radius / 2, np.array(extent) + radius / 2)
        if ((centres - centre) ** 2).sum(1).min(initial=np.inf) ** 0.5 > 0.9 * radius + 0.9 * radii.max(initial=0):
            centres, radii = np.vstack([centres, centre]), np.append(radii, radius)
        if np.pi * (radii**2).sum() > cover * area:
            break
    return centres, radii


def draw_waves(rng: np.random.Generator) -> Floats:
    """Fibres: waves of 5 to 60 micrometres, most of them across one direction."""
    direction = rng.uniform(0, np.pi) + rng.normal(0, 0.35, WAVES)
    length = np.exp(rng.uniform(np.log(5), np.log(60), WAVES))
    number = 2 * np.pi / length
    phase, amplitude = rng.uniform(0, 2 * np.pi, WAVES), rng.uniform(0.5, 1, WAVES)
    return np.stack([number * np.sin(direction), number * np.cos(direction), phase, amplitude / amplitude.sum()], 1)


def gland_radius_at(scene: Scene, gland: npt.NDArray[np.int64], angle: Floats) -> Floats:
    """The outline's radius (n,) of glands (n,) at angles (n,) of their own, in shares of `radii`, before stretching."""
    harmonics = np.arange(2, 2 + HARMONICS)
    amplitude, phase = scene.outline[gland, :, 0], scene.outline[gland, :, 1]
    waves: Floats = (amplitude * np.cos(angle[:, None] * harmonics + phase)).sum(1)
    return np.maximum(0.35, 1 + waves)


def with_nuclei(scene: Scene, tissue: Tissue, plan: Architecture, rng: np.random.Generator) -> Scene:
    """The place with its epithelial and stromal nuclei."""
    areas = np.pi * scene.radii**2 * (1 - scene.lumen**2)
    per_gland = rng.poisson(0.0068 * tissue.crowding * areas)
    gland = np.repeat(np.arange(len(areas)), per_gland)
    angle = rng.uniform(0, 2 * np.pi, len(gland))
    inner = scene.lumen[gland] + 0.06
    ring = np.sqrt(rng.uniform(inner**2, 0.97**2))  # uniform over the area
    distance = ring * gland_radius_at(scene, gland, angle) * scene.radii[gland]
    epithelial = to_place(scene, gland, np.stack([distance * np.sin(angle), distance * np.cos(angle)], 1))
    wanted = rng.poisson(0.0009 * plan.stroma_cells * scene.extent[0] * scene.extent[1])
    stromal = rng.uniform(0, scene.extent, (wanted, 2))
    stromal = stromal[~inside_gland(scene, stromal)]
    nuclei = np.concatenate([epithelial, stromal])
    is_stromal = np.arange(len(nuclei)) >= len(epithelial)
    radius = tissue.nuclear_radius * np.exp(tissue.pleomorphism * rng.standard_normal(len(nuclei)))
    radius = np.where(is_stromal, 2.6 * np.exp(0.12 * rng.standard_normal(len(nuclei))), radius)
    longer = np.exp(np.abs(rng.normal(0, 0.10 + 0.8 * tissue.pleomorphism, len(nuclei))))
    longer = np.where(is_stromal, rng.uniform(2.0, 3.4, len(nuclei)), longer)
    axes = np.stack([radius / np.sqrt(longer), radius * np.sqrt(longer)], 1)
    kept = uncrowded(nuclei, axes.mean(1))
    depth = np.exp(0.18 * rng.standard_normal(len(nuclei)))
    turn = rng.uniform(0, np.pi, len(nuclei))
    return dataclasses.replace(
        scene, nuclei=nuclei[kept], nuclear_axes=axes[kept], nuclear_turn=turn[kept], nuclear_depth=depth[kept]
    )


def to_place(scene: Scene, gland: npt.NDArray[np.int64], offset: Floats) -> Floats:
    """Points (n, 2) relative to glands (n,), before stretching and turning, as places y, x."""
    stretch, turn = np.sqrt(scene.stretch[gland]), scene.turn[gland]
    across, along = offset[:, 0] / stretch, offset[:, 1] * stretch
    y = across * np.cos(turn) + along * np.sin(turn)
    x = along * np.cos(turn) - across * np.sin(turn)
    return scene.centres[gland] + np.stack([y, x], 1)


def from_place(scene: Scene, gland: int, points: Floats) -> tuple[Floats, Floats]:
    """Distance in shares of the outline (...) and angle (...) of points (..., 2) as one gland sees them."""
    y, x = np.moveaxis(points - scene.centres[gland], -1, 0)
    turn, stretch = scene.turn[gland], np.sqrt(scene.stretch[gland])
    across, along = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    across, along = across * stretch, along / stretch
    angle = np.arctan2(across, along)
    outline = gland_radius_at(scene, np.full(angle.size, gland), angle.ravel()).reshape(angle.shape)
    return np.hypot(across, along) / (outline * scene.radii[gland]), angle


def inside_gland(scene: Scene, points: Floats) -> npt.NDArray[np.bool_]:
    """Which of the points (n, 2) lie in a gland."""
    inside = np.zeros(len(points), np.bool_)
    tree = scipy.spatial.cKDTree(points) if len(points) else None
    for gland, (centre, radius, stretch) in enumerate(zip(scene.centres, scene.radii, scene.stretch, strict=True)):
        near = np.array(
            tree.query_ball_point(centre, 1.8 * radius * stretch**0.5) if tree is not None else [], np.int64
        )
        inside[near] |= from_place(scene, gland, points[near])[0] < 1
    return inside


def uncrowded(points: Floats, radius: Floats) -> npt.NDArray[np.bool_]:
    """Which nuclei stay when of two that overlap by more than a third the later one goes."""
    kept = np.ones(len(points), np.bool_)
    if len(points) < 2:
        return kept
    pairs = scipy.spatial.cKDTree(points).query_pairs(1.3 * float(radius.max()), output_type="ndarray")
    close = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1) < 0.65 * radius[pairs].sum(1)
    for one, other in pairs[close][np.lexsort(pairs[close].T[::-1])]:
        if kept[one] and kept[other]:
            kept[other] = False
    return kept
