"""A run under Slurm: one try for each start of the job, which goes back to the queue for the next one."""

import errno
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from raptr_ds.errors import ConfigError, Exit
from raptr_ds.supervise.command import StopRequests, run_command
from raptr_ds.supervise.policy import Cause, Decision, Ending, cause_of, failed_node
from raptr_ds.supervise.slurm_commands import run_slurm
from raptr_ds.supervise.supervisor import Supervised, say, whose
from raptr_ds.supervise.time_limit import limit_seconds, short_limit

_FIRST_PORT, _NUM_PORTS = 15000, 15000  # below the ports that the kernel hands out by itself (32768 and more)
_PORTS_OF_A_JOB = 61
_PORT_TRIES = 5
_PATIENCE_SECONDS = 1800.0  # with a controller that does not answer
_ASK_AGAIN_SECONDS = 5.0
_HOST_PAUSES = (1.0, 5.0, 20.0)
_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
_FAILURES = {"TimeLimit", "JobLaunchFailure", "NonZeroExitCode", "OutOfMemory"}


@dataclass
class Job:
    """The job that this process runs in.

    name: by which Slurm's commands know it. Of a job in an array it is not its number: one has the number of the whole
    array, and a command with that would act on all.
    """

    number: int
    start: int
    node_list: str
    num_nodes: int
    name: str
    is_requeued: bool = field(default=False, init=False)

    @staticmethod
    def of(env: Mapping[str, str]) -> "Job":
        """Return the job by the variables that Slurm sets in it."""
        number, array, task = env["SLURM_JOB_ID"], env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        name = f"{array}_{task}" if array and task else number
        start, num_nodes = int(env.get("SLURM_RESTART_COUNT", 0)), int(env["SLURM_JOB_NUM_NODES"])
        return Job(int(number), start, env["SLURM_JOB_NODELIST"], num_nodes, name)

    def show(self) -> dict[str, str]:
        """Return what the controller has on the job, as scontrol prints it; empty if it does not answer."""
        return dict(re.findall(r"(\S+?)=(\S*)", run_slurm("scontrol", "show", "job", "-o", self.name).text))

    def is_back(self, shown: Mapping[str, str]) -> bool:
        """Return whether the job, as `show` has it, is in the queue again, or will be when this start has ended.

        By an operator, by Slurm for a lost node, which is counted a little later, or by us.
        """
        return int(shown.get("Restarts", 0)) > self.start or shown.get("JobState") in _QUEUED

    def requeue(self) -> str | None:
        """Put the job back into the queue, where it keeps its number. Returns None, or why that is not done.

        Waits for a controller that does not answer.
        """
        refused = 0
        for _ in _back_off("requeue"):
            job = self.show()
            if not job:
                continue
            if self.is_back(job):
                self.is_requeued = True
                return None
            if job.get("JobState") != "RUNNING" and not has_failed(job):
                return f"the job is {job.get('JobState')}: cancelled"
            problem = run_slurm("scontrol", "requeue", self.name).problem
            if problem is None:
                self.is_requeued = True
                return None
            refused += 1
            if refused == 3:
                return problem
        return "the controller does not answer"

    def change(self, **settings: str) -> str | None:
        """Change settings of the job. Returns None, or why Slurm refused."""
        words = [f"{name}={value}" for name, value in settings.items()]
        return run_slurm("scontrol", "update", f"JobId={self.name}", *words).problem

    def exclude(self, node: str) -> str:
        """Keep the job, which waits in the queue, off a node if enough others are left. Returns what was done."""
        job = self.show()
        states = "idle,alloc,mix,comp"
        listed = run_slurm("sinfo", "-h", "-N", "-o", "%N", "-t", states, "-p", job.get("Partition", ""))
        before = job.get("ExcNodeList", "(null)")
        excluded = set() if before == "(null)" else set(hosts(before))
        if not job or listed.problem is not None or (before != "(null)" and not excluded):
            return f"{node} failed before, but Slurm does not show which other nodes are up: kept"
        excluded.add(node)
        left = set(listed.text.split()) - excluded
        if len(left) < self.num_nodes:
            return f"{node} failed before, but without it there are {len(left)} nodes for {self.num_nodes}: kept"
        problem = self.change(ExcNodeList=",".join(sorted(excluded)))
        return f"{node} failed before: excluded{f' was refused: {problem}' if problem else ''}"


def has_failed(job: Mapping[str, str]) -> bool:
    """Return whether a job is ending for another reason than that it was cancelled.

    Such a one may still be requeued. So might a cancelled one, whose tasks are asked to stop too, and leave with 75.
    While they do, both are COMPLETING; but one that was cancelled has no reason.
    """
    reason = job.get("Reason", "None")
    return reason in _FAILURES or reason.startswith("RaisedSignal")


def hosts(node_list: str) -> list[str]:
    """Return the names in a list of nodes, none if scontrol fails; needs no controller."""
    return run_slurm("scontrol", "show", "hostnames", node_list).text.split()


def rendezvous_port(job: int, start: int, attempt: int = 0) -> int:
    """Return where the ranks meet: elsewhere in each of 61 starts, whose sockets may linger, and in the next jobs."""
    return _FIRST_PORT + (job * _PORTS_OF_A_JOB + start % _PORTS_OF_A_JOB + attempt * 7919) % _NUM_PORTS


def free_rendezvous_port(job: int, start: int, attempt: int = 0) -> int:
    """Return the first port from this attempt on at which nobody listens on this machine."""
    ports = [rendezvous_port(job, start, number) for number in range(attempt, attempt + 100)]
    return next((port for port in ports if _is_free(port)), ports[0])


def supervise_job(
    words: Sequence[str], env: Mapping[str, str], run: Supervised, job: Job, stops: StopRequests, is_stopped: bool
) -> int:
    """Run the step of this start of the job, requeue the job if the policy has it so, and return the exit code.

    is_stopped: the job was asked to stop before the step.
    """
    address = _first_host(job, stops)
    if address is None:
        say(f"scontrol does not show the first host of {job.node_list}.")
        run.write("give_up", start=job.start, cause="no host", why=f"scontrol does not show it in {job.node_list}")
        return Exit.USER_ERROR
    beginning = run.begin(job.start, nodes=job.node_list)
    say(f"job {job.number}, start {job.start} on {job.node_list}; the run's folder is {run.folder}")
    if not beginning.retry:
        return _end(job, beginning, Exit.FAULT)
    if is_stopped:
        return _go_back(job, run, Decision(True, "stopped before it started"))
    say(beginning.why)
    _warn_of_time_limit(job, env.get("RAPTR_SIGNAL_LEAD", ""))
    ending = Ending(Exit.FAULT)
    for attempt in range(_PORT_TRIES):
        port = free_rendezvous_port(job.number, job.start, attempt)
        say(f"the ranks meet at {address}:{port}")
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        ending = run.confirmed(run_command(words, {**env, **meeting}, stops, _Asking(job, run)))
        if cause_of(ending) is not Cause.PORT or stops.requested:
            break
        run.write("restart", cause=Cause.PORT, port=port, step=None)
    cause, decision = run.judge(job.start, ending)
    say(f"exit code {ending.code}{whose(ending)}")
    if job.is_requeued:
        return Exit.CONTINUE_LATER
    if not decision.retry:
        return _end(job, decision, ending.code)
    suspect = failed_node(ending, cause) if cause in (Cause.FAULT, Cause.HUNG) else None
    return _go_back(job, run, decision, suspect if suspect in run.failed_nodes else None, ending.code)


def _first_host(job: Job, stops: StopRequests) -> str | None:
    """Return the first host of the job; scontrol, which needs no controller for that, is given some time."""
    for pause in (0.0, *_HOST_PAUSES):
        if pause:
            say(f"scontrol does not show the hosts of {job.node_list}, again in {pause:g} s")
            if not stops.sleep(pause):
                return None
        if found := hosts(job.node_list):
            return found[0]
    return None


class _Asking:
    """Asks srun's tasks to stop, again and again: an srun that has not started its tasks yet drops the signal.

    srun hands SIGUSR1 to every task; to a task one more says nothing new.
    """

    def __init__(self, job: Job, run: Supervised) -> None:
        self._job, self._run = job, run
        self._asked_at: float | None = None

    def __call__(self, child: "subprocess.Popen[bytes]", asked: signal.Signals | None) -> None:
        if self._asked_at is None:
            say(f"stop requested{f' ({asked.name})' if asked else ''}: asking the tasks to save and leave")
        if self._asked_at is None or time.monotonic() - self._asked_at >= _ASK_AGAIN_SECONDS:
            self._asked_at = time.monotonic()
            child.send_signal(signal.SIGUSR1)
        # Only KillWait seconds from the time limit on: the job is requeued while the tasks save. If this start has to
        # bring a checkpoint for that, it is judged when they have.
        if asked == signal.SIGTERM and not self._job.is_requeued and self._job.show().get("Reason") == "TimeLimit":
            decision = self._run.decide_on(self._job.start, Cause.STOPPED)
            what = "back to the queue"
            if not decision.retry:
                what = (
                    "the retries are used up, so the job goes back to the queue only if a checkpoint is still written"
                )
            elif problem := self._job.requeue():
                what = f"not requeued: {problem}"
            say(f"the time limit is reached: {what}")


def _go_back(
    job: Job, run: Supervised, decision: Decision, unwanted: str | None = None, code: int = Exit.CONTINUE_LATER
) -> int:
    """Requeue the job, not to come back to the unwanted node; return the exit code."""
    say(f"{decision.why}: back to the queue")  # Slurm may end this process soon after the next command
    problem = job.requeue()
    if problem:
        say(f"not requeued: {problem}. To continue, submit the job again; docs/slurm.md shows how to submit a chain.")
        run.write("give_up", start=job.start, cause="not requeued", why=problem)
        return code
    if decision.delay_seconds:
        seconds = round(decision.delay_seconds)
        problem = job.change(StartTime=f"now+{seconds}")
        say(f"the next start waits {seconds} s or more" if problem is None else f"no delay: {problem}")
    if unwanted is not None:
        say(job.exclude(unwanted))
    return Exit.CONTINUE_LATER


def _end(job: Job, decision: Decision, code: int) -> int:
    say(decision.why)
    if code != Exit.DONE and (problem := job.change(Comment=decision.why)):
        say(f"the job's comment could not be set: {problem}")
    return code


def _warn_of_time_limit(job: Job, lead: str) -> None:
    """Print what to write if the signal to stop comes at once or hardly later. Says nothing where one is not known."""
    try:
        limit = limit_seconds(job.show().get("TimeLimit", ""))
    except ConfigError:  # no answer, or the partition's limit
        return
    if lead.isdecimal() and limit and (problem := short_limit(limit, int(lead))):
        say(f"warning: {problem}")


def _back_off(what: str) -> Iterator[None]:
    """Come back after growing waits until patience is at its end."""
    begun, wait = time.monotonic(), 1.0
    while True:
        yield
        if time.monotonic() - begun > _PATIENCE_SECONDS:
            return
        say(f"{what}: no success yet, again in {wait:g} s")
        time.sleep(wait)
        wait = min(2 * wait, 30.0)


def _is_free(port: int) -> bool:
    for family, everywhere in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            socket.create_server((everywhere, port), family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # another error, for want of IPv6, says nothing of the port
                return False
    return True
