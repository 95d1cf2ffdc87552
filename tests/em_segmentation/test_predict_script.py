"""predict.py as people call it: good calls, and every bad one as one line with its exit code."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.errors import UserError
from common.volumes.opening import open_volume
from common.volumes.streaming import open_streamed, partial_folder
from em_segmentation import predict as script
from em_segmentation import prediction
from em_segmentation.prediction import note_of, scratch_of, whole
from tests.em_segmentation.small_networks import changed, grey_volume, run_script, small_config, write_checkpoint

SHAPE = (10, 20, 17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint and a volume."""
    write_checkpoint(small_config(), tmp_path / "best.pt", 0)
    np.save(tmp_path / "image.npy", grey_volume(SHAPE, 0))
    return tmp_path


def call(folder: Path, *words: str) -> int:
    """main() in this process, with the folder's checkpoint and volume where the words name no other."""
    names = [word.partition("=")[0] for word in words]
    given = {"--checkpoint": folder / "best.pt", "--input": folder / "image.npy"}
    defaults = [f"{flag}={path}" for flag, path in given.items() if flag not in names]
    threads = torch.get_num_threads()
    try:
        return script.main([*defaults, *words])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def complaint(folder: Path, *words: str) -> UserError:
    """The one-line error of a bad call."""
    with pytest.raises(UserError) as caught:
        call(folder, *words)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert "\n" not in caught.value.problems[0]
    return caught.value


def test_a_call_writes_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, instances = folder / "new" / "p.npy", folder / "ids.npy"
    assert call(folder, f"--output={output}", f"--instances={instances}", "decoding.target=affinity") == 0
    said = capsys.readouterr().out
    assert "channels affinity 0:3, semantic 3:4" in said
    assert "[10, 20, 17] voxels of [24.0, 12.0, 12.0] nm" in said
    assert said.splitlines()[-2:] == [str(output), str(instances)]
    found, ids = open_volume(output, "auto"), open_volume(instances, "auto")
    assert (found.num_channels, found.shape, found.dtype) == (4, SHAPE, np.uint8)
    assert ids.shape == SHAPE
    left = {p.name for p in folder.iterdir() if not p.name.endswith(".lock")}
    assert left == {"best.pt", "image.npy", "new", "ids.npy", note_of(instances).name}


def test_the_same_call_again_recognises_what_is_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where only instances were wanted, whose probabilities are gone: nothing is predicted twice."""
    words = [f"--instances={folder / 'ids.npy'}", "decoding.target=affinity"]
    for number in (1, 2):
        with pytest.MonkeyPatch.context() as patched:
            if number == 2:
                patched.setattr(script, "write_prediction", lambda *_: pytest.fail("it is finished"))
            call(folder, *words)
        assert capsys.readouterr().out.splitlines()[-1] == str(folder / "ids.npy")
        assert not list(folder.glob(".ids.npy.prob*")), "what only instances were made of is taken away"
    both = [*words, f"--output={folder / 'p.npy'}"]
    call(folder, *both)
    written = [(folder / name).stat().st_mtime_ns for name in ("p.npy", "ids.npy")]
    call(folder, *both)
    assert [(folder / name).stat().st_mtime_ns for name in ("p.npy", "ids.npy")] == written


def test_another_threshold_makes_other_instances_of_the_same_probabilities(folder: Path) -> None:
    words = [f"--output={folder / 'p.npy'}", f"--instances={folder / 'ids.npy'}", "decoding.target=affinity"]
    words += ["decoding.min_depth=0", "decoding.smoothing=[0,0,0]"]
    call(folder, *words, "decoding.threshold=250")
    written = (folder / "p.npy").stat().st_mtime_ns
    first = np.load(folder / "ids.npy")
    call(folder, *words, "decoding.threshold=5")
    assert (folder / "p.npy").stat().st_mtime_ns == written
    assert first.max() > np.load(folder / "ids.npy").max()


def test_classes_with_and_without_the_probabilities(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, classes = folder / "p.npy", folder / "mask.npy"
    for words in ([f"--output={output}"], [f"--instances={folder / 'ids.npy'}", "decoding.target=affinity"], []):
        assert call(folder, *words, f"--classes={classes}", "decoding.class_threshold=140") == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(classes)
        assert not list(folder.glob(".*.probabilities.npy"))
        assert np.array_equal(np.load(classes), np.load(output)[3] >= 140)
        classes.unlink()


def test_classes_that_are_there_are_recognised(folder: Path) -> None:
    """Also where the probabilities are gone; another threshold makes others."""
    words = [f"--classes={folder / 'mask.tif'}", "decoding.class_threshold=140", "data.voxel_size_nm=[30,8,8]"]
    call(folder, *words)
    assert open_volume(folder / "mask.tif", "auto").voxel_size_nm in (None, (30.0, 8.0, 8.0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "write_prediction", lambda *_: pytest.fail("it is finished"))
        call(folder, *words)
    written = (folder / "mask.tif").stat().st_mtime_ns
    call(folder, words[0], "decoding.class_threshold=141", words[2])
    assert (folder / "mask.tif").stat().st_mtime_ns != written


@pytest.mark.parametrize("name", ["p.npy", "p.tif", "p.h5"])
def test_fresh_after_a_kill_while_an_older_output_was_replaced(folder: Path, name: str) -> None:
    """The note said already what the killed call would have made: the older file must not pass for it."""
    path = folder / name
    call(folder, f"--output={path}")
    older = path.read_bytes()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prediction.StreamedVolume, "finish", raising)
        call(folder, f"--output={path}", "inference.tta=flips")
    assert path.read_bytes() == older
    call(folder, f"--output={path}", "inference.tta=flips", "--fresh")
    made = np.array(whole(open_volume(path, "auto")))
    call(folder, f"--output={folder / 'other.npy'}", "inference.tta=flips")
    assert np.array_equal(made, np.load(folder / "other.npy"))


def raising(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_killed_call_of_other_settings_left_is_told_before_the_work(folder: Path) -> None:
    words = [f"--instances={folder / 'ids.npy'}", "decoding.target=affinity"]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prediction.StreamedVolume, "write_box", raising)
        call(folder, *words)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "write_prediction", lambda *_: pytest.fail("told too late"))
        error = complaint(folder, *words, "inference.tta=flips")
    assert "a killed call of other settings left its part beside it" in error.problems[0] and error.exit_code == 2
    call(folder, *words, "inference.tta=flips", "--fresh")


def test_the_input_is_no_output(folder: Path) -> None:
    before = (folder / "image.npy").read_bytes()
    note_of(folder / "image.npy").write_text("it looks like one of ours")
    error = complaint(folder, f"--classes={folder / 'image.npy'}")
    assert "is an output too" in error.problems[0] and error.exit_code == 2
    assert (folder / "image.npy").read_bytes() == before


def test_fresh_drops_what_was_left_of_components(folder: Path) -> None:
    left = folder / "..mask.npy.components.npy.partial"
    left.mkdir()
    call(folder, f"--classes={folder / 'mask.npy'}", "--fresh")
    assert not left.exists()


def test_instances_as_png_slices(folder: Path) -> None:
    call(folder, f"--instances={folder / 'ids'}", "decoding.target=affinity")
    assert len(list((folder / "ids").glob("slice_*.png"))) == SHAPE[0]
    assert open_volume(folder / "ids", "auto").shape == SHAPE


def test_print_config_shows_what_the_weights_were_trained_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([f"--checkpoint={folder / 'best.pt'}", "--print-config", "inference.tta=flips"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["inference"]["tta"] == "flips"
    assert printed["model"]["filters"] == [3, 4, 5]


def test_what_the_machine_is_may_change_and_is_not_the_trainings(folder: Path) -> None:
    config = changed(small_config(), system={"num_cpus": 64, "num_gpus": 8})
    write_checkpoint(config, folder / "best.pt", 0)
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(script, "use_processor", lambda config: seen.append(config.system))
        call(folder, f"--output={folder / 'p.npy'}", "system.num_cpus=2")
    assert [(system.num_cpus, system.num_gpus) for system in seen] == [(2, 1)]


def test_axes_and_voxel_size_of_the_input_may_be_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "xyz.npy", grey_volume(SHAPE, 0).transpose(2, 1, 0))
    call(folder, f"--input={folder / 'xyz.npy'}", f"--output={folder / 'one.npy'}", "data.image_axes=xyz")
    call(folder, f"--output={folder / 'two.npy'}", "data.voxel_size_nm=[8,8,8]")
    assert (
        "warning: voxels of [8.0, 8.0, 8.0] nm; the network was trained on [24.0, 12.0, 12.0] nm"
        in capsys.readouterr().out
    )
    assert np.array_equal(np.load(folder / "one.npy"), np.load(folder / "two.npy"))


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--output={f}/p.npy", "--checkpoint={f}/none.pt"], 1, "none.pt: no such checkpoint"),
        (["--output={f}/p.npy", "--checkpoint={f}/image.npy"], 1, "image.npy: not a"),
        (["--output={f}/p.npy", "--input={f}/none.npy"], 2, "none.npy: no such file or folder"),
        (["--output={f}/p.npy", "--input={f}/best.pt"], 2, "unknown kind of volume '.pt'"),
        ([], 2, "--input and at least one of --output, --instances and --classes are needed"),
        (["--output={f}/p.xyz"], 2, "cannot write '.xyz'"),
        (["--output={f}/slices"], 2, "PNG slices hold no 4 channels of uint8"),
        (["--output={f}/image.npy"], 2, "image.npy: is an output too"),
        (["--output={f}/foreign.npy"], 2, "foreign.npy: exists and was not made by this program"),
        (["--output={f}/p.npy", "--instances={f}/foreign.npy", "decoding.target=affinity"], 2,
         "foreign.npy: exists and was not made by this program"),
        (["--output={f}/p.npy", "--instances={f}/p.npy", "decoding.target=affinity"], 2, "two are the same file"),
        (["--instances={f}/ids.npy"], 2, "--instances: decoding.target is none"),
        (["--instances={f}/ids.npy", "decoding.target=boundary"], 2, "decoding.target: boundary"),
        (["--classes={f}/mask.jpg"], 2, "mask.jpg"),
        (["--classes=."], 2, ".: no name of an output; expected FILE.npy"),
        (["--output={f}/a.h5:seg/ids"], 2, "a.h5:seg/ids: no name of an output; expected FILE.npy"),
        (["--output={f}/p.npy", "--classes={f}/p.npy"], 2, "two are the same file"),
        (["--output={f}/p.npy", "model.filters=[3,4,6]"], 2, "after training only inference, decoding"),
        (["--output={f}/p.npy", "data.patch_size=[8,8,8]"], 2, "after training only inference, decoding"),
        (["--output={f}/p.npy", "inference.ttta=flips"], 2, "inference.ttta: no such constant; did you mean inference.tta?"),
        (["--output={f}/p.npy", "inference.overlap=0.95"], 2, "inference.overlap: expected 0 to 0.9"),
        (["--output={f}/p.npy", "--config={f}/none.yaml"], 2, "none.yaml: No such file"),
        (["--output={f}/p.npy", "data.image_axes=qyx"], 2, "qyx"),
        (["--output={f}/image.npy/p.npy"], 1, "cannot be written"),
        (["--output={f}/p.npy", "--no-such-flag"], 2, "--no-such-flag"),
    ],
)  # fmt: skip
def test_bad_calls_are_told_in_one_line(folder: Path, words: list[str], code: int, expected: str) -> None:
    np.save(folder / "foreign.npy", np.zeros(3))
    before = (folder / "image.npy").read_bytes()
    error = complaint(folder, *(word.format(f=folder) for word in words))
    assert error.exit_code == code
    assert expected in error.problems[0]
    assert (folder / "image.npy").read_bytes() == before
    assert not (folder / "p.npy").exists()


@pytest.mark.parametrize(
    ("image", "code", "expected"),
    [
        (np.zeros((2, *SHAPE), np.uint8), 2, "has 2 channels, the network takes 1"),
        (np.full(SHAPE, 7, np.uint8), 1, "all sampled voxels equal 7"),
        (np.full(SHAPE, np.nan, np.float32), 1, "holds NaN or infinite voxels"),
        (np.zeros(SHAPE, bool), 1, "bool"),
        (np.zeros(7, np.uint8), 1, "image.npy"),
    ],
)
def test_bad_volumes_are_told_in_one_line(folder: Path, image: np.ndarray, code: int, expected: str) -> None:
    np.save(folder / "image.npy", image)
    error = complaint(folder, f"--output={folder / 'p.npy'}")
    assert error.exit_code == code
    assert expected in error.problems[0]


def test_voxels_that_are_not_finite_far_from_where_the_grey_scale_is_measured(folder: Path) -> None:
    """Only what is predicted meets them; what was finished before is kept, and the same call continues."""
    image = np.tile(grey_volume((1, 20, 17), 0), (100, 1, 1)).astype(np.float32)
    image[50, 3, 4] = np.inf
    np.save(folder / "image.npy", image)
    error = complaint(folder, f"--output={folder / 'p.npy'}")
    assert error.exit_code == 1
    assert "holds NaN or infinite voxels" in error.problems[0]


def test_a_wrong_key(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "image.h5", "w") as file:
        file["raw"] = grey_volume(SHAPE, 0)
    error = complaint(folder, f"--input={folder}/image.h5:row", f"--output={folder / 'p.npy'}")
    assert error.exit_code == 2
    assert "raw" in error.problems[0]


def test_a_second_process_is_told_to_wait(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from common.lock import exclusive\n"
        f"with exclusive(Path({str(partial_folder(folder / 'p.npy'))!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=script.__file__.rpartition("/em_")[0]
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        error = complaint(folder, f"--output={folder / 'p.npy'}")
        other.kill()
    assert error.exit_code == 2
    assert "another process is writing there" in error.problems[0]


def test_fresh_drops_what_other_settings_left(folder: Path) -> None:
    words = [f"--output={folder / 'p.npy'}", f"--instances={folder / 'ids.npy'}", "decoding.target=affinity"]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(script, "write_prediction", interrupted_after(script.write_prediction))
        call(folder, *words)
    (folder / "p.npy").unlink()
    note_of(folder / "p.npy").unlink()
    open_streamed(folder / "p.npy", (4, *SHAPE), np.dtype(np.uint8), "another")
    scratch_of(folder / "ids.npy").mkdir()
    error = complaint(folder, *words)
    assert "a killed call of other settings left its part beside it" in error.problems[0]
    assert call(folder, *words, "--fresh") == 0
    assert not scratch_of(folder / "ids.npy").exists()


def interrupted_after(work: object) -> object:
    def interrupted(*arguments: object) -> None:
        work(*arguments)  # type: ignore[operator]
        raise KeyboardInterrupt

    return interrupted


@pytest.mark.slow
def test_as_a_script_good_and_bad(folder: Path) -> None:
    """Exit codes 0, 1, 2; errors are one line on stderr, never a traceback; from any folder."""
    given = ["predict.py", "--checkpoint", folder / "best.pt", "--input"]
    good = run_script(*given, folder / "image.npy", "--output", folder / "p.npy")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1] == str(folder / "p.npy")
    bad = run_script(*given, folder / "none.npy", "--output", folder / "q.npy")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1
    np.save(folder / "image.npy", np.zeros(SHAPE, np.uint8))
    worse = run_script(*given, folder / "image.npy", "--output", folder / "q.npy")
    assert worse.returncode == 1
    assert worse.stderr.count("\n") == 1
    assert "image.npy: all sampled voxels equal 0" in worse.stderr
