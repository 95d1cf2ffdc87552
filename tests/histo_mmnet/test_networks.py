"""MMNet and its relatives: every set of magnifications works, and an empty slot has no say."""

import itertools

import pytest
import torch
from torch import Tensor

from histo_mmnet.config import BREAKHIS, PHANTOM, Model
from histo_mmnet.members import baselines_of, build_network, count_trainable, mmnet_of
from histo_mmnet.model_defs.compact import CompactMMNet
from histo_mmnet.model_defs.mmnet import MMNet, cells_of
from histo_mmnet.model_defs.single_mag import SingleMagNet
from histo_mmnet.names import MAGNIFICATIONS

SETS = [
    chosen for size in range(1, 5) for chosen in itertools.combinations(range(4), size)
]  # the 15 that are not empty
Network = MMNet | CompactMMNet | SingleMagNet


def network(kind: str) -> Network:
    """A small network with every weight drawn, so that nothing begins as nothing."""
    torch.manual_seed(0)
    made: Network
    if kind == "single":
        made = SingleMagNet("shufflenet_v2_x0_5", 0, 0.5)
    elif kind == "compact":
        made = CompactMMNet("shufflenet_v2_x0_5", 0, 16, 0.5)
    else:
        made = MMNet("shufflenet_v2_x0_5", 0, kind == "shared", 16, 0.5)
    for name, weight in made.named_parameters():
        if "extractors" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


def composites(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, 3, 48, 64), torch.arange(4).expand(batch, 4)


def present_of(chosen: tuple[int, ...], batch: int) -> Tensor:
    present = torch.zeros(batch, 4, dtype=torch.bool)
    present[:, list(chosen)] = True
    return present


@pytest.mark.parametrize("kind", ["separate", "shared", "compact", "single"])
@pytest.mark.parametrize("chosen", SETS)
def test_known_defects_3_and_10_a_masked_magnification_has_no_influence(kind: str, chosen: tuple[int, ...]) -> None:
    """Whatever lies in an empty slot, NaN included, moves no logit and gets no gradient."""
    model = network(kind)
    images, magnification = composites(2)
    present = present_of(chosen, 2)
    with torch.inference_mode():
        logits = model(images, magnification, present)
        for filling in (1e3 * torch.randn_like(images), torch.full_like(images, torch.nan)):
            changed = torch.where(present[:, :, None, None, None], images, filling)
            assert (model(changed, magnification, present) - logits).abs().max() < 1e-6
    assert torch.isfinite(logits).all() and logits.shape == (2,)
    images.requires_grad_()
    model(images, magnification, present).sum().backward()
    assert images.grad is not None
    given = images.grad.flatten(2).abs().sum(2)
    assert (given[present] > 0).all() and (given[~present] == 0).all()


@pytest.mark.parametrize("kind", ["separate", "shared", "compact"])
def test_composites_of_several_sets_in_one_batch(kind: str) -> None:
    """A batch is its composites one by one, in eval mode."""
    model = network(kind)
    images, magnification = composites(len(SETS))
    present = torch.cat([present_of(chosen, 1) for chosen in SETS])
    with torch.inference_mode():
        together = model(images, magnification, present)
        alone = torch.cat([model(images[k, None], magnification[k, None], present[k, None]) for k in range(len(SETS))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chosen", SETS)
def test_a_set_put_together_from_vectors_is_the_set_itself(chosen: tuple[int, ...]) -> None:
    """Photographs pass the backbone once; sets of them are fused afterwards."""
    model = network("shared")
    images, magnification = composites(2)
    with torch.inference_mode():
        vectors = model.vectors(images.flatten(0, 1), magnification.flatten()).unflatten(0, (2, 4))
        fused = model.fused(vectors, present_of(chosen, 2))[0]
        torch.testing.assert_close(fused, model(images, magnification, present_of(chosen, 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chosen", SETS)
def test_importance_is_shared_out_among_what_is_there(chosen: tuple[int, ...]) -> None:
    model = network("shared")
    assert isinstance(model, MMNet)
    images, magnification = composites(3)
    present = present_of(chosen, 3)
    with torch.inference_mode():
        _, importance, attention = model.explained(images, magnification, present)
    torch.testing.assert_close(importance.sum(1), torch.ones(3))
    assert (importance[~present] == 0).all()
    # each magnification attends to coarser ones that are there, and to nothing else
    for finer, coarser in itertools.product(range(4), repeat=2):
        attends = finer in chosen and coarser in chosen and coarser < finer
        assert (attention[:, finer, coarser] > 0).all() == attends
    some = attention.sum(2)[attention.sum(2) > 0]
    torch.testing.assert_close(some, torch.ones_like(some))


def test_known_defect_11_attention_is_four_by_four() -> None:
    model = network("shared")
    assert isinstance(model, MMNet)
    images, magnification = composites(3)
    assert model.explained(images, magnification, present_of((0, 1, 2, 3), 3))[2].shape == (3, 4, 4)


@pytest.mark.parametrize("kind", ["separate", "shared", "compact"])
def test_every_weight_takes_part(kind: str) -> None:
    model = network(kind).train()
    images, magnification = composites(4)
    model(images, magnification, present_of((0, 1, 2, 3), 4)).square().sum().backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_additions_begin_as_nothing() -> None:
    """A new MMNet is the mean of a line per magnification on plain means: what the baseline is."""
    torch.manual_seed(0)
    model = MMNet("shufflenet_v2_x0_5", 0, True, 16, 0.5).eval()
    images, magnification = composites(2)
    present = present_of((0, 1, 2, 3), 2)
    with torch.inference_mode():
        plain = model.extractors(images.flatten(0, 1), magnification.flatten()).flatten(2).mean(2).unflatten(0, (2, 4))
        lines = torch.stack([model.evidence[m](plain[:, m])[:, 0] for m in range(4)], 1).mean(1)
        torch.testing.assert_close(model(images, magnification, present), lines)


def test_the_compact_variant_takes_any_number_of_images() -> None:
    model = network("compact")
    torch.manual_seed(2)
    images, magnification = torch.randn(1, 7, 3, 48, 64), torch.tensor([[0, 0, 0, 1, 2, 2, 3]])
    present = torch.ones(1, 7, dtype=torch.bool)
    with torch.inference_mode():
        logit = model(images, magnification, present)
        order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
        torch.testing.assert_close(
            model(images[:, order], magnification[:, order], present), logit, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("backbone", ["resnet50", "efficientnet_b1", "swin_t"])
def test_the_compact_variant_trains_at_most_three_million_weights(backbone: str) -> None:
    settings = Model(architecture="compact", backbone=backbone, width=512, frozen=True)
    compact = build_network(mmnet_of(0), settings)
    assert count_trainable(compact) <= 3_000_000


def test_a_frozen_backbone_stays_as_it_is() -> None:
    """Batch norm's running figures too, which no gradient guards."""
    settings = Model(architecture="compact", backbone="resnet18", width=16, frozen=True)
    compact = build_network(mmnet_of(0), settings).train()
    before = {name: value.clone() for name, value in compact.extractors.state_dict().items()}
    images, magnification = composites(2)
    compact(images, magnification, present_of((0, 1, 2, 3), 2)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in compact.extractors.state_dict().items())
    assert compact.head.training and not any(m.training for m in compact.extractors.modules())
    assert any("model.pretrained" in p or "pretrained" in p for p in settings.problems())


def test_presets_have_networks(capsys: pytest.CaptureFixture[str]) -> None:
    for config in (PHANTOM, BREAKHIS):
        made = [build_network(member, config.model) for member in (mmnet_of(0), *baselines_of(0))]
        assert isinstance(made[0], MMNet) and all(isinstance(one, SingleMagNet) for one in made[1:])
        with capsys.disabled():
            print(f"\n{config.run.preset}: {count_trainable(made[0]):,} weights, {len(MAGNIFICATIONS)} magnifications")


@pytest.mark.parametrize(("size", "number"), [((7, 5), 2), ((3, 4), 4), ((1, 1), 4), ((9, 9), 1)])
def test_parts_of_a_map_cover_it(size: tuple[int, int], number: int) -> None:
    cells = cells_of(torch.ones(1, 1, *size), number)
    torch.testing.assert_close(cells, torch.ones_like(cells))
    assert cells.shape[2] <= number and cells.shape[3] <= number
