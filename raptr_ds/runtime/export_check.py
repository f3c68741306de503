"""Whether the run's exports can be made and scored: found out while the run is being built, not hours later."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from raptr_ds.config.run import RunConfig
from raptr_ds.errors import ConfigError
from raptr_ds.runtime.exports import EXPORTS, task_check_command
from raptr_ds.runtime.side_process import SideProcess
from raptr_ds.user_paths import make_folder, writing

_SECONDS = 300.0
_INTERVAL, _TASKS = "raptr_ds.checkpoint.export_interval", "raptr_ds.eval.tasks"


class ExportCheck:
    """The tools' own checks of the run, in processes of their own: transformers takes seconds to import.

    Does nothing where the run has no exports. report: prints messages.
    Raises: ConfigError if a package is missing; PathError or StorageError.
    """

    def __init__(self, config: RunConfig, folder: Path, report: Callable[[str], None]) -> None:
        self._report, self._folder = report, folder / EXPORTS
        self._processes: dict[str, SideProcess] = {}
        if not (interval := config.checkpoint.export_interval):
            return
        exporting, tasks = f"{_INTERVAL}={interval}", f"{_TASKS}={list(config.eval.tasks)}"
        _needs("transformers", exporting)
        make_folder(self._folder)
        self._start(exporting, ["export_hf.py", "--check", "-"], json.dumps(config.resolved()))
        if config.eval.tasks:
            _needs("lm_eval", tasks)
            self._start(tasks, task_check_command(config.eval))

    def _start(self, key: str, words: list[str], text: str = "") -> None:
        log = self._log(key)
        with writing(self._folder):
            log.unlink(missing_ok=True)
            self._processes[key] = SideProcess(words, log, _SECONDS, text=text)

    def _log(self, key: str) -> Path:
        return self._folder / ("tasks-check.log" if key.startswith(_TASKS) else "check.log")

    def finish(self) -> None:
        """Wait for the answers. Raises: ConfigError if the run cannot be exported, or not scored."""
        for key, process in self._processes.items():
            end = process.wait()
            if end.is_mistake:
                raise ConfigError(f"{key}: {end.failure} Or remove the key, to train without.")
            if end.failure is None:
                self._log(key).unlink(missing_ok=True)
            else:
                self._report(f"warning: whether {key} can be done was not found out ({end.failure}; {self._log(key)})")

    def close(self) -> None:
        """End the processes if they still run."""
        for process in self._processes.values():
            process.stop()


def _needs(package: str, key: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{key} needs the {package} package. Install it (pip install {package}), or remove the key.")
