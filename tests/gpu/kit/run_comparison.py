"""A comparison of experiments/gpu within a time limit; what comes back is metrics alone.

python -m tests.gpu.kit.run_comparison FILE --data FOLDER --output FOLDER [--seconds N]

Runs tools/experiment.py on prepared tokens (train.bin may be packed by bzip2), and stops it when the time is over.
The output folder gets the report, and each run's evaluations and every tenth training line.
"""

import argparse
import bz2
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from raptr_ds.config.hjson_text import read_hjson
from tests.gpu.kit.findings import Findings
from tests.gpu.kit.measured_device import IS_DRY_RUN

REPOSITORY = Path(__file__).resolve().parents[3]
_EVERY = 10  # training lines that are kept
_STOPPING_SECONDS = 30.0
_TINY = [
    "train_batch_size=4",
    "train_micro_batch_size_per_gpu=2",
    "raptr_ds.model.num_layers=4",
    "raptr_ds.model.hidden_size=32",
    "raptr_ds.model.num_attention_heads=2",
    "raptr_ds.model.seq_length=16",
    "raptr_ds.eval.interval=4",
    "raptr_ds.eval.batches=1",
]


def main() -> None:
    """Unpack, run, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="comparison file")
    parser.add_argument("--data", type=Path, required=True, help="prepared tokens")
    parser.add_argument("--output", type=Path, required=True, help="gets report.md and the metrics")
    parser.add_argument("--seconds", type=float, default=460.0)
    options = parser.parse_args()
    findings = Findings.of_environment()
    runs = Path(os.environ.get("TMPDIR", "/tmp")).resolve() / f"comparison-{options.file.stem}"
    with findings.part(options.file.stem):
        code = run(options.file, unpacked(options.data, runs.parent), runs, options.seconds)
        for name, text in collect(runs, options.output).items():
            findings.figure(f"{options.file.stem} {name}", text)
        findings.check(code in (0, 75), options.file.stem, "complete" if code == 0 else f"exit code {code}")
    findings.leave()


def unpacked(data: Path, work: Path) -> Path:
    """Return a folder of prepared tokens, unpacked into `work` where they are packed."""
    packed = data / "train.bin.bz2"
    if not packed.is_file():
        return data.resolve()
    folder = work / data.name
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.bz2"))
    with bz2.open(packed) as source, (folder / "train.bin").open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
    return folder


def run(file: Path, data: Path, runs: Path, seconds: float) -> int:
    """Return tools/experiment.py's exit code; 75 where the time was over first."""
    own = read_hjson(file)[0]
    settings = [*own.get("set", []), f"raptr_ds.data.path={data}", *(_TINY if IS_DRY_RUN else [])]
    changes = [f"set={json.dumps(settings)}", f"output={runs}"]
    if IS_DRY_RUN:
        changes.append("budget.steps=8")
    command = [sys.executable, "tools/experiment.py", str(file), "--set", *changes]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait(_STOPPING_SECONDS)
    finally:
        process.kill()


def collect(runs: Path, output: Path) -> dict[str, str]:
    """Write what comes back of the runs; return a line for each, by its folder's name."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "experiment.json"):
        if (runs / name).is_file():
            shutil.copy(runs / name, output / name)
    results = {}
    for metrics in sorted(runs.glob("runs/**/metrics.jsonl")):
        name = "_".join(metrics.parent.relative_to(runs / "runs").parts)
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        trained = [line for line in lines if "loss" in line]
        kept = [line for line in lines if "loss" not in line or line["step"] % _EVERY == 0 or line is trained[-1]]
        (output / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        held_out = f"held-out loss {losses[-1]:.4f}" if losses else "not evaluated"
        speed = sorted(line["tokens_per_second"] for line in trained)[len(trained) // 2] if trained else 0
        results[name] = f"{held_out} after {len(trained)} steps, {speed:,.0f} tokens/s"
    return results


if __name__ == "__main__":
    main()
