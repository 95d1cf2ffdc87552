"""Networks by name, networks of one's own, what their levels ask of patches, and weights to begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.checkpoint import save_checkpoint
from common.errors import BAD_DATA, WRONG_CALL, UserError
from em_segmentation.config import BASE, Config
from em_segmentation.model_defs import registry
from em_segmentation.model_defs.registry import (
    ALIASES,
    KIND,
    SegmentationModel,
    build_model,
    get_architecture_builder,
    list_architectures,
    print_available_architectures,
    register_architecture,
)
from em_segmentation.state import begin
from tests.em_segmentation.small_runs import changed

CPU = torch.device("cpu")
SMALL = ("data.patch_size=[32,32,32]", "data.voxel_size_nm=[10,10,10]", "model.feature_size=12",
         "model.filters=[4,4,4,4,4,4]", "model.mednext_base_channels=4",
         "model.mednext_block_counts=[1,1,1,1,1,1,1,1,1]")  # fmt: skip
MEDNEXT = ("model.architecture=mednext_custom", *SMALL)


class Own(nn.Module):
    """A network as a user would write it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv(x)
        return logits


def build_own(config: Config, out_channels: int) -> nn.Module:
    return Own(config.model.in_channels, out_channels)


@pytest.fixture
def own() -> Iterator[str]:
    """A registered network, forgotten afterwards."""
    register_architecture("own_net", build_own)
    yield "own_net"
    del registry.ARCHITECTURES["own_net"]


def refusal(*changes: str) -> str:
    with pytest.raises(UserError) as caught:
        build_model(changed(BASE, "data.voxel_size_nm=[10,10,10]", *changes))
    assert caught.value.exit_code == WRONG_CALL and len(caught.value.problems) == 1
    return caught.value.problems[0]


def small(name: str, *changes: str) -> Config:
    filters = "model.filters=[4,4,4]" if name in ("rsunet", "unet", "monai_unet") else "model.in_channels=1"
    return changed(BASE, *SMALL, f"model.architecture={name}", filters, *changes)


@pytest.mark.parametrize("name", [*list_architectures(), *ALIASES])
def test_every_name_builds_a_network_with_as_many_channels_as_its_targets_need(name: str) -> None:
    targets = ("targets.names=[semantic, affinity, lsd]", "targets.weights=[1,1,1]", "targets.label_channels=[0,0,0]",
               "targets.loss_functions=[[DiceLoss], [DiceLoss], [MSELoss]]")  # fmt: skip
    model = build_model(small(name, *targets)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 1 + 3 + 10, 32, 32, 32)
    info = model.get_model_info()
    assert info["architecture"] == name
    assert info["parameters"] == info["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert info["exact_tiles"] == (name == "rsunet")


def test_names_are_listed_and_printed_with_their_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    names = list_architectures()
    assert names == sorted(names) and {
        "basic_unet3d",
        "unet",
        "unetr",
        "swin_unetr",
        "mednext",
        "mednext_custom",
    } < set(names)
    print_available_architectures()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names
    assert "basic_unet3d (also monai_basic_unet3d)" in lines
    for alias, meant in ALIASES.items():
        assert get_architecture_builder(alias) is get_architecture_builder(meant)


def test_an_unknown_name_lists_those_there_are_and_the_nearest() -> None:
    told = refusal("model.architecture=mednxt")
    assert told.startswith("model.architecture: no network 'mednxt'") and told.endswith("did you mean mednext?")
    assert all(name in told for name in list_architectures())
    assert "did you mean" not in refusal("model.architecture=qqq")


def test_a_network_of_ones_own_goes_the_same_way(own: str) -> None:
    config = changed(BASE, f"model.architecture={own}", "model.out_channels=1", "model.in_channels=2")
    model = begin(config, CPU).model
    assert model(torch.zeros(1, 2, 5, 6, 7)).shape == (1, 1, 5, 6, 7)
    assert model.get_model_info() == {
        "architecture": own, "class": "Own", "parameters": 2 * 27 + 1, "trainable_parameters": 2 * 27 + 1,
        "exact_tiles": False,
    }  # fmt: skip
    assert own in list_architectures()
    for taken in (own, "unet", "monai_unet"):
        with pytest.raises(UserError, match=f"{taken} exists already"):
            register_architecture(taken, build_own)


@pytest.mark.usefixtures("bfloat16")
def test_a_network_of_ones_own_with_torchs_convolutions_does_not_train_in_bfloat16_on_a_cpu(own: str) -> None:
    """torch 2.13's gradients are wrong on thin maps."""
    config = changed(BASE, f"model.architecture={own}", "training.precision=bf16-mixed")
    with pytest.raises(UserError, match=r"training.precision: own_net has torch's Conv3d") as caught:
        begin(config, CPU)
    assert caught.value.exit_code == WRONG_CALL
    for name in list_architectures():
        if name != own:
            begin(small(name, "training.precision=bf16-mixed"), CPU)


def test_a_number_of_channels_that_the_targets_do_not_need_is_told() -> None:
    assert build_model(changed(BASE, "model.out_channels=1")).get_model_info()["class"] == "BasicUNet3d"
    assert "model.out_channels: semantic need 1, got 2; expected that number, or 0" in refusal("model.out_channels=2")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("data.patch_size=[8,160,160]",), "data.patch_size: basic_unet3d takes at least 16 voxels"),
        (("inference.window_size=[8,64,64]",), "inference.window_size: basic_unet3d takes at least 16"),
        (("model.filters=[8,16]",), "model.filters: basic_unet3d takes 6 numbers"),
        (("model.architecture=unet", "model.filters=[8]"), "model.filters: unet takes at least 2 levels"),
        (("model.architecture=unet", "data.patch_size=[48,48,48]"), "takes multiples of 32 voxels, got [48, 48, 48]"),
        (("model.architecture=mednext", "data.patch_size=[24,48,48]"), "mednext takes multiples of 16 voxels"),
        (("model.architecture=mednext", "data.patch_size=[16,16,16]"), "is a single voxel at mednext's coarsest level"),
        (("model.architecture=unetr", "data.patch_size=[24,48,48]"), "unetr takes multiples of 16 voxels"),
        (("model.architecture=unetr", "inference.window_size=[128,112,112]"), "inference.window_size: unetr knows"),
        (("model.architecture=swin_unetr", "data.patch_size=[48,64,64]"), "swin_unetr takes multiples of 32 voxels"),
        (("model.architecture=swin_unetr", "data.patch_size=[64,64,64]"), "model.feature_size: swin_unetr takes"),
        (("model.architecture=rsunet", "data.patch_size=[16,16,16]"), "is a single voxel at rsunet's coarsest level"),
        (("model.deep_supervision=true",), "model.deep_supervision: basic_unet3d has one scale"),
    ],
)  # fmt: skip
def test_what_a_networks_levels_ask_is_told_in_one_line(changes: tuple[str, ...], told: str) -> None:
    assert told in refusal(*changes)


@pytest.mark.parametrize("name", list_architectures())
def test_the_smallest_patches_that_are_accepted_can_be_trained_on(name: str) -> None:
    for edge in (1, 2, 3, 4, 6, 8, 12, 16, 20, 32):
        config = small(name, f"data.patch_size={[edge] * 3}")
        try:
            model = build_model(config).train()
        except UserError:
            continue
        output = model(torch.randn(1, 1, edge, edge, edge))
        assert output.shape[2:] == (edge, edge, edge)
        output.square().sum().backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        return
    raise AssertionError("no patch fits")


def weights_file(model: SegmentationModel, path: Path) -> Path:
    save_checkpoint({"kind": KIND, "weights": model.state_dict()}, path)
    return path


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    trained = begin(small("unet", "system.seed=1"), CPU).model
    path = weights_file(trained, tmp_path / "best.pt")
    state = begin(small("unet", f"model.start_from={path}"), CPU)
    for model in (state.model, state.average):
        assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_mednext_begins_with_one_of_smaller_kernels(tmp_path: Path) -> None:
    trained = begin(changed(BASE, *MEDNEXT, "system.seed=1"), CPU).model
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if name.endswith("depthwise.weight"):
                value.copy_(value.mean((2, 3, 4), keepdim=True).expand_as(value))  # known what resizing makes of it
    path = weights_file(trained, tmp_path / "best.pt")
    larger = begin(changed(BASE, *MEDNEXT, "model.mednext_kernel_size=5", f"model.start_from={path}"), CPU).model
    old, new = trained.state_dict(), larger.state_dict()
    grown = [name for name in old if old[name].shape != new[name].shape]
    assert grown and all(new[name].shape[2:] == (5, 5, 5) for name in grown)
    for name, value in new.items():
        wanted = old[name].mean((2, 3, 4), keepdim=True).expand_as(value) if name in grown else old[name]
        torch.testing.assert_close(value, wanted)
    same = begin(changed(BASE, *MEDNEXT, f"model.start_from={path}"), CPU).model
    assert all(torch.equal(value, old[name]) for name, value in same.state_dict().items())


def test_weights_that_do_not_fit_name_their_file(tmp_path: Path) -> None:
    unet = weights_file(begin(small("unet"), CPU).model, tmp_path / "unet.pt")
    large = changed(BASE, *MEDNEXT, "model.mednext_kernel_size=5")
    model = begin(large, CPU).model
    mednext = weights_file(model, tmp_path / "mednext.pt")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    broken = weights_file(model, tmp_path / "broken.pt")
    torch.save({"kind": "motor_detection", "weights": {}}, tmp_path / "other.pt")
    for config, path, told in (
        (changed(BASE, *MEDNEXT), unet, "weights are in one model only"),
        (changed(BASE, *MEDNEXT), mednext, "expected (4, 1, 3, 3, 3)"),
        (small("unet"), mednext, "belong to another model"),
        (large, broken, "is not finite"),
        (small("unet"), tmp_path / "other.pt", "found motor_detection"),
        (small("unet"), tmp_path / "none.pt", "no such checkpoint"),
    ):
        with pytest.raises(UserError) as caught:
            begin(changed(config, f"model.start_from={path}"), CPU)
        assert caught.value.exit_code == BAD_DATA and len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(f"{path}: ") and told in caught.value.problems[0]
