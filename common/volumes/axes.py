"""What the axes of a file's array mean: the user's order, the format's own, or the usual one for their number."""

from common.errors import config_error, data_error
from common.volumes.volume import Box, Volume

AUTO = "auto"
USUAL_AXES = {2: "yx", 3: "zyx", 4: "czyx"}  # by the number of axes
LETTERS = "tczyx"
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def check_axes(axes: str) -> None:
    """A config error unless axes is "auto" or an order of letters such as "zyx", "xyz" or "zyxc"."""
    known = set(axes) <= set(LETTERS) and len(set(axes)) == len(axes) and {"y", "x"} <= set(axes)
    if axes != AUTO and not known:
        wanted = "auto, or one letter c, z, y, x per axis of the file, in its order, such as zyx, xyz or zyxc"
        raise config_error(f"axes={axes}: no order of axes (expected {wanted})")


def arrange(where: str, stored_shape: tuple[int, ...], axes: str, own_axes: str) -> tuple[str, Box, int]:
    """The axes that hold, the shape (z, y, x) and the number of channels of an array in a file.

    axes: the user's choice or "auto"; own_axes: what the format itself says, or "auto" where it says nothing. A data
    error where they do not fit the array's shape; a missing axis z or c has length 1, and t must have it.
    """
    check_axes(axes)
    chosen = next((a for a in (axes, own_axes) if a != AUTO), None)
    if chosen is None:
        if len(stored_shape) not in USUAL_AXES:
            expected = "two (y, x), three (z, y, x) or four (c, z, y, x) axes, or a setting axes=... that names them"
            raise data_error(f"{where}: shape {stored_shape} (expected {expected})")
        chosen = USUAL_AXES[len(stored_shape)]
    if len(chosen) != len(stored_shape) or 0 in stored_shape:
        expected = f"{NUMBER_WORDS[len(chosen)]} axes {', '.join(chosen)}, none empty"
        remedy = "save the array again with these axes, or set axes to its own order"
        raise data_error(f"{where}: shape {stored_shape} (expected {expected}): {remedy}")
    lengths = dict.fromkeys(LETTERS, 1) | dict(zip(chosen, stored_shape, strict=True))
    if lengths["t"] != 1:
        raise data_error(f"{where}: shape {stored_shape} with axes {chosen} holds {lengths['t']} times: export one")
    return chosen, (lengths["z"], lengths["y"], lengths["x"]), lengths["c"]


def check_same_shape(image: Volume, label: Volume) -> None:
    """A data error unless an image and its labels have one shape; it names the order of axes that would fit."""
    if image.shape == label.shape:
        return
    problem = f"{label.path}: labels {label.shape} of the image {image.path} {image.shape} (expected one shape z, y, x)"
    fitting = [axes for axes in reorderings(label) if reordered_shape(label, axes) == image.shape]
    if fitting:
        choices = " or ".join(f"axes={axes}" for axes in fitting)
        raise data_error(
            f"{problem}: labels {label.shape} are the image's axes in another order: try {choices} for them"
        )
    raise data_error(f"{problem}: crop or resample one of them, or name the pair that belongs together")


def reorderings(volume: Volume) -> list[str]:
    """All orders of z, y, x for a file's array, other axes left in place; the volume's own one included."""
    orders = ("zyx", "zxy", "yzx", "yxz", "xzy", "xyz")
    if "z" not in volume.axes:
        return []
    return ["".join(dict(zip("zyx", order, strict=True)).pop(a, a) for a in volume.axes) for order in orders]


def reordered_shape(volume: Volume, axes: str) -> Box:
    """The shape (z, y, x) that the same file would have with other axes."""
    lengths = dict(zip("zyx", volume.shape, strict=True))
    meant = {new: lengths[old] for old, new in zip(volume.axes, axes, strict=True) if new in "zyx"}
    return meant["z"], meant["y"], meant["x"]
