"""Tomograms to training patches: producer processes load and cut, the main process renders heat maps and saves.

A patch depends on its tomogram, the label and the seed alone, so any number of producers writes the same bytes. Every
file is whole or absent and every finished tomogram is marked, so an interrupted conversion continues.
"""

import collections
import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from common.config import as_yaml
from common.errors import UserError, config_error, data_error
from common.files import read_text, write_text
from common.interrupt import StopRequest, stop_on_signal
from common.logbook import progress
from motor_detection.config import Data
from motor_detection.heatmap import render_heatmaps
from motor_detection.labels import LabelledTomogram
from motor_detection.patches import cut_patch, plan_patches, write_patch
from motor_detection.places import ConvertSettings
from motor_detection.tomograms import load_bytes, open_tomogram, spacing_warnings

COMPLETE = "complete.json"
Message = tuple[str, str, Any]  # kind ("patch", "done", "failed", "end"), tomo_id, content


@dataclasses.dataclass
class Summary:
    """What one conversion did; failed holds one line per problem."""

    converted: int
    kept: int
    patches: collections.Counter[str]
    failed: list[str]


@dataclasses.dataclass(frozen=True)
class Job:
    label: LabelledTomogram
    path: Path
    settings: ConvertSettings


def convert_all(
    labelled: list[LabelledTomogram], paths: dict[str, Path], data: Data, settings: ConvertSettings, producers: int
) -> Summary:
    """Convert every tomogram that is not complete yet; a bad one is recorded and the rest goes on."""
    claim_folder(data.patches, settings)
    open_jobs = [
        Job(label, paths[label.tomo_id], settings) for label in labelled if patches_of(data.patches, label) is None
    ]
    for job in open_jobs:  # of an interrupted conversion, or of labels that were corrected since
        shutil.rmtree(data.patches / job.label.tomo_id, ignore_errors=True)
    summary = Summary(0, len(labelled) - len(open_jobs), collections.Counter(), [])
    if not open_jobs:
        return summary
    context = multiprocessing.get_context("spawn")
    producers = min(producers, len(open_jobs))
    processes: dict[Connection, Any] = {}  # by the pipe that each one fills; a full pipe makes it wait
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process, which ends all
    for k in range(producers):
        receiver, sender = context.Pipe(duplex=False)
        processes[receiver] = context.Process(target=produce, args=(open_jobs[k::producers], sender), daemon=True)
        processes[receiver].start()
        sender.close()  # the process holds the only one, so that its death ends the pipe
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        digests = {job.label.tomo_id: label_digest(job.label) for job in open_jobs}
        with stop_on_signal() as stop:  # an interrupt raised anywhere could be lost in some library's clean-up
            consume(processes, data.patches, settings, summary, digests, stop)
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    return summary


def claim_folder(folder: Path, settings: ConvertSettings) -> None:
    """Record the settings of a folder of patches, or refuse a folder of other settings."""
    recorded, text = folder / "settings.yaml", as_yaml(settings)
    if recorded.exists() and read_text(recorded) != text:
        raise config_error(
            f"data.patches: {folder} was converted with other constants (see {recorded}); "
            "choose another folder, or empty it with --fresh"
        )
    if not recorded.exists():
        if folder.exists() and any(folder.iterdir()):
            raise config_error(f"data.patches: {folder} holds other files; give an empty or new folder")
        write_text(recorded, text)


def patches_of(folder: Path, label: LabelledTomogram) -> list[Path] | None:
    """The patch files of one tomogram, in order; None where it is not converted, or was with other labels."""
    marker = folder / label.tomo_id / COMPLETE
    if not marker.exists():
        return None
    try:
        content = json.loads(marker.read_bytes())
        names, labels = [str(name) for name in content["patches"]], content["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # a damaged marker: the tomogram is converted again
    files = [marker.parent / name for name in names]
    return files if labels == label_digest(label) and all(file.exists() for file in files) else None


def label_digest(label: LabelledTomogram) -> str:
    """Changes with a tomogram's shape, spacing or motors, so that patches of corrected labels are cut anew."""
    return hashlib.sha256(repr((label.shape, label.spacing_angstrom, label.motors.tolist())).encode()).hexdigest()[:16]


def clear_folder(folder: Path) -> None:
    """Delete a folder of patches, and nothing that is not one."""
    if not folder.exists():
        return
    if not (folder / "settings.yaml").exists():
        raise config_error(f"--fresh: {folder} is no folder of patches (no settings.yaml in it); nothing was deleted")
    shutil.rmtree(folder)


def produce(jobs: list[Job], messages: "Connection[Message, Message]") -> None:
    """Load tomograms one after the other and send their patches; runs in a process of its own."""
    torch.set_num_threads(1)
    for job in jobs:
        try:
            tomogram = open_tomogram(job.path, job.label, job.settings.voxel_spacing_angstrom)
            for warning in spacing_warnings(tomogram):
                print(f"warning: {warning}", flush=True)
            plans = plan_patches(job.label, tomogram.volume.shape, job.settings.convert)
            if plans:
                voxels = load_bytes(tomogram)
                for number, plan in enumerate(plans):
                    arrays = cut_patch(voxels, plan, job.label, job.settings.convert.patch_size)
                    messages.send(("patch", job.label.tomo_id, (number, arrays)))
            messages.send(("done", job.label.tomo_id, len(plans)))
        except UserError as error:
            messages.send(("failed", job.label.tomo_id, error.problems))
        except MemoryError as error:
            problem = f"{job.path}: out of memory ({error}); fewer convert.producers or smaller patches need less"
            messages.send(("failed", job.label.tomo_id, [problem]))
    messages.send(("end", "", None))


def consume(
    processes: dict[Connection, Any],
    folder: Path,
    settings: ConvertSettings,
    summary: Summary,
    digests: dict[str, str],
    stop: StopRequest,
) -> None:
    """Save patches as they come until every producer has ended, or somebody asks to stop."""
    written: dict[str, list[str]] = {}
    with progress(digests, "converting", len(digests), True) as bar:
        for kind, tomo_id, content in received(processes, stop):
            if kind == "patch":
                number, arrays = content
                arrays["heatmap"] = heatmap_of(arrays, settings)
                name = f"{number:04d}_{arrays['patch_type']}.npz"
                write_patch(folder / tomo_id / name, arrays)
                written.setdefault(tomo_id, []).append(name)
                summary.patches[str(arrays["patch_type"])] += 1
            elif kind == "done":
                names = sorted(written.pop(tomo_id, []))
                write_text(
                    folder / tomo_id / COMPLETE, json.dumps({"patches": names, "labels": digests[tomo_id]}) + "\n"
                )
                summary.converted += 1
                bar.update()
            elif kind == "failed":
                summary.failed += content
                for problem in content:
                    print(f"error: {problem}", file=sys.stderr)
                bar.update()


def received(processes: dict[Connection, Any], stop: StopRequest) -> Iterator[Message]:
    """All messages in order of arrival; a data error when a producer was killed (as the system does without memory)."""
    still_open = list(processes)
    while still_open:
        if stop.asked:
            raise KeyboardInterrupt
        for receiver in wait(still_open, 0.5):  # seconds, after which a request to stop is looked for
            assert isinstance(receiver, Connection)
            try:
                message: Message = receiver.recv()
            except (EOFError, OSError) as error:  # at a message's end, or inside one
                processes[receiver].join()
                raise data_error(
                    f"convert: a loading process died with exit code {processes[receiver].exitcode} (out of memory?); "
                    "what was finished is kept; the same command with fewer convert.producers continues"
                ) from error
            if message[0] == "end":
                still_open.remove(receiver)
            else:
                yield message


def heatmap_of(arrays: dict[str, Any], settings: ConvertSettings) -> Any:
    """The heat map (z, y, x cells) float32 of one patch, from its float coordinates."""
    sigma = settings.heatmap.sigma_angstrom / torch.from_numpy(arrays["spacing_angstrom"])
    size = settings.convert.patch_size
    return render_heatmaps(torch.from_numpy(arrays["motors"])[None], sigma[None], size, settings.stride)[0, 0].numpy()
