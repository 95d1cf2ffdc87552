"""The loop: accumulation, clipping, optimizers, averages, precision, validation, the best weights, and what it refuses."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.amp import GradScaler

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint
from common.errors import BAD_DATA, WRONG_CALL, UserError
from common.interrupt import StopRequest
from common.logbook import read_metrics
from common.parallel import process_group
from common.step import RunningStatistics, guarded_update
from em_segmentation import trainer, validation
from em_segmentation.augmentation import Patch
from em_segmentation.config import Config
from em_segmentation.dataset import open_volumes, patch_stream, stack
from em_segmentation.model_defs import registry
from em_segmentation.model_defs.registry import KIND
from em_segmentation.objective import build_targets
from em_segmentation.schedule import ranked
from em_segmentation.state import CHECKPOINT, State, begin, epoch_file, resume
from em_segmentation.trainer import check_hardware, take_step
from em_segmentation.validation import check_monitors, figures_of, possible_figures, score_patch, validate
from tests.common_runs import differing, family, run_command
from tests.em_segmentation.small_runs import (
    changed,
    in_folder,
    saved,
    script,
    small_config,
    train_alone,
    train_on,
    write_volumes,
)

CPU = torch.device("cpu")
PLAIN = ("data.augmentation=false", "model.norm=group")  # what a batch gives does not depend on how it is split


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("training")
    write_volumes(folder)
    return small_config(folder)


def batches_of_step(config: Config, step: int) -> Iterator[Patch]:
    """The micro-batches of one optimizer step in one process."""
    stream, each = patch_stream(open_volumes(config), config), config.data.batch_size
    for number in range(config.training.accumulate_grad_batches):
        start = (step * config.training.accumulate_grad_batches + number) * each
        batch = stack([stream[position] for position in range(start, start + each)])
        assert isinstance(batch, Patch)
        yield batch


def one_step(state: State, config: Config) -> dict[str, float]:
    with process_group(True):
        state.model.train()
        batches, statistics = batches_of_step(config, state.step), RunningStatistics(state.model)
        return take_step(state, statistics, batches, StopRequest(), open_volumes(config), config)[0]


def gradients_of_a_step(
    config: Config, scale: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], dict[str, float], State]:
    """What the optimizer is given before clipping, the step's figures and the state after it."""
    seen: dict[str, torch.Tensor] = {}

    def noted(model: torch.nn.Module, *rest: Any) -> torch.Tensor:
        seen.update({n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None})
        return guarded_update(model, *rest)

    state = begin(config, CPU)
    state.scaler = GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "guarded_update", noted)
        figures = one_step(state, config)
    return seen, figures, state


def test_accumulated_gradients_are_those_of_one_batch(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for batch, passes in ((4, 1), (2, 2), (1, 4)):
        split = (f"data.batch_size={batch}", f"training.accumulate_grad_batches={passes}")
        found.append(gradients_of_a_step(changed(small, *PLAIN, *split), 1.0, monkeypatch))
    whole, whole_figures, _ = found[0]
    for gradients, figures, _ in found[1:]:
        assert figures["train_loss"] == pytest.approx(whole_figures["train_loss"], rel=1e-5)
        assert figures["gradient_norm"] == pytest.approx(whole_figures["gradient_norm"], rel=1e-4)
        for name, expected in whole.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(gradients[name], expected, atol=1e-4 * scale + 1e-9, rtol=1e-4)


def test_gradients_are_clipped_once_per_step_after_unscaling(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first moment holds a tenth of a gradient whose norm is the limit, whatever the loss scale."""
    config = changed(small, *PLAIN, "training.gradient_clip_val=0.01", "training.accumulate_grad_batches=2")
    moments = []
    for scale in (1.0, 1024.0):
        gradients, figures, state = gradients_of_a_step(config, scale, monkeypatch)
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert norm > 0.1 and figures["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
        names = dict(state.model.named_parameters())
        first = {name: state.optimizer.state[names[name]]["exp_avg"] for name in gradients}
        for name, gradient in gradients.items():
            torch.testing.assert_close(first[name], 0.1 * gradient * (0.01 / norm), rtol=1e-4, atol=1e-9)
        moments.append(first)
    for name in moments[0]:
        torch.testing.assert_close(moments[0][name], moments[1][name], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_moves_weights_by_the_known_rule(small: Config, momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nesterov's first step is lr (1 + momentum) (g + decay w); biases and norms do not decay."""
    config = changed(small, *PLAIN, "optimizer.name=SGD", f"optimizer.momentum={momentum}", "optimizer.lr=0.1",
                     "optimizer.weight_decay=0.5", "scheduler.warmup_epochs=0", "training.gradient_clip_val=1e9")  # fmt: skip
    before = {name: value.detach().clone() for name, value in begin(config, CPU).model.named_parameters()}
    gradients, figures, state = gradients_of_a_step(config, 1.0, monkeypatch)
    assert figures["learning_rate"] == pytest.approx(0.1)
    for name, value in state.model.named_parameters():
        decay = 0.5 if value.dim() > 1 else 0.0
        expected = before[name] - 0.1 * (1 + momentum) * (gradients[name] + decay * before[name])
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6)


def test_adamw_moves_weights_by_the_learning_rate_of_the_step(small: Config) -> None:
    config = changed(small, "optimizer.lr=0.003", "scheduler.warmup_epochs=0", "optimizer.weight_decay=0")
    state = begin(config, CPU)
    before = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    one_step(state, config)
    moved = max(float((value.detach() - before[name]).abs().max()) for name, value in state.model.named_parameters())
    assert moved == pytest.approx(0.003, rel=0.05)


def test_the_average_follows_the_weights_by_its_decay(small: Config) -> None:
    """Validated and saved as best; with decay 0 it is the weights."""
    for decay in (0.0, 0.8):
        config = changed(small, f"training.ema_decay={decay}")
        state = begin(config, CPU)
        expected = {name: value.detach().clone() for name, value in state.average.named_parameters()}
        for step in range(3):
            one_step(state, config)
            kept = min(decay, (1 + step) / (10 + step))
            for name, value in state.model.named_parameters():
                expected[name] = kept * expected[name] + (1 - kept) * value.detach()
        for name, value in state.average.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        assert not any(value.requires_grad for value in state.average.parameters())


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16_trains_on_a_cpu_and_float16_is_refused(small: Config, tmp_path: Path) -> None:
    losses = {}
    for precision in ("32", "bf16-mixed"):
        config = changed(small, f"training.precision='{precision}'", "training.max_epochs=1", "data.augmentation=false")
        losses[precision] = [record["train_loss"] for record in train_alone(config, tmp_path / precision)]
        weights = saved(tmp_path / precision, "last.pt")["model"]
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values() if w.is_floating_point())
    assert losses["bf16-mixed"] == pytest.approx(losses["32"], rel=0.02) and losses["bf16-mixed"] != losses["32"]
    with process_group(True) as device, pytest.raises(UserError, match="16-mixed trains on GPUs only") as caught:
        check_hardware(changed(small, "training.precision=16-mixed"), device)
    assert caught.value.exit_code == WRONG_CALL


def test_a_batch_that_does_not_divide_among_processes_is_told(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {(2, 1, 2): 1, (4, 2, 2): 4, (4, 3, 2): 2, (4, 2, 4): 2, (3, 4, 4): 3, (1, 6, 3): 1}
    for (batch, passes, ranks), micro in shares.items():
        config = changed(small, f"data.batch_size={batch}", f"training.accumulate_grad_batches={passes}")
        assert trainer.micro_batch_size(config, ranks) == micro
        assert batch * passes % (micro * ranks) == 0
    config = changed(small, "data.batch_size=3", "training.accumulate_grad_batches=2")
    with pytest.raises(UserError, match=r"data.batch_size: 3 x training.accumulate_grad_batches=2 .* 4 processes"):
        trainer.micro_batch_size(config, 4)


def test_the_best_weights_give_the_logged_figures_again(small: Config, tmp_path: Path) -> None:
    volumes = open_volumes(small)
    records = train_on(volumes, small, tmp_path)
    best = saved(tmp_path, "best.pt")
    record = ranked(records, small)[0]
    assert best["step"] == record["step"] and best["measured"] == record
    assert record["val_loss"] == min(one["val_loss"] for one in records if "epoch" in one)
    model = begin(small, CPU).average  # in the memory layout of training: another one rounds otherwise
    load_weights(model, best["weights"], tmp_path / "best.pt")
    with process_group(True):
        again = validate(model, validation.validation_loader(volumes, small), volumes, small, tmp_path)
    assert {name: record[name] for name in again} == again and set(again) == set(possible_figures(small.targets))


def test_the_best_few_epochs_are_kept(small: Config, tmp_path: Path) -> None:
    config = changed(small, "checkpoint.save_top_k=2", "training.max_epochs=5", "training.steps_per_epoch=2")
    records = train_alone(config, tmp_path)
    kept = ranked(records, config)[:2]
    assert {path.name for path in (tmp_path / "checkpoints").glob("epoch-*.pt")} == {epoch_file(one) for one in kept}
    assert not differing(saved(tmp_path, "best.pt"), saved(tmp_path, epoch_file(kept[0])), "best")
    assert saved(tmp_path, epoch_file(kept[1]))["measured"] == kept[1]
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing half-written is left"


def test_training_ends_early_and_stays_ended(small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The highest validation loss cannot rise at every epoch of a run that learns."""
    config = changed(small, "training.max_epochs=50", "training.steps_per_epoch=1", "early_stopping.patience=2",
                     "scheduler.name=constant", "optimizer.lr=1e-12")  # fmt: skip
    records = train_alone(config, tmp_path)
    epochs = [record for record in records if "epoch" in record]
    best = min(epochs, key=lambda record: record["val_loss"])
    assert len(epochs) < 50 and len(epochs) == best["epoch"] + 2
    assert saved(tmp_path, "last.pt")["step"] == len(epochs)
    capsys.readouterr()
    assert train_alone(config, tmp_path) == records and "is complete" in capsys.readouterr().out


def test_without_validation_the_last_weights_are_best_and_it_says_so_once(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(small, "data.val_image=[]", "data.val_label=[]", "training.max_epochs=2",
                     "early_stopping.patience=1", "checkpoint.monitor=nonsense")  # fmt: skip
    check_monitors(config, False)
    records = train_alone(config, tmp_path)
    assert capsys.readouterr().out.count("no validation volumes: the last weights are best") == 1
    assert records[-1]["step"] == saved(tmp_path, "best.pt")["step"] == 8
    assert not any(name.startswith("val_") for record in records for name in record)
    with pytest.raises(UserError, match="scheduler.name: plateau follows a validation"):
        check_monitors(changed(config, "scheduler.name=plateau"), False)


def test_monitors_are_figures_of_the_targets_and_their_mode_is_the_right_way_round(small: Config) -> None:
    check_monitors(changed(small, "checkpoint.monitor=val_dice", "checkpoint.mode=max"), True)
    for wrong, told in (
        ("checkpoint.monitor=val/dice", "checkpoint.monitor: validation has no val/dice; expected val_loss, val_dice, "
         "val_jaccard, val_cut_f1; did you mean val_dice?"),
        ("early_stopping.monitor=val_lsd_error", "early_stopping.monitor: validation has no val_lsd_error"),
        ("checkpoint.monitor=val_dice", "checkpoint.mode: the highest val_dice is best; expected max, got min"),
        ("early_stopping.mode=max", "early_stopping.mode: the least val_loss is best; expected min, got max"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            check_monitors(changed(small, wrong), True)
        assert caught.value.exit_code == WRONG_CALL and caught.value.problems[0].startswith(told)


def test_a_volume_without_foreground_trains_and_validates(small: Config, tmp_path: Path) -> None:
    """Every loss and figure stays finite; Dice of nothing in nothing is 1."""
    random, settings = np.random.default_rng(0), []
    for role in ("train", "val"):
        np.save(tmp_path / f"{role}_image.npy", random.integers(0, 255, (9, 17, 18), np.uint8))
        np.save(tmp_path / f"{role}_labels.npy", np.zeros((9, 17, 18), np.uint8))
        settings += [
            f"data.{role}_image={tmp_path}/{role}_image.npy",
            f"data.{role}_label={tmp_path}/{role}_labels.npy",
        ]
    every = "[semantic, boundary, affinity, distance, centre, lsd]"
    losses = "[[DiceLoss, FocalLoss, TverskyLoss], [DiceCELoss], [WeightedBCELoss], [MSELoss], [MSELoss], [MSELoss]]"
    config = changed(small, *settings, f"targets.names={every}", "targets.weights=[1,1,1,1,1,1]",
                     "targets.label_channels=[0,0,0,0,0,0]", f"targets.loss_functions={losses}",
                     "data.min_foreground=0.5", "training.max_epochs=1")  # fmt: skip
    records = train_alone(config, tmp_path / "run")
    assert all(np.isfinite(value) for record in records for value in record.values())
    assert set(possible_figures(config.targets)) == {name for name in records[-1] if name.startswith("val_")}
    assert records[-1]["val_centre_error"] == 0 and records[-1]["val_lsd_error"] == 0


def perfect(batch: Patch, config: Config) -> torch.Tensor:
    """Logits that are right everywhere."""
    targets = build_targets(batch, config.targets, (20.0, 10.0, 10.0))
    return torch.cat([20 * (target.values - 0.5) for target in targets], 1)


def test_figures_of_validation_are_the_pooled_ones(small: Config) -> None:
    batch = next(batches_of_step(changed(small, "data.batch_size=1"), 0))
    targets = build_targets(batch, small.targets, (20.0, 10.0, 10.0))
    right = perfect(batch, small)
    exact = figures_of([score_patch(batch, right, targets, small.targets) | {"val_loss": 3.0}], small.targets)
    assert exact == {"val_loss": 3.0, "val_dice": 1.0, "val_jaccard": 1.0, "val_cut_f1": 1.0}
    none = right.clone()
    none[:, 0] = -1.0
    row = score_patch(batch, none, targets, small.targets) | {"val_loss": 1.0}
    half = figures_of([row, score_patch(batch, right, targets, small.targets) | {"val_loss": 3.0}], small.targets)
    assert half["val_loss"] == 2.0
    assert half["val_dice"] == pytest.approx(2 / 3) and half["val_jaccard"] == 0.5, "the same patch missed and found"
    unknown = dataclasses.replace(targets[0], valid=torch.zeros_like(targets[0].valid))
    assert figures_of([score_patch(batch, none, [unknown, targets[1]], small.targets) | {"val_loss": 0.0}],
                      small.targets)["val_dice"] == 1.0, "what is not annotated is not judged"  # fmt: skip


def test_several_classes_are_pooled_each_and_averaged_without_the_background(small: Config) -> None:
    config = changed(small, "targets.names=[semantic]", "targets.weights=[1]", "targets.label_channels=[0]",
                     "targets.semantic_classes=3", "targets.semantic_names=[a, b]",
                     "model.loss_functions=[DiceCELoss]", "model.loss_weights=[1]")  # fmt: skip
    labels = torch.zeros(1, 1, 1, 1, 8, dtype=torch.long)
    labels[0, 0, 0, 0] = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    batch = Patch(torch.zeros(1, 1, 1, 1, 8), labels, torch.ones_like(labels, dtype=torch.bool), torch.tensor([0]))
    found = torch.tensor([0, 0, 0, 1, 1, 1, 0, 2])
    logits = torch.nn.functional.one_hot(found, 3).T.reshape(1, 3, 1, 1, 8).float()
    targets = build_targets(batch, config.targets, (1.0, 1.0, 1.0))
    figures = figures_of([score_patch(batch, logits, targets, config.targets) | {"val_loss": 0.0}], config.targets)
    assert figures["val_dice"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert figures["val_jaccard"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def spoil(config: Config, folder: Path) -> Config:
    """Training on an image whose unsampled section 1 holds finite voxels that no network survives."""
    image = np.random.default_rng(0).normal(size=(70, 18, 20)).astype(np.float32)
    image[1] = 3e38
    np.save(folder / "huge_image.npy", image)
    np.save(folder / "huge_labels.npy", (image > 0).astype(np.uint8))
    return changed(config, f"data.train_image={folder}/huge_image.npy", f"data.train_label={folder}/huge_labels.npy",
                   "data.augmentation=false")  # fmt: skip


def test_known_defect_8_a_loss_that_is_no_number_names_the_patches_and_keeps_the_checkpoint(
    small: Config, tmp_path: Path
) -> None:
    config = spoil(changed(small, "checkpoint.every_n_steps=1", "training.max_epochs=50"), tmp_path)
    stream = patch_stream(open_volumes(config), config)
    position = next(p for p in range(500) if stream.draw(p).corner[0] < 2)
    with pytest.raises(UserError) as caught:
        train_alone(config, tmp_path / "run")
    assert caught.value.exit_code == BAD_DATA
    assert "the loss is not finite on" in caught.value.problems[0] and "huge_image.npy" in caught.value.problems[0]
    assert stream.name(position) in caught.value.problems[0]
    kept = saved(tmp_path / "run", "last.pt")
    assert kept["step"] == position // config.data.batch_size
    assert all(w.isfinite().all() for w in kept["model"].values())


def test_an_output_of_validation_that_is_no_number_stops_the_run(small: Config, tmp_path: Path) -> None:
    state, volumes = begin(small, CPU), open_volumes(small)
    with torch.no_grad():
        state.average.network.head.bias.fill_(torch.inf)  # type: ignore[union-attr,operator]
    with process_group(True), pytest.raises(UserError, match="validation output is not finite"):
        validate(state.average, validation.validation_loader(volumes, small), volumes, small, tmp_path)


def test_known_defect_8_a_reading_process_that_dies_during_a_step_is_told(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises wherever the main process happens to be, not where it waits for a batch."""
    config = changed(small, "data.num_workers=1", "data.persistent_workers=false", "training.steps_per_epoch=100")
    whole_step = trainer.take_step

    def killing(*given: Any) -> Any:
        figures = whole_step(*given)
        for process in family(os.getpid()) - {os.getpid()}:
            if "resource_tracker" not in Path(f"/proc/{process}/cmdline").read_text():
                os.kill(process, signal.SIGKILL)
        time.sleep(5)
        return figures

    monkeypatch.setattr(trainer, "take_step", killing)
    with pytest.raises(UserError, match="data.num_workers: a reading process died") as caught:
        train_alone(config, tmp_path)
    assert caught.value.exit_code == BAD_DATA


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_the_run_after_a_step_with_a_checkpoint(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: signal.Signals
) -> None:
    """And continued it ends in the same bits as without."""
    config = changed(small, "training.max_epochs=2", "checkpoint.every_n_steps=100", "checkpoint.save_top_k=2")
    train_alone(config, tmp_path / "whole")
    whole_step, steps = trainer.take_step, []

    def interrupted(*given: Any) -> Any:
        steps.append(given[0].step)
        if len(steps) == 6:
            os.kill(os.getpid(), asked)
        return whole_step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_alone(config, tmp_path / "stopped")
    assert saved(tmp_path / "stopped", "last.pt")["step"] == 6 and steps == list(range(6))
    train_alone(config, tmp_path / "stopped")
    names = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    assert names == ["best.pt", "epoch-0001.pt", "epoch-0002.pt", "last.pt"]
    for name in names:
        assert not differing(saved(tmp_path / "whole", name), saved(tmp_path / "stopped", name), name)
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "stopped/metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def finished(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch; never written to by a test."""
    folder = tmp_path_factory.mktemp("finished")
    train_alone(changed(small, "training.max_epochs=1"), folder)
    return folder


def refused(config: Config, folder: Path) -> str:
    with process_group(True), pytest.raises(UserError) as caught:
        resume(begin(config, CPU), folder / "checkpoints" / "last.pt", config, open_volumes(config))
    assert caught.value.exit_code == BAD_DATA and len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_a_run_of_another_config_or_other_labels_is_not_continued(
    small: Config, finished: Path, tmp_path: Path
) -> None:
    config = changed(small, "training.max_epochs=1")
    assert "belongs to a run of another config" in refused(changed(config, "system.seed=7"), finished)
    labels = np.load(config.data.train_label[0])
    labels[3, 4, 5] += 1
    np.save(tmp_path / "train_0_labels.npy", labels)
    moved = dataclasses.replace(open_volumes(config))
    spoiled = changed(config, f"data.train_label=[{tmp_path}/train_0_labels.npy, {config.data.train_label[1]}]")
    assert open_volumes(spoiled).digest != moved.digest
    with process_group(True), pytest.raises(UserError, match="have changed since this run began"):
        resume(begin(config, CPU), finished / "checkpoints/last.pt", config, open_volumes(spoiled))


@pytest.mark.parametrize(
    "harmless",
    ["data.num_workers=2", "data.use_cache=true", "data.persistent_workers=false", "system.num_cpus=1",
     "checkpoint.every_n_steps=7", "data.test_sections=[0,4]", "inference.overlap=0.25", "logging.pictures=true"],
)  # fmt: skip
def test_what_changes_no_bit_may_change_between_two_calls(small: Config, finished: Path, harmless: str) -> None:
    config = changed(small, "training.max_epochs=1", harmless)
    state = begin(config, CPU)
    resume(state, finished / "checkpoints/last.pt", config, open_volumes(config))
    assert state.step == 4


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"step": 99}, "is at step 99 of 4"),
        ({"records": [1]}, "last.pt: damaged"),
        ({"records": [{"step": "1"}]}, "last.pt: damaged"),
        ({"optimizer": {}}, "last.pt: damaged"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "last.pt: damaged"),
        ({"model": {"a": 3}}, "holds no plain weights"),
    ],
)
def test_a_checkpoint_that_was_edited_is_told(
    small: Config, finished: Path, tmp_path: Path, damage: dict[str, object], told: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    whole = load_checkpoint(finished / "checkpoints/last.pt", KIND, CHECKPOINT)
    save_checkpoint(whole | damage, tmp_path / "checkpoints/last.pt")
    assert told in refused(changed(small, "training.max_epochs=1"), tmp_path)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_moments_of_another_shape_or_none_are_no_optimizer(small: Config, tmp_path: Path, name: str) -> None:
    config = changed(small, "training.max_epochs=1", "training.steps_per_epoch=1", f"optimizer.name={name}")
    train_alone(config, tmp_path)
    last = tmp_path / "checkpoints/last.pt"
    moment = "exp_avg_sq" if name == "AdamW" else "momentum_buffer"
    for damaged in (torch.zeros(3), None):
        whole = load_checkpoint(last, KIND, CHECKPOINT)
        if damaged is None:
            whole["optimizer"]["state"] = {}
        else:
            whole["optimizer"]["state"][0][moment] = damaged
        save_checkpoint(whole, last)
        assert "last.pt: damaged" in refused(config, tmp_path)


def test_a_run_whose_loss_scale_was_too_large_so_far_is_continued(small: Config, tmp_path: Path) -> None:
    """Its optimizer has not made a step yet."""
    config = changed(
        small, "training.max_epochs=1", "training.steps_per_epoch=1", "data.val_image=[]", "data.val_label=[]"
    )
    state, volumes = begin(config, CPU), open_volumes(config)
    state.scaler, state.step = GradScaler("cpu", enabled=True), 1
    save_checkpoint(state.as_checkpoint(config, volumes), tmp_path / "checkpoints/last.pt")
    again = begin(config, CPU)
    again.scaler = GradScaler("cpu", enabled=True)
    resume(again, tmp_path / "checkpoints/last.pt", config, volumes)
    assert again.step == 1


def test_a_run_that_lost_its_best_weights_says_so(small: Config, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").write_bytes((finished / "checkpoints/last.pt").read_bytes())
    assert "best.pt: is missing" in refused(changed(small, "training.max_epochs=1"), tmp_path)


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(small: Config, tmp_path: Path) -> None:
    """The same micro-batches: weights, averages and batch-norm buffers differ in rounding only."""
    config = changed(in_folder(small, tmp_path, "run"), "training.accumulate_grad_batches=2", "training.max_epochs=2",
                     "training.steps_per_epoch=3")  # fmt: skip
    done = run_command(script(config, tmp_path, 2, []))
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: sums over other threads round otherwise
    records = train_alone(config, tmp_path / "alone")
    torch.set_num_threads(threads)
    alone, shared = saved(tmp_path / "alone", "last.pt"), saved(tmp_path / "run", "last.pt")
    assert alone["identity"] == shared["identity"] and alone["step"] == shared["step"] == 6
    assert any("running_var" in name for name in alone["model"])
    for part in ("model", "weights"):
        for name, expected in alone[part].items():
            if expected.is_floating_point():  # the number of batches seen is counted per process
                scale = float(expected.abs().max())
                torch.testing.assert_close(shared[part][name], expected, rtol=1e-4, atol=1e-4 * scale)
    for ours, theirs in zip(records, read_metrics(tmp_path / "run/metrics.csv", ("val_dice",)), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


def test_pictures_are_drawn_where_they_are_asked_for(small: Config, tmp_path: Path) -> None:
    config = changed(small, "training.max_epochs=1", "training.steps_per_epoch=1", "logging.pictures=true")
    train_alone(config, tmp_path)
    assert (tmp_path / "figures/validation.png").stat().st_size > 5000


def test_without_a_last_checkpoint_a_run_begins_anew(small: Config, tmp_path: Path) -> None:
    config = changed(small, "training.max_epochs=1", "checkpoint.save_last=false")
    records = train_alone(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.pt"]
    assert train_alone(config, tmp_path) == records


@pytest.mark.parametrize("kept", [True, False])
def test_reading_processes_of_validation_are_kept_or_not_and_change_nothing(
    small: Config, tmp_path: Path, kept: bool
) -> None:
    config = changed(small, "data.num_workers=1", f"data.persistent_workers={str(kept).lower()}")
    volumes, model = open_volumes(config), begin(config, CPU).average
    with process_group(True):
        loader = validation.validation_loader(volumes, config)
        first, second = (validate(model, loader, volumes, config, tmp_path) for _ in range(2))
        plain = validate(model, validation.validation_loader(volumes, small), volumes, small, tmp_path)
        assert (loader._iterator is not None) == kept  # its processes live on
    assert first == second == plain


class Own(torch.nn.Module):
    """A user's network with a weight that it forgot."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.forgotten = torch.nn.Parameter(torch.ones(3), requires_grad=not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv(x)
        return logits


@pytest.mark.parametrize("frozen", [True, False])
def test_a_network_of_ones_own_trains_and_a_weight_without_a_part_is_told_unless_it_is_frozen(
    small: Config, tmp_path: Path, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.ARCHITECTURES, "own_net", lambda config, out_channels: Own(frozen))
    config = changed(small, "model.architecture=own_net", "training.max_epochs=2")
    if not frozen:
        with pytest.raises(UserError, match="own_net's network.forgotten has no part in the loss") as caught:
            train_alone(config, tmp_path)
        assert caught.value.exit_code == WRONG_CALL
        return
    records = train_alone(config, tmp_path)
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert train_alone(config, tmp_path) == records, "and is complete"
