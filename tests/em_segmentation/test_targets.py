"""Targets by hand, against their definitions voxel by voxel, and under flips, turns, other ids and hidden labels."""

import dataclasses
import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, ndimage
from torch import Tensor

from common.errors import UserError
from em_segmentation.config import TargetName, Targets
from em_segmentation.targets import Target, build_target, num_channels

NAMES: tuple[TargetName, ...] = get_args(TargetName)
OFFSETS = ((1, 0, 0), (0, -1, 0), (0, 0, 1), (-2, 3, 0), (0, 0, -9), (4, -4, 4), (5, 0, 0), (0, 7, 0), (0, 0, 90))
SIZE = (30.0, 8.0, 8.0)
Array = NDArray[np.float64]


def cells(seed: int, shape: tuple[int, int, int], objects: int) -> Tensor:
    """(z, y, x) ids of random touching objects with some background, ids large and out of order."""
    draw = np.random.default_rng(seed)
    seeds = draw.random((objects, 3)) * shape
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    nearest = np.linalg.norm((places[..., None, :] - seeds) * (2, 1, 1), axis=-1).argmin(-1)
    ids = np.concatenate([[0], 2**40 + draw.permutation(objects - 1)])
    return torch.from_numpy(ids[nearest])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Labels (2, 5, 7, 9) and where they are annotated: all but one corner and a few voxels."""
    labels = torch.stack([cells(2 * seed + sample, (5, 7, 9), 8) for sample in range(2)])
    annotated = torch.from_numpy(np.random.default_rng(seed).random(labels.shape) > 0.03)
    annotated[0, :3, :3, :4] = False
    return labels, annotated


def everywhere(labels: Tensor) -> Tensor:
    return torch.ones_like(labels, dtype=torch.bool)


def row(*ids: int) -> Tensor:
    """Labels (1, 1, 1, x)."""
    return torch.tensor(ids)[None, None, None]


def known(target: Target) -> list[list[float | None]]:
    """Of a row: each channel's values, None where not valid."""
    valid = target.valid.expand_as(target.values)[0, :, 0, 0].tolist()
    values = target.values[0, :, 0, 0].tolist()
    return [[v if ok else None for v, ok in zip(*channel, strict=True)] for channel in zip(values, valid, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_types_are_as_promised(name: TargetName) -> None:
    labels, annotated = batch(0)
    settings = dataclasses.replace(Targets(), affinity_offsets=OFFSETS)
    target = build_target(name, labels, annotated, settings, SIZE)
    assert target.values.shape == (2, num_channels(name, settings), 5, 7, 9)
    assert target.values.dtype == torch.float32
    assert target.valid.dtype == torch.bool
    assert target.valid.shape == (target.values.shape if name == "affinity" else (2, 1, 5, 7, 9))
    assert target.values.isfinite().all(), "invalid values are finite too"
    assert not target.valid[~annotated[:, None].expand_as(target.valid)].any()


def test_classes_share_one_map_of_numbers() -> None:
    settings = dataclasses.replace(Targets(), semantic_classes=4)
    target = build_target("semantic", row(0, 3, 1, 2), everywhere(row(0, 3, 1, 2)), settings, SIZE)
    assert known(target) == [[0, 3, 1, 2]]
    assert num_channels("semantic", settings) == 4


def test_one_class_is_any_object_or_the_ids_asked_for() -> None:
    labels = row(0, 7, 2**40, 3)
    assert known(build_target("semantic", labels, everywhere(labels), Targets(), SIZE)) == [[0, 1, 1, 1]]
    settings = dataclasses.replace(Targets(), semantic_only=(3, 7))
    assert known(build_target("semantic", labels, everywhere(labels), settings, SIZE)) == [[0, 1, 0, 1]]


@pytest.mark.parametrize("wrong", [3, -1, 2**40])
def test_a_class_beyond_those_of_the_config_is_the_datas_fault(wrong: int) -> None:
    settings = dataclasses.replace(Targets(), semantic_classes=3)
    labels = row(0, 2, wrong)
    with pytest.raises(UserError, match=f"^labels: found class {wrong}; expected 0 to 2 .*semantic_classes=3") as error:
        build_target("semantic", labels, everywhere(labels), settings, SIZE)
    assert error.value.exit_code == 1
    annotated = everywhere(labels)
    annotated[..., 2] = False
    assert known(build_target("semantic", labels, annotated, settings, SIZE)) == [[0, 2, None]]


def test_affinities_of_a_row_by_hand_in_both_conventions() -> None:
    labels = row(5, 5, 6, 0, 0, 5)
    settings = dataclasses.replace(Targets(), affinity_offsets=((0, 0, 1), (0, 0, -1), (0, 0, 5), (1, 0, 0)))
    at_source = known(build_target("affinity", labels, everywhere(labels), settings, SIZE))
    forward, backward = [1, 0, 0, 0, 0, None], [None, 1, 0, 0, 0, 0]
    nothing = [None] * 6
    assert at_source == [forward, backward, [1, *nothing[1:]], nothing]
    settings = dataclasses.replace(settings, affinity_stored_at="destination")
    at_destination = known(build_target("affinity", labels, everywhere(labels), settings, SIZE))
    assert at_destination == [backward, forward, [*nothing[1:], 1], nothing]


@pytest.mark.parametrize("stored_at", ["source", "destination"])
def test_affinities_are_those_of_the_definition_voxel_by_voxel(stored_at: str) -> None:
    labels, annotated = batch(1)
    settings = dataclasses.replace(Targets(), affinity_offsets=OFFSETS, affinity_stored_at=stored_at)
    target = build_target("affinity", labels, annotated, settings, SIZE)
    sign = 1 if stored_at == "source" else -1
    for place in np.ndindex(tuple(labels.shape)):
        b, *v = place
        for channel, offset in enumerate(OFFSETS):
            w = [at + sign * step for at, step in zip(v, offset, strict=True)]
            inside = all(0 <= at < n for at, n in zip(w, labels.shape[1:], strict=True))
            partner = (b, *w) if inside else place
            valid = inside and bool(annotated[place] & annotated[partner])
            assert target.valid[b, channel, *v] == valid
            if valid:
                same = labels[place] == labels[partner] and labels[place] > 0
                assert target.values[b, channel, *v] == float(same)


def test_boundaries_of_a_row_by_hand() -> None:
    labels = row(4, 4, 4, 9, 9, 9, 9, 0, 0, 0)
    for thickness, expected in ((1, " 01100110 "), (2, "  111111  "), (3, "   1111   ")):  # unknown: beyond the patch
        settings = dataclasses.replace(Targets(), boundary_thickness=thickness)
        assert known(build_target("boundary", labels, everywhere(labels), settings, SIZE)) == [
            [None if c == " " else float(c) for c in expected]
        ]


def test_thick_boundaries_are_within_so_many_steps_of_a_face() -> None:
    labels = torch.zeros(1, 7, 7, 7, dtype=torch.int64)
    labels[:, 3, 3, 3] = 1
    z, y, x = np.abs(np.indices((7, 7, 7)) - 3)
    for thickness in (1, 2, 3):
        settings = dataclasses.replace(Targets(), boundary_thickness=thickness)
        target = build_target("boundary", labels, everywhere(labels), settings, SIZE)
        assert np.array_equal(target.values[0, 0] == 1, z + y + x <= thickness)
        settings = dataclasses.replace(settings, boundary_in_plane=True)
        target = build_target("boundary", labels, everywhere(labels), settings, SIZE)
        assert np.array_equal(target.values[0, 0] == 1, (z == 0) & (y + x <= thickness))


@pytest.mark.parametrize("seed", range(5))
def test_thin_boundaries_are_scikit_images(seed: int) -> None:
    segmentation = pytest.importorskip("skimage.segmentation")
    labels = cells(seed, (6, 12, 13), 12)
    theirs = segmentation.find_boundaries(labels.numpy(), connectivity=1, mode="thick")
    ours = build_target("boundary", labels[None], everywhere(labels[None]), Targets(), SIZE)
    assert np.array_equal(ours.values[0, 0] == 1, theirs)


def distances(labels: NDArray[np.int64], size: tuple[float, float, float]) -> Array:
    """Signed distances object by object; infinite where there is but one id."""
    signed = np.full(labels.shape, np.inf if labels.flat[0] > 0 else -np.inf)
    for number in np.unique(labels) if labels.min() < labels.max() else []:
        inside = labels == number
        signed[inside] = (1 if number > 0 else -1) * ndimage.distance_transform_edt(inside, size)[inside]
    return signed


@pytest.mark.parametrize("scale", [3.0, 40.0, 1000.0])
@pytest.mark.parametrize("size", [(30.0, 8.0, 8.0), (1.0, 1.0, 1.0), (4.6, 50.0, 11.3)])
def test_distances_are_scipys_of_each_object(size: tuple[float, float, float], scale: float) -> None:
    settings = dataclasses.replace(Targets(), distance_scale_nm=scale)
    for seed, (shape, objects) in enumerate([((6, 17, 23), 12), ((9, 20, 8), 2), ((1, 30, 31), 9), ((4, 4, 4), 1)]):
        labels = cells(seed, shape, objects)
        target = build_target("distance", labels[None], everywhere(labels[None]), settings, size)
        expected = torch.from_numpy(np.tanh(distances(labels.numpy(), size) / scale))
        torch.testing.assert_close(target.values[0, 0].double(), expected, atol=2e-7, rtol=1e-6)
        places = [np.minimum(place, n - 1 - place) + 1 for place, n in zip(np.indices(shape), shape, strict=True)]
        faces = [place * step for place, step, n in zip(places, size, shape, strict=True) if n > 1]
        outside = np.min(faces, 0)  # the border may be there, unless one as near is seen
        certain = np.abs(distances(labels.numpy(), size)) <= outside + 1e-3
        assert np.array_equal(target.valid[0, 0], certain | (outside >= 10 * scale))


def test_a_patch_within_one_object_does_not_know_how_far_the_border_is() -> None:
    for label, value in ((3, 1.0), (0, -1.0)):
        labels = torch.full((2, 4, 5, 6), label)
        annotated = everywhere(labels)
        annotated[1, 0, 0, 0] = False
        target = build_target("distance", labels, annotated, Targets(), SIZE)
        assert (target.values[0] == value).all()
        assert not target.valid.any()
        settings = dataclasses.replace(Targets(), distance_scale_nm=0.1)  # so that a voxel is infinitely far
        target = build_target("distance", labels, annotated, settings, SIZE)
        assert target.valid[0].all() and not target.valid[1, 0, 0, 0, 0] and target.valid[1, 0, 2:].all()


def test_boundaries_are_known_where_no_face_can_hide() -> None:
    labels = row(4, 4, 4, 4, 4, 4, 9, 9, 9)
    annotated = everywhere(labels)
    annotated[..., 0] = False
    for thickness, expected in (
        (1, [None, None, 0, 0, 0, 1, 1, 0, None]),
        (2, [None, None, None, 0, 1, 1, 1, None, None]),
    ):
        settings = dataclasses.replace(Targets(), boundary_thickness=thickness)
        assert known(build_target("boundary", labels, annotated, settings, SIZE)) == [expected]


def test_distances_are_known_up_to_where_nobody_looked() -> None:
    labels = row(1, 1, 1, 1, 1, 1, 1, 2)
    annotated = everywhere(labels)
    annotated[..., 0] = False
    settings = dataclasses.replace(Targets(), distance_scale_nm=8.0)
    (values,) = known(build_target("distance", labels, annotated, settings, SIZE))
    assert values == [None, None, None, None, *(pytest.approx(math.tanh(d)) for d in (3, 2, 1, 1))]


def test_centres_by_hand_in_hundreds_of_nm() -> None:
    labels = torch.zeros(2, 3, 4, 5, dtype=torch.int64)
    labels[0, 0:3, 1, 2] = 7  # a column with its middle at (1, 1, 2)
    labels[0, 1, 1, 1] = 7
    labels[1, 0, 0, 0] = labels[1, 0, 3, 4] = 7  # the same id in another sample is another object
    target = build_target("centre", labels, everywhere(labels), Targets(), (30.0, 8.0, 10.0))
    assert torch.equal(target.valid[:, 0], labels > 0)
    torch.testing.assert_close(target.values[0, :, 0, 1, 2], torch.tensor([0.3, 0.0, -0.025]))
    torch.testing.assert_close(target.values[0, :, 1, 1, 1], torch.tensor([0.0, 0.0, 0.075]))
    torch.testing.assert_close(target.values[1, :, 0, 0, 0], torch.tensor([0.0, 0.12, 0.2]))
    torch.testing.assert_close(target.values[1, :, 0, 3, 4], torch.tensor([0.0, -0.12, -0.2]))


@pytest.mark.parametrize("seed", range(3))
def test_vectors_to_the_centre_sum_to_nothing_in_every_object(seed: int) -> None:
    labels, annotated = batch(seed)
    target = build_target("centre", labels, annotated, Targets(), SIZE)
    for values, valid, ids in zip(target.values, target.valid, labels, strict=True):
        for number in ids[valid[0]].unique():
            assert values[:, valid[0] & (ids == number)].double().sum(1).abs().max() < 1e-4


def described(inside: Array, place: tuple[int, ...], size: tuple[float, float, float], sigma: float) -> Array:
    """The ten descriptors of one voxel by a plain weighted sum over the object's voxels."""
    offset = (np.argwhere(inside) - place) * size / sigma
    lattice = [np.exp(-0.5 * (np.arange(-400, 401) * step / sigma) ** 2).sum() for step in size]
    weight = np.exp(-0.5 * (offset**2).sum(1)) / np.prod(lattice)
    mass = weight.sum()
    mean = weight @ offset / mass
    covariance = (weight[:, None] * (offset - mean)).T @ (offset - mean) / mass
    variance = covariance.diagonal().clip(1e-3)
    correlation = covariance / np.sqrt(np.outer(variance, variance))
    pairs = [correlation[0, 1], correlation[0, 2], correlation[1, 2]]
    return np.clip([*(0.5 + 0.5 * mean), *variance, *(0.5 + 0.5 * np.array(pairs)), mass], 0, 1)


def test_every_object_of_a_patch_without_background_is_described() -> None:
    labels = cells(0, (5, 7, 9), 6)[None] + 1
    target = build_target("lsd", labels, everywhere(labels), Targets(), SIZE)
    assert target.valid.all()
    assert (target.values[:, 9] > 0).all()


@pytest.mark.parametrize("sigma", [12.0, 80.0])
def test_local_shapes_are_sums_over_the_voxels_of_the_object(sigma: float) -> None:
    labels, annotated = batch(3)
    settings = dataclasses.replace(Targets(), lsd_sigma_nm=sigma)
    target = build_target("lsd", labels, annotated, settings, SIZE)
    assert torch.equal(target.valid[:, 0], annotated & (labels > 0))
    assert (target.values * ~target.valid == 0).all()
    for place in torch.argwhere(target.valid[:, 0])[::5].tolist():
        b, *v = place
        inside = ((labels[b] == labels[tuple(place)]) & annotated[b]).numpy()
        torch.testing.assert_close(
            target.values[b, :, *v].double(),
            torch.from_numpy(described(inside, tuple(v), SIZE, sigma)),
            atol=2e-4,  # float32 variances far out in a small Gaussian
            rtol=0,
        )


def test_local_shape_in_the_middle_of_a_ball_is_that_of_the_integral() -> None:
    sigma, radius = 100.0, 150.0
    z, y, x = (np.indices((31, 41, 41)) - np.array([15, 20, 20])[:, None, None, None]) * np.array([12, 8, 8])[
        :, None, None, None
    ]
    labels = torch.from_numpy((z**2 + y**2 + x**2 <= radius**2).astype(np.int64))[None]
    settings = dataclasses.replace(Targets(), lsd_sigma_nm=sigma)
    target = build_target("lsd", labels, everywhere(labels), settings, (12.0, 8.0, 8.0))
    density = (2 * math.pi) ** -1.5
    mass = integrate.quad(lambda r: 4 * math.pi * r**2 * density * math.exp(-(r**2) / 2), 0, radius / sigma)[0]
    second = integrate.quad(lambda r: 4 * math.pi * r**4 * density * math.exp(-(r**2) / 2), 0, radius / sigma)[0]
    variance = second / mass / 3
    expected = torch.tensor([0.5] * 3 + [variance] * 3 + [0.5] * 3 + [mass])
    torch.testing.assert_close(target.values[0, :, 15, 20, 20], expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("place", [(8, 12, 16), (3, 5, 4), (14, 5, 28)])
def test_local_shape_in_a_box_is_the_product_of_integrals_along_its_axes(place: tuple[int, int, int]) -> None:
    sigma, size = 60.0, (10.0, 6.0, 5.0)
    edges = ((2, 15), (3, 22), (1, 31))  # first and one past the last voxel
    labels = torch.zeros(1, 17, 25, 33, dtype=torch.int64)
    labels[0][tuple(slice(*edge) for edge in edges)] = 4
    settings = dataclasses.replace(Targets(), lsd_sigma_nm=sigma)
    target = build_target("lsd", labels, everywhere(labels), settings, size)
    means, variances, mass = [], [], 1.0
    for (first, last), at, step in zip(edges, place, size, strict=True):
        low, high = ((end - 0.5 - at) * step / sigma for end in (first, last))
        zeroth, one, two = (
            integrate.quad(lambda t, k=k: t**k * math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi), low, high)[0]
            for k in range(3)
        )
        means.append(0.5 + 0.5 * one / zeroth)
        variances.append(two / zeroth - (one / zeroth) ** 2)
        mass *= zeroth
    expected = torch.tensor([*means, *variances, 0.5, 0.5, 0.5, mass])
    torch.testing.assert_close(target.values[0, :, *place], expected, atol=0.003, rtol=0)


def moved(values: Tensor, axis_map: Array, name: TargetName) -> Tensor:
    """A target's channels after the axes were moved by a signed permutation: vectors and matrices go along."""
    matrix = torch.from_numpy(axis_map).float()
    if name == "centre":
        return torch.einsum("ij,bjzyx->bizyx", matrix, values)
    if name != "lsd":
        return values
    offset = torch.einsum("ij,bjzyx->bizyx", matrix, 2 * values[:, :3] - 1)
    z, y, x = values[:, 3:6].unbind(1)
    zy, zx, yx = (2 * values[:, 6:9] - 1).unbind(1)
    shape = torch.stack([z, zy, zx, zy, y, yx, zx, yx, x], 1).unflatten(1, (3, 3))
    shape = torch.einsum("ij,bjkzyx,lk->bilzyx", matrix, shape, matrix)
    pairs = [0.5 + 0.5 * shape[:, a, b] for a, b in ((0, 1), (0, 2), (1, 2))]
    inside = (values[:, 9:] > 0).float()
    parts = [0.5 + 0.5 * offset, shape.diagonal(dim1=1, dim2=2).movedim(-1, 1), torch.stack(pairs, 1), values[:, 9:]]
    return torch.cat(parts, 1) * inside


@pytest.mark.parametrize(("name", "thickness"), [*((name, 1) for name in NAMES), ("boundary", 2)])
def test_targets_commute_with_flips_and_quarter_turns(name: TargetName, thickness: int) -> None:
    labels, annotated = batch(4)
    settings = dataclasses.replace(Targets(), affinity_offsets=OFFSETS, boundary_thickness=thickness)
    before = build_target(name, labels, annotated, settings, SIZE)
    for flips, turn in itertools.product(itertools.product((False, True), repeat=3), (False, True)):
        axes = [axis for axis, flip in enumerate(flips) if flip]
        signs = np.diag(np.where(flips, -1, 1))
        axis_map = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) @ signs if turn else signs

        def change(values: Tensor, axes: list[int], turn: bool) -> Tensor:
            values = values.flip([values.ndim - 3 + axis for axis in axes])
            return values.rot90(1, (-2, -1)) if turn else values

        offsets = tuple(tuple(int(step) for step in axis_map @ offset) for offset in OFFSETS)
        after = build_target(
            name,
            change(labels, axes, turn),
            change(annotated, axes, turn),
            dataclasses.replace(settings, affinity_offsets=offsets),
            SIZE,
        )
        assert torch.equal(after.valid, change(before.valid, axes, turn))
        expected = moved(change(before.values, axes, turn), axis_map.astype(float), name)
        valid = after.valid.expand_as(expected)
        torch.testing.assert_close(after.values[valid], expected[valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_annotated_has_no_influence(name: TargetName) -> None:
    for seed in range(6):
        labels, annotated = batch(seed)
        settings = dataclasses.replace(Targets(), affinity_offsets=OFFSETS, boundary_thickness=2)
        before = build_target(name, labels, annotated, settings, SIZE)
        junk = torch.from_numpy(np.random.default_rng(seed).integers(-1, 4, labels.shape)) * 2**40
        others = torch.where(annotated, labels, junk)
        after = build_target(name, others, annotated, settings, SIZE)
        assert torch.equal(before.valid, after.valid)
        assert before.valid.any()
        valid = before.valid.expand_as(before.values)
        assert torch.equal(before.values[valid], after.values[valid])


@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_for_the_same_objects_change_nothing(name: TargetName) -> None:
    labels, annotated = batch(5)
    ids, numbers = torch.unique(labels, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(ids) - 1) + 1
    other = torch.from_numpy(np.concatenate([[0], order]))[numbers]
    for one, two in zip(
        dataclasses.astuple(build_target(name, labels, annotated, Targets(), SIZE)),
        dataclasses.astuple(build_target(name, other, annotated, Targets(), SIZE)),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_alone_in_its_batch_and_autocast_is_not_heard(name: TargetName) -> None:
    labels, annotated = batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        together = build_target(name, labels, annotated, Targets(), SIZE)
    for sample in range(2):
        one = slice(sample, sample + 1)
        alone = build_target(name, labels[one], annotated[one], Targets(), SIZE)
        assert torch.equal(together.values[one], alone.values)
        assert torch.equal(together.valid[one], alone.valid)
