"""Measure a training step: python tools/bench.py [--config RUN_FILE] [--set KEY=VALUE ...] [--repetitions N].

One process, CPU or GPU. Prints a Markdown table: step time at the full path, 3/4 and 1/2 of it against what executed
FLOPs promise; the same model in Hugging Face transformers, same weights, batch and optimizer; the time that path
agreement costs; memory. Everything takes turns, so that a busy machine disturbs all rows alike.
"""

import argparse
import logging
import warnings
from pathlib import Path

import _command_line
import numpy as np

from raptr_ds.config.load import RunConfig, load_run_config
from raptr_ds.data.batch import StepBatch, collate
from raptr_ds.data.loader import build_loader, folders_of, load_tokenizer
from raptr_ds.data.sample import Sample
from raptr_ds.errors import ConfigError
from raptr_ds.eval.step_benchmark import measure_steps
from raptr_ds.eval.step_report import step_report
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import detect_launch
from raptr_ds.rng import stream

DEFAULT_CONFIG = Path(__file__).parent.parent / "deepspeed_configs" / "bert_quickstart.json"
DEFAULT_VOCAB_SIZE = 8192


def main() -> None:
    """Parse the command line, measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="run file (default: bert_quickstart)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for training")
    parser.add_argument("--repetitions", type=int, default=9, help="rounds that count (default 9)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the run file's")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time, for a busy machine"
    )
    parser.add_argument("--random-tokens", type=int, metavar="VOCAB_SIZE", help="do without prepared data")
    parser.add_argument("--output", type=Path, help="write the report there too")
    arguments = parser.parse_args()
    if arguments.repetitions < 1:
        raise ConfigError(f"--repetitions {arguments.repetitions}: at least one round must count.")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    overrides = [*arguments.set, *_precision_overrides(arguments.precision)]
    config = load_run_config(arguments.config, overrides, world_size=1)
    config, batch, origin = _batch(config, arguments.random_tokens)
    if config.precision == "fp16":
        raise ConfigError("the benchmark compares fp32 and bf16, not fp16. Add --precision bf16.")
    groups = initialize_process_groups(detect_launch(), 1, 1)
    result = measure_steps(config, groups, batch, arguments.repetitions, arguments.clock)
    report = step_report(result, groups.device, origin)
    print(report)
    if arguments.output is not None:
        arguments.output.write_text(report, encoding="utf-8")


def _precision_overrides(precision: str | None) -> list[str]:
    if precision is None:
        return []
    return [f"bf16.enabled={str(precision == 'bf16').lower()}", "fp16.enabled=false"]


def _batch(config: RunConfig, random_vocab_size: int | None) -> tuple[RunConfig, StepBatch, str]:
    """Return the run with its vocabulary, a step's batch and where it is from; real data where they are prepared."""
    prepared = all(Path(folder).is_dir() for folder in folders_of(config.data.path))
    if random_vocab_size is None and prepared:
        tokenizer = load_tokenizer(config.data)
        config = config.with_vocab_size(tokenizer.vocab_size)
        with build_loader(
            config.data, config.objective, config.model, config.batch, seed=config.train.seed, dp_rank=0
        ) as loader:
            return config, loader.at(0), f"text of {', '.join(folders_of(config.data.path))}"
    vocab_size = random_vocab_size or config.model.vocab_size or DEFAULT_VOCAB_SIZE
    return config.with_vocab_size(vocab_size), _random_batch(config, vocab_size), "random tokens"


def _random_batch(config: RunConfig, vocab_size: int) -> StepBatch:
    """Return full sequences of random tokens, with as many predictions as text would have."""
    model, batch = config.model, config.batch
    ul2 = model.architecture == "ul2"
    count = model.seq_length // 4 if ul2 else max(1, round(config.objective.mask_rate * model.seq_length))
    samples = []
    for number in range(batch.global_batch):
        rng = stream(config.train.seed, "bench sample", number)
        positions = np.arange(count) + model.seq_length - count
        if not ul2:
            positions = np.sort(rng.permutation(model.seq_length)[:count])
        samples.append(
            Sample(
                tokens=rng.integers(0, vocab_size, model.seq_length),
                positions=positions.astype(np.int64),
                targets=rng.integers(0, vocab_size, count),
                prefix_length=model.seq_length - count if ul2 else model.seq_length,
            )
        )
    size = batch.micro_batch
    starts = range(0, batch.global_batch, size)
    return StepBatch(tuple(collate(samples[i : i + size], range(i, i + size), model.seq_length, 0) for i in starts))


if __name__ == "__main__":
    _command_line.run(main)
