"""Labels: both tables of the BYU data, their known counts, and every defect reported in words."""

import collections
import csv
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from motor_detection.labels import (
    ORIGINAL_COLUMNS,
    RELABELLED_COLUMNS,
    LabelledTomogram,
    deal_folds,
    match_tomograms,
    read_labels,
)
from tests.motor_detection.small_runs import write_labels

CONTRADICTIONS = ["tomo_2b3cdf", "tomo_62eea8", "tomo_c84b8e", "tomo_e6f7f7"]


def table(path: Path, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def original(path: Path, rows: list[tuple[object, ...]]) -> Path:
    """Rows (tomo_id, z, y, x, number of motors) of tomograms of 30 x 50 x 70 voxels of 13.1 angstrom."""
    return table(path, ORIGINAL_COLUMNS, [(t, z, y, x, 30, 50, 70, 13.1, n) for t, z, y, x, n in rows])


def problems_of(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_labels(path)
    assert caught.value.exit_code == 1
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    return caught.value.problems


def tomogram(tomo_id: str, fold: int) -> LabelledTomogram:
    return LabelledTomogram(tomo_id, (30, 50, 70), 13.1, np.zeros((0, 3)), fold)


def test_original_table(real_data: Path) -> None:
    tomograms, warnings = read_labels(real_data / "motor/byu_labels/train_labels.csv")
    counts = collections.Counter(len(t.motors) for t in tomograms)
    assert (len(tomograms), sum(n * k for n, k in counts.items())) == (648, 451)
    assert counts == {0: 286, 1: 317, 2: 26, 3: 6, 4: 9, 6: 3, 10: 1}
    assert [w.split(": ")[1] for w in warnings] == CONTRADICTIONS
    assert all("'Number of motors' says 2, the rows list 1" in w for w in warnings)
    assert [t.tomo_id for t in tomograms] == sorted(t.tomo_id for t in tomograms)
    by_id = {t.tomo_id: t for t in tomograms}
    assert by_id["tomo_00e047"].motors.tolist() == [[169, 546, 603]]
    assert (by_id["tomo_00e047"].shape, by_id["tomo_00e047"].spacing_angstrom) == ((300, 959, 928), 15.6)
    for positives_only in (False, True):
        folds = collections.Counter(t.fold for t in tomograms if len(t.motors) or not positives_only)
        assert set(folds) == {0, 1, 2, 3} and max(folds.values()) - min(folds.values()) <= 1


def test_relabelled_table(real_data: Path) -> None:
    tomograms, warnings = read_labels(real_data / "motor/byu_labels/RELABELED_DATA.csv")
    assert (len(tomograms), sum(len(t.motors) for t in tomograms), warnings) == (648, 601, [])
    assert collections.Counter(t.fold for t in tomograms) == {0: 152, 1: 151, 2: 150, 3: 150, -1: 45}
    motors = {t.tomo_id: t.motors for t in tomograms}
    np.testing.assert_allclose(motors["tomo_00e047"], [[169, 546, 603]], atol=1e-9)
    assert motors["tomo_00e463"].shape == (10, 3)
    np.testing.assert_allclose(motors["tomo_00e463"][6], [207.03125, 261.24543, 935.71341], atol=1e-4)  # not truncated


def test_writing_the_relabelled_table_round_trips(real_data: Path, tmp_path: Path) -> None:
    for name in ("train_labels.csv", "RELABELED_DATA.csv"):
        tomograms, _ = read_labels(real_data / "motor/byu_labels" / name)
        write_labels(tmp_path / name, tomograms)
        again, warnings = read_labels(tmp_path / name)
        assert not warnings and len(again) == len(tomograms)
        for a, b in zip(tomograms, again, strict=True):
            assert (a.tomo_id, a.shape, a.spacing_angstrom, a.fold) == (b.tomo_id, b.shape, b.spacing_angstrom, b.fold)
            np.testing.assert_allclose(b.motors, a.motors, rtol=0, atol=1e-9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["RELABELED_DATA.csv", "train_labels.csv"]


def test_zero_is_a_coordinate_and_axes_are_z_y_x(tmp_path: Path) -> None:
    tomograms, warnings = read_labels(original(tmp_path / "a.csv", [("b", 0, 49, 69.25, 1), ("a", -1, -1, -1, 0)]))
    assert [t.tomo_id for t in tomograms] == ["a", "b"] and not warnings
    assert tomograms[0].motors.shape == (0, 3) and tomograms[1].motors.tolist() == [[0, 49, 69.25]]
    rows = [("a", 30, 50, 70, 13.1, "[(0.0, 0.5, 0.1)]", 2)]
    (found,), _ = read_labels(table(tmp_path / "b.csv", RELABELLED_COLUMNS, rows))
    np.testing.assert_allclose(found.motors, [[0, 25, 7]])
    assert (found.fold, found.motors.dtype) == (2, np.float64)


def test_folds_depend_on_ids_alone(tmp_path: Path) -> None:
    rows = [(f"tomo_{i}", 1, 2, 3, 1) if i % 3 else (f"tomo_{i}", -1, -1, -1, 0) for i in range(23)]
    forward, backward = (
        {t.tomo_id: t.fold for t in read_labels(original(tmp_path / "a.csv", order))[0]} for order in (rows, rows[::-1])
    )
    assert forward == backward
    known = {"tomo_a": 2, "tomo_b": 0, "tomo_c": 1, "tomo_d": 3}
    assert deal_folds({"tomo_a": True, "tomo_b": False, "tomo_c": False, "tomo_d": True}) == known


def test_contradictions_are_warnings_in_words(tmp_path: Path) -> None:
    rows = [("a", 1, 2, 3, 2), ("a", -1, -1, -1, 1), ("b", 5, 5, 5, 1)]
    tomograms, warnings = read_labels(original(tmp_path / "a.csv", rows))
    assert [len(t.motors) for t in tomograms] == [1, 1]
    assert len(warnings) == 2 and all(": a: " in warning for warning in warnings)
    assert "a row without a motor stands beside 1" in warnings[0]
    assert "says 1 and 2, the rows list 1" in warnings[1]


def test_all_defects_of_the_original_table_are_reported_at_once(tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = [
        ("a", 29.6, 5, 5, 30, 50, 70, 13.1, 1),
        ("b", 5, -0.6, 5, 30, 50, 70, 13.1, 1),
        ("c", "nan", 5, 5, 30, 50, 70, 13.1, 1),
        ("d", 5, 5, -1, 30, 50, 70, 13.1, 1),
        ("e", 5, 5, 5, 30, 50, 70, 0, 1),
        ("f", 5, 5, 5, 30, 50, 70, "", 1),
        ("g", 5, 5, 5, 30.5, 50, 70, -13.1, 1),
        ("h", 5, 5, 5, 30, 50, 70, 13.1, 2),
        ("h", 5, 5, 5.0, 30, 50, 71, 13.2, 2),
        ("i", -1, -1, -1, 30, 50, 70, 13.1, 0),
        ("i", -1, -1, -1, 30, 50, 70, 13.1, 0),
    ]
    problems = problems_of(table(tmp_path / "a.csv", ORIGINAL_COLUMNS, rows))
    expected = (
        ("line 2: a", "[29.6, 5.0, 5.0] lies outside the volume of shape (30, 50, 70): check the axis order"),
        ("line 3: b", "[5.0, -0.6, 5.0] lies outside"),
        ("line 4: c", "'Motor axis 0' is 'nan' (expected a finite number)"),
        ("line 5: d", "are [5.0, 5.0, -1.0]: give all three, or -1 on all three"),
        ("line 6: e", "'Voxel spacing' is 0 angstrom (expected 0.1 to 1000)"),
        ("line 7: f", "'Voxel spacing' is '' (expected a finite number)"),
        ("line 8: g", "'Array shape (axis 0)' is '30.5' (expected a whole number from 1 to 1048576)"),
        ("line 8: g", "'Voxel spacing' is -13.1 angstrom"),
        ("line 10: h", "'Array shape (axis 2)' is 71 (expected 70 as in"),
        ("line 10: h", "'Voxel spacing' is 13.2 (expected 13.1 as in"),
        ("line 9: h", "[5.0, 5.0, 5.0] stands 2 times: keep one"),
        ("line 11: i", "2 rows without a motor (expected at most 1)"),
    )
    for place, words in expected:
        assert any(place in problem and words in problem for problem in problems), (place, words, problems)
    assert len(problems) == len(expected)


def test_all_defects_of_the_relabelled_table_are_reported_at_once(tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = [
        ("a", 30, 50, 70, 13.1, "[(0.5, 0.5, 1.0)]", 0),
        ("b", 30, 50, 70, 13.1, "[(0.5, 0.5)]", 0),
        ("c", 30, 50, 70, 13.1, "[(nan, 0.5, 0.5)]", 0),
        ("d", 30, 50, 70, 13.1, "[(1e999, 0.5, 0.5)]", 0),
        ("e", 30, 50, 70, 13.1, "__import__('os').getcwd()", 0),
        ("f", 30, 50, 70, 13.1, "[(0.5, 0.5, 0.5)", 0),
        ("g", 30, 50, 70, 13.1, "7", 0),
        ("h", 30, 50, 70, 13.1, "[(0.5, 0.5, 0.5), (0.5, 0.5, 0.5)]", 0),
        ("i", 30, 50, 70, 13.1, "[]", 1.5),
        ("j", 30, 50, 70, 13.1, "[]", -2),
        ("k", 30, 50, 70, 13.1, "[]", "none"),
        ("l", 30, 50, 70, 13.1, "[]", 0),
        ("l", 30, 50, 70, 13.1, "[]", 1),
    ]
    problems = problems_of(table(tmp_path / "a.csv", RELABELLED_COLUMNS, rows))
    assert [problem.split(": ")[1] for problem in problems] == [*"abcdefghijkl"]
    assert "[15.0, 25.0, 70.0] lies outside" in problems[0]
    assert all("expected [] or a list of finite fractions (z, y, x)" in problem for problem in problems[1:7])
    assert "stands 2 times" in problems[7]
    assert all("'fold' is" in problem and "expected a" in problem for problem in problems[8:11])
    assert "tomo_id stands already in" in problems[11] and "line 14" in problems[11]


def test_voxels_reach_half_a_voxel_beyond_their_centres(tmp_path: Path) -> None:
    read_labels(original(tmp_path / "a.csv", [("a", -0.5, -0.5, -0.5, 1), ("b", 29.5, 49.5, 69.5, 1)]))
    assert len(problems_of(original(tmp_path / "a.csv", [("a", 0, 49.51, 0, 1), ("b", 0, 0, -0.51, 1)]))) == 2


def test_tables_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert "no such file" in problems_of(path)[0]
    for content, words in (
        (b"", "no rows"),
        (",".join(RELABELLED_COLUMNS).encode(), "no rows"),
        (b"tomo_id,z\na,1\n", "columns tomo_id, z are no label table (expected tomo_id, Motor axis 0,"),
        (b"tomo_id,z\na\n", "line 2: 1 fields (expected 2)"),
        (b"tomo_id,z\n,1\n", "line 2: 'tomo_id' is empty"),
        (b"\xff\xfe\x00", "not a readable CSV table"),
        (b'tomo_id,z\n"a"b,1\n', "not a readable CSV table"),
    ):
        path.write_bytes(content)
        (problem,) = problems_of(path)
        assert words in problem


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    text = ",".join(RELABELLED_COLUMNS) + "\r\n\r\na,30,50,70,13.1,[],-1\r\n\r\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8-sig", newline="")
    (found,), _ = read_labels(tmp_path / "a.csv")
    assert (found.tomo_id, found.fold) == ("a", -1)


def test_volumes_are_found_by_id(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.npy", "c.mrc", "d.REC", "e.map", "z.mrc", "readme.txt", ".hidden.npy"):
        (tmp_path / name).touch()
    tomograms = [tomogram(tomo_id, 0) for tomo_id in "abcde"]
    found, warnings = match_tomograms([*tomograms, tomogram("f", -1)], tmp_path)
    names = {tomo_id: path.name for tomo_id, path in found.items()}
    assert names == {"a": "a", "b": "b.npy", "c": "c.mrc", "d": "d.REC", "e": "e.map"}
    assert len(warnings) == 2
    assert "1 tomograms excluded by fold -1 are absent: f" in warnings[0]
    assert "1 volumes without a label are left out: z" in warnings[1]


def test_missing_and_doubled_volumes_are_reported(tmp_path: Path) -> None:
    for name in ("t0.npy", "t0.mrc", "other.mrc"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        match_tomograms([tomogram(f"t{i}", 0) for i in range(9)], tmp_path)
    missing, doubled = caught.value.problems
    assert caught.value.exit_code == 1 and missing.startswith("data.root: 8 labelled tomograms not in")
    assert "t1, t2, t3, t4, t5, ... (2 volumes are there: other, t0)" in missing
    assert missing.endswith("See motor_detection/README.md#data")
    assert "t0 is in" in doubled and "2 times (t0.mrc, t0.npy): keep one" in doubled


def test_a_root_without_tomograms_is_refused(tmp_path: Path) -> None:
    for root, words, code in ((tmp_path / "absent", "no folder", 2), (tmp_path, "no tomograms in", 1)):
        with pytest.raises(UserError) as caught:
            match_tomograms([tomogram("a", 0)], root)
        (problem,) = caught.value.problems
        assert caught.value.exit_code == code and problem.startswith(f"data.root: {words}")
        assert "expected folders TOMO_ID/" in problem and problem.endswith("See motor_detection/README.md#data")
