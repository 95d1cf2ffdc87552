"""Pictures of a judged volume: what is true and what was found over the image, and where objects are split or merged."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.patches import Patch as Swatch

from common.figures import save_figure
from common.metrics.segmentation import count_overlaps, label_boundaries
from common.streams import random_for

GREY_RANGE = (-2.5, 2.5)  # standard deviations shown from black to white
PIXELS = 640  # about, along a panel's longer edge: larger planes are thinned out, smaller ones enlarged for fine lines
CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#8b5cf6", "#a3e635")
ERRORS = (("right", "#b0b0b0"), ("merged", "#ff4326"), ("cut off", "#1f7bff"), ("both", "#b04cff"))
ERROR_COLOURS = np.array([[*to_rgb(colour), 0.5 if number else 0.0] for number, (_, colour) in enumerate(ERRORS)])
PANEL = 2.9  # inches, width of an overlay's panel
GAP = 0.06  # inches between panels
VIEWS = 9.0  # inches of two views beside each other
LEAST_STRIP = 1.7  # inches, of a view from the side
LEAST_ROW = 0.5  # inches, of a row of an overlay: holds its name
GROUND = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 2}  # behind words in a picture
Image = npt.NDArray[np.float32]
Labels = npt.NDArray[np.unsignedinteger[Any]] | npt.NDArray[np.signedinteger[Any]]
Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Shown:
    """A volume with what is true and what was found, [z, y, x] each; None where there is no such target."""

    image: Image
    voxel_size_nm: tuple[float, float, float]
    class_names: tuple[str, ...]  # of the classes 1, 2 ...
    true_classes: npt.NDArray[np.uint8] | None
    found_classes: npt.NDArray[np.uint8] | None
    true_ids: npt.NDArray[np.int64] | None
    found_ids: Labels | None
    first_section: int  # of the volume in its file

    def extent_nm(self, axis: int) -> float:
        return float(self.image.shape[axis] * self.voxel_size_nm[axis])


@dataclasses.dataclass(frozen=True)
class Plane:
    """One middle plane: its name, its index, and the axes that run down and across."""

    words: str
    index: Index
    down: int
    across: int


def planes_of(shape: tuple[int, ...], first_section: int) -> list[Plane]:
    """The three middle planes; sections are named by their number in the file."""
    z, y, x = (n // 2 for n in shape)
    every = slice(None)
    return [
        Plane(f"section z = {first_section + z}", (z, every, every), 1, 2),
        Plane(f"y = {y}", (every, y, every), 0, 2),
        Plane(f"x = {x}", (every, every, x), 0, 1),
    ]


def id_colours(ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """One fixed bright colour per id, (n,) -> (n, 3)."""
    drawn = [random_for("colour", int(one)).uniform((0.0, 0.45, 0.75), (1.0, 0.95, 1.0)) for one in ids]
    colours: npt.NDArray[np.float64] = hsv_to_rgb(np.array(drawn).reshape(-1, 3))
    return colours


def class_colour(number: int) -> str:
    """Fixed for classes 1, 2 ...; after nine they repeat."""
    return CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]


def outlined(labels: Labels, size: tuple[float, float], colours: npt.NDArray[np.float64], opacity: float) -> Image:
    """RGBA of labels 0..n (y, x) of voxels of a size, with colours (n + 1, 3): filled, opaque at borders; 0 is clear."""
    pixel = max(n * edge for n, edge in zip(labels.shape, size, strict=True)) / PIXELS
    times = [max(1, round(edge / pixel)) for edge in size]
    fine = labels.repeat(times[0], 0).repeat(times[1], 1)
    picture = np.zeros((*fine.shape, 4), np.float32)
    picture[..., :3] = colours[fine]
    line = label_boundaries(fine)
    picture[..., 3] = np.where(fine > 0, np.where(line, 1.0, opacity), 0.0)
    return picture


def thinned(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A plane with every so manieth voxel, so that it is not much larger than its panel."""
    step = -(-max(plane.shape) // (2 * PIXELS))
    return plane[::step, ::step]


def layers_of(shown: Shown) -> list[tuple[str, Labels, npt.NDArray[np.float64]]]:
    """Title, labels 0..n [z, y, x] and colours (n + 1, 3) of what there is to show."""
    layers: list[tuple[str, Labels, npt.NDArray[np.float64]]] = []
    for title, classes in (("true classes", shown.true_classes), ("found classes", shown.found_classes)):
        if classes is not None:
            colours = [to_rgb(class_colour(k)) for k in range(int(classes.max(initial=0)) + 1)]
            layers.append((title, classes, np.array(colours)))
    if shown.true_ids is not None and shown.found_ids is not None:
        true_ids, truth = numbered(shown.true_ids)
        found_ids, found = numbered(shown.found_ids)
        own = np.concatenate([np.zeros((1, 3)), id_colours(true_ids[1:])])
        partner = main_partner(found, truth, len(found_ids))
        borrowed = np.where((partner > 0)[:, None], own[np.maximum(partner, 0)], 0.6)  # grey: nothing true there
        layers += [("true instances", truth, own), ("found instances", found, borrowed)]
    return layers


def numbered(labels: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The ids that there are with 0 as the first, and every voxel's number among them."""
    found, number = np.unique(labels, return_inverse=True)
    missing = int(found[0] != 0)
    ids = np.concatenate([np.zeros(missing, np.int64), found.astype(np.int64)])
    return ids, number.reshape(labels.shape).astype(np.int64) + missing


def main_partner(labels: Labels, others: Labels, count: int) -> npt.NDArray[np.int64]:
    """For each of the labels 0 .. count - 1 the label above 0 of the others that it shares most voxels with; -1: none."""
    table = count_overlaps(np.asarray(labels, np.int64), np.asarray(others, np.int64))
    kept = table.segment_ids[table.column] > 0
    order = np.flatnonzero(kept)[np.argsort(table.voxels[kept], kind="stable")]
    best = np.full(count, -1, np.int64)
    best[table.truth_ids[table.row[order]].astype(np.int64)] = table.segment_ids[table.column[order]]  # the last stays
    return best


def draw_overlay(shown: Shown, path: Path) -> None:
    """Rows: the three middle planes; columns: image, then classes and instances, true and found, over the image.

    A found object has the colour of the true one that it shares most voxels with, or grey; lines part objects.
    """
    layers, planes = layers_of(shown), planes_of(shown.image.shape, shown.first_section)
    ratios = [min(2.0, shown.extent_nm(plane.down) / shown.extent_nm(plane.across)) for plane in planes]
    heights = [max(LEAST_ROW, PANEL * ratio) for ratio in ratios]
    columns, total = 1 + len(layers), sum(heights) + GAP * (len(planes) - 1)
    wide, high = columns * (PANEL + GAP) + 0.3, total + 0.8
    figure, axes = plt.subplots(len(planes), columns, figsize=(wide, high), squeeze=False, height_ratios=heights)
    space = {"wspace": GAP / PANEL, "hspace": GAP / float(np.mean(heights))}
    figure.subplots_adjust(left=0.3 / wide, right=1, top=1 - 0.35 / high, bottom=0.45 / high, **space)
    for row, plane in enumerate(planes):
        size = shown.voxel_size_nm[plane.down], shown.voxel_size_nm[plane.across]
        for column, panel in enumerate(axes[row]):
            draw_image(panel, shown.image[plane.index], shown, plane)
            if column:
                _, labels, colours = layers[column - 1]
                over(panel, outlined(thinned(labels[plane.index]), size, colours, 0.4), shown, plane)
            if row == 0:
                panel.set_title(layers[column - 1][0] if column else "image")
        axes[row, 0].set_ylabel(plane.words, fontsize=8)
        scale_bar(axes[row, 0], shown.extent_nm(plane.across))
    if shown.true_classes is not None:
        swatches = [Swatch(color=class_colour(k), label=name) for k, name in enumerate(shown.class_names, 1)]
        figure.legend(handles=swatches, loc="lower center", ncols=len(swatches), frameon=False)
    save_figure(figure, path)


def draw_image(panel: Any, image: Image, shown: Shown, plane: Plane) -> None:
    """A plane in grey; axes in nm, so that voxels have their true proportions."""
    low, high = GREY_RANGE
    extent = (0, shown.extent_nm(plane.across), shown.extent_nm(plane.down), 0)
    panel.imshow(thinned(image), cmap="gray", vmin=low, vmax=high, extent=extent)
    panel.set_xticks([])
    panel.set_yticks([])


def over(panel: Any, picture: Image, shown: Shown, plane: Plane) -> None:
    """RGBA over a panel of draw_image."""
    extent = (0, shown.extent_nm(plane.across), shown.extent_nm(plane.down), 0)
    panel.imshow(picture, extent=extent, interpolation="nearest")


def scale_bar(panel: Any, width_nm: float) -> None:
    """A bar of a round length, at most a quarter of the panel's width, its length in words over it."""
    length = max(n * 10.0**k for k in range(-3, 9) for n in (1, 2, 5) if n * 10.0**k <= width_nm / 4)
    words = f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
    places = panel.get_xaxis_transform()  # x in nm, y as a share of the panel
    inch = panel.figure.dpi / panel.get_window_extent().height
    left, middle = 0.03 * width_nm, 0.03 * width_nm + length / 2
    panel.text(middle, 0.16 * inch, words, color="white", fontsize=8, ha="center", transform=places, bbox=GROUND)
    panel.plot([left, left + length], [0.09 * inch] * 2, color="black", lw=5, transform=places, solid_capstyle="butt")
    panel.plot([left, left + length], [0.09 * inch] * 2, color="white", lw=3, transform=places, solid_capstyle="butt")


def error_kinds(truth: npt.NDArray[np.int64], found: Labels) -> npt.NDArray[np.uint8]:
    """1 where a found object joins true ones, 2 where a true object is cut, 3 both, 0 right or nothing true; (z, y, x).

    A voxel is wrongly joined if its true object is not the one that its found object shares most voxels with, and wrongly
    cut if its found object is not the one that its true object shares most with; what was not found is cut.
    """
    true_ids, t = numbered(truth)
    found_ids, f = numbered(found)
    merged = (main_partner(f, t, len(found_ids))[f] != t) & (f > 0)
    cut = main_partner(t, f, len(true_ids))[t] != f
    kinds: npt.NDArray[np.uint8] = np.where(t > 0, merged + 2 * cut, 0).astype(np.uint8)
    return kinds


def draw_errors(shown: Shown, path: Path) -> None:
    """The three middle planes as views from three sides that share their edges, with splits and merges."""
    assert shown.true_ids is not None and shown.found_ids is not None
    kinds, truth = error_kinds(shown.true_ids, shown.found_ids), numbered(shown.true_ids)[1]
    z, y, x = (shown.extent_nm(axis) for axis in range(3))
    side = VIEWS / (max(x, y) + z)  # inches per nm
    widths, heights = [x * side, max(z * side, LEAST_STRIP)], [y * side, max(z * side, LEAST_STRIP)]
    wide, high = sum(widths) + GAP, sum(heights) + GAP
    figure, axes = plt.subplots(2, 2, figsize=(wide, high), width_ratios=widths, height_ratios=heights)
    figure.subplots_adjust(0, 0, 1, 1, 2 * GAP / sum(widths), 2 * GAP / sum(heights))
    section, along_y, along_x = planes_of(shown.image.shape, shown.first_section)
    upright = Plane(along_x.words, along_x.index, 1, 0)  # z runs to the right, beside the section
    views = ((axes[0, 0], section, False), (axes[1, 0], along_y, False), (axes[0, 1], upright, True))
    for panel, plane, is_turned in views:
        image, kind, true = shown.image[plane.index], kinds[plane.index], truth[plane.index]
        if is_turned:
            image, kind, true = image.T, kind.T, true.T
        draw_image(panel, image, shown, plane)
        size = shown.voxel_size_nm[plane.down], shown.voxel_size_nm[plane.across]
        over(panel, ERROR_COLOURS[thinned(kind)], shown, plane)
        over(panel, outlined(thinned(true), size, np.zeros((int(true.max(initial=0)) + 1, 3)), 0.0), shown, plane)
        panel.text(0.02, 0.98, plane.words, color="white", fontsize=9, va="top", transform=panel.transAxes, bbox=GROUND)
    scale_bar(axes[0, 0], x)
    axes[1, 1].set_axis_off()
    shares = np.bincount(kinds[truth > 0], minlength=len(ERRORS)) / max(1, int((truth > 0).sum()))
    swatches = [
        Swatch(color=colour, label=f"{name} {share:.0%}") for (name, colour), share in zip(ERRORS, shares, strict=True)
    ]
    axes[1, 1].legend(handles=swatches, loc="center", frameon=False)
    save_figure(figure, path)
