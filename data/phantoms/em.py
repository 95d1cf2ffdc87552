"""Simulated volumes of neuropil as an electron microscope shows them, the default data of em_segmentation.

Every volume is a function of (settings, role, number): curves in nm (em_curves) divide space among neurites
(em_partition), filled with organelles (em_organelles) and synapses (em_synapses), then imaged section by section
(em_imaging). Truth and image are drawn from the same geometry.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.files import write_atomically, write_text
from common.lock import exclusive
from common.logbook import progress
from common.memory import keep_freed_memory
from common.processes import submit_all, worker_pool
from common.streams import random_for
from data.phantoms.em_curves import draw_curves
from data.phantoms.em_grid import canvas, draw_warp
from data.phantoms.em_imaging import Faults, cropped, draw_faults, take_image
from data.phantoms.em_organelles import (
    Drawing,
    add_lysosomes,
    add_microtubules,
    add_mitochondria,
    add_reticulum,
    start_drawing,
)
from data.phantoms.em_partition import connected, divide, instances
from data.phantoms.em_settings import ROLES, EMPhantom
from data.phantoms.em_synapses import add_loose_vesicles, add_membranes, add_synapses

__all__ = ["EMPhantom", "simulate_volume", "write_phantom"]

GENERATOR_VERSION = 3  # raised whenever equal settings give other bits, so that stale folders are noticed

Record = dict[str, Any]


def simulate_volume(
    settings: EMPhantom, role: str, number: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], Record]:
    """Simulate one volume: image uint8 [z, y, x], labels uint32 [2, z, y, x], record; equal arguments give equal bits.

    labels[0] holds neurites 1..n, each connected across faces, 0 in the gaps between them; labels[1] holds classes: 1
    mitochondrion, 2 synaptic density, 3 lysosome. The record says what was done to which section.
    """

    def stream(purpose: str) -> np.random.Generator:
        return random_for(f"em {purpose}", settings.seed, ROLES.index(role), number)

    grid = canvas(settings)
    warp = draw_warp(grid, settings, stream("warp"))
    curves = connected(draw_curves(settings, grid.extent, stream("curves")), grid, warp)
    drawing = start_drawing(divide(curves, grid, warp), curves, grid, warp, settings, stream("cytoplasm"))
    counts = furnish(drawing, stream)
    faults = draw_faults(settings, stream("faults"))
    labels = draw_labels(drawing, faults)
    image, sections = take_image(drawing.grey, grid, faults, settings, stream("exposure"))
    record = {
        "name": volume_name(role, number),
        "shape": list(settings.shape),
        "voxel_size_nm": list(settings.voxel_size_nm),
        "neurites": int(labels[0].max()),
        **counts,
        "mitochondria_voxels": int((labels[1] == 1).sum()),
        "synapse_voxels": int((labels[1] == 2).sum()),
        "lysosome_voxels": int((labels[1] == 3).sum()),
        "sections": sections,
    }
    return image, labels, record


def furnish(drawing: Drawing, stream: Callable[[str], np.random.Generator]) -> Record:
    """Draw all that lies in and between neurites; returns how many bodies of each kind were drawn on the canvas."""
    add_reticulum(drawing, stream("reticulum"))
    mitochondria = add_mitochondria(drawing, stream("mitochondria"))
    lysosomes = add_lysosomes(drawing, stream("lysosomes"))
    add_microtubules(drawing, stream("microtubules"))
    add_loose_vesicles(drawing, stream("loose vesicles"))
    add_membranes(drawing, stream("membranes"))
    synapses = add_synapses(drawing, stream("synapses"))
    return {"mitochondria_drawn": mitochondria, "lysosomes_drawn": lysosomes, "synapses_drawn": synapses}


def draw_labels(drawing: Drawing, faults: Faults) -> npt.NDArray[np.uint32]:
    """Labels [2, z, y, x] in the middle plane of every section, moved with shifted sections."""
    settings, partition = drawing.settings, drawing.partition
    middle = slice(drawing.grid.planes // 2, None, drawing.grid.planes)
    body, depth, semantic = (
        cropped(part[middle], faults, settings) for part in (partition.body, partition.depth, drawing.semantic)
    )
    neurites = instances(body, depth, settings.gap_nm, settings.smallest_instance_voxels)
    return np.stack([neurites, semantic.astype(np.uint32)])


def volume_name(role: str, number: int) -> str:
    """The name of a volume and its folder."""
    return f"{role}_{number}"


def volumes(settings: EMPhantom) -> list[tuple[str, int]]:
    """Role and number of every volume."""
    counts = (settings.train_volumes, settings.validation_volumes, settings.test_volumes)
    return [(role, number) for role, count in zip(ROLES, counts, strict=True) for number in range(count)]


def write_phantom(settings: EMPhantom, folder: Path, producers: int) -> dict[str, list[Path]]:
    """Write folder/NAME/{image.npy, labels.npy, record.json} for every volume; returns the volumes' folders per role.

    A killed call is continued by the next; a complete folder is left as it is. The files do not depend on `producers`
    (processes that simulate at once). Raises UserError where the settings are impossible or the folder holds others.
    """
    problems = [f"phantom.{problem}" for problem in settings.problems()]
    if problems:
        raise config_error(*problems)
    recorded = folder / "settings.json"
    complete = recorded.exists() and recorded.read_bytes() == described(settings).encode()
    if not complete or missing_volumes(settings, folder):
        with exclusive(folder):
            complete_folder(settings, folder, producers)
    return {role: [folder / volume_name(r, n) for r, n in volumes(settings) if r == role] for role in ROLES}


def complete_folder(settings: EMPhantom, folder: Path, producers: int) -> None:
    """Write what is missing of a folder that this process alone writes."""
    claim_folder(settings, folder)
    missing = missing_volumes(settings, folder)
    if missing:
        print(f"simulating {len(missing)} volumes into {folder}", flush=True)
        for _ in progress(written(settings, folder, missing, producers), "simulating volumes", len(missing), True):
            pass
    write_text(folder / "settings.json", described(settings))
    (folder / "unfinished.json").unlink(missing_ok=True)


def missing_volumes(settings: EMPhantom, folder: Path) -> list[tuple[str, int]]:
    """The volumes whose folders are not there yet."""
    return [(role, number) for role, number in volumes(settings) if not (folder / volume_name(role, number)).is_dir()]


def claim_folder(settings: EMPhantom, folder: Path) -> None:
    """Note the settings in the folder before the first volume; refuse a folder made with others."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / "settings.json", folder / "unfinished.json"):
        if path.exists() and path.read_bytes() != described(settings).encode():
            raise config_error(
                f"phantom: {folder} holds volumes simulated with other settings (see {path.name});"
                " delete the folder or name another"
            )
    if not (folder / "settings.json").exists():
        write_text(folder / "unfinished.json", described(settings))


def described(settings: EMPhantom) -> str:
    """The settings as JSON, with the generator's version."""
    return json.dumps({"generator_version": GENERATOR_VERSION, **dataclasses.asdict(settings)}, indent=1) + "\n"


def written(settings: EMPhantom, folder: Path, missing: list[tuple[str, int]], producers: int) -> Iterator[None]:
    """Write volumes one after another or by several processes, yielding once for each."""
    if producers == 1 or len(missing) == 1:
        for role, number in missing:
            write_volume(settings, folder, role, number)
            yield
        return
    with worker_pool(producers) as pool:
        try:
            work = submit_all(pool, write_volume, [(settings, folder, role, number) for role, number in missing])
            yield from (future.result() for future in as_completed(work))
        except BrokenProcessPool as error:
            raise data_error(
                f"{folder}: a simulating process died (out of memory?); what is finished is kept, and the same command "
                "with fewer producers continues"
            ) from error


def write_volume(settings: EMPhantom, folder: Path, role: str, number: int) -> None:
    """Write one volume; its folder appears when it is complete."""
    keep_freed_memory()
    image, labels, record = simulate_volume(settings, role, number)
    name = volume_name(role, number)
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_atomically(partial / "image.npy", lambda file: np.save(file, image))
    write_atomically(partial / "labels.npy", lambda file: np.save(file, labels))
    write_text(partial / "record.json", json.dumps(record, indent=1) + "\n")
    partial.replace(folder / name)
