"""Loading: what is derived, what is refused and where it stands, and that a resolved run is the same run."""

import json
from dataclasses import FrozenInstanceError

import pydantic
import pytest

from raptr_ds.config.derive import derive_pipeline_layers
from raptr_ds.config.load import load_run_config
from raptr_ds.config.path_sections import named_schedule
from raptr_ds.errors import ConfigError

P, M = "raptr_ds.path.", "raptr_ds.model."


@pytest.mark.parametrize(
    ("depth", "schedule"),
    [
        (12, (6, 8, 10, 12)),
        (24, (12, 16, 20, 24)),
        (8, (4, 5, 7, 8)),
        (5, (3, 3, 4, 5)),
        (2, (2, 2, 2, 2)),
        (1, (1,) * 4),
    ],
)
def test_default_schedule(depth, schedule):
    assert named_schedule("paper", depth, least=min(2, depth)) == schedule


@pytest.mark.parametrize("depth", range(1, 40))
def test_default_schedule_keeps_the_rules_at_every_depth(load, depth):
    lengths = load(f"{M}num_layers={depth}").path.phase_lengths
    assert lengths[-1] == depth
    assert list(lengths) == sorted(lengths)


def test_default_schedule_has_room_for_fixed_layers(load):
    assert load(f"{P}fixed_layers=[0,1,2,3,4,5,6,-1]").path.schedule == "8-8-10-12"


@pytest.mark.parametrize(
    ("layers", "stages", "expected"), [(5, 2, (3, 2)), (7, 4, (2, 2, 2, 1)), (10, 4, (2, 3, 3, 2))]
)
def test_stages_are_as_even_as_possible(layers, stages, expected):
    assert derive_pipeline_layers(layers, stages) == expected


def test_architecture_decides_the_rest(load):
    bert, ul2 = load().model, load(f"{M}architecture=ul2").model
    assert (bert.activation, bert.normalization, bert.position_embedding) == ("gelu", "layernorm", "learned")
    assert (bert.add_bias_linear, bert.hidden_dropout, bert.ffn_hidden_size) == (True, 0.1, 192)
    assert (ul2.activation, ul2.normalization, ul2.position_embedding) == ("swiglu", "rmsnorm", "rotary")
    assert (ul2.add_bias_linear, ul2.hidden_dropout, ul2.ffn_hidden_size) == (False, 0.0, 128)
    assert load(f"{M}architecture=ul2", f"{M}activation=gelu").model.ffn_hidden_size == 192


def test_components_read_no_none(load):
    config, optional = load(world_size=2), {"vocab_size", "width_schedule", "full_warmup_ratio", "constant_length"}
    optional |= {"balance_stages", "layerdrop", "compile"}
    for section in (config.model, config.parallel, config.path, config.train):
        left = {key for key, value in section if value is None}
        assert left <= optional
    assert config.parallel.pipeline_layers == (12,)
    assert config.train.save == "runs/run"
    assert (config.precision, config.zero_stage, config.gradient_clipping) == ("fp32", 0, 1.0)
    assert config.optimizer["type"] == "AdamW"
    assert config.scheduler is None
    assert config.batch.micro_batch == 4


def test_deepspeed_gets_its_part_complete(load):
    config = load("scheduler.type=warmuplr", "optimizer.type=sgd", "train_micro_batch_size_per_gpu=2")
    assert config.deepspeed == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
    }
    assert config.scheduler == {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "log"},
    }


def test_ratios_follow_the_steps(load):
    given = ["scheduler.type=WarmupStableDecayLR", "scheduler.params.warmup_ratio=0.29", f"{P}full_warmup_ratio=0.29"]
    config = load(*given)
    assert config.scheduler is not None
    assert config.scheduler["params"]["warmup_num_steps"] == 29
    assert config.scheduler["params"]["decay_num_steps"] == 10
    assert (config.path.full_warmup_steps, config.path.full_warmup_ratio) == (29, None)
    assert load(*given, "raptr_ds.train.steps=3").path.full_warmup_steps == 1


def test_derived_values_are_said(load):
    lines = load(world_size=2).derived
    for line in ("raptr_ds.path.schedule=6-8-10-12", "gradient_accumulation_steps=1", "data parallel size 2"):
        assert line in lines
    assert not any(line.startswith("raptr_ds.train.seed") for line in lines)
    assert "raptr_ds.path.constant_length=9" in load(f"{P}method=constant").derived


def test_vocabulary_is_the_tokenizers(load):
    config = load().with_vocab_size(100)
    assert config.model.vocab_size == 100
    assert config.with_vocab_size(100) == config
    with pytest.raises(ConfigError, match=r"vocab_size=100 does not match the tokenizer, which has 90 .*Remove"):
        config.with_vocab_size(90)


def test_nothing_changes_a_configuration(load):
    config = load()
    with pytest.raises(FrozenInstanceError):
        config.zero_stage = 3
    with pytest.raises(pydantic.ValidationError):
        config.model.num_layers = 3
    config.deepspeed["optimizer"]["params"]["lr"] = 7.0
    assert config.optimizer["params"]["lr"] == 1e-3


RESOLVABLE = {
    "plain": "",
    "full": f"{P}method=full",
    "pld": f"{P}method=pld {P}pld_gamma=0.01",
    "constant": f"{P}method=constant {P}fixed_layers=[0]",
    "layerdrop": f"{P}method=layerdrop {P}residual_scale=sqrt",
    "stacking": f"{P}method=stacking {P}schedule=3-6-12 {P}growth_warmup_steps=5",
    "random parts": f"{P}width_schedule=paper {P}schedule=6-8-10-12",
    "one expansion": f"{P}method=stacking {P}schedule=0-12 {P}split=[0.8,0.2] {P}growth_init=random",
    "midas": f"{P}method=stacking {P}schedule=4-8-12 {P}split=power:1.5 {P}growth_position=middle",
    "layer_dropout": f"{P}method=layer_dropout {P}paths_per_step=2 train_micro_batch_size_per_gpu=2",
    "width": f"{P}method=width {P}full_warmup_ratio=0.1 {P}skipped_update=zero_grad",
    "ul2": f"{M}architecture=ul2 raptr_ds.objective.denoisers=causal_prefix_span",
    "denoisers": f'{M}architecture=ul2 raptr_ds.objective.denoisers=[{{"name":"c","kind":"causal"}}]',
    "layout": "raptr_ds.parallel.pipeline_model_parallel_size=2 zero_optimization.stage=1 bf16.enabled=true",
    "zero3": "zero_optimization.stage=3 zero_optimization.stage3_prefetch_bucket_size=5e8",
    "schedule": "scheduler.type=WarmupCosineLR scheduler.params.warmup_ratio=0.1 fp16.enabled=true",
    "stable": "scheduler.type=WarmupStableDecayLR scheduler.params.decay_ratio=0.2 optimizer.type=SGD",
    "blend": 'raptr_ds.data.path={"data/a.b":1,"c":0.5} raptr_ds.log.peak_tflops=10 raptr_ds.data.tokenizer=t.model',
    "balanced": f"{P}sampling=balanced raptr_ds.parallel.pipeline_model_parallel_size=2",
    "several": f"{P}method=constant {P}paths_per_step=2 train_micro_batch_size_per_gpu=2",
    "warmup": f"{P}full_warmup_ratio=0.1 {P}schedule=3-12 {P}split=proportional",
}


@pytest.mark.parametrize("overrides", RESOLVABLE.values(), ids=RESOLVABLE.keys())
def test_a_resolved_run_is_the_same_run(load, tmp_path, overrides):
    config = load(*overrides.split(), world_size=2).with_vocab_size(77)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.resolved()), encoding="utf-8")
    again = load_run_config(file, [], 2)
    assert again == config
    assert again.resolved() == config.resolved()
    assert again.derived == [f"data parallel size {config.batch.data_parallel}"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"{P}schedul=6-12", ["raptr_ds.path.schedul (from --set) is an unknown key", "'schedule'?", "Keys of"]),
        ("raptr_ds.modle.num_layers=3", ["raptr_ds.modle (from --set)", "did you mean 'model'?"]),
        ("zero_optimisation.stage=3", ["zero_optimisation (from --set)", "did you mean 'zero_optimization'?"]),
        ("zero_optimization.stag=3", ["zero_optimization.stag ", "did you mean 'stage'?"]),
        ("raptr_ds.model.steps=3", ["raptr_ds.model.steps", "it belongs to raptr_ds.train"]),
        ("raptr_ds.train.train_batch_size=3", ["it belongs to the top level"]),
        ("path.method=full", ["it belongs in raptr_ds: raptr_ds.path"]),
        (
            f"{P}method=stack",
            ["'stack'", "full, raptr, pld, constant, layerdrop, layer_dropout, stacking", "did you mean 'stacking'?"],
        ),
        (
            'raptr_ds.path={"method": "layerdrop", "layerdrop": 1}',
            ["raptr_ds.path.layerdrop=1", "less than or equal to 0.999"],
        ),
        ('raptr_ds.path={"method": "layerdrop", "layerdrop": 0.9999}', ["less than or equal to 0.999."]),
        ('raptr_ds.path={"method": "layer_dropout", "layer_dropout": 1}', ["layer_dropout=1", "less than 1."]),
        (
            'raptr_ds.path={"method": "stacking", "growth_optimizer_state": "new"}',
            ["growth_optimizer_state='new'", "copied, fresh"],
        ),
        (f"{P}sampling=balance", ["must be one of", "did you mean 'balanced'?"]),
        (f"{P}method=rapter", ["must be one of", "did you mean 'raptr'?"]),
        (f"{M}num_layers=twelve", ["raptr_ds.model.num_layers='twelve'", "a whole number"]),
        (f"{M}num_layers=0", ["raptr_ds.model.num_layers=0", "greater than 0"]),
        (f"{M}num_layers=1.5", ["raptr_ds.model.num_layers=1.5", "a whole number"]),
        (f"{M}num_layers=true", ["raptr_ds.model.num_layers=True"]),
        (f"{M}num_layers=null", ["raptr_ds.model.num_layers is missing", "Depth L of the full model"]),
        (f"{M}hidden_dropout=1.0", ["hidden_dropout=1.0", "less than 1"]),
        ("raptr_ds.objective.mask_rate=0", ["mask_rate=0", "greater than 0"]),
        ("raptr_ds.objective.mask_rate=1", ["mask_rate=1", "less than 1"]),
        ("raptr_ds.data.path={a: -1}", ["raptr_ds.data.path.a=-1", "greater than 0"]),
        ("raptr_ds.data.path={}", ["raptr_ds.data.path={} (from --set) must have at least 1 item."]),
        ("raptr_ds.data.path={list: -1, x: 1}", ["raptr_ds.data.path.list=-1", "greater than 0"]),
        ('raptr_ds.data.path=""', ["raptr_ds.data.path='' (from --set) must have at least 1 character."]),
        ("raptr_ds.parallel.micro_batches=8", ["micro_batches=8 (from --set) must be a list, as [16, 12, 8, 8]."]),
        ("raptr_ds.parallel.pipeline_layers=8", ["must be a list, as [6, 6]."]),
        (f"{P}fixed_layers=0", ["must be a list, as [0, -1]."]),
        *(
            (f"raptr_ds.{key}=1", [f"raptr_ds.{key} (from --set) is an unknown key"])
            for key in ("data.folder", "data.blend", "model.list", "eval.list", "path.list", "objective.preset")
        ),
        (
            "raptr_ds.log.wandb.list=1",
            ["raptr_ds.log.wandb.list (from --set) is an unknown key", "Keys of raptr_ds.log"],
        ),
        ("raptr_ds.train.seed=1e20", ["raptr_ds.train.seed=1e+20", "less than or equal to 9223372036854775807"]),
        ("raptr_ds.data.path=5", ["raptr_ds.data.path=5", "must be a folder, or"]),
        ("raptr_ds.train.save=2024", ["raptr_ds.train.save=2024", "must be a string; put it in double quotes"]),
        ("raptr_ds.train.steps=-1", ["raptr_ds.train.steps=-1", "greater than 0"]),
        ("raptr_ds.log.tensorboard=yes", ["raptr_ds.log.tensorboard='yes'", "true or false"]),
        ("raptr_ds.data.packing=documents", ["raptr_ds.data.packing='documents'", "true or false"]),
        ("raptr_ds.train.compile=1", ["raptr_ds.train.compile=1", "true or false"]),
        ("raptr_ds.train=5", ["raptr_ds.train=5 (from --set) must be an object"]),
        ("raptr_ds=5", ["raptr_ds =5 is not an object"]),
        ("raptr_ds=null", ["raptr_ds is missing", "deepspeed_configs/"]),
    ],
)
def test_single_keys(load, override, says):
    with pytest.raises(ConfigError) as error:
        load(override)
    for fragment in says:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("size", "says"), [("-5", "greater than 0"), ("1e9", "less than or equal to 536870911"), ("true", "a whole number")]
)
def test_a_wrong_width_is_the_only_problem(load, size, says):
    for architecture in ("bert", "ul2"):
        with pytest.raises(ConfigError, match=rf"raptr_ds\.model\.hidden_size=.* must be {says}") as error:
            load(f"{M}hidden_size={size}", f"{M}architecture={architecture}")
        assert "ffn_hidden_size" not in str(error.value)
    assert load(f"{M}hidden_size=536870908").model.ffn_hidden_size == 4 * 536870908


@pytest.mark.parametrize(
    ("denoisers", "says"),
    [
        ("ul3", "must be one of ul2, causal_prefix_span"),
        ("[]", "raptr_ds.objective.denoisers=[] must have at least 1 item."),
        ("5", 'raptr_ds.objective.denoisers=5 must be a list, as [{"name": "a", "kind": "causal"}].'),
        ('[{"name": "a"}]', "raptr_ds.objective.denoisers.0.kind is missing"),
        ('[{"name": "a", "kind": "spam"}]', "must be one of span, prefix, causal; did you mean 'span'?"),
        (
            '[{"name": "a", "kind": "causal", "wieght": 1}]',
            "denoisers.0.wieght (from --set) is an unknown key; did you mean 'weight'?",
        ),
        ('[{"name": "a", "kind": "causal", "weight": 0}]', "raptr_ds.objective.denoisers.0.weight=0"),
    ],
)
def test_denoisers(load, denoisers, says):
    with pytest.raises(ConfigError) as error:
        load(f"{M}architecture=ul2", f"raptr_ds.objective.denoisers={denoisers}")
    assert "problems" not in str(error.value)
    assert says.replace(" (from --set)", "") in str(error.value).replace(" (from --set)", "")


def test_a_learning_rate_is_all_an_optimizer_needs(load):
    expected = {"weight_decay": 0.01, "torch_adam": True, "lr": 0.01, "fused": True}
    assert load("optimizer.params.lr=0.01").optimizer == {"type": "AdamW", "params": expected}


def test_null_leaves_a_key_of_an_object_in_a_list_to_its_default_too(load):
    denoisers = '[{"name": "a", "kind": "causal", "weight": null, "mode": null}]'
    (denoiser,) = load(f"{M}architecture=ul2", f"raptr_ds.objective.denoisers={denoisers}").objective.denoisers
    assert (denoiser.weight, denoiser.mode) == (1.0, None)


def test_due():
    from raptr_ds.config.sections import CheckpointSection, EvalSection

    assert [step for step in range(1, 12) if CheckpointSection(interval=5).due(step, since=step - 1)] == [5, 10]
    assert [step for step in range(9, 21) if CheckpointSection(interval=10).due(step, since=9)] == list(range(10, 21))
    assert not CheckpointSection(interval=10).due(19, since=10)
    assert not CheckpointSection(interval=0).due(19, since=1)
    assert [step for step in range(12) if EvalSection(interval=5).due(step)] == [5, 10]
    assert not any(EvalSection(interval=5, batches=0).due(step) for step in range(12))


def test_balanced_paths_follow_the_pipeline_unless_they_are_pinned(load):
    pipeline = "raptr_ds.parallel.pipeline_model_parallel_size"
    derived = load(f"{P}sampling=balanced", f"{pipeline}=4", world_size=4)
    assert derived.path.balance_stages == 4
    assert f"{P}balance_stages=4" in derived.derived
    pinned = load(f"{P}sampling=balanced", f"{P}balance_stages=4", f"{pipeline}=2", world_size=2)
    assert (pinned.path.balance_stages, pinned.parallel.pipeline_layers) == (4, (6, 6))
    assert load().path.balance_stages is None


def test_a_null_is_a_default(load, small_run):
    expected = load()
    small_run["raptr_ds"]["path"]["schedule"] = None
    small_run["scheduler"] = None
    assert load() == expected


def test_steps_may_be_written_as_1e6(load):
    assert load("raptr_ds.train.steps=1e6").train.steps == 1_000_000


def test_unknown_keys_name_their_line(load):
    with pytest.raises(
        ConfigError, match=r"run\.json: raptr_ds\.model\.num_layer \(line 3\) is an unknown key.*'num_layers'"
    ):
        load(
            text='{"train_batch_size": 8, "raptr_ds": {\n "model": {architecture: bert\n "num_layer": 3\n num_layers: 3'
            "\n"
            "hidden_size: 4\n num_attention_heads: 2\n seq_length: 8}, data: {path: d\n}, train: {steps: 4}}}"
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,\n "a": 2}', r"the key 'a' is written twice in one object \(see lines 1, 2\)"),
        ('{\n "a": [1, 2\n', r"run\.json, line \d column \d"),
        ("[1]", r"must hold one object"),
    ],
)
def test_files_that_cannot_be_read_say_where(load, text, says):
    with pytest.raises(ConfigError, match=says):
        load(text=text)


def test_missing_file_and_other_encodings(tmp_path):
    (tmp_path / "here.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"gone\.json does not exist.*holds: here\.json"):
        load_run_config(tmp_path / "gone.json", [], 1)
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run_config(tmp_path / "here.json", [], 1)


def test_comma_after_a_string_without_quotes_is_explained(load):
    with pytest.raises(ConfigError, match="runs to the end of its line"):
        load(f"{P}method=full,")


def test_the_limit_of_steps_that_are_not_finite_is_beyond_fp16s_search_for_its_scale(load):
    limits = {
        "": 20,
        "bf16.enabled=true": 20,
        "fp16.enabled=true": 20,  # a search from 2^16 skips 17 steps at the most
        "fp16.enabled=true fp16.loss_scale=1024": 20,
        "fp16.enabled=true fp16.initial_scale_power=32": 34,
        "fp16.enabled=true fp16.initial_scale_power=32 fp16.hysteresis=4": 36,
        "fp16.enabled=true fp16.initial_scale_power=32 raptr_ds.train.max_non_finite_steps=0": 0,
    }
    assert {said: load(*said.split()).train.max_non_finite_steps for said in limits} == limits
    assert load().train.on_non_finite == "stop"


def test_all_violations_come_together(load):
    with pytest.raises(ConfigError, match="3 problems") as error:
        load("raptr_ds.model.hidden_size=50", "raptr_ds.path.schedule=6-8", "bf16.enabled=true", "fp16.enabled=true")
    assert [line[:4] for line in str(error.value).splitlines()[1:]] == ["  1.", "  2.", "  3."]
