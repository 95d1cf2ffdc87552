"""What a network learns from labels: values to predict and where they are known, computed on the labels' device.

Labels are ids (B, z, y, x), 0 = background; annotated is False where nobody looked. No target takes an id from a voxel
that is not annotated, and none knows what lies outside the patch.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from scipy import ndimage
from torch import Tensor

from common.errors import data_error
from em_segmentation.regions import Triple

if TYPE_CHECKING:
    from em_segmentation.config import TargetName, Targets

Size = tuple[float, float, float]  # nm, z y x
CENTRE_UNIT_NM = 100.0  # of the centre target's vectors: keeps them near 1
SATURATED = 10.0  # tanh of it is 1 in float32: farther distances need not be known
LEAST_VARIANCE = 1e-3  # sigma^2; below it an object has no extent along the axis, and no correlation


@dataclasses.dataclass(frozen=True)
class Target:
    """One target of a batch; values where valid is False mean nothing."""

    values: Tensor  # (B, C, z, y, x) float32; of classes (B, 1, z, y, x) with the class's number
    valid: Tensor  # (B, C or 1, z, y, x) bool


def num_channels(name: "TargetName", settings: "Targets") -> int:
    """How many channels a network needs to predict a target."""
    match name:
        case "semantic":
            return settings.semantic_classes
        case "affinity":
            return len(settings.affinity_offsets)
        case "boundary" | "distance":
            return 1
        case "centre":
            return 3
        case "lsd":
            return 10


@torch.no_grad()
def build_target(
    name: "TargetName", labels: Tensor, annotated: Tensor, settings: "Targets", voxel_size_nm: Size
) -> Target:
    """The target `name` of labels (B, z, y, x) int64 and annotated (B, z, y, x) bool.

    semantic: 0 / 1, or the number of the class. Raises a data error for classes that targets.semantic_classes excludes.
    affinity: 1 where both voxels have the same id > 0; known where both lie in the patch and are annotated. With
    affinity_erosion, voxels so near to a face are in no object: boundaries become thick enough to be seen.
    boundary: 1 within boundary_thickness steps across a face between two ids (0 is one); the patch's faces are none.
    distance: tanh(d / scale), d in nm to the nearest voxel of another id, negative in the background.
    centre: (3) vector to the object's centre of mass within the patch, in 100 nm, known in objects.
    lsd: (10) local shape, see _shape; known in objects.
    """
    assert labels.ndim == 4 and labels.shape == annotated.shape, f"{tuple(labels.shape)}, {tuple(annotated.shape)}"
    match name:
        case "semantic":
            return _semantic(labels, annotated, settings)
        case "boundary":
            return _boundary(labels, annotated, settings)
        case "affinity":
            return _affinity(labels, annotated, settings)
        case "distance":
            return _distance(labels, annotated, settings.distance_scale_nm, voxel_size_nm)
        case "centre":
            return _centre(labels, annotated, voxel_size_nm)
        case "lsd":
            return _local_shape(labels, annotated, settings.lsd_sigma_nm, voxel_size_nm)


def _semantic(labels: Tensor, annotated: Tensor, settings: "Targets") -> Target:
    if settings.semantic_classes == 1:
        only = settings.semantic_only
        foreground = torch.isin(labels, torch.tensor(only, device=labels.device)) if only else labels > 0
        return Target(foreground[:, None].float(), annotated[:, None])
    classes = torch.where(annotated, labels, 0)
    low, high = (int(limit) for limit in classes.aminmax())
    if low < 0 or high >= settings.semantic_classes:
        wrong = low if low < 0 else high
        raise data_error(
            f"labels: found class {wrong}; expected 0 to {settings.semantic_classes - 1} "
            f"(targets.semantic_classes={settings.semantic_classes}); correct the constant or mask these voxels"
        )
    return Target(classes[:, None].float(), annotated[:, None])


def _affinity(labels: Tensor, annotated: Tensor, settings: "Targets") -> Target:
    if settings.affinity_erosion:
        axes = (2, 3) if settings.boundary_in_plane else (1, 2, 3)
        labels = torch.where(_near_faces(labels, axes, settings.affinity_erosion), 0, labels)
        annotated = ~_near_unknown(annotated, axes, settings.affinity_erosion)  # there may be a face or not
    shape = (labels.shape[0], len(settings.affinity_offsets), *labels.shape[1:])
    values = torch.zeros(shape, device=labels.device)
    valid = torch.zeros(shape, dtype=torch.bool, device=labels.device)
    is_object = labels > 0
    towards = 1 if settings.affinity_stored_at == "source" else -1  # the partner is at v + o, or at v - o
    for channel, offset in enumerate(settings.affinity_offsets):
        pairs = [_pairs(n, towards * step) for n, step in zip(labels.shape[1:], offset, strict=True)]
        here = (slice(None), *(first for first, _ in pairs))
        there = (slice(None), *(second for _, second in pairs))
        values[:, channel][here] = (labels[here] == labels[there]).logical_and_(is_object[here])
        valid[:, channel][here] = annotated[here] & annotated[there]
    return Target(values, valid)


def _pairs(n: int, step: int) -> tuple[slice, slice]:
    """Of an axis of n voxels: those whose partner `step` further lies on it too, and their partners."""
    count = max(0, n - abs(step))
    first = max(0, -step) if count else 0
    second = max(0, step) if count else 0
    return slice(first, first + count), slice(second, second + count)


def _boundary(labels: Tensor, annotated: Tensor, settings: "Targets") -> Target:
    axes = (2, 3) if settings.boundary_in_plane else (1, 2, 3)
    values = _near_faces(labels, axes, settings.boundary_thickness)
    unknown = _near_unknown(annotated, axes, settings.boundary_thickness)  # may lie at a face or not
    return Target(values[:, None].float(), ~unknown[:, None])


def _near_faces(labels: Tensor, axes: tuple[int, ...], thickness: int) -> Tensor:
    """Voxels (B, z, y, x) within so many steps, on either side, of a face between two ids."""
    touching = torch.zeros_like(labels, dtype=torch.bool)
    for axis in axes:
        last = labels.shape[axis] - 1
        face = labels.narrow(axis, 0, last) != labels.narrow(axis, 1, last)
        touching.narrow(axis, 0, last).logical_or_(face)
        touching.narrow(axis, 1, last).logical_or_(face)
    return _dilated(touching, axes, thickness - 1)


def _near_unknown(annotated: Tensor, axes: tuple[int, ...], thickness: int) -> Tensor:
    """Voxels (B, z, y, x) within so many steps along the axes of what is not annotated, or of the patch's faces.

    An axis of one voxel has no faces: a section is a picture of its own.
    """
    near = _dilated(~annotated, axes, thickness)
    for axis in axes:
        n = near.shape[axis]
        if n > 1:
            near.narrow(axis, 0, min(thickness, n)).fill_(True)
            near.narrow(axis, max(0, n - thickness), min(thickness, n)).fill_(True)
    return near


def _dilated(marked: Tensor, axes: tuple[int, ...], times: int) -> Tensor:
    """Marked (B, z, y, x) bool and all that is within so many steps along the axes."""
    for _ in range(times):
        grown = marked.clone()
        for axis in axes:
            last = marked.shape[axis] - 1
            grown.narrow(axis, 0, last).logical_or_(marked.narrow(axis, 1, last))
            grown.narrow(axis, 1, last).logical_or_(marked.narrow(axis, 0, last))
        marked = grown
    return marked


def _distance(labels: Tensor, annotated: Tensor, scale_nm: float, voxel_size_nm: Size) -> Target:
    """tanh(signed distance / scale); known where neither the patch's face nor what is not annotated is as near."""
    limit = SATURATED * scale_nm
    seen = torch.where(annotated, labels.clamp(min=0), 0)
    distance = torch.stack([_distance_to_other_ids(ids, voxel_size_nm, limit) for ids in seen])
    values = torch.where(labels > 0, distance, -distance).div(scale_nm).tanh()
    face = _distance_to_face(labels, voxel_size_nm)  # a border as near as the patch's face is the nearest there can be
    valid = annotated & ((distance <= face * (1 + 1e-6)) | (face >= limit))  # but for rounding
    if not bool(annotated.all()):  # what is masked was seen as background: a border as near may be no border
        masked = torch.stack([_distance_to_other_ids(known, voxel_size_nm, limit) for known in annotated])
        valid &= (distance < masked) | (masked >= limit)
    return Target(values[:, None], valid[:, None])


def _distance_to_face(labels: Tensor, voxel_size_nm: Size) -> Tensor:
    """Distance of each voxel to the nearest one outside the patch, along axes of several voxels; nm, (z, y, x)."""
    nearest = torch.full(labels.shape[1:], torch.inf, device=labels.device)
    for axis, (n, spacing) in enumerate(zip(labels.shape[1:], voxel_size_nm, strict=True)):
        if n == 1:
            continue
        place = torch.arange(n, device=labels.device, dtype=torch.float32)
        steps = torch.minimum(place, n - 1 - place) + 1
        nearest = torch.minimum(nearest, (steps * spacing).view([-1 if a == axis else 1 for a in range(3)]))
    return nearest


def _distance_to_other_ids(ids: Tensor, voxel_size_nm: Size, limit: float) -> Tensor:
    """Exact Euclidean distance of each voxel (z, y, x) to the nearest one of another id, cut at limit; nm, float32.

    Axis by axis as in Felzenszwalb and Huttenlocher 2012, "Distance Transforms of Sampled Functions", for all ids at
    once: a voxel beyond the run of equal ids is never nearer than the run's end, so its own id need not be asked for.
    """
    squared = torch.full(ids.shape, limit**2, device=ids.device)
    for axis in (2, 1, 0):
        n, spacing = ids.shape[axis], voxel_size_nm[axis]
        best = torch.minimum(squared, _distance_along(ids, axis, spacing, limit).square_())
        for shift in range(1, n if axis < 2 else 1):  # along x nothing but x is known yet
            step = (shift * spacing) ** 2
            if step >= float(best.max()):
                break
            _lower(best, squared, axis, shift, step)
        squared = best
    distance: Tensor = squared.sqrt_()
    return distance


def _distance_along(ids: Tensor, axis: int, spacing: float, limit: float) -> Tensor:
    """Distance to the nearest voxel of another id on the line along an axis, cut at limit; (z, y, x)."""
    last = ids.shape[axis] - 1
    change = ids.narrow(axis, 0, last) != ids.narrow(axis, 1, last)
    distance = torch.full(ids.shape, limit, device=ids.device)
    distance.narrow(axis, 0, last).masked_fill_(change, min(spacing, limit))
    distance.narrow(axis, 1, last).masked_fill_(change, min(spacing, limit))
    shift = 1
    while shift <= last and shift * spacing < limit:  # shifts by 1, 2, 4 ... add up to all shifts
        _lower(distance, distance.clone(), axis, shift, shift * spacing)
        shift *= 2
    return distance


def _lower(best: Tensor, costs: Tensor, axis: int, shift: int, step: float) -> None:
    """Lower best[i] to costs[i + shift] + step and costs[i - shift] + step along an axis, in place."""
    count = best.shape[axis] - shift
    dearer = costs + step
    for first, second in ((0, shift), (shift, 0)):
        part = best.narrow(axis, first, count)
        torch.minimum(part, dearer.narrow(axis, second, count), out=part)


def _object_numbers(labels: Tensor, annotated: Tensor) -> Tensor:
    """One sample's annotated objects, numbered from 1 in the order of their ids; 0 elsewhere; (z, y, x) int64."""
    ids, numbers = torch.unique(torch.where(annotated, labels.clamp(min=0), 0), return_inverse=True)
    shifted: Tensor = numbers + int(ids[0] > 0)
    return shifted


def _centre(labels: Tensor, annotated: Tensor, voxel_size_nm: Size) -> Target:
    places = torch.stack(
        torch.meshgrid(*(torch.arange(n, device=labels.device) for n in labels.shape[1:]), indexing="ij")
    )  # (3, z, y, x)
    unit = torch.tensor(voxel_size_nm, device=labels.device, dtype=torch.float64) / CENTRE_UNIT_NM
    vectors = []
    for ids, known in zip(labels, annotated, strict=True):
        numbers = _object_numbers(ids, known).flatten()
        counts = torch.bincount(numbers)
        sums = torch.zeros(3, len(counts), dtype=torch.int64, device=ids.device)  # integers: exact in any order
        sums.index_add_(1, numbers, places.flatten(1))
        centres = (sums / counts.clamp(min=1).double() * unit[:, None]).float()
        here = places * unit[:, None, None, None].float()
        vectors.append(centres[:, numbers].view_as(here) - here)
    return Target(torch.stack(vectors), (annotated & (labels > 0))[:, None])


def _local_shape(labels: Tensor, annotated: Tensor, sigma_nm: float, voxel_size_nm: Size) -> Target:
    """Local shape descriptors, 0 outside objects; each object is described within its own bounding box."""
    values = torch.zeros(labels.shape[0], 10, *labels.shape[1:], device=labels.device)
    kernels = [
        _moment_kernels(n, spacing / sigma_nm, labels.device)
        for n, spacing in zip(labels.shape[1:], voxel_size_nm, strict=True)
    ]
    with torch.autocast(labels.device.type, enabled=False):
        for sample, (ids, known) in enumerate(zip(labels, annotated, strict=True)):
            numbers = _object_numbers(ids, known)
            for number, box in enumerate(ndimage.find_objects(numbers.cpu().numpy()), start=1):
                inside = numbers[box] == number
                part = values[sample][:, *box]
                part.copy_(torch.where(inside, _shape(inside.float(), kernels), part))
    return Target(values, (annotated & (labels > 0))[:, None])


def _moment_kernels(n: int, spacing: float, device: torch.device) -> Tensor:
    """(3, n, n): from voxel j to i, the Gaussian of unit sigma, sum 1 over the lattice, times (j - i)^0, ^1 and ^2."""
    reach = int(10 / spacing) + 1
    mass = torch.arange(-reach, reach + 1, dtype=torch.float64).mul(spacing).square().mul(-0.5).exp().sum()
    places = torch.arange(n, dtype=torch.float64) * spacing
    offset = places[None, :] - places[:, None]
    weight = offset.square().mul(-0.5).exp() / mass
    return torch.stack([weight, weight * offset, weight * offset**2]).float().to(device)


def _shape(inside: Tensor, kernels: list[Tensor]) -> Tensor:
    """Local shape descriptors of an object (z, y, x) of 0 and 1, in a Gaussian of sigma around each voxel: (10, z, y, x).

    Source: Sheridan et al. 2023, "Local shape descriptors for neuron segmentation": mean offset z, y, x in sigma;
    variances in sigma^2; correlations zy, zx, yx; mass. Offsets and correlations are brought from [-1, 1] to [0, 1].
    """
    along = [kernel[:, :n, :n] for kernel, n in zip(kernels, inside.shape, strict=True)]
    moments: dict[Triple, Tensor] = {}
    for p, of_z in enumerate(torch.tensordot(along[0], inside, dims=1)):  # (3, z, y, x)
        for q, of_y in enumerate(along[1][: 3 - p, None] @ of_z):
            for r, of_x in enumerate(of_y @ along[2][: 3 - p - q, None].mT):
                moments[p, q, r] = of_x
    mass = moments[0, 0, 0].clamp(min=1e-12)
    z, y, x = (moments[one] / mass for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    squares = ((2, 0, 0), z), ((0, 2, 0), y), ((0, 0, 2), x)
    variances = [(moments[two] / mass - mean**2).clamp(min=LEAST_VARIANCE) for two, mean in squares]
    zz, yy, xx = variances
    products = ((1, 1, 0), z * y, zz * yy), ((1, 0, 1), z * x, zz * xx), ((0, 1, 1), y * x, yy * xx)
    correlations = [(moments[two] / mass - means) / scale.sqrt() for two, means, scale in products]
    offsets = [0.5 + 0.5 * mean for mean in (z, y, x)]
    descriptors = [*offsets, *variances, *(0.5 + 0.5 * one for one in correlations), mass]
    return torch.stack(descriptors).clamp_(0, 1)
