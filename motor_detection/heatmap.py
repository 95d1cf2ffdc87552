"""Heat maps: what the network is asked to draw around every motor."""

import torch
from torch import Tensor


def cell_centres(cells: int, stride: int, device: torch.device) -> Tensor:
    """Voxel index of each cell's centre along one axis: (i + 0.5) * stride - 0.5, voxel centres at integers. (cells,)"""
    return (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * stride - 0.5


def render_heatmaps(motors: Tensor, sigma_voxels: Tensor, size: tuple[int, int, int], stride: int) -> Tensor:
    """The maximum over motors of exp(-d^2 / 2 sigma^2) at every cell's centre, from float coordinates.

    motors: (B, N, 3) voxel index z, y, x in the patch, NaN where a patch has fewer than N; they may lie outside.
    sigma_voxels: (B, 3) per axis; size: the patch in voxels. Returns (B, 1, ceil(z/stride), ...) float32 in [0, 1].
    Rendering from the patch's own float coordinates keeps labels aligned whatever the patch's origin.
    """
    assert motors.dim() == 3 and motors.shape[2] == 3 and sigma_voxels.shape == (len(motors), 3), f"{motors.shape}"
    exponents = []
    for axis in range(3):
        centres = cell_centres(-(-size[axis] // stride), stride, motors.device)
        distance = (centres - motors[:, :, axis, None].float()) / sigma_voxels[:, None, axis, None].float()
        exponents.append(-0.5 * distance.square())  # (B, N, cells of this axis)
    z, y, x = exponents
    exponent = z[:, :, :, None, None] + y[:, :, None, :, None] + x[:, :, None, None, :]  # (B, N, cells...)
    heat = exponent.exp().nan_to_num(0.0)
    if motors.shape[1] == 0:
        return heat.sum(1, keepdim=True)
    return heat.amax(1, keepdim=True)
