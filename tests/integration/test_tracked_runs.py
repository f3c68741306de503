"""A whole run with fakes of Weights & Biases and MLflow: a resume continues their runs, an outage ends nothing."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from raptr_ds.parallel.launch import Launch
from tests.integration.conftest import forked, training_lines
from tests.trackers import Server, fake_mlflow, fake_wandb

LOG = ("raptr_ds.log.wandb.project=raptr", "raptr_ds.log.mlflow.experiment=raptr")


class _ServerWithFile(Server):
    """Keeps its calls in a file: the process of the run is gone when the test looks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def take(self, *call: Any) -> None:
        super().take(*call)
        with self._path.open("a") as file:
            file.write(json.dumps(call) + "\n")


def _install_fakes(launch: Launch, folder: Path, is_away: bool = False) -> None:
    assert launch.rank == 0 or folder.exists()
    for name, fake in (("wandb", fake_wandb), ("mlflow", fake_mlflow)):
        server = _ServerWithFile(folder / name)
        server.is_away = is_away
        sys.modules[name] = fake(server)


def _remove_packages(launch: Launch) -> None:
    sys.modules["wandb"] = sys.modules["mlflow"] = None  # type: ignore[assignment]


def _calls(path: Path, name: str) -> list[list[Any]]:
    return [call for line in path.read_text().splitlines() if (call := json.loads(line))[0] == name]


def test_a_resume_continues_the_same_runs_which_have_every_line(run_file: Path, tmp_path: Path) -> None:
    spoil = partial(_install_fakes, folder=tmp_path)
    for steps in (4, 8):
        done = forked(run_file, *LOG, f"raptr_ds.train.steps={steps}", processes=2, spoil=spoil)
        assert done.returncode == 0, done.stderr
    first, second = _calls(tmp_path / "wandb", "init")
    assert first == second
    assert first[1]["dir"] == str(tmp_path / "run")
    begun, continued = _calls(tmp_path / "mlflow", "start_run")
    assert begun[1]["run_id"] is None
    assert continued[1]["run_id"] == "run-1"
    losses = [(line["step"], line["loss"]) for line in training_lines(tmp_path / "run")]
    assert [step for step, _ in losses] == list(range(1, 9))
    for name in ("wandb", "mlflow"):
        sent = [call[1:] for call in _calls(tmp_path / name, "log")]
        assert [(step, values["train/loss"]) for step, values in sent if "train/loss" in values] == losses
        assert {step for step, values in sent if "eval/loss_of_4_layers" in values} == {4, 8}


def test_an_outage_from_the_first_to_the_last_step_ends_nothing(run_file: Path, tmp_path: Path) -> None:
    done = forked(run_file, *LOG, spoil=partial(_install_fakes, folder=tmp_path, is_away=True))
    assert done.returncode == 0, done.stderr
    assert len(training_lines(tmp_path / "run")) == 12
    for name in ("Weights & Biases", "MLflow"):
        assert f"{name}: the server is away: it has not all of the run's metrics; metrics.jsonl has" in done.stdout


def test_a_missing_package_is_a_users_mistake_before_training(run_file: Path, tmp_path: Path) -> None:
    done = forked(run_file, *LOG, processes=2, spoil=_remove_packages)
    assert done.returncode == 2
    assert done.stderr.count("raptr_ds.log.wandb needs the wandb package") == 1
    assert "Traceback" not in done.stderr
    assert not training_lines(tmp_path / "run")
