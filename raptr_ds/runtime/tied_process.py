"""Run a command at low priority until it ends, or its parent does: python tied_process.py PARENT COMMAND...

A file by itself, started without the package: between its start and the command lie some milliseconds.
"""

import contextlib
import ctypes
import os
import sys

_DIE_WITH_PARENT, _KILL = 1, 9  # prctl's PR_SET_PDEATHSIG, which outlasts exec
_LOWEST_PRIORITY = 19


def main() -> None:
    """Tie this process to its parent, and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    with contextlib.suppress(AttributeError, OSError):  # systems without it: the parent ends its children itself
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, _KILL)
    if os.getppid() != parent:  # it went before it could be tied to
        os._exit(1)
    os.nice(_LOWEST_PRIORITY)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
