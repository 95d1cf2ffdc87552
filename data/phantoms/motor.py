"""Simulated cryo-electron tomograms of bacteria, the default data of motor_detection.

Every tomogram is a function of (settings, index): analytic cells, flagellar motors and look-alikes in angstrom
(motor_scene, motor_clutter, motor_shapes), seen through an electron microscope with a missing wedge (motor_imaging).
"""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from common.errors import config_error, data_error
from common.files import write_text
from common.lock import exclusive
from common.logbook import progress
from common.processes import submit_all, worker_pool
from common.streams import random_for
from common.volumes.slices import write_slice_folder
from data.phantoms.motor_clutter import draw_scene
from data.phantoms.motor_imaging import Exposure, take_tomogram, to_grey_levels
from data.phantoms.motor_scene import plan_scene, uniform
from data.phantoms.motor_settings import MotorPhantom
from data.phantoms.relabelled import relabelled_row

__all__ = ["MotorPhantom", "SimulatedTomogram", "simulate_tomogram", "write_phantom"]

GENERATOR_VERSION = 3  # raised whenever equal settings give other bits, so that stale folders are noticed
TRAIN_FOLDS, VALIDATION_FOLD, TEST_FOLD = (2, 3, 4), 0, 1


@dataclasses.dataclass(frozen=True)
class SimulatedTomogram:
    """One tomogram and its truth."""

    tomo_id: str
    volume: npt.NDArray[np.uint8]  # [z, y, x], dense = dark
    spacing_angstrom: float
    motors: npt.NDArray[np.float64]  # (n, 3): z, y, x in voxels
    fold: int


def simulate_tomogram(settings: MotorPhantom, index: int) -> SimulatedTomogram:
    """Simulate tomogram `index` of the data set; equal arguments give equal bits."""
    scene = plan_scene(settings, index)
    density = draw_scene(settings, scene, random_for("motor clutter", settings.seed, index))
    rng = random_for("motor exposure", settings.seed, index)
    exposure = Exposure(
        spacing_angstrom=scene.spacing_angstrom,
        defocus_micrometre=uniform(rng, settings.defocus_micrometre),
        b_factor_angstrom2=uniform(rng, settings.b_factor_angstrom2),
        dose_electrons_per_angstrom2=uniform(rng, settings.dose_electrons_per_angstrom2),
    )
    signal, noise = take_tomogram(density, exposure, settings, rng)
    z, y, x = (slice(margin, margin + n) for margin, n in zip(scene.margins, scene.shape, strict=True))
    volume = to_grey_levels((signal + noise)[z, y, x], settings, rng)
    return SimulatedTomogram(tomo_id(index), volume, scene.spacing_angstrom, scene.motors, fold_of(settings, index))


def tomo_id(index: int) -> str:
    """The name of a tomogram and its folder."""
    return f"tomo_{index:06d}"


def num_tomograms(settings: MotorPhantom) -> int:
    """Tomograms of all folds together."""
    return settings.train_tomograms + settings.validation_tomograms + settings.test_tomograms


def fold_of(settings: MotorPhantom, index: int) -> int:
    """Training tomograms come first, then validation, then test."""
    if index < settings.train_tomograms:
        return TRAIN_FOLDS[index % len(TRAIN_FOLDS)]
    return VALIDATION_FOLD if index < settings.train_tomograms + settings.validation_tomograms else TEST_FOLD


def write_phantom(settings: MotorPhantom, folder: Path, num_processes: int) -> Path:
    """Write folder/train/tomo_*/slice_*.jpg and folder/labels.csv; returns the path of the labels.

    A killed call is continued by the next; a complete folder is left as it is. The files do not depend on
    `num_processes`. Raises UserError where the settings are impossible or the folder holds other tomograms.
    """
    problems = [f"phantom.{problem}" for problem in settings.problems()]
    if problems:
        raise config_error(*problems)
    recorded = folder / "settings.json"
    if (
        recorded.exists()
        and recorded.read_bytes() == described(settings).encode()
        and not missing_tomograms(settings, folder)
    ):
        return folder / "labels.csv"
    with exclusive(folder):
        return complete_folder(settings, folder, num_processes)


def complete_folder(settings: MotorPhantom, folder: Path, num_processes: int) -> Path:
    """Write what is missing of a folder that this process alone writes; returns the path of the labels."""
    claim_folder(settings, folder)
    images, labels = folder / "train", folder / "labels.csv"
    missing = missing_tomograms(settings, folder)
    if missing:
        print(f"simulating {len(missing)} tomograms into {folder}", flush=True)
        work = written(settings, images, missing, num_processes)
        for _ in progress(work, "simulating tomograms", len(missing), True):
            pass
    if missing or not labels.exists() or not (folder / "settings.json").exists():
        write_text(labels, label_table(settings).to_csv(index=False))
        write_text(folder / "settings.json", described(settings))
        (folder / "unfinished.json").unlink(missing_ok=True)
    return labels


def missing_tomograms(settings: MotorPhantom, folder: Path) -> list[int]:
    """Numbers of the tomograms whose folders are not there yet."""
    return [i for i in range(num_tomograms(settings)) if not (folder / "train" / tomo_id(i)).is_dir()]


def claim_folder(settings: MotorPhantom, folder: Path) -> None:
    """Note the settings in the folder before the first tomogram; refuse a folder made with others."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for path in (folder / "settings.json", folder / "unfinished.json"):
        if path.exists() and path.read_bytes() != described(settings).encode():
            raise config_error(
                f"phantom: {folder} holds tomograms simulated with other settings (see {path.name});"
                " delete the folder or name another"
            )
    if not (folder / "settings.json").exists():
        write_text(folder / "unfinished.json", described(settings))


def described(settings: MotorPhantom) -> str:
    """The settings as JSON, with the generator's version."""
    return json.dumps({"generator_version": GENERATOR_VERSION, **dataclasses.asdict(settings)}, indent=1) + "\n"


def written(settings: MotorPhantom, images: Path, indices: list[int], num_processes: int) -> Iterator[None]:
    """Write tomograms one after another or by several processes, yielding once for each."""
    if num_processes == 1 or len(indices) == 1:
        for index in indices:
            write_tomogram(settings, images, index)
            yield
        return
    with worker_pool(num_processes) as pool:
        try:
            work = submit_all(pool, write_tomogram, [(settings, images, index) for index in indices])
            yield from (future.result() for future in as_completed(work))
        except BrokenProcessPool as error:
            raise data_error(
                f"{images}: a simulating process died (out of memory?); what is finished is kept, and the same command "
                "with fewer convert.producers continues"
            ) from error


def write_tomogram(settings: MotorPhantom, images: Path, index: int) -> None:
    """Write one tomogram's slices; its folder appears when it is complete."""
    tomogram = simulate_tomogram(settings, index)
    write_slice_folder(tomogram.volume, images / tomogram.tomo_id, ".jpg", settings.jpeg_quality)


def label_table(settings: MotorPhantom) -> pd.DataFrame:
    """The truth in the columns of the relabelled BYU 2025 table."""
    scenes = [plan_scene(settings, index) for index in range(num_tomograms(settings))]
    return pd.DataFrame(
        relabelled_row(tomo_id(index), scene.shape, scene.spacing_angstrom, scene.motors, fold_of(settings, index))
        for index, scene in enumerate(scenes)
    )
