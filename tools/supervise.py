"""Start a run again when it crashed, was killed or hung: python tools/supervise.py -- COMMAND

COMMAND is what starts the run by hand, for example
    python tools/supervise.py -- deepspeed raptr_ds/pretrain.py --deepspeed_config FILE --set KEY=VALUE
or the same with torchrun or mpirun. It is tried again at once as long as the run's newest checkpoint advances, and with
growing delays a few times without. A mistake (exit code 2) is not tried again. SIGUSR1, SIGTERM, SIGINT and SIGHUP are
passed on, and end the tries. What happened stands in events.jsonl in the run's folder. The exit code is that of the
last try. In Slurm jobs slurm/training_job.sh starts this with --slurm, and the job is requeued for the next try.
"""

import argparse
import os
import socket
import sys
from pathlib import Path
from uuid import uuid4

import _command_line

from raptr_ds.errors import ConfigError
from raptr_ds.supervise.command import StopRequests
from raptr_ds.supervise.guard import guard, start_guard
from raptr_ds.supervise.policy import Limits
from raptr_ds.supervise.record import run_folder
from raptr_ds.supervise.slurm import Job, supervise_job
from raptr_ds.supervise.supervisor import Supervised, say, supervise


def main() -> None:
    """Parse the command line and supervise; the process ends with the run's exit code."""
    stops = StopRequests()
    options = _parse()
    retries = _number("RAPTR_MAX_RETRIES", Limits.max_retries)
    if not retries.is_integer():
        raise ConfigError(f"RAPTR_MAX_RETRIES={retries:g} must be a whole number.")
    limits = Limits(int(retries), _number("RAPTR_RETRY_DELAY", Limits.delay_seconds))
    folder = options.folder or run_folder(options.command)
    if folder is None and not options.slurm:
        raise ConfigError(
            "the command shows no --deepspeed_config FILE, so the run's folder, by whose checkpoints progress is seen, "
            "is not known. Give it: tools/supervise.py --folder RUN_FOLDER -- COMMAND"
        )
    if options.slurm or options.guard:
        raise SystemExit(_in_job(options, folder, limits, stops))
    # In containers each supervisor may have the same host name and number.
    run = Supervised(folder, f"{socket.gethostname()}:{uuid4().hex[:8]}:{os.getpid()}", limits)
    say(f"the run's folder is {folder}")
    raise SystemExit(supervise(options.command, os.environ, run, stops))


def _in_job(options: argparse.Namespace, folder: Path | None, limits: Limits, stops: StopRequests) -> int:
    env = os.environ
    job = Job.of(env)
    if options.guard:
        assert folder is not None
        guard(folder, limits, job, stops, options.guard)
        return 0
    if folder is not None:
        words = ["--guard", str(os.getpid()), "--folder", str(folder), "--", "-"]
        start_guard([sys.executable, __file__, *words], env)
    run = Supervised(folder, str(job.number), limits)
    return int(supervise_job(options.command, env, run, job, stops, options.stopped))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="the run's folder; by default from the command's run file"
    )
    parser.add_argument("--slurm", action="store_true", help=argparse.SUPPRESS)  # slurm/training_job.sh
    parser.add_argument("--guard", type=int, help=argparse.SUPPRESS)  # PROCESS: in a step of its own in such a job
    parser.add_argument("--stopped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="words of the launcher's command, after --")
    return parser.parse_args()


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"{variable}={text!r} must be a number from 0 on. Unset it for {default:g}.")
    return value


if __name__ == "__main__":
    _command_line.run(main)
