"""Losses by hand, against MONAI's and torch's, under masks that must not be felt and at the ends of the number range."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from em_segmentation.config import LossName, Model, TargetName, Targets
from em_segmentation.losses import (
    at_scale,
    deep_supervision_loss,
    fitting_losses,
    fitting_problems,
    target_loss,
)
from em_segmentation.targets import Target, num_channels

CLASSES = dataclasses.replace(Targets(), semantic_classes=4)
MODEL = dataclasses.replace(Model(), positive_weight=3.0, tversky_alpha=0.3, tversky_beta=0.6, focal_gamma=1.5)
CASES: list[tuple[TargetName, Targets, LossName]] = [
    (name, settings, function)
    for name in get_args(TargetName)
    for settings in ((Targets(), CLASSES) if name == "semantic" else (Targets(),))
    for function in fitting_losses(name, settings)
]
each_case = pytest.mark.parametrize(("name", "settings", "function"), CASES)


def example(name: TargetName, settings: Targets, seed: int) -> tuple[Tensor, Target]:
    """Random logits (3, C, 2, 5, 4) in float64 and a target of which about two thirds are valid."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, num_channels(name, settings), 2, 5, 4, generator=draw, dtype=torch.float64)
    if name in ("distance", "centre", "lsd"):
        values = torch.randn(logits.shape, generator=draw)
    else:
        classes = max(2, settings.semantic_classes) if name == "semantic" else 2
        channels = logits.shape[1] if name == "affinity" else 1
        values = torch.randint(0, classes, (3, channels, 2, 5, 4), generator=draw).float()
    shape = values.shape if name == "affinity" else (3, 1, 2, 5, 4)
    return logits, Target(values, torch.rand(shape, generator=draw) < 0.67)


def all_valid(target: Target) -> Target:
    return Target(target.values, torch.ones_like(target.valid))


def one_loss(function: LossName, name: TargetName, logits: Tensor, target: Target, settings: Targets) -> Tensor:
    """A single function with weight 1."""
    model = dataclasses.replace(MODEL, loss_functions=(function,), loss_weights=(1.0,))
    return target_loss(name, logits, target, (function,), model, settings)


def reference(function: LossName, name: TargetName, x: Tensor, t: Tensor, classes: bool) -> Tensor:
    """The same loss by torch or MONAI, for a batch that is valid everywhere."""
    if function == "MSELoss":
        return functional.mse_loss(x.tanh() if name == "distance" else x, t.double())
    if function == "CrossEntropyLoss":
        return functional.cross_entropy(x, t[:, 0].long())
    if function in ("BCEWithLogitsLoss", "WeightedBCELoss"):
        weight = torch.tensor(MODEL.positive_weight if function == "WeightedBCELoss" else 1.0)
        return functional.binary_cross_entropy_with_logits(x, t.double(), pos_weight=weight)
    losses = pytest.importorskip("monai.losses")
    activation = {"to_onehot_y": True, "softmax": True} if classes else {"sigmoid": True}
    if function == "FocalLoss":
        theirs = losses.FocalLoss(gamma=MODEL.focal_gamma, to_onehot_y=classes, use_softmax=classes)
    elif function == "TverskyLoss":
        theirs = losses.TverskyLoss(alpha=MODEL.tversky_alpha, beta=MODEL.tversky_beta, **activation)
    elif function == "DiceLoss":
        theirs = losses.DiceLoss(**activation)
    else:
        assert function == "DiceCELoss"
        if not classes:  # theirs takes several sigmoids for a softmax
            dice: Tensor = losses.DiceLoss(sigmoid=True)(x, t)
            return dice + functional.binary_cross_entropy_with_logits(x, t.double())
        theirs = losses.DiceCELoss(**activation)
    loss: Tensor = theirs(x, t)
    return loss


@each_case
@pytest.mark.parametrize("seed", range(3))
def test_losses_are_those_of_torch_and_monai(
    name: TargetName, settings: Targets, function: LossName, seed: int
) -> None:
    logits, target = example(name, settings, seed)
    ours = one_loss(function, name, logits, all_valid(target), settings)
    theirs = reference(function, name, logits, target.values, settings.semantic_classes > 1)
    assert ours.shape == (3,)
    torch.testing.assert_close(ours.mean(), theirs.double(), atol=1e-6, rtol=1e-6)  # MONAI's focal loss is float32


@pytest.mark.parametrize("function", ["DiceLoss", "TverskyLoss"])
def test_nothing_found_where_nothing_is_costs_what_it_costs_in_monai(function: LossName) -> None:
    """Where sums are as small as the smoothing, its place in the formula decides."""
    for logit in (-20.0, -14.0, -8.0):
        logits = torch.full((1, 1, 2, 5, 4), logit)
        target = Target(torch.zeros_like(logits), torch.ones_like(logits, dtype=torch.bool))
        ours = one_loss(function, "boundary", logits, target, Targets())
        theirs = reference(function, "boundary", logits, target.values, False)
        torch.testing.assert_close(ours.mean(), theirs, atol=1e-6, rtol=1e-5)


def test_losses_by_hand() -> None:
    """Two voxels: a sure hit, and a false alarm with probability one half."""
    logits = torch.tensor([20.0, 0.0]).view(1, 1, 1, 1, 2)
    target = Target(torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 2, dtype=torch.bool))
    by_hand: dict[LossName, float] = {
        "BCEWithLogitsLoss": math.log(2) / 2,
        "WeightedBCELoss": math.log(2) / 2,
        "FocalLoss": 0.5**1.5 * math.log(2) / 2,
        "DiceLoss": 1 - 2 / (1.5 + 1),
        "TverskyLoss": 1 - 1 / (1 + 0.3 * 0.5),
        "DiceCELoss": math.log(2) / 2 + 1 - 2 / (1.5 + 1),
    }
    for function, expected in by_hand.items():
        loss = one_loss(function, "boundary", logits, target, Targets()).item()
        assert loss == pytest.approx(expected, abs=1e-5), function
    missed = Target(1 - target.values, target.valid)
    loss = one_loss("WeightedBCELoss", "boundary", logits, missed, Targets()).item()
    assert loss == pytest.approx((20 + 3 * math.log(2)) / 2, abs=1e-5), "a miss weighs positive_weight"


def test_the_better_answer_costs_less() -> None:
    for name, settings, function in CASES:
        logits, target = example(name, settings, 0)
        if name in ("distance", "centre", "lsd"):
            right = target.values.clamp(-0.99, 0.99).atanh() if name == "distance" else target.values
        elif settings.semantic_classes > 1:
            right = 9.0 * (target.values == torch.arange(4).view(-1, 1, 1, 1))
        else:
            right = 18 * target.values - 9
        better, random = (one_loss(function, name, x, target, settings) for x in (right, logits))
        assert (better < random).all(), (name, function)


@each_case
def test_what_is_not_valid_has_exactly_no_influence(name: TargetName, settings: Targets, function: LossName) -> None:
    logits, target = example(name, settings, 1)
    logits = logits.float().requires_grad_()
    loss = one_loss(function, name, logits, target, settings)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    hidden = ~target.valid
    assert (gradient[hidden.expand_as(gradient)] == 0).all()
    assert (gradient[~hidden.expand_as(gradient)] != 0).any()
    for junk, wrong in ((torch.nan, torch.nan), (torch.inf, -7.0), (-torch.inf, 1e30), (0.0, 1.0)):
        other = torch.where(hidden, junk, logits.detach()).requires_grad_()
        values = torch.where(hidden, wrong, target.values)
        again = one_loss(function, name, other, Target(values, target.valid), settings)
        (other_gradient,) = torch.autograd.grad(again.sum(), other)
        assert torch.equal(again, loss)
        assert torch.equal(other_gradient, gradient)


@each_case
def test_masked_losses_are_those_of_the_valid_voxels_alone(
    name: TargetName, settings: Targets, function: LossName
) -> None:
    """The valid voxels of a sample, cut out and put into a row, have the same loss."""
    logits, target = example(name, settings, 2)
    valid = target.valid[:, :1]
    target = Target(target.values, valid.expand_as(target.valid))
    masked = one_loss(function, name, logits, target, settings)
    for sample in range(3):
        kept = valid[sample, 0]
        row = all_valid(Target(target.values[sample][:, kept][None, :, None, None], target.valid[:1, :, :1, :1, :1]))
        row = Target(row.values, torch.ones(1, 1, 1, 1, int(kept.sum()), dtype=torch.bool))
        alone = one_loss(function, name, logits[sample][:, kept][None, :, None, None], row, settings)
        torch.testing.assert_close(masked[sample], alone[0])


@each_case
def test_a_sample_without_valid_voxels_has_no_loss_and_disturbs_nobody(
    name: TargetName, settings: Targets, function: LossName
) -> None:
    logits, target = example(name, settings, 3)
    logits.requires_grad_()
    valid = target.valid.clone()
    valid[1] = False
    loss = one_loss(function, name, logits, Target(target.values, valid), settings)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    whole = one_loss(function, name, logits, target, settings)
    assert loss[1] == 0
    assert (gradient[1] == 0).all()
    assert torch.equal(loss[[0, 2]], whole[[0, 2]])


def test_dice_leaves_out_channels_that_are_nowhere_valid() -> None:
    logits, target = example("affinity", Targets(), 4)
    valid = target.valid.clone()
    valid[:, 2] = False
    loss = one_loss("DiceLoss", "affinity", logits, Target(target.values, valid), Targets())
    two = Target(target.values[:, :2], valid[:, :2])
    torch.testing.assert_close(loss, one_loss("DiceLoss", "affinity", logits[:, :2], two, Targets()))


@each_case
def test_every_sample_is_judged_by_itself(name: TargetName, settings: Targets, function: LossName) -> None:
    logits, target = example(name, settings, 5)
    together = one_loss(function, name, logits, target, settings)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = one_loss(function, name, logits[one], Target(target.values[one], target.valid[one]), settings)
        torch.testing.assert_close(together[one], alone)


@each_case
def test_gradients_are_those_of_finite_differences(name: TargetName, settings: Targets, function: LossName) -> None:
    logits, target = example(name, settings, 6)
    logits, target = logits[:2, :, :, :2, :2], Target(target.values[:2, :, :, :2, :2], target.valid[:2, :, :, :2, :2])
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: one_loss(function, name, x, target, settings), (logits,))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_stay_finite_at_extreme_logits(
    name: TargetName, settings: Targets, function: LossName, dtype: torch.dtype
) -> None:
    logits, target = example(name, settings, 7)
    for size in (30.0, 1000.0, 65504.0):
        for gamma in (0.0, 0.5, 2.0):
            extreme = (size * logits.sign()).to(dtype).requires_grad_()
            model = dataclasses.replace(MODEL, focal_gamma=gamma)
            loss = target_loss(name, extreme, target, (function,), model, settings)
            (gradient,) = torch.autograd.grad(loss.sum(), extreme)
            assert loss.isfinite().all()
            if function != "MSELoss":  # whose gradient at 65504 is as large as that
                assert gradient.isfinite().all()


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_judged_in_single_precision(
    name: TargetName, settings: Targets, function: LossName, dtype: torch.dtype
) -> None:
    logits, target = example(name, settings, 8)
    logits = logits.to(dtype)
    single = one_loss(function, name, logits.float(), target, settings)
    assert single.dtype == torch.float32
    assert torch.equal(one_loss(function, name, logits, target, settings), single)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one_loss(function, name, logits, target, settings), single)


def test_a_targets_loss_is_the_weighted_sum_of_its_functions() -> None:
    logits, target = example("boundary", Targets(), 9)
    functions: tuple[LossName, ...] = ("DiceLoss", "BCEWithLogitsLoss", "FocalLoss")
    dice, entropy, focal = (one_loss(one, "boundary", logits, target, Targets()) for one in functions)
    model = dataclasses.replace(MODEL, loss_weights=(0.5, 4.0))
    loss = target_loss("boundary", logits, target, ("BCEWithLogitsLoss", "DiceLoss"), model, Targets())
    torch.testing.assert_close(loss, 0.5 * dice + 4 * entropy)
    loss = target_loss("boundary", logits, target, functions, model, Targets())
    torch.testing.assert_close(loss, 0.5 * dice + 4 * entropy + focal, msg="what the model does not weigh counts once")


def test_losses_that_do_not_fit_their_target_are_named() -> None:
    assert list(fitting_problems(Targets(), Model())) == []
    both = dataclasses.replace(Targets(), names=("affinity", "distance"))
    assert list(fitting_problems(both, Model())) == [
        f"model.loss_functions: {function} does not fit target distance; expected MSELoss "
        "(targets.loss_functions: a list per target)"
        for function in ("DiceLoss", "BCEWithLogitsLoss")
    ]
    own = dataclasses.replace(both, loss_functions=(("CrossEntropyLoss",), ("MSELoss",)))
    (problem,) = fitting_problems(own, Model())
    assert problem.startswith(
        "targets.loss_functions: CrossEntropyLoss does not fit target affinity; expected DiceLoss,"
    )
    assert not list(fitting_problems(dataclasses.replace(own, loss_functions=(("FocalLoss",), ("MSELoss",))), Model()))
    (problem,) = fitting_problems(CLASSES, Model())
    assert problem.startswith("model.loss_functions: BCEWithLogitsLoss does not fit target semantic of 4 classes;")
    entropy = dataclasses.replace(Model(), loss_functions=("CrossEntropyLoss",), loss_weights=(1.0,))
    (problem,) = fitting_problems(Targets(), entropy)
    assert problem.startswith("model.loss_functions: CrossEntropyLoss does not fit target semantic; expected DiceLoss,")
    twice = dataclasses.replace(Model(), loss_functions=("DiceLoss", "DiceLoss"))
    assert list(fitting_problems(Targets(), twice)) == [
        "model.loss_functions: expected different ones, got ['DiceLoss', 'DiceLoss']"
    ]


def test_a_coarse_cell_takes_the_voxel_under_its_centre() -> None:
    values = torch.arange(12.0).view(1, 1, 1, 1, 12)
    target = Target(values, values % 2 == 0)
    for cells, expected in ((12, list(range(12))), (6, [1, 3, 5, 7, 9, 11]), (4, [1, 4, 7, 10]), (5, [1, 3, 6, 8, 10])):
        coarse = at_scale(target, (1, 1, cells))
        assert coarse.values.flatten().tolist() == expected
        assert torch.equal(coarse.valid, coarse.values % 2 == 0), "a mask moves with its voxels"


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 8, 4), (8, 3, 5), (1, 1, 1), (3, 16, 7)])
def test_deep_supervision_invents_no_id(shape: tuple[int, int, int]) -> None:
    """Every value of a coarse cell exists within the box of voxels that the cell covers, torch's nearest-exact one."""
    fine = (8, 16, 15)
    values = torch.randint(0, 9, (2, 1, *fine), generator=torch.Generator().manual_seed(0)).float() * 1001
    coarse = at_scale(Target(values, values > 3000), shape)
    assert torch.equal(coarse.valid, coarse.values > 3000)
    assert torch.equal(coarse.values, functional.interpolate(values, shape, mode="nearest-exact"))
    for b, _, *cell in torch.cartesian_prod(*(torch.arange(n) for n in coarse.values.shape)).tolist():
        box = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(cell, fine, shape, strict=True))
        assert coarse.values[b, 0, *cell] in values[b, 0][box]


@each_case
def test_each_coarser_scale_weighs_half_as_much(name: TargetName, settings: Targets, function: LossName) -> None:
    logits, target = example(name, settings, 10)
    scales = [logits, logits[:, :, :1, :3, :2] * 0.7, logits[:, :, :1, :1, :1] + 1]
    model = dataclasses.replace(MODEL, loss_functions=(function,), loss_weights=(2.0,))
    losses = [
        target_loss(name, x, at_scale(target, (x.shape[2], x.shape[3], x.shape[4])), (function,), model, settings)
        for x in scales
    ]
    together = deep_supervision_loss(name, scales, target, (function,), model, settings)
    torch.testing.assert_close(together, (4 * losses[0] + 2 * losses[1] + losses[2]) / 7)
    alone = deep_supervision_loss(name, scales[:1], target, (function,), model, settings)
    torch.testing.assert_close(alone, losses[0])
