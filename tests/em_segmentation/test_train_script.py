"""train.py as a user meets it: fresh, fast, test, the original's constants, and no constant that nothing reads."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.config import as_yaml, configure
from common.errors import WRONG_CALL
from common.logbook import read_metrics
from data.phantoms.em_settings import FAULTS
from em_segmentation import train
from em_segmentation import volumes as volumes_module
from em_segmentation.config import BASE, PRESETS, Config
from em_segmentation.dataset import open_volumes, validation_size
from em_segmentation.inference import load_model
from em_segmentation.model_defs.registry import build_model, get_architecture_builder
from em_segmentation.validation import check_monitors
from tests.common_runs import ROOT, environment, said
from tests.em_segmentation.small_runs import changed, saved, small_config, write_volumes

# as users of the original have it: notes on its simple schema, its own spelling of values
ORIGINAL = """
system: {num_gpus: 1, num_cpus: 4, seed: 42}
model:
  architecture: monai_basic_unet3d
  in_channels: 1
  out_channels: 1
  filters: [32, 32, 64, 128, 256, 32]
  dropout: 0.1
  loss_functions: [DiceLoss, BCEWithLogitsLoss]
  loss_weights: [1.0, 1.0]
  mednext_size: S
  mednext_kernel_size: 3
  mednext_base_channels: 32
  mednext_exp_r: [2, 3, 4, 4, 4, 4, 4, 3, 2]
  mednext_block_counts: [3, 4, 4, 4, 4, 4, 4, 4, 3]
  mednext_grn: true
  deep_supervision: false
data:
  train_image: "datasets/Lucchi/img/train_im.tif"
  train_label: "datasets/Lucchi/label/train_label.tif"
  val_image: "datasets/Lucchi/img/val_im.tif"
  val_label: "datasets/Lucchi/label/val_label.tif"
  test_image: "datasets/Lucchi/img/test_im.tif"
  test_label: "datasets/Lucchi/label/test_label.tif"
  patch_size: [112, 112, 112]
  batch_size: 4
  num_workers: 4
  persistent_workers: true
  use_cache: true
  augmentation: true
optimizer: {name: AdamW, lr: 1e-3, weight_decay: 0.01}
scheduler: {name: cosine, warmup_epochs: 5, min_lr: 1e-6}
training: {max_epochs: 100, precision: "16-mixed", gradient_clip_val: 1.0, accumulate_grad_batches: 2}
checkpoint: {monitor: val_loss, mode: min, save_top_k: 3, save_last: true}
early_stopping: {monitor: val_loss, patience: 20, mode: min}
logging: {log_every_n_steps: 10}
"""


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    write_volumes(folder)
    config = changed(small_config(folder), "training.max_epochs=2", "training.steps_per_epoch=2")
    (folder / "config.yaml").write_text(as_yaml(config))
    return folder


def words(volumes: Path, tmp_path: Path, *more: str) -> list[str]:
    return ["--config", str(volumes / "config.yaml"), f"run.root={tmp_path}", *more]


def test_a_run_leaves_what_its_report_names_and_says_when_it_is_complete(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, problems = said(train.main, words(volumes, tmp_path), capsys)
    assert code == 0, problems
    run = tmp_path / "run"
    for name in ("config.yaml", "environment.json", "metrics.csv", "checkpoints/best.pt", "checkpoints/last.pt",
                 "figures/learning_curve.png"):  # fmt: skip
        assert (run / name).stat().st_size > 0
    assert str(run / "checkpoints/best.pt") in out and "best weights: epoch" in out and "val_dice" in out
    rows = read_metrics(run / "metrics.csv", ("train_loss", "val_loss", "learning_rate", "gradient_norm"))
    assert [row["step"] for row in rows] == [2, 3, 4]
    before = (run / "checkpoints/last.pt").read_bytes()
    code, out, _ = said(train.main, words(volumes, tmp_path), capsys)
    assert code == 0 and "is complete" in out and (run / "checkpoints/last.pt").read_bytes() == before
    code, out, _ = said(train.main, words(volumes, tmp_path, "system.seed=1", "--fresh"), capsys)
    assert code == 0 and "continuing" not in out and (run / "checkpoints/last.pt").read_bytes() != before


def test_the_config_of_a_run_repeats_it(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(train.main, words(volumes, tmp_path / "a"), capsys)[0] == 0
    copied = ["--config", str(tmp_path / "a/run/config.yaml"), f"run.root={tmp_path}/b"]
    assert said(train.main, copied, capsys)[0] == 0
    first, second = saved(tmp_path / "a/run", "best.pt"), saved(tmp_path / "b/run", "best.pt")
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


def test_known_defect_7_the_best_weights_bring_their_network_with_them(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """best.pt alone is enough to build the network again, with the voxel size that was read from the volumes."""
    assert said(train.main, words(volumes, tmp_path), capsys)[0] == 0
    model, config = load_model(tmp_path / "run/checkpoints/best.pt", torch.device("cpu"))
    best = saved(tmp_path / "run", "best.pt")
    assert all(torch.equal(weight, best["weights"][name]) for name, weight in model.state_dict().items())
    assert config.data.voxel_size_nm == (20.0, 10.0, 10.0) and not model.training


def test_a_fast_run_touches_every_part_in_a_folder_of_its_own(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # it always starts over
        code, out, problems = said(train.main, words(volumes, tmp_path, "--fast-dev-run"), capsys)
        assert code == 0 and "is complete" not in out, problems
    assert saved(tmp_path / "fast-dev-run", "last.pt")["step"] == train.FAST_STEPS
    assert not (tmp_path / "run").exists()
    (row,) = read_metrics(tmp_path / "fast-dev-run/metrics.csv", ("val_loss",))
    assert row["epoch"] == 1


def test_weights_to_test_are_not_weights_to_train_from(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, problems = said(train.main, words(volumes, tmp_path, "--checkpoint", "best.pt"), capsys)
    assert code == WRONG_CALL and "model.start_from=FILE.pt" in problems[0]
    code, _, problems = said(train.main, words(volumes, tmp_path, "--mode", "tune"), capsys)
    assert code == WRONG_CALL and "tune" in problems[0] and len(problems) == 1


def test_the_originals_constants_are_accepted_with_its_values(tmp_path: Path) -> None:
    """One path where a list may stand, 1e-3 that YAML reads as text, a bare 32 as precision."""
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL)
    config = configure(BASE, [path], [])
    assert config.data.train_image == ("datasets/Lucchi/img/train_im.tif",)
    assert config.optimizer.lr == 1e-3 and config.training.precision == "16-mixed"
    path.write_text(ORIGINAL.replace('"16-mixed"', "32"))
    assert configure(BASE, [path], []).training.precision == "32"
    path.write_text(ORIGINAL.replace('"16-mixed"', "bf16-mixed"))
    assert configure(BASE, [path], []).training.precision == "bf16-mixed"
    for name in ("monai_basic_unet3d", "monai_unet", "monai_unetr", "monai_swin_unetr", "mednext", "mednext_custom"):
        get_architecture_builder(name)
    for loss in ("DiceLoss", "FocalLoss", "TverskyLoss", "DiceCELoss", "BCEWithLogitsLoss"):
        assert changed(BASE, f"model.loss_functions=[{loss}]", "model.loss_weights=[1]").model.loss_functions == (loss,)
    given = yaml.safe_load(ORIGINAL)
    assert {name for section in given.values() for name in section} <= {
        field.name
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(BASE, section.name))
    }


def read_names(folders: list[Path], but: Path) -> set[str]:
    """Attributes that any module but one reads, and texts that may name one."""
    names: set[str] = set()
    for folder in folders:
        for path in folder.rglob("*.py"):
            if path != but:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        names.add(node.attr)
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        names.add(node.value)
    return names


def test_every_constant_is_read_by_something() -> None:
    """Else it would be accepted, and ignored."""
    folders = [ROOT / "em_segmentation", ROOT / "data" / "phantoms"]
    read = read_names(folders, ROOT / "em_segmentation" / "config.py")
    read |= {f"{role}_{kind}" for role in ("train", "val", "test") for kind in ("image", "label", "mask", "sections")}
    read |= {f"{fault}_share" for fault in FAULTS}
    unread = {
        f"{section.name}.{constant.name}"
        for section in dataclasses.fields(Config)
        for constant in dataclasses.fields(getattr(BASE, section.name))
        if constant.name not in read
    }
    assert not unread, sorted(unread)


def test_known_defect_1_every_preset_and_tutorial_refers_to_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """The original's pipeline profile asked for a label profile that nobody had written."""
    tutorials = sorted((ROOT / "em_segmentation" / "tutorials").glob("*.yaml"))
    assert tutorials
    for path in tutorials:
        code, out, problems = said(train.main, ["--config", str(path), "--print-config"], capsys)
        assert code == 0, problems
        preset = yaml.safe_load(out)["run"]["preset"]
        check_references(configure(PRESETS[preset], [path], []))
    for config in PRESETS.values():
        check_references(config)


@pytest.mark.parametrize("name", ["lucchi", "mednext_lucchi", "mednext_custom"])
def test_tutorials_fit_the_volumes_that_they_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse files of the size of Lucchi's: 165 sections, of which the last 32 are for validation."""
    monkeypatch.setattr(volumes_module, "READ_WHOLE", 1)
    for kind in ("image", "label"):
        voxels = np.lib.format.open_memmap(tmp_path / f"{kind}.npy", "w+", np.uint8, (165, 768, 1024))
        voxels[:, 384, 512] = 200
    paths = [f"data.{role}_{kind}={tmp_path}/{kind}.npy" for role in ("train", "val") for kind in ("image", "label")]
    tutorial = ROOT / "em_segmentation" / "tutorials" / f"{name}.yaml"
    config = configure(BASE, [tutorial], [*paths, "data.use_cache=false"])
    opened = open_volumes(config)
    assert opened.train[0].sections[1] + 10 == opened.val[0].sections[0]
    size = validation_size(opened.val, config.data.patch_size)
    assert size == (32, *config.data.patch_size[1:])
    build_model(dataclasses.replace(config, data=dataclasses.replace(config.data, patch_size=size)))


def check_references(config: Config) -> None:
    """Names of networks and figures, which only the task's other modules know."""
    get_architecture_builder(config.model.architecture)
    check_monitors(config, True)


@pytest.mark.slow
def test_the_readmes_network_of_your_own_trains(tmp_path: Path) -> None:
    """As a script that its processes import anew: the guard at its end keeps them from training too."""
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "em_segmentation" / "README.md").read_text(), re.S)
    (tmp_path / "my_network.py").write_text(recipe)
    words = ["--fast-dev-run", "model.architecture=mine", "inference.tiling=blended", "phantom.shape=[40,72,72]",
             "data.patch_size=[8,32,32]"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(tmp_path / "my_network.py"), *words],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
