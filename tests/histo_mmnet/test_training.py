"""Training: killed runs end in the same bits, restored weights have the logged figures, the parts of a step are right."""

import copy
import csv
import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import BAD_DATA, WRONG_CALL
from common.files import write_text
from common.logbook import read_metrics
from common.parallel import process_group
from data.phantoms.histo import write_phantom
from histo_mmnet.comparison import patients_of
from histo_mmnet.config import Config
from histo_mmnet.eval import main as eval_main
from histo_mmnet.folds import material_of
from histo_mmnet.members import Member, mmnet_of
from histo_mmnet.places import collect
from histo_mmnet.predict import main as predict_main
from histo_mmnet.predictions import load_member
from histo_mmnet.scan import scan
from histo_mmnet.slides import Album
from histo_mmnet.splits import read_official
from histo_mmnet.train import main
from histo_mmnet.trainer import Files, Record, begin, best_of, ends_early, learning_rate, train
from histo_mmnet.validation import validate
from tests.common_runs import differing, kill_at_random, run_command, said
from tests.histo_mmnet.small_runs import SMALL, changed, in_folder, saved, script, small_config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return small_config(tmp_path_factory.mktemp("small"))


def record(epoch: int, accuracy: float, loss: float) -> Record:
    return {"epoch": epoch, "step": 10 * epoch, "val_balanced_accuracy": accuracy, "val_loss": loss}


def test_known_defect_1_the_best_weights_are_those_that_were_measured(small: Config, tmp_path: Path) -> None:
    """The original kept a shallow copy: the last epoch's weights were tested."""
    config = in_folder(changed(small, "train.epochs=4", "train.learning_rate=0.02"), tmp_path, "best")
    collection, member = collect(config), mmnet_of(0)
    album = Album.of(config)
    with process_group(True) as device:
        material = material_of(collection, collection.trials[0], member, album, config)
        records = train(material, config, tmp_path, device)
        network, _ = load_member(Files.of(tmp_path, member).best, member, device)
        measured = validate(network, material.val, album, config)
    best = best_of(records)
    assert measured == pytest.approx({name: best[name] for name in measured}, abs=1e-6)
    assert saved(tmp_path, "best_model_fold_0.pth")["measured"] == best
    last = saved(tmp_path, "last_fold_0.pth")["weights"]
    if best is not records[-1]:
        assert differing(last, network.state_dict(), "")
    logged = read_metrics(Files.of(tmp_path, member).metrics, ("val_loss",))
    assert logged == [pytest.approx(one) for one in records]


def test_of_equal_accuracy_the_lower_loss_is_best() -> None:
    records = [record(1, 0.8, 0.5), record(2, 0.9, 0.4), record(3, 0.9, 0.3), record(4, 0.7, 0.1)]
    assert best_of(records)["epoch"] == 3


def test_early_stop_and_learning_rate_follow_balanced_accuracy(small: Config) -> None:
    config = changed(small, "train.patience=3", "train.scheduler_patience=1", "train.learning_rate=0.01")
    records = [record(1, 0.8, 0.5), record(2, 0.9, 0.9), record(3, 0.9, 0.1), record(4, 0.85, 0.1)]
    assert not ends_early(records, config) and learning_rate(records, config) == 0.005
    assert ends_early([*records, record(5, 0.9, 0.1)], config)
    assert not ends_early([*records, record(5, 0.91, 0.1)], config)
    assert not ends_early([*records, record(5, 0.9, 0.1)], changed(config, "train.patience=0"))


def gradients(config: Config, micro: int) -> list[torch.Tensor]:
    """The gradients of one step of four composites in micro-batches, without batch statistics."""
    from histo_mmnet import trainer

    config = changed(config, *(f"train.micro_batch_{d}={micro}" for d in ("cuda", "mps", "cpu")), "model.dropout=0",
                     "loss.mixup_alpha=0", "train.max_gradient_norm=1e6")  # fmt: skip
    collection, member = collect(config), mmnet_of(0)
    kept: list[torch.Tensor] = []
    with process_group(True) as device, pytest.MonkeyPatch.context() as patch:
        material = material_of(collection, collection.trials[0], member, Album.of(config), config)
        state = begin(config, member, device)
        state.model.eval()
        patch.setattr(trainer, "guarded_update", lambda model, *rest: kept.extend(
            w.grad.clone() for w in model.parameters()) or torch.tensor(0.0))  # fmt: skip
        stream = trainer.stream_of(material, config)
        batches = iter(
            [trainer.stack([stream[p] for p in range(first, first + micro)]) for first in range(0, 4, micro)]
        )

        class Stop:
            asked = False

        statistics = trainer.RunningStatistics(state.model)
        trainer.take_step(state, statistics, batches, Stop(), material, config)  # type: ignore[arg-type]
    return kept


def test_known_defect_6_accumulated_steps_are_those_of_a_large_batch(small: Config) -> None:
    whole, parts = gradients(small, 4), gradients(small, 1)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_train_py_and_eval_py_from_end_to_end(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = in_folder(changed(small, "train.single_magnifications=true", "train.epochs=1"), tmp_path, "whole")
    words = script(config, tmp_path, 0, [])[2:]
    code, out, problems = said(main, words, capsys)
    assert code == 0 and not problems, problems
    folder = tmp_path / "whole"
    assert "7 accessions" in out and (folder / "split.csv").exists()
    assert len(list((folder / "models").glob("best_model_*.pth"))) == 15
    code, out, problems = said(eval_main, [*words, "--all"], capsys)
    assert code == 0 and not problems, problems
    assert "patients (7)" in out and "nearest neighbour by colour" in out and "chance: 0.500" in out
    for name in ("results/metrics.json", "results/results_summary.csv", "results/cross_validation_results.json",
                 "results/fold_2_results.json", "results/performance_table.csv", "results/summary_report.csv",
                 "results/magnification_stats.csv", "results/gradcam_scores.csv", "plots/roc_curves.png",
                 "plots/learning_curves.png", "plots/magnification_importance.png", "report.html"):  # fmt: skip
        assert (folder / name).exists(), name
    assert len(list((folder / "gradcam").glob("fold_*.png"))) >= 3
    check_predictions(config, folder, tmp_path / "new.csv", capsys)
    code, out, _ = said(eval_main, ["--run", str(folder), "--compare", str(folder)], capsys)
    assert code == 0 and "balanced accuracy +0.000 (+0.000 to +0.000)" in out and "judged before" in out
    check_new_slides(folder, tmp_path, capsys)
    check_fold_by_itself(config, folder, tmp_path, capsys)
    check_other_images(config, folder, tmp_path, capsys)


def test_bags_of_patients_from_end_to_end(small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.architecture=compact", "model.bag=3", "train.epochs=1", "loss.mixup_alpha=0.4"]
    config = in_folder(changed(small, *words), tmp_path, "bags")
    words = script(config, tmp_path, 0, [])[2:]
    code, out, problems = said(main, words, capsys)
    assert code == 0 and not problems, problems
    code, out, problems = said(eval_main, [*words, "--all"], capsys)
    assert code == 0 and not problems, problems
    results = tmp_path / "bags" / "results"
    figures = json.loads((results / "metrics.json").read_text())
    assert figures["n_composites"] == figures["n_patients"] == 7
    rows = list(csv.DictReader((results / "predictions.csv").read_text().splitlines()))
    shown = sum(len(row[f"{m}X"].split()) for row in rows for m in (40, 100, 200, 400))
    assert shown == figures["n_images"] == len(collect(config).images)


def test_an_interrupt_at_a_members_end_ends_the_run(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are not trained; the same command goes on with them."""
    config = in_folder(changed(small, "train.epochs=1"), tmp_path, "stopped")

    def validate_and_stop(*arguments: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("histo_mmnet.trainer.validate", validate_and_stop)
    with pytest.raises(KeyboardInterrupt):
        main(script(config, tmp_path, 0, [])[2:])
    models = tmp_path / "stopped" / "models"
    assert sorted(path.name for path in models.iterdir()) == ["best_model_fold_0.pth", "last_fold_0.pth"]
    monkeypatch.undo()
    (tmp_path / "stopped" / "results" / "fold_0_metrics.csv").unlink()
    code, out, problems = said(main, script(config, tmp_path, 0, [])[2:], capsys)
    assert code == 0 and "mmnet of fold 0 is complete" in out and len(list(models.iterdir())) == 6, problems
    assert (tmp_path / "stopped" / "results" / "fold_0_metrics.csv").exists()


def test_what_is_refused_changes_nothing(small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = in_folder(changed(small, "train.epochs=1"), tmp_path, "kept")
    words = script(config, tmp_path, 0, ["--fold", "0"])[2:]
    for wrong in ("model.backbone=nosuch", f"model.pretrained={tmp_path / 'none.pth'}"):
        code, _, problems = said(main, [*words, wrong], capsys)
        assert code in (WRONG_CALL, BAD_DATA) and not (tmp_path / "kept").exists(), problems
    code, _, problems = said(main, words, capsys)
    assert code == 0, problems
    before = (tmp_path / "kept" / "config.yaml").read_bytes()
    other = write_phantom(dataclasses.replace(SMALL, malignant_accessions=5), tmp_path / "other", 1)
    code, _, problems = said(main, [*words, f"data.root={other}"], capsys)
    assert code == BAD_DATA and (tmp_path / "kept" / "config.yaml").read_bytes() == before


def official_lists(breast: Path, folder: Path) -> None:
    """Two trials as BreakHis publishes its five; each tests another third of the accessions."""
    images = scan(breast)
    for trial in range(2):
        lines = []
        for label in range(2):
            of_class = sorted({image.name.accession for image in images if image.name.label == label})
            for image in images:
                name = image.name
                if name.label == label:
                    role = "test" if of_class.index(name.accession) % 3 == trial else "train"
                    lines.append(f"{name.file}|{name.magnification}|{trial + 1}|{role}\n")
        write_text(folder / f"dsfold{trial + 1}.txt", "".join(lines))


@pytest.mark.slow
def test_the_official_protocol_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = dataclasses.replace(SMALL, benign_accessions=12, malignant_accessions=12, sites=(1, 1))
    breast = write_phantom(few, tmp_path / "phantom", 1)
    official_lists(breast, tmp_path / "lists")
    words = [f"data.root={breast}", "split.protocol=official", f"split.official={tmp_path / 'lists'}", "train.epochs=1"]
    config = in_folder(changed(small_config(tmp_path / "small"), *words), tmp_path, "official")
    code, out, problems = said(main, script(config, tmp_path, 0, [])[2:], capsys)
    assert code == 0 and not problems, problems
    code, out, problems = said(eval_main, script(config, tmp_path, 0, ["--all"])[2:], capsys)
    assert code == 0 and not problems, problems
    results = tmp_path / "official" / "results"
    figures = json.loads((results / "metrics.json").read_text())
    tested = {(trial.number, name.slide) for trial in read_official(tmp_path / "lists") for name in trial.of("test")}
    assert figures["n_patients"] == len(tested) and figures["n_accessions"] == 16 and figures["folds"] == 2
    rates = [
        json.loads((results / f"fold_{k}_results.json").read_text())["test_patient_recognition_rate"] for k in (0, 1)
    ]
    over_trials = json.loads((results / "cross_validation_results.json").read_text())["patient_recognition_rate"]
    assert over_trials == {"mean": pytest.approx(np.mean(rates)), "std": pytest.approx(np.std(rates, ddof=1))}
    fewer = (tmp_path / "lists" / "dsfold1.txt").read_text().splitlines()
    benign = sorted({line.split("-")[2] for line in fewer if line.startswith("SOB_B") and line.endswith("train")})
    kept = [line for line in fewer if not any(number in line for number in benign[2:])]
    write_text(tmp_path / "lists" / "dsfold1.txt", "\n".join(kept))
    code, out, problems = said(main, script(config, tmp_path, 0, [])[2:], capsys)
    assert code == WRONG_CALL and "trial 0 trains on 2 benign accessions" in problems[0]


def check_new_slides(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slides of unknown diagnosis, with names of any kind, are judged by all networks and drawn."""
    config = load_member(folder / "models" / "best_model_fold_0.pth", mmnet_of(0), torch.device("cpu"))[1]
    assert config.data.root is not None
    images = scan(config.data.root)
    for k, image in enumerate(images[:6]):
        place = tmp_path / "new" / f"patient {k // 3}" / "a" / f"{image.name.magnification}X" / f"photo {k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.path, place)
    output, drawn = tmp_path / "unknown.csv", tmp_path / "drawn"
    words = ["--run", str(folder), "--input", str(tmp_path / "new"), "--output", str(output), "--gradcam", str(drawn)]
    code, out, problems = said(predict_main, words, capsys)
    assert code == 0 and "2 patients" in out, problems
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["patient"] for row in rows] == ["patient 0", "patient 1"] and rows[0]["networks"] == "3"
    assert len(list(drawn.glob("*.png"))) == 2
    for wrong, told in (
        (tmp_path / "drawn", "no PNG in it lies as PATIENT/SLIDE/40X"),
        (tmp_path / "new" / "patient 0", "no PNG in it lies as PATIENT/SLIDE/40X"),  # its slides are no patients
        (config.data.root / "benign", "the folder above benign/ and malignant/"),  # nor is a class
    ):
        code, out, problems = said(predict_main, [*words[:3], str(wrong), *words[4:]], capsys)
        assert code == BAD_DATA and told in problems[0], problems


def check_fold_by_itself(config: Config, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has figures and thresholds of its own, and leaves those of the run alone; trained anew it leaves other folds alone."""
    before = {path: path.read_bytes() for path in (folder / "results").iterdir()}
    words = script(config, tmp_path, 0, ["--fold", "1"])[2:]
    code, out, problems = said(eval_main, words, capsys)
    assert code == 0 and (folder / "fold_1" / "results" / "metrics.json").exists(), problems
    assert before == {path: path.read_bytes() for path in (folder / "results").iterdir()}
    files = {path: path.stat().st_mtime_ns for path in (folder / "models").iterdir()}
    code, out, problems = said(main, [*words, "--fresh"], capsys)
    assert code == 0, problems
    for path, changed_at in files.items():
        assert (path.stat().st_mtime_ns != changed_at) == path.name.endswith("fold_1.pth"), path


def check_other_images(config: Config, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A patient more would change all folds: networks would be tested on those who trained them."""
    split, words = (folder / "split.csv").read_bytes(), script(config, tmp_path, 0, [])[2:]
    assert config.data.root is not None
    image = scan(config.data.root)[0]
    size = image.path.stat().st_size
    added = image.path.with_name(image.path.name.replace("-001.png", "-999.png").replace("-002.png", "-999.png"))
    assert added != image.path
    shutil.copy(image.path, added)
    for command in (main, eval_main):
        code, out, problems = said(command, words, capsys)
        assert code == BAD_DATA and f"{added.name} of fold 0 is new" in problems[0], problems
    assert (folder / "split.csv").read_bytes() == split
    added.unlink()
    (folder / "split.csv").write_bytes(b"".join(line for line in split.splitlines(True) if not line.startswith(b"2,")))
    for command in (main, eval_main):
        code, out, problems = said(command, words, capsys)
        assert code == BAD_DATA and "of fold 2 is new" in problems[0], problems
    (folder / "split.csv").write_bytes(split)
    with image.path.open("ab") as file:
        file.write(b" ")
    code, out, problems = said(eval_main, words, capsys)
    assert code == BAD_DATA and "other images than data.root holds now" in problems[0], problems
    with image.path.open("ab") as file:
        file.truncate(size)


def check_predictions(config: Config, folder: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known defect 14: a patient of the run is judged by the one fold that tested it, as eval.py did."""
    words = ["--run", str(folder), "--input", str(config.data.root), "--output", str(output)]
    code, out, problems = said(predict_main, words, capsys)
    assert code == 0 and "7 patients" in out, problems
    rows = list(csv.DictReader(output.read_text().splitlines()))
    judged = patients_of(folder)
    assert [row["patient"] for row in rows] == list(judged.patient)
    assert {row["networks"] for row in rows} == {"1"}
    np.testing.assert_allclose([float(row["probability"]) for row in rows], judged.probability, atol=1e-4)
    np.testing.assert_allclose([float(row["threshold"]) for row in rows], judged.threshold, atol=1e-5)


def test_wrong_calls_are_one_line(small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = in_folder(small, tmp_path, "wrong")
    words = script(config, tmp_path, 0, [])[2:]
    for more, code, told in (
        (["--fold", "9"], WRONG_CALL, "no fold 9; expected one of 0, 1, 2"),
        (["split.num_folds=4"], WRONG_CALL, "4 folds need 4 benign accessions, the data has 3"),
        (["data.root=nowhere"], WRONG_CALL, "nowhere: no folder"),
        (["train.batch_size=5"], WRONG_CALL, "no multiple of micro_batch_cpu=2"),
        (["model.backbone=resnet19"], WRONG_CALL, "nearest: resnet18"),
    ):
        found, _, problems = said(main, [*words, *more], capsys)
        assert found == code and any(told in problem for problem in problems), (more, problems)
    found, _, problems = said(eval_main, words, capsys)
    assert found == WRONG_CALL and "no split.csv); train.py with the same words makes it" in problems[0]


def test_an_unreadable_image_ends_training_in_one_line(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.phantoms.histo import write_phantom
    from tests.histo_mmnet.small_runs import SMALL

    breast = write_phantom(SMALL, tmp_path / "phantom", 1)
    for path in breast.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    config = in_folder(changed(small, f"data.root={breast}"), tmp_path, "broken")
    code, _, problems = said(main, script(config, tmp_path, 0, [])[2:], capsys)
    assert code == BAD_DATA and len(problems) == 1 and "cannot be read as an image" in problems[0]


def test_another_run_in_the_folder_is_refused(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = in_folder(changed(small, "train.epochs=1"), tmp_path, "taken")
    words = script(config, tmp_path, 0, ["--fold", "0"])[2:]
    assert said(main, words, capsys)[0] == 0
    code, _, problems = said(main, [*words, "train.learning_rate=0.5"], capsys)
    assert code == WRONG_CALL and "holds a run of another config" in problems[0]
    code, _, problems = said(eval_main, [*words, "train.learning_rate=0.5"], capsys)
    assert code == WRONG_CALL and "trained with other constants" in problems[0]


def test_a_member_is_not_taken_for_another(small: Config, tmp_path: Path) -> None:
    config = in_folder(changed(small, "train.epochs=1"), tmp_path, "members")
    collection = collect(config)
    with process_group(True) as device:
        material = material_of(collection, collection.trials[1], mmnet_of(1), Album.of(config), config)
        train(material, config, tmp_path, device)
        path = Files.of(tmp_path, mmnet_of(1)).best
        with pytest.raises(Exception, match="holds other weights than mmnet of fold 0"):
            load_member(path, mmnet_of(0), device)
        with pytest.raises(Exception, match="holds other weights than 40X of fold 1"):
            load_member(path, Member(1, (40,)), device)


def assert_same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in (one / "models").iterdir())
    assert names == sorted(path.name for path in (other / "models").iterdir()) and len(names) == 2
    for name in names:
        assert not differing(saved(one, name), saved(other, name), name)
    for path in (one / "results").glob("*_metrics.csv"):
        assert path.read_bytes() == (other / "results" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(0, 0), (0, 2), (2, 0)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    small: Config, tmp_path: Path, processes: int, workers: int
) -> None:
    config = changed(small, "train.epochs=12", f"train.workers={workers}", "train.scheduler_patience=1")
    done = run_command(script(in_folder(config, tmp_path, "reference"), tmp_path, processes, ["--fold", "0"]))
    assert done.returncode == 0, done.stderr
    command = script(in_folder(config, tmp_path, "killed"), tmp_path, processes, ["--fold", "0"])
    dice, hits = random.Random(processes * 10 + workers), 0
    for _ in range(5):
        hits += kill_at_random(command, tmp_path / "killed", dice, 3.0)
    again = run_command(command)
    assert again.returncode == 0, again.stderr
    assert hits >= 2, "too few kills hit the run"
    assert_same(tmp_path / "reference", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_train_as_one(small: Config, tmp_path: Path) -> None:
    """But for rounding: a step sees the same composites."""
    config = changed(small, "train.epochs=1", "model.dropout=0", "train.learning_rate=1e-4")
    for processes, name in ((0, "one"), (2, "two")):
        done = run_command(script(in_folder(config, tmp_path, name), tmp_path, processes, ["--fold", "0"]))
        assert done.returncode == 0, done.stderr
    losses = [
        np.array([r["train_loss"] for r in read_metrics(tmp_path / n / "results/fold_0_metrics.csv", ("train_loss",))])
        for n in ("one", "two")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_a_state_is_a_function_of_its_config(small: Config) -> None:
    with process_group(True) as device:
        one, two = (begin(small, mmnet_of(0), device).model.state_dict() for _ in range(2))
        other = begin(changed(small, "train.seed=3"), mmnet_of(0), device).model.state_dict()
    assert not differing(one, two, "") and differing(one, other, "")
    assert dataclasses.asdict(small) == dataclasses.asdict(copy.deepcopy(small))


@pytest.mark.slow
def test_training_and_evaluation_run_on_real_images(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """42 images of 19 patients, most without some magnification: too few for a figure, enough for every path of the code."""
    words = [
        "data.source=files", f"data.root={real_data / 'histo' / 'breakhis_500px'}", "split.num_folds=3", "train.epochs=1",
        "data.image_size=[64,96]", "train.single_magnifications=false", f"run.root={tmp_path}", "run.name=real",
    ]  # fmt: skip
    code, out, problems = said(main, [*words, "train.single_magnifications=true"], capsys)
    assert (
        code == WRONG_CALL
        and "image for 40X to validate on" in problems[0]
        and "single_magnifications=false" in problems[0]
    )
    code, out, problems = said(main, [*words, "--fresh"], capsys)
    assert code == 0 and "23 slides, 42 images; BreakHis as published has 82 and 7,909" in out, problems
    code, out, problems = said(eval_main, [*words, "--all"], capsys)
    assert code == 0 and "patients (19)" in out, problems
    assert len(list((tmp_path / "real" / "gradcam").glob("*.png"))) == 6
