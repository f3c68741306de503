"""Make the figures of docs/scaling.md: python tools/scaling.py [--paths N] [--document FILE]

Simulates what shorter paths are worth on 1 to 64 pipeline stages and up to 1,024 ranks, by sampling; writes the tables
between the two marks of the document, and the picture beside it.
"""

import argparse
from pathlib import Path

import _command_line
from _command_line import COUNT

from raptr_ds.config.derive import derive_pipeline_layers
from raptr_ds.config.sections import ModelSection
from raptr_ds.errors import ConfigError
from raptr_ds.markdown import markdown_table
from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import head_cost_in_layers
from raptr_ds.planner.scaling import pipeline_speed_up, sampled_paths
from raptr_ds.planner.step_time import Device, Layout, Setting, step_seconds
from raptr_ds.plots.studies import plot_scaling

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- tools/scaling.py: begin -->", "<!-- tools/scaling.py: end -->"
SAMPLINGS = ("uniform", "bernoulli", "balanced")
SHALLOW = ((2, 12), (4, 12), (4, 16), (8, 16), (8, 20), (8, 12))
DEEP_LAYERS, DEEP_MICRO_BATCHES, STAGES, LENGTHS = 128, 128, (1, 2, 4, 8, 16, 32, 64), (64, 96, 112)
UL2 = ModelSection(
    architecture="ul2",
    num_layers=24,
    hidden_size=2304,
    num_attention_heads=18,
    seq_length=1024,
    vocab_size=32_000,
    ffn_hidden_size=6144,
)
UL2_PREDICTED, UL2_BATCH, UL2_LENGTH, RANKS = 355.0, 512, 16, (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Simulate, write and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=COUNT, default=200, help="random paths behind each number (default 200)")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="Markdown file with the two marks")
    arguments = parser.parse_args()
    text = arguments.document.read_text(encoding="utf-8") if arguments.document.exists() else f"{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{arguments.document} lacks the marks {BEGIN} and {END}, or has them twice. Add them.")
    deep = _deep(arguments.paths)
    tables = [*_shallow_table(arguments.paths), "", *_deep_table(deep), "", *_ranks_table(arguments.paths)]
    before, rest = text.split(BEGIN)
    arguments.document.write_text(
        f"{before}{BEGIN}\n" + "\n".join(tables) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8"
    )
    picture = arguments.document.with_suffix(".png")
    titles = {length: f"{length} of {DEEP_LAYERS} layers" for length in LENGTHS}
    curves = {
        titles[length]: {name: [deep[stages, length, name] for stages in STAGES] for name in _columns()}
        for length in LENGTHS
    }
    plot_scaling(STAGES, curves, {titles[length]: DEEP_LAYERS / length for length in LENGTHS}, picture)
    print(f"wrote {arguments.document} and {picture}")


def _columns() -> tuple[str, ...]:
    return (*SAMPLINGS, "uniform, 2 chunks")


def _shallow_table(num_paths: int) -> list[str]:
    rows = []
    for stages, length in SHALLOW:
        layers = derive_pipeline_layers(24, stages)
        values = [pipeline_speed_up(name, length, layers, 32, num_paths=num_paths) for name in SAMPLINGS]
        rows.append([stages, length, *(f"{value:.2f}" for value in (24 / length, *values))])
    head = ["stages", "path length", "by FLOPs", *SAMPLINGS]
    return ["24 layers, 32 micro batches:", "", *markdown_table(head, rows)]


def _deep(num_paths: int) -> dict[tuple[int, int, str], float]:
    found = {}
    for stages in STAGES:
        layers = derive_pipeline_layers(DEEP_LAYERS, stages)
        for length in LENGTHS:
            for name in _columns():
                sampling, _, chunks = name.partition(", ")
                found[stages, length, name] = pipeline_speed_up(
                    sampling,
                    length,
                    layers,
                    DEEP_MICRO_BATCHES,
                    num_chunks=2 if chunks and stages > 1 else 1,
                    num_paths=num_paths,
                )
    return found


def _deep_table(deep: dict[tuple[int, int, str], float]) -> list[str]:
    rows = [
        [length, f"{DEEP_LAYERS / length:.2f}", name, *(f"{deep[stages, length, name]:.2f}" for stages in STAGES)]
        for length in LENGTHS
        for name in _columns()
    ]
    head = ["path length", "by FLOPs", "sampling", *(f"{stages} stages" for stages in STAGES)]
    title = f"{DEEP_LAYERS} layers, {DEEP_MICRO_BATCHES} micro batches (with 2 chunks: interleaved):"
    return [title, "", *markdown_table(head, rows)]


def _ranks_table(num_paths: int) -> list[str]:
    device = Device()
    title = (
        f"ul2_1b, {UL2_BATCH} sequences a step in micro batches of 1, tensor 2 x pipeline 4, ZeRO 1, paths of "
        f"{UL2_LENGTH} of 24 layers, {device.flops_per_second / 1e12:g} effective TFLOP/s a device:"
    )
    titles = ["ranks", "data parallel", "micro batches", "full step, s", *SAMPLINGS, "tokens/s"]
    rows = []
    head = head_cost_in_layers(UL2, UL2_PREDICTED)
    for ranks in RANKS:
        layout = Layout((6, 6, 6, 6), 1, UL2_BATCH * 8 // ranks, tensor=2, data=ranks // 8)
        setting = Setting(UL2, layout, device, UL2_PREDICTED)
        full = float(step_seconds([LayerPath.full(24)], setting).total[0])
        seconds = []
        for sampling in SAMPLINGS:
            paths = sampled_paths(sampling, UL2_LENGTH, layout.stage_layers, num_paths, head)
            seconds.append(float(step_seconds(paths, setting).total.mean()))
        speed_ups = [f"{full / value:.2f}" for value in seconds]
        tokens = f"{UL2_BATCH * UL2.seq_length / seconds[-1] / 1e6:.3g}M"
        rows.append([f"{ranks:,}", layout.data, layout.num_micro_batches, f"{full:.3g}", *speed_ups, tokens])
    return [title, "", *markdown_table(titles, rows)]


if __name__ == "__main__":
    _command_line.run(main)
