"""An evaluation: tasks by number of examples and by how contexts are seen, and what came out."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from lm_eval.api.model import LM
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate

from raptr_ds.errors import ConfigError


@dataclass(frozen=True)
class Score:
    """A metric's value. stderr: its standard error by the harness's conventions, None where it has none."""

    value: float
    stderr: float | None


@dataclass
class Outcome:
    """One task with one number of examples. scores: by metric, and by scoring: prefix, causal.

    documents: evaluated ones, of how many. examples_from: the split that examples come from, None without examples or
    where the task's own configuration has them. examples_are: `others` or `any` of the evaluated documents, None if
    they are none of these. truncated: documents whose context lost its beginning.
    """

    task: str
    shots: int
    documents: int
    of: int
    version: Any
    examples_from: str | None
    examples_are: Literal["others", "any"] | None
    higher_is_better: dict[str, bool]
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    truncated: int = 0


def run_tasks(
    tasks: Sequence[Task],
    models: dict[str, LM],
    shots: Sequence[int] = (0,),
    limit: int | None = None,
    bootstrap_iters: int = 1000,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
    """Return the outcomes, one after another as they come, by number of examples and task.

    models: by scoring. shots: numbers of examples. limit: documents of each task; all if None. bootstrap_iters: for
    standard errors without a formula. report: what comes next.

    A task whose own configuration says no examples, such as one with the examples in its contexts, is run once.
    Examples are drawn with the harness's own seed, so that prompts are those of its command line.
    Raises: ConfigError if a task has too few documents to take examples from; in its turn, if it has a continuation
    that the model cannot take.
    """
    fixed = {task.config.task for task in tasks if task.get_config("num_fewshot") == 0}
    jobs = [
        (task, 0 if task.config.task in fixed else examples)
        for number, examples in enumerate(shots)
        for task in tasks
        if number == 0 or task.config.task not in fixed
    ]
    for task, examples in jobs:
        sampler: Any = getattr(task, "sampler", None)
        if examples and sampler is not None and len(sampler.df) < (least := _least_documents(task, examples)):
            raise ConfigError(
                f"task {task.config.task} has {len(sampler.df):,} documents to take examples from, and --shots "
                f"{examples} needs {least}. Give fewer."
            )
    run = partial(evaluate, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False)
    return (_run_task(task, examples, models, run, report) for task, examples in jobs)


def _run_task(
    task: Any, shots: int, models: dict[str, LM], run: Callable[..., Any], report: Callable[[str], None]
) -> Outcome:
    name, outcome = str(task.config.task), None
    for scoring, model in models.items():
        report(f"{name}, {shots} shots, {scoring}")
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        truncated: set[Any] = getattr(model, "truncated", set())
        truncated.clear()
        found = run(lm=model, task_dict={"tasks": {name: task}})
        if outcome is None:
            source = _examples_from(task) if shots else None
            is_evaluated = source is not None and source == _evaluated_split(task)
            outcome = Outcome(
                task=name,
                shots=shots,
                documents=found["n-samples"][name]["effective"],
                of=found["n-samples"][name]["original"],
                version=found["versions"][name],
                examples_from=source,
                examples_are=("others" if _leaves_out_asked(task) else "any") if is_evaluated else None,
                higher_is_better=found["higher_is_better"][name],
            )
        outcome.truncated = max(outcome.truncated, len(truncated))
        for metric, score in _scores(found["results"][name]).items():
            outcome.scores.setdefault(metric, {})[scoring] = score
    assert outcome is not None
    return outcome


def _evaluated_split(task: Any) -> str | None:
    return task.config.test_split or task.config.validation_split


def _examples_from(task: Any) -> str | None:
    """Return the split that the harness takes examples from; None if the task's configuration has them."""
    if task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None:
        return None
    config = task.config
    return task.fewshot_cfg.split or config.training_split or config.validation_split or config.test_split


def _leaves_out_asked(task: Any) -> bool:
    """Return whether the harness keeps the asked document out of its examples (lm-eval 0.4.13, fewshot_context)."""
    return task.fewshot_cfg.split == task.config.test_split


def _least_documents(task: Any, examples: int) -> int:
    """Return how many documents the harness's sampler needs: one more where it may meet the asked one."""
    meets_asked = not isinstance(task.sampler, FirstNSampler) or _examples_from(task) == _evaluated_split(task)
    return examples + 1 if _leaves_out_asked(task) and meets_asked else examples


def _scores(metrics: dict[str, Any]) -> dict[str, Score]:
    """Return scores by metric, with the harness's filter in the name where a metric has several."""
    keys = [key for key in metrics if "," in key and not key.partition(",")[0].endswith("_stderr")]
    names = Counter(key.partition(",")[0] for key in keys)
    scores: dict[str, Score] = {}
    for key in keys:
        metric, _, chosen = key.partition(",")
        error = metrics.get(f"{metric}_stderr,{chosen}")
        score = Score(float(metrics[key]), float(error) if isinstance(error, int | float) else None)
        scores[metric if names[metric] == 1 or metric == "bits_per_byte" else f"{metric},{chosen}"] = score
    return scores
