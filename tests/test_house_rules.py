"""The rules of docs/design.md that a machine can check, on every module of the project."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("motor_detection", "ct_retrieval", "em_segmentation", "histo_mmnet", "multimodal")
ROOMS = (*TASKS, "common", "data")
MAX_FUNCTION_LINES = 100
MAX_FILE_LINES = 400
GLOBAL_RANDOM = ("np.random.rand", "np.random.seed", "np.random.normal", "np.random.uniform", "np.random.choice")
PEERS = (
    "monai",
    "skimage",
    "faiss",
    "lifelines",
    "torchvision",
    "torchstain",
    "timm",
    "sksurv",
    "mrcfile",
    "starfile",
    "copick",
)
ALLOWED_AT_TOP = {*ROOMS, "tests", "docs", "README.md", "Makefile", "pyproject.toml",
                  "requirements.txt", "requirements-extras.txt", "LICENSE"}  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def broken_rules(tree: ast.Module, home: str) -> Iterator[str]:
    """Yield 'line rule' for every breach in one module of the room `home`."""
    for node in ast.walk(tree):
        for rule in (*function_rules(node), *statement_rules(node), *import_rules(node, home)):
            yield f"{getattr(node, 'lineno', 0)} {rule}"


def function_rules(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.FunctionDef):
        return
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    if node.args.defaults or any(node.args.kw_defaults):
        yield f"{node.name} has default arguments"
    if node.returns is None or any(a.annotation is None for a in arguments if a.arg not in ("self", "cls")):
        yield f"{node.name} is not fully typed"
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > MAX_FUNCTION_LINES:
        yield f"{node.name} has {length} lines"


def statement_rules(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        yield "bare except"
    if isinstance(node, ast.Global):
        yield "global statement"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "get" and 1 <= len(node.args) <= 2:
            yield f"{ast.unparse(node)}: index directly, or fail"
        if ast.unparse(node.func).startswith(GLOBAL_RANDOM):
            yield f"{ast.unparse(node)}: draw from a generator named by purpose"
        if ast.unparse(node.func) == "torch.load" and "weights_only=True" not in ast.unparse(node):
            yield f"{ast.unparse(node)}: only weights_only=True executes no pickle"


def import_rules(node: ast.AST, home: str) -> Iterator[str]:
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
    if isinstance(node, ast.ImportFrom) and node.level:
        yield "relative import"
    for package in (name.split(".")[0] for name in names):
        if package in TASKS and package != home:
            yield f"{home} imports {package}"
        if home == "common" and package == "data":
            yield "common imports data"
        if package == "random":
            yield "the module random draws from a global state"
        if package in PEERS:
            yield f"{package} is a peer for tests, never imported by the project"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text()
    breaches = list(broken_rules(ast.parse(text), path.relative_to(ROOT).parts[0]))
    assert not breaches, "\n".join(f"{path.relative_to(ROOT)}:{breach}" for breach in breaches)
    assert text.count("\n") <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines"


def test_every_folder_is_a_regular_package() -> None:
    """Without __init__.py a stranger's package of the same name later on the path would win."""
    folders = {path.parent for path in modules()}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_top_level_holds_only_the_agreed_rooms() -> None:
    found = {
        p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("runs", "inference_results")
    }
    assert found <= ALLOWED_AT_TOP, f"Unexpected at top level: {sorted(found - ALLOWED_AT_TOP)}"


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("def f(x: int = 1) -> None: ...", "default arguments"),
        ("def f(x): ...", "not fully typed"),
        ("try:\n    pass\nexcept:\n    pass", "bare except"),
        ("d.get('a', 1)", "index directly"),
        ("import em_segmentation.dataset", "imports em_segmentation"),
        ("import monai", "peer"),
        ("torch.load(path)", "weights_only"),
        ("np.random.rand(3)", "generator"),
        ("import random", "global state"),
        ("def f() -> None:\n    global a", "global statement"),
    ],
)
def test_a_planted_breach_is_found(source: str, rule: str) -> None:
    breaches = list(broken_rules(ast.parse(source), "motor_detection"))
    assert any(rule in breach for breach in breaches), breaches
