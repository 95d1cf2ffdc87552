"""Errors a user can act on: one line that says where, what, what was expected and the remedy."""

import io
import os
import re
import signal
import sys
from collections.abc import Callable

WRONG_CALL = 2  # a wrong command line or config
BAD_DATA = 1  # unreadable or contradictory data, or a failed check
INTERRUPTED = 130  # Ctrl-C
OUT_OF_MEMORY = re.compile("out of memory|can(no|')t allocate memory", re.IGNORECASE)


class UserError(Exception):
    """A problem with an exit code and one line per finding; printed without a traceback."""

    def __init__(self, exit_code: int, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.exit_code = exit_code
        self.problems = problems
        self.met_by_all = True  # of several processes each meets it, so that only the first one prints it

    def __reduce__(self) -> tuple[type["UserError"], tuple[int, list[str]]]:
        return type(self), (self.exit_code, self.problems)  # survives the way back from a worker process


def config_error(*problems: str) -> UserError:
    """What the caller asked for is wrong: exit code 2."""
    return UserError(WRONG_CALL, list(problems))


def data_error(*problems: str) -> UserError:
    """What was found on disk is wrong: exit code 1."""
    return UserError(BAD_DATA, list(problems))


def end_imports_quietly() -> None:
    """Let Ctrl-C end the process without a word (status 130) while it still imports; run_script takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable[[list[str]], int]) -> None:
    """Run an entry script's main and turn user errors, Ctrl-C, full memory and unusable files into one line and a code.

    Other errors keep their traceback: they are faults of ours.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see end_imports_quietly
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(sys.argv[1:])
        if sys.stdout is not None:  # closed by the caller: >&-
            sys.stdout.flush()
    except UserError as error:
        first = "RANK" not in os.environ or os.environ["RANK"] == "0"
        for problem in error.problems if first or not error.met_by_all else []:
            print(f"error: {problem}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        code = BAD_DATA
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        why = str(error).partition("\n")[0] or "the system gave no more"
        print(f"error: out of memory ({why}); smaller micro-batches, patches or tiles need less", file=sys.stderr)
        code = BAD_DATA
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename if error.filename is not None else "output"
        print(f"error: {where}: {error.strerror}; name another file or folder, or free this one", file=sys.stderr)
        code = BAD_DATA
    sys.exit(code)
