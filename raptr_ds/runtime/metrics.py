"""Metrics: the one place that records what training measures, and passes it to every sink.

Lines of metrics.jsonl (docs and outside checks rely on the keys):
training: step, loss, lr, grad_norm, path, path_length, phase, tokens, flops, skipped_steps, step_seconds,
tokens_per_second, mfu; evaluation: step, eval_loss, path_length; a run that continues on another corpus: step, corpus,
corpus_before, the digests of its tokens; an export scored on downstream tasks: step, that of its checkpoint, and tasks:
{task: {metric: number}}, metrics under lm-evaluation-harness's names.
skipped_steps counts the steps so far that moved no weight because a number was not finite, rolled-back ones included.
The line of such a step has "non_finite": true; how numbers that are not finite are written: metrics_file.to_line.
Once checkpoints could not be written since the run was last started, "failed_saves" is their number.
With several ranks, from the fourth step since a start on, "slowest_rank" is the one that takes longest for its own work
in a step, "slowest_rank_seconds" its time, and "median_rank_seconds" that of the ranks it is compared with (ranks.py):
means over the steps since the last line, of at most 20. "host_memory_bytes", "host_memory_peak_bytes" and on GPUs
"device_memory_peak_bytes" are of the rank that has most.
Where parts of layers run (path.method width), "width" is the number of heads of each layer that run; where a step takes
several paths (path.paths_per_step), "paths" are these, "path" the layers of any, "path_length" the mean.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raptr_ds import paths
from raptr_ds.engine.protocol import StepResult
from raptr_ds.runtime.metrics_file import METRICS, MetricsFile, Scores, task_words
from raptr_ds.runtime.progress import Progress, short_number, short_time
from raptr_ds.runtime.ranks import Ranks
from raptr_ds.runtime.sinks import Sink
from raptr_ds.runtime.state import RunState
from raptr_ds.runtime.utilization import model_flops_utilization

_NUM_TIMED = 50  # last steps that the printed speed is a mean of


@dataclass(frozen=True)
class TrainingStep:
    """What is known after one training step of the whole job.

    state: where the run stands after it. seconds: its wall time; tokens, flops: of this step alone. failed_saves:
    checkpoints that could not be written since the run was last started. ranks: what they report.
    """

    state: RunState
    result: StepResult
    path: paths.LayerPath
    lr: float
    seconds: float
    tokens: int
    flops: int
    failed_saves: int = 0
    ranks: Ranks | None = None


class Metrics:
    """Records training steps and evaluations of a run; on ranks other than 0 (`folder` None) it does nothing.

    folder: the run's folder. resume_step: the last step of the checkpoint that training continues from, 0 for a new
    run; corpus: the digest of that checkpoint's tokens. interval: steps between training lines; the last step always
    has one. peak: FLOP/s of one device, None if not known. flops_left(step): FLOPs expected after a 1-based step, for
    the time left. sinks: where lines go besides metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        num_steps: int,
        resume_step: int = 0,
        corpus: str | None = None,
        interval: int = 1,
        sinks: Sequence[Sink] = (),
        progress: Progress | None = None,
        num_devices: int = 1,
        peak: float | None = None,
        flops_left: Callable[[int], float] | None = None,
    ) -> None:
        self._num_steps = num_steps
        self._interval = interval
        self._progress = progress if progress is not None and folder is not None else Progress()
        self._num_devices, self._peak, self._flops_left = num_devices, peak, flops_left
        self._last_steps: deque[TrainingStep] = deque(maxlen=_NUM_TIMED)
        self._is_delayed = False
        self._sinks: list[Sink] = [] if folder is None else [MetricsFile(folder / METRICS, resume_step, corpus), *sinks]

    def record_step(self, step: TrainingStep) -> None:
        """Record one training step."""
        if not self._sinks:
            return
        self._last_steps.append(step)
        done = step.state.step
        if done % self._interval == 0 or done == self._num_steps:
            self._record(self._training_line(step))
        self._progress.show(done, self._num_steps, step.path.phase, self._words(step))

    def record_evaluation(self, step: int, eval_loss: float, path_length: int) -> None:
        """Record a loss on held-out data after a 1-based step, of paths of this length."""
        self._record({"step": step, "eval_loss": eval_loss, "path_length": path_length})
        self._progress.say(f"step {step}/{self._num_steps}  eval loss {eval_loss:.4f}  path {path_length}")

    def record_tasks(self, step: int, tasks: Scores) -> None:
        """Record the scores of the model after a 1-based step, which may be long ago, by task and metric."""
        self._record({"step": step, "tasks": tasks})
        self._progress.say(f"tasks after step {step}: {task_words(tasks)}")

    def record_corpus(self, step: int, before: str, now: str) -> None:
        """Record that the run reads other tokens after a 1-based step; digests of both."""
        self._record({"step": step, "corpus": now, "corpus_before": before})

    def rewind(self, step: int) -> None:
        """Remove what was recorded after a 1-based step; its lines are kept in metrics.rolled_back.jsonl."""
        for sink in self._sinks:
            sink.rewind(step)

    def say(self, message: str) -> None:
        """Print a message above the live line; on rank 0 only."""
        self._progress.say(message)

    def sync(self) -> None:
        """Write all that was recorded to disk; called before a checkpoint is written."""
        for sink in self._sinks:
            sink.sync()

    def finish_writing(self) -> str | None:
        """Write all that was recorded to disk; return why a part of it is not there, None if all is."""
        self.sync()
        return next((sink.failure for sink in self._sinks if sink.is_part_of_run and sink.failure), None)

    def close(self) -> None:
        """Close all sinks, and name those that lack something."""
        for sink in self._sinks:
            sink.close()
            if sink.failure is not None and not sink.is_part_of_run:
                self.say(f"{sink.failure}: it has not all of the run's metrics; {METRICS} has")
        self._progress.close()
        self._sinks = []

    def _training_line(self, step: TrainingStep) -> dict[str, Any]:
        state, result, path = step.state, step.result, step.path
        line = {
            "step": state.step,
            "loss": result.loss,
            "lr": step.lr,
            "grad_norm": result.grad_norm,
            "path": list(path.layers),
            "path_length": path.mean_length,
            "phase": path.phase,
            "tokens": state.tokens,
            "flops": state.flops,
            "skipped_steps": state.skipped_steps,
            "step_seconds": step.seconds,
            "tokens_per_second": step.tokens / step.seconds,
            "mfu": model_flops_utilization(step.flops / step.seconds, self._peak, self._num_devices),
        }
        if path.shares:
            line["paths"] = [list(share.layers) for share in path.shares]
        if path.parts is not None:
            line["width"] = max(map(len, path.parts.heads))
        if step.failed_saves:
            line["failed_saves"] = step.failed_saves
        if step.ranks is not None:
            line |= step.ranks.line()
        return {**line, "non_finite": True} if result.skipped else line

    def _words(self, step: TrainingStep) -> str:
        """Return what a progress line shows after the step's number."""
        state, path = step.state, step.path
        seconds = sum(last.seconds for last in self._last_steps)  # without evaluation and saving
        tokens_per_second = sum(last.tokens for last in self._last_steps) / seconds
        words = [
            f"loss {step.result.loss:.4f}",
            f"phase {path.phase}",
            f"path {path.mean_length:.3g}/{path.num_layers}",
            f"{short_number(tokens_per_second)} tok/s",
            f"saved {1 - state.flops / state.full_flops:.1%}",
        ]
        if self._flops_left is not None:
            flops_per_second = sum(last.flops for last in self._last_steps) / seconds
            words.append(f"left {short_time(self._flops_left(state.step) / flops_per_second)}")
        if step.ranks is not None and (slow := step.ranks.slow) is not None:
            words.append(f"rank {slow.rank} slow ({slow.ratio:.1f} x)")
        if step.failed_saves:
            words.append(f"{step.failed_saves} checkpoints NOT written")
        return "  ".join(words)

    def _record(self, line: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.record(line)
        failure = next((sink.failure for sink in self._sinks if sink.failure), None)
        if failure and not self._is_delayed:
            self._progress.say(
                f"metrics cannot be written ({failure}): they are kept in memory, and written when "
                "that works again; training goes on"
            )
        elif self._is_delayed and not failure:
            self._progress.say("metrics are written again, those of the time between included")
        self._is_delayed = bool(failure)
