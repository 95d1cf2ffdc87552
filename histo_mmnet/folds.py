"""Train the members of trials, one after another, inside a run's folder."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import config_error
from common.parallel import all_ranks_do
from common.precision import tell_precision
from histo_mmnet.composites import Composite, all_composites, bag_of
from histo_mmnet.config import Config
from histo_mmnet.members import Member, build_network, count_trainable, mmnet_of, pools_patients
from histo_mmnet.places import Collection, images_of, slides_of_role
from histo_mmnet.scan import Image
from histo_mmnet.slides import Album, Slide
from histo_mmnet.splits import Role, Trial
from histo_mmnet.trainer import Material, Record, best_of, train

SEEN: tuple[Role, ...] = ("train", "val")  # by a network


def chosen_trials(collection: Collection, fold: int | None) -> list[Trial]:
    """All trials, or one."""
    if fold is None:
        return collection.trials
    numbers = [trial.number for trial in collection.trials]
    if fold not in numbers:
        raise config_error(f"--fold: no fold {fold}; expected one of {', '.join(map(str, numbers))}")
    return [collection.trials[numbers.index(fold)]]


def material_of(collection: Collection, trial: Trial, member: Member, album: Album, config: Config) -> Material:
    """What a member of a trial is trained and validated on."""
    for role in SEEN:
        check_shows_both_classes(member, role, images_of(collection, trial, role))
    digest = images_digest(collection, trial)
    val = composites_of(collection, trial, member, "val", config)
    return Material(member, slides_of_role(collection, trial, "train"), val, album, digest)


def composites_of(collection: Collection, trial: Trial, member: Member, role: Role, config: Config) -> list[Composite]:
    """What a member judges of a role: composites of slides, or the patients' bags where the network pools those."""
    slides = slides_of_role(collection, trial, role)
    if not pools_patients(member, config.model):
        return all_composites(slides, member.magnifications)
    patients: dict[str, list[Slide]] = {}
    for slide in slides:  # one that is tested apart from others of its accession is judged apart
        whole = config.split.protocol == "accession"
        patients.setdefault(slide.accession if whole else slide.name, []).append(slide)
    return [bag for own in patients.values() for bag in bag_of(own, member.magnifications)]


def images_digest(collection: Collection, trial: Trial) -> str:
    """Of names, roles and sizes of all files that a trial trains or validates on."""
    found = [(role, image) for role in SEEN for image in images_of(collection, trial, role)]
    facts = [f"{role} {image.name.file} {image.path.stat().st_size}" for role, image in found]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def check_shows_both_classes(member: Member, role: str, images: list[Image]) -> None:
    """A config error where a role has no image of a class at the magnifications that a member looks at."""
    there = {image.name.label for image in images if image.name.magnification in member.magnifications}
    verb = "train" if role == "train" else "validate"
    if len(there) < 2:
        missing = " or ".join(words for label, words in enumerate(("benign", "malignant")) if label not in there)
        raise config_error(
            f"fold {member.fold}: no {missing} image for {member.name} to {verb} on; expected some of both classes: fewer "
            "folds, more images, or train.single_magnifications=false"
        )


def train_members(
    members: list[Member], collection: Collection, config: Config, folder: Path, device: torch.device
) -> dict[Member, list[Record]]:
    """Train every member that is not complete; returns the records of each."""
    album = Album.of(config)
    trials = {trial.number: trial for trial in collection.trials}
    found: dict[Member, list[Record]] = {}
    # all are looked at before the first is trained
    materials = all_ranks_do(lambda: [material_of(collection, trials[m.fold], m, album, config) for m in members])
    for member, material in zip(members, materials, strict=True):
        found[member] = train(material, config, folder, device)
        if dist.get_rank() == 0:
            print(line_of(member, found[member], material), flush=True)
    return found


def line_of(member: Member, records: list[Record], material: Material) -> str:
    """One line for a trained member."""
    best = best_of(records)
    return (
        f"fold {member.fold} {member.name:6s} {len(material.train)} slides to train on, {len(material.val)} composites to "
        f"validate; best epoch {best['epoch']:g} of {len(records)}: balanced accuracy {best['val_balanced_accuracy']:.3f}, "
        f"AUC {best['val_auc']:.3f}, loss {best['val_loss']:.3f}"
    )


def announce(config: Config, collection: Collection, device: torch.device) -> None:
    """What is trained on what and where, before it takes hours."""
    for line in collection.told:
        print(line)
    network = build_network(mmnet_of(0), config.model)
    images = collection.images
    accessions, slides = len({i.name.accession for i in images}), len({i.name.slide for i in images})
    print(
        f"{config.model.architecture} on {config.model.backbone}, {count_trainable(network):,} weights; "
        f"{accessions} accessions, {slides} slides, {len(images):,} images; "
        f"{len(collection.trials)} folds by {config.split.protocol}; {dist.get_world_size()} x {device.type}",
        flush=True,
    )
    tell_precision(config.train.precision, device)
    if config.split.protocol != "accession":
        print(f"warning: split.protocol={config.split.protocol} has patients on both sides; leaks.py tells how many")
