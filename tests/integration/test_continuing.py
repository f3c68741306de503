"""What a run is when it is started again: itself, or refused; and what it does when it cannot write or must wait."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from raptr_ds.checkpoint import manager
from raptr_ds.data.loader import Loader
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine import zero
from raptr_ds.parallel.launch import Launch
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from raptr_ds.prepare.tokenizer_training import TokenizerSettings
from raptr_ds.runtime import setup
from raptr_ds.runtime.events import EventLog
from raptr_ds.runtime.run_lock import RunLock
from tests.integration.conftest import forked, lines_of, tiny_run, training_lines
from tests.made_up_text import TextSource, made_up_text


def run_with(tmp_path: Path, data: Path, **sections: dict[str, Any]) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_run(data, tmp_path / "run", **sections)))
    return path


def prepared(folder: Path, text: list[str], **settings: Any) -> Path:
    Preparation([TextSource(text)], folder, PreparationSettings(**settings), report=lambda line: None).run()
    return folder


def events_of(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]


def manifest_of(save: Path, step: int) -> dict[str, Any]:
    return json.loads((save / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


def test_another_tokenizer_of_the_same_size_is_refused(data_folder: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", [made_up_text(1, 900)], tokenizer=TokenizerSettings(600, num_sentinels=100))
    assert Tokenizer.load(other / "tokenizer.model").vocab_size == 600
    run = run_with(tmp_path, data_folder)
    assert forked(run).returncode == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    more = ["raptr_ds.train.steps=14", f"raptr_ds.data.path={other}"]
    refused = forked(run, *more, processes=2)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.count("raptr_ds: ") == 1
    for part in ("another tokenizer", Tokenizer.load(other / "tokenizer.model").digest, "--tokenizer FILE"):
        assert part in refused.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    elsewhere = [*more, f"raptr_ds.train.save={tmp_path / 'new'}", f"raptr_ds.checkpoint.load={tmp_path / 'run'}"]
    assert forked(run, *elsewhere).returncode == 2  # from another folder too
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_another_corpus_of_the_same_tokenizer_is_said_and_written_down(data_folder: Path, tmp_path: Path) -> None:
    words = (data_folder.parent / "text.jsonl").read_text().split()
    other = prepared(tmp_path / "other", [" ".join(words[:3000])], tokenizer_path=str(data_folder / "tokenizer.model"))
    run = run_with(tmp_path, data_folder)
    assert forked(run).returncode == 0
    done = forked(run, "raptr_ds.train.steps=14", f"raptr_ds.data.path={other}", "optimizer.params.lr=5e-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: the corpus is another than the checkpoint's" in done.stdout
    assert "changed since the checkpoint: optimizer.params.lr=0.001, now 0.0005" in done.stdout
    (line,) = [line for line in lines_of(tmp_path / "run") if "corpus" in line]
    before, now = line["corpus_before"], line["corpus"]
    assert line["step"] == 12
    assert before in done.stdout
    assert now in done.stdout
    assert manifest_of(tmp_path / "run", 12)["run_state"]["identity"]["corpus"] == before
    assert manifest_of(tmp_path / "run", 14)["run_state"]["identity"]["corpus"] == now
    (changed,) = [event for event in events_of(tmp_path / "run") if event["event"] == "changed"]
    assert changed["corpus"] == [before, now]
    assert changed["keys"]["optimizer.params.lr"] == [1e-3, 5e-4]
    # The same tokens in another folder are the same corpus.
    assert "warning: the corpus" not in forked(run, "raptr_ds.train.steps=15", f"raptr_ds.data.path={other}").stdout


def test_a_changed_batch_neither_skips_nor_repeats_samples(data_folder: Path, tmp_path: Path) -> None:
    run = run_with(tmp_path, data_folder)
    assert forked(run).returncode == 0
    assert manifest_of(tmp_path / "run", 12)["run_state"]["next_sample"] == 48
    assert forked(run, "raptr_ds.train.steps=14", "train_batch_size=8", processes=2).returncode == 0
    assert manifest_of(tmp_path / "run", 14)["run_state"]["next_sample"] == 48 + 2 * 8


def _fail_last_save(_: Launch) -> None:
    publish = manager.publish

    def failing(unfinished: Path, final: Path, manifest: bytes) -> None:
        if final.name.endswith("12"):
            raise OSError(28, "No space left on device")
        publish(unfinished, final, manifest)

    manager.publish = failing  # type: ignore[assignment]


def _started_again(_: Launch) -> None:
    os.environ["RAPTR_RESTART_COUNT"] = "1"


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_started_again_on_other_processes_keeps_its_course(
    first: int, second: int, data_folder: Path, tmp_path: Path
) -> None:
    """The file's sizes fit the first number of processes only; losses are those of the undisturbed run."""
    whole = run_with(tmp_path, data_folder, train={"save": str(tmp_path / "whole")})
    assert forked(whole, processes=first).returncode == 0
    sizes = {"train_micro_batch_size_per_gpu": 4 // first, "gradient_accumulation_steps": 1}
    run = tmp_path / "again.json"
    run.write_text(json.dumps({**tiny_run(data_folder, tmp_path / "run", checkpoint={"interval": 5}), **sizes}))
    assert forked(run, processes=first, spoil=_fail_last_save).returncode == 74  # continues from step 10
    done = forked(run, processes=second, spoil=_started_again)
    assert done.returncode == 0, done.stderr
    assert f"started again on {second} data-parallel ranks; the global batch stays 4" in done.stdout
    found, expected = (training_lines(tmp_path / name) for name in ("run", "whole"))
    assert [line["step"] for line in found] == list(range(1, 13))
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 2e-6)):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=tolerance)


def test_a_run_begun_from_a_checkpoint_continues_its_own(data_folder: Path, tmp_path: Path) -> None:
    first = run_with(tmp_path, data_folder)
    assert forked(first).returncode == 0
    second = ["raptr_ds.checkpoint.interval=1", f"raptr_ds.train.save={tmp_path / 'second'}"]
    second += [f"raptr_ds.checkpoint.load={tmp_path / 'run'}"]
    assert forked(first, *second, "raptr_ds.train.steps=14").returncode == 0
    again = forked(first, *second, "raptr_ds.train.steps=16")  # the same command, as after a kill
    assert again.returncode == 0
    assert "has come to step 14 since: it continues there" in again.stdout
    assert [line["step"] for line in training_lines(tmp_path / "second")] == [13, 14, 15, 16]
    third = run_with(tmp_path, data_folder, train={"save": str(tmp_path / "third")})
    assert forked(third).returncode == 0
    origin = [f"raptr_ds.train.save={tmp_path / 'third'}", f"raptr_ds.checkpoint.load={tmp_path / 'run'}"]
    moved = forked(first, *origin, "raptr_ds.train.steps=14")
    assert "were moved to" in moved.stdout  # its own are of another origin: begun anew, as asked
    # What the folder had of the earlier run is not mixed with what this one measures.
    assert [line["step"] for line in training_lines(tmp_path / "third")] == [13, 14]
    aside = (tmp_path / "third" / "metrics.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside if "lr" in json.loads(line)] == list(range(1, 13))


def _stop_at_the_start(_: Launch) -> None:
    validation = Loader.validation

    def stopping(loader: Loader, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return validation(loader, index)

    Loader.validation = stopping  # type: ignore[method-assign]


def test_a_run_begun_from_the_end_of_another_has_a_checkpoint_of_its_own(data_folder: Path, tmp_path: Path) -> None:
    run = run_with(tmp_path, data_folder)
    assert forked(run).returncode == 0
    for name, spoil, code in (("stopped", _stop_at_the_start, 75), ("trained", None, 0)):
        elsewhere = [f"raptr_ds.train.save={tmp_path / name}", f"raptr_ds.checkpoint.load={tmp_path / 'run'}"]
        done = forked(run, *elsewhere, spoil=spoil)
        assert done.returncode == code, done.stdout + done.stderr
        assert manifest_of(tmp_path / name, 12)["step"] == 12


def _restarted_before_its_first_checkpoint(_: Launch) -> None:
    os.environ.update(RAPTR_RESTART_COUNT="1", RAPTR_SUPERVISOR="host:77")


def _restarted_after_it(_: Launch) -> None:
    os.environ.update(RAPTR_RESTART_COUNT="2", RAPTR_SUPERVISOR="host:77")


@pytest.mark.parametrize("load", ["run", "none"])
def test_a_restart_before_the_first_checkpoint_begins_where_its_user_asked(
    load: str, data_folder: Path, tmp_path: Path
) -> None:
    """The folder has checkpoints of an earlier run, and the first start died before it had looked at any."""
    run = run_with(tmp_path, data_folder)
    assert forked(run).returncode == 0
    where = str(tmp_path / "run") if load == "run" else load
    settings = [f"raptr_ds.train.save={tmp_path / 'new'}", f"raptr_ds.checkpoint.load={where}"]
    assert forked(run, settings[0], "raptr_ds.train.steps=5").returncode == 0
    first = forked(run, *settings, "raptr_ds.train.steps=13", spoil=_restarted_before_its_first_checkpoint)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "new" / "checkpoints" / "set-aside-1" / "step-00000005").is_dir()
    begin = 12 if load == "run" else 0
    assert [line["step"] for line in training_lines(tmp_path / "new")] == list(range(begin + 1, 14))
    again = forked(run, *settings, "raptr_ds.train.steps=15", spoil=_restarted_after_it)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in training_lines(tmp_path / "new")] == list(range(begin + 1, 16))


def _stop_when_step_6_is_being_saved(_: Launch) -> None:
    record = EventLog.record

    def recording(log: EventLog, event: str, **what: Any) -> None:
        record(log, event, **what)
        if event == "checkpoint" and what["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    EventLog.record = recording  # type: ignore[method-assign]


def _stop_at_once(_: Launch) -> None:
    initialize = setup.PathAgreement.__init__

    def stopping(*arguments: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        initialize(*arguments, **named)

    setup.PathAgreement.__init__ = stopping  # type: ignore[method-assign]


def test_a_stop_saves_no_state_twice(data_folder: Path, tmp_path: Path) -> None:
    """The signal's lead is for what is not on the disk yet."""
    run = run_with(tmp_path, data_folder, checkpoint={"interval": 1})
    stopped = forked(run, spoil=_stop_when_step_6_is_being_saved)
    assert stopped.returncode == 75, stopped.stderr
    saved = [event["step"] for event in events_of(tmp_path / "run") if event["event"] == "checkpoint"]
    assert saved == list(range(1, saved[-1] + 1))
    stopped = forked(run, spoil=_stop_at_once)
    assert stopped.returncode == 75, stopped.stderr
    assert [event["step"] for event in events_of(tmp_path / "run") if event["event"] == "checkpoint"] == saved


def _lose_the_end(launch: Launch) -> None:
    record = EventLog.record

    def recording(log: EventLog, event: str, **what: Any) -> None:
        if event == "end" and log._lines is not None:  # as on a disk that is full by now
            log._lines.failure = "No space left on device"
        else:
            record(log, event, **what)

    EventLog.record = recording  # type: ignore[method-assign]


def test_an_end_that_is_not_recorded_is_not_done(data_folder: Path, tmp_path: Path) -> None:
    """A supervisor counts a run as done by its record."""
    run = run_with(tmp_path, data_folder)
    lost = forked(run, spoil=_lose_the_end)
    assert lost.returncode == 74, lost.stdout + lost.stderr
    assert "events.jsonl cannot be written: No space left on device. Start again to go on." in lost.stdout
    assert forked(run).returncode == 0
    assert events_of(tmp_path / "run")[-1] | {"time": 0} == {"time": 0, "event": "end", "exit_code": 0}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_last_checkpoint_that_is_not_written_is_not_done(processes: int, data_folder: Path, tmp_path: Path) -> None:
    run = run_with(tmp_path, data_folder, checkpoint={"interval": 5})
    failed = forked(run, processes=processes, spoil=_fail_last_save)
    assert failed.returncode == 74, failed.stdout + failed.stderr
    assert "the checkpoint of step 12: cannot complete" in failed.stdout
    assert [event["step"] for event in events_of(tmp_path / "run") if event["event"] == "checkpoint_failed"] == [12]
    assert events_of(tmp_path / "run")[-1] | {"time": 0} == {"time": 0, "event": "end", "exit_code": 74}
    assert forked(run, processes=processes).returncode == 0
    assert manifest_of(tmp_path / "run", 12)["step"] == 12


def _delay_rank_1(launch: Launch) -> None:
    """Make rank 1 slow to make its last group, and print when it has it, and when each rank gives up all groups."""
    agreement, destroy = setup.PathAgreement, dist.destroy_process_group

    def late(*arguments: Any) -> Any:
        made = agreement(*arguments)
        time.sleep(2 * launch.rank)
        print(f"rank {launch.rank} made {time.monotonic()}")
        return made

    def leave() -> None:
        print(f"rank {launch.rank} left {time.monotonic()}")
        destroy()

    setup.PathAgreement = late  # type: ignore[assignment, misc]
    dist.destroy_process_group = leave


def test_no_rank_of_a_finished_run_leaves_before_all_are_there(data_folder: Path, tmp_path: Path) -> None:
    """Rank 0 serves the store by which the others still make their groups."""
    run = run_with(tmp_path, data_folder)
    assert forked(run, processes=2).returncode == 0
    again = forked(run, processes=2, spoil=_delay_rank_1)
    assert again.returncode == 0, again.stderr
    assert "this run is complete" in again.stdout
    times = {(rank, what): float(at) for rank, what, at in re.findall(r"rank (\d) (made|left) (\S+)", again.stdout)}
    assert times["0", "left"] > times["1", "made"]


def test_a_run_that_begins_at_its_end_does_not_print_another_ones_loss(data_folder: Path, tmp_path: Path) -> None:
    """An earlier run of as many steps has left its metrics in the folder."""
    run = run_with(tmp_path, data_folder, eval={"interval": 4, "batches": 1})
    assert forked(run).returncode == 0
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "new")
    begun = forked(run, f"raptr_ds.train.save={tmp_path / 'new'}", f"raptr_ds.checkpoint.load={tmp_path / 'run'}")
    assert begun.returncode == 0, begun.stderr
    assert "this run is complete: 12 of 12 steps are trained. Raise" in begun.stdout


def test_metrics_of_a_finished_run_that_are_damaged_are_named_once(data_folder: Path, tmp_path: Path) -> None:
    run = run_with(tmp_path, data_folder)
    assert forked(run, processes=2).returncode == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("\n" + metrics.read_text())
    again = forked(run, processes=2)
    assert again.returncode == 2, again.stderr
    assert again.stderr.count("raptr_ds: ") == again.stderr.count("metrics.jsonl, line 1 is not a JSON object") == 1


def _stop_in_an_evaluation(launch: Launch) -> None:
    validation, asked = Loader.validation, []

    def stopping(loader: Loader, index: int) -> Any:
        asked.append(index)
        if launch.rank == launch.world_size - 1 and asked.count(1) == 2:  # in the second evaluation
            os.kill(os.getpid(), signal.SIGUSR1)
        return validation(loader, index)

    Loader.validation = stopping  # type: ignore[method-assign]


def test_a_stop_in_an_evaluation_does_not_wait_for_its_end(data_folder: Path, tmp_path: Path) -> None:
    """It is made when the run continues, which then has the lines of one that was not stopped."""
    evaluation = {"interval": 4, "batches": 3}
    undisturbed = run_with(tmp_path, data_folder, eval=evaluation, train={"save": str(tmp_path / "whole")})
    assert forked(undisturbed, processes=2).returncode == 0
    run = run_with(tmp_path, data_folder, eval=evaluation)
    stopped = forked(run, processes=2, spoil=_stop_in_an_evaluation)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert [line["step"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [4]
    assert training_lines(tmp_path / "run")[-1]["step"] == 8
    assert forked(run, processes=2).returncode == 0
    stopped_run, whole = (
        [(line["step"], line["eval_loss"]) for line in lines_of(save) if "eval_loss" in line]
        for save in (tmp_path / "run", tmp_path / "whole")
    )
    assert [step for step, _ in whole] == [4, 8, 12]
    assert stopped_run == whole


def _stop_in_a_growth(launch: Launch) -> None:
    grow = zero.grow_layers

    def stopping(*arguments: Any) -> None:
        if launch.rank == launch.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        grow(*arguments)

    zero.grow_layers = stopping


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_stop_while_the_model_grows_is_noticed_one_step_later(
    pipeline: int, data_folder: Path, tmp_path: Path
) -> None:
    """The grown model is saved with the step that it then trained; the run goes on as one that was not stopped."""
    sections = {"path": {"method": "stacking", "schedule": "2-4"}, "eval": {"batches": 0}}
    sections["parallel"] = {"pipeline_model_parallel_size": pipeline}
    undisturbed = run_with(tmp_path, data_folder, train={"save": str(tmp_path / "whole")}, **sections)
    assert forked(undisturbed, processes=2).returncode == 0
    run = run_with(tmp_path, data_folder, **sections)
    stopped = forked(run, processes=2, spoil=_stop_in_a_growth)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    last = training_lines(tmp_path / "run")[-1]
    assert last["path"] == [0, 1, 2, 3]
    assert sum(line["path"] == last["path"] for line in training_lines(tmp_path / "run")) <= 2
    assert forked(run, processes=2).returncode == 0
    stopped_run, whole = (
        [(line["step"], line["path"], line["loss"], line["grad_norm"]) for line in training_lines(save)]
        for save in (tmp_path / "run", tmp_path / "whole")
    )
    assert stopped_run == whole


def test_a_second_run_in_the_folder_is_refused(data_folder: Path, tmp_path: Path) -> None:
    run = run_with(tmp_path, data_folder)
    held = RunLock(tmp_path / "run", Launch(0, 0, 1, "", 1, "none"))
    refused = forked(run, processes=2)
    held.release()
    assert refused.returncode == 2
    assert refused.stderr.count("raptr_ds: ") == 1
    assert f"another run works in {tmp_path / 'run'}: process {os.getpid()}" in refused.stderr
    assert forked(run).returncode == 0
    assert not (tmp_path / "run" / "run.lock").exists()
