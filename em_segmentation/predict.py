"""Probabilities and instances of whole volumes, in files that other programs open.

python em_segmentation/predict.py --checkpoint best.pt --input volume.h5:raw --output prediction.h5
python em_segmentation/predict.py --checkpoint best.pt --input stack/ --instances cells.zarr decoding.target=affinity
python em_segmentation/predict.py --checkpoint best.pt --input a.npy --classes mitochondria.tif inference.tta=flips_in_plane
torchrun --nproc-per-node 4 em_segmentation/predict.py --checkpoint best.pt --input big.zarr --output prediction.zarr

--input: .npy, .h5:key, .zarr:key, .tif, or a folder of slices. --output (uint8, channels as printed), --instances (ids
from 1) and --classes (of the semantic target) are .npy, .h5, .zarr, .tif or a folder of PNG. Memory is bounded by tiles
and blocks, not by the volume; the same command continues a killed one. Processes under torchrun share the planes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse
import dataclasses
import json
from contextlib import ExitStack

import numpy as np
import torch
import torch.distributed as dist

from common.command import change_parser
from common.config import as_yaml, configure
from common.errors import config_error, run_script
from common.files import file_digest, parsing, read_text
from common.lock import exclusive
from common.memory import keep_freed_memory
from common.parallel import all_ranks_do, first_rank_does, process_group
from common.volumes.finishing import check_target
from common.volumes.opening import open_volume
from common.volumes.streaming import partial_folder
from common.volumes.volume import Volume
from em_segmentation.class_maps import classes_identity, components_of, write_classes
from em_segmentation.config import BASE, Config
from em_segmentation.inference import inference_precision, load_model, rounding_cost, working_copy, written_channels
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.places import training_identity
from em_segmentation.prediction import (
    Source,
    discard,
    instances_identity,
    is_finished,
    note_of,
    unfinished_identity,
    write_instances,
    write_prediction,
)
from em_segmentation.regions import VoxelSize
from em_segmentation.train import use_processor
from em_segmentation.volumes import measure_scale


def checked_config(trained: Config, flags: argparse.Namespace) -> Config:
    """The config of the weights with the command line's changes, which must not touch what shaped them."""
    free = dataclasses.replace(trained.data, image_axes="auto", voxel_size_nm=None)
    machine = dataclasses.replace(trained.system, num_gpus=1, num_cpus=0)  # another one than that of the training
    config = configure(dataclasses.replace(trained, data=free, system=machine), flags.config, flags.changes)
    known = dataclasses.replace(config.data, image_axes=trained.data.image_axes)
    if training_identity(dataclasses.replace(config, data=known)) != training_identity(trained):
        raise config_error(
            "section.name=value: after training only inference, decoding, system.num_cpus, system.num_gpus, "
            "data.image_axes and data.voxel_size_nm can change"
        )
    return config


def check_call(flags: argparse.Namespace, config: Config) -> None:
    """A config error for flags that make no sense together."""
    named = [target.resolve() for target in targets_of(flags)]
    if flags.input is None or not named:
        raise config_error("--input and at least one of --output, --instances and --classes are needed; see --help")
    for target in targets_of(flags):
        if not target.name or any(f"{suffix}:" in str(target) for suffix in (".h5", ".hdf5", ".zarr", ".n5")):
            raise config_error(f"{target}: no name of an output; expected FILE.npy, .h5, .zarr, .tif or a new folder")
    if len(set(named)) < len(named):
        raise config_error("--output, --instances, --classes: two are the same file; expected different names")
    if flags.instances is not None and config.decoding.target == "none":
        raise config_error(
            "--instances: decoding.target is none; expected one of targets.names, for example decoding.target=affinity"
        )
    if flags.classes is not None and "semantic" not in config.targets.names:
        raise config_error(f"--classes: needs semantic among targets.names, got {list(config.targets.names)}")


def targets_of(flags: argparse.Namespace) -> list[Path]:
    """The files that are wanted."""
    return [target for target in (flags.output, flags.instances, flags.classes) if target is not None]


def input_voxel_size(image: Volume, config: Config, trained: Config) -> VoxelSize:
    """As given, as the file says, or else as in training."""
    for size in (config.data.voxel_size_nm, image.voxel_size_nm, trained.data.voxel_size_nm):
        if size is not None:
            learnt = trained.data.voxel_size_nm
            if learnt is not None and not np.allclose(size, learnt, rtol=1e-3) and dist.get_rank() == 0:
                print(f"warning: voxels of {list(size)} nm; the network was trained on {list(learnt)} nm")
            if config.data.voxel_size_nm is None and image.voxel_size_nm is None and dist.get_rank() == 0:
                print(
                    f"note: {image.path.name} does not say its voxel size; taken as the network's (data.voxel_size_nm)"
                )
            return size
    raise config_error("data.voxel_size_nm: neither the file nor the checkpoint says it; give [z, y, x] in nm")


def check_outputs(flags: argparse.Namespace, image: Volume, config: Config) -> None:
    """Everything that would make the work useless at its end is told before it begins."""
    if image.num_channels != config.model.in_channels:
        raise config_error(
            f"--input {flags.input}: has {image.num_channels} channels, the network takes {config.model.in_channels}"
        )
    if image.path.resolve() in [target.resolve() for target in targets_of(flags)]:
        raise config_error(f"--input {flags.input}: is an output too; expected different names")
    if flags.output is not None:
        num_channels = max(part.stop for part in written_channels(config.targets).values())
        check_target(flags.output, num_channels, np.dtype(np.uint8))
    if flags.instances is not None:
        kind = np.uint32 if flags.instances.suffix else np.uint16  # what slices of PNG can hold
        check_target(flags.instances, 1, np.dtype(kind))
    if flags.classes is not None:
        check_target(flags.classes, 1, np.dtype(np.uint8))


def probabilities_path(flags: argparse.Namespace) -> Path:
    """--output, or a file beside what is made of it, which goes when that is done."""
    if flags.output is not None:
        return Path(flags.output)
    made = targets_of(flags)[0]
    return made.with_name(f".{made.name}.probabilities.npy")


def predict(flags: argparse.Namespace, model: SegmentationModel, trained: Config, config: Config) -> None:
    """Everything between the command line and the files, on every process of the group."""
    path = probabilities_path(flags)
    with ExitStack() as held:
        with process_group(config.system.deterministic) as device:
            first_rank_does(lambda: hold(held, flags, path))
            model = model.to(device)
            image = all_ranks_do(lambda: open_volume(flags.input, config.data.image_axes))
            first_rank_does(lambda: check_outputs(flags, image, config))
            source = all_ranks_do(lambda: source_of(image, flags, config, trained))
            learnt = dataclasses.replace(config.data, voxel_size_nm=trained.data.voxel_size_nm)  # shapes the network
            config = dataclasses.replace(config, data=learnt)
            if flags.fresh:
                first_rank_does(lambda: start_over(flags, path))
            first_rank_does(lambda: check_unfinished(flags, source, config, path))
            is_done = all_ranks_do(lambda: not unmade(flags, source, config) and flags.output is None)
            if not is_done:
                first_rank_does(lambda: tell(model, source, config))
                write_prediction(working_copy(model, config.inference.precision), source, config, path)
            is_first = dist.get_rank() == 0
        if is_first:  # the others, if any, are gone: a group would not wait for hours
            finish_files(flags, source, config, path)


def hold(held: ExitStack, flags: argparse.Namespace, path: Path) -> None:
    """Lock the outputs until the stack is closed."""
    for target in {path, *targets_of(flags)}:
        held.enter_context(exclusive(partial_folder(target)))


def source_of(image: Volume, flags: argparse.Namespace, config: Config, trained: Config) -> Source:
    """What is predicted, with its grey scale and voxel size."""
    sections = (0, image.shape[0])
    voxel_size = input_voxel_size(image, config, trained)
    return Source(image, measure_scale(image, sections), sections, voxel_size, file_digest(flags.checkpoint))


def wanted(flags: argparse.Namespace, source: Source, config: Config) -> dict[Path, str]:
    """--instances and --classes with what they are made from."""
    made_from, decoding = source.identity(config), config.decoding
    targets = {}
    if flags.instances is not None:
        targets[flags.instances] = instances_identity(config, decoding.threshold, made_from)
    if flags.classes is not None:
        targets[flags.classes] = classes_identity(config, decoding.class_threshold, made_from)
    return targets


def check_unfinished(flags: argparse.Namespace, source: Source, config: Config, path: Path) -> None:
    """A config error where a killed call of other settings left something: told before the work begins."""
    for target, identity in (wanted(flags, source, config) | {path: source.identity(config)}).items():
        if unfinished_identity(target) not in (None, identity):
            raise config_error(
                f"{target}: a killed call of other settings left its part beside it; the call as it was continues it, "
                "--fresh drops it"
            )


def unmade(flags: argparse.Namespace, source: Source, config: Config) -> list[Path]:
    """Which of --instances and --classes are still to be made; a config error where one is another's file."""
    return [target for target, identity in wanted(flags, source, config).items() if not is_finished(target, identity)]


def finish_files(flags: argparse.Namespace, source: Source, config: Config, path: Path) -> None:
    """Instances and classes, where they are wanted; a prediction that only they were made of is taken away."""
    made_from, decoding = source.identity(config), config.decoding
    left, size = unmade(flags, source, config), source.voxel_size_nm
    if flags.instances in left:
        write_instances(open_volume(path, "auto"), config, decoding.threshold, size, made_from, flags.instances)
    if flags.classes in left:
        write_classes(open_volume(path, "auto"), config, decoding.class_threshold, size, made_from, flags.classes)
    if flags.output is None:
        path.unlink(missing_ok=True)
        note_of(path).unlink(missing_ok=True)
    if flags.instances is not None and config.decoding.method != "mutex":
        chosen = chosen_threshold(flags.checkpoint)
        hint = (
            "eval.py chooses one on validation volumes" if chosen is None else f"eval.py chose {chosen} on validation"
        )
        if decoding.threshold == chosen:
            hint = "as eval.py chose on validation"
        print(f"instances at decoding.threshold={decoding.threshold}; {hint}")
    print(*targets_of(flags), sep="\n")


def chosen_threshold(checkpoint: Path) -> int | None:
    """The threshold of instances that eval.py chose for the run of a checkpoint, where it has judged it."""
    path = checkpoint.resolve().parent.parent / "results" / "metrics.json"
    if not path.exists():
        return None
    with parsing(path, "delete it, or run eval.py again"):
        figures = json.loads(read_text(path))
        known = "instance_threshold" in figures and figures["validation_volumes"]
        if known and isinstance(figures["instance_threshold"], int):  # a fraction in files of older versions
            return int(figures["instance_threshold"])
    return None


def start_over(flags: argparse.Namespace, path: Path) -> None:
    """Drop what unfinished calls left."""
    for target in (path, *targets_of(flags)):
        discard(target)
        discard(components_of(target))


def tell(model: SegmentationModel, source: Source, config: Config) -> None:
    """What is about to happen, and what the working precision costs."""
    inference = config.inference
    names = ", ".join(f"{name} {part.start}:{part.stop}" for name, part in written_channels(config.targets).items())
    print(f"{source.image.path}: {list(source.shape)} voxels of {list(source.voxel_size_nm)} nm; channels {names}")
    working = inference_precision(inference.precision, next(model.parameters()).device)
    print(f"{inference.tiling} tiles, precision {working}, test-time augmentation {inference.tta}")
    if working != "float32":
        cost = rounding_cost(model, source.image, source.scale, config)
        print(f"{working} changes probabilities by at most {cost:.4f} (middle of the volume)", flush=True)


def main(arguments: list[str]) -> int:
    parser = change_parser(__doc__ or "", "a checkpoint (those of the preset base are shown)", BASE)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE.pt", help="best.pt of a run")
    parser.add_argument("--input", metavar="VOLUME", help="file, file.h5:key, file.zarr:key or folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="probabilities, uint8")
    parser.add_argument("--instances", type=Path, metavar="FILE", help="instances as decoding.target says")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="classes of the semantic target, uint8")
    parser.add_argument("--fresh", action="store_true", help="drop what an unfinished call of other settings left")
    flags = parser.parse_intermixed_args(arguments)
    model, trained = load_model(flags.checkpoint, torch.device("cpu"))
    config = checked_config(trained, flags)
    if flags.print_config:
        print(as_yaml(config), end="")
        return 0
    check_call(flags, config)
    use_processor(config)
    keep_freed_memory()
    predict(flags, model, trained, config)
    return 0


if __name__ == "__main__":
    run_script(main)
