"""The known defects and pains of the original system: one test each, so that none comes back.

 1 names that refer to nothing                     tests/em_segmentation/test_train_script.py::test_known_defect_1_every_preset_and_tutorial_refers_to_what_exists
 2 x, y, z taken for z, y, x                       tests/em_segmentation/test_volumes.py::test_known_defect_2_permuted_axes_are_named
 3 affinities flipped without moving their offsets tests/em_segmentation/test_turns.py::test_naive_averages_of_flips_are_wrong
 4 two places where an affinity may be stored      tests/em_segmentation/test_decoding_components.py::test_affinity_components_equal_spreading_a_label_until_nothing_changes
 5 affinities to segments, slowly                  tests/benchmarks/test_em_decoding.py::test_watershed_is_three_times_as_fast_as_scikit_image_and_no_worse
 6 volumes that must fit into memory, seams        test_known_defect_6_volumes_are_read_patch_by_patch
 7 weights without the code to judge them          tests/em_segmentation/test_train_script.py::test_known_defect_7_the_best_weights_bring_their_network_with_them
 8 full memory, killed readers, losses of NaN      tests/em_segmentation/test_training.py::test_known_defect_8_a_loss_that_is_no_number_names_the_patches_and_keeps_the_checkpoint
 9 group norm's statistics depend on the tile      test_known_defect_9_group_norm_depends_on_the_tile_and_batch_norm_does_not
10 compiled extras and paths of one machine        test_known_defect_10_it_runs_with_the_core_packages_alone
"""  # noqa: E501

import ast
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import as_yaml
from em_segmentation import train
from em_segmentation.config import BASE
from em_segmentation.dataset import open_volumes, patch_stream
from em_segmentation.model_defs.registry import build_model
from tests.common_runs import ROOT, environment, said
from tests.em_segmentation.small_runs import changed, small_config, write_volumes

EXTRAS = (
    "h5py",
    "tifffile",
    "zarr",
    "dask",
    "mrcfile",
    "tensorboard",
    "skimage",
    "monai",
    "cc3d",
    "waterz",
    "affogato",
)
WITHOUT_EXTRAS = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # as if it were not installed
import runpy
sys.path[0] = sys.argv.pop(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_table_above_is_complete_and_every_test_in_it_exists() -> None:
    rows = [line for line in (__doc__ or "").splitlines() if line[:2].strip().isdigit()]
    assert [int(line[:2]) for line in rows] == list(range(1, 11))
    for row in rows:
        place, _, name = row.split()[-1].rpartition("::")
        tree = ast.parse((ROOT / place if place else Path(__file__)).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row


def test_known_defect_6_volumes_are_read_patch_by_patch(tmp_path: Path) -> None:
    """A volume of 2.7 GB, of which nothing but the header and the patches' bytes is read."""
    shape, settings = (40, 8192, 8192), []
    for name in ("image", "label"):
        path = tmp_path / f"{name}.npy"
        with path.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            file.truncate(start + 40 * 8192**2)  # a file with a hole takes no room on the disk
            file.seek(start + 4096 * 8192 + 4096)
            file.write(bytes(range(100)))  # contrast in the middle of section 0
        settings.append(f"data.train_{name}={path}")
    config = changed(BASE, *settings, "data.voxel_size_nm=[8,8,8]", "data.patch_size=[32,64,64]")
    tracemalloc.start()
    try:
        stream = patch_stream(open_volumes(config), config)
        patches = [stream[position] for position in range(3)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(not isinstance(patch, Exception) for patch in patches)
    assert peak < 300e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize(("norm", "exact"), [("batch", True), ("group", False)])
def test_known_defect_9_group_norm_depends_on_the_tile_and_batch_norm_does_not(norm: str, exact: bool) -> None:
    """With as many groups as channels it is instance norm, and what is stitched is not what the whole would give."""
    torch.manual_seed(0)
    config = changed(BASE, "model.architecture=rsunet", "model.filters=[8,8]", "model.kernel_z=[3,3]",
                     f"model.norm={norm}", "data.voxel_size_nm=[8,8,8]")  # fmt: skip
    model = build_model(config).eval()
    assert model.get_model_info()["exact_tiles"] == exact and (model.halo is not None) == exact
    volume = torch.randn(1, 1, 40, 40, 40)
    with torch.inference_mode():
        whole, tile = (
            model(volume)[..., 16:24, 16:24, 16:24],
            model(volume[..., 4:36, 4:36, 4:36])[..., 12:20, 12:20, 12:20],
        )
    difference = float((whole - tile).abs().max() / whole.std())
    assert difference < 1e-4 if exact else difference > 1e-3


def test_known_defect_10_it_runs_with_the_core_packages_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No extra package is imported before a file needs it; then its absence is one line."""
    write_volumes(tmp_path)
    config = changed(small_config(tmp_path), "training.max_epochs=1", "training.steps_per_epoch=1")
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    (tmp_path / "without.py").write_text(WITHOUT_EXTRAS)
    script = [sys.executable, str(tmp_path / "without.py"), ",".join(EXTRAS), str(ROOT)]
    call = [str(ROOT / "em_segmentation" / "train.py"), "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run([*script, *call], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/run/checkpoints/best.pt").exists()
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "h5py", None)
        code, _, problems = said(train.main, [*call[1:], f"data.val_image={tmp_path}/a.h5", "run.name=other"], capsys)
    assert code != 0 and len(problems) == 1 and "h5py" in problems[0]


def test_known_defect_10_no_path_of_one_machine_stands_in_the_code() -> None:
    """The original's guide named a folder in its author's home."""
    absolute = re.compile(r"""["'(\s=](/(home|Users|mnt|scratch|data|root|tmp|work)/|[A-Z]:\\\\)""")
    for folder in ("em_segmentation", "common", "data/phantoms"):
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")):
            found = [line for line in path.read_text().splitlines() if absolute.search(line)]
            assert not found, f"{path}: {found}"
