"""Check a run and submit it to Slurm: python tools/submit.py RUN_FILE --nodes N [--gpus-per-node G] [--time LIMIT] ...

    tools/submit.py deepspeed_configs/ul2_1b_raptr.json --nodes 4 --gpus-per-node 8 --time 2-0 \\
        --set raptr_ds.train.save=runs/mine -- --account=NAME --cpus-per-task=12

Checked before anything is submitted: the run file at that size, its data, the memory plan, room on the disk for its
checkpoints, the signal's lead, and that nobody works in the run's folder. The code and the complete run file are copied
into the run's folder, so that later edits of the clone do not reach the job, however often it is requeued. Words after
-- are further options of sbatch. Relative paths count from the working folder. docs/slurm.md has more.
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

import _command_line

from raptr_ds.errors import ConfigError
from raptr_ds.submit.container import RUNTIMES
from raptr_ds.submit.layout import DEFAULT_LEAD_SECONDS, check_more_options
from raptr_ds.submit.request import WITHOUT_SBATCH, Request, check


def main() -> None:
    """Parse the command line, check, copy and submit."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = vars(_parse(words[:end]))
    more = check_more_options(words[end + 1 :], options["chain"] > 1)
    is_dry_run = options.pop("dry_run")
    if not is_dry_run and shutil.which("sbatch") is None:
        raise ConfigError(f"there is no sbatch here. {WITHOUT_SBATCH}")
    venv = sys.prefix if (Path(sys.prefix) / "bin" / "activate").is_file() else ""
    submission = check(Request(**options, more_options=more, home=Path.cwd(), venv=venv, env=os.environ))
    print("\n".join(submission.lines))
    if is_dry_run:
        print(f"would run: {shlex.join(submission.command(submission.folder / 'submitted-N.sbatch'))}")
    else:
        print("\n".join(submission.send()))


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_file", type=Path, help="run file, as for training")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for training")
    parser.add_argument("--nodes", required=True, metavar="N", help="nodes, or a range that the run may get: 2-4")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of a node, each with a process of its own")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="processes of a node without GPUs (default 1)")
    parser.add_argument("--time", metavar="LIMIT", help="time limit of a start, as sbatch takes it: 2-0 is two days")
    parser.add_argument(
        "--signal-lead",
        type=int,
        metavar="SECONDS",
        help="between the signal to save and the time limit (default what the run's earlier starts measured, or "
        f"{DEFAULT_LEAD_SECONDS})",
    )
    parser.add_argument("--partition", metavar="NAME", help="as sbatch's")
    parser.add_argument("--job-name", metavar="NAME", help="as sbatch's (default the name of the run's folder)")
    parser.add_argument(
        "--device-memory", type=float, metavar="GIB", help="memory of a GPU: refuse a run that does not fit by the plan"
    )
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="submit N jobs, one after another: where requeueing is off"
    )
    parser.add_argument(
        "--array",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="a run for each combination of values, or a file with the settings of a run in each line; each has a "
        "folder of its own in the run's",
    )
    parser.add_argument("--container", metavar="IMAGE", help="image that the training's processes run in")
    parser.add_argument("--container-runtime", choices=RUNTIMES, default="apptainer", help="(default apptainer)")
    parser.add_argument("--dry-run", action="store_true", help="check, print sbatch's command, and write nothing")
    return parser.parse_args(words)


if __name__ == "__main__":
    _command_line.run(main)
