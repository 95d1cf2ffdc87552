"""Defects of the original system that no other file here has a test for; the numbers are those of its list."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.amp import GradScaler

from common.errors import BAD_DATA, UserError
from common.parallel import process_group
from histo_mmnet import figures, trainer
from histo_mmnet.composites import SLOTS, Composite
from histo_mmnet.config import Config, Model
from histo_mmnet.evaluation import Cases, FoldVerdict, Thresholds
from histo_mmnet.folds import material_of
from histo_mmnet.gradcam import PER_FOLD, activation_maps, chosen_composites, hooked_modules
from histo_mmnet.members import build_network, mmnet_of
from histo_mmnet.places import collect
from histo_mmnet.predictions import ALL, Predictions, predict
from histo_mmnet.slides import Album, Slide
from histo_mmnet.trainer import Material
from histo_mmnet.validation import validate
from tests.histo_mmnet.small_runs import changed, small_config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return small_config(tmp_path_factory.mktemp("small"))


def material(config: Config) -> Material:
    collection = collect(config)
    return material_of(collection, collection.trials[0], mmnet_of(0), Album.of(config), config)


class Unasked:
    asked = False


@pytest.mark.parametrize("scale", [2.0**4, 2.0**14])
def test_known_defect_2_a_scaled_loss_takes_the_same_clipped_step(small: Config, scale: float) -> None:
    """The original clipped the scaled gradients: what AdamW got was below its epsilon, and steps shrank by half."""
    config = changed(small, "model.dropout=0", "train.max_gradient_norm=0.1")
    weights, norms = [], []
    with process_group(True) as device:
        own = material(config)
        for scaler in (GradScaler("cpu", enabled=False), GradScaler("cpu", init_scale=scale)):
            state = dataclasses.replace(trainer.begin(config, own.member, device), scaler=scaler)
            state.model.eval()
            stream = trainer.stream_of(own, config)
            batches = iter([trainer.stack([stream[p] for p in range(f, f + 2)]) for f in range(0, 4, 2)])
            figures_, _ = trainer.take_step(
                state, trainer.RunningStatistics(state.model), batches, Unasked(), own, config  # type: ignore[arg-type]
            )  # fmt: skip
            norms.append(figures_["gradient_norm"])
            weights.append(torch.cat([weight.detach().flatten() for weight in state.model.parameters()]))
            assert state.as_checkpoint(config, own)["scaler"] == scaler.state_dict()
    assert norms[0] > 0.1 and norms[1] == pytest.approx(norms[0], rel=1e-4)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


def test_known_defect_12_what_is_no_number_ends_the_run(small: Config) -> None:
    """The original took 0.5 for it."""
    with process_group(True) as device:
        own = material(small)
        network = build_network(own.member, small.model).eval().to(device)
        torch.nn.init.constant_(network.head[-1].bias, torch.nan)  # type: ignore[arg-type, union-attr, index]
        with pytest.raises(
            UserError, match=r"no number for \d+ of \d+ composites, the first of SOB_.*diverged"
        ) as caught:
            validate(network, own.val, own.album, small)
    assert caught.value.exit_code == BAD_DATA


def test_known_defect_13_every_fold_has_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original dropped the fifth."""
    drawn: list[str] = []

    def keep(figure: plt.Figure, path: Path) -> None:
        drawn.extend(str(line.get_label()) for line in figure.axes[0].get_lines())
        plt.close(figure)

    monkeypatch.setattr(figures, "save_figure", keep)
    curve = {"fpr": [0.0, 0.5, 1.0], "tpr": [0.0, 0.8, 1.0], "thresholds": [0.9, 0.5, 0.1]}
    results: list[dict[str, Any]] = [{"fold": fold, "roc_data": curve, "test_auc": 0.8} for fold in range(5)]
    labels = np.array([0, 1, 0, 1])
    names = ("a", "b", "c", "d")
    patients = Cases(np.array([0.1, 0.6, 0.4, 0.9]), labels, np.full(4, 0.5), names, names)
    figures.draw_roc_curves(results, patients, tmp_path / "roc.png")
    assert all(any(f"fold {fold}" in label for label in drawn) for fold in range(5)), drawn


@pytest.mark.parametrize(
    ("backbone", "layer"), [("resnet18", ""), ("resnet18", "layer3"), ("efficientnet_b0", ""), ("densenet121", ""),
                            ("convnext_tiny", ""), ("swin_t", ""), ("shufflenet_v2_x0_5", "stage3")],
)  # fmt: skip
@pytest.mark.parametrize("shared", [True, False])
def test_known_defect_16_any_backbone_and_layer_has_maps(backbone: str, layer: str, shared: bool) -> None:
    """The original hooked a layer that only EfficientNet has."""
    torch.manual_seed(0)
    settings = Model(backbone=backbone, shared=shared, width=16, dropout=0.0)
    network = build_network(mmnet_of(0), settings).eval()
    torch.nn.init.normal_(network.head[-1].weight)  # type: ignore[arg-type, union-attr, index]
    images, present = torch.randn(1, 4, 3, 64, 96), torch.tensor([[True, False, True, True]])
    maps, _ = activation_maps(network, images, torch.arange(4)[None], present, layer, 0.0, "float32")
    assert maps.shape[0] == 4 and (maps[1] == 0).all() and (maps >= 0).all() and maps[present[0]].sum() > 0
    assert len(hooked_modules(network, layer)) == (1 if shared or not layer else 4)


@pytest.mark.parametrize("layer", ["features.1", "features.3", "features.5", "norm"])
def test_grad_cam_knows_where_swin_has_its_channels(layer: str) -> None:
    torch.manual_seed(0)
    network = build_network(mmnet_of(0), Model(backbone="swin_t", shared=True, width=16, dropout=0.0)).eval()
    torch.nn.init.normal_(network.head[-1].weight)  # type: ignore[arg-type, union-attr, index]
    present = torch.ones(1, 4, dtype=torch.bool)
    maps, _ = activation_maps(
        network, torch.randn(1, 4, 3, 64, 96), torch.arange(4)[None], present, layer, 0.0, "float32"
    )
    assert abs(maps.shape[2] / maps.shape[1] - 1.5) < 0.01


@pytest.mark.parametrize("layer", ["relu", "layer1.0.relu", "bn", "maxpool.1"])
def test_a_layer_without_maps_is_one_line(layer: str) -> None:
    network = build_network(mmnet_of(0), Model(backbone="resnet18", shared=True, width=16, dropout=0.0)).eval()
    images, present = torch.randn(1, 4, 3, 64, 96), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="evaluation.gradcam_layer"):
        activation_maps(network, images, torch.arange(4)[None], present, layer, 0.0, "float32")


def test_grad_cam_explains_the_decision_at_the_threshold() -> None:
    """Between two thresholds the decision, and with it the sign of what speaks for it, is another."""
    torch.manual_seed(0)
    network = build_network(mmnet_of(0), Model(backbone="resnet18", shared=True, width=16, dropout=0.0)).eval()
    torch.nn.init.normal_(network.head[-1].weight)  # type: ignore[arg-type, union-attr, index]
    images, present = torch.randn(1, 4, 3, 64, 96), torch.ones(1, 4, dtype=torch.bool)
    logit = activation_maps(network, images, torch.arange(4)[None], present, "", 0.0, "float32")[1]
    below, above = (
        activation_maps(network, images, torch.arange(4)[None], present, "", logit + step, "float32")[0]
        for step in (-0.1, 0.1)
    )
    assert not torch.allclose(below, above)


def test_known_defect_11_who_attends_to_whom_is_a_table(small: Config) -> None:
    """The original saved a vector of four and called it 4 x 4."""
    with process_group(True) as device:
        own = material(small)
        network = build_network(own.member, small.model).eval().to(device)
        found = predict(network, own.val, own.album, small, (ALL,))
    assert found.attention.shape == (len(own.val), 4, 4)
    whole = [k for k, composite in enumerate(own.val) if None not in composite.paths]
    np.testing.assert_allclose(found.attention[whole].sum(2), np.tile([0, 1, 1, 1], (len(whole), 1)), atol=1e-5)
    assert (np.triu(found.attention) == 0).all()


def test_known_defect_16_pictures_are_of_several_patients_of_both_classes() -> None:
    """The original's first five composites were of one slide."""
    slides = [Slide(f"slide {k}", f"14-{k // 2}", k // 4, {40: (Path(f"{k}.png"),)}, {}) for k in range(8)]
    composites = [Composite(slide, (Path("a.png"), None, None, None), SLOTS) for slide in slides for _ in range(3)]
    numbers = np.zeros(24), np.zeros((24, 16)), np.zeros((24, 4)), np.zeros((24, 4, 4)), np.arange(24), np.zeros(24)
    predictions = Predictions(composites, *numbers)
    chosen = chosen_composites(FoldVerdict(mmnet_of(0), predictions, predictions, Thresholds(0.5, 0.5, 0.5), 0.0))
    assert [c.slide.label for c in chosen] == [0] * PER_FOLD + [1] * PER_FOLD
    assert len({c.slide.accession for c in chosen}) == 2 * PER_FOLD
