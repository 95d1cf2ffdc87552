"""Stain in plain torch: normalisation after Macenko and after Reinhard, and random stain, for batches on any device.

Light passes through dye: optical density -log(I / I0) is additive, and haematoxylin and eosin each add along a direction of
their own (Beer and Lambert). I0 is each image's own white: with one number for all, images of dim lamps drift apart. Directions
and scales are estimated without gradient (an eigenvector has none where eigenvalues tie); pixels are mapped with it. Nothing
here gives NaN: images without tissue, white, black or of one colour, come back as they were.

Macenko et al. 2009 (doi 10.1109/ISBI.2009.5193250); Reinhard et al. 2001 (doi 10.1109/38.946629); random stain: Tellez et al.
2018 (arXiv:1902.06543).
"""

import dataclasses

import torch
from torch import Tensor

SAMPLED = 2**12  # pixels of an image, at least a quarter of so many, that its stain is estimated from
TISSUE = 0.15  # optical density, mean over channels, from which a pixel is tissue
FEWEST = 0.01  # share of an image that must be tissue
WHITE_QUANTILE = 0.98  # of each channel: the empty glass, where there is some
DARKEST_WHITE = 0.6  # white is at least so bright: an image without glass has none to measure
ANGLE_QUANTILES = (0.01, 0.99)  # of the pixels' directions: pure haematoxylin and pure eosin
STRENGTH_QUANTILE = 0.99  # of each stain's concentration: what is matched
NARROWEST = 0.10  # radians between the stains of an image, below which it has only one
DENSEST = 4.0  # optical density of what is as good as black
# haematoxylin and eosin in optical density of R, G, B, unit vectors, and strengths, of Macenko et al.'s reference
REFERENCE = ((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581))
REFERENCE_STRENGTH = (1.9705, 1.0308)


@dataclasses.dataclass(frozen=True, eq=False)
class Stain:
    """What was found in each image of a batch; where `is_found` is false the other entries are the reference's."""

    white: Tensor  # (B, 3) brightness of empty glass, 0..1
    directions: Tensor  # (B, 2, 3) unit vectors: haematoxylin, eosin
    strength: Tensor  # (B, 2) concentration of the strong pixels
    is_found: Tensor  # (B,) bool


def sampled_pixels(images: Tensor) -> Tensor:
    """Every k-th pixel along both axes of images (B, 3, y, x) as (B, n, 3), n about SAMPLED."""
    height, width = images.shape[2:]
    step = max(1, int((height * width / SAMPLED) ** 0.5))
    return images[:, :, ::step, ::step].flatten(2).transpose(1, 2)


def white_of(pixels: Tensor) -> Tensor:
    """The brightness (B, 3) of empty glass in pixels (B, n, 3)."""
    return quantile(pixels.transpose(1, 2), None, WHITE_QUANTILE).clamp(DARKEST_WHITE, 1.0)


def optical_density(images: Tensor, white: Tensor) -> Tensor:
    """-log(I / I0) of brightness 0..1, at least 0 and at most DENSEST; white must broadcast."""
    floor = torch.exp(torch.tensor(-DENSEST)).item()
    return -torch.log((images / white).clamp(floor, 1.0))


def quantile(values: Tensor, counted: Tensor | None, share: float) -> Tensor:
    """The value (...) below which a share of the counted values (..., n) lie; 0 where none is counted.

    By sorting, as torch.quantile takes no mask; counted is a bool (..., n) that broadcasts, None: all.
    """
    if counted is None:
        return values.kthvalue(max(1, round(share * values.shape[-1])), -1).values
    ordered = values.masked_fill(~counted, torch.inf).sort(-1).values
    number = counted.expand(values.shape).sum(-1)
    rank = (share * (number - 1).clamp(min=0)).round().long()
    found = ordered.gather(-1, rank[..., None])[..., 0]
    return torch.where(number > 0, found, 0.0)


@torch.no_grad()
def estimate(images: Tensor) -> Stain:
    """The stain of each image of a batch (B, 3, y, x) float32, brightness 0..1."""
    pixels = torch.nan_to_num(sampled_pixels(images.float())).clamp(0, 1)
    white = white_of(pixels)
    density = optical_density(pixels, white[:, None])  # (B, n, 3)
    tissue = (density.mean(2) >= TISSUE) & (density.amax(2) < 0.95 * DENSEST)  # (B, n)
    share = tissue.float()
    count = share.sum(1)
    weight = share / count.clamp(min=1)[:, None]
    moments = (density * weight[..., None]).transpose(1, 2) @ density  # (B, 3, 3), about 0: stains mix from there
    vectors = torch.linalg.eigh(moments.double()).eigenvectors[:, :, 1:].float()  # (B, 3, 2), the two largest
    vectors = torch.where(vectors.sum(1, keepdim=True) < 0, -vectors, vectors)  # towards more light lost
    plane = density @ vectors  # (B, n, 2)
    angle = torch.atan2(plane[..., 0], plane[..., 1])
    ends = torch.stack([quantile(angle, tissue, q) for q in ANGLE_QUANTILES], 1)  # (B, 2)
    found = torch.stack([ends.sin(), ends.cos()], 1)  # (B, 2 of plane, 2 of stains)
    directions = torch.einsum("bcp,bps->bsc", vectors, found)  # (B, stain, channel)
    directions = directions.clamp(min=1e-3)
    directions = directions / directions.norm(dim=2, keepdim=True)
    is_blue = directions[:, 0, 0] < directions[:, 1, 0]  # haematoxylin takes more of the red
    directions = torch.where(is_blue[:, None, None], directions.flip(1), directions)
    apart = torch.acos((directions[:, 0] * directions[:, 1]).sum(1).clamp(-1, 1))
    is_found = (count >= FEWEST * pixels.shape[1]) & (apart >= NARROWEST)
    reference = torch.tensor(REFERENCE, device=images.device)
    directions = torch.where(is_found[:, None, None], directions, reference)
    amounts = concentrations(density, directions)  # (B, n, 2)
    strength = torch.stack([quantile(amounts[..., s], tissue, STRENGTH_QUANTILE) for s in range(2)], 1)
    is_found &= (strength > 0.05).all(1)
    expected = torch.tensor(REFERENCE_STRENGTH, device=images.device)
    return Stain(
        white,
        torch.where(is_found[:, None, None], directions, reference),
        torch.where(is_found[:, None], strength, expected),
        is_found,
    )


def concentrations(density: Tensor, directions: Tensor) -> Tensor:
    """Least-squares amounts (B, n, 2) of the stains (B, 2, 3) in optical densities (B, n, 3)."""
    unmixing: Tensor = torch.linalg.pinv(directions.double()).to(density.dtype)  # (B, 3, 2)
    return density @ unmixing


def by_matrices(density: Tensor, matrices: Tensor) -> Tensor:
    """Densities (B, 3, y, x) times a matrix each (B, 3 in, 3 out)."""
    return torch.einsum("bcyx,bco->boyx", density, matrices)


def macenko(images: Tensor) -> Tensor:
    """Brightness 0..1 (B, 3, y, x) -> the same with the reference's stains at the reference's strength, on white glass.

    Images in which no two stains are found come back unchanged.
    """
    stain = estimate(images)
    reference = torch.tensor(REFERENCE, device=images.device)
    scale = torch.tensor(REFERENCE_STRENGTH, device=images.device) / stain.strength  # (B, 2)
    unmixing = torch.linalg.pinv(stain.directions.double()).to(images.dtype)  # (B, 3, 2)
    matrices = unmixing * scale[:, None].to(images.dtype) @ reference.to(images.dtype)
    density = optical_density(images, stain.white[:, :, None, None].to(images.dtype))
    mapped = torch.exp(-by_matrices(density, matrices)).clamp(0, 1)
    return torch.where(stain.is_found[:, None, None, None], mapped, images)


def reference_stain(images: Tensor) -> Stain:
    """What normalised images (B, 3, y, x) have."""
    count, device = len(images), images.device
    reference, strength = torch.tensor(REFERENCE, device=device), torch.tensor(REFERENCE_STRENGTH, device=device)
    found = torch.ones(count, dtype=torch.bool, device=device)
    return Stain(torch.ones(count, 3, device=device), reference.expand(count, 2, 3), strength.expand(count, 2), found)


def random_stain(images: Tensor, stain: Stain, factors: Tensor, shifts: Tensor) -> Tensor:
    """Brightness 0..1 (B, 3, y, x) with each image's amounts of haematoxylin and eosin (B, 2) scaled and shifted.

    stain: of the images; factors: about 1; shifts: about 0, in shares of the strength. What neither stain explains is kept.
    """
    unmixing = torch.linalg.pinv(stain.directions.double()).to(images.dtype)  # (B, 3, 2)
    directions = stain.directions.to(images.dtype)
    identity = torch.eye(3, dtype=images.dtype, device=images.device)
    matrices = identity + unmixing * (factors.to(images.dtype)[:, None] - 1) @ directions
    added = ((shifts * stain.strength)[:, None].to(images.dtype) @ directions)[:, 0, :, None, None]  # (B, 3, 1, 1)
    white = stain.white[:, :, None, None].to(images.dtype)
    density = optical_density(images, white)
    mapped = (white * torch.exp(-(by_matrices(density, matrices) + added))).clamp(0, 1)
    return torch.where(stain.is_found[:, None, None, None], mapped, images)


# log cone responses from linear RGB and back, and their opponent axes (Reinhard et al. 2001, equations 4 to 6)
TO_CONES = ((0.3811, 0.5783, 0.0402), (0.1967, 0.7244, 0.0782), (0.0241, 0.1288, 0.8444))
OPPONENT = ((3**-0.5, 3**-0.5, 3**-0.5), (6**-0.5, 6**-0.5, -2 * 6**-0.5), (2**-0.5, -(2**-0.5), 0.0))
DARKEST = 1 / 255  # of a cone's response; its logarithm is finite
SMALLEST_DEVIATION = 0.01  # of an axis, by which differences are divided
LARGEST_SCALE = 3.0  # of an axis, so that noise of nearly even colour stays noise
REINHARD_MEAN = (-0.83, 0.03, 0.02)  # of the tissue of a well stained section, and its deviation
REINHARD_DEVIATION = (0.38, 0.06, 0.02)


def to_opponent(images: Tensor) -> Tensor:
    """Brightness 0..1 (B, 3, y, x) -> light, yellow-blue, red-green of log cone responses."""
    cones = torch.einsum("oc,bcyx->boyx", images.new_tensor(TO_CONES), images)
    return torch.einsum("oc,bcyx->boyx", images.new_tensor(OPPONENT), cones.clamp(min=DARKEST).log())


def from_opponent(axes: Tensor) -> Tensor:
    """The way back, within 0..1."""
    cones = torch.einsum("oc,boyx->bcyx", axes.new_tensor(OPPONENT), axes).exp()  # its inverse is its transpose
    back = torch.linalg.inv(torch.tensor(TO_CONES, dtype=torch.float64)).to(axes)
    return torch.einsum("oc,bcyx->boyx", back, cones).clamp(0, 1)


def reinhard(images: Tensor) -> Tensor:
    """Brightness 0..1 (B, 3, y, x) -> the same with the tissue's mean and deviation of colour as the reference's.

    Glass stays as it is, what is between glass and tissue is moved in part; images without tissue come back unchanged.
    """
    axes = to_opponent(images)
    with torch.no_grad():
        white = white_of(torch.nan_to_num(sampled_pixels(images.float())).clamp(0, 1))[:, :, None, None]
        density = optical_density(images.float(), white).mean(1, keepdim=True)
        share = (2 * density / TISSUE - 1).clamp(0, 1).to(images.dtype)  # of tissue, (B, 1, y, x)
        count = share.sum((2, 3), keepdim=True)
        weight = share / count.clamp(min=1)
        mean = (weight * axes).sum((2, 3), keepdim=True)
        deviation = (weight * (axes - mean) ** 2).sum((2, 3), keepdim=True).sqrt()
        is_found = (count >= FEWEST * density[0].numel()) & (deviation.amax(1, keepdim=True) > SMALLEST_DEVIATION)
    scale = axes.new_tensor(REINHARD_DEVIATION)[:, None, None] / deviation.clamp(min=SMALLEST_DEVIATION)
    scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    mapped = from_opponent((axes - mean) * scale + axes.new_tensor(REINHARD_MEAN)[:, None, None])
    return torch.where(is_found, images + share * (mapped - images), images)
