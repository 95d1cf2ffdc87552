"""What every backbone promises: maps finest first, a vector, gradients, errors in one line; and slices of 3D maps."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone
from common.backbones.create import BACKBONES, create_backbone, create_classifier, list_backbones
from common.backbones.maxvit import EDGE, Partition, PartitionAttention
from common.backbones.pretrained import load_pretrained
from common.backbones.vit import resized_positions
from common.blocks import DropPath
from common.errors import BAD_DATA, WRONG_CALL, UserError

ONLY_3D = {name for name in BACKBONES if name.startswith(("swin3d", "mvit", "r3d", "mc3", "r2plus1d", "s3d"))}
SMALLEST = {  # of each family
    "resnet18", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
    "convnext_tiny", "regnet_x_400mf", "regnet_y_400mf", "vgg11_bn", "alexnet", "squeezenet1_0", "squeezenet1_1",
    "shufflenet_v2_x0_5", "googlenet", "inception_v3", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t", "swin3d_t",
    "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v2_s",
}  # fmt: skip
CONVOLUTIONAL = sorted(SMALLEST - ONLY_3D - {"vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"})


def edge_of(name: str, model: Backbone) -> int:
    """An edge that fits a network: few voxels."""
    return 32 if name.startswith("vit") else max(32, model.min_edge)


def size_of(name: str, model: Backbone) -> tuple[int, ...]:
    """A small image's size; in 3D of few slices where that is allowed."""
    edge = edge_of(name, model)
    return (edge, edge) if model.dims == 2 else (max(model.min_depth, 4), edge, edge)


def lively(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with norms and gates that do something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.uniform_(parameter, 0.5, 1)
    return model.double().eval()


def check_maps(name: str, dims: int) -> None:
    with torch.device("meta"):
        model = create_backbone(name, dims, 2)
        size = (224,) * dims if name.startswith("vit") else (96,) * dims
        x = torch.empty(2, 2, *size)
        maps, vector = model.forward_features(x), model(x)
    assert tuple(m.shape[1] for m in maps) == model.feature_channels
    assert all(m.dim() == dims + 2 for m in maps)
    assert all(min(a.shape[-2:]) > max(b.shape[-2:]) for a, b in itertools.pairwise(maps))
    assert vector.shape == (2, model.feature_channels[-1])
    assert not {key.split(".")[0] for key in model.state_dict()} & set(model.classifier_names())


@pytest.mark.parametrize("name", sorted(SMALLEST - ONLY_3D))
def test_maps_are_finest_first_and_have_the_channels_that_are_told(name: str) -> None:
    check_maps(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_maps_in_3d(name: str) -> None:
    check_maps(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - SMALLEST - ONLY_3D))
def test_maps_of_larger_networks(name: str) -> None:
    check_maps(name, 2)


def check_learning(name: str, dims: int) -> None:
    """Forward and backward in training mode on the CPU; side classifiers are weights alone."""
    torch.manual_seed(0)
    model = create_classifier(name, dims, 1, 3).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.probability = 0.0  # no branch is dropped
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)  # heads that begin with zeros
    logits = model.logits(torch.randn(2, 1, *size_of(name, model)))
    assert logits.shape == (2, 3)
    (logits - torch.tensor([1.0, -2.0, 0.5])).square().sum().backward()
    still = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()]
    assert all(key.startswith(("aux", "AuxLogits")) for key in still), still[:3]


@pytest.mark.parametrize("name", sorted(SMALLEST - ONLY_3D))
def test_every_weight_learns(name: str) -> None:
    check_learning(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_every_weight_learns_in_3d(name: str) -> None:
    check_learning(name, 3)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_slices_of_3d_maps_are_the_2d_maps_of_slices(name: str, tmp_path: Path) -> None:
    """Slice j of a map with stride s along z is the map of the image's slice s * j, for centre-slice inflation."""
    flat = lively(create_backbone(name, 2, 3))
    torch.save({key: weight.float() for key, weight in flat.state_dict().items()}, tmp_path / "flat.pth")
    flat.load_state_dict(torch.load(tmp_path / "flat.pth", weights_only=True))
    deep = create_backbone(name, 3, 3).double().eval()
    report = load_pretrained(deep, tmp_path / "flat.pth", "drop", "centre")
    assert set(report.adapted.values()) <= {"kernels inflated (centre)", "scales reshaped"} and not report.left
    edge, depth = edge_of(name, flat), max(16, deep.min_depth)
    volume = torch.randn(1, 3, depth, edge, edge, dtype=torch.float64)
    with torch.inference_mode():
        of_slices = [flat.forward_features(volume[:, :, z]) for z in range(depth)]
        for number, found in enumerate(deep.forward_features(volume)):
            stride = 2 ** round(torch.log2(torch.tensor(depth / found.shape[2])).item())
            expected = torch.stack([of_slices[stride * j][number] for j in range(found.shape[2])], 2)
            assert (found - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "maxvit_t"])
@pytest.mark.parametrize("depth", [16, 40])
def test_a_volume_of_equal_slices_has_the_maps_of_one(name: str, depth: int, tmp_path: Path) -> None:
    """Attention over copies of a plane is attention over the plane; what is padded along z is not seen."""
    flat = lively(create_backbone(name, 2, 1))
    for parameter_name, parameter in flat.named_parameters():
        if parameter_name.endswith("bias_table"):
            nn.init.normal_(parameter)
        elif "qkv.weight" in parameter_name or "reduction" in parameter_name:
            parameter.data *= 4  # attention that is not nearly uniform
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    deep = create_backbone(name, 3, 1).double().eval()
    load_pretrained(deep, tmp_path / "flat.pth", "drop", "mean" if name != "maxvit_t" else "centre")
    image = torch.randn(1, 1, 48, 32, dtype=torch.float64)
    with torch.inference_mode():
        maps = flat.forward_features(image)
        found = deep.forward_features(image[:, :, None].expand(-1, -1, depth, -1, -1).contiguous())
    for one, other in list(zip(maps, found, strict=True))[
        : 2 if depth % 16 else 3
    ]:  # then odd maps are padded by zeros
        torch.testing.assert_close(other, one[:, :, None].expand_as(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["maxvit_t", "swin_t", "resnet18", "mvit_v2_s"])
def test_images_do_not_reach_each_other(name: str) -> None:
    dims = 3 if name in ONLY_3D else 2
    model = lively(create_backbone(name, dims, 1))
    images = torch.randn(2, 1, *[37, 45, 52][-dims:], dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(images), torch.cat([model(images[:1]), model(images[1:])]), rtol=1e-9, atol=1e-9
        )


def test_stochastic_depth_drops_whole_images() -> None:
    """Not single windows of them: half of the images stay as they were."""
    torch.manual_seed(0)
    layer = PartitionAttention(2, 64, False, 0.5).train()
    x = torch.randn(64, 64, 14, 14)
    changed = (layer(x) - x).abs().amax(1) > 1e-6  # (B, y, x)
    share = changed.float().mean((1, 2))
    assert set(share.tolist()) <= {0.0, 1.0} and 0.5 < share.mean() < 0.95  # two branches, each dropped by half


@pytest.mark.parametrize("is_grid", [False, True])
def test_what_is_padded_in_maxvit_has_no_influence(is_grid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = PartitionAttention(2, 64, is_grid, 0.0).eval(), torch.randn(1, 64, 9, 12)
    with torch.inference_mode():
        plain = layer(x)
        pad = nn.functional.pad

        def spoiled(given: Tensor, edges: tuple[int, ...], **words: Any) -> Tensor:
            return pad(given, edges, value=1e3) if given.shape[-1] == 64 and not words else pad(given, edges, **words)

        monkeypatch.setattr(nn.functional, "pad", spoiled)
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)


def test_positions_of_a_grid_that_is_no_square() -> None:
    """A table that grows along y alone stays so."""
    table = torch.cat([torch.zeros(1), torch.arange(49.0) // 7])[None, :, None]
    rows = resized_positions(table, (7, 7), (3, 5))[0, 1:, 0].view(3, 5)
    assert (rows.diff(dim=0) > 1).all() and rows.diff(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_padding_does_not_reach_the_cells_of_maxvit(dims: int) -> None:
    """The last cells of a map that was padded see what they would see in the reference's windows, and nothing else."""
    size = (9, 12, 8)[:dims]
    for is_grid in (False, True):
        parts = Partition(size, is_grid, torch.device("cpu"))
        number = torch.arange(1.0, 1 + torch.tensor(size).prod()).view(1, *size, 1)
        cells = parts.split(number)
        assert torch.equal(parts.join(cells), number)
        for kind, window in zip(parts.kinds.tolist(), cells[..., 0], strict=True):
            mask = parts.masks[kind] if kind >= 0 else torch.zeros(len(window), len(window))
            assert torch.equal(mask[0] < 0, window == 0)


def test_pooling_of_whole_grids_matches_a_multiple_of_the_reference_size() -> None:
    """MaxViT's grid attention: cells that are as far apart as the map is wide."""
    parts = Partition((14, 21), True, torch.device("cpu"))
    place = torch.stack(torch.meshgrid(torch.arange(14), torch.arange(21), indexing="ij"), -1)[None]
    cells = parts.split(place).view(2, 3, EDGE, EDGE, 2)
    assert (cells[1, 2, :, :, 0] == 1 + 2 * torch.arange(EDGE)[:, None]).all()
    assert (cells[1, 2, :, :, 1] == 2 + 3 * torch.arange(EDGE)).all()


def test_names() -> None:
    assert list_backbones() == sorted(BACKBONES) and len(list_backbones()) == 89


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("resnet_18", 2, 3), "no 'resnet_18'; nearest: resnet18"),
        (("efficientnet_v3_s", 2, 3), "nearest: efficientnet_v2_s"),
        (("resnet18", 4, 3), "dims: expected 2 or 3, got 4"),
        (("resnet18", 2, 0), "in_channels: expected 1 or more, got 0"),
        (("swin3d_t", 2, 3), "dims: expected 3 for the video Swin, got 2"),
        (("r3d_18", 2, 3), "dims: expected 3 for video ResNets, got 2"),
        (("mvit_v2_s", 2, 3), "dims: expected 3 for MViT, got 2"),
    ],
)
def test_bad_calls(words: tuple[str, int, int], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        create_backbone(*words)
    assert caught.value.exit_code == WRONG_CALL
    with pytest.raises(UserError, match="num_classes: expected 1 or more, got 0"):
        create_classifier("resnet18", 2, 3, 0)
    with pytest.raises(UserError, match="ResNet: has no classifier; make it with create_classifier"):
        create_backbone("resnet18", 2, 3).logits(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "dims", "shape", "told"),
    [
        ("resnet18", 2, (2, 1, 32, 32), r"ResNet: expected 2D images \(B, 3, y, x\), got \(2, 1, 32, 32\)"),
        ("resnet18", 2, (2, 3, 32, 32, 32), r"expected 2D images \(B, 3, y, x\), got \(2, 3, 32, 32, 32\)"),
        ("resnet18", 3, (2, 3, 32, 32), r"expected 3D images \(B, 3, z, y, x\), got \(2, 3, 32, 32\)"),
        (
            "densenet121",
            2,
            (1, 3, 32, 28),
            r"DenseNet: expected images of at least \(29, 29\) \(y, x\), got \(32, 28\); enlarge them",
        ),
        ("vit_b_16", 2, (1, 3, 64, 70), r"expected edges that are multiples of 16, got \(64, 70\); crop or pad them"),
        ("convnext_tiny", 3, (1, 3, 31, 32, 32), r"at least \(32, 32, 32\) \(z, y, x\), got \(31, 32, 32\)"),
    ],
)
def test_images_that_do_not_fit_are_told(name: str, dims: int, shape: tuple[int, ...], told: str) -> None:
    with torch.device("meta"):
        model = create_backbone(name, dims, 3)
    for method in (model, model.forward_features):
        with pytest.raises(UserError, match=told) as caught:
            method(torch.empty(shape, device="meta"))
        assert caught.value.exit_code == BAD_DATA


def check_least_image(name: str, dims: int) -> None:
    with torch.device("meta"):
        model = create_backbone(name, dims, 3).eval()
    least = (model.min_edge,) * 2 if dims == 2 else (model.min_depth, model.min_edge, model.min_edge)
    vector = model(torch.empty(1, 3, *least, device="meta"))
    assert vector.shape == (1, model.feature_channels[-1])
    for axis, n in enumerate(least):
        if n == 1:
            continue
        smaller = [n - (k == axis) for k, n in enumerate(least)]
        with pytest.raises(UserError, match="expected images of at least"):
            model(torch.empty(1, 3, *smaller, device="meta"))
        model.min_depth, model.min_edge = 1, 1
        with pytest.raises((RuntimeError, UserError)):  # the limit is as low as it can be
            model(torch.empty(1, 3, *smaller, device="meta"))
        model.min_depth, model.min_edge = least[0], least[-1]


@pytest.mark.parametrize("name", sorted(SMALLEST - ONLY_3D))
def test_the_least_image_fits_and_a_smaller_one_is_told(name: str) -> None:
    check_least_image(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_the_least_volume_fits_and_a_smaller_one_is_told(name: str) -> None:
    check_least_image(name, 3)


def test_stages_that_are_left_out() -> None:
    torch.manual_seed(0)
    whole = create_backbone("resnet18", 2, 3)
    torch.manual_seed(0)
    short = create_backbone("resnet18", 2, 3)
    short.keep_stages(2)
    images = torch.randn(2, 3, 40, 56)
    maps = short.eval().forward_features(images)
    assert len(maps) == 2 and torch.equal(maps[1], whole.eval().forward_features(images)[1])
    assert short(images).shape == (2, short.feature_channels[-1]) == (2, 128)
    assert not any("layer3" in name for name in short.state_dict())
    for network, number in (
        (short, 3),
        (create_backbone("densenet121", 2, 3), 2),
        (create_classifier("resnet18", 2, 3, 2), 2),
    ):
        with pytest.raises(UserError, match="stages"):
            network.keep_stages(number)
