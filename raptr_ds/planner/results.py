"""What experiments/results holds of standard training and RaPTr: the measured runs that the law is fitted to.

It has comparisons as tools/experiment.py keeps them (--keep), and means alone of older ones as *.hjson.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from raptr_ds.config.hjson_text import read_hjson
from raptr_ds.config.sections import ModelSection
from raptr_ds.json_text import parse_json
from raptr_ds.paths.cost import layer_parameters
from raptr_ds.planner.law import Measured
from raptr_ds.runtime.metrics_file import METRICS, read_metrics

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"
_OF_THE_LAW = {"raptr_ds.path.method=full", "raptr_ds.path.method=raptr"}
_SCHEDULE = "raptr_ds.path.schedule="
_LINEAR, _TEXT = "WarmupDecayLR", "data/small"


def read_results(objective: str, folder: Path = RESULTS) -> list[Measured]:
    """Return the means over seeds of an objective's runs: standard training, and RaPTr by any schedule.

    A model whose learning rate does not fall linearly, or that reads another text, counts as another model. Left out:
    comparisons without standard training, RaPTr with other options than its schedule, losses not finite.
    Raises: DataError if metrics are damaged.
    """
    measured = []
    for path in sorted(folder.glob("*.hjson")):
        results, _ = read_hjson(path)
        if results["objective"] != objective:
            continue
        for name, model in results["models"].items():
            for run in model["runs"]:
                tokens = run["steps"] * results["tokens_per_step"] / model["layer_parameters"]
                measured.append(Measured(name, model["layer_parameters"], tokens, run["saving"], run["loss"]))
    for record in sorted(folder.glob("*/experiment.json")):
        measured += _kept(record.parent, parse_json(record.read_text(encoding="utf-8")), objective)
    return measured


def _kept(folder: Path, record: dict[str, Any], objective: str) -> Iterator[Measured]:
    ends: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for run in record["runs"]:
        if run["purpose"] == "comparison":
            ends.setdefault(run["contestant"], []).append(_end_of(folder / run["folder"], run["steps"]))
    settings = {one["name"]: one["settings"] for one in record["contestants"]}
    standard = next((name for name, of in settings.items() if of == ["raptr_ds.path.method=full"]), None)
    if standard is None:
        return
    run = next(run for run in record["runs"] if run["contestant"] == standard)
    config = parse_json((folder / run["folder"] / "config.json").read_text(encoding="utf-8"))
    model = ModelSection.model_validate(config["raptr_ds"]["model"])
    if model.architecture != objective:
        return
    name_of_model = f"{model.num_layers} layers x {model.hidden_size}"
    rate = config.get("scheduler", {"type": "constant rate"})["type"]
    if rate != _LINEAR:
        name_of_model += f", {rate}"
    if (text := config["raptr_ds"]["data"]["path"]) != _TEXT:
        name_of_model += f", {text}"
    parameters = model.num_layers * layer_parameters(model)
    full_flops = _flops_of_a_step(ends[standard])
    for name, of in settings.items():
        if _OF_THE_LAW.isdisjoint(of) or any(one not in _OF_THE_LAW and not one.startswith(_SCHEDULE) for one in of):
            continue
        loss = fmean(loss for _, loss in ends[name])
        if math.isfinite(loss):
            tokens = fmean(line["tokens"] for line, _ in ends[name]) / parameters
            saving = 1 - _flops_of_a_step(ends[name]) / full_flops
            yield Measured(name_of_model, parameters, tokens, saving, loss)


def _end_of(run: Path, steps: int) -> tuple[dict[str, Any], float]:
    """Return a run's last training line, and the full model's held-out loss there."""
    metrics = read_metrics(run / METRICS)
    deepest = max(length for step, length in metrics.evaluations if step == steps)
    loss = metrics.evaluations[steps, deepest]
    return metrics.training[steps], math.nan if loss is None else loss


def _flops_of_a_step(ends: list[tuple[dict[str, Any], float]]) -> float:
    return fmean(line["flops"] / line["step"] for line, _ in ends)
