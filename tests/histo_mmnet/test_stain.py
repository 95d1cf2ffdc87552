"""Stain: known mixtures are found, nothing gives NaN, colours come closer and shapes stay."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from torch import Tensor

from histo_mmnet.colours import read_picture
from histo_mmnet.scan import find_breast, scan
from histo_mmnet.stain import (
    OPPONENT,
    REFERENCE,
    REINHARD_MEAN,
    TISSUE,
    colour_of,
    concentrations,
    estimate,
    macenko,
    opponent_axes,
    optical_density,
    quantiles,
    random_stain,
    reference_stain,
    reinhard,
    sampled_pixels,
    white_of,
)

NORMALISERS = {"macenko": macenko, "reinhard": reinhard}
DIRECTIONS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))


def mixture(directions: tuple[tuple[float, float, float], ...], white: float, seed: int) -> Tensor:
    """A picture (1, 3, 96, 128) of two dyes in known amounts: nuclei, cytoplasm, glass."""
    random = torch.Generator().manual_seed(seed)
    amounts = torch.zeros(2, 96, 128)
    amounts[1, :, :96] = 0.5 + 0.3 * torch.rand(96, 96, generator=random)
    kind = torch.rand(96, 96, generator=random)
    amounts[0, :, :96] = torch.where(kind < 0.35, 1.0 + 0.3 * torch.rand(96, 96, generator=random), 0.02)
    amounts[1, :, :96] *= torch.where(kind < 0.35, 0.03, 1.0)
    unit = torch.tensor(directions) / torch.tensor(directions).norm(dim=1, keepdim=True)
    return (white * torch.exp(-torch.einsum("syx,sc->cyx", amounts, unit)))[None]


def degrees(one: Tensor, other: Tensor) -> float:
    return float(torch.rad2deg(torch.acos(((one * other).sum() / one.norm() / other.norm()).clamp(max=1))))


@pytest.mark.parametrize("white", [0.75, 0.9, 1.0])
def test_known_dyes_and_white_are_found(white: float) -> None:
    stain = estimate(mixture(DIRECTIONS, white, 0))
    assert bool(stain.is_found) and stain.white == pytest.approx(torch.full((1, 3), white), abs=0.01)
    for found, true in zip(stain.directions[0], torch.tensor(DIRECTIONS), strict=True):
        assert degrees(found, true) < 3


def test_normalised_pictures_have_the_references_dyes() -> None:
    stain = estimate(macenko(mixture(DIRECTIONS, 0.85, 0)))
    for found, true in zip(stain.directions[0], torch.tensor(REFERENCE), strict=True):
        assert degrees(found, true) < 3
    assert stain.white.min() > 0.99


def test_one_tissue_under_two_stains_becomes_one_picture() -> None:
    other = ((0.55, 0.75, 0.36), (0.20, 0.93, 0.30))
    one, two = mixture(DIRECTIONS, 0.95, 0), mixture(other, 0.8, 0)
    assert (macenko(one) - macenko(two)).abs().mean() < 0.25 * (one - two).abs().mean()


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("level", [1.0, 0.0, 0.4, 0.97])
def test_pictures_of_one_colour_come_back(name: str, level: float) -> None:
    plain = torch.full((2, 3, 40, 50), level)
    assert torch.equal(NORMALISERS[name](plain), plain)


@pytest.mark.parametrize("name", NORMALISERS)
def test_an_almost_white_picture_stays_finite(name: str) -> None:
    torch.manual_seed(0)
    picture = (0.95 + 0.02 * torch.randn(1, 3, 64, 64)).clamp(0, 1)
    picture[0, :, 30:32, 30:32] = 0.3
    found = NORMALISERS[name](picture)
    assert torch.isfinite(found).all() and (found[0, :, :20] - picture[0, :, :20]).abs().max() < 0.1


@pytest.mark.parametrize("name", NORMALISERS)
def test_each_image_of_a_batch_is_by_itself(name: str) -> None:
    batch = torch.cat([mixture(DIRECTIONS, 0.8, 0), torch.ones(1, 3, 96, 128), mixture(DIRECTIONS, 1.0, 1)])
    together = NORMALISERS[name](batch)
    alone = torch.cat([NORMALISERS[name](image[None]) for image in batch])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*NORMALISERS, "random"])
@pytest.mark.parametrize("kind", ["tissue", "white", "black"])
def test_gradients_are_finite_and_not_all_zero(name: str, kind: str) -> None:
    picture = {
        "tissue": mixture(DIRECTIONS, 0.9, 0),
        "white": torch.ones(1, 3, 40, 50),
        "black": torch.zeros(1, 3, 40, 50),
    }[kind]
    picture = picture.clone().requires_grad_()
    if name == "random":
        found = random_stain(picture, estimate(picture.detach()), torch.full((1, 2), 1.2), torch.full((1, 2), 0.05))
    else:
        found = NORMALISERS[name](picture)
    found.sum().backward()
    assert picture.grad is not None and torch.isfinite(picture.grad).all() and picture.grad.abs().sum() > 0


def test_random_stain_of_no_change_changes_nothing() -> None:
    picture = mixture(DIRECTIONS, 0.9, 0)
    same = random_stain(picture, estimate(picture), torch.ones(1, 2), torch.zeros(1, 2))
    torch.testing.assert_close(same, picture.clamp(max=same.max()), atol=1e-4, rtol=1e-3)


def test_random_stain_scales_one_dye() -> None:
    picture = mixture(DIRECTIONS, 0.9, 0)
    stain = estimate(picture)
    changed = random_stain(picture, stain, torch.tensor([[1.5, 1.0]]), torch.zeros(1, 2))
    before, after = (
        concentrations(sampled_pixels(optical_density(p, stain.white[:, :, None, None])), stain.directions)
        for p in (picture, changed)
    )
    strong = before[..., 0] > 0.5
    torch.testing.assert_close(after[..., 0][strong], 1.5 * before[..., 0][strong], atol=0.02, rtol=0.02)
    torch.testing.assert_close(after[..., 1], before[..., 1], atol=0.03, rtol=0.05)


def test_a_reference_stain_is_that_of_normalised_pictures() -> None:
    normalised = macenko(mixture(DIRECTIONS, 0.9, 0))
    found, said = estimate(normalised), reference_stain(normalised)
    assert degrees(found.directions[0, 0], said.directions[0, 0]) < 3
    torch.testing.assert_close(found.strength, said.strength, rtol=0.1, atol=0)


def test_opponent_axes_are_orthonormal_and_grey_has_little_colour() -> None:
    axes = torch.tensor(OPPONENT)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3))
    grey = opponent_axes(torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]))
    assert grey[:, 1:].abs().max() < 0.05 and grey[1, 0] > grey[0, 0]


def test_reinhards_tissue_has_the_references_colour() -> None:
    found = colour_of(reinhard(mixture(DIRECTIONS, 0.95, 0)))
    torch.testing.assert_close(found.mean[0], torch.tensor(REINHARD_MEAN), atol=0.06, rtol=0)


def test_quantiles_of_what_is_counted() -> None:
    torch.manual_seed(0)
    values, counted = torch.randn(3, 101), torch.rand(3, 101) < 0.5
    counted[2] = False
    found = quantiles(values, counted, (0.25, 0.9))
    for row in (0, 1):
        expected = np.quantile(values[row][counted[row]], (0.25, 0.9), method="nearest")
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    assert (found[2] == 0).all()


def tissue_colours(images: list[Tensor], mapped: list[Tensor]) -> np.ndarray:
    """Mean RGB of the raw images' tissue, (n, 3)."""
    rows = []
    for raw, own in zip(images, mapped, strict=True):
        tissue = optical_density(raw, white_of(sampled_pixels(raw))[:, :, None, None]).mean(1)[0] > TISSUE
        rows.append(255 * own[0][:, tissue].mean(1).numpy())
    return np.array(rows)


@pytest.mark.parametrize("name", NORMALISERS)
def test_tissue_of_real_images_comes_closer(real_data: Path, name: str) -> None:
    """With one white level for all images it drifts apart: 19.0/25.3/15.8 -> 32.0/38.7/28.4."""
    paths = [i.path for d in ("BreaKHis_v1", "breakhis_500px") for i in scan(find_breast(real_data / "histo" / d))]
    images = [torch.from_numpy(read_picture(path).copy()).permute(2, 0, 1)[None].float() / 255 for path in paths]
    mapped = [NORMALISERS[name](image) for image in images]
    raw, normalised = (tissue_colours(images, own).std(0) for own in (images, mapped))
    assert (normalised < raw).all()
    if name == "macenko":
        directions = torch.cat([estimate(own).directions[:, 0] for own in mapped])
        mean = directions.mean(0)
        assert np.mean([degrees(one, mean) for one in directions]) <= 6


@pytest.mark.parametrize("name", NORMALISERS)
def test_other_laboratories_images_are_no_trouble(real_data: Path, name: str) -> None:
    for path in sorted((real_data / "histo" / "other_he").glob("*.png")):
        image = (
            torch.from_numpy(np.asarray(Pictures.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 255
        )
        found = NORMALISERS[name](image)
        assert torch.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
