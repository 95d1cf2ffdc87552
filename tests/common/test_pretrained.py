"""Weights of others: what is taken, adapted, left and refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.backbones.backbone import Backbone
from common.backbones.create import create_backbone, create_classifier, list_backbones
from common.backbones.pretrained import load_pretrained
from common.errors import BAD_DATA, UserError


def saved(model: Backbone, path: Path) -> dict[str, Tensor]:
    """The weights of a model, made lively, in a file."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {
        name: torch.rand_like(weight) * 0.1 + 0.01 if weight.is_floating_point() and "coords" not in name else weight
        for name, weight in model.state_dict().items()
    }
    torch.save(state, path)
    return state


def refused(model: Backbone, path: Path, content: Any) -> str:
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        load_pretrained(model, path, "drop", "centre")
    assert caught.value.exit_code == BAD_DATA and len(caught.value.problems) == 1
    problem: str = caught.value.problems[0]
    assert str(path) in problem and "\n" not in problem
    return problem


def test_a_backbone_takes_all_but_the_classifier(tmp_path: Path) -> None:
    state = saved(create_classifier("resnet18", 2, 3, 10), tmp_path / "a.pth")
    model = create_backbone("resnet18", 2, 3)
    report = load_pretrained(model, tmp_path / "a.pth", "drop", "centre")
    assert report.left == ["fc.weight", "fc.bias"] and not report.adapted
    assert all(
        torch.equal(weight, state[name]) for name, weight in model.state_dict().items() if "num_batches" not in name
    )
    assert report.words() == f"{len(report.taken)} weights taken, 0 adapted; left in the file: fc.weight, fc.bias"


def test_the_classifier_is_kept_or_dropped_by_choice(tmp_path: Path) -> None:
    state = saved(create_classifier("mobilenet_v2", 2, 3, 10), tmp_path / "a.pth")
    model = create_classifier("mobilenet_v2", 2, 3, 10)
    own = model.classifier[1].weight.clone()  # type: ignore[index,union-attr,operator]
    load_pretrained(model, tmp_path / "a.pth", "drop", "centre")
    assert torch.equal(model.state_dict()["classifier.1.weight"], own)
    load_pretrained(model, tmp_path / "a.pth", "keep", "centre")
    assert torch.equal(model.state_dict()["classifier.1.weight"], state["classifier.1.weight"])
    other = create_classifier("mobilenet_v2", 2, 3, 11)
    with pytest.raises(UserError, match=r"classifier.1.weight has shape \(10, 1280\), expected \(11, 1280\)"):
        load_pretrained(other, tmp_path / "a.pth", "keep", "centre")


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_grey_image_gives_the_same_response_in_any_number_of_channels(
    tmp_path: Path, channels: int, dims: int
) -> None:
    colour = create_backbone("shufflenet_v2_x0_5", 2, 3)
    saved(colour, tmp_path / "a.pth")
    load_pretrained(colour, tmp_path / "a.pth", "drop", "centre")
    model = create_backbone("shufflenet_v2_x0_5", dims, channels)
    report = load_pretrained(model, tmp_path / "a.pth", "drop", "mean")
    told = f"3 channels to {channels}" if dims == 2 else f"kernels inflated (mean), 3 channels to {channels}"
    assert report.adapted["conv1.0.weight"] == told
    grey = torch.randn(2, 1, *[32] * 2)
    expected = colour.eval().double().forward_features(grey.double().expand(-1, 3, -1, -1))[0]
    many = grey.double().expand(-1, channels, -1, -1)
    if dims == 2:
        found = model.eval().double().forward_features(many)[0]
    else:  # constant along z: the middle slices see no border
        found = model.eval().double().forward_features(many[:, :, None].expand(-1, -1, 16, -1, -1))[0][:, :, 2]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_names_of_old_files_and_wrappers_are_understood(tmp_path: Path) -> None:
    model = create_backbone("densenet121", 2, 3)
    state = saved(model, tmp_path / "a.pth")
    old = {
        f"module.{name.replace('norm1.', 'norm.1.').replace('conv2.', 'conv.2.')}"
        if "denselayer" in name
        else name: weight
        for name, weight in state.items()
    }
    torch.save({"state_dict": old, "epoch": 3}, tmp_path / "old.pth")
    assert not load_pretrained(model, tmp_path / "old.pth", "drop", "centre").adapted
    assert torch.equal(model.state_dict()["features.denseblock1.denselayer1.norm1.weight"],
                       state["features.denseblock1.denselayer1.norm1.weight"])  # fmt: skip
    vision = create_backbone("vit_b_32", 2, 3)
    state = saved(vision, tmp_path / "v.pth")
    older = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): w for name, w in state.items()}
    torch.save(older, tmp_path / "v.pth")
    load_pretrained(vision, tmp_path / "v.pth", "drop", "centre")
    mnas = create_backbone("mnasnet0_5", 2, 3)
    torch.save(
        dict(saved(mnas, tmp_path / "m.pth")), tmp_path / "m.pth"
    )  # a plain dict, without the version's metadata
    load_pretrained(mnas, tmp_path / "m.pth", "drop", "centre")


def test_positions_and_tables_of_other_sizes_are_resized(tmp_path: Path) -> None:
    model = create_backbone("vit_b_32", 2, 3)
    state = saved(model, tmp_path / "a.pth")
    grid = torch.linspace(0, 1, 12)[None].expand(12, -1).reshape(1, 144, 1).expand(-1, -1, 768)  # grows along x
    state["encoder.pos_embedding"] = torch.cat([torch.full((1, 1, 768), 7.0), grid], 1)
    torch.save(state, tmp_path / "large.pth")  # of images of 384 pixels
    report = load_pretrained(model, tmp_path / "large.pth", "drop", "centre")
    assert report.adapted == {"encoder.pos_embedding": "positions resized"}
    table = model.state_dict()["encoder.pos_embedding"][0, :, 0]
    cells = table[1:].view(7, 7)
    assert table[0] == 7 and torch.allclose(cells[0], cells[6], atol=1e-6) and (cells[0].diff() > 0.1).all()
    deep = create_backbone("vit_b_32", 3, 1)
    load_pretrained(deep, tmp_path / "large.pth", "drop", "centre")
    assert torch.allclose(deep.state_dict()["encoder.pos_embedding"][0, 1:, 0].view(7, 7, 7)[3], cells)
    swin = create_backbone("swin_t", 2, 3)
    state = saved(swin, tmp_path / "s.pth")
    name = "features.1.0.attn.relative_position_bias_table"
    state[name] = torch.arange(23.0).repeat(23)[:, None].expand(-1, 3).clone()  # of windows of 12
    torch.save(state, tmp_path / "s.pth")
    load_pretrained(swin, tmp_path / "s.pth", "drop", "centre")
    assert torch.allclose(swin.state_dict()[name].view(13, 13, 3)[4, :, 0], torch.linspace(0, 22, 13), atol=0.2)


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    state = saved(create_backbone("resnet101", 2, 3), tmp_path / "a.pth")
    deeper = refused(create_backbone("resnet50", 2, 3), tmp_path / "a.pth", None)
    assert "expected the 265 weights of ResNet; the file holds unknown layer3.10.bn1.bias" in deeper
    assert "the file lacks" in refused(create_backbone("resnet152", 2, 3), tmp_path / "a.pth", None)
    wide = refused(create_backbone("wide_resnet101_2", 2, 3), tmp_path / "a.pth", None)
    assert "has shape (64, 64, 1, 1), expected (128, 64, 1, 1)" in wide
    few = {name: weight for name, weight in state.items() if name != "bn1.weight"}
    assert "lacks bn1.weight (1 in all)" in refused(create_backbone("resnet101", 2, 3), tmp_path / "b.pth", few)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    model, path = create_backbone("squeezenet1_1", 2, 3), tmp_path / "a.pth"
    assert "no such file" in refused(model, path, None)
    state = saved(model, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable checkpoint" in refused(model, path, None)
    assert "expected named weights, found list" in refused(model, path, [1, 2])
    assert "expected named weights, found 'epoch' that holds no tensor" in refused(model, path, {"epoch": 3})
    assert "found nothing" in refused(model, path, {"model": {"state_dict": {}}})
    assert "is a folder" in refused(model, tmp_path, None)
    name = next(iter(state))
    spoiled = state | {name: torch.full_like(state[name], float("nan"))}
    assert f"{name} is not finite" in refused(model, path, spoiled)
    for tensor in (state[name].int(), state[name].to(torch.complex64), state[name][:0], state[name].to_sparse()):
        assert f"{name} is " in refused(model, path, state | {name: tensor})
    assert f"{name} is not finite" in refused(model, path, state | {name: state[name].double() * 1e300})
    assert "has shape ()" in refused(model, path, state | {name: torch.tensor(1.0)})
    vision = create_backbone("vit_b_32", 2, 3)
    content = saved(vision, path)
    for rows in (1, 50 + 50, 200):
        odd = content | {"encoder.pos_embedding": torch.zeros(1, rows, 768)}
        assert "encoder.pos_embedding has shape" in refused(vision, path, odd)
    with pytest.raises(UserError, match="classifier: keep, but the backbone has none"):
        load_pretrained(model, path, "keep", "centre")
    torch.save(Path, path)  # a class: loading it would execute a pickle
    assert "refused" in refused(model, path, None)


def test_a_volume_of_equal_slices_reaches_the_3d_vision_transformer_as_one(tmp_path: Path) -> None:
    """Its first tokens are those of the plane, at positions repeated along z."""
    flat = create_backbone("vit_b_32", 2, 3)
    saved(flat, tmp_path / "a.pth")
    load_pretrained(flat, tmp_path / "a.pth", "drop", "mean")
    deep = create_backbone("vit_b_32", 3, 1)
    report = load_pretrained(deep, tmp_path / "a.pth", "drop", "mean")
    assert report.adapted["encoder.pos_embedding"] == "positions resized" and len(report.adapted) == 2
    grey = torch.randn(1, 1, 32, 64)
    plane = flat.conv_proj(grey.expand(-1, 3, -1, -1))  # type: ignore[operator]
    volume = deep.conv_proj(grey[:, :, None].expand(-1, -1, 64, -1, -1))  # type: ignore[operator]
    torch.testing.assert_close(volume, plane[:, :, None].expand_as(volume), rtol=1e-4, atol=1e-4)


def test_the_readmes_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[2] / "common" / "backbones" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["vector"].shape == (2, 512) and names["logits"].shape == (2, 1000)
    assert tuple(m.shape[1] for m in names["maps"]) == (64, 128, 256, 512) == names["model"].feature_channels
    assert "weights taken, 20 adapted (kernels inflated (centre)" in capsys.readouterr().out
    table = re.findall(r"`([a-z0-9_]+)`", text)
    assert {name for name in table if "_" in name and name[0] in "rdvsemgi" and name in list_backbones()}
