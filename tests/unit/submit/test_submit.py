"""Submitting: what is checked on the login node, the words for sbatch and containers, sweeps, and the code's copy."""

import json
import os
import re
import subprocess
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.runtime.run_lock import Holder
from raptr_ds.submit import checks
from raptr_ds.submit.checks import check_disk, check_folder, check_memory, checkpoint_bytes, complete_run_file
from raptr_ds.submit.container import ContainerWords, container_words
from raptr_ds.submit.layout import check_more_options, job_layout
from raptr_ds.submit.request import CheckedRun, Request, Submission, check
from raptr_ds.submit.snapshot import code_files, copy_code, free_number
from raptr_ds.submit.sweep import sweep
from raptr_ds.supervise.record import append_event

NASTY = "a b \"c\" 'd' $(touch ran) `touch ran`; touch ran & #[1]*?"
MODEL = {"architecture": "bert", "num_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "seq_length": 32}


def run_file(folder: Path, **sections: Any) -> Path:
    block = {"model": {**MODEL, "vocab_size": 1000}, "data": {"path": "none"}, "train": {"steps": 10}} | sections
    path = folder / "run.json"
    path.write_text(json.dumps({"train_batch_size": 8, "raptr_ds": block}))
    return path


@pytest.mark.parametrize("nodes", ["0", "4-2", "x", "", "1-", "-3", "2 ", "1-9999"])
def test_wrong_numbers_of_nodes_are_refused(nodes: str) -> None:
    with pytest.raises(ConfigError, match="--nodes"):
        job_layout(nodes, None, None, None, 120)


def test_layouts() -> None:
    layout = job_layout("2-4", 8, None, "2-0", 300)
    assert layout.world_sizes == [32, 24, 16]
    assert layout.words() == [
        *("--nodes=2-4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2-0", "--signal=B:USR1@300")
    ]
    assert job_layout("3", None, None, None, 120).words()[:2] == ["--nodes=3", "--ntasks-per-node=1"]
    for gpus, tasks, time, lead, message in [
        (8, 4, None, 120, "one process drives one GPU"),
        (0, None, None, 120, "0 processes"),
        (None, None, None, 0, "--signal-lead 0"),
        (None, None, None, 70000, "--signal-lead 70000"),
        (None, None, "4", 120, "Give --time=20"),
    ]:
        with pytest.raises(ConfigError, match=message):
            job_layout("1", gpus, tasks, time, lead)


def test_further_options_of_sbatch() -> None:
    assert check_more_options(["--account=a", "--exclusive", "-A", "a", "--qos", "high"], False)[-1] == "high"
    for words in (["--signal=USR1"], ["-N4"], ["--time", "3"], ["-o", "x"], ["x"], ["--account=a", "script.sh"]):
        with pytest.raises(ConfigError, match="after --"):
            check_more_options(words, False)
    for words in (["--dependency=afterok:1"], ["--dependency", "afterok:1"], ["-dafterok:1"]):
        assert check_more_options(words, False) == words
        with pytest.raises(ConfigError, match="it would replace --dependency=singleton"):
            check_more_options(words, True)


def names_of(points: list[list[str]]) -> list[str]:
    return [Path(json.loads(point[-1].partition("=")[2])).name for point in points]


def test_sweeps(tmp_path: Path) -> None:
    points = sweep(["optimizer.params.lr=1e-3,2e-3", "raptr_ds.train.seed=1,2"], tmp_path / NASTY)
    assert names_of(points) == [f"lr={rate},seed={seed}" for rate in ("1e-3", "2e-3") for seed in (1, 2)]
    config = load_run_config(run_file(tmp_path), [points[0][-1]])
    assert config.train.save == str(tmp_path / NASTY / "lr=1e-3,seed=1")
    (tmp_path / "points").write_text("a.b=1 'c.d=[1, 2]'  # two\n\ne.f=../$(x)\n")
    points = sweep([str(tmp_path / "points")], tmp_path)
    assert points[0][:-1] == ["a.b=1", "c.d=[1, 2]"]
    assert re.fullmatch(r"[\w=.,-]+", names_of(points)[0])
    assert [Path(json.loads(point[-1].partition("=")[2])).parent for point in points] == [tmp_path] * 2
    same_end = sweep(["a.x=1", "b.x=1,2"], tmp_path)
    assert len(set(names_of(same_end))) == 2
    (tmp_path / "points").write_text("a.x=1\nb.x=1\nc.y=1\n")
    names = names_of(sweep([str(tmp_path / "points")], tmp_path))
    assert len(set(names)) == 3
    assert names[2] == "y=1"
    (tmp_path / "wrong").write_text("a.b 1\n")
    for words in (
        ["x"],
        ["k="],
        ["k=1,,2"],
        ["k=[1,2]"],
        ["raptr_ds.train.save=a,b"],
        ["k=1,1"],
        [str(tmp_path / "wrong")],
    ):
        with pytest.raises(ConfigError, match="--array"):
            sweep(words, tmp_path)


def test_the_copied_run_file_serves_other_sizes(tmp_path: Path) -> None:
    """It has every value, also those that --set made useless are gone, and no batch size that was derived."""
    file = run_file(tmp_path, path={"method": "raptr", "schedule": "2-3-4"})
    overrides = ["raptr_ds.path.method=full", "raptr_ds.train.save=a b"]
    config = load_run_config(file, overrides, 2)
    copied = tmp_path / "copied.json"
    copied.write_text(complete_run_file(config, file, overrides))
    tree = json.loads(copied.read_text())
    assert "train_batch_size" in tree
    assert "gradient_accumulation_steps" not in tree
    assert load_run_config(copied, (), 2).resolved() == config.resolved()
    assert load_run_config(copied, (), 4).resolved() == load_run_config(file, overrides, 4).resolved()


def test_memory_disk_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(run_file(tmp_path, train={"steps": 10, "save": str(tmp_path / "run" / "x")}), (), 8)
    layout = job_layout("1", 8, None, None, 120)
    assert "--device-memory" in check_memory(config, layout, None)
    assert "GiB of each GPU" in check_memory(config, layout, 80.0)
    with pytest.raises(ConfigError, match="fullest rank needs about"):
        check_memory(config, layout, 0.01)
    for memory in (float("nan"), 0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match="--device-memory"):
            check_memory(config, layout, memory)
    with pytest.raises(ConfigError, match="with --gpus-per-node"):
        check_memory(config, job_layout("1", None, None, None, 120), 80.0)
    matrices = 4 * (12 * 64 * 64)
    assert (
        12 * matrices < checkpoint_bytes(config) < 12 * (matrices + 1100 * 64 + 20 * 64 * 64)
    )  # weights and two moments

    def room(free: int) -> None:
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))

    room(6 * checkpoint_bytes(config))
    assert f"free at {tmp_path}" in check_disk([config] * 2, tmp_path / "run" / "x")
    room(6 * checkpoint_bytes(config) - 1)
    with pytest.raises(ConfigError, match="3 checkpoints"):
        check_disk([config] * 2, tmp_path / "run" / "x")
    # At steps 4, 8 and, the end, 10; each as large as a third of a checkpoint in fp32, a sixth in bf16.
    exporting = {"interval": 2, "export_interval": 4, "export_precision": "bf16"}
    section = config.checkpoint.model_copy(update=exporting)
    config = replace(config, checkpoint=section)
    room(-(-7 * checkpoint_bytes(config) // 2))
    assert "for exports" in check_disk([config], tmp_path / "run" / "x")
    room(7 * checkpoint_bytes(config) // 2 - 1)
    with pytest.raises(ConfigError, match=r"all exports .* raise export_interval"):
        check_disk([config], tmp_path / "run" / "x")
    with pytest.raises(DataError, match="no folder none"):
        checks.load_checked(run_file(tmp_path), (), layout)
    with pytest.raises(ConfigError, match="train_batch_size"):
        checks.load_checked(run_file(tmp_path), (), job_layout("3", None, None, None, 120))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", 0.0)
    holder = Holder("key", "node5", "machine", 7, "1", "77", 0, "noon")
    (tmp_path / "run.lock").write_text(json.dumps({"beat": 3, **asdict(holder)}))
    written = (tmp_path / "run.lock").stat().st_mtime
    with pytest.raises(ConfigError, match="process 7 on node5, Slurm job 77"):
        check_folder(tmp_path, written + 5)
    check_folder(tmp_path, written + 3600)  # of a run that is gone
    with pytest.raises(ConfigError, match="it is no folder"):
        check_folder(tmp_path / "run.lock" / "run", 0.0)
    for name in ("50%", "a\\b", "a\nb"):
        with pytest.raises(ConfigError, match="which Slurm replaces"):
            check_folder(tmp_path / name, 0.0)


def test_the_code_is_copied_once_and_follows_its_content(tmp_path: Path) -> None:
    files = code_files()
    assert {Path("raptr_ds/pretrain.py"), Path("slurm/training_job.sh"), Path("tools/supervise.py")} <= set(files)
    assert not [file for file in files if "__pycache__" in file.parts]
    clone = tmp_path / "clone"
    for name in ("slurm/training_job.sh", "raptr_ds/a.py", "raptr_ds/__pycache__/a.pyc"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(name)
    before = os.umask(0o027)
    try:
        code = copy_code(tmp_path, clone)
    finally:
        os.umask(before)
    assert copy_code(tmp_path, clone) == code
    assert sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()) == [
        *("raptr_ds/a.py", "revision.txt", "slurm/training_job.sh")
    ]
    assert (code.stat().st_mode & 0o777, (code / "raptr_ds/a.py").stat().st_mode & 0o777) == (0o750, 0o640)
    (clone / "raptr_ds" / "a.py").write_text("edited")
    assert copy_code(tmp_path, clone) != code
    assert [path.name for path in tmp_path.glob(".code-*")] == []
    with pytest.raises(ConfigError, match="training_job"):
        copy_code(tmp_path, tmp_path / "empty")
    (tmp_path / "submitted-3.json").touch()
    assert free_number(tmp_path) == 4


def submission(folder: Path, container: ContainerWords | None = None, **options: Any) -> Submission:
    values = {field.name: None for field in fields(Request)} | {"chain": 1, "more_options": (), "home": folder}
    run = CheckedRun(load_run_config(run_file(folder)), folder, "")
    request, layout = Request(**{**values, "venv": "", **options}), job_layout("2", None, None, None, 120)
    return Submission(request, folder, layout, [run, run], container or ContainerWords(), ())


def request(folder: Path, *settings: str, **options: Any) -> Request:
    values = {field.name: None for field in fields(Request)}
    values |= {"run_file": run_file(folder), "set": settings, "nodes": "1", "chain": 1, "array": (), "more_options": ()}
    values |= {"container_runtime": "apptainer", "home": folder, "venv": "", "env": {}}
    return Request(**{**values, **options})


def test_a_chain_whose_jobs_would_start_anew_is_refused(tmp_path: Path, data_folder: Path) -> None:
    settings = [
        f"raptr_ds.data.path={data_folder}",
        "raptr_ds.model.vocab_size=null",
        f"raptr_ds.train.save={tmp_path}/run",
    ]
    check(request(tmp_path, *settings, chain=2))
    check(request(tmp_path, *settings, "raptr_ds.checkpoint.load=none"))
    with pytest.raises(ConfigError, match=r"--chain 2 with raptr_ds\.checkpoint\.load=none"):
        check(request(tmp_path, *settings, "raptr_ds.checkpoint.load=none", chain=2))


def test_the_lead_is_what_any_run_of_a_sweep_has_found_necessary(tmp_path: Path, data_folder: Path) -> None:
    settings = [f"raptr_ds.data.path={data_folder}", "raptr_ds.model.vocab_size=null"]
    settings += [f"raptr_ds.train.save={tmp_path}/runs"]
    sweep_of_seeds = request(tmp_path, *settings, array=["raptr_ds.train.seed=1,2"])
    assert check(sweep_of_seeds).layout.lead_seconds == 120
    append_event(tmp_path / "runs" / "seed=2", "signal_lead", lead=120, needed=290.0, write=300)
    assert check(sweep_of_seeds).layout.lead_seconds == 300
    assert check(replace(sweep_of_seeds, signal_lead=60)).layout.lead_seconds == 60


def test_a_container_sees_every_folder_that_the_run_file_names(tmp_path: Path, data_folder: Path) -> None:
    settings = [f"raptr_ds.data.path={data_folder}", f"raptr_ds.train.save={tmp_path}/run"]
    settings += [f"raptr_ds.model={json.dumps({**MODEL, 'architecture': 'ul2'})}"]
    settings += [
        'raptr_ds.eval.tasks=["boolq"]',
        "raptr_ds.checkpoint.interval=5",
        "raptr_ds.checkpoint.export_interval=5",
    ]
    settings += [f"raptr_ds.eval.task_files={tmp_path}/tasks"]
    task = check(request(tmp_path, *settings, container="image.sif")).container.task
    mounts = task[task.index("--bind") + 1].split(",")
    places = {tmp_path, tmp_path / "run", data_folder, tmp_path / "tasks"}
    assert {f"{place}:{place}" for place in places} <= set(mounts)


def test_the_batch_file_quotes_every_name(tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    (folder / "code" / "slurm").mkdir(parents=True)
    show = 'printf "%s\\n" "$RAPTR_HOME" "$RAPTR_CODE" "$RAPTR_CONFIG" "${step_options[@]}" "${task_words[@]}"\n'
    (folder / "code" / "slurm" / "training_job.sh").write_text(show)
    words = ContainerWords((f"--x={NASTY}",), (NASTY, "two"))
    batch = folder / "file"
    batch.write_text(submission(folder, words, array=["x"]).batch_file(folder / "code", [folder / "1", folder / "2"]))
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "RAPTR_ARGS": "touch"}
    done = subprocess.run(["bash", str(batch)], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    expected = [folder, folder / "code", folder / "2", f"--x={NASTY}", NASTY, "two"]
    assert done.stdout.splitlines() == list(map(str, expected))
    assert list(tmp_path.rglob("ran")) == []


def test_sbatch_s_words(tmp_path: Path) -> None:
    words = submission(tmp_path, chain=2, partition="long", more_options=("--qos=x",)).command(tmp_path / "f")
    assert {"--no-requeue", "--dependency=singleton", "--partition=long", f"--chdir={tmp_path}"} <= set(words)
    assert words[-2:] == ["--qos=x", str(tmp_path / "f")]
    words = submission(tmp_path, array=["x"]).command(tmp_path / "f")
    assert {"--array=0-1", "--requeue", "--output=slurm-%A_%a.out"} <= set(words)


def test_words_of_containers() -> None:
    home, data = Path("/home/me"), Path("/data")
    env = {"NCCL_DEBUG": "INFO", "TOKEN": "secret", "PYTORCH_ALLOC_CONF": "x"}

    def words(runtime: str, *folders: Path, image: str = "image.sif") -> ContainerWords:
        return container_words(image, runtime, folders, has_gpus=True, home=home, env=env)

    bind = "/home/me:/home/me,/data:/data"
    expected = ("apptainer", "exec", "--nv", "--bind", bind, "--pwd", "/home/me", "image.sif")
    assert words("apptainer", data, data) == ContainerWords(task=expected)
    expected = ("--container-image=image.sif", f"--container-mounts={bind}", "--container-workdir=/home/me")
    assert words("pyxis", data) == ContainerWords(step=expected)
    task = words("enroot", data).task
    assert task[:2] == ("enroot", "start")
    assert task[-1] == "image.sif"
    named = {value for option, value in pairwise(task) if option == "--env"}
    assert {"SLURM_PROCID", "MASTER_PORT", "NCCL_DEBUG", "PYTORCH_ALLOC_CONF", "RAPTR_SIGNAL_LEAD"} <= named
    assert not [word for word in task if "secret" in word or "INFO" in word or word == "TOKEN"]
    for folder in (Path("/a,b"), Path("/a:b"), Path("/a b")):
        with pytest.raises(ConfigError, match="cannot be mounted"):
            words("apptainer", folder)
    with pytest.raises(ConfigError, match="begins with a dash"):
        words("apptainer", data, image="--writable")
