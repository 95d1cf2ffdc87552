"""Patches: a pure function of seed and position, drawn by weight and foreground; validation places that leave no gap."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import BAD_DATA, WRONG_CALL, UserError
from common.interrupt import ignore_interrupts
from common.streams import micro_batches
from em_segmentation.augmentation import Patch
from em_segmentation.config import Config
from em_segmentation.dataset import (
    PatchList,
    PatchStream,
    foreground_share,
    grid_starts,
    open_volumes,
    patch_stream,
    stack,
    validation_places,
    validation_size,
)
from tests.em_segmentation.small_runs import SHAPES, changed, small_config, write_volumes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("dataset")
    write_volumes(folder)
    return small_config(folder)


def stream_of(config: Config, *changes: str) -> PatchStream:
    config = changed(config, *changes)
    return patch_stream(open_volumes(config), config)


def taken(stream: PatchStream, positions: range) -> Patch:
    """A batch of the patches at these positions."""
    batch = stack([stream[position] for position in positions])
    assert isinstance(batch, Patch), batch
    return batch


def same(one: Patch, other: Patch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Patch))


def refusal(config: Config, exit_code: int) -> str:
    with pytest.raises(UserError) as caught:
        open_volumes(config)
    assert caught.value.exit_code == exit_code and len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


def test_a_patch_is_a_pure_function_of_seed_and_position(small: Config) -> None:
    one, again, other = stream_of(small), stream_of(small), stream_of(small, "system.seed=1")
    first = taken(one, range(10))
    assert same(taken(again, range(9, 10)), taken(one, range(9, 10))), "whatever was drawn before"
    assert same(first, taken(again, range(10))) and not same(first, taken(other, range(10)))
    assert first.image.shape == (10, 1, 8, 16, 16) and first.labels.shape == (10, 1, 8, 16, 16)
    assert first.position.tolist() == list(range(10))
    assert len({tuple(image.flatten().tolist()) for image in first.image}) == 10


def test_patches_do_not_depend_on_who_reads_them(small: Config) -> None:
    """Reading processes, micro-batches and ranks only share the positions out."""
    stream = stream_of(small)
    expected = taken(stream, range(8))
    plans: list[tuple[Any, int]] = [
        (micro_batches(0, 2, 4, 2, 0, 1), 0), (micro_batches(0, 2, 4, 2, 0, 1), 2), (micro_batches(0, 2, 4, 4, 0, 1), 3)
    ]  # fmt: skip
    for plan, workers in plans:
        loader = DataLoader(
            stream, batch_sampler=plan, num_workers=workers, collate_fn=stack, worker_init_fn=ignore_interrupts
        )
        assert same(stack(list(loader)), expected)  # type: ignore[arg-type]
    ranks = [taken(stream, range(*ends)) for rank in (0, 1) for ends in
             ((b[0], b[-1] + 1) for b in micro_batches(0, 2, 4, 2, rank, 2))]  # fmt: skip
    assert same(stack([ranks[0], ranks[2], ranks[1], ranks[3]]), expected)  # type: ignore[arg-type]


def test_a_patch_is_what_lies_at_its_place(small: Config) -> None:
    stream = stream_of(small)
    for position in range(20):
        drawn, patch = stream.draw(position), taken(stream, range(position, position + 1))
        name = drawn.volume.image.path.name.removesuffix("_image.npy")
        labels = np.load(drawn.volume.image.path.with_name(f"{name}_labels.npy"))
        box = tuple(slice(c, c + edge) for c, edge in zip(drawn.corner, (8, 16, 16), strict=True))
        assert (patch.labels[0, 0].numpy() == labels[box]).all()
        assert str(list(drawn.corner)) in stream.name(position) and f"{name}_image.npy" in stream.name(position)


def volumes_drawn(stream: PatchStream, count: int) -> np.ndarray:
    """How often each volume is drawn."""
    paths = [str(volume.image.path) for volume in stream.volumes]
    return np.bincount([paths.index(str(stream.draw(p).volume.image.path)) for p in range(count)], minlength=len(paths))


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (1.0, 9.0)])
def test_volumes_are_drawn_by_their_weights_or_their_voxels(small: Config, weights: tuple[float, ...]) -> None:
    """1500 draws; within four standard deviations."""
    stream, count = stream_of(small, f"data.train_weights={list(weights)}"), 1500
    wanted = np.array(weights if weights else [np.prod(SHAPES[name]) for name in ("train_0", "train_1")], float)
    wanted /= wanted.sum()
    found = volumes_drawn(stream, count) / count
    assert abs(found[0] - wanted[0]) < 4 * np.sqrt(wanted.prod() / count)


def test_corners_reach_both_ends_of_every_axis_and_nothing_beyond(small: Config) -> None:
    stream = stream_of(small, "data.train_weights=[1,1000]")
    corners = np.array([stream.draw(position).corner for position in range(400)])
    assert (corners.min(0) == 0).all() and (corners.max(0) == np.array(SHAPES["train_1"]) - (8, 16, 16)).all()


def sparse(folder: Path, name: str) -> Path:
    """One labelled corner in a volume of background, with a bright spot in it."""
    labels = np.zeros((12, 40, 44), np.uint16)
    labels[:4, :9, :9] = 5
    np.save(folder / f"{name}_image.npy", np.random.default_rng(0).integers(0, 99, labels.shape, np.uint8))
    np.save(folder / f"{name}_labels.npy", labels)
    return folder


def sparse_config(small: Config, folder: Path, *changes: str) -> Config:
    image, label = f"data.train_image={folder}/sparse_image.npy", f"data.train_label={folder}/sparse_labels.npy"
    return changed(small, image, label, *changes)


def test_patches_with_too_little_foreground_are_drawn_again(small: Config, tmp_path: Path) -> None:
    sparse(tmp_path, "sparse")

    def shares(*changes: str) -> np.ndarray:
        config = sparse_config(small, tmp_path, *changes)
        batch = taken(patch_stream(open_volumes(config), config), range(150))
        return (batch.labels > 0).float().mean((1, 2, 3, 4)).numpy()

    free, asked = shares(), shares("data.min_foreground=0.02", "data.foreground_tries=100")
    assert (free < 0.02).mean() > 0.6 and (asked >= 0.02).all()
    few = shares("data.min_foreground=0.02", "data.foreground_tries=3")
    assert (few >= 0.02).mean() == pytest.approx(1 - (free < 0.02).mean() ** 3, abs=0.15), "then taken all the same"


def test_foreground_is_that_of_the_first_target_where_it_is_annotated(small: Config) -> None:
    labels = np.zeros((2, 2, 2, 4), np.int64)
    labels[1, 0, 0] = (0, 1, 2, 2)  # of 16 voxels
    known = np.ones((1, 2, 2, 4), np.bool_)
    targets = dataclasses.replace(small.targets, names=("semantic",), label_channels=(1,))
    assert foreground_share(labels, known, targets) == 3 / 16
    assert foreground_share(labels, known, dataclasses.replace(targets, label_channels=(0,))) == 0
    assert foreground_share(labels, known, dataclasses.replace(targets, semantic_only=(2, 7))) == 2 / 16
    known[0, 0, 0, 3] = False
    assert foreground_share(labels, known, targets) == 2 / 16
    boundary = dataclasses.replace(targets, names=("boundary",), semantic_only=(2,))
    assert foreground_share(labels, known, boundary) == 2 / 16, "semantic_only is of the semantic target"


def test_a_cache_changes_nothing_but_where_voxels_come_from(small: Config) -> None:
    for sections in ("null", "[2, 11]"):
        lazy, cached = (
            open_volumes(changed(small, f"data.use_cache={cache}", f"data.train_sections={sections}"))
            for cache in ("false", "true")
        )
        assert lazy.digest == cached.digest, "a run may be continued with and without"
        streams = [patch_stream(volumes, small) for volumes in (lazy, cached)]
        assert same(taken(streams[0], range(20)), taken(streams[1], range(20)))
        assert [streams[0].name(p) for p in range(9)] == [streams[1].name(p) for p in range(9)]


def test_sections_bound_what_is_drawn(small: Config) -> None:
    stream = stream_of(small, "data.train_sections=[3, 12]")
    firsts = {stream.name(position).split("= [")[1].split(",")[0] for position in range(60)}
    assert firsts == {"3", "4"}, "patches of 8 sections in [3, 12)"


def test_masked_voxels_are_not_annotated(small: Config, tmp_path: Path) -> None:
    masks = []
    for name in ("train_0", "train_1"):
        mask = np.zeros(SHAPES[name], np.uint8)
        mask[:, :, 12:] = 1
        np.save(tmp_path / f"{name}.npy", mask)
        masks.append(str(tmp_path / f"{name}.npy"))
    config = changed(small, f"data.train_mask=[{', '.join(masks)}]")
    stream = patch_stream(open_volumes(config), config)
    for position in range(20):
        patch, (_, _, x) = taken(stream, range(position, position + 1)), stream.draw(position).corner
        assert (patch.annotated[0, 0, 0, 0] == torch.arange(x, x + 16).ge(12)).all()


@pytest.mark.parametrize(("n", "edge"), [(8, 8), (9, 8), (17, 8), (100, 7), (23, 22), (5, 1)])
def test_grids_cover_an_axis_with_the_fewest_patches(n: int, edge: int) -> None:
    starts = grid_starts(n, edge)
    covered = sorted({cell for start in starts for cell in range(start, start + edge)})
    assert covered == list(range(n)) and len(starts) == -(-n // edge) and starts == sorted(set(starts))


def test_validation_places_cover_the_volumes_or_are_spread_over_them(small: Config) -> None:
    volumes, size = open_volumes(changed(small, "data.val_patches=1000")).train, (8, 16, 16)
    covered = [np.zeros(volume.shape, int) for volume in volumes]
    places = validation_places(volumes, size, 1000)
    for number, corner in places:
        covered[number][tuple(slice(c, c + edge) for c, edge in zip(corner, size, strict=True))] += 1
    assert all((seen > 0).all() for seen in covered) and len(places) == len(set(places)) == 2 * 2 * 3 + 2 * 2 * 2
    few = validation_places(volumes, size, 4)
    assert len(few) == 4 and set(few) < set(places) and {number for number, _ in few} == {0, 1}
    assert few[0] == places[0] and few[-1] == places[-1]
    assert validation_places(volumes, size, 1) == [places[0]] and validation_places([], size, 4) == []


def test_validation_patches_shrink_to_small_volumes_in_steps_that_a_network_takes(small: Config) -> None:
    volumes = open_volumes(small).val  # (13, 22, 34)
    assert validation_size(volumes, (8, 16, 16)) == (8, 16, 16)
    assert validation_size(volumes, (24, 48, 20)) == (8, 16, 20)  # multiples of 8, 16 and 4
    assert open_volumes(changed(small, "data.val_sections=[0,9]")).val[0].shape[0] == 9
    with pytest.raises(UserError, match="data.patch_size"):
        open_volumes(changed(small, "data.val_sections=[0,7]"))


def test_validation_patches_are_the_volume_at_their_places(small: Config) -> None:
    volumes = open_volumes(small).val
    places = validation_places(volumes, (8, 16, 16), 5)
    patches = PatchList(volumes, places, (8, 16, 16))
    labels = np.load(small.data.val_label[0])
    for index, (_, corner) in enumerate(places):
        patch = patches[index]
        assert isinstance(patch, Patch) and patch.position.tolist() == [index]
        box = tuple(slice(c, c + edge) for c, edge in zip(corner, (8, 16, 16), strict=True))
        assert (patch.labels[0, 0].numpy() == labels[box]).all()


def test_an_error_in_a_patch_is_an_item_and_the_first_of_a_batch_is_told(small: Config, tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(70, 16, 16)).astype(np.float32)
    image[1] = np.nan  # not among the sampled sections
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "labels.npy", np.ones(image.shape, np.uint8))
    config = changed(
        small, f"data.train_image={tmp_path}/image.npy", f"data.train_label={tmp_path}/labels.npy",
        "data.train_sections=[0, 70]",
    )  # fmt: skip
    stream = patch_stream(open_volumes(config), config)
    broken = next(p for p in itertools.count() if stream.draw(p).corner[0] < 2)
    whole = next(p for p in itertools.count() if stream.draw(p).corner[0] > 2)
    item = stream[broken]
    assert isinstance(item, UserError) and item.exit_code == BAD_DATA and "NaN" in item.problems[0]
    assert stack([stream[whole], item, stream[whole]]) is item


def test_a_patch_larger_than_a_volume_is_told(small: Config) -> None:
    told = refusal(changed(small, "data.patch_size=[8,40,16]", "augmentation.turn=0"), WRONG_CALL)
    assert "data.patch_size: [8, 40, 16]" in told and "[14, 26, 38]" in told and "smaller patch" in told
    told = refusal(changed(small, "data.val_sections=[2, 9]"), WRONG_CALL)
    assert "val_0_image.npy" in told, "validation volumes must hold one too"


def test_channels_that_no_network_or_target_expects_are_told(small: Config) -> None:
    told = refusal(changed(small, "model.in_channels=2"), WRONG_CALL)
    assert "model.in_channels" in told and "1 channels" in told
    told = refusal(changed(small, "targets.label_channels=[0,1]"), WRONG_CALL)
    assert "targets.label_channels" in told and "at least 2" in told


def test_no_training_volume_and_no_labels_are_told(small: Config) -> None:
    told = refusal(changed(small, "data.train_image=[]", "data.train_label=[]"), WRONG_CALL)
    assert "data.train_image" in told
    assert "data.val_label" in refusal(changed(small, "data.val_label=[]"), WRONG_CALL)


def test_weights_of_another_number_than_volumes_are_told(small: Config) -> None:
    assert "one per training volume (2), got 3" in refusal(changed(small, "data.train_weights=[1,2,3]"), WRONG_CALL)


def test_volumes_of_different_voxel_sizes_are_told(small: Config, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    images = []
    for number, name in enumerate(("train_0", "train_1")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["raw"] = np.load(small.data.train_image[number])
            file["raw"].attrs["resolution"] = (20.0, 10.0 + number, 10.0 + number)
        images.append(f"{tmp_path}/{name}.h5")
    told = refusal(changed(small, f"data.train_image=[{', '.join(images)}]", "data.voxel_size_nm=null",
                           "data.val_image=[]", "data.val_label=[]"), WRONG_CALL)  # fmt: skip
    assert "data.voxel_size_nm" in told and "(20.0, 10.0, 10.0)" in told and "(20.0, 11.0, 11.0)" in told
