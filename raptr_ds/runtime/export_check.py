"""Whether the run's exports can be made, found out while the run is being built: before training, not hours later."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from raptr_ds.config.run import RunConfig
from raptr_ds.errors import ConfigError
from raptr_ds.runtime.exports import EXPORTS
from raptr_ds.runtime.side_process import SideProcess
from raptr_ds.user_paths import FIX_SAVE, make_folder, write_error

_SECONDS = 300.0
_KEY = "raptr_ds.checkpoint.export_interval"


class ExportCheck:
    """tools/export_hf.py --check on the run, in a process of its own: transformers takes seconds to import.

    Does nothing where the run has no exports. report: prints messages.
    Raises: ConfigError if a package is missing; PathError or StorageError.
    """

    def __init__(self, config: RunConfig, folder: Path, report: Callable[[str], None]) -> None:
        self._report, self._process = report, None
        self._interval = config.checkpoint.export_interval
        if not self._interval:
            return
        _needs("transformers", f"{_KEY}={self._interval}")
        if config.eval.tasks:
            _needs("lm_eval", f"raptr_ds.eval.tasks={list(config.eval.tasks)}")
        self._log = folder / EXPORTS / "check.log"
        make_folder(self._log.parent)
        try:
            self._log.unlink(missing_ok=True)
            words = ["export_hf.py", "--check", "-"]
            self._process = SideProcess(words, self._log, _SECONDS, text=json.dumps(config.resolved()))
        except OSError as error:
            raise write_error(self._log.parent, error, FIX_SAVE) from error

    def finish(self) -> None:
        """Wait for the answer. Raises: ConfigError if the run cannot be exported."""
        if self._process is None:
            return
        end = self._process.wait()
        if end.is_mistake:
            raise ConfigError(f"{_KEY}={self._interval}: {end.failure} Or set export_interval to 0, to train without.")
        if end.failure is None:
            self._log.unlink(missing_ok=True)
        else:
            self._report(f"warning: whether this run can be exported was not found out ({end.failure}; {self._log})")

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process is not None:
            self._process.stop()


def _needs(package: str, key: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{key} needs the {package} package. Install it (pip install {package}), or remove the key.")
