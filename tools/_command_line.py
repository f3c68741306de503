"""What the tools share: running from a clone without installation, and how a user's mistake ends."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raptr_ds.errors import RaptrError
from raptr_ds.user_paths import is_full, path_error, print_any_name


def package_cache() -> Path:
    """Return the folder in which packages with texts and tasks are kept, unless the command line names another."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises for a user who has none
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "raptr_ds" / "corpora"


def processors() -> int:
    """Return how many processors this process may use: of a shared machine, those of its job."""
    return len(os.sched_getaffinity(0))


def whole_number(least: int = 1, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return argparse's type of a whole number. most: by default what no machine has of anything."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {least} to {most}")
        return value

    return read


COUNT = whole_number()


def above_zero(text: str) -> float:
    """Return a number of the command line: argparse's type of one that is finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def quiet_transformers() -> None:
    """Keep the warnings and progress bars of transformers off the screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run(main: Callable[[], None]) -> None:
    """Run a tool and end the process with the exit code that its outcome calls for."""
    print_any_name()
    try:
        main()
        sys.stdout.flush()
    except RaptrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except BrokenPipeError:  # as in `... | head`: nobody reads on, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        sys.exit(141)
    except OSError as error:
        if error.filename is None and not is_full(error):  # which writing to an open file raises without its name
            raise
        refused = path_error(error.filename or "the output", error)
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(int(refused.exit_code))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
