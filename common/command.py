"""The command line that every entry script shares: --preset, --config, section.name=value, --print-config, --help."""

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

from common.config import ConfigType, as_yaml, configure, describe, read_yaml
from common.errors import config_error

CHANGE = re.compile(r"[a-z]\w*\.[a-z]\w*=")  # section.name=value


class ScriptParser(argparse.ArgumentParser):
    """argparse whose complaints are one-line user errors."""

    def error(self, message: str) -> NoReturn:
        raise config_error(f"{message}; --help lists the flags")


def script_parser(description: str, presets: dict[str, ConfigType]) -> ScriptParser:
    """A parser with the shared flags; scripts add their own before parse_config. The first preset is the default."""
    default = next(iter(presets))
    words = [word.removeprefix("--preset=") for word in sys.argv]
    named = next((after for word, after in zip(words, words[1:], strict=False) if word == "--preset"), default)
    named = next((word for word, raw in zip(words, sys.argv, strict=True) if raw.startswith("--preset=")), named)
    named = named if named in presets else default  # parse_config tells an unknown one; this is for --help
    parser = change_parser(description, f"the preset {named}", presets[named])
    words_of_preset = f"{', '.join(presets)} (default: what the YAML names as run.preset, else {default})"
    parser.add_argument("--preset", default=None, metavar="NAME", help=words_of_preset)
    return parser


def change_parser(description: str, name: str, constants: ConfigType) -> ScriptParser:
    """A parser with --config, --print-config and section.name=value; its help lists the constants of that name."""
    parser = ScriptParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE.yaml", help="YAML of changes, repeatable"
    )
    parser.add_argument("--print-config", action="store_true", help="print the YAML that reproduces the run, and stop")
    parser.add_argument("changes", nargs="*", metavar="section.name=value", help="change a constant (last one wins)")
    parser.epilog = f"constants of {name} (edit them in config.py, or change them above):\n{describe(constants)}"
    return parser


def split_changes(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of the form section.name=value, and all others; an existing path is never a change."""
    changes = [word for word in words if CHANGE.match(word) and not Path(word).exists()]
    return changes, [word for word in words if word not in changes]


def preset_of(yaml_files: list[Path], default: str) -> str:
    """The preset on which YAML files stand: the last run.preset among them, or the default."""
    named = default
    for file in yaml_files:
        tree = read_yaml(file)
        if "run" in tree and isinstance(tree["run"], dict) and "preset" in tree["run"]:
            named = str(tree["run"]["preset"])
    return named


def parse_config(
    parser: argparse.ArgumentParser, presets: dict[str, ConfigType], arguments: list[str]
) -> tuple[ConfigType, argparse.Namespace]:
    """The final config and the script's own flags; prints the config and exits where --print-config asks for it.

    A script that has --run FOLDER begins with that run's config.yaml.
    """
    chosen = parser.parse_intermixed_args(arguments)
    base = [chosen.run / "config.yaml"] if "run" in chosen and chosen.run is not None else []
    if base and not base[0].exists():
        raise config_error(f"--run: {chosen.run}: no run's folder (no config.yaml in it)")
    files = [*base, *chosen.config]
    default = chosen.preset if chosen.preset is not None else next(iter(presets))
    preset = preset_of(chosen.config, default)
    if chosen.preset is not None and preset != chosen.preset:
        raise config_error(
            f"--preset {chosen.preset}: the YAML stands on run.preset={preset}; leave one of the two out"
        )
    if preset not in presets:
        raise config_error(f"--preset {preset}: expected one of {', '.join(presets)}")
    config = configure(presets[preset], files, chosen.changes)
    if chosen.print_config:
        print(as_yaml(config), end="")
        sys.exit(0)
    return config, chosen
