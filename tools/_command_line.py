"""What the tools share: running from a clone without installation, and how a user's mistake ends."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raptr_ds.errors import RaptrError


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
