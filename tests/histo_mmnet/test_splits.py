"""Who is tested when: no patient on both sides, order has no say, the official trials and their leaks."""

import random
from pathlib import Path

import pytest

from common.errors import BAD_DATA, WRONG_CALL, UserError
from histo_mmnet.names import ImageName, image_name
from histo_mmnet.scan import published_counts
from histo_mmnet.splits import (
    Trial,
    fold_trials,
    folds,
    read_official,
    read_split,
    shared_units,
    write_split,
)

LEAKS = [(8, 1145, 2904), (6, 674, 2403), (7, 697, 2577), (7, 836, 2698), (6, 999, 3083)]  # of the official trials


def published_names() -> list[ImageName]:
    """A name for every published image but those of the slide under two labels; sequence numbers are made up."""
    names = []
    for slide, counts in published_counts().items():
        case = slide.replace("_14-", "-14-").replace("_15-", "-15-")
        for magnification, count in zip((40, 100, 200, 400), counts, strict=True):
            names += [image_name(f"{case}-{magnification}-{k:03d}.png") for k in range(count)]
    return [name for name in names if name is not None and name.accession != "14-13412"]


NAMES = published_names()


def test_accession_folds_share_no_patient_and_test_every_image_once() -> None:
    trials = fold_trials(NAMES, "accession", 5, 42)
    assert sorted(name for trial in trials for name in trial.of("test")) == sorted(NAMES)
    for trial in trials:
        assert not shared_units(trial, "accession")
        assert {name.label for role in ("train", "val", "test") for name in trial.of(role)} == {0, 1}  # type: ignore[arg-type]
        roles = [{name.accession for name in trial.of(role)} for role in ("train", "val", "test")]  # type: ignore[arg-type]
        assert not roles[0] & roles[1] and not roles[1] & roles[2]


def test_accession_folds_are_even() -> None:
    for trial in fold_trials(NAMES, "accession", 5, 42):
        tested = trial.of("test")
        assert 1200 < len(tested) < 1900
        assert len({name.accession for name in tested if name.label == 0}) >= 2
        assert len({name.accession for name in tested if name.label == 1}) >= 8
        assert len({name.subtype for name in tested}) >= 5


def test_slide_folds_leak_patients() -> None:
    """The original's; on average 27 % of the test images have a patient on the other side."""
    trials = fold_trials(NAMES, "slide", 5, 42)
    assert all(not shared_units(trial, "slide") for trial in trials)
    leaked = sum(len(own) for trial in trials for own in shared_units(trial, "accession").values())
    assert 0.1 < leaked / len(NAMES) < 0.5


def test_known_defect_7_order_and_hash_have_no_say() -> None:
    shuffled = NAMES.copy()
    random.Random(0).shuffle(shuffled)
    assert folds(shuffled, "accession", 5, 42) == folds(NAMES, "accession", 5, 42)
    assert folds(NAMES, "accession", 5, 43) != folds(NAMES, "accession", 5, 42)


def test_fewer_patients_than_folds() -> None:
    benign = sorted({name.accession for name in NAMES if name.label == 0})[:3]
    few = [name for name in NAMES if name.label == 1 or name.accession in benign]
    with pytest.raises(UserError, match="5 folds need 5 benign accessions, the data has 3") as caught:
        folds(few, "accession", 5, 42)
    assert caught.value.exit_code == WRONG_CALL
    assert len(set(folds(few, "accession", 3, 42).values())) == 3


def test_a_split_is_read_as_it_was_written(tmp_path: Path) -> None:
    trials = fold_trials(NAMES[::20], "accession", 3, 1)
    write_split(tmp_path / "split.csv", trials)
    read = read_split(tmp_path / "split.csv")
    for role in ("train", "val", "test"):
        assert [trial.of(role) for trial in read] == [trial.of(role) for trial in trials]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "expected the columns trial, role, file"),
        (
            "trial,role,file\n0,train,SOB_B_A-14-1-40-001.png\n0,tset,SOB_B_A-14-2-40-001.png\n",
            ":3: expected a trial's number",
        ),
        ("trial,role,file\n0,train,SOB_B_A-14-1-40-001.png\n0,test,x.png\n", ":3: expected a trial's number"),
        ("trial,role,file\n0,train,SOB_B_A-14-1-40-001.png\n", "images to train and to test on"),
        ("trial,role,file\n" + 2 * "0,train,SOB_B_A-14-1-40-001.png\n", "stands in it 2 times"),
        ("trial,role,file\n", "holds no row"),
    ],
)
def test_a_damaged_split_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_split(tmp_path / "split.csv")
    assert caught.value.exit_code == BAD_DATA


def test_a_damaged_official_list_is_told(tmp_path: Path) -> None:
    (tmp_path / "dsfold1.txt").write_text("SOB_B_A-14-22549AB-100-001.png|100|1|train\nSOB_B_A-14-2-40-001.png|40|1\n")
    with pytest.raises(UserError, match="dsfold1.txt:2: expected FILE.png"):
        read_official(tmp_path)
    with pytest.raises(UserError, match="no dsfold1.txt"):
        read_official(tmp_path / "empty")


def test_the_official_trials_and_their_leaks(real_data: Path) -> None:
    trials = read_official(real_data / "histo" / "official_folds")
    for trial, (accessions, images, tested) in zip(trials, LEAKS, strict=True):
        shared = shared_units(trial, "accession")
        assert (len(shared), sum(map(len, shared.values())), len(trial.of("test"))) == (accessions, images, tested)
        assert not shared_units(trial, "slide")


def test_the_official_lists_hold_the_published_counts(real_data: Path) -> None:
    for trial in read_official(real_data / "histo" / "official_folds"):
        counts = dict.fromkeys(published_counts(), 0)
        for name in trial.names:
            counts[name.slide] += 1
        assert counts == {slide: sum(own) for slide, own in published_counts().items()}


def test_the_official_trials_are_no_partition(real_data: Path) -> None:
    """13 slides are never tested, 21 once, 30 twice, 13 three times, 5 four times."""
    times = dict.fromkeys(published_counts(), 0)
    for trial in read_official(real_data / "histo" / "official_folds"):
        for slide in {name.slide for name in trial.of("test")}:
            times[slide] += 1
    assert [list(times.values()).count(k) for k in range(5)] == [13, 21, 30, 13, 5]


def test_a_restricted_trial_keeps_roles() -> None:
    trial = fold_trials(NAMES, "accession", 5, 42)[0]
    some = set(NAMES[::7])
    small = trial.restricted(some)
    assert isinstance(small, Trial)
    assert small.of("test") == [name for name in trial.of("test") if name in some]
