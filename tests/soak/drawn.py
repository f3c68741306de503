"""Run files at random: what is trained, and layouts that train it. Values by dotted key."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Keys = dict[str, Any]
"""Values by dotted key of the run file."""

_SHAPES = (  # tensor, pipeline, data
    *((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4)),
    *((2, 2, 1), (2, 1, 2), (1, 2, 2)),
)
_DRAWN = ("raptr", "constant", "layerdrop", "pld", "layer_dropout")
_METHODS = ("raptr", "raptr", "raptr", "full", *_DRAWN[1:], "stacking", "width")  # RaPTr has the most keys


@dataclass(frozen=True)
class Layout:
    """Processes, and what a run file says about them."""

    processes: int
    keys: Keys


class Draw:
    """Draws of one case, the same for one seed. What comes out may break a rule: the configuration knows them."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def one(self, *values: Any) -> Any:
        """Return one of the values."""
        return self.random.choice(values)

    def some(self, share: float, keys: Keys) -> Keys:
        """Return each of the keys in that share of cases."""
        return {key: value for key, value in keys.items() if self.random.random() < share}

    def run(self) -> Keys:
        """Return what a layout must not change."""
        steps, layers, heads = self.random.randint(5, 9), self.random.randint(1, 7), self.one(2, 4)
        architecture = self.one("bert", "ul2")
        return {
            "train_batch_size": self.one(4, 6, 8, 12),
            **self._optimizer(),
            **self.some(0.7, {"gradient_clipping": self.one(0.0, 0.1, 1.0)}),
            **self._precision(),
            **_in("raptr_ds.model", self._model(architecture, layers, heads)),
            **_in("raptr_ds.path", self._path(layers, heads)),
            **_in("raptr_ds.objective", self._objective(architecture)),
            **self.some(0.3, {"raptr_ds.data.packing": True}),
            "raptr_ds.train.steps": steps,
            "raptr_ds.train.seed": self.random.randint(0, 1000),
            "raptr_ds.eval.batches": 1,
            **self.some(0.4, {"raptr_ds.eval.interval": self.one(2, 3)}),
        }

    def _model(self, architecture: str, layers: int, heads: int) -> Keys:
        unusual = {
            "activation": self.one("gelu", "swiglu"),
            "normalization": self.one("layernorm", "rmsnorm"),
            "position_embedding": self.one("learned", "rotary"),
            "add_bias_linear": self.one(True, False),
            "tie_word_embeddings": False,
            "hidden_dropout": self.one(0.0, 0.1, 0.3),
            "attention_dropout": self.one(0.0, 0.1, 0.3),
            "ffn_hidden_size": self.one(64, 96),
            "init_method_std": 0.05,
            "rotary_base": 500.0,
        }
        sizes = {"num_layers": layers, "hidden_size": 32, "num_attention_heads": heads}
        seq_length = self.one(16, 24, 32, 33)
        return {"architecture": architecture, **sizes, "seq_length": seq_length, **self.some(0.25, unusual)}

    def _objective(self, architecture: str) -> Keys:
        own = [{"name": "a", "kind": "span", "mean_span": 3, "rate": 0.2}, {"name": "b", "kind": "causal"}]
        if architecture == "ul2":
            return self.some(0.5, {"denoisers": self.one("ul2", "causal_prefix_span", own)})
        return self.some(0.5, {"mask_rate": self.one(0.15, 0.3), "whole_word": self.one(True, False)})

    def _optimizer(self) -> Keys:
        kind = self.one("AdamW", "AdamW", "Adam", "SGD")
        params: Keys = {"lr": 0.05, **self.some(0.5, {"momentum": 0.9})}
        if kind != "SGD":
            # With an eps of 1e-8 the rounding of a gradient near zero moves its weight, by up to a percent of the rate.
            params = {
                "lr": 1e-3,
                "torch_adam": True,
                "eps": 1e-6,
                **self.some(0.3, {"amsgrad": True, "betas": [0.8, 0.95]}),
            }
        params |= self.some(0.5, {"weight_decay": self.one(0.0, 0.1)})
        return {"optimizer.type": kind, "optimizer.params": params, **self._scheduler()}

    def _scheduler(self) -> Keys:
        kinds = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "WarmupInverseSqrtLR", "WarmupStableDecayLR")
        scheduler = self.one(None, *kinds)
        if scheduler is None:
            return {}
        return {"scheduler.type": scheduler, "scheduler.params": {"warmup_num_steps": self.one(0, 2, 3)}}

    def _precision(self) -> Keys:
        precision = self.one(*["fp32"] * 8, "bf16", "fp16")
        if precision == "fp32":
            return {}
        keys = {f"{precision}.enabled": True, **self.some(0.5, {"data_types.grad_accum_dtype": "fp32"})}
        return keys | ({"fp16.initial_scale_power": 8} if precision == "fp16" else {})  # of which no step is skipped

    def _path(self, layers: int, heads: int) -> Keys:
        method = self.one(*_METHODS)
        keys: Keys = {"method": method}
        if method in {*_DRAWN, "width"}:
            scales, updates = self.one("none", "sqrt", "inverse"), self.one("freeze", "zero_grad")
            keys |= self.some(0.4, {"residual_scale": scales, "skipped_update": updates})
        if method in _DRAWN:
            keys |= self.some(0.2, {"paths_per_step": self.one(2, 3)})
        if method in {"raptr", "constant"}:
            fixed = self.one([], [0], [-1], [0, 1])
            keys |= self.some(0.3, {"fixed_layers": fixed, "sampling": self.one("bernoulli", "balanced")})
            if keys.get("sampling") == "balanced":  # else derived from the layout
                keys["balance_stages"] = self.random.randint(1, min(3, layers))
        if method in {"raptr", "stacking", "width"}:
            schedule = self._schedule(heads if method == "width" else layers, 0 if method == "stacking" else 1)
            keys |= self.some(0.5, {"schedule": schedule, "split": self.one("proportional", "power:1", "power:0.5")})
        if method in {"raptr", "width"}:
            keys |= self.some(0.15, {"full_warmup_steps": self.random.randint(1, 3)})
        return keys | self._of_one_method(method, layers, heads)

    def _of_one_method(self, method: str, layers: int, heads: int) -> Keys:
        grown: Keys = {
            "growth_position": "middle",
            "growth_init": self.one("zero", "random"),
            "growth_optimizer_state": self.one("copied", "fresh"),
            "growth_warmup_steps": self.one(1, 2),
        }
        return {
            "raptr": self.some(0.15, {"width_schedule": self.one("paper", "half", f"{heads}")}),
            "constant": self.some(0.5, {"constant_length": self.random.randint(1, layers)}),
            "layerdrop": self.some(0.5, {"layerdrop": self.one(0.1, 0.5, 0.9)}),
            "pld": self.some(0.5, {"pld_gamma": self.one(0.1, 1.0), "pld_theta": self.one(0.1, 0.9)}),
            "layer_dropout": self.some(0.5, {"layer_dropout": self.one(0.3, 0.95)}),
            "stacking": self.some(0.4, grown),
        }.get(method, {})

    def change(self, run: Keys) -> Keys:
        """Return what such a run's user changes before it goes on; None for a key that is taken out."""
        layers, heads = run["raptr_ds.model.num_layers"], run["raptr_ds.model.num_attention_heads"]
        architecture = run["raptr_ds.model.architecture"]
        parts: list[Keys] = [
            {"train_batch_size": self.one(4, 6, 8, 12)},
            {"optimizer.params": {**run["optimizer.params"], **self.one({"lr": 3e-3}, {"weight_decay": 0.05})}},
            {"gradient_clipping": self.one(0.05, 0.5)},
            {"scheduler.type": None, "scheduler.params": None, **self._scheduler()},
            {key: None for key in run if key.startswith(("bf16.", "fp16.", "data_types."))} | self._precision(),
            {key: None for key in run if key.startswith("raptr_ds.path.")}
            | _in("raptr_ds.path", self._path(layers, heads)),
            {key: None for key in run if key.startswith("raptr_ds.objective.")}
            | _in("raptr_ds.objective", self._objective(architecture)),
            _in("raptr_ds.model", {"hidden_dropout": self.one(0.0, 0.2), "attention_dropout": self.one(0.0, 0.2)}),
            {"raptr_ds.data.packing": self.one(True, False)},
            {"raptr_ds.train.steps": run["raptr_ds.train.steps"] + self.random.randint(-2, 4)},
            {"raptr_ds.train.seed": self.random.randint(0, 1000)},
            {"raptr_ds.eval.interval": self.one(0, 1, 2)},
        ]
        changed: Keys = {}
        for part in self.random.sample(parts, self.one(1, 1, 2, 3)):
            changed |= part
        return changed

    def recovery(self) -> Keys:
        """Return what a run does about numbers that are not finite, and its checkpoints."""
        return {
            "raptr_ds.train.on_non_finite": self.one("rollback", "rollback", "stop"),
            "raptr_ds.train.max_non_finite_steps": self.one(0, 1, 2, 3, 12),
            "raptr_ds.checkpoint.interval": self.one(1, 2, 3),
            "raptr_ds.checkpoint.keep": self.one(1, 2),
        }

    def _schedule(self, parts: int, least: int) -> str:
        shorter = {self.random.randint(least, parts) for _ in range(self.random.randint(0, 3))}
        return "-".join(map(str, sorted({*shorter, parts})))

    def layout(self, run: Keys) -> Layout:
        """Return processes, and how they share such a run."""
        tensor, pipeline, data = self.one(*_SHAPES)
        stage = self.one(0, 1) if pipeline > 1 else self.one(0, 1, 2, 3)
        fits = [size for size in (1, 2, 3, 4, 6) if run["train_batch_size"] // data % size == 0]
        split: Keys = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        split |= self.some(0.4, {"sequence_parallel": True}) if tensor > 1 else {}
        split |= self.some(0.3, {"activation_checkpointing": True})
        if "activation_checkpointing" in split:
            split |= self.some(0.4, {"keep_activations_up_to": self.random.randint(1, 4)})
        spare = run["raptr_ds.model.num_layers"] - pipeline
        if pipeline > 1 and spare >= 0 and run.get("raptr_ds.path.sampling") != "balanced":  # whose paths depend on it
            first = self.random.randint(0, spare)
            split |= self.some(0.3, {"pipeline_layers": [1 + first, *[1] * (pipeline - 2), 1 + spare - first]})
        num_phases = run.get("raptr_ds.path.schedule", "").count("-") + 1
        if pipeline == 1 and run["raptr_ds.path.method"] in {"raptr", "stacking"}:
            split |= self.some(0.3, {"micro_batches": [self.one(*fits) for _ in range(num_phases)]})
        keys: Keys = {
            "train_micro_batch_size_per_gpu": self.one(*fits),
            "zero_optimization.stage": stage,
            **_in("zero_optimization", self._zero(stage)),
            **_in("raptr_ds.parallel", split),
            **self.some(0.3, {"raptr_ds.data.num_workers": self.one(0, 2)}),
            **self.some(0.04, {"raptr_ds.train.compile": True}),  # a case of these takes as long as ten others
            **self.some(0.1, {"steps_per_print": 1, "wall_clock_breakdown": True, "memory_breakdown": True}),
        }
        return Layout(tensor * pipeline * data, keys)

    def resized(self, run: Keys, layout: Layout) -> Layout:
        """Return the layout on another number of processes that can share such a run, if there is one."""
        parallel = "raptr_ds.parallel.{}_model_parallel_size"
        tensor, pipeline = (layout.keys[parallel.format(kind)] for kind in ("tensor", "pipeline"))
        total, paths = run["train_batch_size"], run.get("raptr_ds.path.paths_per_step", 1)
        sizes = range(1, 4 // (tensor * pipeline) + 1)
        fits = [data for data in sizes if total % data == 0 and total // data % paths == 0]
        others = [data for data in fits if data * tensor * pipeline != layout.processes]
        return Layout(self.one(*(others or fits)) * tensor * pipeline, layout.keys)

    def _zero(self, stage: int) -> Keys:
        keys: Keys = {}
        if stage:
            keys |= {
                "contiguous_gradients": self.one(True, False),
                "reduce_scatter": self.one(True, False),
                "reduce_bucket_size": self.one(1000, 20_000),
                "overlap_comm": self.one(True, False),
            }
        if stage in {1, 2}:
            keys |= {
                "use_multi_rank_bucket_allreduce": self.one(True, False),
                "allgather_bucket_size": self.one(1000, 20_000),
                "round_robin_gradients": True,
                "parameter_alignment": True,
            }
        if stage == 3:
            keys |= {
                "sub_group_size": self.one(1000, 100_000),
                "stage3_prefetch_bucket_size": self.one(0, 1000),
                "stage3_param_persistence_threshold": self.one(0, 100, 10_000),
                "stage3_model_persistence_threshold": self.one(0, 1000),
                "stage3_max_live_parameters": self.one(0, 1000, 100_000),
                "stage3_max_reuse_distance": self.one(0, 1000, 100_000),
                "stage3_use_all_reduce_for_fetch_params": True,
                "stage3_allgather_sequential": True,
                "memory_efficient_linear": self.one(True, False),
            }
        return self.some(0.3, keys)


def _in(section: str, keys: Keys) -> Keys:
    return {f"{section}.{key}": value for key, value in keys.items()}


def write_run(file: Path, keys: Keys) -> None:
    """Write a run file without the keys that are None."""
    tree: Keys = {}
    for dotted, value in keys.items():
        if value is None:
            continue
        *parents, last = dotted.split(".")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    file.write_text(json.dumps(tree, indent=2))
