"""What is asked of Slurm: nodes, tasks, time and the signal's lead, each checked before anything is submitted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from raptr_ds.errors import ConfigError
from raptr_ds.supervise.time_limit import limit_seconds, short_limit

DEFAULT_LEAD_SECONDS = 120
_MAX_LEAD_SECONDS = 65535  # sbatch's own limit
_MAX_SIZES = 64
# What this tool gives sbatch itself, as it has checked it or depends on it; the names that sbatch has for each.
_OWN_OPTIONS = {
    "--signal": "--signal-lead SECONDS",
    "--nodes -N": "--nodes N",
    "--ntasks-per-node": "--tasks-per-node N or --gpus-per-node N",
    "--ntasks -n": "--nodes N and --tasks-per-node N",
    "--gpus-per-node": "--gpus-per-node N",
    "--time -t": "--time LIMIT",
    "--job-name -J": "--job-name NAME",
    "--partition -p": "--partition NAME",
    "--array -a": "--array KEY=V1,V2 or --array FILE",
    "--chdir -D": "raptr_ds.train.save for the run's folder",
    "--output -o": "raptr_ds.train.save: the output lies in the run's folder",
    "--wrap": "the run file: the job runs pretrain.py",
    "--parsable": "nothing: the tool prints the job's number",
    "--test-only": "--dry-run",
}


@dataclass(frozen=True)
class JobLayout:
    """Size and time of a job.

    fewest_nodes: less than `nodes` where Slurm may give fewer (--nodes=2-4). time: as sbatch takes it, None for the
    partition's limit.
    """

    nodes: int
    fewest_nodes: int
    tasks_per_node: int
    has_gpus: bool
    time: str | None
    lead_seconds: int

    @property
    def world_sizes(self) -> list[int]:
        """Return the processes of each number of nodes that Slurm may give, the largest first."""
        return [nodes * self.tasks_per_node for nodes in range(self.nodes, self.fewest_nodes - 1, -1)]

    def words(self) -> list[str]:
        """Return sbatch's options."""
        span = f"{self.nodes}" if self.nodes == self.fewest_nodes else f"{self.fewest_nodes}-{self.nodes}"
        words = [f"--nodes={span}", f"--ntasks-per-node={self.tasks_per_node}"]
        words += [f"--gpus-per-node={self.tasks_per_node}"] if self.has_gpus else []
        words += [f"--time={self.time}"] if self.time else []
        return [*words, f"--signal=B:USR1@{self.lead_seconds}"]


def job_layout(nodes: str, gpus: int | None, tasks: int | None, time: str | None, lead_seconds: int) -> JobLayout:
    """Return a checked layout. Raises: ConfigError."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", nodes)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if most - fewest > _MAX_SIZES:
        raise ConfigError(f"--nodes {nodes}: a range has {_MAX_SIZES} numbers at most, as each of them is checked.")
    if not 1 <= fewest <= most:
        raise ConfigError(f"--nodes {nodes!r} is not a number of nodes. Write --nodes 4, or --nodes 2-4 for a range.")
    if gpus is not None and tasks is not None and gpus != tasks:
        raise ConfigError(
            f"--gpus-per-node {gpus} and --tasks-per-node {tasks}: one process drives one GPU. Leave --tasks-per-node "
            "out, or make them equal."
        )
    per_node = gpus if gpus is not None else 1 if tasks is None else tasks
    if per_node < 1:
        raise ConfigError(f"{per_node} processes on a node: give 1 or more. Leave --gpus-per-node out to run on CPUs.")
    if not 1 <= lead_seconds <= _MAX_LEAD_SECONDS:
        raise ConfigError(
            f"--signal-lead {lead_seconds} must be 1 to {_MAX_LEAD_SECONDS} seconds: the time for one step and "
            "one save before the time limit."
        )
    limit = None if time is None else limit_seconds(time)
    if limit is not None and (problem := short_limit(limit, lead_seconds)):
        raise ConfigError(f"--time {time}: {problem}")
    return JobLayout(most, fewest, per_node, gpus is not None, time, lead_seconds)


def check_more_options(words: Sequence[str], is_chain: bool) -> list[str]:
    """Return further options of sbatch. Raises: ConfigError for one that the tool gives itself, and for other words."""
    for before, word in zip(["", *words], words, strict=False):
        if not word.startswith("-"):
            if before.startswith("-") and "=" not in before:
                continue
            raise ConfigError(f"{word!r} after -- is no option of sbatch. Write its options as --account=NAME.")
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if is_chain and name in {"--dependency", "-d"}:
            raise ConfigError(
                f"{word} after --: it would replace --dependency=singleton, by which the jobs of --chain wait for each "
                "other and for earlier ones of their name. Give the job to wait for the chain's --job-name instead."
            )
        own = next((own for names, own in _OWN_OPTIONS.items() if name in names.split()), None)
        if own is not None:
            raise ConfigError(f"{word} after --: tools/submit.py gives sbatch this option itself. Use {own}.")
    return list(words)
