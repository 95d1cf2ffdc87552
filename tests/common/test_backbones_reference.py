"""Every model has the reference's names and shapes, and its logits for known weights, to 1e-9."""

import numpy as np
import pytest
import torch

from common.backbones.create import BACKBONES, create_classifier
from tests.common.backbone_reference import (
    NUM_GOLDEN,
    NUM_MODELS,
    classes_of,
    dims_of,
    filled,
    golden,
    image,
    layouts,
)

LARGEST_QUICK = 32e6  # weights; more than that takes seconds
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
