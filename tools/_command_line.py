"""What the tools share: they run from a clone without installation, and a user's mistake is one message and exit code 2."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raptr_ds.errors import RaptrError  # noqa: E402


def run(main: Callable[[], None]) -> None:
    """Run a tool and end the process with the exit code that its outcome calls for."""
    try:
        main()
    except RaptrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
