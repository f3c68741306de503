"""The sections of the `raptr_ds` block: the keys of a run file beyond DeepSpeed's own, and their defaults."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic.fields import FieldInfo

from raptr_ds.config.path_sections import PATH_SECTIONS
from raptr_ds.config.section_types import (
    MOST_WIDTH,
    Count,
    CountOrZero,
    OpenFraction,
    Parts,
    Positive,
    PositiveOrZero,
    Probability,
    Section,
    Seed,
    Text,
    Width,
    derived_key,
)

BLOCK = "raptr_ds"
"""The key of a run file that holds our sections, beside DeepSpeed's keys."""

_FFN_MULTIPLE = 64
BY_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "bert": {
        "activation": "gelu",
        "normalization": "layernorm",
        "position_embedding": "learned",
        "add_bias_linear": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "ul2": {
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "position_embedding": "rotary",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}
"""What a model section that leaves these keys out gets."""


def passes_multiple(interval: int, since: int, step: int) -> bool:
    """Return whether a multiple of an interval lies after `since` and not after `step`; of 0 none does."""
    return interval > 0 and step // interval > since // interval


class ModelSection(Section):
    """`raptr_ds.model`: the network. What is left out follows from the architecture; a section is complete once it is
    read, but for vocab_size, which may wait for the tokenizer."""

    architecture: Literal["bert", "ul2"]
    """bert: pre-layer-norm encoder, masked language modelling. ul2: prefix language model, mixture of denoisers."""
    num_layers: Parts
    """Depth L of the full model."""
    hidden_size: Width
    """Width of the residual stream; a multiple of num_attention_heads."""
    num_attention_heads: Count
    """Attention heads of a layer; a multiple of raptr_ds.parallel.tensor_model_parallel_size."""
    seq_length: Count
    """Tokens of a sequence, special tokens included."""
    vocab_size: CountOrZero = 0
    """Entries of the vocabulary; 0 or left out: the tokenizer's. If given, it must be the tokenizer's."""
    ffn_hidden_size: Count = derived_key()
    """Width inside the MLP. Derived: gelu 4 x hidden_size; swiglu 8/3 x hidden_size, up to a multiple of 64."""
    activation: Literal["gelu", "swiglu"] = derived_key()
    """Derived: gelu for bert, swiglu for ul2."""
    normalization: Literal["layernorm", "rmsnorm"] = derived_key()
    """Derived: layernorm for bert, rmsnorm for ul2."""
    position_embedding: Literal["learned", "rotary"] = derived_key()
    """Derived: learned for bert, rotary for ul2."""
    rotary_base: Positive = 10000.0
    """Base of the rotary frequencies; used by position_embedding rotary only."""
    add_bias_linear: bool = derived_key()
    """Biases in the linear layers. Derived: true for bert, false for ul2."""
    tie_word_embeddings: bool = True
    """Whether the output projection is the input embedding."""
    hidden_dropout: Probability = derived_key()
    """Dropout after attention, MLP and embedding. Derived: 0.1 for bert, 0.0 for ul2."""
    attention_dropout: Probability = derived_key()
    """Dropout of attention probabilities. Derived: 0.1 for bert, 0.0 for ul2."""
    init_method_std: Positive = 0.02
    """Standard deviation of initial weights; output projections get it divided by sqrt(2 L)."""
    norm_epsilon: Positive = 1e-5
    """Added to the variance in the normalization."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Add what follows from the architecture, unless that is wrong, which is reported by itself."""
        if not isinstance(values, dict):
            return values
        values = {**BY_ARCHITECTURE.get(str(values.get("architecture")), {}), **values}
        hidden = values.get("hidden_size")
        if isinstance(hidden, int | float) and 0 < hidden <= MOST_WIDTH and "ffn_hidden_size" not in values:
            # swiglu's three matrices are as large as gelu's two at 8/3 of the width.
            swiglu = -(-8 * int(hidden) // (3 * _FFN_MULTIPLE)) * _FFN_MULTIPLE
            values["ffn_hidden_size"] = swiglu if values.get("activation") == "swiglu" else 4 * int(hidden)
        return values

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads


class ParallelSection(Section):
    """`raptr_ds.parallel`: how the model is split over the processes; the remaining factor is data parallel."""

    tensor_model_parallel_size: Parts = 1
    """Processes that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split what lies outside the matrices (residual stream, norms, hidden dropout) along the sequence over the same
    processes, each of which has all of it without: less memory and work, for a quarter more bytes sent. seq_length must
    be a multiple of tensor_model_parallel_size."""
    pipeline_model_parallel_size: Parts = 1
    """Pipeline stages; more than one needs zero_optimization.stage <= 1."""
    pipeline_layers: Annotated[tuple[Count, ...], Field(strict=False)] = derived_key(examples=[[6, 6]])
    """Layers of each pipeline stage. Derived: as even as possible, larger stages in the middle."""
    activation_checkpointing: bool = False
    """Recompute a layer's activations in the backward pass instead of keeping them."""
    keep_activations_up_to: CountOrZero = 0
    """With activation_checkpointing: where a path has at most this number of layers on a pipeline stage, nothing is
    recomputed. Short paths then use the memory that the full path needs with recomputation; tools/plan.py prints what
    fits."""
    micro_batches: Annotated[tuple[Count, ...], Field(strict=False, examples=[[16, 12, 8, 8]])] = ()
    """raptr, constant, stacking: sequences of a micro batch in each phase of the schedule, as `[16, 12, 8, 8]`; the
    global batch stays the same. Empty: train_micro_batch_size_per_gpu, which a full-model warm-up has in any case.
    Shorter paths leave memory for larger micro batches: `tools/plan.py FILE --micro-batches` prints what fits."""


class Denoiser(Section):
    """One entry of a custom `raptr_ds.objective.denoisers`."""

    name: Text
    """Shown in metrics; unique."""
    kind: Literal["span", "prefix", "causal"]
    """span: random spans become sentinels. prefix: the end of the sequence is the target. causal: all of it is."""
    mean_span: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """span: mean length of a corrupted span, in tokens; 1 or more."""
    rate: OpenFraction | None = None
    """span: fraction of tokens corrupted. prefix: fraction of the sequence that is the target."""
    mode: Literal["[NLU]", "[NLG]", "[S2S]"] | None = None
    """Token in front of the sequence that names the task to the model; null: none."""
    weight: Positive = 1.0
    """Share of this denoiser in the mixture, relative to the others."""

    @property
    def problem(self) -> str | None:
        """What its kind lacks or does not use, and the fix; None if it is complete."""
        needed = {"span": {"mean_span", "rate"}, "prefix": {"rate"}, "causal": set[str]()}[self.kind]
        given = {key for key in ("mean_span", "rate") if getattr(self, key) is not None}
        if missing := sorted(needed - given):
            return f"needs {' and '.join(missing)}. Set it."
        if unused := sorted(given - needed):
            return f"has no use for {' and '.join(unused)}. Remove it."
        return None


Denoisers = Annotated[
    Annotated[Literal["ul2", "causal_prefix_span"], Tag("preset")]
    | Annotated[tuple[Denoiser, ...], Field(strict=False, min_length=1), Tag("list")],
    Discriminator(lambda value: "preset" if isinstance(value, str) else "list"),
]
Corpus = Annotated[
    Annotated[Text, Tag("folder")] | Annotated[dict[Text, Positive], Field(min_length=1), Tag("blend")],
    Discriminator(lambda value: "folder" if isinstance(value, str) else "blend"),
]


class ObjectiveSection(Section):
    """`raptr_ds.objective`: what is predicted."""

    mask_rate: OpenFraction = 0.15
    """bert: fraction of positions that are predicted (of these 80% masked, 10% random, 10% kept)."""
    whole_word: bool = False
    """bert: mask whole words instead of single tokens."""
    denoisers: Annotated[Denoisers, Field(examples=[[{"name": "a", "kind": "causal"}]])] = "ul2"
    """ul2: `ul2` (its seven, equally often), `causal_prefix_span` (60/20/20), or a list of your own denoisers."""


class DataSection(Section):
    """`raptr_ds.data`: where tokens come from; folders are made by tools/prepare_data.py."""

    path: Corpus
    """One prepared folder, or {folder: weight} to blend several."""
    tokenizer: Text | None = None
    """Tokenizer model file. Left out: tokenizer.model of the first folder."""
    packing: bool = False
    """Treat each document of a sequence as a separate example: attention stays within it, and its positions start at 0.
    false: documents follow each other as one text."""
    num_workers: CountOrZero = 1
    """Threads that prepare batches ahead of training; 0: none."""
    prefetch: Count = 2
    """Steps that these threads prepare ahead."""


class TrainSection(Section):
    """`raptr_ds.train`: how long, from which seed, into which folder."""

    steps: Count
    """Optimizer steps of the whole run."""
    seed: Seed = 1234
    """Decides initial weights, data order, paths and dropout, in the same way on every layout."""
    compile: bool | None = None
    """Compile the layers with torch.compile: one graph for all paths. Needs zero_optimization.stage <= 2, a C++
    compiler, and neither path.method width nor a path.width_schedule. Derived: true on GPUs that have these, else
    false; on a CPU it pays with dropout and for ul2 (docs/performance.md)."""
    attention_backend: Literal["auto", "sdpa", "triton"] = "auto"
    """auto: on GPUs our Triton kernel for masks and dropout, torch's fused kernels where neither is; torch's on CPUs.
    sdpa: torch's scaled_dot_product_attention with dense masks, dropout spelled out. triton: as auto, or an error."""
    save: Text = derived_key()
    """The run's folder. Derived: runs/ and the run file's name."""
    watchdog_seconds: PositiveOrZero = 600.0
    """How long a rank may stand still, or ten times the median step if that is longer, before all ranks write down
    where they are and end with exit code 76; half an hour while the run starts or saves. 0: for ever."""
    max_non_finite_steps: CountOrZero = derived_key()
    """Steps in a row whose loss or gradient is not finite (each is skipped on all ranks) before on_non_finite acts;
    0: never. Derived: 20, or more if fp16's search for its loss scale could skip as many."""
    on_non_finite: Literal["stop", "rollback"] = "stop"
    """stop: end with a message and a fault's exit code; the last checkpoint stays. rollback: return to the newest
    checkpoint from before the first of these steps and continue with the data after the last of them."""


class EvalSection(Section):
    """`raptr_ds.eval`: the full model on held-out data, and on downstream tasks."""

    interval: CountOrZero = 0
    """Steps between evaluations; 0: only at the end."""
    batches: CountOrZero = 8
    """Global batches of an evaluation; 0: never evaluate, whatever the interval."""
    tasks: Annotated[tuple[Text, ...], Field(strict=False, examples=[["boolq", "copa"]])] = ()
    """ul2: tasks of lm-evaluation-harness, as `["boolq", "copa"]`, on which the exports of checkpoint.export_interval
    are scored by tools/evaluate.py while training goes on. Their scores stand in metrics.jsonl."""
    task_interval: CountOrZero = 0
    """Steps between scored exports, a multiple of checkpoint.export_interval; the last one is scored too. 0: all."""
    task_shots: CountOrZero = 0
    """Solved examples before each question."""
    task_limit: Count | None = None
    """Examples of each task; left out: all."""
    task_files: Text | None = None
    """Folder with task files, for tools/evaluate.py without a network; left out: the Hugging Face hub."""
    task_device: Literal["cpu", "cuda"] = "cpu"
    """cuda: the first process's GPU, beside the training: leave memory for another copy of the model."""
    task_seconds: Positive = 3600.0
    """What scoring an export may take before it is given up; at the end the run waits for it that long at most."""

    def due(self, step: int) -> bool:
        """Return whether to evaluate after `step` steps; the end of the run is not counted."""
        return self.batches > 0 and passes_multiple(self.interval, max(0, step - 1), step)


class CheckpointSection(Section):
    """`raptr_ds.checkpoint`: what is kept on disk to continue from."""

    interval: CountOrZero = 0
    """Steps between checkpoints; 0: only at the end and on a signal."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    load: Text = "auto"
    """auto: the newest in the run's folder if there is one. none: start afresh. Else a folder to continue from."""
    save_on_exit: bool = True
    """Save at the end of the run. A stop by a signal always saves, and a run with export_interval saves at its end in
    any case."""
    export_interval: CountOrZero = 0
    """Steps between exports for Hugging Face transformers, a multiple of interval, and at the end of the run: folders
    exports/step-... beside the checkpoints, which are all kept. 0: none."""
    export_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the exported weights."""

    @property
    def saves_at_end(self) -> bool:
        """Whether the end of the run has a checkpoint."""
        return self.save_on_exit or self.export_interval > 0

    def due(self, step: int, since: int) -> bool:
        """Return whether to save after `step` steps; the end of the run is not counted.

        since: the last step at which saving was possible; what came due after it is due now.
        """
        return passes_multiple(self.interval, since, step)


class WandbSection(Section):
    """`raptr_ds.log.wandb`: a run of Weights & Biases."""

    project: Text
    """The project that the run belongs to."""
    name: Text | None = None
    """Name of the run; left out: that of the run's folder."""
    entity: Text | None = None
    """User or team; left out: that of the login."""
    group: Text | None = None
    """What runs are grouped by, for example the seeds of one method."""
    mode: Literal["online", "offline"] = "online"
    """offline: written into the run's folder only, and sent by `wandb sync` at any time."""


class MlflowSection(Section):
    """`raptr_ds.log.mlflow`: a run of MLflow."""

    experiment: Text
    """The experiment that the run belongs to; made if there is none of this name."""
    tracking_uri: Text | None = None
    """The server; left out: MLflow's environment variable MLFLOW_TRACKING_URI, or MLflow's own default."""
    name: Text | None = None
    """Name of the run; left out: that of the run's folder."""


class LogSection(Section):
    """`raptr_ds.log`: what is written and shown."""

    interval: Count = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: WandbSection | None = None
    """Also record in Weights & Biases: an object with the keys of WandbSection."""
    mlflow: MlflowSection | None = None
    """Also record in MLflow: an object with the keys of MlflowSection."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """auto: a live line on a terminal, plain lines elsewhere."""
    peak_tflops: Positive | None = None
    """Peak of one device in TFLOP/s, for model FLOPs utilization; left out: looked up, or mfu is null."""


UNIONS = frozenset({"path", "denoisers", "split"})
"""Keys whose value may be of two kinds: behind them pydantic's places of errors have the tag of the kind."""

INNER: dict[str, type[Section]] = {"denoisers": Denoiser, "wandb": WandbSection, "mlflow": MlflowSection}
"""Sections inside sections, by the key that holds one or several."""

SECTIONS: dict[str, tuple[type[Section], ...]] = {
    "model": (ModelSection,),
    "parallel": (ParallelSection,),
    "path": tuple(PATH_SECTIONS.values()),
    "objective": (ObjectiveSection,),
    "data": (DataSection,),
    "train": (TrainSection,),
    "eval": (EvalSection,),
    "checkpoint": (CheckpointSection,),
    "log": (LogSection,),
}
"""What each object of the block may be: one class of section, but for the path one for each method."""


def keys_of(section: str) -> dict[str, FieldInfo]:
    """Return all keys that an object of the block may have, by name; of the first class that has it."""
    return {key: field for kind in reversed(SECTIONS[section]) for key, field in kind.model_fields.items()}


def field_of(dotted: str) -> FieldInfo | None:
    """Return the field of a dotted key of the run file; None for what is no key of a section."""
    block, _, rest = dotted.partition(".")
    section, _, key = rest.partition(".")
    return keys_of(section).get(key) if block == BLOCK and section in SECTIONS else None
