"""Compare ways of training on equal terms: python tools/experiment.py FILE [--set KEY=VALUE ...]

FILE (HJSON) describes the contestants, their seeds and budget: see docs/experiments.md, and experiments/ for examples.
Runs what is not finished, one run after another, and writes report.md and report.html into the comparison's folder.
Start it again to continue where it stopped. --slurm submits the runs as Slurm job arrays instead. --keep copies what
a finished comparison's report needs, a few hundred KB, into FOLDER; --report reports such a copy too: name its folder.

Exit codes: 0 done; 1 a run failed; 2 an error in the file or the data, reported before anything runs; 75 interrupted:
the current run has saved a checkpoint, start again to continue.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import _command_line

from raptr_ds.errors import ConfigError, DataError, Exit
from raptr_ds.lab.comparison import load_comparison, read_record, session_of, write_record
from raptr_ds.lab.file import load_experiment
from raptr_ds.lab.keep import keep
from raptr_ds.lab.plan import Planner
from raptr_ds.lab.report import result_lines, write_report
from raptr_ds.lab.runner import LocalLauncher, claimed, current_progress, list_runs, refuse_other_runs, run_comparison
from raptr_ds.lab.slurm import settings_of, submit, write_jobs
from raptr_ds.user_paths import is_folder

DEFAULT_VOCAB_SIZE = 32_000


def main() -> None:
    """Parse the command line and run, list, submit or report."""
    arguments = _parse()
    if arguments.write_only and not arguments.slurm:
        raise ConfigError("--write-only goes with --slurm: without it the runs would start here. Add --slurm.")
    if arguments.report and is_folder(arguments.file):
        if arguments.set:
            raise ConfigError(
                f"--set changes a comparison file, and {arguments.file} is a folder, which is reported as its record "
                "is. Remove --set, or name the comparison file."
            )
        _report(arguments.file)
        return
    experiment = load_experiment(arguments.file, arguments.set)
    planner = Planner(experiment, DEFAULT_VOCAB_SIZE if arguments.dry_run else None)
    name, command = arguments.file.stem, ["python", *sys.argv]
    if arguments.dry_run:
        print("\n".join(list_runs(planner)))
    elif arguments.settings_of is not None:
        print("\n".join(settings_of(planner, arguments.settings_of)))
    elif arguments.report:
        _refresh_record(planner, name)
        _report(planner.output)
    elif arguments.keep is not None:
        print(f"kept in {keep(load_comparison(planner.output), arguments.keep)}")
    elif arguments.slurm:
        progress, files = write_jobs(planner, arguments.file, arguments.set)
        write_record(planner, progress, name, session_of(command))
        print("\n".join(submit(files, os.environ, only_write=arguments.write_only)))
    else:
        _run(planner, name, command)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="comparison file (HJSON)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys of FILE: seeds=[1,2]"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the runs with their steps and FLOPs, run nothing")
    what.add_argument("--report", action="store_true", help="write the report of the runs so far, run nothing")
    what.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the record and thinned curves into FOLDER/NAME")
    what.add_argument("--slurm", action="store_true", help="submit the runs as a Slurm job array")
    what.add_argument("--settings-of", type=int, metavar="N", help=argparse.SUPPRESS)  # the array's jobs ask for theirs
    parser.add_argument("--write-only", action="store_true", help="with --slurm: write the batch files, submit nothing")
    return parser.parse_args()


def _run(planner: Planner, name: str, command: list[str]) -> None:
    # As Ctrl-C: the current run is asked to stop, and saves.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    experiment, session = planner.experiment, session_of(command)
    planner.check()
    try:
        with claimed(planner.output, _say) as lock:
            progress = run_comparison(
                planner,
                LocalLauncher(experiment.base, experiment.processes, lock),
                _say,
                lambda progress: write_record(planner, progress, name, session),
            )
    except KeyboardInterrupt:
        print(f"interrupted: start again to continue {planner.output}", file=sys.stderr)
        sys.exit(int(Exit.CONTINUE_LATER))
    if progress.shares:
        _report(planner.output)
    if progress.failed:
        print(f"{len(progress.failed)} failed, see above", file=sys.stderr)
        sys.exit(int(Exit.FAULT))


def _say(line: str) -> None:
    print(line, flush=True)


def _refresh_record(planner: Planner, name: str) -> None:
    """Update the record with what has run meanwhile (a job array's jobs do not write it)."""
    try:
        progress = current_progress(planner, as_it_stands=True)
        refuse_other_runs([*progress.tuning, *progress.comparison])
        write_record(planner, progress, name, None)
    except DataError:
        if read_record(planner.output) is None:  # else the data are on another machine: report from the record as it is
            raise


def _report(folder: Path) -> None:
    comparison = load_comparison(folder)
    print("\n".join(["", *result_lines(comparison), ""]))
    for page in write_report(comparison):
        print(f"wrote {page}")


if __name__ == "__main__":
    _command_line.run(main)
