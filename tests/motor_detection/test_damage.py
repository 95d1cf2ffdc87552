"""Damaged files of our own and of others, processes that die, and calls that would cost finished work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.checkpoint import load_checkpoint, save_checkpoint
from common.config import as_yaml, configure
from common.errors import BAD_DATA, WRONG_CALL, UserError, data_error
from common.loading import next_batch
from data import import_deepfinder
from motor_detection import eval, predict, train
from motor_detection.config import Config
from motor_detection.dataset import PatchStream, Sample
from motor_detection.patches import PATCH_ARRAYS, read_patch, write_patch
from motor_detection.trainer import CHECKPOINT, KIND
from tests.common_runs import ROOT, environment, said
from tests.motor_detection.small_runs import (
    small_config,
    small_patches,
    tomogram_label,
    tomogram_voxels,
    train_alone,
    write_tomograms,
)
from tests.motor_detection.test_scripts import predict_words


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tomograms, patches and one run of two steps, complete."""
    folder = tmp_path_factory.mktemp("damage")
    write_tomograms(folder, range(7))
    changes = ["train.steps=2", "train.log_every=1", "data.test_fold=3", "inference.min_score=0.001"]
    config = configure(small_config(folder), [], changes)
    (folder / "config.yaml").write_text(as_yaml(config))
    train_alone(config, folder / "runs" / "run", small_patches(config))
    shutil.copy(folder / "config.yaml", folder / "runs" / "run" / "config.yaml")
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy whose run may be spoiled; the data stay where the config says."""
    shutil.copytree(finished / "runs" / "run", tmp_path / "runs" / "run")
    config = configure(small_config(finished), [finished / "config.yaml"], [f"run.root={tmp_path}/runs"])
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    return tmp_path


def words(place: Path, *changes: str) -> list[str]:
    return ["--preset", "kaggle", "--config", str(place / "config.yaml"), *changes]


def config_in(place: Path) -> Config:
    return configure(small_config(place), [place / "config.yaml"], [])


@pytest.mark.parametrize(
    "change", ["data.labels=/nowhere.csv", "data.validation_fold=7", "train.start_from=/nowhere.pt"]
)
def test_fresh_deletes_nothing_before_everything_else_is_right(
    place: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (place / "runs" / "run" / "checkpoints" / "best.pt").read_bytes()
    code, _, problems = said(train.main, words(place, change, "--fresh"), capsys)
    assert code in (WRONG_CALL, BAD_DATA) and problems
    assert (place / "runs" / "run" / "checkpoints" / "best.pt").read_bytes() == before


def test_predict_does_not_write_into_a_run(place: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "run"
    call = ["--checkpoint", str(run / "checkpoints" / "best.pt"), "--input", str(finished / "tomograms" / "tomo_1"),
            "data.voxel_spacing_angstrom=13.1", "--output", str(run)]  # fmt: skip
    before = (run / "config.yaml").read_text()
    for more in ([], ["--fresh"]):
        code, _, problems = said(predict.main, [*call, *more], capsys)
        assert code == WRONG_CALL and problems
        assert (run / "config.yaml").read_text() == before


def test_picks_that_were_cut_and_slices_that_were_replaced_are_picked_again(
    place: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[str] = []
    whole = predict.picks_of
    monkeypatch.setattr(predict, "picks_of", lambda t, *rest: (picked.append(t.tomo_id), whole(t, *rest))[1])
    shutil.copytree(finished / "tomograms" / "tomo_1", place / "tomo_1")
    call = predict_words(place / "runs" / "run", place / "out")
    call[call.index("--input") + 1] = str(place / "tomo_1")
    assert said(predict.main, call, capsys)[0] == said(predict.main, call, capsys)[0] == 0 and len(picked) == 1
    table = place / "out" / "tomograms" / "tomo_1.csv"
    content = table.read_text()
    table.write_text(content.splitlines(keepends=True)[0])
    assert said(predict.main, call, capsys)[0] == 0 and len(picked) == 2 and table.read_text() == content
    target = place / "tomo_1" / "slice_0005.png"  # in place: the folder's own time stays
    target.write_bytes((place / "tomo_1" / "slice_0007.png").read_bytes())
    assert said(predict.main, call, capsys)[0] == 0 and len(picked) == 3


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"step": 99}, "is at step 99 of 2"),
        ({"step": -5}, "is at step -5 of 2"),
        ({"records": [1]}, "last.pt: damaged"),
        ({"records": [{"step": "1"}]}, "last.pt: damaged"),
        ({"scaler": {"a": 1}, "optimizer": {"state": {}, "param_groups": [{}] * 4}}, "last.pt: damaged"),
        ({"weights": {3: torch.zeros(1)}}, "holds no plain weights"),
    ],
)
def test_a_last_checkpoint_that_was_edited_is_told(
    place: Path, damage: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = place / "runs" / "run" / "checkpoints" / "last.pt"
    save_checkpoint(load_checkpoint(last, KIND, CHECKPOINT) | damage, last)
    code, _, problems = said(train.main, words(place), capsys)
    assert code == BAD_DATA and told in problems[0], problems


def test_weights_that_are_no_numbers_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = place / "runs" / "run" / "checkpoints" / "last.pt"
    saved = load_checkpoint(last, KIND, CHECKPOINT)
    saved["model"]["stem.weight"][0] = torch.nan
    save_checkpoint(saved, last)
    code, _, problems = said(train.main, words(place), capsys)
    assert code == BAD_DATA and "stem.weight is not finite" in problems[0]


def test_moments_of_another_shape_are_no_optimizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = place / "runs" / "run" / "checkpoints" / "last.pt"
    saved = load_checkpoint(last, KIND, CHECKPOINT)
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    save_checkpoint(saved, last)
    code, _, problems = said(train.main, words(place), capsys)
    assert code == BAD_DATA and "moments of another shape" in problems[0]


def test_a_run_that_lost_its_best_weights_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "run" / "checkpoints" / "best.pt").unlink()
    code, _, problems = said(train.main, words(place), capsys)
    assert code == BAD_DATA and "best.pt: is missing" in problems[0]


@pytest.mark.parametrize("content", ["", "step,loss\n", "loss\n1\n", "step,loss\n1,0.5\n"])
def test_eval_reads_the_table_of_metrics_before_it_picks(
    place: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "runs" / "run"
    (run / "metrics.csv").write_text(content)
    code, out, problems = said(eval.main, ["--run", str(run)], capsys)
    assert code == BAD_DATA and "metrics.csv: holds no" in problems[0]
    assert not (run / "results" / "picks_test.csv").exists()


@pytest.mark.parametrize("threshold", ["1e400", "NaN", "5", "0.0", "[]"])
def test_a_threshold_out_of_range_blames_the_file_it_stands_in(
    place: Path, threshold: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = place / "runs" / "run" / "results" / "metrics.json"
    judged.parent.mkdir(exist_ok=True)
    judged.write_text(f'{{"task": "one_per_tomogram", "threshold": {threshold}}}')
    call = predict_words(place / "runs" / "run", place / "out")
    call[call.index("--input") + 1] = str(place)
    np.save(place / "tomo.npy", np.random.default_rng(0).integers(0, 255, (40, 40, 40), np.uint8))
    code, _, problems = said(predict.main, call, capsys)
    assert code == BAD_DATA and str(judged) in problems[0]


SPOILED = {
    "smaller": {"patch": np.zeros((16, 16, 16), np.uint8)},
    "flat": {"patch": np.zeros((32, 32), np.uint8)},
    "wide": {"patch": np.zeros((32, 32, 32), np.uint16)},
    "complex": {"patch": np.zeros((32, 32, 32), np.complex64)},
    "words": {"patch": np.array("patch")},
    "spacing of two": {"spacing_angstrom": np.ones(2, np.float32)},
    "spacing 0": {"spacing_angstrom": np.zeros(3, np.float32)},
    "intensity of three": {"intensity": np.ones(3, np.float32)},
    "intensity double": {"intensity": np.ones(2)},
    "more motors": {"motors": np.ones((9, 3), np.float32)},
    "motors of four": {"motors": np.ones((1, 4), np.float32)},
    "motors infinite": {"motors": np.full((1, 3), np.inf, np.float32)},
    "one motor": {"motors": np.ones(3, np.float32)},
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_patch_of_another_shape_or_kind_is_named(finished: Path, tmp_path: Path, name: str) -> None:
    source = next((finished / "patches" / "tomo_2").glob("*.npz"))
    path = tmp_path / source.name
    write_patch(path, read_patch(source, tuple(PATCH_ARRAYS)) | SPOILED[name])
    item = PatchStream([path], (32, 32, 32), 2, 0)[0]
    assert isinstance(item, UserError) and item.exit_code == BAD_DATA and str(path) in item.problems[0]


def test_a_patch_with_flipped_bits_is_a_patch_or_an_error_but_no_traceback(finished: Path, tmp_path: Path) -> None:
    source = next((finished / "patches" / "tomo_2").glob("*.npz"))
    whole, random = source.read_bytes(), np.random.default_rng(0)
    path = tmp_path / "patch.npz"
    for _ in range(300):
        spoiled = bytearray(whole)
        place = int(random.integers(2000)) if random.random() < 0.5 else -int(random.integers(1, 1500))
        spoiled[place] ^= 1 << int(random.integers(8))
        path.write_bytes(spoiled)
        assert isinstance(PatchStream([path], (32, 32, 32), 2, 0)[0], Sample | UserError)


def test_a_damaged_volume_is_skipped_whatever_is_wrong_with_its_header(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(place / "whole.npy", tomogram_voxels(tomogram_label(1)))
    header = bytearray((place / "whole.npy").read_bytes())
    header[header.index(b"(")] = ord("{")
    (place / "broken.npy").write_bytes(header)
    call = predict_words(place / "runs" / "run", place / "out")
    call[call.index("--input") + 1] = str(place)
    code, _, problems = said(predict.main, call, capsys)
    assert code == BAD_DATA and len(problems) == 1 and "broken.npy" in problems[0]
    assert (place / "out" / "tomograms" / "whole.csv").exists()


def test_a_folder_whose_name_is_no_text_is_no_obstacle(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / os.fsdecode(b"d\xff")
    folder.mkdir()
    np.save(folder / "tomo.npy", tomogram_voxels(tomogram_label(1)))
    call = predict_words(place / "runs" / "run", place / "out")
    call[call.index("--input") + 1] = str(folder / "tomo.npy")
    assert said(predict.main, call, capsys)[0] == 0


@pytest.mark.parametrize("moment", [0.3, 0.8])
def test_ctrl_c_while_a_script_imports_ends_it_without_a_traceback(moment: float) -> None:
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "motor_detection" / "predict.py"), "--help"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(moment)
    child.send_signal(signal.SIGINT)
    _, said_there = child.communicate(timeout=60)
    assert "Traceback" not in said_there
    assert child.returncode in (-signal.SIGINT, 130, 0), "0: it had already shown its help"


def test_a_full_or_closed_output_is_no_traceback() -> None:
    script = [sys.executable, str(ROOT / "motor_detection" / "train.py"), "--print-config"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert done.returncode == BAD_DATA and "No space left" in done.stderr and "Traceback" not in done.stderr
    closed = subprocess.run(["bash", "-c", f"{' '.join(script)} >&-"], stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in closed.stderr


class DyingSamples:
    """A data set whose reading process is killed, as by the system when memory runs out."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def test_a_reading_process_that_was_killed_is_told() -> None:
    loader = DataLoader(DyingSamples(), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a reading process died") as caught:
        next(next_batch(loader, "train.workers"))
    assert caught.value.exit_code == BAD_DATA


@pytest.mark.parametrize(
    "content",
    [
        {"volume": np.zeros((4, 5, 6)), "objects_axis012_label": np.zeros(3)},
        {"volume": np.zeros((4, 5, 6)), "objects_axis012_label": np.zeros((3, 2))},
        {"volume": np.zeros((4, 5, 6)), "objects_axis012_label": np.full((3, 4), np.nan)},
        {"volume": np.zeros((4, 5)), "objects_axis012_label": np.zeros((3, 4))},
        {"volume": np.zeros((4, 5, 6))},
        None,
    ],
)
def test_files_that_are_no_simulated_tomograms_are_named(tmp_path: Path, content: dict[str, np.ndarray] | None) -> None:
    path = tmp_path / "tomo3.npz"
    path.write_bytes(b"") if content is None else np.savez(path, **content)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        import_deepfinder.main([str(tmp_path), str(tmp_path / "out")])
    assert caught.value.exit_code == BAD_DATA and str(path) in caught.value.problems[0]


def test_files_of_other_names_or_one_number_twice_are_no_simulated_tomograms(tmp_path: Path) -> None:
    (tmp_path / "tomo1a.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"no tomo\*\.npz"):
        import_deepfinder.main([str(tmp_path), str(tmp_path / "out")])
    for name in ("tomo1.npz", "tomo01.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="two files of one number"):
        import_deepfinder.main([str(tmp_path), str(tmp_path / "out")])


def test_a_stray_variable_of_a_cluster_makes_no_group(place: Path) -> None:
    config = config_in(place)
    done = subprocess.run(
        [sys.executable, str(ROOT / "motor_detection" / "train.py"), *words(place)], capture_output=True, text=True,
        env=environment() | {"RANK": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "is complete" in done.stdout, done.stderr
    assert data_error("a").met_by_all and config.run.name == "run"
