"""Composites: every image is judged, classes are even in training, a broken file has one line; and the phantom."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from common.errors import BAD_DATA, UserError
from data.phantoms.histo import accessions, simulate_accession, write_phantom
from data.phantoms.histo_scene import RATIO
from data.phantoms.histo_settings import HistoPhantom
from histo_mmnet.augmentation import augmented, blurred, draw, prepared, turned
from histo_mmnet.colours import read_picture
from histo_mmnet.composites import all_composites, bag_of
from histo_mmnet.config import PHANTOM, Augment
from histo_mmnet.dataset import Batch, CompositeStream, stack
from histo_mmnet.losses import composite_loss, mixed
from histo_mmnet.model_defs.slots import into_slots
from histo_mmnet.names import MAGNIFICATIONS, image_name
from histo_mmnet.scan import scan
from histo_mmnet.slides import Album, Slide, slides_of

SMALL = HistoPhantom(benign_accessions=3, malignant_accessions=4, sites=(2, 3), size=(38, 58))
QUIET = Augment(flips=0.0, rotation_degrees=0.0, brightness=0.0, contrast=0.0, saturation=0.0, blur=0.0, stain=0.0,
                stain_shift=0.0, missing_view=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def breast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(SMALL, tmp_path_factory.mktemp("histo") / "phantom", 1)


@pytest.fixture(scope="module")
def slides(breast: Path) -> list[Slide]:
    return slides_of(scan(breast), {})


@pytest.fixture
def album() -> Album:
    return Album((38, 58), "none", True, {})


def stream_of(slides: list[Slide], album: Album, missing_view: float) -> CompositeStream:
    return CompositeStream(slides, MAGNIFICATIONS, album, missing_view, 0, 7)


def test_the_phantom_has_breakhis_names_and_both_classes(breast: Path) -> None:
    images = scan(breast)
    assert len({image.name.accession for image in images}) == 7
    assert {image.name.label for image in images} == {0, 1}
    assert {image.name.magnification for image in images} == set(MAGNIFICATIONS)


def test_the_phantom_is_a_function_of_its_settings(tmp_path: Path) -> None:
    number, label = accessions(SMALL)[2]
    one, two = (list(simulate_accession(SMALL, number, label)) for _ in range(2))
    assert all(np.array_equal(a.pixels, b.pixels) and a.path == b.path for a, b in zip(one, two, strict=True))
    other = list(simulate_accession(dataclasses.replace(SMALL, seed=1), number, label))
    assert not np.array_equal(one[0].pixels, other[0].pixels)


def test_two_producers_write_the_files_of_one(tmp_path: Path, breast: Path) -> None:
    two = write_phantom(SMALL, tmp_path / "two", 2)
    files = [sorted(path.relative_to(root) for path in root.rglob("*.png")) for root in (breast, two)]
    assert files[0] == files[1]
    assert all((breast / file).read_bytes() == (two / file).read_bytes() for file in files[0])


def test_a_killed_phantom_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    whole = write_phantom(SMALL, folder, 1)
    kept = {path: path.read_bytes() for path in whole.rglob("*.png")}
    (folder / "settings.json").rename(folder / "unfinished.json")
    gone = sorted((folder / "truth").glob("*.json"))[:2]
    for record in gone:
        record.unlink()
    next(iter(kept)).unlink()
    write_phantom(SMALL, folder, 1)
    for record in gone:
        assert record.exists()
    rewritten = {path: path.read_bytes() for path in whole.rglob("*.png")}
    assert all(kept[path] == own for path, own in rewritten.items())


def test_other_settings_are_refused(tmp_path: Path) -> None:
    few = dataclasses.replace(SMALL, benign_accessions=2, malignant_accessions=2, sites=(1, 1))
    write_phantom(few, tmp_path / "phantom", 1)
    with pytest.raises(UserError, match="other settings"):
        write_phantom(SMALL, tmp_path / "phantom", 1)
    with pytest.raises(UserError, match="at least 2 of each"):
        write_phantom(dataclasses.replace(few, benign_accessions=1), tmp_path / "none", 1)


def test_fields_are_nested() -> None:
    number, label = accessions(SMALL)[0]
    sites: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for taken in simulate_accession(SMALL, number, label):
        sites.setdefault((str(taken.path.parents[1]), taken.site), []).append(
            (*taken.corner_micrometre, taken.width_micrometre)
        )
    for fields in sites.values():
        for (y, x, width), (inner_y, inner_x, inner) in zip(fields, fields[1:], strict=False):
            assert inner < width <= RATIO * SMALL.field_micrometre
            assert y - 1e-6 <= inner_y and x - 1e-6 <= inner_x and inner_x + inner <= x + width + 1e-6


def test_known_defect_8_every_image_is_judged(slides: list[Slide], breast: Path) -> None:
    """The original's composites used 6584 of 7909 images."""
    composites = all_composites(slides, MAGNIFICATIONS)
    judged = {path for composite in composites for path in composite.paths if path is not None}
    assert judged == {image.path for image in scan(breast)}
    counts = Counter(composite.slide.name for composite in composites)
    assert all(counts[slide.name] == max(map(len, slide.images.values())) for slide in slides)


@pytest.mark.parametrize("magnification", MAGNIFICATIONS)
def test_one_magnification_judges_each_of_its_images_once(slides: list[Slide], magnification: int) -> None:
    own = tuple(m for m in MAGNIFICATIONS if m == magnification)
    composites = all_composites(slides, own)
    paths = [path for composite in composites for path in composite.paths if path is not None]
    assert len(paths) == len(set(paths)) == sum(len(s.images[m]) for s in slides for m in own if m in s.images)


def test_known_defect_5_the_expected_mass_of_the_classes_is_even(slides: list[Slide], album: Album) -> None:
    """The original's sampler made 72 % of a batch benign. 3 standard deviations of 2000 fair draws are 0.034."""
    stream = stream_of(slides, album, 0.15)
    labels = [stream.draw(position)[0].label for position in range(2000)]
    assert abs(np.mean(labels) - 0.5) < 0.034
    within = Counter(stream.draw(position)[0].name for position in range(2000))
    malignant = [slide for slide in slides if slide.label]
    shares = np.array([slide.num_composites for slide in malignant]) / sum(slide.num_composites for slide in malignant)
    found = np.array([within[slide.name] for slide in malignant]) / sum(within[slide.name] for slide in malignant)
    assert np.abs(found - shares).max() < 0.06


def test_a_draw_is_a_function_of_its_position(slides: list[Slide], album: Album) -> None:
    stream = stream_of(slides, album, 0.3)
    backwards = [stream.draw(position) for position in reversed(range(30))][::-1]
    assert backwards == [stream.draw(position) for position in range(30)]
    assert len({tuple(paths) for _, paths, _ in backwards}) > 20


def test_some_views_are_hidden_and_never_all(slides: list[Slide], album: Album) -> None:
    stream = stream_of(slides, album, 0.6)
    shown = [sum(path is not None for path in stream.draw(position)[1]) for position in range(300)]
    assert min(shown) >= 1 and {1, 2, 3} <= set(shown)
    whole = [slide for slide in slides if len(slide.images) == 4]
    assert all(None not in stream_of(whole, album, 0.0).draw(position)[1] for position in range(50))


def test_a_patient_without_one_magnification(slides: list[Slide], album: Album) -> None:
    without = [dataclasses.replace(s, images={m: p for m, p in s.images.items() if m != 100}) for s in slides]
    for position in range(20):
        batch = stream_of(without, album, 0.0)[position]
        assert isinstance(batch, Batch)
        assert batch.present[0].tolist() == [True, False, True, True] and (batch.images[0, 1] == 0).all()
    assert all(composite.paths[1] is None for composite in all_composites(without, MAGNIFICATIONS))


def test_an_unreadable_image_is_named(tmp_path: Path, slides: list[Slide], album: Album) -> None:
    broken = tmp_path / "SOB_B_A-14-1-40-001.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    slide = Slide("SOB_B_A_14-1", "14-1", 0, {40: (broken,)}, {})
    stream = stream_of([slide, next(own for own in slides if own.label)], album, 0.0)
    item = next(found for position in range(20) if isinstance(found := stream[position], UserError))
    assert item.exit_code == BAD_DATA and str(broken) in item.problems[0]
    assert stack([stream_of(slides, album, 0.0)[0], item]) is item


def test_a_bag_holds_all_photographs_of_a_patient(slides: list[Slide], album: Album) -> None:
    several = [slide for slide in slides if sum(own.accession == slide.accession for own in slides) > 1]
    own = [slide for slide in slides if slide.accession == (several or slides)[0].accession]
    [bag] = bag_of(own, MAGNIFICATIONS)
    assert sorted(map(str, bag.paths)) == sorted(str(p) for s in own for some in s.images.values() for p in some)
    assert list(bag.magnification) == sorted(bag.magnification)
    assert bag_of(own[:1], (400,)) == [] or set(bag_of(own[:1], (400,))[0].magnification) == {3}


def test_bags_in_training_are_of_one_patient_and_stack(slides: list[Slide], album: Album) -> None:
    stream = CompositeStream(slides, MAGNIFICATIONS, album, 0.2, 5, 7)
    assert stream.draw(3) == stream.draw(3)
    sizes = set()
    for position in range(40):
        slide, paths, magnification = stream.draw(position)
        assert {s.accession for s in slides for some in s.images.values() for p in some if p in paths} == {
            slide.accession
        }
        assert len(set(paths)) == len(paths) == len(magnification) <= 5
        assert all(f"{MAGNIFICATIONS[m]}X" in str(p) for p, m in zip(paths, magnification, strict=True))
        sizes.add(len(paths))
    small = stack([CompositeStream(slides, MAGNIFICATIONS, album, 0.2, size, 7)[3] for size in (2, 5)])
    assert isinstance(small, Batch) and small.images.shape[:2] == small.present.shape == (2, 5)
    assert small.present[0].tolist() == [True, True, False, False, False] and (small.images[0, 2:] == 0).all()


def test_sixteen_bits_are_scaled_and_what_shines_through_is_white(tmp_path: Path) -> None:
    """Pillow's own conversion makes nearly all of 16 bits white, and shows hidden colours."""
    ramp = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)
    Pictures.fromarray(ramp).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_picture(tmp_path / "deep.png")[..., 1], ramp / 257, atol=0.51)
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:2, :, 3] = 255
    Pictures.fromarray(clear).save(tmp_path / "clear.png")
    found = read_picture(tmp_path / "clear.png")
    assert (found[:2] == 0).all() and (found[2:] == 255).all()


def test_images_are_brought_to_one_size(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Pictures.fromarray(np.full((46, 70, 4), 130, np.uint8)).save(path)
    assert Album((20, 30), "none", False, {}).read(path).shape == (20, 30, 3)


def batch_of(slides: list[Slide], album: Album) -> Batch:
    items = [stream_of(slides, album, 0.3)[position] for position in range(6)]
    batch = stack(items)
    assert isinstance(batch, Batch)
    return batch


def test_without_augmentation_training_sees_what_is_judged(slides: list[Slide], album: Album) -> None:
    batch = batch_of(slides, album)
    torch.testing.assert_close(augmented(batch, QUIET, "none", 0), prepared(batch))
    assert (prepared(batch)[~batch.present] == 0).all()


def test_augmentation_follows_the_position_not_the_batch(slides: list[Slide], album: Album) -> None:
    batch = batch_of(slides, album)
    settings = PHANTOM.augment
    whole = augmented(batch, settings, "macenko", 3)
    last = augmented(batch.mapped(lambda part: part[4:]), settings, "macenko", 3)
    torch.testing.assert_close(whole[4:], last)
    assert not torch.allclose(whole, augmented(batch, settings, "macenko", 4))


def test_turning_by_nothing_and_by_half_a_turn() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 12, 16)
    draws = torch.zeros(2, 11)
    assert torch.equal(turned(images, draws), images)
    draws[:, 2] = np.pi
    torch.testing.assert_close(turned(images, draws), images.flip(2, 3), atol=1e-4, rtol=1e-3)
    draws[:, 2], draws[:, 0] = 1e-9, 1.0
    torch.testing.assert_close(turned(images, draws), images.flip(2), atol=1e-4, rtol=1e-3)
    draws[:, 2], draws[0, 1] = 0.0, 1.0
    assert torch.equal(turned(images, draws), torch.stack([images[0].flip(1, 2), images[1].flip(1)]))


def test_blur_keeps_the_mean_and_leaves_others_alone() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 20, 24)
    found = blurred(images, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(found[0], images[0]) and torch.equal(found[2], images[2])
    assert found[1].std() < 0.6 * images[1].std()
    assert found[1].mean() == pytest.approx(images[1].mean().item(), abs=0.01)


def test_a_draw_names_all_of_its_numbers() -> None:
    drawn = draw(0, 5, 4, PHANTOM.augment)
    assert drawn.shape == (4, 11) and np.array_equal(drawn, draw(0, 5, 4, PHANTOM.augment))


def test_known_defect_4_class_weights_and_smoothing_both_act() -> None:
    logits, target = torch.tensor([0.3, 0.3]), torch.tensor([0.0, 1.0])
    loss = PHANTOM.loss
    plain = composite_loss(logits, target, loss)
    torch.testing.assert_close(
        plain, torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    )
    weighted = composite_loss(logits, target, dataclasses.replace(loss, focal_alpha=0.75))
    torch.testing.assert_close(weighted / plain, torch.tensor([0.5, 1.5]))
    smooth = composite_loss(logits, target, dataclasses.replace(loss, focal_alpha=0.75, label_smoothing=0.1))
    assert (smooth != weighted).all()
    assert smooth[1] / smooth[0] > 1.5


def test_focal_loss_of_the_paper() -> None:
    """alpha_t (1 - p_t)^gamma CE (Lin et al. 2017, equation 5), times 2."""
    logits, target = torch.tensor([-1.0, 0.2, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    loss = dataclasses.replace(PHANTOM.loss, focal_gamma=3.0, focal_alpha=0.25)
    p = torch.sigmoid(logits)
    p_t, alpha_t = torch.where(target > 0, p, 1 - p), torch.where(target > 0, 0.25, 0.75)
    torch.testing.assert_close(composite_loss(logits, target, loss), -2 * alpha_t * (1 - p_t) ** 3 * p_t.log())


def test_mixing_takes_what_both_have(slides: list[Slide], album: Album) -> None:
    batch = batch_of(slides, album)
    images = prepared(batch)
    found = mixed(images, batch.magnification, batch.present, batch.label, 0.4, 0, 3, 0)
    assert (found.present <= batch.present).all() and found.present.any(1).all()
    assert ((found.target >= 0) & (found.target <= 1)).all()
    again = mixed(images, batch.magnification, batch.present, batch.label, 0.4, 0, 3, 0)
    assert torch.equal(found.images, again.images) and torch.equal(found.target, again.target)
    same = mixed(images, batch.magnification, batch.present, batch.label, 0.0, 0, 3, 0)
    assert same.images is images and torch.equal(same.target, batch.label.float())


def test_photographs_of_two_magnifications_are_not_mixed() -> None:
    images, magnification = torch.rand(2, 3, 3, 4, 4), torch.tensor([[0, 1, 2], [0, 2, 2]])
    present, label = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 1])
    mixes = [mixed(images, magnification, present, label, 0.4, 0, step, 0) for step in range(8)]
    swapped = [found for found in mixes if not torch.equal(found.present, present)]
    assert swapped and all(found.present.tolist() == [[True, False, True]] * 2 for found in swapped)


def test_slots_hold_their_images(slides: list[Slide], album: Album) -> None:
    batch = batch_of(slides, album)
    values = torch.arange(int(batch.present.sum())).float()[:, None, None, None].expand(-1, 3, 2, 2)
    slots = into_slots(values, batch.present)
    assert torch.equal(slots[batch.present], values) and (slots[~batch.present] == 0).all()


def test_an_image_name_of_the_phantom_is_beyond_breakhis(breast: Path) -> None:
    names = [image_name(path.name) for path in breast.rglob("*.png")]
    assert all(name is not None and name.number > 50000 for name in names)
