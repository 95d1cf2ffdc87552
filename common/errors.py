"""Errors a user can act on: one line that says where, what, what was expected and the remedy."""

import os
import sys
from collections.abc import Callable

WRONG_CALL = 2  # a wrong command line or config
BAD_DATA = 1  # unreadable or contradictory data, or a failed check
INTERRUPTED = 130  # Ctrl-C


class UserError(Exception):
    """A problem with an exit code and one line per finding; printed without a traceback."""

    def __init__(self, exit_code: int, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.exit_code = exit_code
        self.problems = problems

    def __reduce__(self) -> tuple[type["UserError"], tuple[int, list[str]]]:
        return type(self), (self.exit_code, self.problems)  # survives the way back from a worker process


def config_error(*problems: str) -> UserError:
    """What the caller asked for is wrong: exit code 2."""
    return UserError(WRONG_CALL, list(problems))


def data_error(*problems: str) -> UserError:
    """What was found on disk is wrong: exit code 1."""
    return UserError(BAD_DATA, list(problems))


def run_script(main: Callable[[list[str]], int]) -> None:
    """Run an entry script's main and turn user errors and Ctrl-C into messages and exit codes."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        code = BAD_DATA
    sys.exit(code)
