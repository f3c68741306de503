"""Whether the run's exports can be made and scored: found out while the run is being built, not hours later."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from raptr_ds.config.run import RunConfig
from raptr_ds.errors import ConfigError
from raptr_ds.runtime.exports import EXPORTS, evaluation_words
from raptr_ds.runtime.side_process import SideProcess
from raptr_ds.user_paths import make_folder, writing

_SECONDS = 300.0


class ExportCheck:
    """The tools' own checks of the run, in processes of their own: transformers takes seconds to import.

    Does nothing where the run has no exports, or the check is not wanted. report: prints messages.
    Raises: ConfigError if a package is missing; PathError or StorageError.
    """

    def __init__(self, config: RunConfig, folder: Path, report: Callable[[str], None], is_wanted: bool) -> None:
        self._report = report
        self._running: list[tuple[str, Path, SideProcess]] = []  # with the key that is checked, and the log
        interval, tasks = config.checkpoint.export_interval, config.eval.tasks
        if is_wanted and interval:
            key, log = f"raptr_ds.checkpoint.export_interval={interval}", folder / EXPORTS / "check.log"
            self._start(key, "transformers", log, ["export_hf.py", "--check", "-"], json.dumps(config.resolved()))
        if is_wanted and interval and tasks:
            key, log = f"raptr_ds.eval.tasks={list(tasks)}", folder / EXPORTS / "tasks-check.log"
            self._start(key, "lm_eval", log, evaluation_words(config.eval, "--check"))

    def _start(self, key: str, package: str, log: Path, words: Sequence[str], text: str = "") -> None:
        if find_spec(package) is None:
            raise ConfigError(
                f"{key} needs the {package} package. Install it (pip install {package}), or remove the key."
            )
        make_folder(log.parent)
        with writing(log.parent):
            log.unlink(missing_ok=True)
            self._running.append((key, log, SideProcess(words, log, _SECONDS, text=text)))

    def finish(self) -> None:
        """Wait for the answers. Raises: ConfigError if the run cannot be exported, or not scored."""
        for key, log, process in self._running:
            end = process.wait()
            if end.is_mistake:
                raise ConfigError(f"{key}: {end.failure} Or remove the key, to train without.")
            if end.failure is None:
                log.unlink(missing_ok=True)
            else:
                self._report(f"warning: whether {key} can be done was not found out ({end.failure}; {log})")

    def close(self) -> None:
        """End the processes if they still run."""
        for _, _, process in self._running:
            process.stop()
