"""Try a run until it is done, as the policy has it, and write down in its folder what happened."""

import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raptr_ds.errors import Exit
from raptr_ds.runtime.events import read_events
from raptr_ds.runtime.signals import LONG_WORK_SECONDS
from raptr_ds.supervise.command import (
    StopRequests,
    adopt_orphans,
    await_orphans,
    end_orphans,
    print_error,
    run_command,
)
from raptr_ds.supervise.policy import (
    KILLED,
    Cause,
    Decision,
    Ending,
    Limits,
    Start,
    cause_of,
    decide,
    failed_node,
    first_by_itself,
    starts_without_progress,
)
from raptr_ds.supervise.record import append_event, newest_step

_ORPHANS_AT_ONCE_SECONDS = 2.0
# Read by raptr_ds/parallel/launch.py: a run that was started again continues what its first start has begun.
_RESTART_COUNT, _SUPERVISOR = "RAPTR_RESTART_COUNT", "RAPTR_SUPERVISOR"


class Supervised:
    """A run under supervision, with its record in the events of its folder.

    job: names the supervision in the events; tries of other jobs do not count.
    """

    def __init__(self, folder: Path | None, job: str, limits: Limits) -> None:
        self.folder, self.job, self.limits = folder, job, limits
        events = [event for event in (read_events(folder) if folder else []) if event.get("job") == job]
        ends = [index for index, event in enumerate(events) if event["event"] in ("done", "give_up")]
        # Given up, and started again: people had a look at it in between.
        self._first = int(events[ends[-1]].get("start", -1)) + 1 if ends else 0
        events = events[ends[-1] + 1 :] if ends else events
        self._starts = [Start(event["start"], event["step"]) for event in events if event["event"] == "launch"]
        self._judged = {event.get("start") for event in events if event["event"] == "restart"}
        self.failed_nodes = {event["node"] for event in events if event.get("node") and event["event"] == "restart"}

    def is_over(self, number: int) -> bool:
        """Return whether a start was the last one, done or given up, or was never written down."""
        return number not in {start.number for start in self._starts}

    def is_to_be_repeated(self, number: int) -> bool:
        """Return whether a start's end has been judged, and another one was to follow."""
        return number in self._judged

    def begin(self, number: int, **fields: Any) -> Decision:
        """Write a start down, unless too many before it were without progress; return whether to go on."""
        step = newest_step(self.folder)
        fruitless = starts_without_progress(self._starts, number - 1, step, self._first)
        if fruitless > self.limits.max_retries:  # each killed together with the supervisor, which could not judge it
            decision = decide(Cause.FAULT, fruitless, self.limits)
            self.write("give_up", start=number, cause=Cause.FAULT, why=decision.why, step=step)
            return decision
        self._starts.append(Start(number, step))
        self.write("launch", start=number, step=step, **fields)
        return Decision(True, f"continues after step {step}" if step else "starts from step 0")

    def confirmed(self, ending: Ending) -> Ending:
        """Return how a try ended by the run's own record.

        One that its run has not recorded as its end was killed, though its launcher shows 0: srun returns that where it
        knows no task's exit code, after 5 s without a word of a step that Slurm has aborted (22.05, "Timed out waiting
        for job step to complete"). And the ranks of one that has recorded its start have met: a port that is taken,
        some library's, has not kept them from it.
        """
        events = read_events(self.folder) if self.folder else []
        launches = [i for i, event in enumerate(events) if event["event"] == "launch" and event.get("job") == self.job]
        since = events[launches[-1] :] if launches else []  # without one on the disk nothing can be missed there
        if any(event["event"] == "start" for event in since):
            ending = replace(ending, port_taken=False)
        if ending.code != Exit.DONE or not since:
            return ending
        if any(event["event"] == "end" and event.get("exit_code") == Exit.DONE for event in since):
            return ending
        say(f"the launcher's exit code is 0, but {self.folder} has no record of the run's end: taken for killed")
        return replace(ending, code=KILLED)

    def decide_on(self, number: int, cause: Cause, step: int | None = None) -> Decision:
        """Decide what follows a try. step: of the newest checkpoint; by default that of now."""
        step = newest_step(self.folder) if step is None else step
        return decide(cause, starts_without_progress(self._starts, number, step, self._first), self.limits)

    def judge(self, number: int, ending: Ending) -> tuple[Cause, Decision]:
        """Decide what follows a try, and write it down."""
        cause, step = cause_of(ending), newest_step(self.folder)
        if cause is Cause.OCCUPIED and number == 0:  # later, a process of the try before may still be saving
            cause = Cause.MISTAKE
        decision = self.decide_on(number, cause, step)
        event = "restart" if decision.retry else "done" if cause is Cause.DONE else "give_up"
        node = failed_node(ending, cause)
        self.write(event, start=number, cause=cause, code=ending.code, node=node, step=step, why=decision.why)
        return cause, decision

    def write(self, event: str, **fields: Any) -> None:
        """Add to the run's events."""
        if problem := append_event(self.folder, event, job=self.job, **fields):
            say(problem)


def supervise(words: Sequence[str], env: Mapping[str, str], run: Supervised, stops: StopRequests) -> int:
    """Run a launcher's command again and again, as the policy has it; return the exit code of the last try.

    Signals are passed on to the command; after one of them nothing is tried again.
    """
    adopt_orphans()
    number, earlier = 0, int(env.get(_RESTART_COUNT) or 0)
    while True:
        beginning = run.begin(number)
        say(f"try {number}, {beginning.why}: {shlex.join(words)}")
        counted = {**env, _RESTART_COUNT: str(earlier + number), _SUPERVISOR: env.get(_SUPERVISOR, run.job)}
        ending = run.confirmed(run_command(words, counted, stops, _pass_on))
        if ending.code != Exit.DONE:
            _leave_orphans_time_to_save(stops)
        _, decision = run.judge(number, ending)
        say(f"exit code {ending.code}{whose(ending)}: {decision.why}")
        if decision.retry and not stops.requested:
            say(f"next try in {decision.delay_seconds:g} s")
            if stops.sleep(decision.delay_seconds):
                number += 1
                continue
        if decision.retry:
            say("asked to stop: start again to continue from the last checkpoint")
            run.write("stopped", start=number)
        return ending.code


def _leave_orphans_time_to_save(stops: StopRequests) -> None:
    """Wait for processes that outlived the launcher: a run without one saves, or ends itself when it cannot."""
    if left := await_orphans(_ORPHANS_AT_ONCE_SECONDS, stops):
        say(f"processes that outlive the command: {left}, which get {LONG_WORK_SECONDS:g} s to save and leave")
        if killed := end_orphans(LONG_WORK_SECONDS, stops):
            say(f"killed {killed} of them")


def say(text: str) -> None:
    """Print a line with the time, where the launcher prints its own errors."""
    print_error(f"supervise: {time.strftime('%F %T')}: {text}\n".encode(errors="backslashreplace"))


def whose(ending: Ending) -> str:
    """Return which task failed first, for a message; empty if that is not known."""
    if not ending.failures or ending.code in (Exit.DONE, Exit.CONTINUE_LATER):
        return ""
    first = first_by_itself(ending) or ending.failures[0]
    return f", first {first.node or 'several nodes'}: {first.text}"


def _pass_on(child: "subprocess.Popen[bytes]", asked: signal.Signals | None) -> None:
    if asked is not None:
        say(f"{asked.name}: passed on to the command")
        child.send_signal(asked)
