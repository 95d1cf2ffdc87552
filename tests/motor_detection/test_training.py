"""The loop: accumulation, ranks, clipping, learning rates, validation, the best weights, and what it refuses."""

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.amp import GradScaler

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint
from common.config import as_yaml, configure
from common.errors import BAD_DATA, UserError
from common.interrupt import StopRequest
from common.loading import next_batch
from common.logbook import read_metrics
from common.parallel import process_group
from common.step import RunningStatistics, guarded_update
from motor_detection import trainer, validation
from motor_detection.config import Augment, Config
from motor_detection.dataset import Patches, PatchStream, Sample, choose_patches, stack
from motor_detection.heatmap import render_heatmaps
from motor_detection.patches import PATCH_ARRAYS, read_patch, write_patch
from motor_detection.places import read_tomograms, training_identity
from motor_detection.trainer import (
    CHECKPOINT,
    KIND,
    State,
    begin,
    keep_if_best,
    resume,
    take_step,
)
from motor_detection.validation import validate
from tests.common_runs import ROOT, differing, run_command
from tests.motor_detection.small_runs import (
    NO_PATCHES,
    script,
    small_config,
    small_patches,
    train_alone,
    write_tomograms,
)

CPU = torch.device("cpu")
PLAIN = Augment(flip=0.0, turn=0.0, affine=0.0, intensity=0.0, noise=0.0, mixup=0.0)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven tomograms and their patches; never written to by a test."""
    folder = tmp_path_factory.mktemp("training")
    write_tomograms(folder, range(7))
    small_patches(small_config(folder))
    return folder


def chosen(config: Config) -> Patches:
    labelled, _ = read_tomograms(config.data, True)
    return choose_patches(config, config.data.patches, labelled)[0]


def with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def in_folder(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, root=folder))


def without_chance(config: Config) -> Config:
    """No augmentation, no dropout, and group norm: what a batch gives does not depend on how it is split."""
    model = dataclasses.replace(config.model, norm="group", dropout=0.0, drop_path=0.0)
    inference = dataclasses.replace(config.inference, tiling="blended")
    return dataclasses.replace(config, model=model, augment=PLAIN, inference=inference)


def step_batches(config: Config, patches: Patches, step: int) -> Iterator[Sample]:
    """The micro-batches of one optimizer step in one process."""
    train = config.train
    stream = PatchStream(patches.train, patches.patch_size, patches.max_motors, train.seed)
    for start in range(step * train.batch_size, (step + 1) * train.batch_size, train.micro_batch_size):
        batch = [stack([stream[position] for position in range(start, start + train.micro_batch_size)])]
        yield from next_batch(batch, "train.workers")


def one_step(state: State, config: Config, patches: Patches) -> dict[str, float]:
    with process_group(True):
        state.model.train()
        batches = step_batches(config, patches, state.step)
        return take_step(state, RunningStatistics(state.model), batches, StopRequest(), patches, config)[0]


def gradients_of_a_step(
    config: Config, patches: Patches, scale: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], dict[str, float], State]:
    """What the optimizer is given before clipping, the step's figures and the state after it."""
    seen: dict[str, torch.Tensor] = {}

    def noted(model: torch.nn.Module, *rest: Any) -> torch.Tensor:
        seen.update({n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None})
        return guarded_update(model, *rest)

    state = begin(config, CPU)
    with torch.no_grad():
        state.model.logit.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    state.scaler = GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "guarded_update", noted)
        figures = one_step(state, config, patches)
    return seen, figures, state


def test_known_defect_3_accumulated_gradients_equal_those_of_one_batch(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original did not divide by the number of micro-batches: its gradient grew with the accumulation."""
    config = without_chance(small_config(data_folder))
    patches = chosen(config)
    found = []
    for micro in (1, 2, 4):
        gradients, figures, _ = gradients_of_a_step(
            with_train(config, micro_batch_size=micro), patches, 1.0, monkeypatch
        )
        found.append((gradients, figures))
    whole, whole_figures = found[-1]
    for gradients, figures in found[:-1]:
        assert figures["loss"] == pytest.approx(whole_figures["loss"], rel=1e-5)
        assert figures["gradient_norm"] == pytest.approx(whole_figures["gradient_norm"], rel=1e-4)
        for name, expected in whole.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(gradients[name], expected, atol=1e-4 * scale + 1e-9, rtol=1e-4)


def test_known_defect_2_gradients_are_clipped_once_per_step_after_unscaling(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original clipped the scaled sum after every micro-batch. Here Adam's first moment holds a tenth of a
    gradient whose norm is the limit, in the direction of the whole step's, whatever the loss scale."""
    config = with_train(without_chance(small_config(data_folder)), max_gradient_norm=0.5)
    patches = chosen(config)
    moments = []
    for scale in (1.0, 1024.0):
        gradients, figures, state = gradients_of_a_step(config, patches, scale, monkeypatch)
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert norm > 1.0 and figures["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
        names = dict(state.model.named_parameters())
        first = {name: state.optimizer.state[names[name]]["exp_avg"] for name in gradients}
        for name, gradient in gradients.items():
            torch.testing.assert_close(first[name], 0.1 * gradient * (0.5 / norm), rtol=1e-4, atol=1e-8)
        moments.append(first)
    for name in moments[0]:
        torch.testing.assert_close(moments[0][name], moments[1][name], rtol=1e-5, atol=1e-9)


def test_learning_rates_reach_their_groups(data_folder: Path) -> None:
    """Adam's first step moves a weight by its learning rate: a millionth in the backbone, a hundredth in the head."""
    config = with_train(
        small_config(data_folder), learning_rate_backbone=1e-6, learning_rate_head=1e-2, warmup_share=0.0
    )
    state = begin(config, CPU)
    with torch.no_grad():
        state.model.logit.weight.normal_(0, 0.3)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    one_step(state, config, chosen(config))
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in state.model.named_parameters()}
    groups = state.model.groups_of_parameters()
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    backbone = [moved[names[id(parameter)]] for parameter in groups["backbone"]]
    head = [moved[names[id(parameter)]] for parameter in groups["head"]]
    assert max(backbone) < 2e-6 and max(head) == pytest.approx(1e-2, rel=0.05)
    decayed = {(g["name"], g["weight_decay"]) for g in state.optimizer.param_groups}
    assert decayed == {(name, decay) for name in ("backbone", "head") for decay in (0.0, config.train.weight_decay)}
    assert all(p.dim() > 1 for g in state.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"])


def test_two_processes_without_accumulation_equal_one_with(data_folder: Path, tmp_path: Path) -> None:
    """The same micro-batches, dropout included: weights, averages and batch-norm buffers differ in rounding only."""
    config = with_train(in_folder(small_config(data_folder), tmp_path), steps=6, validate_every=3)
    done = run_command(script("train.py", config, tmp_path, 2, []))
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: sums over other threads round otherwise
    records = train_alone(config, tmp_path / "alone", chosen(config))
    torch.set_num_threads(threads)
    alone = load_checkpoint(tmp_path / "alone/checkpoints/last.pt", KIND, CHECKPOINT)
    shared = load_checkpoint(tmp_path / "run/checkpoints/last.pt", KIND, CHECKPOINT)
    assert alone["identity"] == shared["identity"] and alone["step"] == shared["step"] == 6
    for part in ("model", "weights"):
        for name, expected in alone[part].items():
            if expected.is_floating_point():  # the number of batches seen is counted per process
                scale = float(expected.abs().max())
                torch.testing.assert_close(shared[part][name], expected, rtol=1e-5, atol=1e-5 * scale)
    for ours, theirs in zip(records, read_metrics(tmp_path / "run/metrics.csv", ("loss",)), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, nan_ok=True)


def test_the_best_weights_give_the_logged_figures_again(data_folder: Path, tmp_path: Path) -> None:
    config = with_train(small_config(data_folder), steps=30, validate_every=10, log_every=4)
    patches = chosen(config)
    logged = train_alone(config, tmp_path, patches)
    records = [record for record in logged if "average_precision" in record]
    best = load_checkpoint(tmp_path / "checkpoints/best.pt", KIND, {"weights": dict})
    top = max(record["average_precision"] for record in records)
    record = next(record for record in records if record["step"] == best["step"])
    assert record["average_precision"] == top
    model = begin(config, CPU).average  # in the memory layout of training: another one rounds otherwise
    load_weights(model, best["weights"], tmp_path / "best.pt")
    with process_group(True) as device:
        again = validate(model, patches, config, device)
    assert {name: record[name] for name in again} == again
    assert again.items() <= best["measured"].items()


def test_best_is_the_highest_average_precision_and_of_equals_the_latest(data_folder: Path, tmp_path: Path) -> None:
    config = small_config(data_folder)
    state = begin(config, CPU)
    kept = []
    with process_group(True):
        for state.step, precision in enumerate((0.0, 0.5, 0.3, 0.5, 0.7, 0.6)):
            keep_if_best(state, {"average_precision": precision}, tmp_path, config, NO_PATCHES)
            kept.append(load_checkpoint(tmp_path / "checkpoints/best.pt", KIND, {"weights": dict})["step"])
    assert kept == [0, 1, 1, 3, 4, 4]


def test_validation_scores_every_patch_once(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the micro-batch; and the figures do not depend on it."""
    config = small_config(data_folder)
    patches = chosen(config)
    model = begin(config, CPU).average
    with torch.no_grad():
        model.logit.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(0))
    whole_score = validation.score_patches
    figures = []
    for micro in (1, 2, 5):
        indices: list[int] = []

        def noted(batch: Sample, *rest: Any, into: list[int] = indices) -> Any:
            into.extend(batch.index.tolist())
            return whole_score(batch, *rest)

        monkeypatch.setattr(validation, "score_patches", noted)
        with process_group(True) as device:
            figures.append(
                validate(model, patches, with_train(config, micro_batch_size=micro, batch_size=10 * micro), device)
            )
        assert indices == list(range(len(patches.validation)))
    assert figures[1] == pytest.approx(figures[0], rel=1e-5) and figures[2] == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.parametrize("broken", [(120.0, 0.0), (float("nan"), 30.0)])
def test_a_loss_that_is_no_number_names_the_patches_and_keeps_the_last_checkpoint(
    data_folder: Path, tmp_path: Path, broken: tuple[float, float]
) -> None:
    """A patch whose intensity lost its deviation or its mean."""
    config = with_train(small_config(data_folder), steps=8, checkpoint_every=1, seed=5)
    patches = chosen(config)
    stream = PatchStream(patches.train, patches.patch_size, patches.max_motors, 5)
    sample = stream[13]  # of step 3
    assert isinstance(sample, Sample)
    culprit = patches.train[int(sample.index)]
    spoiled = tmp_path / culprit.name
    write_patch(spoiled, read_patch(culprit, tuple(PATCH_ARRAYS)) | {"intensity": np.array(broken, np.float32)})
    patches = dataclasses.replace(patches, train=[spoiled if path == culprit else path for path in patches.train])
    with pytest.raises(UserError) as caught:
        train_alone(config, tmp_path / "run", patches)
    assert caught.value.exit_code == BAD_DATA
    assert "the loss is not finite" in caught.value.problems[0] and str(spoiled) in caught.value.problems[0]
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt", KIND, CHECKPOINT)["step"] <= 3


def test_known_defect_4_without_validation_tomograms_nothing_is_best(data_folder: Path, tmp_path: Path) -> None:
    """The original's validation loss was then 0, and every epoch overwrote the best weights."""
    config = small_config(data_folder)
    for fold, words in ((9, "no tomogram of the label table is in fold 9"), (0, "no patch of the chosen folds")):
        data = dataclasses.replace(config.data, validation_fold=fold, patches=tmp_path / "patches")
        data.patches.mkdir(exist_ok=True)
        labelled, _ = read_tomograms(data, False)
        settings = data_folder / "patches" / "settings.yaml"
        (data.patches / "settings.yaml").write_text(settings.read_text())
        with pytest.raises(UserError) as caught:
            choose_patches(dataclasses.replace(config, data=data), data.patches, labelled)
        assert words in caught.value.problems[0]


def test_known_defect_4_validation_without_a_motor_is_an_error_and_never_best(
    data_folder: Path, tmp_path: Path
) -> None:
    config = with_train(small_config(data_folder), steps=2, validate_every=1)
    patches = chosen(config)
    empty = [path for path in patches.train if path.name.endswith("_negative.npz")]
    assert empty
    with pytest.raises(UserError):
        train_alone(config, tmp_path, dataclasses.replace(patches, validation=empty))
    assert not (tmp_path / "checkpoints" / "best.pt").exists()


def test_a_run_of_another_config_is_not_continued(data_folder: Path, tmp_path: Path) -> None:
    config = with_train(small_config(data_folder), steps=2)
    patches = chosen(config)
    train_alone(config, tmp_path, patches)
    other = with_train(config, weight_decay=0.5)
    with pytest.raises(UserError) as caught:
        train_alone(other, tmp_path, patches)
    assert caught.value.exit_code == BAD_DATA and "another config" in caught.value.problems[0]
    with pytest.raises(UserError):
        resume(begin(config, CPU), tmp_path / "checkpoints" / "best.pt", config, patches)
    last = tmp_path / "checkpoints" / "last.pt"
    before = last.read_bytes()
    assert len(train_alone(config, tmp_path, patches)) == 1, "a complete run is left as it is"
    assert last.read_bytes() == before


def test_weights_of_another_model_are_refused_by_name(data_folder: Path, tmp_path: Path) -> None:
    config = small_config(data_folder)
    save_checkpoint(begin(config, CPU).as_checkpoint(config, NO_PATCHES), tmp_path / "best.pt")
    start = with_train(config, start_from=tmp_path / "best.pt", seed=1)
    first = begin(config, CPU).model.state_dict()
    assert all(torch.equal(value, first[name]) for name, value in begin(start, CPU).model.state_dict().items())
    wider = dataclasses.replace(start, model=dataclasses.replace(config.model, channels=(4, 4, 8, 8, 16)))
    with pytest.raises(UserError) as caught:
        begin(wider, CPU)
    assert caught.value.exit_code == BAD_DATA
    assert "belong to another model" in caught.value.problems[0] and "deepest.weight" in caught.value.problems[0]
    save_checkpoint({"kind": "ct_retrieval", "weights": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        begin(with_train(config, start_from=tmp_path / "other.pt"), CPU)
    assert "found ct_retrieval" in caught.value.problems[0]


def test_a_run_does_not_continue_on_other_patches_or_labels(data_folder: Path, tmp_path: Path) -> None:
    config = with_train(small_config(data_folder), steps=2)
    patches = chosen(config)
    train_alone(config, tmp_path, patches)
    labelled, _ = read_tomograms(config.data, False)
    moved = [dataclasses.replace(label, motors=label.motors + 0.25) for label in labelled]
    (data_folder / "patches" / "tomo_0" / "complete.json").rename(tmp_path / "marker")  # as if not converted yet
    try:
        fewer, warnings = choose_patches(config, config.data.patches, labelled)
        assert len(warnings) == 1 and "1 tomograms have no patches of these labels" in warnings[0]
        assert "tomo_0" in warnings[0] and len(fewer.train) < len(patches.train)
        with pytest.raises(UserError, match="no patch of the chosen folds"):
            choose_patches(config, config.data.patches, moved)
    finally:
        (tmp_path / "marker").rename(data_folder / "patches" / "tomo_0" / "complete.json")
    assert chosen(config).digest == patches.digest != fewer.digest
    with pytest.raises(UserError) as caught:
        train_alone(config, tmp_path, fewer)
    assert caught.value.exit_code == BAD_DATA and "have changed since this run began" in caught.value.problems[0]


def test_what_validation_measures_with_is_no_constant_of_inference_or_evaluation(data_folder: Path) -> None:
    """Else two runs of one identity could keep different best weights."""
    config = small_config(data_folder)
    other = configure(config, [], ["inference.min_distance_angstrom=2000", "inference.max_picks=1",
                                   "inference.min_score=0.9", "evaluation.tolerance_angstrom=1"])  # fmt: skip
    assert training_identity(other) == training_identity(config)
    model = begin(config, CPU).average
    with torch.no_grad():
        model.logit.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(0))
    with process_group(True) as device:
        assert validate(model, chosen(config), config, device) == validate(model, chosen(config), other, device)


def test_a_pick_on_the_tail_of_a_motor_just_outside_counts_neither_way(tmp_path: Path) -> None:
    """The patch shows half of it; calling the pick false would punish the network for being right."""
    config = configure(small_config(tmp_path), [], ["model.stride=8"])
    spacing, nan = torch.full((1, 3), 13.1), [float("nan")] * 3
    for motors, truths, picks in (
        ([[-3.0, 16, 16], nan], 0, 0),  # outside: its pick is left out
        ([[1.0, 16, 16], nan], 1, 1),  # inside
        ([[-3.0, 16, 16], [4.0, 16, 16]], 1, 1),  # beside one inside: the pick may be that one's
        ([nan, nan], 0, 1),  # no motor anywhere: a false pick
    ):
        tensor = torch.tensor([motors])
        drawn = tensor[:, :1] if picks or truths else tensor
        shown = torch.tensor([[[2.0, 16, 16]]]) if tensor.isnan().all() else drawn
        heat = render_heatmaps(shown, 200 / spacing, (32, 32, 32), 8)[0, 0].numpy()
        batch = Sample(
            torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 2), tensor, spacing, torch.zeros(1), torch.zeros(1)
        )
        scored = validation.picks_of_patch(heat, batch, 0, config)
        assert (len(scored.truths), len(scored.scores)) == (truths, picks), motors


def test_an_unreadable_patch_is_named_by_reading_processes_too(data_folder: Path, tmp_path: Path) -> None:
    """torch would wrap what a worker raises in a traceback of its own."""
    config = with_train(small_config(data_folder), workers=1, steps=4)
    patches = chosen(config)
    broken = tmp_path / "0000_single.npz"
    broken.write_bytes(b"damaged")
    for changed in (dataclasses.replace(patches, train=[broken]), dataclasses.replace(patches, validation=[broken])):
        with pytest.raises(UserError) as caught:
            train_alone(config, tmp_path / "run", changed)
        assert caught.value.exit_code == BAD_DATA and str(broken) in caught.value.problems[0]


def test_a_loss_that_is_no_number_on_one_process_ends_both_with_one_message(data_folder: Path, tmp_path: Path) -> None:
    config = with_train(in_folder(small_config(data_folder), tmp_path), steps=4)
    folder = tmp_path / "patches"
    shutil.copytree(config.data.patches, folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, patches=folder))
    patches = chosen(config)
    sample = PatchStream(patches.train, patches.patch_size, patches.max_motors, config.train.seed)[
        2
    ]  # of the second process
    assert isinstance(sample, Sample)
    culprit = patches.train[int(sample.index)]
    write_patch(culprit, read_patch(culprit, tuple(PATCH_ARRAYS)) | {"intensity": np.array([np.nan, 30.0], np.float32)})
    done = run_command(script("train.py", config, tmp_path, 2, []))
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1, done.stderr  # torchrun's own code for a failed process
    assert len(told) == 1 and "the loss is not finite" in told[0] and str(culprit) in told[0]
    assert "gloo" not in done.stderr


APART = """
import os, sys
sys.path[0] = sys.argv.pop(1)
from pathlib import Path
from common.config import as_yaml, configure
from common.errors import run_script
from common.loading import next_batch
from common.parallel import process_group
from motor_detection.config import KAGGLE
from motor_detection.dataset import choose_patches
from motor_detection.places import read_tomograms
from motor_detection.trainer import train
def main(arguments):
    config = configure(KAGGLE, [Path(arguments[0])], [])
    patches, _ = choose_patches(config, config.data.patches, read_tomograms(config.data, False)[0])
    with process_group(True) as device:
        train(config, Path(arguments[1]) / os.environ["RANK"], patches, device)
    return 0
run_script(main)
"""


def test_machines_without_a_common_disk_are_refused(data_folder: Path, tmp_path: Path) -> None:
    """One of them has the run's last checkpoint, the other has not: they would continue at different steps."""
    config = with_train(small_config(data_folder), steps=4)
    stopped = with_train(config, checkpoint_every=2)
    train_alone(stopped, tmp_path / "0", chosen(config))
    last = tmp_path / "0" / "checkpoints" / "last.pt"
    save_checkpoint(load_checkpoint(last, KIND, CHECKPOINT) | {"step": 2}, last)
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "apart.py"), str(ROOT), str(tmp_path / "config.yaml"), str(tmp_path)]  # fmt: skip
    (tmp_path / "apart.py").write_text(APART)
    done = run_command(command)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "at the steps [2, 0]" in told[0] and "all machines share" in told[0], done.stderr


def test_a_request_to_stop_ends_the_run_after_a_step_with_a_checkpoint(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And continued it ends in the same bits as without."""
    config = with_train(small_config(data_folder), steps=6, checkpoint_every=100, log_every=2)
    patches = chosen(config)
    train_alone(config, tmp_path / "whole", patches)
    whole_step, steps = trainer.take_step, []

    def interrupted(*given: Any) -> Any:
        steps.append(given[0].step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM if tmp_path.name.endswith("1") else signal.SIGINT)
        return whole_step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_alone(config, tmp_path / "stopped", patches)
    last = tmp_path / "stopped" / "checkpoints" / "last.pt"
    assert load_checkpoint(last, KIND, CHECKPOINT)["step"] == 3 and steps == [0, 1, 2]
    train_alone(config, tmp_path / "stopped", patches)
    states = [
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt", KIND, CHECKPOINT) for name in ("whole", "stopped")
    ]
    assert not differing(states[0], states[1], "last.pt")


def test_the_digest_knows_which_tomogram_is_trained_on_and_which_is_validated(data_folder: Path) -> None:
    """The same files dealt out anew are another run."""
    config = small_config(data_folder)
    labelled, _ = read_tomograms(config.data, False)
    patches = chosen(config)
    assert patches.tomograms == [
        "train tomo_0", "train tomo_1", "train tomo_2", "train tomo_3", "validation tomo_4", "validation tomo_5"
    ]  # fmt: skip
    moved = [dataclasses.replace(label, fold=0) if label.tomo_id == "tomo_3" else label for label in labelled]
    again, _ = choose_patches(config, config.data.patches, moved)
    assert sorted([*again.train, *again.validation]) == sorted([*patches.train, *patches.validation])
    assert again.digest != patches.digest and "validation tomo_3" in again.tomograms


def test_an_optimizer_that_does_not_fit_is_a_damaged_checkpoint(data_folder: Path, tmp_path: Path) -> None:
    config = with_train(small_config(data_folder), steps=2)
    patches = chosen(config)
    train_alone(config, tmp_path, patches)
    last = tmp_path / "checkpoints" / "last.pt"
    saved = load_checkpoint(last, KIND, CHECKPOINT)
    for damage in ({"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"model": {"a": 3}}):
        save_checkpoint(saved | damage, last)
        with pytest.raises(UserError) as caught:
            resume(begin(config, CPU), last, config, patches)
        assert caught.value.exit_code == BAD_DATA and str(last) in caught.value.problems[0]
