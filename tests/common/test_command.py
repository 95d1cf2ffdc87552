"""The shared command line and the exit codes, in one process and through the real entry scripts."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.command import parse_config, preset_of, script_parser
from common.config import as_yaml, configure
from common.errors import UserError, config_error, data_error, run_script
from motor_detection import convert, eval, train
from motor_detection.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("motor_detection", "em_segmentation")
ENTRY_SCRIPTS = sorted(p for task in TASKS for p in (ROOT / task).glob("*.py") if "run_script(main)" in p.read_text())
CONFIGURED = [script for script in ENTRY_SCRIPTS if "script_parser(" in script.read_text()]
BAD_CALL = [str(ROOT / "motor_detection/convert.py"), "train.step=3", "train.workers=2.5", "--preset", "kaggle"]
HELP_OF_EACH = """
import os, runpy, sys
import matplotlib.pyplot, pandas, scipy.optimize, torch  # once for all scripts: they take most of the time
for number, script in enumerate(sys.argv[1:]):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)  # as `python script --help` has them
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)  # without the interpreter's slow farewell
    with open(f"{number}.code", "w") as file:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=file)
"""
Mains = pytest.mark.parametrize("main", [train.main, convert.main, eval.main], ids=["train", "convert", "eval"])


@dataclasses.dataclass(frozen=True)
class Beads:
    count: int = 3  # per box


@dataclasses.dataclass(frozen=True)
class Constants:
    beads: Beads = Beads()


TINY = {"few": Constants(), "many": Constants(Beads(300))}


def parsed(*arguments: str) -> int:
    parser = script_parser("A script.", TINY)
    parser.add_argument("--fresh", action="store_true")
    return parse_config(parser, TINY, list(arguments))[0].beads.count


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every entry script's --help, from a folder that is not the repository."""
    folder = tmp_path_factory.mktemp("helps")
    command = [sys.executable, "-c", HELP_OF_EACH, *map(str, ENTRY_SCRIPTS)]
    subprocess.run(command, cwd=folder, timeout=120, check=True)
    assert len(list(folder.iterdir())) == 3 * len(ENTRY_SCRIPTS), "--help itself writes nothing"
    return {
        script.name: Ended(
            int((folder / f"{number}.code").read_text()),
            (folder / f"{number}.out").read_text(),
            (folder / f"{number}.err").read_text(),
        )
        for number, script in enumerate(ENTRY_SCRIPTS)
    }


def test_the_first_preset_is_the_default() -> None:
    assert parsed() == 3
    assert parsed("--preset", "many") == 300


def test_an_unknown_preset_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match="--preset lots: expected one of few, many"):
        parsed("--preset", "lots")


@dataclasses.dataclass(frozen=True)
class RunOf:
    preset: str = "few"


@dataclasses.dataclass(frozen=True)
class WithRun:
    beads: Beads = Beads()
    run: RunOf = RunOf()


PRESETS_WITH_RUN = {"few": WithRun(), "many": WithRun(Beads(300), RunOf("many"))}


def test_a_yaml_may_name_the_preset_it_changes(tmp_path: Path) -> None:
    """So that a tutorial is one file; words on the command line still win."""
    (tmp_path / "many.yaml").write_text("run: {preset: many}\n")
    (tmp_path / "none.yaml").write_text("beads: {count: 7}\nrun:\n")
    (tmp_path / "odd.yaml").write_text("run: {preset: 3}\n")
    many, none = str(tmp_path / "many.yaml"), tmp_path / "none.yaml"

    def found(*arguments: str) -> tuple[int, str]:
        config, _ = parse_config(script_parser("A script.", PRESETS_WITH_RUN), PRESETS_WITH_RUN, list(arguments))
        return config.beads.count, config.run.preset

    assert found() == (3, "few") and found("--config", many) == (300, "many")
    assert found("--config", many, "beads.count=8") == (8, "many")
    with pytest.raises(UserError, match="--preset few: the YAML stands on run.preset=many; leave one of the two out"):
        found("--preset", "few", "--config", many)
    assert preset_of([none, Path(many)], "few") == "many" and preset_of([none], "few") == "few"
    with pytest.raises(UserError, match="--preset 3: expected one of few, many"):
        found("--config", str(tmp_path / "odd.yaml"))


def test_words_and_flags_stand_in_any_order_and_files_apply_left_to_right(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("beads: {count: 10}")
    second.write_text("beads: {count: 20}")
    assert parsed("--config", str(first), "--config", str(second)) == 20
    assert parsed("--config", str(second), "--config", str(first)) == 10
    assert parsed("beads.count=5", "--fresh", "beads.count=7", "--config", str(first)) == 7


def test_run_begins_with_that_runs_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(as_yaml(Constants(Beads(55))))
    parser = script_parser("A script.", TINY)
    parser.add_argument("--run", type=Path)
    counts = [
        parse_config(parser, TINY, arguments)[0].beads.count
        for arguments in ([], ["--run", str(tmp_path)], ["--run", str(tmp_path), "beads.count=6"])
    ]
    assert counts == [3, 55, 6]
    with pytest.raises(UserError, match="no run.s folder"):
        parse_config(parser, TINY, ["--run", str(tmp_path / "absent")])


@Mains
@pytest.mark.parametrize("preset", PRESETS)
def test_print_config_reproduces_the_run(
    main: Callable[[list[str]], int], preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.weight_decay=3e-5", "evaluation.blob_sigmas_angstrom=[70]", "run.name='007'"]
    for arguments in (["--preset", preset, *words], ["--config", str(tmp_path / "printed.yaml")]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--print-config"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(printed)
        assert configure(PRESETS["phantom"], [tmp_path / "printed.yaml"], []) == configure(PRESETS[preset], [], words)


def test_all_entry_scripts_were_found() -> None:
    assert {"train.py", "convert.py", "eval.py"} <= {script.name for script in CONFIGURED}


@pytest.mark.parametrize("script", ENTRY_SCRIPTS, ids=lambda path: path.name)
def test_help_is_there_from_any_folder(script: Path, helps: dict[str, Ended]) -> None:
    assert (helps[script.name].code, helps[script.name].err) == (0, "")
    assert helps[script.name].out.startswith(f"usage: {script.name}")


@pytest.mark.parametrize("script", CONFIGURED, ids=lambda path: path.name)
def test_help_lists_the_shared_flags_and_the_constants_with_their_comments(
    script: Path, helps: dict[str, Ended]
) -> None:
    shown = helps[script.name].out
    for flag in ("--preset", "--config", "--print-config", "section.name=value"):
        assert flag in shown
    for section in dataclasses.fields(PRESETS["phantom"]):
        for constant in dataclasses.fields(getattr(PRESETS["phantom"], section.name)):
            assert f"  {section.name}.{constant.name} = " in shown
    assert "of weights, order, augmentation and dropout" in shown


def test_a_bad_config_ends_with_code_2_and_one_line_per_problem(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, *BAD_CALL], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: train.step: no such constant; did you mean train.steps?",
        "error: train.workers: expected a whole number, got 2.5",
    ]
    assert not list(tmp_path.iterdir())


def test_a_seed_that_no_generator_takes_is_refused_in_the_config() -> None:
    """Addressed randomness takes seeds from 0; a negative one would end in a traceback within the run."""
    named = ["convert.seed", "evaluation.seed", "phantom.seed", "train.seed"]
    with pytest.raises(UserError) as caught:
        configure(PRESETS["phantom"], [], [f"{name}=-1" for name in named])
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == named


def code_of(main: Callable[[list[str]], int]) -> object:
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(arguments: list[str]) -> int:
        raise error

    return main


def test_the_exit_code_is_that_of_main_which_gets_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["script.py", "a", "--b"])
    assert code_of(lambda arguments: seen.append(arguments) or 0) == 0
    assert seen == [["a", "--b"]]
    assert code_of(lambda arguments: 1) == 1


@pytest.mark.parametrize(("make", "code"), [(config_error, 2), (data_error, 1)])
def test_user_errors_become_lines_and_codes(
    make: Callable[..., UserError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(make("a.b: wrong; give c", "d: worse"))) == code
    assert capsys.readouterr() == ("", "error: a.b: wrong; give c\nerror: d: worse\n")


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(raising(KeyboardInterrupt())) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("interrupted: ")
    assert err.count("\n") == 1


def test_our_own_faults_are_not_hidden() -> None:
    for error in (ZeroDivisionError(), RuntimeError("shape '[2]' is invalid"), OSError("no file is named")):
        with pytest.raises(type(error)):
            run_script(raising(error))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "7.28 TiB"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            "can't",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs"), "2.00 GiB"),
        (PermissionError(13, "Permission denied", "/data/patches"), "/data/patches: Permission denied"),
        (OSError(36, "File name too long", "x" * 300), "File name too long"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_full_memory_and_unusable_files_are_one_line(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(raising(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


def test_of_several_processes_the_first_tells_what_all_meet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = data_error("patch_7: damaged")
    alone.met_by_all = False
    for rank, error, lines in (("0", config_error("a: wrong"), 1), ("1", config_error("a: wrong"), 0), ("1", alone, 1)):
        monkeypatch.setenv("RANK", rank)
        assert code_of(raising(error)) == error.exit_code
        assert capsys.readouterr().err.count("error: ") == lines


def test_names_of_files_that_are_no_text_can_be_printed() -> None:
    done = subprocess.run(
        script_of("print('tomo_\\udcff')"),
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "tomo_\\udcff\n"), done.stderr


def script_of(body: str) -> list[str]:
    """A Python command whose main has this body; it may print and sleep."""
    lines = ["import sys, time", f"sys.path[0] = {str(ROOT)!r}", "from common.errors import run_script"]
    return [sys.executable, "-c", "\n".join([*lines, "def main(arguments):", f"    {body}", "run_script(main)"])]


def test_a_real_interrupt_leaves_no_traceback() -> None:
    process = subprocess.Popen(
        script_of("print('ready', flush=True); time.sleep(60)"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background would ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.startswith("interrupted: ")


@pytest.mark.parametrize("letters", [10, 200_000], ids=["at exit", "while printing"])
def test_a_reader_that_leaves_early_sees_no_traceback(letters: int) -> None:
    """As in `script.py | head -1`: less than a buffer is only written when the script ends."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        script_of(f"print('x' * {letters}); return 0"),
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode in (0, 1)


class MissingSlices(UserError):
    """Errors of workers may be of a kind of their own."""


@pytest.mark.parametrize("error", [config_error("a", "b"), data_error("ü"), MissingSlices(1, ["c"])])
def test_user_errors_survive_the_way_from_a_worker(error: UserError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.exit_code, again.problems, str(again)) == (error.exit_code, error.problems, str(error))
    assert str(error) == "\n".join(error.problems)
