"""Every model has the reference's names and shapes, and its logits for known weights, to 1e-9."""

import numpy as np
import pytest
import torch
from torch import nn

from common.backbones.create import BACKBONES, create_classifier
from common.blocks import DropPath
from tests.common.backbone_reference import (
    NUM_GOLDEN,
    NUM_MODELS,
    classes_of,
    dims_of,
    filled,
    golden,
    image,
    layouts,
    torchvision_models,
)

LARGEST_QUICK = 9e6  # weights; more than that takes seconds
WITHOUT_LOGITS = {"vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf", "convnext_large",
                  "vgg13", "vgg19", "vgg13_bn", "vgg19_bn"}  # fmt: skip


def test_all_models_of_the_reference_are_there() -> None:
    assert layouts().keys() == BACKBONES.keys() and len(BACKBONES) == NUM_MODELS
    assert golden().keys() == BACKBONES.keys() - WITHOUT_LOGITS and len(golden()) == NUM_GOLDEN


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_names_shapes_and_order_of_weights(name: str) -> None:
    with torch.device("meta"):
        model = create_classifier(name, dims_of(name), 3, classes_of(name))
    found = [(key, list(weight.shape), str(weight.dtype).removeprefix("torch."))
             for key, weight in model.state_dict().items()]  # fmt: skip
    assert found == layouts()[name]


def check_logits(name: str) -> None:
    known = golden()[name]
    model = filled(create_classifier(name, dims_of(name), 3, classes_of(name)))
    with torch.inference_mode():
        logits = model.logits(image(tuple(known["shape"])))[0].numpy()
    assert len(logits) == known["n_out"]
    scale = np.abs(known["first8"]).max()
    np.testing.assert_allclose(logits[:8], known["first8"], rtol=1e-9, atol=1e-9 * scale)
    assert logits.std(ddof=1) == pytest.approx(known["std"], rel=1e-9)
    assert logits.mean() == pytest.approx(known["mean"], rel=1e-9, abs=1e-9 * scale)
    assert logits.argmax() == known["argmax"]


def weights_of(name: str) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in BACKBONES[name](dims_of(name), 3, 1000).parameters())


SMALL = [name for name in sorted(BACKBONES.keys() - WITHOUT_LOGITS) if weights_of(name) <= LARGEST_QUICK]


@pytest.mark.parametrize("name", SMALL)
def test_logits_of_known_weights(name: str) -> None:
    check_logits(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - WITHOUT_LOGITS - set(SMALL)))
def test_logits_of_known_weights_of_giants(name: str) -> None:
    check_logits(name)


def training_constants(model: nn.Module) -> tuple[set[tuple[float, float]], set[float], list[float]]:
    """Eps and momentum of batch norms, probabilities of dropout, and of dropping branches in order."""
    norms, dropouts, branches = set(), set(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            norms.add((module.eps, round(module.momentum or 0, 9)))
        elif isinstance(module, nn.Dropout) and module.p:
            dropouts.add(module.p)
        elif isinstance(module, DropPath):
            branches.append(round(module.probability, 9))
        elif type(module).__name__ == "StochasticDepth":
            branches.append(round(module.p, 9))  # type: ignore[arg-type]
    return norms, dropouts, sorted(set(branches) - {0.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(name for name in BACKBONES if not name.startswith("regnet") or "_400mf" in name)
)
def test_constants_of_training_are_the_references(name: str) -> None:
    words = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        theirs = torchvision_models().get_model(name, weights=None, **words)
        ours = create_classifier(name, dims_of(name), 3, classes_of(name))
    expected, found = training_constants(theirs), training_constants(ours)
    if name == "googlenet":
        expected[1].discard(0.7)  # of its side classifiers, which nothing reads here
    assert found == expected


SPREAD = ("resnet18", "densenet121", "efficientnet_b0", "mobilenet_v2", "mnasnet0_5", "vgg11_bn", "shufflenet_v2_x0_5",
          "convnext_tiny", "swin_t", "swin_v2_t", "regnet_y_400mf", "r3d_18")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_initial_weights_are_spread_as_the_references(name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision_models().get_model(name, weights=None).state_dict()
    ours = create_classifier(name, dims_of(name), 3, classes_of(name)).state_dict()
    for key, weight in ours.items():
        if weight.is_floating_point() and weight.numel() > 2000:
            assert float(weight.std()) == pytest.approx(float(theirs[key].std()), rel=0.15, abs=1e-6), key
