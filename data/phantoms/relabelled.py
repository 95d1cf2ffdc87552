"""The relabelled BYU 2025 table, the layout in which simulated and imported tomograms bring their truth."""

import numpy as np
import numpy.typing as npt


def relabelled_row(
    tomo_id: str, shape: tuple[int, int, int], spacing_angstrom: float, motors: npt.NDArray[np.float64], fold: int
) -> dict[str, str | int | float]:
    """One tomogram's row: z, y, x hold its first motor in voxels (-1: none), coordinates all (n, 3) as shares of shape."""
    first = motors[0].tolist() if len(motors) else [-1.0, -1.0, -1.0]
    shares = [tuple(share) for share in (motors / np.array(shape)).tolist()]
    return {
        "tomo_id": tomo_id,
        **dict(zip(("z", "y", "x"), first, strict=True)),
        **dict(zip(("z_shape", "y_shape", "x_shape"), shape, strict=True)),
        "voxel_spacing": spacing_angstrom,
        "coordinates": str(shares),
        "fold": fold,
    }
