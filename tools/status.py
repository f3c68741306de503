"""How a run stands: python tools/status.py RUN_FOLDER [RUN_FOLDER ...] [--json] [--events N].

Reads the folder alone, from any machine that sees it, while the run trains or after: the state and the process that
works in it, the step, phase and path, the loss as a curve, the speed, the FLOPs saved, the age of the last checkpoint,
starts and why they ended. Exit code 0 if the runs are running or finished, 1 if one of them failed or is silent.
"""

import argparse
import json
import sys
from pathlib import Path

import _command_line
from _command_line import whole_number

from raptr_ds.supervise.status import describe, status_of


def main() -> None:
    """Parse the command line, read the folders and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="a run's folder (raptr_ds.train.save)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run")
    parser.add_argument(
        "--events", type=whole_number(0), default=8, metavar="N", help="how many of the last events (default 8)"
    )
    arguments = parser.parse_args()
    found = [status_of(folder) for folder in arguments.runs]
    for status in found:
        if arguments.json:
            print(json.dumps(status.to_dict()))
        else:
            print("\n".join(describe(status, arguments.events)))
    sys.stdout.flush()
    if any(status.state in {"failed", "silent"} for status in found):
        sys.exit(1)


if __name__ == "__main__":
    _command_line.run(main)
