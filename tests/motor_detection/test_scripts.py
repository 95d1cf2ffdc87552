"""eval.py, predict.py and crossval.py on a run of a few steps: what they write, take over, and refuse before working."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common.checkpoint import save_checkpoint
from common.config import as_yaml, configure
from common.errors import BAD_DATA, WRONG_CALL
from motor_detection import convert, crossval, eval, evaluation, inference, predict, train
from motor_detection.baseline import blob_picks
from motor_detection.config import Config
from motor_detection.pick_files import read_picks_csv
from motor_detection.star_files import read_star
from motor_detection.tomograms import open_tomogram
from motor_detection.trainer import begin
from tests.common_runs import Main, said
from tests.motor_detection.small_runs import NO_PATCHES, small_config, small_patches, train_alone, write_tomograms

RUNS = {  # folds of the small tomograms: 2 3 2 3 0 0 1, of which fold 1 has no motor
    "a": ["data.validation_fold=0", "data.test_fold=3"],
    "fold0": ["data.validation_fold=0", "data.test_fold=-1"],
    "fold2": ["data.validation_fold=2", "data.test_fold=-1", "train.seed=7"],
    "other": ["data.validation_fold=3", "data.test_fold=-1", "train.weight_decay=0.5"],
    "again": ["data.validation_fold=0", "data.test_fold=-1", "train.seed=8"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tomograms, patches and five short runs under runs/."""
    folder = tmp_path_factory.mktemp("scripts")
    write_tomograms(folder, range(7))
    base = configure(small_config(folder), [], ["train.steps=2", "train.log_every=1", "inference.min_score=0.001"])
    for name, changes in RUNS.items():
        config = configure(base, [], [*changes, f"run.name={name}"])
        run = folder / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(as_yaml(config))
        (run / "environment.json").write_text("{}")
        train_alone(config, run, small_patches(config))
    return folder


def config_of(run: Path) -> Config:
    return configure(small_config(run), [run / "config.yaml"], [])


@pytest.mark.usefixtures("bfloat16")
def test_eval_writes_figures_picks_pictures_and_a_report(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "runs" / "a"
    code, out, problems = said(eval.main, ["--run", str(run), "inference.precision=bfloat16"], capsys)
    assert code == 0, problems
    assert "bfloat16 changes scores by at most" in out and "always the middle" in out
    figures = json.loads((run / "results" / "metrics.json").read_text())
    names = ("f2", "f2_low", "f2_high", "n", "baseline_f2", "localisation_error_angstrom", "threshold",
             "chance_f2", "middle_f2", "precision", "recall", "validation_f2")  # fmt: skip
    assert set(names) <= figures.keys() and figures["n"] == 2 and figures["f2_low"] is None
    assert figures["middle_f2"] > 0, "the small volume's middle is within 1000 angstrom of everything"
    for name in ("precision_recall", "picks", "learning_curve"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000
    report = (run / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 and "localisation error angstrom" in report
    assert [one.tomo_id for one in read_picks_csv(run / "results" / "picks_test.csv")] == ["tomo_1", "tomo_3"]


def test_eval_fails_before_any_inference_where_no_figure_would_come_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("inference began")

    monkeypatch.setattr(evaluation, "pick_motors", never)
    run = tmp_path / "run"
    shutil.copytree(trained / "runs" / "a", run)
    config = config_of(run)
    for change, words in (
        ("data.test_fold=1", "was trained with other constants"),
        ("train.steps=3", "was trained with other constants"),
    ):
        code, _, problems = said(eval.main, ["--run", str(run), change], capsys)
        assert code == WRONG_CALL and words in problems[0], problems
    table = pd.read_csv(config.data.labels)
    for fold, coordinates, words in (
        (3, "[]", "data.test_fold: no motor in the 2 tomograms of fold 3"),
        (0, "[]", "data.validation_fold: no motor in the 2 tomograms of fold 0"),
    ):
        changed = table.assign(coordinates=table.coordinates.where(table.fold != fold, coordinates))
        changed.to_csv(tmp_path / "labels.csv", index=False)
        monkeypatch.setattr(eval, "training_identity", lambda config: "")
        code, _, problems = said(eval.main, ["--run", str(run), f"data.labels={tmp_path}/labels.csv"], capsys)
        assert code == WRONG_CALL and words in problems[0], problems
    table.assign(fold=-1).to_csv(tmp_path / "labels.csv", index=False)
    code, _, problems = said(eval.main, ["--run", str(run), f"data.labels={tmp_path}/labels.csv"], capsys)
    assert code == BAD_DATA and "every tomogram has fold -1" in problems[0]


@pytest.mark.parametrize("main", [eval.main, crossval.main], ids=["eval", "crossval"])
def test_folds_edited_after_training_do_not_leak_into_the_figures(
    trained: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table's path is the same, its folds are not: tomograms that were trained on would be reported."""
    table = trained / "labels.csv"
    whole = table.read_text()
    swapped = pd.read_csv(table)
    swapped["fold"] = (
        swapped.fold.replace({0: 2, 2: 0, 3: 2}) if main is crossval.main else swapped.fold.replace({3: 2, 2: 3})
    )
    try:
        swapped.to_csv(table, index=False)
        runs = [str(trained / "runs" / name) for name in ("fold0", "fold2")]
        words = ["--run", str(trained / "runs" / "a")] if main is eval.main else [*runs, "--output", str(tmp_path)]
        code, _, problems = said(main, words, capsys)
    finally:
        table.write_text(whole)
    assert code == BAD_DATA and "the table's folds have changed since" in problems[0], problems


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "checkpoints/best.pt"])
def test_eval_names_a_damaged_file_of_the_run(
    trained: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "runs" / "a", tmp_path / "run")
    for damage in (b"\xff\xfe\x00", b""):
        (tmp_path / "run" / name).write_bytes(damage)
        code, _, problems = said(eval.main, ["--run", str(tmp_path / "run")], capsys)
        assert code in (WRONG_CALL, BAD_DATA) and name in problems[0], problems
        if name == "metrics.csv":
            return  # an empty table of records draws an empty curve


def predict_words(run: Path, output: Path) -> list[str]:
    inputs = str(run.parents[1] / "tomograms" / "tomo_1")
    return ["--checkpoint", str(run / "checkpoints" / "best.pt"), "--input", inputs, "--output", str(output),
            "data.voxel_spacing_angstrom=13.1"]  # fmt: skip


def test_predict_takes_the_threshold_that_eval_chose_for_these_weights(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "runs" / "fold0"
    words = predict_words(run, tmp_path / "out")
    assert "threshold of submission.csv: 0.5" in said(predict.main, words, capsys)[1]
    judged = run / "results" / "metrics.json"
    judged.parent.mkdir(exist_ok=True)
    judged.write_text('{"threshold": 0.0025, "task": "one_per_tomogram"}')
    out = said(predict.main, words, capsys)[1]
    assert f"threshold of submission.csv: 0.003, from {judged}" in out and "score of at least 0.003" in out
    judged.write_text('{"threshold": 0.0025, "task": "every_motor"}')
    assert "0.5 (eval.py chose one for every motor" in said(predict.main, words, capsys)[1]
    os.utime(judged, (1, 1))  # judged before these weights were written
    assert "threshold of submission.csv: 0.5" in said(predict.main, words, capsys)[1]
    judged.write_text("damaged")
    code, _, problems = said(predict.main, words, capsys)
    assert code == BAD_DATA and str(judged) in problems[0]
    assert "0.7" in said(predict.main, [*words, "--threshold", "0.7"], capsys)[1]


def test_predict_refuses_names_that_no_table_can_hold(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = predict_words(trained / "runs" / "a", tmp_path / "out")
    for name in (b"tomo_\xff.npy", b"data_1.npy", b"Data_1.npy", b"to mo.npy"):
        path = tmp_path / os.fsdecode(name)
        np.save(path, np.zeros((40, 40, 40), np.uint8))
        words[words.index("--input") + 1] = str(path)
        code, _, problems = said(predict.main, words, capsys)
        assert code == WRONG_CALL and "cannot be a name in STAR and CSV files" in problems[0]


def test_a_checkpoint_whose_config_is_of_another_version_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = predict_words(trained / "runs" / "a", tmp_path / "out")
    whole = inference.load_checkpoint

    def older(*given: object) -> dict[str, object]:
        state = whole(*given)  # type: ignore[arg-type]
        return state | {"config": str(state["config"]).replace("positive_weight", "pos_weight")}

    monkeypatch.setattr(inference, "load_checkpoint", older)
    code, _, problems = said(predict.main, words, capsys)
    assert code == BAD_DATA and "best.pt: its config does not fit this version: loss.pos_weight" in problems[0]


def test_crossval_pools_runs_that_differ_in_fold_and_seed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(trained / "runs" / name) for name in ("fold0", "fold2")]
    words = [*runs, "evaluation.task=every_motor", "evaluation.beta=1", "--output", str(tmp_path / "pooled")]
    code, out, problems = said(crossval.main, words, capsys)
    assert code == 0, problems
    figures = json.loads((tmp_path / "pooled" / "crossval.json").read_text())
    assert {"f1", "f1_low", "f1_high", "mean_threshold"} <= figures.keys() and (figures["n"], figures["folds"]) == (
        4,
        2,
    )
    assert "out-of-fold F1" in out
    pooled = read_picks_csv(tmp_path / "pooled" / "picks_out_of_fold.csv")
    assert sorted(one.tomo_id for one in pooled) == ["tomo_0", "tomo_2", "tomo_4", "tomo_5"]


def test_crossval_refuses_runs_that_cannot_be_pooled(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for names, more, words in (
        (("fold0",), [], "at least two runs"),
        (("fold0", "again"), [], "validates on fold 0, as "),
        (("fold0", "other"), [], "differs from"),
        (("fold0", "fold2"), ["train.steps=9"], "only inference and evaluation can be changed"),
        (("fold0", "fold2"), ["evaluation.tolerance=9"], "did you mean evaluation.tolerance_angstrom"),
        (("fold0", "absent"), [], "no such checkpoint"),
    ):
        runs = [str(trained / "runs" / name) for name in names]
        code, _, problems = said(crossval.main, [*runs, *more], capsys)
        assert code in (WRONG_CALL, BAD_DATA) and words in problems[0], problems


def test_predict_knows_a_tomogram_by_its_place_and_time_not_only_by_its_name(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[Path] = []
    whole = predict.picks_of
    monkeypatch.setattr(predict, "picks_of", lambda t, *rest: (picked.append(t.volume.path), whole(t, *rest))[1])
    run = trained / "runs" / "a"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "tomo.npy", np.random.default_rng(0).integers(0, 255, (40, 40, 40), np.uint8))
    words = predict_words(run, tmp_path / "out")
    for folder, times in (("one", 1), ("one", 1), ("two", 2), ("two", 2)):
        words[words.index("--input") + 1] = str(tmp_path / folder / "tomo.npy")
        assert said(predict.main, words, capsys)[0] == 0
        assert len(picked) == times
    os.utime(tmp_path / "two" / "tomo.npy", (9, 9))
    assert said(predict.main, words, capsys)[0] == 0 and len(picked) == 3


def test_predict_names_a_volume_with_a_voxel_that_is_no_number(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also between the slices that the intensity is measured on."""
    voxels = np.random.default_rng(0).normal(size=(90, 40, 40)).astype(np.float32)
    voxels[2, 3, 4] = np.nan
    np.save(tmp_path / "tomo.npy", voxels)
    words = predict_words(trained / "runs" / "a", tmp_path / "out")
    words[words.index("--input") + 1] = str(tmp_path / "tomo.npy")
    code, _, problems = said(predict.main, words, capsys)
    assert code == BAD_DATA and "tomo.npy: holds NaN or infinite voxels" in problems[0]


def test_exact_tiles_are_refused_for_any_member_of_an_ensemble_with_group_norm(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(config_of(trained / "runs" / "a"), [], ["model.norm=group", "inference.tiling=blended"])
    state = begin(config, torch.device("cpu")).as_checkpoint(config, NO_PATCHES)
    save_checkpoint(state, tmp_path / "group.pt")
    words = [*predict_words(trained / "runs" / "a", tmp_path / "out"), "--checkpoint", str(tmp_path / "group.pt")]
    code, _, problems = said(predict.main, words, capsys)
    assert code != 0 and "group norm" in problems[0]


@pytest.mark.parametrize("change", ["run.name=../elsewhere", "run.name=a/b", "run.name=''", "run.preset='-x'"])
def test_a_runs_name_stays_inside_the_folder_of_runs(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, problems = said(train.main, [change], capsys)
    assert code == WRONG_CALL and "a folder's name" in problems[0]


def test_a_file_in_the_place_of_a_folder_is_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    base = ["--preset", "kaggle", "--config", str(trained / "runs" / "a" / "config.yaml")]
    for main, change in ((train.main, f"run.root={tmp_path}/file"), (convert.main, f"data.patches={tmp_path}/file"),
                         (convert.main, f"data.patches={tmp_path}/file/inside")):  # fmt: skip
        code, _, problems = said(main, [*base, change], capsys)
        assert code in (WRONG_CALL, BAD_DATA) and str(tmp_path / "file") in problems[0]


def test_the_blob_picker_takes_a_tomogram_thinner_than_its_blobs(tmp_path: Path) -> None:
    np.save(tmp_path / "thin.npy", np.random.default_rng(0).integers(0, 255, (3, 60, 70), np.uint8))
    tomogram = open_tomogram(tmp_path / "thin.npy", None, 13.1)
    picks = blob_picks(tomogram, np.zeros((0, 3)), (60.0, 250.0), 300.0, 5)
    assert len(picks) == 4 and all(len(found.scores) <= 5 for found in picks.values())


def test_relion4_needs_the_unbinned_pixel(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its coordinates count unbinned pixels of the tilt series, which no tomogram knows."""
    words = predict_words(trained / "runs" / "a", tmp_path / "out")
    for flags in (
        ["--star", "relion4"],
        ["--tilt-series-pixel", "2"],
        ["--star", "relion4", "--tilt-series-pixel", "nan"],
    ):
        code, _, problems = said(predict.main, [*words, *flags], capsys)
        assert code == WRONG_CALL and "--tilt-series-pixel" in problems[0]
    flags = ["--star", "relion4", "--tilt-series-pixel", "2.62", "inference.min_score=0.0001"]
    assert said(predict.main, [*words, *flags], capsys)[0] == 0
    (picks,) = read_picks_csv(tmp_path / "out" / "picks.csv")
    assert len(picks.points) > 0
    rows = read_star(tmp_path / "out" / "picks.star")["particles"]
    pixels = rows[["rlnCoordinateZ", "rlnCoordinateY", "rlnCoordinateX"]].to_numpy().astype(float)
    np.testing.assert_allclose(pixels, 5 * picks.points, rtol=1e-9)  # binned by 5: 13.1 / 2.62


def test_predict_prints_a_config_that_it_reads_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = predict_words(trained / "runs" / "a", tmp_path / "out")
    _, printed, _ = said(predict.main, [*words, "inference.max_picks=3", "--print-config"], capsys)
    (tmp_path / "printed.yaml").write_text(printed)
    code, again, problems = said(
        predict.main, [*words, "--config", str(tmp_path / "printed.yaml"), "--print-config"], capsys
    )
    assert code == 0 and again == printed and "max_picks: 3" in printed, problems


@pytest.mark.parametrize("change", ["heatmap.sigma_angstrom=100", "model.stride=8", "train.steps=9", "convert.seed=1"])
def test_predict_refuses_constants_that_training_fixed(
    trained: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, problems = said(predict.main, [*predict_words(trained / "runs" / "a", tmp_path / "out"), change], capsys)
    assert code == WRONG_CALL and "after training only inference" in problems[0]


def test_a_tomogram_that_can_no_longer_be_read_leaves_no_old_picks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = predict_words(trained / "runs" / "a", tmp_path / "out")
    path = tmp_path / "tomo.npy"
    np.save(path, np.random.default_rng(0).integers(0, 255, (40, 40, 40), np.uint8))
    words[words.index("--input") + 1] = str(path)
    (tmp_path / "._tomo.npy").write_bytes(b"a Mac was here")
    assert said(predict.main, words, capsys)[0] == 0 and (tmp_path / "out" / "tomograms" / "tomo.csv").exists()
    path.write_bytes(b"damaged")
    words[words.index("--input") + 1] = str(tmp_path)
    code, _, problems = said(predict.main, words, capsys)
    assert code == BAD_DATA and "tomo.npy" in problems[0] and len(problems) == 1
    assert not (tmp_path / "out" / "tomograms" / "tomo.csv").exists()
    assert said(predict.main, [*words, "--fresh"], capsys)[0] == BAD_DATA
    assert not list((tmp_path / "out" / "tomograms").glob("*"))


def test_two_calls_do_not_write_into_one_output(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / ".out.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        code, _, problems = said(predict.main, predict_words(trained / "runs" / "a", tmp_path / "out"), capsys)
    finally:
        holder.kill()
        holder.wait()
    assert code == WRONG_CALL and "another process is writing there" in problems[0]


def test_predict_takes_each_tomograms_spacing_from_a_label_table(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slice folders hold none, and data sets mix several; further calls add to the same output."""
    table = pd.read_csv(trained / "labels.csv")
    table["voxel_spacing"] = [13.1, 15.6, 16.8, 19.7, 13.1, 13.1, 13.1]
    table[table.tomo_id != "tomo_6"].to_csv(tmp_path / "labels.csv", index=False)
    words = predict_words(trained / "runs" / "a", tmp_path / "out")[:-1]  # without one spacing for all
    words[words.index("--input") + 1] = str(trained / "tomograms")
    code, _, problems = said(predict.main, [*words, "--labels", str(tmp_path / "labels.csv")], capsys)
    assert code == BAD_DATA and len(problems) == 1 and "tomo_6: holds no voxel spacing" in problems[0]
    words[words.index("--input") + 1] = str(trained / "tomograms" / "tomo_6")
    assert said(predict.main, [*words, "data.voxel_spacing_angstrom=14"], capsys)[0] == 0
    found = {one.tomo_id: one.spacing_angstrom[0] for one in read_picks_csv(tmp_path / "out" / "picks.csv")}
    assert [found[f"tomo_{number}"] for number in (1, 2, 3, 6)] == [15.6, 16.8, 19.7, 14.0] and len(found) == 7
