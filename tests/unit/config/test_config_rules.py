"""Every rule has a run that breaks it, with a message that names values and fix, and a neighbour that passes."""

import pytest

from raptr_ds.errors import ConfigError
from tests.unit.config.export_rules import EXPORT_RULES

P, M, R, T = "raptr_ds.path.", "raptr_ds.model.", "raptr_ds.parallel.", "raptr_ds.train."
SPAN = '"name":"a","kind":"span"'
DENOISERS = f"{M}architecture=ul2 raptr_ds.objective.denoisers="
SCHEDULE_LR = "scheduler.type=WarmupLR scheduler.params."

# rule name: [(world size, overrides that break it, what the message must say, overrides that pass)]
CASES: dict[str, list[tuple[int, str, list[str], str]]] = {
    **EXPORT_RULES,
    "heads_divide_hidden": [
        (1, f"{M}hidden_size=50", ["hidden_size=50", "num_attention_heads=4", "Set hidden_size to 52", "to 2"], ""),
    ],
    "rotary_needs_even_head": [
        (
            1,
            f"{M}hidden_size=12 {M}position_embedding=rotary",
            ["= 3", "even", "'learned'"],
            f"{M}hidden_size=12 {M}position_embedding=learned",
        ),
    ],
    "tensor_divides_heads": [
        (
            3,
            f"{R}tensor_model_parallel_size=3 train_batch_size=9",
            ["num_attention_heads=4", "size=3", "to 2"],
            f"{R}tensor_model_parallel_size=3 train_batch_size=9 {M}num_attention_heads=6",
        ),
    ],
    "tensor_divides_ffn": [
        (
            2,
            f"{R}tensor_model_parallel_size=2 {M}ffn_hidden_size=101",
            ["ffn_hidden_size=101", "Set ffn_hidden_size to 102"],
            f"{R}tensor_model_parallel_size=2 {M}ffn_hidden_size=102",
        ),
    ],
    "sequence_parallel_has_ranks": [
        (
            2,
            f"{R}sequence_parallel=true",
            ["sequence_parallel=true", "no use", "tensor_model_parallel_size=1: it splits", "to 2 or more"],
            f"{R}sequence_parallel=true {R}tensor_model_parallel_size=2",
        ),
    ],
    "tensor_divides_sequence": [
        (
            4,
            f"{R}sequence_parallel=true {R}tensor_model_parallel_size=4 {M}seq_length=30",
            ["seq_length=30", "size=4", "Set seq_length to 32"],
            f"{R}tensor_model_parallel_size=4 {M}seq_length=30",
        ),
        (
            4,
            f"{R}sequence_parallel=true {R}tensor_model_parallel_size=4 {M}seq_length=30",
            ["a multiple of raptr_ds.parallel.tensor_model_parallel_size=4"],
            f"{R}sequence_parallel=true {R}tensor_model_parallel_size=4 {M}seq_length=28",
        ),
    ],
    "world_fits_layout": [
        (
            3,
            f"{R}tensor_model_parallel_size=2",
            ["3 processes", "= 2", "Start a multiple of 2 processes"],
            f"{R}tensor_model_parallel_size=1 train_batch_size=9",
        ),
        (6, f"{R}pipeline_model_parallel_size=4", ["6 processes", "= 4"], f"{R}pipeline_model_parallel_size=3"),
    ],
    "stages_have_layers": [
        (
            4,
            f"{R}pipeline_model_parallel_size=4 {M}num_layers=3",
            ["size=4", "num_layers=3", "to 3 or less"],
            f"{R}pipeline_model_parallel_size=4 {M}num_layers=5",
        ),
    ],
    "pipeline_layers_fit": [
        (
            2,
            f"{R}pipeline_model_parallel_size=2 {R}pipeline_layers=[5,6]",
            ["[5, 6]", "11 layers", "num_layers=12", "remove it"],
            f"{R}pipeline_model_parallel_size=2 {R}pipeline_layers=[5,7]",
        ),
        (
            2,
            f"{R}pipeline_model_parallel_size=2 {R}pipeline_layers=[4,4,4]",
            ["3 stages", "=2 entries"],
            f"{R}pipeline_model_parallel_size=2 {R}pipeline_layers=[1,11]",
        ),
    ],
    "fixed_layers_exist": [
        (1, f"{P}fixed_layers=[0,12]", ["has 12", "-12..11"], f"{P}fixed_layers=[0,11]"),
        (1, f"{P}fixed_layers=[-13]", ["has -13", "Correct or remove"], f"{P}fixed_layers=[-12]"),
    ],
    "bernoulli_path_is_never_empty": [
        (1, f"{P}sampling=bernoulli {P}fixed_layers=[]", ["without layers", "Fix a layer"], f"{P}fixed_layers=[]"),
    ],
    "balanced_stages_have_layers": [
        (
            1,
            f"{P}sampling=balanced {P}balance_stages=13",
            ["balance_stages=13", "num_layers=12", "Set it to 12", "remove it"],
            f"{P}sampling=balanced {P}balance_stages=12",
        ),
    ],
    "kept_activations_need_recomputation": [
        (
            1,
            f"{R}keep_activations_up_to=4",
            ["keep_activations_up_to=4", "activation_checkpointing=false", "or set raptr_ds.parallel.activation_che"],
            f"{R}keep_activations_up_to=4 {R}activation_checkpointing=true",
        ),
    ],
    "micro_batches_fit_the_phases": [
        (
            1,
            f"{R}micro_batches=[8,4]",
            ["micro_batches=[8, 4] has 2 sizes", "'6-8-10-12' has 4 phases", "Write one size for each phase"],
            f"{R}micro_batches=[8,4] {P}schedule=6-12",
        ),
        (
            1,
            f"{R}micro_batches=[8,4] {P}method=constant",
            ["2 sizes", "method 'constant' has 1 phases"],
            f"{R}micro_batches=[4] {P}method=constant",
        ),
        (
            1,
            f"{R}micro_batches=[8,8,4,4] {P}sampling=bernoulli",
            ["sampling='bernoulli'", "Set sampling to 'uniform'"],
            f"{R}micro_batches=[8,8,4,4] {P}full_warmup_steps=2",
        ),
        (
            2,
            f"{R}micro_batches=[8,8,4,4] {R}pipeline_model_parallel_size=2",
            ["pipeline_model_parallel_size=2", "Set pipeline_model_parallel_size to 1"],
            f"{R}micro_batches=[4,4,2,2]",
        ),
        (
            1,
            f"{R}micro_batches=[8,8,4,4] {R}activation_checkpointing=true",
            ["keep_activations_up_to switches recomputation off"],
            f"{R}activation_checkpointing=true {R}keep_activations_up_to=6",
        ),
        (
            1,
            f"{R}micro_batches=[8,8,4,4] {P}paths_per_step=2 train_micro_batch_size_per_gpu=4",
            ["paths_per_step=2", "Remove one"],
            f"{P}paths_per_step=2 train_micro_batch_size_per_gpu=4",
        ),
    ],
    "schedule_is_written_well": [
        (1, f"{P}schedule=6,8,12", ["'6,8,12'", "joined by '-'", "'6-8-10-12'"], f"{P}schedule=6-8-12"),
        (1, f"{P}schedule=0-12", ["'0-12'", "from 1"], f"{P}schedule=2-12"),
        (1, f"{P}schedule=6-8-", ["'6-8-'"], f"{P}schedule=12"),
    ],
    "schedule_fits_model": [
        (
            1,
            f"{P}schedule=6-8-10-12 {M}num_layers=5",
            ["more than the model has", "num_layers=5", "End it with 5"],
            f"{P}schedule=3-4-5 {M}num_layers=5",
        ),
        (
            1,
            f"{P}schedule=6-8-10",
            ["must end with the full model, not at 10 layers", "End it with 12"],
            f"{P}schedule=6-8-12",
        ),
    ],
    "width_divides_the_mlp": [
        (
            1,
            f"{P}method=width {M}num_attention_heads=6 {M}ffn_hidden_size=100 {P}schedule=null",
            ["ffn_hidden_size=100", "num_attention_heads=6", "Set ffn_hidden_size to 102"],
            f"{P}method=width {M}num_attention_heads=6 {M}ffn_hidden_size=102 {P}schedule=null",
        ),
    ],
    "width_freezes_whole_tensors": [
        (
            2,
            f"{P}method=width zero_optimization.stage=1 {P}schedule=null",
            ["zero_optimization.stage=1", "2 data-parallel processes", "'zero_grad'"],
            f"{P}method=width {P}skipped_update=zero_grad zero_optimization.stage=1 {P}schedule=null",
        ),
        (
            1,
            f"{P}method=width zero_optimization.stage=3 {P}schedule=null",
            ["zero_optimization.stage=3"],
            f"{P}method=width zero_optimization.stage=2 {P}schedule=null",
        ),
    ],
    "width_is_not_compiled": [
        (
            1,
            f"{P}method=width raptr_ds.train.compile=true {P}schedule=null",
            ["compile=true", "'width'"],
            f"{P}method=width {P}schedule=null",
        ),
    ],
    "schedule_never_shrinks": [
        (1, f"{P}schedule=8-6-12", ["'8-6-12'", "'6-8-12'"], f"{P}schedule=6-6-12"),
    ],
    "schedule_holds_fixed": [
        (1, f"{P}schedule=1-12", ["paths of 1 layers", "the 2 of", "at least 2"], f"{P}schedule=2-12"),
        (1, f"{P}schedule=1-12 {P}fixed_layers=[0,-1]", ["fewer than"], f"{P}schedule=1-12 {P}fixed_layers=[0,-12]"),
    ],
    "constant_length_fits": [
        (
            1,
            f"{P}method=constant {P}constant_length=13",
            ["constant_length=13", "2..12"],
            f"{P}method=constant {P}constant_length=12",
        ),
        (
            1,
            f"{P}method=constant {P}constant_length=1",
            ["remove it"],
            f"{P}method=constant {P}constant_length=1 {P}fixed_layers=[]",
        ),
    ],
    "full_warmup_said_once": [
        (
            1,
            f"{P}full_warmup_steps=5 {P}full_warmup_ratio=0.5",
            ["twice", "Keep one"],
            f"{P}full_warmup_ratio=0.5",
        ),
        (1, f"{P}full_warmup_steps=0 {P}full_warmup_ratio=0.5", ["twice"], f"{P}full_warmup_ratio=0.996"),
    ],
    "full_warmup_ends": [
        (1, f"{P}full_warmup_steps=100", ["=100", "steps=100", "full_warmup_ratio"], f"{P}full_warmup_steps=99"),
    ],
    "denoisers_are_complete": [
        (1, f'{DENOISERS}[{{{SPAN},"rate":0.1}}]', ["[0] ('a'", "needs mean_span"], f"{DENOISERS}ul2"),
        (
            1,
            f'{DENOISERS}[{{"name":"c","kind":"causal","rate":0.5}}]',
            ["no use for rate", "Remove"],
            f'{DENOISERS}[{{"name":"c","kind":"causal"}}]',
        ),
        (
            1,
            f'{DENOISERS}[{{{SPAN},"rate":0.1,"mean_span":32}}]',
            ["mean_span=32", "seq_length=32"],
            f'{DENOISERS}[{{{SPAN},"rate":0.1,"mean_span":31}}]',
        ),
        (
            1,
            f'{DENOISERS}[{{"name":"c","kind":"causal"}},{{"name":"c","kind":"causal"}}]',
            ["used 2 times", "its own"],
            f'{DENOISERS}[{{"name":"c","kind":"causal"}},{{"name":"p","kind":"prefix","rate":0.25}}]',
        ),
    ],
    "mask_predicts_something": [
        (
            1,
            "raptr_ds.objective.mask_rate=0.01",
            ["0.01", "seq_length=32", "seq_length to 100 or more", "mask_rate to 0.0313"],
            "raptr_ds.objective.mask_rate=0.1",
        ),
    ],
    "pipeline_allows_zero_stage": [
        (
            2,
            f"{R}pipeline_model_parallel_size=2 zero_optimization.stage=2",
            ["size=2 needs zero_optimization.stage <= 1", "got 2", "Set zero_optimization.stage to 1"],
            f"{R}pipeline_model_parallel_size=2 zero_optimization.stage=1",
        ),
        (2, f"{R}pipeline_model_parallel_size=2 zero_optimization.stage=3", ["got 3"], "zero_optimization.stage=3"),
    ],
    "pipeline_is_not_timed": [
        (
            2,
            f"{R}pipeline_model_parallel_size=2 {timing}=true",
            [f"{timing}=true with", "size=2", f"Set {timing} to false"],
            f"{R}pipeline_model_parallel_size=2 {timing}=false",
        )
        for timing in ("wall_clock_breakdown", "flops_profiler.enabled")
    ],
    "compile_allows_zero_stage": [
        (
            1,
            "raptr_ds.train.compile=true zero_optimization.stage=3",
            ["compile=true needs zero_optimization.stage <= 2", "got 3", "to 2"],
            "raptr_ds.train.compile=true zero_optimization.stage=2",
        ),
    ],
    "overlapped_reduction_sees_every_path": [
        (
            1,
            f"{P}paths_per_step=2 train_micro_batch_size_per_gpu=4 zero_optimization.stage=1 "
            "zero_optimization.overlap_comm=true",
            ["paths_per_step=2", "stage=1", "Remove overlap_comm"],
            f"{P}paths_per_step=2 train_micro_batch_size_per_gpu=4 zero_optimization.stage=1",
        ),
    ],
    "one_precision": [
        (1, "bf16.enabled=true fp16.enabled=true", ["both true", "to false"], "bf16.enabled=true fp16.enabled=false"),
    ],
    "accumulation_dtype_fits": [
        (
            1,
            "bf16.enabled=true data_types.grad_accum_dtype=fp16",
            ["'fp16'", "'bf16'", "remove it"],
            "bf16.enabled=true data_types.grad_accum_dtype=fp32",
        ),
    ],
    "adamw_is_adamw": [
        (
            1,
            "optimizer.type=AdamW optimizer.params.adam_w_mode=false",
            ["'Adam'", "remove adam_w_mode"],
            "optimizer.type=Adam optimizer.params.adam_w_mode=false",
        ),
    ],
    "nesterov_has_momentum": [
        (
            1,
            "optimizer.type=SGD optimizer.params.nesterov=true",
            ["momentum=0", "remove nesterov"],
            "optimizer.type=SGD optimizer.params.nesterov=true optimizer.params.momentum=0.9",
        ),
    ],
    "one_peak_learning_rate": [
        (
            1,
            f"optimizer.type=Adam optimizer.params.lr=0.01 {SCHEDULE_LR}warmup_max_lr=0.02",
            ["=0.02", "=0.01", "Remove warmup_max_lr"],
            f"optimizer.type=Adam optimizer.params.lr=0.01 {SCHEDULE_LR}warmup_max_lr=0.01",
        ),
    ],
    "warmup_starts_below_peak": [
        (1, f"{SCHEDULE_LR}warmup_min_lr=0.1", ["=0.1", "Lower"], f"{SCHEDULE_LR}warmup_min_lr=0.0001"),
    ],
    "warmup_ends": [
        (
            1,
            f"{SCHEDULE_LR}warmup_num_steps=100",
            ["=100", "steps=100", "warmup_ratio"],
            f"{SCHEDULE_LR}warmup_num_steps=99",
        ),
        (
            1,
            "scheduler.type=WarmupStableDecayLR scheduler.params.warmup_ratio=0.6 scheduler.params.decay_ratio=0.5",
            ["warmup_ratio=0.6", "decay_ratio=0.5", "at most 1"],
            "scheduler.type=WarmupStableDecayLR scheduler.params.warmup_ratio=0.5 scheduler.params.decay_ratio=0.5",
        ),
    ],
    "non_finite_limit_is_beyond_fp16s_search": [
        (
            1,
            f"fp16.enabled=true {T}max_non_finite_steps=17",
            ["=17 must be more than 17", "Set it to 18", "or to 0", "initial_scale_power"],
            f"fp16.enabled=true {T}max_non_finite_steps=18",
        ),
        (
            1,
            f"fp16.enabled=true fp16.initial_scale_power=20 fp16.hysteresis=1 {T}max_non_finite_steps=1",
            ["more than 20"],
            f"fp16.enabled=true fp16.loss_scale=1024 {T}max_non_finite_steps=1",
        ),
    ],
    "rollback_can_happen": [
        (
            1,
            f"{T}on_non_finite=rollback {T}max_non_finite_steps=0 raptr_ds.checkpoint.interval=5",
            ["never act", "Set max_non_finite_steps to 1"],
            f"{T}on_non_finite=rollback {T}max_non_finite_steps=1 raptr_ds.checkpoint.interval=5",
        ),
        (
            1,
            f"{T}on_non_finite=rollback",
            ["raptr_ds.checkpoint.interval=0", "to 'stop'"],
            f"{T}on_non_finite=stop",
        ),
    ],
}

FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("case", FLAT, ids=lambda case: case[0])
def test_rule(load, case):
    _, world_size, broken, says, passes = case
    load(*passes.split(), world_size=world_size)
    with pytest.raises(ConfigError) as error:
        load(*broken.split(), world_size=world_size)
    for fragment in says:
        assert fragment in str(error.value)
    assert error.value.exit_code == 2
