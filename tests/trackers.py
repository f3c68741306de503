"""Fakes of wandb and mlflow: the parts of their documented interface that we call, backed by a list of calls.

For what the packages do not do without a network: being away, or slow. The signatures are those of
https://docs.wandb.ai/ref/python/ (init, Run.log, Run.define_metric, Run.finish) and
https://mlflow.org/docs/latest/python_api/mlflow.html (set_tracking_uri, get_tracking_uri, set_experiment, start_run,
log_metrics, end_run).
"""

import sys
import threading
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from types import ModuleType, SimpleNamespace
from typing import Any


class Server:
    """What a tracking server was asked; while `is_away` every call fails, while `hangs` is not set it waits."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.is_away = False
        self.answers = threading.Event()
        self.answers.set()
        self.threads: set[str] = set()

    def take(self, *call: Any) -> None:
        self.answers.wait()
        self.threads.add(threading.current_thread().name)
        if self.is_away:
            raise ConnectionError("the server is away\nand much more of it")
        self.calls.append(call)

    def of(self, name: str) -> list[Any]:
        """Return the arguments of all calls of a name."""
        return [call[1] if len(call) == 2 else call[1:] for call in self.calls if call[0] == name]


class _WandbRun:
    def __init__(self, server: Server) -> None:
        self._server = server

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if commit is False:
            self._server.take("log_more", dict(data))
        else:
            self._server.take("log", step, dict(data))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._server.take("define_metric", name, step_metric)

    def finish(self, exit_code: int | None = None) -> None:
        self._server.take("finish", exit_code)


def fake_wandb(server: Server) -> ModuleType:
    module: Any = ModuleType("wandb")

    def init(
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        group: str | None = None,
        mode: str | None = None,
        resume: str | None = None,
    ) -> _WandbRun:
        given = {"entity": entity, "project": project, "dir": dir, "id": id, "name": name, "group": group}
        server.take("init", {**given, "mode": mode, "resume": resume})
        return _WandbRun(server)

    module.init = init
    return module


def fake_mlflow(server: Server) -> ModuleType:
    module: Any = ModuleType("mlflow")

    def start_run(run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None) -> Any:
        server.take("start_run", {"run_id": run_id, "run_name": run_name})
        made = len(server.of("start_run"))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or f"run-{made}"))

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
        server.take("log", step, dict(metrics))

    module.set_tracking_uri = lambda uri: server.take("set_tracking_uri", uri)
    module.get_tracking_uri = lambda: "http://user:secret@tracking:5000"  # as the environment has it
    module.set_experiment = lambda experiment_name: server.take("set_experiment", experiment_name)
    module.start_run, module.log_metrics = start_run, log_metrics
    module.end_run = lambda status="FINISHED": server.take("end_run", status)
    return module


def install(monkeypatch: Any, server: Server) -> None:
    """Let `import wandb` and `import mlflow` find the fakes."""
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(server))
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(server))


class Absent(MetaPathFinder):
    """Has a package not be there; put in front of sys.meta_path, with the package taken from sys.modules."""

    def __init__(self, *packages: str) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname in self._packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}")
