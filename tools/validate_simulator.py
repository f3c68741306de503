"""Compare the pipeline simulator with DeepSpeed: torchrun --nproc-per-node STAGES tools/validate_simulator.py

Real processes, one for each pipeline stage, run real steps of DeepSpeed's pipeline engine along paths of several
lengths and samplings; rank 0 prints a Markdown table of measured and simulated times. By default layers sleep for
their time instead of computing, so that the result does not depend on how many cores are free; --compute lets them
compute, and fits the one time of a layer that the simulator then needs to half of the steps; the other half is the
test.
"""

import argparse
from pathlib import Path
from statistics import median

import _command_line
import numpy as np
from _command_line import COUNT, above_zero

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.errors import ConfigError
from raptr_ds.markdown import markdown_table
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import detect_launch
from raptr_ds.paths import LayerPath
from raptr_ds.planner.pipeline_timing import TimedStep, time_steps
from raptr_ds.planner.scaling import sampled_paths

RUN_FILE = Path(__file__).parent.parent / "deepspeed_configs" / "bert_quickstart.json"
SAMPLINGS = ("uniform", "bernoulli", "balanced")


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=COUNT, default=24, help="layers of the model (default 24)")
    parser.add_argument("--micro-batches", type=COUNT, default=8, help="micro batches of a step (default 8)")
    parser.add_argument("--lengths", type=COUNT, nargs="+", default=[12, 16, 20], help="of paths (default 12 16 20)")
    parser.add_argument("--steps", type=COUNT, default=4, help="paths of each length and sampling (default 4)")
    parser.add_argument("--repetitions", type=COUNT, default=3, help="steps of each path; the best counts (default 3)")
    parser.add_argument(
        "--layer-ms", type=above_zero, default=10.0, help="forward of a sleeping layer, backward 2x (default 10)"
    )
    parser.add_argument("--compute", action="store_true", help="let the layers compute")
    parser.add_argument("--hidden-size", type=COUNT, default=256, help="width of layers that compute (default 256)")
    arguments = parser.parse_args()
    launch = detect_launch()
    if launch.world_size < 2:
        raise ConfigError("one process has no pipeline. Start with torchrun --nproc-per-node 2 (or 4).")
    config = _config(arguments, launch.world_size)
    stages = config.parallel.pipeline_layers
    of_kind = {("full", arguments.layers): [LayerPath.full(arguments.layers)] * arguments.steps}
    for length in arguments.lengths:
        for sampling in SAMPLINGS:
            of_kind[sampling, length] = sampled_paths(sampling, length, stages, arguments.steps)
    # In turns, so that a busy machine disturbs all of them.
    in_turns = [paths[number] for number in range(arguments.steps) for paths in of_kind.values()]
    groups = initialize_process_groups(launch, 1, launch.world_size)
    forward = 1 / 3 if arguments.compute else arguments.layer_ms / 1000
    how = {"sleeps": not arguments.compute, "repetitions": arguments.repetitions}
    steps = time_steps(config, groups, in_turns, forward, 2 * forward, **how)
    if groups.rank == 0:
        found = {kind: steps[number :: len(of_kind)] for number, kind in enumerate(of_kind)}
        print(_report(config, found, arguments.compute))


def _config(arguments: argparse.Namespace, num_stages: int) -> RunConfig:
    hidden, sequences = (arguments.hidden_size, 4) if arguments.compute else (32, 1)
    overrides = [
        f"raptr_ds.model.num_layers={arguments.layers}",
        f"raptr_ds.model.hidden_size={hidden}",
        f"raptr_ds.model.seq_length={128 if arguments.compute else 16}",
        "raptr_ds.model.vocab_size=64",
        f"raptr_ds.parallel.pipeline_model_parallel_size={num_stages}",
        f"train_batch_size={sequences * arguments.micro_batches}",
        f"train_micro_batch_size_per_gpu={sequences}",
        "zero_optimization.stage=0",
    ]
    return load_run_config(RUN_FILE, overrides, num_stages)


def _report(config: RunConfig, of_kind: dict[tuple[str, int], list[TimedStep]], fit: bool) -> str:
    layer, rest, fitted = 1.0, 0.0, ""
    if fit:
        # The simulation took one second a layer for both passes together.
        fitted_to = [step for found in of_kind.values() for step in found[::2]]
        simulated = [step.simulated_seconds for step in fitted_to]
        layer, rest = np.polyfit(simulated, [step.measured_seconds for step in fitted_to], 1).tolist()
        fitted = f"; fitted on every other step: {layer * 1e3:.2f} ms a layer, {rest * 1e3:.1f} ms a step beside them"
        of_kind = {kind: found[1::2] for kind, found in of_kind.items()}
    whole = next(iter(of_kind.values()))
    full = median(step.measured_seconds for step in whole)
    full_simulated = layer * whole[0].simulated_seconds + rest
    stages = len(config.parallel.pipeline_layers)
    title = f"{config.model.num_layers} layers, {stages} stages, {config.batch.accumulation} micro batches{fitted}"
    rows = []
    for (sampling, length), found in of_kind.items():
        measured = sum(step.measured_seconds for step in found) / len(found)
        simulated = sum(layer * step.simulated_seconds + rest for step in found) / len(found)
        worst = max(abs(s.measured_seconds / (layer * s.simulated_seconds + rest) - 1) for s in found)
        speed_ups = (f"{full / measured:.2f}", f"{full_simulated / simulated:.2f}")
        rows.append([sampling, length, f"{measured:.3f}", f"{simulated:.3f}", f"{worst:.1%}", *speed_ups])
    head = ["paths", "length", "measured, s", "simulated, s", "largest difference", "speed-up, measured", "simulated"]
    return "\n".join([title, "", *markdown_table(head, rows)])


if __name__ == "__main__":
    _command_line.run(main)
