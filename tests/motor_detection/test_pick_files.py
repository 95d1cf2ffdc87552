"""Pick files: every format comes back to the voxel, its columns are fixed, and bad scores or positions are refused."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import BAD_DATA, WRONG_CALL, UserError
from motor_detection.copick_files import read_copick_json, write_copick_json
from motor_detection.dynamo_files import read_dynamo_rows, read_dynamo_table, write_dynamo_table
from motor_detection.pick_files import (
    TomogramPicks,
    VolumeGrid,
    grids_of,
    read_picks_csv,
    read_submission_csv,
    write_picks_csv,
    write_submission_csv,
)
from motor_detection.star_files import read_relion_star, read_star, write_relion_star

SHAPE = (300, 960, 928)  # z, y, x: no two sides equal, so that swapped axes show
SPACING = (13.1, 15.6, 6.5)  # angstrom; not cubic
PIXELS = {"tomo_a": 1.35, "tomo_b": 3.275, "empty": 2.0}  # tilt-series pixel in angstrom

Write = Callable[[Path, list[TomogramPicks]], object]
Read = Callable[[Path, dict[str, VolumeGrid]], list[TomogramPicks]]


def copick_write(path: Path, picks: list[TomogramPicks]) -> object:
    return write_copick_json(path, picks, "motor", "plainscope", "0")


FORMATS: dict[str, tuple[Write, Read]] = {
    "csv": (write_picks_csv, lambda path, grids: read_picks_csv(path)),
    "relion4": (
        lambda path, picks: write_relion_star(path, picks, "relion4", PIXELS),
        lambda path, grids: read_relion_star(path, grids, None, None),
    ),
    "relion5": (
        lambda path, picks: write_relion_star(path, picks, "relion5", {}),
        lambda path, grids: read_relion_star(path, grids, None, None),
    ),
    "dynamo": (write_dynamo_table, read_dynamo_table),
    "copick": (copick_write, lambda path, grids: read_copick_json(path, grids, "motor", "plainscope", "0")),
}


def tomogram(tomo_id: str, points: list[list[float]], scores: list[float]) -> TomogramPicks:
    table = np.array(points, dtype=np.float64).reshape(-1, 3)
    return TomogramPicks(tomo_id, SHAPE, SPACING, table, np.array(scores, dtype=np.float64))


def three_tomograms() -> list[TomogramPicks]:
    """A pick at voxel 0, one at the last voxel, a tie of scores, a tomogram without picks in the middle."""
    first = tomogram("tomo_b", [[10.25, 20.5, 30.75], [0, 0, 0], [299, 959, 927]], [1.0, 0.5, 0.5])
    second = tomogram("tomo_a", [[1.5, 2.0, 3.0]], [0.0])
    wide = (801, 1911, 1847)  # odd sizes: the centre lies between voxels
    return [first, tomogram("empty", [], []), dataclasses.replace(second, shape=wide, spacing_angstrom=(19.7, 6.5, 7))]


def assert_same(found: list[TomogramPicks], expected: list[TomogramPicks], tolerance: float) -> None:
    assert [picks.tomo_id for picks in found] == [picks.tomo_id for picks in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.spacing_angstrom) == (other.shape, other.spacing_angstrom)
        assert one.points.shape == other.points.shape
        assert np.abs(one.points - other.points).max(initial=0) <= tolerance
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("name", FORMATS)
def test_positions_and_scores_come_back(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    picks = three_tomograms()
    write(tmp_path / "picks.tbl", picks)
    assert_same(read(tmp_path / "picks.tbl", grids_of(picks)), picks, 0 if name == "csv" else 1e-9)


@pytest.mark.parametrize("name", FORMATS)
def test_a_thousand_random_picks_come_back(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    picks = []
    for tomo_id in ("tomo_a", "tomo_b"):
        low, high = sorted(random.integers(100, 2000, 2).tolist())
        shape = (low, high + 1, high + 7)
        points = random.uniform(-0.5, np.array(shape) - 0.5, (500, 3))
        scores = np.sort(random.uniform(0, 1, 500))[::-1].copy()
        z, y, x = random.uniform(4, 20, 3).tolist()
        picks.append(TomogramPicks(tomo_id, shape, (z, y, x), points, scores))
    write, read = FORMATS[name]
    write(tmp_path / "picks", picks)
    assert_same(read(tmp_path / "picks", grids_of(picks)), picks, 0 if name == "csv" else 1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_no_tomograms_and_no_picks_are_legal(name: str, tmp_path: Path) -> None:
    write, read = FORMATS[name]
    for picks in ([], [tomogram("empty", [], [])]):
        write(tmp_path / "picks", picks)
        assert_same(read(tmp_path / "picks", grids_of(picks)), picks, 0)


def small() -> list[TomogramPicks]:
    """A 4 x 6 x 8 volume of 10 x 20 x 40 angstrom voxels, one pick at z, y, x = 1, 2.5, 0, one tomogram without."""
    point, score = np.array([[1, 2.5, 0]]), np.array([0.75])
    return [
        TomogramPicks("tomo_a", (4, 6, 8), (10, 20, 40), point, score),
        TomogramPicks("empty", (4, 6, 8), (10, 20, 40), np.empty((0, 3)), np.empty(0)),
    ]


def test_golden_picks_csv(tmp_path: Path) -> None:
    write_picks_csv(tmp_path / "picks.csv", small())
    assert (tmp_path / "picks.csv").read_text() == (
        "tomo_id,z,y,x,z_angstrom,y_angstrom,x_angstrom,score,z_shape,y_shape,x_shape,"
        "z_spacing_angstrom,y_spacing_angstrom,x_spacing_angstrom\n"
        "tomo_a,1.0,2.5,0.0,10.0,50.0,0.0,0.75,4,6,8,10.0,20.0,40.0\n"
        "empty,,,,,,,,4,6,8,10.0,20.0,40.0\n"
    )


def test_golden_submission_takes_the_best_pick_at_the_threshold(tmp_path: Path) -> None:
    picks = [tomogram("sure", [[0, 5, 6], [7, 8, 9]], [0.9, 0.8]), tomogram("equal", [[1, 2, 3]], [0.5])]
    picks += [tomogram("below", [[1, 2, 3]], [0.4999]), tomogram("empty", [], [])]
    write_submission_csv(tmp_path / "submission.csv", picks, 0.5)
    assert (tmp_path / "submission.csv").read_text() == (
        "tomo_id,Motor axis 0,Motor axis 1,Motor axis 2\n"
        "sure,0.0,5.0,6.0\nequal,1.0,2.0,3.0\nbelow,-1,-1,-1\nempty,-1,-1,-1\n"
    )
    found = read_submission_csv(tmp_path / "submission.csv")
    assert [name for name, position in found.items() if position is None] == ["below", "empty"]
    sure = found["sure"]
    assert sure is not None and sure.tolist() == [0, 5, 6]  # 0 is a position, not "none"


def test_golden_relion4_star(tmp_path: Path) -> None:
    """Bin 4 along x, 2 along y, 1 along z of a 10 angstrom pixel: x = 0 * 4, y = 2.5 * 2, z = 1 * 1."""
    write_relion_star(tmp_path / "particles.star", small(), "relion4", {"tomo_a": 10, "empty": 10})
    assert (tmp_path / "particles.star").read_text() == (
        "\ndata_particles\n\nloop_\n_rlnTomoName #1\n_rlnCoordinateX #2\n_rlnCoordinateY #3\n_rlnCoordinateZ #4\n"
        "_rlnTomoTiltSeriesPixelSize #5\n_rlnAutopickFigureOfMerit #6\ntomo_a\t0.0\t5.0\t1.0\t10.0\t0.75\n\n"
    )


def test_golden_relion5_star(tmp_path: Path) -> None:
    """x = (0 - 8/2) * 40, y = (2.5 - 6/2) * 20, z = (1 - 4/2) * 10 angstrom from the centre."""
    write_relion_star(tmp_path / "particles.star", small(), "relion5", {})
    assert (tmp_path / "particles.star").read_text() == (
        "\ndata_particles\n\nloop_\n_rlnTomoName #1\n_rlnCenteredCoordinateXAngst #2\n"
        "_rlnCenteredCoordinateYAngst #3\n_rlnCenteredCoordinateZAngst #4\n_rlnAutopickFigureOfMerit #5\n"
        "tomo_a\t-160.0\t-10.0\t-10.0\t0.75\n\n"
    )


def test_golden_dynamo_table_counts_from_one(tmp_path: Path) -> None:
    write_dynamo_table(tmp_path / "picks.tbl", small())
    row = "1 1 0 0 0 0 0 0 0 0.75 0 0 0 0 0 0 0 0 0 1 0 1 0 1.0 3.5 2.0\n"
    assert (tmp_path / "picks.tbl").read_text() == row
    assert (tmp_path / "picks.doc").read_text() == "1\ttomo_a\n2\tempty\n"


def test_golden_copick_json(tmp_path: Path) -> None:
    paths = write_copick_json(tmp_path, small(), "motor", "plainscope", "0")
    assert paths[0] == tmp_path / "ExperimentRuns/tomo_a/Picks/plainscope_0_motor.json"
    identity = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    location = {"x": 0.0, "y": 50.0, "z": 10.0}
    expected = {
        "pickable_object_name": "motor",
        "user_id": "plainscope",
        "session_id": "0",
        "run_name": "tomo_a",
        "voxel_spacing": None,
        "unit": "angstrom",
        "points": [{"location": location, "transformation_": identity, "instance_id": 0, "score": 0.75}],
        "trust_orientation": False,
    }
    assert json.loads(paths[0].read_text()) == expected
    assert json.loads(paths[1].read_text())["points"] == []
    cubic = [dataclasses.replace(small()[0], spacing_angstrom=(16.0, 16.0, 16.0))]
    [path] = write_copick_json(tmp_path, cubic, "motor", "plainscope", "0")
    assert json.loads(path.read_text())["voxel_spacing"] == 16.0


@pytest.mark.parametrize("score", [float("nan"), -0.001, 1.001, float("inf")])
def test_scores_outside_zero_to_one_are_refused(score: float) -> None:
    with pytest.raises(UserError, match=r"'tomo_a': expected every score in \[0, 1\]") as refused:
        tomogram("tomo_a", [[1, 2, 3]], [score])
    assert refused.value.exit_code == BAD_DATA


@pytest.mark.parametrize(
    ("points", "scores", "message"),
    [
        ([[1, 2, 3], [4, 5, 6]], [0.1, 0.2], "descending"),
        ([[float("nan"), 2, 3]], [0.5], "lies outside"),
        ([[959, 299, 927]], [0.5], "is the axis order or spacing wrong"),
        ([[-0.6, 0, 0]], [0.5], "lies outside"),
    ],
)
def test_bad_picks_are_refused(points: list[list[float]], scores: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tomogram("tomo_a", points, scores)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "_a", "a,b", "a'b", "data_1", "Loop_x", "a\udcff"])
def test_names_no_format_could_hold_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="name must start with"):
        tomogram(name, [], [])


def test_wrong_calls_exit_with_two(tmp_path: Path) -> None:
    picks = three_tomograms()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("given twice: tomo_a", lambda: write_picks_csv(tmp_path / "a", [small()[0], small()[0]])),
        ("threshold", lambda: write_submission_csv(tmp_path / "a", picks, float("nan"))),
        ("pixel size of 'tomo_b'", lambda: write_relion_star(tmp_path / "a", picks, "relion4", {"tomo_a": 1.0})),
        ("style: expected", lambda: write_relion_star(tmp_path / "a", picks, "relion3", {})),  # type: ignore[arg-type]
        ("object_name: copick", lambda: write_copick_json(tmp_path / "a", picks, "flagellar_motor", "me", "0")),
    ]
    for message, call in calls:
        with pytest.raises(UserError, match=message) as refused:
            call()
        assert refused.value.exit_code == WRONG_CALL
    assert not list(tmp_path.iterdir())


def test_a_damaged_csv_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "picks.csv"
    write_picks_csv(path, small())
    text = path.read_text()
    for old, new, message in [
        ("0.75", "nan", r"picks\.csv:2: expected a finite number"),
        ("0.75", "1.5", r"picks\.csv: 'tomo_a': expected every score"),
        ("2.5", "2.6", r"picks\.csv:2: position in voxels and in angstrom differ"),
        ("2.5", "", r"picks\.csv:2: expected a number, got ''"),
        ("score", "confidence", "missing columns"),
        ("0.75,4", "0.75,4.5", "whole voxels"),
        (",40.0\nempty", "\nempty", r"picks\.csv:2: expected 14 cells, got 13"),
    ]:
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            read_picks_csv(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_picks_csv(tmp_path / "absent.csv")


@pytest.mark.parametrize("name", FORMATS)
def test_a_failed_write_leaves_the_old_file_and_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = FORMATS[name]
    picks = three_tomograms()
    write(tmp_path / "picks", picks)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    changed = [tomogram("tomo_a", [[4, 5, 6]], [0.25]), tomogram("tomo_b", [], [])]
    with pytest.raises(UserError, match="No space left") as failed:
        write(tmp_path / "picks", changed)
    assert failed.value.exit_code == BAD_DATA
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert_same(read(tmp_path / "picks", grids_of(picks)), picks, 1e-9)


def test_star_reader_knows_quotes_comments_and_pairs(tmp_path: Path) -> None:
    path = tmp_path / "some.star"
    path.write_text(
        "# version 30001\n\ndata_general\n_rlnA 'two words'\n_rlnB 7\n\ndata_\nloop_\n_rlnC #1\n_rlnD #2\n"
        '5\' "x y"\n\n 1 2 \ndata_empty\nloop_\n_rlnE\n'
    )
    tables = read_star(path)
    assert tables["general"].to_dict("records") == [{"rlnA": "two words", "rlnB": "7"}]
    assert tables[""].to_numpy().tolist() == [["5'", "x y"], ["1", "2"]]
    assert list(tables["empty"].columns) == ["rlnE"] and len(tables["empty"]) == 0
    for text, message in [
        ("data_\nloop_\n_rlnC\n1 2\n", r"some\.star:4: expected 1 values, got 2"),
        ("data_\nloop_\n_rlnC\n1\n_rlnD\n", r"some\.star:5"),
        ("data_\n_rlnC\n", r"some\.star:2: expected a label and its value"),
        ("data_a\ndata_a\n", "second block"),
        ("just text\n", "expected a data_ block"),
        ("", "no data_ block"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_star(path)


def test_relion_files_of_others(tmp_path: Path) -> None:
    """Pixel size from the optics group, best pick first, no score, refined shifts."""
    optics = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnTomoTiltSeriesPixelSize\n1 2.5\n2 5\n\n"
    labels = "data_particles\nloop_\n_rlnTomoName\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n_rlnOpticsGroup\n"
    path = tmp_path / "particles.star"
    grids = {"t1": VolumeGrid((40, 50, 60), (10.0, 10.0, 10.0)), "t2": VolumeGrid((40, 50, 60), (10.0, 10.0, 10.0))}
    path.write_text(f"{optics}{labels}_rlnAutopickFigureOfMerit\nt2 8 16 24 2 .1\nt1 8 16 24 1 .2\nt1 4 4 4 1 .9\n")
    first, second = read_relion_star(path, grids, None, None)
    assert first.points.tolist() == [[1, 1, 1], [6, 4, 2]] and first.scores.tolist() == [0.9, 0.2]
    assert second.points.tolist() == [[12, 8, 4]]
    in_voxels = read_relion_star(path, grids, {"t1": 10.0, "t2": 10.0}, None)
    assert in_voxels[1].points.tolist() == [[24, 16, 8]]
    path.write_text(f"{optics}{labels}t1 8 16 24 1\n")
    with pytest.raises(UserError, match="no column rlnAutopickFigureOfMerit"):
        read_relion_star(path, grids, None, None)
    assert read_relion_star(path, grids, None, 1.0)[0].scores.tolist() == [1.0]
    path.write_text(f"{optics}{labels}t3 8 16 24 1\n")
    with pytest.raises(UserError, match="'t3' is not among the 2 known"):
        read_relion_star(path, grids, None, 1.0)
    path.write_text(f"{optics}{labels}_rlnOriginZAngst\nt1 8 16 24 1 0.5\n")
    with pytest.raises(UserError, match="refined shifts"):
        read_relion_star(path, grids, None, 1.0)


def test_shifts_of_dynamo_and_copick_are_added(tmp_path: Path) -> None:
    picks = small()[:1]
    write_dynamo_table(tmp_path / "picks.tbl", picks)
    text = (tmp_path / "picks.tbl").read_text()
    (tmp_path / "picks.tbl").write_text(text.replace("1 1 0 0 0 0", "1 1 0 0.5 0.25 -1", 1))
    assert read_dynamo_table(tmp_path / "picks.tbl", grids_of(picks))[0].points.tolist() == [[0, 2.75, 0.5]]
    (tmp_path / "picks.doc").write_text("7\ttomo_a\n")
    with pytest.raises(UserError, match=r"tomogram numbers \[1\] are missing"):
        read_dynamo_table(tmp_path / "picks.tbl", grids_of(picks))
    [path] = write_copick_json(tmp_path, picks, "motor", "me", "1")
    content = json.loads(path.read_text())
    content["points"][0]["transformation_"][0][3] = 20.0  # x, angstrom
    path.write_text(json.dumps(content))
    assert read_copick_json(tmp_path, grids_of(picks), "motor", "me", "1")[0].points.tolist() == [[1, 2.5, 0.5]]
    content["points"][0]["score"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="score for each point"):
        read_copick_json(tmp_path, grids_of(picks), "motor", "me", "1")


def test_the_starfile_package_reads_the_same(tmp_path: Path) -> None:
    starfile = pytest.importorskip("starfile")
    picks = three_tomograms()
    for style in ("relion4", "relion5"):
        write, _ = FORMATS[style]
        write(tmp_path / "particles.star", picks)
        theirs = starfile.read(tmp_path / "particles.star", always_dict=True)["particles"]
        ours = read_star(tmp_path / "particles.star")["particles"]
        assert list(theirs.columns) == list(ours.columns)
        assert theirs["rlnTomoName"].tolist() == ours["rlnTomoName"].tolist()
        np.testing.assert_array_equal(theirs.iloc[:, 1:].to_numpy(float), ours.iloc[:, 1:].to_numpy(float))
    starfile.write({"particles": theirs}, tmp_path / "theirs.star")
    assert_same(read_relion_star(tmp_path / "theirs.star", grids_of(picks), None, None), picks, 1e-3)


def test_a_real_warp_star(real_data: Path) -> None:
    path = real_data / "motor/formats/cryocat_warp2_particles_matching.star"
    tables = read_star(path)
    assert list(tables) == ["general", "optics", "particles"]
    assert tables["general"]["rlnTomoSubTomosAre2DStacks"].tolist() == ["1"]
    assert tables["optics"]["rlnTomoTiltSeriesPixelSize"].astype(float).tolist() == [0.7894] * 5
    assert tables["particles"].shape == (1218, 15)
    assert tables["particles"].loc[1217, "rlnCoordinateY"] == "1066.511"
    names = tables["particles"]["rlnTomoName"].unique().tolist()
    grids = {name: VolumeGrid((198, 1185, 869), (4.0, 4.0, 4.0)) for name in names}  # 1000 x 6000 x 4400 of 0.7894
    picks = read_relion_star(path, grids, dict.fromkeys(names, 4.0), 1.0)  # Warp counts in its export pixel
    assert sum(len(tomogram.scores) for tomogram in picks) == 1218
    assert picks[0].points[0].tolist() == [75.828, 397.132, 354.242]
    tomograms = read_star(path.with_name("cryocat_warp2_matching_tomograms.star"))
    assert list(tomograms["global"]["rlnTomoName"]) == names and len(tomograms["TS_17.tomostar"]) == 41


def test_a_real_dynamo_table(real_data: Path, tmp_path: Path) -> None:
    rows = read_dynamo_rows(real_data / "motor/formats/cryocat_b4_motl_CR_tm_topbott_clean600_1_dynamo.tbl")
    assert rows.shape == (1343, 26)
    assert rows[0, 23:26].tolist() == [507, 548, 167] and rows[0, 9] == 0.1593
    copy = tmp_path / "real.tbl"
    copy.write_text((real_data / "motor/formats/cryocat_b4_motl_CR_tm_topbott_clean600_1_dynamo.tbl").read_text())
    numbers = sorted({int(number) for number in rows[:, 19]})
    copy.with_suffix(".doc").write_text("".join(f"{number}\ttomo_{number}\n" for number in numbers))
    grids = {f"tomo_{number}": VolumeGrid((500, 1100, 1200), (8.0, 8.0, 8.0)) for number in numbers}
    picks = read_dynamo_table(copy, grids)
    assert sum(len(tomogram.scores) for tomogram in picks) == 1343
    best = rows[rows[:, 19] == 2][np.argmax(rows[rows[:, 19] == 2][:, 9])]
    np.testing.assert_allclose(picks[numbers.index(2)].points[0], (best[23:26] + best[3:6] - 1)[::-1])


def test_the_competition_sample_submission(real_data: Path) -> None:
    found = read_submission_csv(real_data / "motor/byu_labels/sample_submission.csv")
    assert list(found) == ["tomo_003acc", "tomo_00e047", "tomo_01a877"]
    assert all(position is not None and position.tolist() == [100, 100, 100] for position in found.values())
