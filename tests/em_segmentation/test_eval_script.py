"""eval.py: a run measured from its command line, and bad calls."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import as_yaml, configure
from common.errors import UserError
from em_segmentation import eval as script
from em_segmentation.config import Config
from tests.em_segmentation.small_networks import changed, small_config, write_checkpoint
from tests.em_segmentation.test_judging import PHANTOM_KEYS, VOXEL_SIZE, true_labels, volume_at


def config_of(folder: Path) -> Config:
    """One validation and one test volume of the phantom's kind."""
    files = {f"{role}_{kind}": (str(folder / f"{role}{end}.npy"),) for role in ("val", "test")
             for kind, end in (("image", ""), ("label", "_labels"))}  # fmt: skip
    return changed(
        small_config(),
        data={**files, "voxel_size_nm": VOXEL_SIZE, "label_axes": "czyx"},
        targets={"semantic_names": ("mitochondria",), "semantic_only": (1,)},
        decoding={"target": "affinity", "thresholds": (200, 100)},
        evaluation={"bootstrap_resamples": 100},
        run={"root": folder / "runs", "name": "run"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, role in enumerate(("val", "test")):
        volume_at(tmp_path, role, true_labels(number))
    config = config_of(tmp_path)
    (tmp_path / "runs/run/checkpoints").mkdir(parents=True)
    write_checkpoint(config, tmp_path / "runs/run/checkpoints/best.pt", 0)
    (tmp_path / "runs/run/config.yaml").write_text(as_yaml(config))
    (tmp_path / "runs/run/metrics.csv").write_text("step,train_loss,val_loss\n1,0.9,\n2,0.5,0.6\n")
    return tmp_path


def call(folder: Path, *words: str) -> int:
    try:
        return script.main(["--preset=base", f"--run={folder / 'runs/run'}", *words])
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """metrics.json is flat, finite and whole; everything that is told exists; a second look says that it is one."""
    assert call(folder) == 0
    said = capsys.readouterr().out
    run = folder / "runs/run"
    figures = json.loads((run / "results/metrics.json").read_text())
    assert set(PHANTOM_KEYS) <= figures.keys()
    assert all(isinstance(value, str) or np.isfinite(value) for value in figures.values())
    assert {p.name for p in (run / "figures").iterdir()} == {
        "overlay.png", "errors.png", "thresholds.png", "learning_curve.png"
    }  # fmt: skip
    told = [Path(line) for line in said.splitlines() if line.startswith(str(run))]
    assert len(told) == 6
    assert all(path.exists() for path in told)
    assert "test mitochondria Jaccard" in said
    assert "judged before" not in said
    assert call(folder) == 0
    assert "these test volumes were judged before" in capsys.readouterr().out
    assert json.loads((run / "results/metrics.json").read_text()) == figures, "the same twice"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--checkpoint={f}/none.pt"], "no trained weights at"),
        (["model.filters=[3,4,9]"], "was trained with other constants than these (model.filters: - 3 - 4 - 9 here, - "),
        (["data.test_image=[]", "data.test_label=[]", "--checkpoint={f}/runs/run/checkpoints/best.pt"],
         "expected labelled volumes to judge the weights on"),
        (["data.test_label=[]", "--checkpoint={f}/runs/run/checkpoints/best.pt"], "has no labels"),
        (["targets.names=[boundary]", "targets.weights=[1]", "targets.label_channels=[0]", "decoding.target=boundary",
          "--checkpoint={f}/runs/run/checkpoints/best.pt"], "decoding.target: boundary"),
        (["--preset=nonsense"], "--preset nonsense: expected one of"),
    ],
)  # fmt: skip
def test_bad_calls_are_told(folder: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        call(folder, *(word.format(f=folder) for word in words))
    assert caught.value.exit_code == 2
    assert expected in caught.value.problems[0]
    assert not (folder / "runs/run/results/metrics.json").exists()


def test_the_confidence_that_was_asked_for_is_told_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, "evaluation.confidence=0.5") == 0
    said = capsys.readouterr().out
    assert "50% interval" in said and "95% interval" not in said
    report = (folder / "runs/run/report.html").read_text()
    assert "confidence: 0.5" in report and str(folder / "test.npy") in report


def test_processors_are_those_of_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    threads = torch.get_num_threads()
    try:
        assert call(folder, "system.num_gpus=0", "system.num_cpus=1") == 0
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("role", ["train", "val"])
def test_what_was_learnt_from_is_not_judged(folder: Path, role: str) -> None:
    image, label = (f"data.{role}_{kind}={folder}/test{end}.npy" for kind, end in (("image", ""), ("label", "_labels")))
    config = configure(config_of(folder), [], [image, label])
    write_checkpoint(config, folder / "runs/run/checkpoints/best.pt", 0)
    with pytest.raises(UserError, match=r"test_image: .*test\.npy .*is among what is used as") as caught:
        call(folder, image, label)
    assert caught.value.exit_code == 2


def test_training_volumes_that_are_gone_are_told_and_the_others_still_count(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"data.train_image=[{folder}/gone.npy, {folder}/test.npy]",
        f"data.train_label=[{folder}/a.npy, {folder}/b.npy]",
    ]
    write_checkpoint(configure(config_of(folder), [], words), folder / "runs/run/checkpoints/best.pt", 0)
    with pytest.raises(UserError, match="used as train_image|is among what is used"):
        call(folder, *words)
    assert "gone.npy was trained on and is not here" in capsys.readouterr().out


def test_a_run_with_nothing_to_judge_is_told(folder: Path) -> None:
    config = configure(
        config_of(folder), [], ["targets.names=[affinity]", "targets.weights=[1]", "targets.label_channels=[0]"]
    )
    write_checkpoint(config, folder / "runs/run/checkpoints/best.pt", 0)
    words = ["targets.names=[affinity]", "targets.weights=[1]", "targets.label_channels=[0]", "decoding.target=none"]
    with pytest.raises(UserError, match="nothing to judge"):
        call(folder, *words)
