"""Files of a prediction: continued after a kill, shared between processes, opened again with what belongs to them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.errors import UserError
from common.volumes.opening import open_volume
from common.volumes.streaming import ABOUT, FINISHED, open_streamed, partial_folder
from common.volumes.volume import Volume
from em_segmentation import prediction as module
from em_segmentation.config import Config
from em_segmentation.decoding.pipeline import segment_at
from em_segmentation.decoding.settings import settings_of
from em_segmentation.inference import predicted_boxes
from em_segmentation.prediction import (
    Channels,
    Source,
    decoded_channels,
    discard,
    forget_others,
    instances_identity,
    is_finished,
    note_of,
    numbered_on,
    scratch_of,
    segment_sections,
    share_of,
    unfinished_identity,
    whole,
    write_instances,
    write_prediction,
)
from tests.em_segmentation.small_networks import (
    ROOT,
    SCALE,
    alone,
    changed,
    image_at,
    predicted_planes,
    random_model,
    small_config,
    write_checkpoint,
)

SHAPE = (40, 22, 19)
VOXEL_SIZE = (24.0, 12.0, 12.0)


def source_at(folder: Path, sections: tuple[int, int]) -> Source:
    return Source(image_at(folder / "image.npy", SHAPE, 0), SCALE, sections, VOXEL_SIZE, "weights")


def bytes_of(folder: Path, config: Config, sections: tuple[int, int]) -> np.ndarray:
    """What write_prediction must write."""
    image, model = image_at(folder / "image.npy", SHAPE, 0), random_model(config, 0)
    return np.concatenate([part for _, part in predicted_planes(model, image, SCALE, config, sections)], 1)


def blobs(path: Path, channels: int, shape: tuple[int, int, int]) -> Volume:
    """Bytes that decode into many objects: smooth noise."""
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((channels, *shape)), (0, 1, 2, 2))
    values = np.clip(128 + noise / noise.std() * 70, 0, 255).astype(np.uint8)
    np.save(path, values if channels > 1 else values[0])
    note_of(path).write_text("made from")
    return open_volume(path, "czyx" if channels > 1 else "zyx")


@pytest.mark.parametrize("sections", [(0, 40), (7, 29)])
def test_a_prediction_is_written_whole_and_recognised(tmp_path: Path, sections: tuple[int, int]) -> None:
    config, path = small_config(), tmp_path / "out" / "prediction.npy"
    path.parent.mkdir()
    source = source_at(tmp_path, sections)
    with alone():
        found = write_prediction(random_model(config, 0), source, config, path)
        assert np.array_equal(whole(found), bytes_of(tmp_path, config, sections))
        assert found.shape == source.shape
        written = path.stat().st_mtime_ns
        write_prediction(random_model(config, 1), source, config, path)  # other weights, but said to be the same
        assert path.stat().st_mtime_ns == written, "a finished output is not computed anew"
        assert {p.name for p in path.parent.iterdir()} == {path.name, note_of(path).name}
        other = changed(config, inference={"tta": "flips"})
        write_prediction(random_model(config, 0), source, other, path)
        assert path.stat().st_mtime_ns != written, "other settings, another prediction"


def test_what_a_prediction_is_made_from(tmp_path: Path) -> None:
    """Whatever changes its bytes or its header changes its identity; how the same file is named does not."""
    config, source = small_config(), source_at(tmp_path, (0, 40))
    axes = open_volume(tmp_path / "image.npy", "xyz")
    relative = open_volume(os.path.relpath(tmp_path / "image.npy"), "auto")
    others = [
        dataclasses.replace(source, image=axes),
        dataclasses.replace(source, sections=(0, 39)),
        dataclasses.replace(source, weights="others"),
        dataclasses.replace(source, voxel_size_nm=(8.0, 8.0, 8.0)),
        dataclasses.replace(source, scale=dataclasses.replace(SCALE, mean=(1.0,))),
    ]
    identities = [one.identity(config) for one in (source, *others)]
    identities.append(source.identity(changed(config, inference={"overlap": 0.25})))
    assert len(set(identities)) == len(identities)
    assert dataclasses.replace(source, image=relative).identity(config) == identities[0]
    assert source.identity(changed(config, decoding={"threshold": 3})) == identities[0]
    np.save(tmp_path / "image.npy", np.load(tmp_path / "image.npy"))  # mended in place, perhaps
    assert source.identity(config) != identities[0]


def test_what_instances_are_made_from() -> None:
    """Targets of one form must not be taken for each other: a boundary map is no map of the inside."""
    config = changed(
        small_config(),
        targets={"names": ("semantic", "boundary", "affinity"), "weights": (1.0,) * 3, "label_channels": (0,) * 3},
    )
    targets = ("semantic", "membrane", "boundary", "affinity")
    made_of = [changed(config, decoding={"target": target}) for target in targets]
    assert len({instances_identity(one, 100, "prediction") for one in made_of}) == len(targets)


def test_the_key_inside_a_file_belongs_to_the_identity(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "image.h5", "w") as file:
        for name in ("a", "b"):
            file[name] = np.load(image_at(tmp_path / "image.npy", SHAPE, 0).path)
    sources = [
        Source(open_volume(f"{tmp_path}/image.h5:{key}", "auto"), SCALE, (0, 40), VOXEL_SIZE, "weights") for key in "ab"
    ]
    assert sources[0].identity(small_config()) != sources[1].identity(small_config())


def test_a_foreign_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "prediction.npy"
    path.write_text("a diary")
    for _ in range(2):
        with alone(), pytest.raises(UserError, match=r"exists and was not made by this program; remove it") as caught:
            write_prediction(random_model(small_config(), 0), source_at(tmp_path, (0, 40)), small_config(), path)
        assert caught.value.exit_code == 2
    assert path.read_text() == "a diary"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="was not made by this program"):
        is_finished(path, "anything")


def test_the_unfinished_output_of_another_config_is_told_and_can_be_dropped(tmp_path: Path) -> None:
    config, path, source = small_config(), tmp_path / "prediction.npy", source_at(tmp_path, (0, 40))
    streamed = open_streamed(path, (4, *SHAPE), np.dtype(np.uint8), "another")
    streamed.write(0, np.zeros((4, 3, *SHAPE[1:]), np.uint8))
    assert unfinished_identity(path) == "another"
    with alone(), pytest.raises(UserError, match="unfinished output of other settings: identity another") as caught:
        write_prediction(random_model(config, 0), source, config, path)
    assert caught.value.exit_code == 2
    forget_others(path, "another")
    assert unfinished_identity(path) == "another", "its own work is kept"
    forget_others(path, source.identity(config))
    assert unfinished_identity(path) is None
    with alone():
        assert np.array_equal(
            whole(write_prediction(random_model(config, 0), source, config, path)), bytes_of(tmp_path, config, (0, 40))
        )


@pytest.mark.parametrize("moment", ["before the target", "after the target"])
def test_a_kill_between_the_target_and_its_note_loses_nothing(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while finishing: the next call must neither take half a file for a whole one nor call it a stranger's."""
    config, path, source = small_config(), tmp_path / "prediction.npy", source_at(tmp_path, (0, 40))

    class Killed(Exception):
        pass

    finish = module.StreamedVolume.finish

    def dies(streamed: Any, voxel_size_nm: Any) -> None:
        if moment == "after the target":
            finish(streamed, voxel_size_nm)
        raise Killed

    with monkeypatch.context() as patched, alone(), pytest.raises(Killed):
        patched.setattr(module.StreamedVolume, "finish", dies)
        write_prediction(random_model(config, 0), source, config, path)
    with monkeypatch.context() as patched, alone():
        patched.setattr(module, "predicted_boxes", lambda *_: pytest.fail("all planes were finished"))
        found = write_prediction(random_model(config, 0), source, config, path)
    assert np.array_equal(whole(found), bytes_of(tmp_path, config, (0, 40)))


def test_an_old_prediction_under_the_note_of_a_new_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """The note is written first; until the new file has taken its place the old one is not the new one."""
    path = tmp_path / "prediction.npy"
    np.save(path, np.zeros((2, 3, 4), np.uint8))
    note_of(path).write_text("old")
    assert is_finished(path, "old")
    streamed = open_streamed(path, (1, 2, 3, 4), np.dtype(np.uint8), "new")
    assert is_finished(path, "old"), "unfinished work of others does not spoil what is there"
    streamed.write(0, np.ones((2, 3, 4), np.uint8))
    note_of(path).write_text("new")
    assert not is_finished(path, "new")
    streamed.finish(None)
    assert is_finished(path, "new")


KILLED = """
import sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from common.volumes.opening import open_volume
from em_segmentation.prediction import Source, write_prediction
from tests.em_segmentation.small_networks import SCALE, alone, random_model, small_config
folder = Path({folder!r})
source = Source(open_volume(folder / "image.npy", "auto"), SCALE, (0, 40), (24.0, 12.0, 12.0), "weights")
with alone():
    write_prediction(random_model(small_config(), 0), source, small_config(), folder / "prediction.npy")
"""


def test_killed_in_the_middle_and_continued_it_is_the_same_file(tmp_path: Path) -> None:
    """kill -9 once some planes are finished, three times; each call continues, the last ends in the same bytes."""
    config, path = small_config(), tmp_path / "prediction.npy"
    expected = bytes_of(tmp_path, config, (0, 40))
    marks = partial_folder(path) / FINISHED
    code = textwrap.dedent(KILLED).format(root=str(ROOT), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: child.poll() is not None or (marks.exists() and len(list(marks.iterdir())) >= 1))
    assert child.returncode is None, "it ended before it was killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists(), "killed before the end"
    kept = {mark.name for mark in marks.iterdir()}
    assert 1 <= len(kept) <= 4
    seen: list[tuple[int, int]] = []
    model, source = random_model(config, 0), source_at(tmp_path, (0, 40))

    def watched(*arguments: Any) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
        seen.append(arguments[4])
        yield from predicted_boxes(*arguments)

    with pytest.MonkeyPatch.context() as patched, alone():
        patched.setattr(module, "predicted_boxes", watched)
        found = write_prediction(model, source, config, path)
    assert np.array_equal(whole(found), expected)
    assert 0 < sum(last - first for first, last in seen) < 40, "only what was missing was computed"


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited two minutes"
        time.sleep(0.002)


def test_shares_part_what_is_missing_where_rows_begin() -> None:
    starts = [0, 8, 16, 24, 32]
    missing = [(3, 10), (16, 24), (25, 40)]
    for ranks in (1, 2, 3, 7):
        shares = [share_of(missing, starts, rank, ranks) for rank in range(ranks)]
        planes = [z for share in shares for first, last in share for z in range(first, last)]
        assert planes == [z for first, last in missing for z in range(first, last)], "each once, in order"
        for share in shares[1:]:
            assert not share or share[0][0] in (3, 16, 25, *starts), "no row of tiles is two ranks'"
    assert share_of(missing, starts, 0, 1) == missing
    assert share_of([], starts, 0, 3) == []


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    config = small_config()
    write_checkpoint(config, tmp_path / "best.pt", 0)
    image_at(tmp_path / "image.npy", SHAPE, 0)
    words = ["--checkpoint", str(tmp_path / "best.pt"), "--input", str(tmp_path / "image.npy")]
    script = str(ROOT / "em_segmentation" / "predict.py")
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"],
    }
    found = {}
    for name, launcher in launchers.items():
        outputs = ["--output", str(tmp_path / f"{name}.npy"), "--instances", str(tmp_path / f"{name}_ids.npy")]
        done = subprocess.run(
            [*launcher, script, *words, *outputs, "decoding.target=affinity"],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{name}_ids.npy") == 1, "told once"
        found[name] = [(tmp_path / f"{name}{end}.npy").read_bytes() for end in ("", "_ids")]
    assert found["one"] == found["two"]


@pytest.mark.parametrize("target", ["affinity", "boundary", "semantic", "membrane"])
def test_instances_block_by_block_are_those_of_the_whole(tmp_path: Path, target: str) -> None:
    name = "semantic" if target == "membrane" else target
    config = changed(
        small_config(),
        targets={"names": (name,), "weights": (1.0,), "label_channels": (0,)},
        decoding={"target": target, "method": "components" if target == "semantic" else "watershed", "min_size": 20,
                  "small": "remove"},
    )  # fmt: skip
    prediction = blobs(tmp_path / "p.npy", 3 if target == "affinity" else 1, (26, 33, 30))
    threshold = 170 if target == "semantic" else 128
    at_once = write_instances(prediction, config, threshold, VOXEL_SIZE, "it", tmp_path / "whole.npy")
    small = changed(config, decoding={"block_size": (9, 16, 11)})
    in_blocks = write_instances(prediction, small, threshold, VOXEL_SIZE, "it", tmp_path / "blocks.npy")
    assert in_blocks.dtype == at_once.dtype
    assert np.array_equal(whole(in_blocks), whole(at_once))
    assert len(np.unique(whole(at_once))) > 5
    assert {p.name for p in tmp_path.glob(".blocks*")} == {note_of(tmp_path / "blocks.npy").name}, "nothing left over"


def test_a_mask_and_a_membrane_are_decoded_from_their_own_side(tmp_path: Path) -> None:
    """The same bytes: objects where the mask is bright, objects where the membrane is dark."""
    values = np.zeros((4, 9, 9), np.uint8)
    values[:, 2:7, 2:7] = 255
    np.save(tmp_path / "p.npy", values)
    prediction = open_volume(tmp_path / "p.npy", "zyx")
    targets = {"names": ("semantic",), "weights": (1.0,), "label_channels": (0,)}
    found = {}
    for target in ("semantic", "membrane"):
        config = changed(small_config(), targets=targets, decoding={"target": target, "method": "components"})
        found[target] = whole(write_instances(prediction, config, 128, VOXEL_SIZE, "it", tmp_path / f"{target}.npy"))[0]
    assert np.array_equal(found["semantic"], (values > 0).astype(int))
    assert np.array_equal(found["membrane"], (values == 0).astype(int))


def test_the_channels_that_are_decoded(tmp_path: Path) -> None:
    targets = {"names": ("lsd", "boundary", "affinity"), "weights": (1.0,) * 3, "label_channels": (0,) * 3}
    config = changed(small_config(), targets=targets, decoding={"target": "affinity"})
    prediction = blobs(tmp_path / "p.npy", 4, (3, 8, 9))
    assert np.array_equal(whole(decoded_channels(prediction, config)), whole(prediction)[1:4])
    boundary = decoded_channels(prediction, changed(config, decoding={"target": "boundary"}))
    assert (boundary.num_channels, boundary.shape) == (1, (3, 8, 9))
    assert np.array_equal(boundary.read_channels((1, 2, 3), (2, 3, 4)), whole(prediction)[:1, 1:3, 2:5, 3:7])
    inverted = Channels(prediction, slice(2, 3), True)
    assert np.array_equal(whole(inverted), 255 - whole(prediction)[2:3])


def test_killed_between_blocks_with_other_block_sizes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another size left over by a killed call are no obstacle."""
    config = changed(small_config(), targets={"names": ("boundary",), "weights": (1.0,), "label_channels": (0,)},
                     decoding={"target": "boundary", "block_size": (9, 16, 11)})  # fmt: skip
    prediction = blobs(tmp_path / "p.npy", 1, (20, 21, 22))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "write_decoded", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_instances(prediction, config, 128, VOXEL_SIZE, "it", tmp_path / "ids.npy")
    assert scratch_of(tmp_path / "ids.npy").exists()
    other = changed(config, decoding={"block_size": (8, 12, 8)})
    found = write_instances(prediction, other, 128, VOXEL_SIZE, "it", tmp_path / "ids.npy")
    at_once = write_instances(prediction, small_like(config), 128, VOXEL_SIZE, "it", tmp_path / "whole.npy")
    assert np.array_equal(whole(found), whole(at_once))
    assert not scratch_of(tmp_path / "ids.npy").exists()


def small_like(config: Config) -> Config:
    return changed(config, decoding={"block_size": (128, 512, 512)})


def test_discard_takes_all_that_is_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    open_streamed(path, (1, 2, 3, 4), np.dtype(np.uint8), "it")
    scratch_of(path).mkdir()
    (tmp_path / "other.npy").touch()
    discard(path)
    discard(path)
    assert [p.name for p in tmp_path.iterdir()] == ["other.npy"]


@pytest.mark.parametrize("name", ["ids.npy", "ids.h5", "ids.zarr", "ids.tif", "ids"])
def test_instances_open_again_in_every_format(tmp_path: Path, name: str) -> None:
    """Shape, ids, type; the voxel size where the format holds one."""
    for package, suffix in (("h5py", ".h5"), ("zarr", ".zarr"), ("tifffile", ".tif")):
        if name.endswith(suffix):
            pytest.importorskip(package)
    config = changed(small_config(), targets={"names": ("boundary",), "weights": (1.0,), "label_channels": (0,)},
                     decoding={"target": "boundary"})  # fmt: skip
    prediction = blobs(tmp_path / "p.npy", 1, (5, 40, 37))
    plain = segment_at(whole(prediction), settings_of(config.decoding, config.targets, 100), (100,))[0]
    found = write_instances(prediction, config, 100, VOXEL_SIZE, "it", tmp_path / name)
    assert found.shape == (5, 40, 37)
    assert found.dtype == plain.dtype
    assert np.array_equal(whole(found)[0], plain)
    if name not in ("ids.npy", "ids"):
        np.testing.assert_allclose(found.voxel_size_nm, VOXEL_SIZE, rtol=1e-4)
    assert is_finished(tmp_path / name, instances_identity(config, 100, "it"))


def test_png_that_cannot_hold_the_ids_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(small_config(), targets={"names": ("boundary",), "weights": (1.0,), "label_channels": (0,)},
                     decoding={"target": "boundary"})  # fmt: skip
    monkeypatch.setattr(module, "segment_at", lambda *_: [np.full((2, 3, 4), 70000, np.uint32)])
    with pytest.raises(UserError, match=r"PNG slices hold no .*uint32.*: write \.h5"):
        write_instances(blobs(tmp_path / "p.npy", 1, (2, 3, 4)), config, 1, VOXEL_SIZE, "it", tmp_path / "slices")


@pytest.mark.parametrize("name", ["p.npy", "p.h5", "p.zarr", "p.tif"])
def test_probabilities_open_again_in_every_format(tmp_path: Path, name: str) -> None:
    for package, suffix in (("h5py", ".h5"), ("zarr", ".zarr"), ("tifffile", ".tif")):
        if name.endswith(suffix):
            pytest.importorskip(package)
    config, source = small_config(), source_at(tmp_path, (3, 21))
    with alone():
        found = write_prediction(random_model(config, 0), source, config, tmp_path / name)
    again = open_volume(tmp_path / name, "auto")
    for volume in (found, again):
        assert (volume.num_channels, volume.shape, volume.dtype) == (4, (18, *SHAPE[1:]), np.uint8)
        assert np.array_equal(whole(volume), bytes_of(tmp_path, config, (3, 21)))
    if name != "p.npy":
        np.testing.assert_allclose(again.voxel_size_nm, VOXEL_SIZE, rtol=1e-4)


def test_sections_by_themselves(tmp_path: Path) -> None:
    """by_section: each section's own result, ids numbered on; no object reaches from one section into the next."""
    config = changed(small_config(), targets={"names": ("boundary",), "weights": (1.0,), "label_channels": (0,)},
                     decoding={"target": "boundary", "by_section": True})  # fmt: skip
    prediction = blobs(tmp_path / "p.npy", 1, (4, 30, 31))
    settings = settings_of(config.decoding, config.targets, 128)
    found = segment_sections(whole(prediction), settings, (200, 128), config.decoding)
    for labels, threshold in zip(found, (200, 128), strict=True):
        seen: set[int] = set()
        for z in range(4):
            own = segment_at(whole(prediction)[:, z : z + 1], settings, (threshold,))[0][0]
            ids = set(np.unique(labels[z]).tolist()) - {0}
            assert not ids & seen
            seen |= ids
            pairs = set(zip(own.ravel().tolist(), labels[z].ravel().tolist(), strict=True))
            assert len(pairs) == len(np.unique(own)) == len(np.unique(labels[z]))
        assert seen == set(range(1, len(seen) + 1))
    written = write_instances(prediction, config, 128, VOXEL_SIZE, "it", tmp_path / "ids.npy")
    assert np.array_equal(whole(written)[0], found[1])


def test_numbering_on_widens_the_type() -> None:
    sections = [np.full((1, 2, 2), 200, np.uint8), np.array([[[0, 100], [1, 2]]], np.uint8)]
    joined = numbered_on(sections)
    assert joined.dtype == np.uint16
    assert joined.tolist() == [[[200, 200], [200, 200]], [[0, 300], [201, 202]]]
    assert numbered_on([np.zeros((1, 1, 1), np.uint8)] * 2).tolist() == [[[0]], [[0]]]


def test_the_about_file_of_a_strange_folder_is_told(tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    streamed = open_streamed(path, (1, 2, 3, 4), np.dtype(np.uint8), "it")
    (streamed.folder / ABOUT).write_text(json.dumps({"shape": 3}))
    with pytest.raises(UserError, match=r"about\.json: damaged or of another kind .*; remove this folder"):
        unfinished_identity(path)


def test_torch_is_left_as_it_was() -> None:
    assert not torch.is_inference_mode_enabled(), "generators in inference mode give it back between planes"
