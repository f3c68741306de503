"""Names of tasks: the harness's own, and ours for groups of them, to configurations of single tasks."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import GROUP_FIELD_NAMES
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from raptr_ds.errors import ConfigError, nearest
from raptr_ds.evaluation.packaged_tasks import READY_TASKS
from raptr_ds.hf import squad_metrics

GROUPS = {
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"),
    "qa": ("triviaqa", "nq_open", "webqs", "squadv2", "coqa", "drop"),
}
"""Groups of ours: the tasks that the method's claim is about."""

_IS_NAME = re.compile(r"[\w.-]+")
_OFTEN_IN = ("super_glue", "glue", "arc", "siqa")
"""Folders of the harness to look into first, beside those that are called as the task."""

_NAME = re.compile(r"""^task:[ \t]*["']?([\w.-]+)""", re.MULTILINE)


class Catalogue:
    """All tasks that can be named.

    The harness parses 14,000 files to list its tasks, which takes ten seconds. Names of single tasks are found without.
    """

    def __init__(self) -> None:
        squad_metrics.stand_in()
        self._paths: dict[str, Path] = {}

    @cached_property
    def _index(self) -> dict[str, Entry]:
        return TaskManager().task_index

    def expand(self, names: Iterable[str]) -> list[str]:
        """Return the tasks that names stand for, each once: tasks, groups, tags, and patterns such as mmlu_*.

        Raises: ConfigError for an unknown name.
        """
        names = [member for name in names for member in GROUPS.get(name, (name,))]
        unseen = {name for name in names if _IS_NAME.fullmatch(name)} - READY_TASKS.keys() - self._paths.keys()
        self._paths |= _files_of(unseen)
        if set(names) <= self._paths.keys() | READY_TASKS.keys():
            return list(dict.fromkeys(names))
        return list(dict.fromkeys(leaf for name in names for leaf in self._leaves_named(name)))

    def configuration(self, task: str) -> dict[str, Any]:
        """Return the harness's configuration of a single task, a new one each time."""
        if task in READY_TASKS:
            return _ready_configuration(task)
        if task not in self._paths:
            self._paths |= _files_of({task})
        if task not in self._paths:
            path = self._index[task].yaml_path
            assert path is not None
            self._paths[task] = Path(path)
        return dict(load_yaml(self._paths[task], resolve_func=True))

    def _leaves_named(self, name: str) -> Iterator[str]:
        known = [*READY_TASKS, *self._index]
        matching = [name] if name in known else [other for other in known if fnmatchcase(other, name)]
        if not matching:
            known = [*GROUPS, *known]
            raise ConfigError(
                f"there is no task {name!r}{nearest(name, known) or '.'} Tasks are those of lm-evaluation-harness "
                f"(lm-eval ls tasks), the groups {' and '.join(GROUPS)}, and {', '.join(READY_TASKS)}."
            )
        for match in matching:
            yield from [match] if match in READY_TASKS else self._leaves(self._index[match])

    def _leaves(self, entry: Entry) -> Iterator[str]:
        if entry.kind is Kind.TAG:
            yield from sorted(entry.tags)
        elif entry.kind is Kind.GROUP:
            yield from self._members(entry.name, entry.cfg or {})
        else:
            yield entry.name

    def _members(self, group: str, configuration: dict[str, Any]) -> Iterator[str]:
        settings = {key: value for key, value in configuration.items() if key not in GROUP_FIELD_NAMES | {"tag"}}
        for member in configuration.get("task") or []:
            if isinstance(member, dict) and isinstance(member.get("task"), list):
                leaves = list(self._members(group, member))
            elif isinstance(member, str) and member in self._index:
                leaves = list(self._leaves(self._index[member]))
            else:
                leaves = []
            own = [self._index[leaf].cfg or {} for leaf in leaves]
            if not leaves or any(one.get(key) != value for one in own for key, value in settings.items()):
                raise ConfigError(
                    f"the group {group} changes the settings of a member, {member!r}. Name the tasks that you mean."
                )
            yield from leaves


def _files_of(names: set[str]) -> dict[str, Path]:
    """Return the files that configure single tasks of these names; of several, the one that the harness takes."""
    root = Path(lm_eval.tasks.__file__).parent
    found: dict[str, Path] = {}
    for folders in ([root / name for name in (*names, *_OFTEN_IN)], [root]):
        missing = names - found.keys()
        if not missing:
            break
        for path in (path for folder in folders for path in folder.rglob("*.yaml")):
            match = _NAME.search(path.read_text(encoding="utf-8"))
            if match and match[1] in missing:
                found[match[1]] = min(path, found.get(match[1], path), key=Path.as_posix)
    return found


def _ready_configuration(name: str) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": "loglikelihood",
        "validation_split": "validation",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "num_fewshot": 0,  # the examples are in the context
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
