"""Short runs of the command line on the device: what each differs in, what it is compared with, and how it is run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.kit.measured_device import DEVICE, IS_DRY_RUN

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = int(os.environ.get("KIT_PATIENCE", "1"))  # what every limit is multiplied by, for a slow machine
NUM_STEPS = 10
STOPPED_STEPS = 150  # of a run that is ended in the middle
_STOP_AFTER = 25  # lines of its metrics
_UNSAVED = ("raptr_ds.checkpoint.save_on_exit=false", "raptr_ds.eval.batches=1")
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SMALL = (
    "train_batch_size=8",
    "train_micro_batch_size_per_gpu=4",
    "raptr_ds.model.num_layers=4",
    "raptr_ds.model.hidden_size=128",
    "raptr_ds.model.num_attention_heads=4",
    "raptr_ds.model.seq_length=128",
    "raptr_ds.eval.interval=0",
    "raptr_ds.log.progress=plain",
    "raptr_ds.log.tensorboard=false",
)


@dataclass(frozen=True)
class Tolerance:
    """By what fraction the first loss, and any of NUM_STEPS, may differ from another run's.

    The first has no step behind it: it differs by rounding alone. Later ones carry AdamW's first steps, which turn on
    the signs of gradients near zero, and rounding flips those. The values are fifty times what the same pairs differ by
    on a CPU, or more, and at most a seventh of what ten steps change a loss by.
    """

    first: float
    later: float


_SAME_PRECISION = Tolerance(2e-5, 1e-3)
_16_BITS = Tolerance(1e-3, 1e-2)  # against fp32
_BF16 = Tolerance(5e-4, 1e-2)  # against bf16, rounded at other places


@dataclass(frozen=True)
class TrainingRun:
    """A run of a quickstart's model, smaller still, and the name of the run whose losses it is held against.

    settings: as for --set. forced_zero: the ZeRO stage, run as such on one process.
    """

    model: str
    settings: tuple[str, ...] = ()
    against: str | None = None
    tolerance: Tolerance = _SAME_PRECISION
    on_cpu: bool = False
    forced_zero: int | None = None
    limit_seconds: int = 100


_DROPOUT = ("raptr_ds.model.hidden_dropout=0.1", "raptr_ds.model.attention_dropout=0.1")
_IN_BF16, _IN_FP16 = "bf16.enabled=true", "fp16.enabled=true"
_COMPILED, _PLAIN = "raptr_ds.train.compile=true", "raptr_ds.train.compile=false"
_PACKED = "raptr_ds.data.packing=true"
_WIDTH = "raptr_ds.path.method=width"
_FP32_SUMS = "data_types.grad_accum_dtype=fp32"

RUNS = {
    "bert_on_cpu": TrainingRun("bert", _DROPOUT, on_cpu=True),
    "ul2_on_cpu": TrainingRun("ul2", on_cpu=True),
    "width_on_cpu": TrainingRun("bert", (_WIDTH,), on_cpu=True),
    "bert": TrainingRun("bert", (*_DROPOUT, _PLAIN), "bert_on_cpu"),
    "ul2": TrainingRun("ul2", (_PLAIN,), "ul2_on_cpu"),
    "bert_compiled": TrainingRun("bert", (*_DROPOUT, _COMPILED), "bert", limit_seconds=140),
    "bert_bf16": TrainingRun("bert", (*_DROPOUT, _PLAIN, _IN_BF16), "bert", _16_BITS),
    "ul2_bf16": TrainingRun("ul2", (_PLAIN, _IN_BF16), "ul2", _16_BITS),
    "ul2_compiled_bf16": TrainingRun("ul2", (_COMPILED, _IN_BF16), "ul2_bf16", _BF16, limit_seconds=140),
    "ul2_fp16": TrainingRun("ul2", (_PLAIN, _IN_FP16), "ul2", _16_BITS),
    "bert_zero_1": TrainingRun("bert", (*_DROPOUT, _PLAIN), "bert", forced_zero=1),
    "bert_zero_2": TrainingRun("bert", (*_DROPOUT, _PLAIN), "bert", forced_zero=2),
    "bert_zero_3": TrainingRun("bert", (*_DROPOUT, _PLAIN), "bert", forced_zero=3),
    "ul2_zero_1_bf16": TrainingRun(
        "ul2", (_PLAIN, _IN_BF16, "zero_optimization.overlap_comm=true"), "ul2_bf16", _BF16, forced_zero=1
    ),
    "ul2_zero_3_bf16": TrainingRun("ul2", (_PLAIN, _IN_BF16), "ul2_bf16", _BF16, forced_zero=3),
    "ul2_fp32_accumulation": TrainingRun("ul2", (_PLAIN, _IN_BF16, _FP32_SUMS), "ul2_bf16", _BF16),
    "ul2_recomputed": TrainingRun("ul2", (_PLAIN, "raptr_ds.parallel.activation_checkpointing=true"), "ul2"),
    "ul2_packed_bf16": TrainingRun("ul2", (_COMPILED, _IN_BF16, _PACKED), limit_seconds=140),
    "bert_packed_bf16": TrainingRun("bert", (_PLAIN, _IN_BF16, _PACKED)),
    "ul2_length_192_bf16": TrainingRun("ul2", (_PLAIN, _IN_BF16, "raptr_ds.model.seq_length=192")),  # 128 + 64
    "width": TrainingRun("bert", (_PLAIN, _WIDTH), "width_on_cpu"),
    "ul2_zero_grad": TrainingRun("ul2", (_PLAIN, "raptr_ds.path.skipped_update=zero_grad")),
    # DeepSpeed's own optimizer, which nvcc compiles for a minute first.
    "bert_fused_adam": TrainingRun(
        "bert", (*_DROPOUT, _PLAIN, "optimizer.params.torch_adam=false"), "bert", limit_seconds=90
    ),
}
_DRY_RUNS = ("bert", "bert_zero_1")  # those that show, on a CPU and in seconds, that the machinery works
# What may take longest last: a test waits for its run, and those behind it with it.
CASES = list(_DRY_RUNS) if IS_DRY_RUN else sorted(RUNS, key=lambda name: RUNS[name].limit_seconds)


@dataclass(frozen=True)
class Finished:
    """A run that ended: its exit code (124: out of time), training losses by step, seconds, and the end of its log."""

    exit_code: int
    losses: list[float]
    seconds: float
    last_words: str


@dataclass(frozen=True)
class Resumed:
    """A run that was ended in the middle and started again, and the same run in one piece.

    exit_codes: of the whole run, of the first part, of the second. num_before: steps on disk when the first part ended.
    """

    exit_codes: list[int]
    num_before: int
    losses: list[float]
    whole: list[float]


def prepared_data(folder: Path) -> Path:
    """Return prepared data: what KIT_DATA names, or the embedded corpus, prepared below `folder`."""
    if given := os.environ.get("KIT_DATA"):
        return Path(given).resolve()
    command = [sys.executable, "tools/prepare_data.py", "--embedded", "--output", str(folder / "data")]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def held_against(name: str) -> str | None:
    """Return the run that this one is held against; in a dry run none on the CPU, which would be the same again."""
    other = RUNS[name].against
    return None if IS_DRY_RUN and other is not None and RUNS[other].on_cpu else other


def in_order(names: set[str]) -> list[str]:
    """Return these runs and those that they are held against, what takes longest first."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        if (other := held_against(name)) is not None and other not in found:
            waiting.append(other)
    return sorted(found, key=lambda name: (-RUNS[name].limit_seconds, not RUNS[name].on_cpu, name))


def train(name: str, data: Path, folder: Path) -> Finished:
    """Run one of RUNS to its end, in a folder of its own below `folder`."""
    run, save, log = RUNS[name], folder / name, folder / f"{name}.log"
    start = time.perf_counter()
    code = _wait(_start(run, data, save, log, NUM_STEPS, *_UNSAVED), run.limit_seconds)
    return Finished(code, losses_of(save), time.perf_counter() - start, _last_words(log))


def train_in_two_parts(data: Path, folder: Path, is_killed: bool) -> Resumed:
    """Run UL2 in one piece, and again, ended in the middle: by kill -9, with checkpoints by then, or by a signal."""
    interval = f"raptr_ds.checkpoint.interval={20 if is_killed else 0}"
    run = TrainingRun("ul2", (_PLAIN, interval, "raptr_ds.eval.batches=0"))
    name = "killed" if is_killed else "stopped"
    save, whole, log = folder / name, folder / f"{name}_whole", folder / f"{name}.log"
    codes = [_wait(_start(run, data, whole, log, STOPPED_STEPS), run.limit_seconds)]
    first = _start(run, data, save, log, STOPPED_STEPS)
    limit = time.monotonic() + run.limit_seconds * PATIENCE
    while first.poll() is None and time.monotonic() < limit and len(losses_of(save)) < _STOP_AFTER:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL if is_killed else signal.SIGUSR1)
    codes.append(_wait(first, 60))
    num_before = len(losses_of(save))
    codes.append(_wait(_start(run, data, save, log, STOPPED_STEPS), run.limit_seconds))
    return Resumed(codes, num_before, losses_of(save), losses_of(whole))


def losses_of(save: Path) -> list[float]:
    """Return the training losses that a run has written so far, in the order of its lines."""
    path = save / "metrics.jsonl"
    if not path.exists():
        return []
    whole_lines = path.read_text().rpartition("\n")[0].splitlines()  # the last line may be half written
    return [line["loss"] for line in map(json.loads, whole_lines) if "loss" in line]


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return by what fraction losses differ from others at most; the shorter list decides how many are compared."""
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=False))


def run_file_of(run: TrainingRun) -> str:
    """Return the run file, below the repository."""
    return f"deepspeed_configs/{run.model}_quickstart.json"


def settings_of(run: TrainingRun, data: Path, save: Path, steps: int) -> list[str]:
    """Return what a run changes of its run file, as for --set."""
    where = [f"raptr_ds.data.path={data}", f"raptr_ds.train.save={save}", f"raptr_ds.train.steps={steps}"]
    return [*_SMALL, *where, f"zero_optimization.stage={run.forced_zero or 0}", *run.settings]


def _start(run: TrainingRun, data: Path, save: Path, log: Path, steps: int, *more: str) -> subprocess.Popen[bytes]:
    script = "tests/gpu/forced_zero.py" if run.forced_zero else "raptr_ds/pretrain.py"
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCH_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1" if IS_DRY_RUN else "2"
    if run.on_cpu or DEVICE.type == "cpu":
        environment.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    settings = [*settings_of(run, data, save, steps), *more]
    command = [sys.executable, script, "--deepspeed_config", run_file_of(run), "--set", *settings]
    with log.open("ab") as stream:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen[bytes], limit_seconds: int) -> int:
    """Return a process's exit code, 124 if it had to be killed at its limit."""
    try:
        return process.wait(limit_seconds * PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 124


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-2:])[-300:]
