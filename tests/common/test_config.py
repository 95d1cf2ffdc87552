"""Config: what is accepted, what is refused and in which words, what has precedence, and that as_yaml repeats it."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from common.config import as_yaml, configure, describe, fingerprint, outside, restore
from common.errors import BAD_DATA, WRONG_CALL, UserError
from motor_detection.config import PRESETS


@dataclasses.dataclass(frozen=True)
class Kinds:
    count: int = 3  # beads, per box
    rate: float = 0.5  # 1/s
    flag: bool = False
    word: str = "a"  # of honour
    folder: Path = Path("x")
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    size: tuple[int, int, int] = (1, 2, 3)  # voxels z, y, x
    ladder: tuple[float, ...] = (1.0, 2.0)
    seed: int | None = None
    start: Path | None = Path("s")
    choice: Literal["x", "y"] | None = None


@dataclasses.dataclass(frozen=True)
class Spellings:
    paths: tuple[str, ...] = ()
    pair: tuple[str, str] = ("a", "b")
    precision: Literal["32", "16-mixed"] = "16-mixed"
    numbers: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Written:
    spellings: Spellings = Spellings()


@dataclasses.dataclass(frozen=True)
class Window:
    low: int = 1
    high: int = 3

    def problems(self) -> Iterator[str]:
        if self.low >= self.high:
            yield f"low: expected less than window.high={self.high}, got {self.low}"


@dataclasses.dataclass(frozen=True)
class Constants:
    kinds: Kinds = Kinds()
    window: Window = Window()

    def problems(self) -> Iterator[str]:
        if self.kinds.count > self.window.high:
            yield f"kinds.count: expected at most window.high={self.window.high}, got {self.kinds.count}"


PRESET = Constants()
REAL_CONSTANTS = [
    (section.name, constant.name)
    for section in dataclasses.fields(PRESETS["kaggle"])
    for constant in dataclasses.fields(getattr(PRESETS["kaggle"], section.name))
]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problems_of(yaml_files: list[Path], changes: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        configure(PRESET, yaml_files, changes)
    assert caught.value.exit_code == WRONG_CALL
    return caught.value.problems


def test_without_changes_the_preset_comes_back() -> None:
    assert configure(PRESET, [], []) == PRESET


def test_words_beat_files_beat_the_preset_and_the_last_of_each_wins(tmp_path: Path) -> None:
    first = written(tmp_path / "first.yaml", "kinds: {count: 1, rate: 1.5, word: first}\nwindow: {low: 0}\n")
    second = written(tmp_path / "second.yaml", "kinds: {rate: 2.5, word: second}\n")
    config = configure(PRESET, [first, second], ["kinds.word=third", "kinds.seed=1", "kinds.seed=2"])
    expected = dataclasses.replace(Kinds(), count=1, rate=2.5, word="third", seed=2)
    assert config == Constants(expected, Window(0, 3))
    assert configure(PRESET, [second, first], []).kinds.word == "first"


def test_the_constants_themselves_never_change(tmp_path: Path) -> None:
    before = as_yaml(PRESET)
    changed = configure(PRESET, [written(tmp_path / "a.yaml", "kinds: {size: [7, 8, 9]}")], ["kinds.count=2"])
    assert as_yaml(PRESET) == before
    assert hash(changed) != hash(PRESET), "tuples stay tuples, so a config can be a key"
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.kinds.count = 5  # type: ignore[misc]


def test_sections_that_share_a_yaml_anchor_stay_apart(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Twins:
        left: Window = Window()
        right: Window = Window()

    file = written(tmp_path / "anchor.yaml", "left: &window {low: 0, high: 9}\nright: *window\n")
    assert configure(Twins(), [file], ["left.high=5"]) == Twins(Window(0, 5), Window(0, 9))


ACCEPTED: list[tuple[str, str, Any]] = [
    ("rate=1e-4", "rate", 1e-4),  # YAML 1.1 reads this as text
    ("rate=1E-4", "rate", 1e-4),
    ("rate=-2", "rate", -2.0),
    ("rate=.5", "rate", 0.5),
    ("rate='0.25'", "rate", 0.25),
    ("count=-7", "count", -7),
    ("flag=true", "flag", True),
    ("flag=yes", "flag", True),
    ("word='no'", "word", "no"),
    ("word=1e-4", "word", "1e-4"),
    ("word=''", "word", ""),
    ("word=a=b", "word", "a=b"),
    ("folder=a/b c.mrc", "folder", Path("a/b c.mrc")),
    ("mode=slow", "mode", "slow"),
    ("level=2", "level", 2),
    ("size=[3,2,1]", "size", (3, 2, 1)),
    ("ladder=[]", "ladder", ()),
    ("ladder=[1, 2e-3]", "ladder", (1.0, 0.002)),
    ("seed=4", "seed", 4),
    ("seed=null", "seed", None),
    ("start=~", "start", None),
    ("start=", "start", None),
    ("choice=y", "choice", "y"),
]


@pytest.mark.parametrize(("change", "name", "value"), ACCEPTED, ids=[change for change, _, _ in ACCEPTED])
def test_accepted(change: str, name: str, value: Any) -> None:
    config = configure(dataclasses.replace(PRESET, window=Window(1, 99)), [], [f"kinds.{change}"])
    found = getattr(config.kinds, name)
    assert (found, type(found)) == (value, type(value))
    if isinstance(value, tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


def test_accepted_in_files_alike(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", "kinds:\n  rate: 1e-4\n  ladder: [1, 2e-3]\n  seed: null\n  folder: /data\n")
    kinds = configure(PRESET, [file], []).kinds
    assert (kinds.rate, kinds.ladder, kinds.seed, kinds.folder) == (1e-4, (1.0, 0.002), None, Path("/data"))


def test_a_whole_section_can_be_one_word() -> None:
    assert configure(PRESET, [], ["window={low: 4, high: 7}"]).window == Window(4, 7)


REFUSED = [
    ("count=2.5", "a whole number, got 2.5"),
    ("count=2.0", "a whole number, got 2.0"),
    ("count=true", "a whole number, got True"),
    ("count='3'", "a whole number, got '3'"),
    ("count=null", "a whole number, got None"),
    ("count.x=1", "a whole number, got {'x': 1}"),
    ("rate=true", "a finite number, got True"),
    ("rate=.inf", "a finite number, got inf"),
    ("rate=nan", "a finite number, got 'nan'"),
    ("rate=fast", "a finite number, got 'fast'"),
    (f"rate=1{'0' * 400}", f"a finite number, got 1{'0' * 400}"),
    ("flag=1", "true or false, got 1"),
    ("flag='true'", "true or false, got 'true'"),
    ("word=no", "text, got False"),
    ("word=3", "text, got 3"),
    ("word=null", "text, got None"),
    ("folder=7", "a path, got 7"),
    ("folder=''", "a path, got ''"),
    ("folder=null", "a path, got None"),
    ("mode=Fast", "one of fast, slow, got 'Fast'"),
    ("level=true", "one of 1, 2, got True"),
    ("level=1.0", "one of 1, 2, got 1.0"),
    ("size=[1,2]", "a list [...] of 3"),
    ("size=[1,2,3,4]", "a list [...] of 3"),
    ("size=[1,2,3.5]", "a list [...] of 3"),
    ("size=[1,2,true]", "a list [...] of 3"),
    ("size=5", "a list [...] of 3"),
    ("size=123", "a list [...] of 3"),
    ("ladder=abc", "a list [...] of a finite number, got 'abc'"),
    ("ladder='12'", "a list [...] of a finite number, got '12'"),
    ("ladder=[1, x]", "a list [...] of a finite number, got [1, 'x']"),
    ("seed=two", "a whole number or null, got 'two'"),
    ("seed=1.5", "a whole number or null, got 1.5"),
    ("start=3", "a path or null, got 3"),
    ("choice=z", "one of x, y or null, got 'z'"),
]


@pytest.mark.parametrize(("change", "complaint"), REFUSED, ids=[change[:20] for change, _ in REFUSED])
def test_refused(change: str, complaint: str) -> None:
    name = re.split("[.=]", change)[0]
    (problem,) = problems_of([], [f"kinds.{change}"])
    assert problem.startswith(f"kinds.{name}: expected {complaint}")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("kinds.cuont=3", "kinds.cuont: no such constant; did you mean kinds.count?"),
        ("kindz.count=3", "kindz: no such constant; did you mean kinds?"),
        ("count=3", "count: no such constant; did you mean kinds.count?"),
        ("laddr=[]", "laddr: no such constant; did you mean kinds.ladder?"),
        ("window.zebra=3", "window.zebra: no such constant; window holds low, high"),
        ("zebra=3", "zebra: no such constant; there holds kinds, window"),
        ("window=3", "window: is a section of low, high; it cannot be 3"),
        ("window=", "window: is a section of low, high; it cannot be None"),
        ("window", "window: expected section.name=value (flags begin with --)"),
        ("=3", "=3: expected section.name=value (flags begin with --)"),
        ("kinds.word=[1", "kinds.word: cannot read the value '[1'; quote it if it is text"),
    ],
)
def test_wrong_names_and_words(change: str, problem: str) -> None:
    assert problems_of([], [change]) == [problem]


def test_a_forgotten_section_is_offered_for_every_constant_of_the_real_config() -> None:
    """Also where another section holds a similar name (patch_size, patches), or a section's own name is similar."""
    names = sorted({name for _, name in REAL_CONSTANTS})
    with pytest.raises(UserError) as caught:
        configure(PRESETS["kaggle"], [], [f"{name}=1" for name in names])
    offers = {name: {f"; did you mean {s}.{name}?" for s, own in REAL_CONSTANTS if own == name} for name in names}
    offered = {problem.split(": ")[0]: problem.partition("no such constant")[2] for problem in caught.value.problems}
    assert [f"{name}{offered[name]}" for name in names if offered[name] not in offers[name]] == []


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", "kinds: {rate: fast, cuont: 3}\nwindow: {low: 9}\n")
    problems = problems_of([file], ["kinds.flag=2", "size", "kinds.size=[1]", "kinds.word=["])
    named = {re.split("[: =]", problem)[0] for problem in problems}
    assert named == {"kinds.rate", "kinds.cuont", "kinds.flag", "size", "kinds.size", "kinds.word"}
    assert len(problems) == 6, "cross-checks wait until all values are sound"


def test_cross_checks_of_sections_and_of_the_whole_are_all_asked() -> None:
    assert problems_of([], ["window.low=9", "kinds.count=4"]) == [
        "window.low: expected less than window.high=3, got 9",
        "kinds.count: expected at most window.high=3, got 4",
    ]


def test_cross_checks_judge_final_values_only(tmp_path: Path) -> None:
    assert configure(PRESET, [], ["window.low=5", "window.high=6"]).window == Window(5, 6)
    assert configure(PRESET, [], ["window.high=0", "window.high=6"]).window == Window(1, 6)
    broken = written(tmp_path / "broken.yaml", "window: {low: 5}")
    assert configure(PRESET, [broken], ["window.high=6"]).window == Window(5, 6)
    assert problems_of([broken], []) == ["window.low: expected less than window.high=3, got 5"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory; expected a YAML file of sections"),
        (b"kinds: [1", "not YAML"),
        (b"kinds: 'caf\xe9'", "not YAML"),
        (b"", "expected sections with constants, found None"),
        (b"- kinds", "expected sections with constants, found ['kinds']"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    file = tmp_path / "a.yaml"
    if content is not None:
        file.write_bytes(content)
    (problem,) = problems_of([file], [])
    assert problem.startswith(f"--config {file}: {complaint}")
    assert "\n" not in problem


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("start", PRESETS)
def test_the_yaml_of_a_preset_reproduces_it_from_any_other(tmp_path: Path, preset: str, start: str) -> None:
    file = written(tmp_path / "config.yaml", as_yaml(PRESETS[preset]))
    again = configure(PRESETS[start], [file], [])
    assert again == PRESETS[preset]
    assert fingerprint(again) == fingerprint(PRESETS[preset])


def test_the_yaml_of_any_config_reproduces_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    words = ["no", "null", "~", "1e-4", "3", "a: b", "#x", " lead", "é Å", "two\nlines", "", "'", "[", "x" * 300]
    for number in range(60):
        kinds = Kinds(
            count=int(draw.integers(-(2**31) + 1, 2**31)),
            rate=float(draw.normal() * 10.0 ** draw.integers(-300, 300)),
            flag=bool(draw.random() < 0.5),
            word=words[number % len(words)],
            folder=Path("/a b") / (words[number % len(words)].strip() or "c"),
            size=(1, 2, int(draw.integers(100))),
            ladder=tuple((10.0 ** draw.integers(-20, 20, draw.integers(4))).tolist()),
            seed=None if number % 2 else number,
            start=None if number % 3 else Path(),
        )
        config = Constants(kinds, Window(0, 2**31 - 1))
        assert configure(PRESET, [written(tmp_path / "config.yaml", as_yaml(config))], []) == config


def test_yaml_keeps_the_declared_order() -> None:
    assert list(yaml.safe_load(as_yaml(PRESET))) == ["kinds", "window"]
    assert list(yaml.safe_load(as_yaml(PRESET))["kinds"]) == [field.name for field in dataclasses.fields(Kinds)]


def test_the_fingerprint_of_equal_values_is_equal_and_known() -> None:
    assert fingerprint(Window()) == hashlib.sha256(b"low: 1\nhigh: 3\n").hexdigest()[:8]
    assert fingerprint(configure(PRESET, [], ["window.low=2", "window.low=1"])) == fingerprint(Constants())


def test_every_constant_has_its_say_in_the_fingerprint() -> None:
    seen = {fingerprint(PRESETS["kaggle"])}
    for section, name in REAL_CONSTANTS:
        changed = dataclasses.replace(getattr(PRESETS["kaggle"], section), **{name: "another value"})
        seen.add(fingerprint(dataclasses.replace(PRESETS["kaggle"], **{section: changed})))
    assert len(seen) == len(REAL_CONSTANTS) + 1


def test_the_description_shows_values_with_the_comments_beside_them() -> None:
    lines = [re.sub(r" {2,}", "  ", line) for line in describe(PRESET).splitlines()]
    assert lines == [
        "  kinds.count = 3  beads, per box",
        "  kinds.rate = 0.5  1/s",
        "  kinds.flag = false",
        "  kinds.word = a  of honour",
        "  kinds.folder = x",
        "  kinds.mode = fast",
        "  kinds.level = 1",
        "  kinds.size = [1, 2, 3]  voxels z, y, x",
        "  kinds.ladder = [1.0, 2.0]",
        "  kinds.seed = null",
        "  kinds.start = s",
        "  kinds.choice = null",
        "  window.low = 1",
        "  window.high = 3",
    ]


def test_the_description_of_the_real_config_names_every_constant_as_a_word_that_configure_takes() -> None:
    lines = describe(PRESETS["phantom"]).splitlines()
    assert [line.split(" = ")[0].strip() for line in lines] == [".".join(pair) for pair in REAL_CONSTANTS]
    words = [line.strip().split("  ")[0].replace(" = ", "=", 1) for line in lines]
    assert configure(PRESETS["kaggle"], [], words) == PRESETS["phantom"]
    assert "  train.seed = 42  of weights, order" in re.sub(r" {2,}", "  ", "\n".join(lines)).replace("\n", "\n  ")


@pytest.mark.parametrize("name", ["count", "seed", "size"])
def test_whole_numbers_that_no_library_takes_are_refused(name: str) -> None:
    """A batch of 10^12 or a seed beyond 64 bits would end in a traceback elsewhere."""
    value = "[1, 2, 10000000000]" if name == "size" else "-10000000000"
    (problem,) = problems_of([], [f"kinds.{name}={value}"])
    assert problem.startswith(f"kinds.{name}: expected whole numbers of at most 2147483647, got ")
    assert configure(PRESET, [], ["kinds.seed=2147483647"]).kinds.seed == 2**31 - 1


def test_a_config_in_a_file_of_ours_comes_back_or_names_the_file() -> None:
    path = Path("runs/best.pt")
    assert restore(PRESET, as_yaml(PRESET), path) == PRESET
    for text, words in (
        ("kinds: [", "its config is damaged"),
        ("kinds: {size: 3}", "does not fit this version: kinds.size: expected a list"),
        ("kinds: {old: 3}", "does not fit this version: kinds.old: no such constant"),
        ("", "does not fit this version"),
    ):
        with pytest.raises(UserError) as caught:
            restore(PRESET, text, path)
        assert caught.value.exit_code == BAD_DATA
        assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
        assert words in caught.value.problems[0]


@pytest.mark.parametrize(
    "text", ["2020-13-45", "0x_", "0b_", "9" * 5000, "!!bool foo", "!!int foo", "!!timestamp foo", "[" * 3000]
)
def test_values_that_break_the_yaml_reader_itself_are_told(text: str, tmp_path: Path) -> None:
    """It raises bare ValueErrors for dates and numbers that only look like ones."""
    problems = problems_of([], [f"kinds.count={text}"])
    assert len(problems) == 1 and problems[0].startswith("kinds.count: ")
    with pytest.raises(UserError):
        configure(PRESET, [written(tmp_path / "a.yaml", f"kinds: {{count: {text}}}")], [])


def test_no_path_holds_a_null_byte(tmp_path: Path) -> None:
    (problem,) = problems_of([], ['kinds.folder="a\\0b"'])
    assert problem.startswith("kinds.folder: expected a path")


def test_limits_include_both_ends_and_look_at_every_item_of_a_list() -> None:
    kinds = Kinds(count=3, ladder=(1.0, 7.0))
    assert list(outside(kinds, {"count": (3, 9), "ladder": (1, 7)})) == []
    assert list(outside(kinds, {"count": (4, 9), "ladder": (1, 6)})) == [
        "count: expected 4 to 9, got 3", "ladder: expected 1 to 6, got [1.0, 7.0]"
    ]  # fmt: skip


def test_one_text_may_stand_where_a_list_of_texts_may(tmp_path: Path) -> None:
    def paths(text: str) -> tuple[str, ...]:
        return configure(Written(), [written(tmp_path / "a.yaml", f"spellings: {{paths: {text}}}")], []).spellings.paths

    assert paths("a b.tif") == ("a b.tif",) and paths("[a, b]") == ("a", "b") and paths("[]") == ()
    for wrong in ("spellings.paths=3", "spellings.paths=null", "spellings.pair=a", "spellings.numbers=1"):
        with pytest.raises(UserError, match="expected a list"):
            configure(Written(), [], [wrong])


def test_a_whole_number_may_stand_where_a_choice_of_texts_holds_it() -> None:
    """YAML reads precision: 32 as a number."""
    assert configure(Written(), [], ["spellings.precision=32"]).spellings.precision == "32"
    for wrong in ("16", "32.0", "true", "'032'"):
        with pytest.raises(UserError, match="expected one of 32, 16-mixed"):
            configure(Written(), [], [f"spellings.precision={wrong}"])
