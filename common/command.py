"""The command line that every entry script shares: --preset, --config, section.name=value, --print-config, --help."""

import argparse
import sys
from pathlib import Path

from common.config import ConfigType, as_yaml, configure, describe
from common.errors import config_error


def script_parser(description: str, presets: dict[str, ConfigType]) -> argparse.ArgumentParser:
    """A parser with the shared flags; scripts add their own before parse_config. The first preset is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = next(iter(presets))
    parser.add_argument("--preset", default=default, metavar="NAME", help=f"{', '.join(presets)} (default {default})")
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE.yaml", help="YAML of changes, repeatable"
    )
    parser.add_argument("--print-config", action="store_true", help="print the YAML that reproduces the run, and stop")
    parser.add_argument("changes", nargs="*", metavar="section.name=value", help="change a constant (last one wins)")
    parser.epilog = f"constants of the preset {default} (edit them in config.py, or change them above):\n" + describe(
        presets[default]
    )
    return parser


def parse_config(
    parser: argparse.ArgumentParser, presets: dict[str, ConfigType], arguments: list[str]
) -> tuple[ConfigType, argparse.Namespace]:
    """The final config and the script's own flags; prints the config and exits where --print-config asks for it.

    A script that has --run FOLDER begins with that run's config.yaml.
    """
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.preset not in presets:
        raise config_error(f"--preset {chosen.preset}: expected one of {', '.join(presets)}")
    base = [chosen.run / "config.yaml"] if "run" in chosen and chosen.run is not None else []
    config = configure(presets[chosen.preset], [*base, *chosen.config], chosen.changes)
    if chosen.print_config:
        print(as_yaml(config), end="")
        sys.exit(0)
    return config, chosen
