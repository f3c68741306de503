"""The run files of the repository: complete, with a standard twin, and alive under other depths and layouts."""

import re
from pathlib import Path

import pytest

from raptr_ds.config.hjson_text import read_hjson
from raptr_ds.config.load import load_run_config

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "deepspeed_configs").glob("*.json"))
NAMES = {file.stem for file in FILES}
TWINS = {
    "bert_quickstart": "bert_quickstart_full",
    "bert_base_raptr": "bert_base_full",
    "bert_large_raptr": "bert_large_full",
    "ul2_quickstart": "ul2_quickstart_full",
    "ul2_1b_raptr": "ul2_1b_full",
}
TP, PP = "raptr_ds.parallel.tensor_model_parallel_size", "raptr_ds.parallel.pipeline_model_parallel_size"
SMALL = ["raptr_ds.model.num_layers=5", "train_batch_size=8", "train_micro_batch_size_per_gpu=2"]
LAYOUTS = {
    "one": (1, []),
    "data": (2, ["zero_optimization.stage=2"]),
    "zero3": (4, ["zero_optimization.stage=3"]),
    "zero0": (2, ["zero_optimization.stage=0"]),
    "tensor": (2, [f"{TP}=2"]),
    "pipeline": (2, [f"{PP}=2"]),
    "both": (4, [f"{TP}=2", f"{PP}=2"]),
}


def file_of(name: str) -> Path:
    return next(file for file in FILES if file.stem == name)


def test_all_are_there():
    assert {*TWINS, *TWINS.values()} == NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_as_it_is(file):
    config = load_run_config(file, [], 2)
    assert config.train.save == f"runs/{file.stem}"
    assert config.model.architecture == file.stem.split("_")[0]
    assert config.path.method == ("full" if file.stem.endswith("full") else "raptr")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/slurm.md", "slurm/bert_raptr.sbatch", "slurm/ul2_raptr.sbatch", "tools/submit.py"]
)
def test_cluster_commands_of_the_pages_fit_their_run_files(page):
    text = (ROOT / page).read_text()
    lines = [line for line in text.splitlines() if re.search(r"--nodes[= ]\d+ --gpus-per-node[= ]\d", line)]
    lines = [line for line in lines if re.search(r"_raptr\.(?:sbatch|json)", line)]
    assert lines
    for line in lines:
        nodes, gpus = (re.findall(rf"--{option}[= ](\d+)", line)[0] for option in ("nodes", "gpus-per-node"))
        name = re.findall(r"(\w+_raptr)\.(?:sbatch|json)", line)[0]
        if name not in NAMES:  # a batch file, which names its run file
            batch = (ROOT / "slurm" / f"{name}.sbatch").read_text()
            name = re.findall(r"deepspeed_configs/(\w+)\.json", batch)[0]
        load_run_config(file_of(name), [], int(nodes) * int(gpus))


def test_schedules_and_warm_up():
    assert load_run_config(file_of("bert_base_raptr"), [], 8).path.schedule == "6-8-10-12"
    assert load_run_config(file_of("bert_large_raptr"), [], 8).path.schedule == "12-16-20-24"
    ul2 = load_run_config(file_of("ul2_1b_raptr"), [], 8)
    assert (ul2.path.schedule, ul2.path.full_warmup_steps) == ("12-16-20-24", 30_000)


def test_ul2_1b_has_about_1_6_billion_parameters():
    model = load_run_config(file_of("ul2_1b_raptr"), [], 8).model
    layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_hidden_size
    assert model.num_layers * layer + 32_000 * model.hidden_size == pytest.approx(1.6e9, rel=0.03)


@pytest.mark.parametrize("name", TWINS)
def test_twins_differ_in_the_path_and_the_folder_alone(name):
    ours, standard = (read_hjson(file_of(which))[0] for which in (name, TWINS[name]))
    for tree in (ours, standard):
        del tree["raptr_ds"]["path"], tree["raptr_ds"]["train"]["save"]
    assert ours == standard


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_what_differs_has_to_be_said(file, layout):
    world_size, overrides = LAYOUTS[layout]
    config = load_run_config(file, [*SMALL, "raptr_ds.train.steps=6", *overrides], world_size)
    assert config.model.num_layers == 5
    assert sum(config.parallel.pipeline_layers) == 5
    assert config.batch.global_batch == 8
    assert config.batch.accumulation * config.batch.data_parallel == 4


@pytest.mark.parametrize(
    "method", ["full", "raptr", "pld", "constant", "layerdrop", "layer_dropout", "stacking", "width"]
)
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_one_word_makes_it_another_model_or_method(file, architecture, method):
    overrides = [f"raptr_ds.model.architecture={architecture}", f"raptr_ds.path.method={method}"]
    if method == "width":  # another kind of schedule, and an MLP that the heads divide
        overrides += ["raptr_ds.path.schedule=null", "raptr_ds.model.num_attention_heads=16"]
    config = load_run_config(file, overrides, 1)
    assert (config.model.architecture, config.path.method) == (architecture, method)


@pytest.mark.parametrize("name", ["bert_quickstart", "ul2_quickstart"])
def test_the_word_may_be_changed_in_the_quickstart_itself(name, tmp_path):
    text = file_of(name).read_text(encoding="utf-8")
    one, other = ("bert", "ul2") if name.startswith("bert") else ("ul2", "bert")
    changed = tmp_path / "mine.json"
    changed.write_text(text.replace(f'"architecture": "{one}"', f'"architecture": "{other}"'), encoding="utf-8")
    assert load_run_config(changed, [], 2).model.architecture == other
