"""Stain in plain torch: normalisation after Macenko and after Reinhard, and random stain, for batches on any device.

Light passes through dye: optical density -log(I / I0) is additive, and haematoxylin and eosin each add along a direction of
their own (Beer and Lambert). I0 is each image's own white: with one number for all, images of dim lamps drift apart. Directions
and scales are estimated without gradient (an eigenvector has none where eigenvalues tie); pixels are mapped with it. Nothing
here gives NaN: images without tissue, white, black or of one colour, come back as they were.

Macenko et al. 2009 (doi 10.1109/ISBI.2009.5193250); Reinhard et al. 2001 (doi 10.1109/38.946629); random stain: Tellez et al.
2018 (arXiv:1902.06543).
"""

import dataclasses
import math
from collections.abc import Sequence

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
    rank = max(1, round(WHITE_QUANTILE * pixels.shape[1]))
    brightest = (
        pixels.transpose(1, 2).topk(pixels.shape[1] - rank + 1, -1).values
    )  # kthvalue is not deterministic on GPUs
    return brightest[..., -1].clamp(DARKEST_WHITE, 1.0)


def optical_density(images: Tensor, white: Tensor) -> Tensor:
    """-log(I / I0) of brightness 0..1, at least 0 and at most DENSEST; white must broadcast."""
    return -torch.log((images / white).clamp(math.exp(-DENSEST), 1.0))


def quantiles(values: Tensor, counted: Tensor, shares: tuple[float, ...]) -> Tensor:
    """The values (..., k) below which shares of the counted values (..., n) lie; 0 where none is counted.

    counted: bool (..., n) that broadcasts; torch.quantile takes no mask. Only the part from the nearer end is sorted.
    """
    last = (counted.expand(values.shape).sum(-1, keepdim=True) - 1).clamp(min=0)  # (..., 1)
    found = []
    for share in shares:
        is_high = share > 0.5
        rank = (last * share).round().long()
        place = last - rank if is_high else rank
        length = min(values.shape[-1], math.ceil(min(share, 1 - share) * values.shape[-1]) + 1)
        ends = values.masked_fill(~counted, -torch.inf if is_high else torch.inf).topk(length, -1, is_high).values
        found.append(ends.gather(-1, place))
    return torch.where(counted.any(-1, keepdim=True), torch.cat(found, -1), 0.0)


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
    ends = quantiles(angle, tissue, ANGLE_QUANTILES)  # (B, 2)
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
    strength = quantiles(amounts.transpose(1, 2), tissue[:, None], (STRENGTH_QUANTILE,))[..., 0]  # (B, 2)
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


def stained(images: Tensor, stain: Stain, matrices: Tensor, added: Tensor, white: Tensor) -> Tensor:
    """I = white exp(-(D M + added)) within 0..1, D the optical density of images (B, 3, y, x) before the stain's own white.

    matrices: (B, 3 in, 3 out); added, white: (B, 3). Images without a found stain come back unchanged.
    """
    offset = white.log() - added  # (B, 3)
    if torch.is_grad_enabled() and images.requires_grad:
        relative = images / stain.white[:, :, None, None].to(images.dtype)
        light = relative.clamp(math.exp(-DENSEST), 1.0).log()  # minus the density
        mapped = (torch.einsum("bcyx,bco->boyx", light, matrices) + offset[:, :, None, None]).exp().clamp(0, 1)
        return torch.where(stain.is_found[:, None, None, None], mapped, images)
    found = torch.empty(images.shape, dtype=images.dtype, device=images.device)
    glass = stain.white.to(images.dtype)
    offset = offset - (glass.log()[:, None] @ matrices)[:, 0]  # log(I / I0) is log I less this
    light = images.new_empty(3, images[0, 0].numel())
    for number, (is_found, brightest) in enumerate(zip(stain.is_found.tolist(), glass.tolist(), strict=True)):
        if not is_found:
            found[number] = images[number]
            continue
        # one by one, channel by channel, in place: what an image needs stays in the caches
        for channel, most in enumerate(brightest):
            torch.clamp(images[number, channel].reshape(-1), math.exp(-DENSEST) * most, most, out=light[channel])
        light.log_()
        for channel, weights in enumerate(matrices[number].T.tolist()):
            result = torch.add(offset[number, channel], light[0], alpha=weights[0], out=found[number, channel].view(-1))
            result.add_(light[1], alpha=weights[1]).add_(light[2], alpha=weights[2]).exp_().clamp_(max=1)
    return found


def macenko(images: Tensor) -> Tensor:
    """Brightness 0..1 (B, 3, y, x) -> the same with the reference's stains at the reference's strength, on white glass.

    Images in which no two stains are found come back unchanged.
    """
    stain = estimate(images)
    reference = torch.tensor(REFERENCE, device=images.device, dtype=images.dtype)
    scale = torch.tensor(REFERENCE_STRENGTH, device=images.device) / stain.strength  # (B, 2)
    unmixing = torch.linalg.pinv(stain.directions.double()).to(images.dtype)  # (B, 3, 2)
    matrices = unmixing * scale[:, None].to(images.dtype) @ reference
    nothing = torch.zeros(len(images), 3, dtype=images.dtype, device=images.device)
    return stained(images, stain, matrices, nothing, torch.ones_like(nothing))


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
    added = ((shifts * stain.strength)[:, None].to(images.dtype) @ directions)[:, 0]  # (B, 3)
    return stained(images, stain, matrices, added, stain.white.to(images.dtype))


# log cone responses from linear RGB and back, and their opponent axes (Reinhard et al. 2001, equations 4 to 6)
TO_CONES = ((0.3811, 0.5783, 0.0402), (0.1967, 0.7244, 0.0782), (0.0241, 0.1288, 0.8444))
OPPONENT = ((3**-0.5, 3**-0.5, 3**-0.5), (6**-0.5, 6**-0.5, -2 * 6**-0.5), (2**-0.5, -(2**-0.5), 0.0))
DARKEST = 1 / 255  # of a cone's response; its logarithm is finite
SMALLEST_DEVIATION = 0.01  # of an axis, by which differences are divided
LARGEST_SCALE = 3.0  # of an axis, so that noise of nearly even colour stays noise
REINHARD_MEAN = (-0.83, 0.03, 0.02)  # of the tissue of a well stained section, and its deviation
REINHARD_DEVIATION = (0.38, 0.06, 0.02)


@dataclasses.dataclass(frozen=True, eq=False)
class Colour:
    """What tissue looks like in each image of a batch, along the opponent axes."""

    white: Tensor  # (B, 3) brightness of empty glass
    mean: Tensor  # (B, 3)
    deviation: Tensor  # (B, 3)
    is_found: Tensor  # (B,) bool: there is tissue, and not of one colour


def opponent_axes(brightness: Tensor) -> Tensor:
    """Brightness 0..1 (..., 3) -> light, yellow-blue, red-green of log cone responses (..., 3)."""
    cones = (brightness @ brightness.new_tensor(TO_CONES).T).clamp(min=DARKEST)
    return cones.log() @ brightness.new_tensor(OPPONENT).T


def tissue_share(relative: Tensor) -> Tensor:
    """How much of a pixel is tissue, 0..1, from its brightness as a share of white's (..., 3)."""
    density = -relative.mean(-1).clamp(math.exp(-DENSEST), 1.0).log()
    return (2 * density / TISSUE - 1).clamp(0, 1)


@torch.no_grad()
def colour_of(images: Tensor) -> Colour:
    """Mean and deviation of the tissue's colour in images (B, 3, y, x)."""
    pixels = torch.nan_to_num(sampled_pixels(images.float())).clamp(0, 1)  # (B, n, 3)
    white = white_of(pixels)
    share = tissue_share(pixels / white[:, None])[..., None]  # (B, n, 1)
    count = share.sum(1)
    weight = share / count.clamp(min=1)[:, None]
    axes = opponent_axes(pixels)
    mean = (weight * axes).sum(1)
    deviation = (weight * (axes - mean[:, None]) ** 2).sum(1).sqrt()
    is_found = (count[:, 0] >= FEWEST * pixels.shape[1]) & (deviation.amax(1) > SMALLEST_DEVIATION)
    return Colour(white, mean, deviation, is_found)


def reinhard(images: Tensor) -> Tensor:
    """Brightness 0..1 (B, 3, y, x) -> the same with the tissue's mean and deviation of colour as the reference's.

    Glass stays as it is, what is between glass and tissue is moved in part; images without tissue come back unchanged.
    """
    colour, dtype = colour_of(images), images.dtype
    axes = torch.tensor(OPPONENT, device=images.device)  # orthonormal: its inverse is its transpose
    scale = images.new_tensor(REINHARD_DEVIATION).float() / colour.deviation.clamp(min=SMALLEST_DEVIATION)
    scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)  # (B, 3)
    matrices = (axes.T * scale[:, None]) @ axes  # (B, 3, 3), of log cone responses
    offsets = (images.new_tensor(REINHARD_MEAN).float() - scale * colour.mean) @ axes  # (B, 3)
    to_cones = torch.tensor(TO_CONES, dtype=torch.float64, device=images.device)
    back = torch.linalg.inv(to_cones).to(dtype)
    if not (torch.is_grad_enabled() and images.requires_grad):
        return moved_in_place(images, colour, matrices.to(dtype), offsets.to(dtype), back)
    results = []
    for number, is_found in enumerate(colour.is_found.tolist()):
        pixels = images[number].flatten(1)  # (3, y x)
        light = (to_cones.to(dtype) @ pixels).clamp(min=DARKEST).log()
        moved = torch.addmm(offsets[number, :, None].to(dtype), matrices[number].to(dtype), light).exp()
        mapped = (back @ moved).clamp(0, 1)
        with torch.no_grad():
            share = tissue_share((pixels / colour.white[number, :, None].to(dtype)).T)
        results.append(torch.lerp(pixels, mapped, share).view_as(images[number]) if is_found else images[number])
    return torch.stack(results)


def moved_in_place(images: Tensor, colour: Colour, matrices: Tensor, offsets: Tensor, back: Tensor) -> Tensor:
    """reinhard without gradients: image by image, channel by channel, in place; what an image needs stays in the caches."""
    found = torch.empty(images.shape, dtype=images.dtype, device=images.device)
    light, moved = (images.new_empty(3, images[0, 0].numel()) for _ in range(2))
    share = torch.empty_like(light[0])
    for number, (is_found, white) in enumerate(zip(colour.is_found.tolist(), colour.white.tolist(), strict=True)):
        if not is_found:
            found[number] = images[number]
            continue
        pixels, output = images[number].flatten(1), found[number].view(3, -1)
        for channel, weights in enumerate(TO_CONES):
            combined(pixels, weights, 0.0, light[channel])
        light.clamp_(min=DARKEST).log_()
        rows = zip(matrices[number].tolist(), offsets[number].tolist(), strict=True)
        for channel, (weights, offset) in enumerate(rows):
            combined(light, weights, offset, moved[channel])
        moved.exp_()
        combined(pixels, [1 / (3 * brightest) for brightest in white], 0.0, share)
        share.clamp_(math.exp(-DENSEST), 1).log_().mul_(-2 / TISSUE).sub_(1).clamp_(0, 1)  # tissue_share
        for channel, weights in enumerate(back.tolist()):
            mapped = combined(moved, weights, 0.0, light[channel]).clamp_(0, 1)
            torch.lerp(pixels[channel], mapped, share, out=output[channel])
    return found


def combined(planes: Tensor, weights: Sequence[float], offset: float, output: Tensor) -> Tensor:
    """offset + sum of weights times three planes (3, n), into output (n,)."""
    torch.mul(planes[0], weights[0], out=output)
    output.add_(planes[1], alpha=weights[1]).add_(planes[2], alpha=weights[2])
    return output.add_(offset) if offset else output
