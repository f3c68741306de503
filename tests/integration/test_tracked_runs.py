"""A whole run with Weights & Biases and MLflow, and with fakes of them that fail: a resume continues their runs."""

import json
import os
import struct
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2  # names are made when it is imported

from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.tracking import _import
from tests.integration.conftest import forked, training_lines
from tests.trackers import Absent, Server, fake_mlflow, fake_wandb

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
    for package in ("wandb", "mlflow"):
        sys.modules.pop(package, None)
    sys.meta_path.insert(0, Absent("wandb", "mlflow"))


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


def _allow_folders(launch: Launch) -> None:
    assert launch.world_size == 2
    # mlflow 3.17 wants a database; its client in one package (mlflow-skinny) has none.
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"


def test_the_real_packages_have_every_line_after_a_resume(run_file: Path, tmp_path: Path) -> None:
    """Weights & Biases offline, and MLflow with a folder: what they wrote is read back by their own code."""
    where = ("raptr_ds.log.wandb.mode=offline", f"raptr_ds.log.mlflow.tracking_uri=file://{tmp_path}/mlruns")
    for steps in (4, 8):
        done = forked(run_file, *LOG, *where, f"raptr_ds.train.steps={steps}", processes=2, spoil=_allow_folders)
        assert done.returncode == 0, done.stderr
        assert "has not all of the run's metrics" not in done.stdout
    losses = {line["step"]: line["loss"] for line in training_lines(tmp_path / "run")}
    assert sorted(losses) == list(range(1, 9))
    assert _offline_losses(tmp_path / "run" / "wandb") == losses
    assert _losses_of_mlflow(tmp_path / "mlruns") == losses


def _offline_losses(folder: Path) -> dict[int, float]:
    """Return what Weights & Biases would send of offline runs that are all one run to it."""
    files = sorted(folder.glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "of one run's number"
    losses = {}
    for file in files:
        for data in _records(file.read_bytes()[7:]):  # after the header
            record = wandb_internal_pb2.Record.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                losses[int(values["_step"])] = json.loads(values["train/loss"])
    return losses


def _records(log: bytes) -> Iterator[bytes]:
    """Split a log as LevelDB writes them (doc/log_format.md there): blocks of 32 KiB, each of whole or cut records."""
    block, place, record = 32768, 7, b""
    while place < len(log) + 7:
        if block - place % block < 7:  # no room for the head of another
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", log, place - 7)
        record += log[place : place + size]
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
        place += 7 + size


def _losses_of_mlflow(folder: Path) -> dict[int, float]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = _import("mlflow").MlflowClient(f"file://{folder}")
    experiment = client.get_experiment_by_name("raptr")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}


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
