"""A task's constants are frozen dataclasses; this module changes them from presets, YAML files and key=value words.

    python TASK/train.py --preset kaggle --config lab.yaml optimizer.learning_rate=1e-4 data.patch_size=[64,96,96]

Unknown names, wrong types and wrong lengths are reported all at once. The result is frozen, and as_yaml() of it,
given back to --config, yields the same object: the config.yaml that a run leaves behind repeats the run.
"""

import copy
import dataclasses
import difflib
import hashlib
import inspect
import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.errors import config_error, data_error

ConfigType = TypeVar("ConfigType")
# what PyYAML raises besides its own: on a date 2020-13-45, a number 0x_, a tag !!bool foo, 3000 brackets, bytes
UNREADABLE_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)
LARGEST_INT = 2**31 - 1  # of a constant: seeds, counts and sizes; more would only end in some library's overflow
UNIONS = (types.UnionType, Union)  # how `int | None` and `Literal[...] | None` are declared


def configure(constants: ConfigType, yaml_files: list[Path], changes: list[str]) -> ConfigType:
    """Apply the files, then the changes, left to right, to a dataclass of sections.

    Sections may define problems() -> Iterator[str]; they are asked once all changes are made.
    Raises a config error (exit code 2) with one line per problem.
    """
    problems: list[str] = []
    tree: dict[str, Any] = {}
    for file in yaml_files:
        _merge(tree, read_yaml(file))
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name:
            problems.append(f"{change}: expected section.name=value (flags begin with --)")
            continue
        _merge(tree, _nested(name, text, problems))
    config = _judged(constants, tree, problems)
    if problems:
        raise config_error(*problems)
    return config


def outside(section: Any, limits: dict[str, tuple[float, float]]) -> Iterator[str]:
    """For a section's problems(): one line per constant (or list of them) that leaves its limits, both included."""
    for name, (low, high) in limits.items():
        value = getattr(section, name)
        if not all(low <= item <= high for item in (value if isinstance(value, tuple) else (value,))):
            yield f"{name}: expected {low:g} to {high:g}, got {list(value) if isinstance(value, tuple) else value}"


def no_folder_names(section: Any, constants: tuple[str, ...]) -> Iterator[str]:
    """For a section's problems(): one line per constant that could not be a folder's name; None is left alone."""
    for constant in constants:
        value = getattr(section, constant)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value):
            yield f"{constant}: expected a folder's name of letters, digits, '.', '-' and '_', got {value!r}"


def restore(constants: ConfigType, text: str, path: Path) -> ConfigType:
    """The configuration that as_yaml wrote into a file of ours; a data error names the file where it no longer fits."""
    problems: list[str] = []
    try:
        tree = yaml.safe_load(text)
    except UNREADABLE_YAML as error:
        raise data_error(f"{path}: its config is damaged ({' '.join(str(error).split())})") from error
    config = _judged(constants, tree, problems)
    if problems:
        raise data_error(*(f"{path}: its config does not fit this version: {problem}" for problem in problems))
    return config


def _judged(constants: ConfigType, tree: Any, problems: list[str]) -> ConfigType:
    """The constants with a tree of changes; what is wrong with it is added to the problems."""
    config = _replace(constants, tree, "", problems)
    if not problems:
        problems.extend(_judge(config, ""))
    return config  # type: ignore[no-any-return]


def as_yaml(config: Any) -> str:
    """The whole configuration as YAML, in the order it was declared."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def fingerprint(config: Any) -> str:
    """The first 8 hex digits of the SHA-256 of the configuration's YAML."""
    return hashlib.sha256(as_yaml(config).encode()).hexdigest()[:8]


def describe(config: Any) -> str:
    """Every constant as section.name = value with the comment that stands beside it in config.py."""
    lines = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        comments = _comments(type(values))
        for constant in dataclasses.fields(values):
            value = yaml.safe_dump(_plain(getattr(values, constant.name)), default_flow_style=True, width=10**6)
            text = f"  {section.name}.{constant.name} = {value.removesuffix(chr(10) + '...' + chr(10)).strip()}"
            lines.append(f"{text:<58}  {comments[constant.name]}".rstrip())
    return "\n".join(lines)


def _comments(section: type) -> dict[str, str]:
    comments = {constant.name: "" for constant in dataclasses.fields(section)}
    for line in inspect.getsource(section).splitlines():
        found = re.match(r"\s+(\w+)\s*:[^#]*?(?:#\s*(.*))?$", line)
        if found is not None and found[1] in comments and found[2] is not None:
            comments[found[1]] = found[2]
    return comments


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file of sections; a config error where it is none."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise config_error(f"--config {file}: {error.strerror}; expected a YAML file of sections") from error
    except UNREADABLE_YAML as error:
        raise config_error(f"--config {file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise config_error(f"--config {file}: expected sections with constants, found {tree!r}")
    return tree


def _nested(name: str, text: str, problems: list[str]) -> dict[str, Any]:
    try:
        nested = yaml.safe_load(text)
    except UNREADABLE_YAML:
        problems.append(f"{name}: cannot read the value {text!r}; quote it if it is text")
        return {}
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return nested  # type: ignore[no-any-return]


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if name in tree and isinstance(tree[name], dict) and isinstance(value, dict):
            _merge(tree[name], value)
        else:
            tree[name] = copy.deepcopy(value)  # two sections may share one YAML anchor


def _replace(config: Any, changes: Any, path: str, problems: list[str]) -> Any:
    """A copy with all changes made at once, so that cross-checks judge only the final values."""
    declared = get_type_hints(type(config))
    if not isinstance(changes, dict):
        problems.append(f"{path}: is a section of {', '.join(declared)}; it cannot be {changes!r}")
        return config
    converted = {}
    for name, value in changes.items():
        full = f"{path}.{name}" if path else str(name)
        if name not in declared:
            problems.append(f"{full}: no such constant{_nearest(str(name), config, path)}")
        elif dataclasses.is_dataclass(declared[name]):
            converted[name] = _replace(getattr(config, name), value, full, problems)
        else:
            try:
                converted[name] = _convert(value, declared[name])
            except ValueError:
                problems.append(f"{full}: expected {_type_in_words(declared[name])}, got {value!r}")
            except OverflowError:
                problems.append(f"{full}: expected whole numbers of at most {LARGEST_INT}, got {value!r}")
    return dataclasses.replace(config, **converted)


def _nearest(name: str, config: Any, path: str) -> str:
    """The constant that was probably meant: of another section by its exact name, else the nearest name."""
    fields = dataclasses.fields(config)
    sections = {f.name: [c.name for c in dataclasses.fields(getattr(config, f.name))] for f in fields
                if dataclasses.is_dataclass(getattr(config, f.name))}  # fmt: skip
    for section, inside in sections.items():
        if name in inside:
            return f"; did you mean {section}.{name}?"
    names = [field.name for field in fields]
    if close := difflib.get_close_matches(name, names, 1, 0.5):
        return f"; did you mean {path}.{close[0]}?" if path else f"; did you mean {close[0]}?"
    for section, inside in sections.items():
        if close := difflib.get_close_matches(name, inside, 1, 0.7):
            return f"; did you mean {section}.{close[0]}?"
    return f"; {path or 'there'} holds {', '.join(names)}"


def _judge(config: Any, path: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _judge(value, f"{path}{field.name}.")
    if hasattr(config, "problems"):
        yield from (f"{path}{problem}" for problem in config.problems())


def _convert(value: Any, declared: Any) -> Any:
    """The value as its declared type, or ValueError; nothing is truncated, rounded or read as true or false.

    A whole number too large for any seed, count or size is an OverflowError.
    """
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in UNIONS:
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)))
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        if type(value) is int and str(value) in arguments:
            return str(value)  # YAML reads precision: 32 as a number
        raise ValueError
    if origin is tuple and arguments[0] is str and arguments[-1] is Ellipsis and type(value) is str:
        return (value,)  # one name where a list of names may stand
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ValueError
        return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    if declared is float and type(value) in (int, float, str):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4, without a point, as text
        except OverflowError as error:
            raise ValueError from error
        if not math.isfinite(number):
            raise ValueError
        return number
    if declared is Path and type(value) is str and value and "\0" not in value:
        return Path(value)
    if declared in (bool, int, str) and type(value) is declared:
        if declared is int and abs(value) > LARGEST_INT:
            raise OverflowError
        return value
    raise ValueError


def _type_in_words(declared: Any) -> str:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in UNIONS:
        return " or ".join("null" if kind is type(None) else _type_in_words(kind) for kind in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        many = "a list [...] of " if arguments[-1] is Ellipsis else f"a list [...] of {len(arguments)} "
        return many + _type_in_words(arguments[0])
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
    return words[declared]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
