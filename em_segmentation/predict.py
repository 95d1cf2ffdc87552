"""Probabilities and instances of whole volumes, in files that other programs open.

python em_segmentation/predict.py --checkpoint best.pt --input volume.h5:raw --output prediction.h5
python em_segmentation/predict.py --checkpoint best.pt --input stack/ --instances cells.zarr decoding.target=affinity
python em_segmentation/predict.py --checkpoint best.pt --input a.npy --output p.npy inference.tta=flips_in_plane
torchrun --nproc-per-node 4 em_segmentation/predict.py --checkpoint best.pt --input big.zarr --output prediction.zarr

--input: .npy, .h5:key, .zarr:key, .tif, or a folder of slices. --output (uint8, channels as printed) and --instances (ids
from 1) are .npy, .h5, .zarr, .tif or a folder of PNG. Memory is bounded by tiles and blocks, not by the volume; the same
command continues a killed one. Processes under torchrun share the planes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse
import dataclasses
import os
from contextlib import ExitStack

import numpy as np
import torch.distributed as dist

from common.command import change_parser
from common.config import configure
from common.errors import config_error, run_script
from common.files import file_digest
from common.lock import exclusive
from common.memory import keep_freed_memory
from common.parallel import all_ranks_do, first_rank_does, process_group
from common.volumes.finishing import check_target
from common.volumes.opening import open_volume
from common.volumes.streaming import discard_streamed
from common.volumes.volume import Volume
from em_segmentation.config import BASE, Config
from em_segmentation.inference import load_model, rounding_cost, working_copy, written_channels
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.places import training_identity
from em_segmentation.prediction import Source, VoxelSize, note_of, write_instances, write_prediction
from em_segmentation.volumes import measure_scale


def checked_config(trained: Config, flags: argparse.Namespace) -> Config:
    """The config of the weights with the command line's changes, which must not touch what shaped them."""
    free = dataclasses.replace(trained.data, image_axes="auto", voxel_size_nm=None)
    config = configure(dataclasses.replace(trained, data=free), flags.config, flags.changes)
    same = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, image_axes=trained.data.image_axes, voxel_size_nm=trained.data.voxel_size_nm
        ),
    )
    if training_identity(same) != training_identity(trained):
        raise config_error(
            "section.name=value: after training only inference, decoding, data.image_axes and data.voxel_size_nm can change"
        )
    if flags.instances is not None and config.decoding.target == "none":
        raise config_error(
            "--instances: decoding.target is none; expected one of targets.names, for example decoding.target=affinity"
        )
    return config


def input_voxel_size(image: Volume, config: Config, trained: Config) -> VoxelSize:
    """As given, as the file says, or else as in training."""
    for size in (config.data.voxel_size_nm, image.voxel_size_nm, trained.data.voxel_size_nm):
        if size is not None:
            if size != trained.data.voxel_size_nm and dist.get_rank() == 0:
                print(f"warning: voxels of {list(size)} nm; the network was trained on {trained.data.voxel_size_nm} nm")
            return size
    raise config_error("data.voxel_size_nm: neither the file nor the checkpoint says it; give [z, y, x] in nm")


def check_outputs(flags: argparse.Namespace, image: Volume, config: Config) -> None:
    """Everything that would make the work useless at its end is told before it begins."""
    if image.num_channels != config.model.in_channels:
        raise config_error(
            f"--input {flags.input}: has {image.num_channels} channels, the network takes {config.model.in_channels}"
        )
    if flags.output is not None:
        num_channels = max(part.stop for part in written_channels(config.targets).values())
        check_target(flags.output, num_channels, np.dtype(np.uint8))
    if flags.instances is not None:
        check_target(flags.instances, 1, np.dtype(np.uint32))


def probabilities_path(flags: argparse.Namespace) -> Path:
    """--output, or a file beside --instances that goes when they are done."""
    if flags.output is not None:
        return Path(flags.output)
    return Path(flags.instances).with_name(f".{Path(flags.instances).name}.probabilities.npy")


def predict(flags: argparse.Namespace) -> None:
    """Everything between the command line and the files, on every process of the group."""
    path = probabilities_path(flags)
    with process_group(True) as device, ExitStack() as held:
        first_rank_does(lambda: held.enter_context(exclusive(path)))
        model, trained = all_ranks_do(lambda: load_model(flags.checkpoint, device))
        config = all_ranks_do(lambda: checked_config(trained, flags))
        image = all_ranks_do(lambda: open_volume(flags.input, config.data.image_axes))
        first_rank_does(lambda: check_outputs(flags, image, config))
        sections = (0, image.shape[0])
        voxel_size = all_ranks_do(lambda: input_voxel_size(image, config, trained))
        scale = all_ranks_do(lambda: measure_scale(image, sections))
        source = Source(image, scale, sections, voxel_size, file_digest(flags.checkpoint))
        first_rank_does(lambda: tell(model, source, config))
        if flags.fresh:
            first_rank_does(lambda: start_over(flags, path))
        network = working_copy(model, config.inference.precision)
        found = write_prediction(network, source, config, path)
        if flags.instances is not None:
            first_rank_does(lambda: decode(found, source, config, flags.instances))
        if flags.output is None:
            first_rank_does(lambda: remove_output(path))


def decode(found: Volume, source: Source, config: Config, path: Path) -> None:
    """Instances of a prediction."""
    write_instances(found, config, config.decoding.threshold, source.voxel_size_nm, source.identity(config), path)


def remove_output(path: Path) -> None:
    """Take away a prediction that only instances were made of."""
    path.unlink()
    note_of(path).unlink()


def start_over(flags: argparse.Namespace, path: Path) -> None:
    """Drop what unfinished calls left."""
    for target in (path, flags.instances):
        if target is not None:
            discard_streamed(target)


def tell(model: SegmentationModel, source: Source, config: Config) -> None:
    """What is about to happen, and what the working precision costs."""
    inference = config.inference
    names = ", ".join(f"{name} {part.start}:{part.stop}" for name, part in written_channels(config.targets).items())
    print(f"{source.image.path}: {list(source.shape)} voxels of {list(source.voxel_size_nm)} nm; channels {names}")
    print(f"{inference.tiling} tiles, precision {inference.precision}, test-time augmentation {inference.tta}")
    if inference.precision != "32":
        cost = rounding_cost(model, source.image, source.scale, config)
        print(f"{inference.precision} changes probabilities by at most {cost:.4f} (middle of the volume)", flush=True)


def main(arguments: list[str]) -> int:
    parser = change_parser(__doc__ or "", "a checkpoint (those of the preset base are shown)", BASE)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE.pt", help="best.pt of a run")
    parser.add_argument("--input", required=True, metavar="VOLUME", help="file, file.h5:key, file.zarr:key or folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="probabilities, uint8")
    parser.add_argument("--instances", type=Path, metavar="FILE", help="instances as decoding.target says")
    parser.add_argument("--fresh", action="store_true", help="drop what an unfinished call of other settings left")
    flags = parser.parse_intermixed_args(arguments)
    outputs = [path for path in (flags.output, flags.instances) if path is not None]
    if not outputs:
        raise config_error("--output, --instances: expected at least one of them")
    keep_freed_memory()
    predict(flags)
    if "RANK" not in os.environ or os.environ["RANK"] == "0":
        print(*outputs, sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
