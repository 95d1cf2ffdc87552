"""Voxel sizes as files state them: attributes in their unit, one number per axis of space in the file's own order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.volumes.volume import Spacing

ANGSTROM_PER = {
    **dict.fromkeys(("angstrom", "å", "a"), 1.0),
    **dict.fromkeys(("nanometer", "nanometre", "nm"), 1e1),
    **dict.fromkeys(("micrometer", "micrometre", "micron", "um", "µm", "μm"), 1e4),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), 1e7),
    **dict.fromkeys(("meter", "metre", "m"), 1e10),
}
# attribute -> its unit: CREMI; ilastik and PlantSeg; funlib, where an attribute "units" may say otherwise
SIZE_ATTRIBUTES = {"resolution": "nm", "element_size_um": "um", "voxel_size": "nm"}
UNIT_ATTRIBUTES = ("units", "voxel_size_unit", "unit")


def spacing_in_angstrom(axes: str, sizes: Sequence[float], angstrom_per_unit: float) -> Spacing | None:
    """The spacing z, y, x from sizes in the order of the file's axes; None unless all three are known and above 0.

    sizes: one per axis of space, or one per axis of all; a file without z may still state all three as z, y, x.
    """
    space = [axis for axis in axes if axis in "zyx"]
    names = {len(axes): list(axes), 3: list("zyx"), len(space): space}  # the last of equal lengths holds
    if len(sizes) not in names:
        return None
    size = dict(zip(names[len(sizes)], (float(s) * angstrom_per_unit for s in sizes), strict=True))
    if not set("zyx") <= set(size) or not all(math.isfinite(size[a]) and size[a] > 0 for a in "zyx"):
        return None
    return size["z"], size["y"], size["x"]


def spacing_from_attributes(axes: str, attributes: Mapping[str, Any]) -> Spacing | None:
    """The spacing that a dataset's attributes state; None where there are none, or none that make sense."""
    for name, unit in SIZE_ATTRIBUTES.items():
        if name not in attributes:
            continue
        if name == "voxel_size":
            unit = next((plain_unit(attributes[key]) for key in UNIT_ATTRIBUTES if key in attributes), unit)
        try:
            sizes = np.asarray(attributes[name], np.float64).ravel().tolist()
        except (TypeError, ValueError):
            continue
        if unit in ANGSTROM_PER:
            spacing = spacing_in_angstrom(axes, sizes, ANGSTROM_PER[unit])
            if spacing is not None:
                return spacing
    return None


def plain_unit(value: Any) -> str:
    """A unit attribute, text or one text per axis, as one lower-case word."""
    found = value if isinstance(value, str | bytes) else list(value)[-1] if len(value) else ""
    return (found.decode(errors="replace") if isinstance(found, bytes) else str(found)).strip().lower()
