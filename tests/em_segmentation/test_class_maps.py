"""Class maps: every voxel by itself, or exclusive as wholes, the same block by block; continued and recognised."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from common.errors import UserError
from common.volumes import streaming
from common.volumes.opening import open_volume
from common.volumes.streaming import StreamedVolume, discard_streamed
from em_segmentation import class_maps as module
from em_segmentation.class_maps import classes_identity, write_classes
from em_segmentation.config import Config
from em_segmentation.prediction import note_of, whole
from tests.em_segmentation.small_networks import changed, small_config

SHAPE = (20, 23, 19)
VOXEL_SIZE = (24.0, 12.0, 12.0)


def config_of(num_classes: int, **decoding: object) -> Config:
    """Three affinities and so many classes."""
    names = tuple(f"class {number}" for number in range(1, max(num_classes, 2)))
    targets = {"semantic_classes": num_classes, "semantic_names": names}
    return changed(small_config(), targets=targets, decoding=decoding)


def prediction_at(folder: Path, classes: np.ndarray) -> np.ndarray:
    """A file of three affinities and these probabilities [k, z, y, x] uint8."""
    affinities = np.full((3, *classes.shape[1:]), 77, np.uint8)
    np.save(folder / "p.npy", np.concatenate([affinities, classes]))
    return classes


def written(folder: Path, config: Config, threshold: int) -> np.ndarray:
    found = write_classes(open_volume(folder / "p.npy", "czyx"), config, threshold, VOXEL_SIZE, "it", folder / "c.npy")
    assert found.dtype == np.uint8 and found.voxel_size_nm in (None, VOXEL_SIZE)
    left = {path.name for path in folder.iterdir()}
    assert left == {"p.npy", "c.npy", note_of(folder / "c.npy").name}
    return np.asarray(whole(found)[0])


def random_classes(num_classes: int, seed: int) -> np.ndarray:
    """Smooth random probabilities."""
    noise = np.random.default_rng(seed).standard_normal((num_classes, *SHAPE))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 1.2, 1.2, 1.2))
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def by_definition(values: np.ndarray, exclusive: tuple[int, ...]) -> np.ndarray:
    """Body by body in a loop; single voxels keep their class, which is what they speak for."""
    classes = values.argmax(0)
    pieces, count = scipy.ndimage.label(np.isin(classes, exclusive))
    for number in range(1, count + 1):
        inside = pieces == number
        classes[inside] = exclusive[int(np.argmax([values[b][inside].sum(dtype=np.int64) for b in exclusive]))]
    return classes


def test_a_single_class_is_what_reaches_the_threshold(tmp_path: Path) -> None:
    values = prediction_at(tmp_path, random_classes(1, 0))
    assert np.array_equal(written(tmp_path, config_of(1), 100), values[0] >= 100)
    assert np.array_equal(written(tmp_path, config_of(1), 150), values[0] >= 150), "made anew for another threshold"


def test_several_classes_are_the_likeliest(tmp_path: Path) -> None:
    values = prediction_at(tmp_path, random_classes(4, 1))
    assert np.array_equal(written(tmp_path, config_of(4), 128), values.argmax(0))


@pytest.mark.parametrize("exclusive", [(1, 3), (3, 1), (1, 2, 3)])
@pytest.mark.parametrize("block", [(128, 512, 512), (8, 9, 10)])
def test_a_body_is_of_one_class(
    tmp_path: Path, exclusive: tuple[int, ...], block: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBABILITIES_AT_ONCE", 10000)  # three planes at once
    values = prediction_at(tmp_path, random_classes(4, 2))
    expected = by_definition(values, exclusive)
    assert len(exclusive) == 1 or (expected != values.argmax(0)).any(), "the case must have mixed exclusive"
    found = written(tmp_path, config_of(4, exclusive_classes=exclusive, block_size=block), 128)
    assert np.array_equal(found, expected)


def test_no_body_at_all(tmp_path: Path) -> None:
    values = np.zeros((3, *SHAPE), np.uint8)
    values[0] = 255
    prediction_at(tmp_path, values)
    assert not written(tmp_path, config_of(3, exclusive_classes=(1, 2)), 128).any()


KILLS = [("write", 0), ("write", 3), ("write_box", 2), ("create", 0), ("create", 1), ("discard", 0), ("finish", 0)]


@pytest.mark.parametrize(("step", "calls"), KILLS)
def test_a_killed_call_is_continued(tmp_path: Path, step: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While components are found, classes written, or the target made: nothing is written twice, nothing is left."""
    monkeypatch.setattr(module, "PROBABILITIES_AT_ONCE", 10000)
    values = prediction_at(tmp_path, random_classes(4, 3))
    config = config_of(4, exclusive_classes=(1, 3), block_size=(8, 9, 10))
    owner = {"create": streaming, "discard": module}[step] if step in ("create", "discard") else StreamedVolume
    original, left = getattr(owner, step), [calls]

    def dying(*arguments: object) -> object:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, dying)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, config, 128)
    planes: list[int] = []
    write = StreamedVolume.write
    monkeypatch.setattr(
        StreamedVolume,
        "write",
        lambda self, first, part: (planes.extend([first] * part.shape[1]), write(self, first, part)),
    )
    assert np.array_equal(written(tmp_path, config, 128), by_definition(values, (1, 3)))
    finished = {"discard": SHAPE[0], "finish": SHAPE[0], "write": 3 * calls}
    assert len(planes) == SHAPE[0] - finished.get(step, 0)


def test_components_that_other_settings_left_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = prediction_at(tmp_path, random_classes(4, 3))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StreamedVolume, "write_box", raising(KeyboardInterrupt()))
        written(tmp_path, config_of(4, exclusive_classes=(1, 3), block_size=(8, 9, 10)), 128)
    discard_streamed(tmp_path / "c.npy")  # as eval.py does for its own files
    found = written(tmp_path, config_of(4, exclusive_classes=(1, 2), block_size=(8, 9, 10)), 128)
    assert np.array_equal(found, by_definition(values, (1, 2)))


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_sections_that_are_pictures_of_their_own_decide_alone(tmp_path: Path) -> None:
    values = np.zeros((4, 2, 6, 6), np.uint8)
    values[1, 0, 1:5, 1:5], values[3, 1, 1:5, 1:5], values[0] = 255, 200, 5
    prediction_at(tmp_path, values)
    found = written(tmp_path, config_of(4, exclusive_classes=(1, 3)), 128)
    assert set(np.unique(found)) == {0, 1}, "one component through both"
    found = written(tmp_path, config_of(4, exclusive_classes=(1, 3), by_section=True), 128)
    assert np.array_equal(found, values.argmax(0))


def test_what_a_class_map_is_made_from() -> None:
    """Of several classes no threshold matters, of a single one no component."""
    config = config_of(4)
    first = classes_identity(config, 128, "it")
    assert first == classes_identity(changed(config, decoding={"threshold": 3}), 127, "it")
    exclusive = changed(config, decoding={"exclusive_classes": (1, 2)})
    by_section = changed(exclusive, decoding={"by_section": True})
    later = changed(config, targets={"affinity_offsets": ((1, 0, 0),)})
    others = [classes_identity(one, 128, "it") for one in (exclusive, by_section, later, config_of(1))]
    others += [classes_identity(config, 128, "another"), classes_identity(config_of(1), 127, "it")]
    assert len({first, *others}) == 7


@pytest.mark.parametrize("exclusive", [(0, 1), (1, 1), (4,), (-1, 2), (2,)])
def test_exclusive_that_are_no_classes_are_told(exclusive: tuple[int, ...]) -> None:
    assert [line for line in config_of(4, exclusive_classes=exclusive).problems() if "exclusive_classes" in line]


def test_exclusive_need_a_semantic_target() -> None:
    targets = {"names": ("affinity",), "weights": (1.0,), "label_channels": (0,)}
    config = changed(small_config(), targets=targets, decoding={"exclusive_classes": (1,)})
    assert [line for line in config.problems() if "exclusive_classes" in line]


def test_another_file_is_not_written_over(tmp_path: Path) -> None:
    prediction_at(tmp_path, random_classes(1, 0))
    np.save(tmp_path / "c.npy", np.zeros(3))
    with pytest.raises(UserError, match="was not made by this program"):
        written(tmp_path, config_of(1), 128)
