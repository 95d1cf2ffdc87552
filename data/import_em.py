"""Three public EM data sets as volumes [z, y, x] with labels that em_segmentation reads.

python data/import_em.py fib25 SOURCE/training_sample2 data/original_data/em/fib25
python data/import_em.py isbi2012 SOURCE data/original_data/em/isbi2012
python data/import_em.py vnc SOURCE/stack1 data/original_data/em/vnc

fib25 (neuroproof_examples): image.npy and labels.npy (bodies) of the sections that are labelled; needs h5py.
isbi2012: image.npy and labels.npy of the labelled sections, channel 0 = membrane (1), channel 1 = the cells that membranes
part within each section; unlabelled.npy holds the other sections. vnc (groundtruth-drosophila-vnc): labels.npy with
channel 0 = class (1 membrane, 2 mitochondrion, 3 synapse, 4 glia) and channel 1 = mitochondria.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse
import gzip
import io

import numpy as np
import numpy.typing as npt
import scipy.ndimage
from PIL import Image

from common.command import ScriptParser
from common.errors import data_error, run_script
from common.extras import extra_package
from common.files import parsing, write_atomically
from common.volumes.slices import natural_key

Stack = npt.NDArray[np.uint8]
VNC_CLASSES = {0: 1, 32: 1, 64: 1, 96: 1, 128: 1, 159: 4, 191: 2, 223: 3, 255: 0}  # grey level of the labels -> class
MASK_LEVEL = 128  # of mitochondria masks with soft edges


def read_stack(folder: Path) -> Stack:
    """All images of a folder in the order of their numbers, [z, y, x] uint8."""
    files = sorted((p for p in folder.glob("*.*") if p.suffix in (".png", ".tif")), key=lambda p: natural_key(p.name))
    if not files:
        raise data_error(f"{folder}: no .png or .tif sections; expected the data set's folder as it is distributed")
    sections = []
    for path in files:
        with parsing(path, "copy the data set again"), Image.open(path) as image:
            sections.append(np.asarray(image.convert("L")))
        if sections[-1].shape != sections[0].shape:
            sizes = f"{list(sections[-1].shape)} pixels y, x, {files[0].name} {list(sections[0].shape)}"
            raise data_error(f"{path}: has {sizes}; expected one size, copy the data set again")
    return np.stack(sections)


def save_pair(target: Path, image: Stack, labels: npt.NDArray[np.generic], source: Path) -> None:
    """image.npy and labels.npy, once it is sure that they belong together."""
    if image.shape != labels.shape[-3:]:
        raise data_error(
            f"{source}: image {list(image.shape)}, labels {list(labels.shape[-3:])} (z, y, x); expected one shape, "
            "copy the data set again"
        )
    save(target / "image.npy", image)
    save(target / "labels.npy", labels)


def save(path: Path, array: npt.NDArray[np.generic]) -> None:
    write_atomically(path, lambda file: np.save(file, array))
    print(f"{path}: {list(array.shape)} {array.dtype}")


def import_fib25(source: Path, target: Path) -> None:
    path = source / "groundtruth.h5.gz"
    if not path.exists():
        raise data_error(f"{source}: no {path.name}; expected the data set's folder training_sample2")
    h5py = extra_package("h5py", f"{path}: reading HDF5")
    with parsing(path, "expected stack and transforms of neuroproof_examples"):
        with h5py.File(io.BytesIO(gzip.decompress(path.read_bytes())), "r") as file:
            stack, transforms = file["stack"][:], file["transforms"][:].astype(np.int64)
        bodies = np.zeros(int(stack.max()) + 1, np.uint32)
        bodies[transforms[:, 0]] = transforms[:, 1]
    save_pair(target, read_stack(source / "grayscale_maps")[: len(stack)], bodies[stack], source)


def import_isbi2012(source: Path, target: Path) -> None:
    image, cells = read_stack(source / "train" / "image"), read_stack(source / "train" / "label") >= MASK_LEVEL
    in_section = np.zeros((3, 3, 3), np.bool_)
    in_section[1, 1, :] = in_section[1, :, 1] = True
    instances, _ = scipy.ndimage.label(cells, in_section)
    save_pair(target, image[: len(cells)], np.stack([~cells, instances]).astype(np.uint32), source)
    save(target / "unlabelled.npy", image[len(cells) :])


def import_vnc(source: Path, target: Path) -> None:
    grey = read_stack(source / "labels")
    table = np.full(256, 255, np.uint8)
    table[list(VNC_CLASSES)] = list(VNC_CLASSES.values())
    classes = table[grey]
    if (classes == 255).any():
        raise data_error(
            f"{source / 'labels'}: grey levels other than {sorted(VNC_CLASSES)}; expected the labels as published"
        )
    mitochondria = read_stack(source / "mitochondria") >= MASK_LEVEL
    if classes.shape != mitochondria.shape:
        shapes = f"labels {list(classes.shape)}, mitochondria {list(mitochondria.shape)}"
        raise data_error(f"{source}: {shapes} (z, y, x); expected one shape, copy the data set again")
    save_pair(target, read_stack(source / "raw"), np.stack([classes, mitochondria]).astype(np.uint8), source)


IMPORTERS = {"fib25": import_fib25, "isbi2012": import_isbi2012, "vnc": import_vnc}


def main(arguments: list[str]) -> int:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(IMPORTERS), help="which data set")
    parser.add_argument("source", type=Path, help="its folder as distributed")
    parser.add_argument("target", type=Path, help="folder to write")
    flags = parser.parse_args(arguments)
    IMPORTERS[flags.name](flags.source, flags.target)
    return 0


if __name__ == "__main__":
    run_script(main)
