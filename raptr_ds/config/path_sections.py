"""`raptr_ds.path`: which layers run at each step. One section for each method, with its keys and their rules.

A key is written once, in the class that all methods with it share: its default, what it is derived from where it is
left out, and the rules that it obeys. Each of these classes adds its own part to `derived` and to `broken_rules`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field

from raptr_ds.config.schedules import (
    NAMED_SCHEDULES,
    Schedule,
    Split,
    broken_schedule,
    broken_split,
    named_schedule,
    numbers_of,
    read_schedule,
)
from raptr_ds.config.section_types import (
    Count,
    CountOrZero,
    OpenFraction,
    Parts,
    Positive,
    Probability,
    Section,
    Whole,
    derived_key,
)
from raptr_ds.errors import ConfigError


@dataclass(frozen=True)
class RunSizes:
    """The numbers of a run that its path section depends on: layers, optimizer steps, attention heads, stages."""

    num_layers: int
    num_steps: int
    num_heads: int = 1
    num_stages: int = 1


class PathSection(Section):
    """What the methods' sections have in common."""

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """Return the values of keys that follow from others."""
        return {}

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """Yield a message for each rule that the section, completed, breaks."""
        yield from ()

    def completed(self, sizes: RunSizes) -> Self:
        """Return the section with all that is derived."""
        return self.model_copy(update=self.derived(sizes))

    def checked(self, sizes: RunSizes) -> Self:
        """Return the section completed. Raises: ConfigError for the first rule that it breaks."""
        section = self.completed(sizes)
        for message in section.broken_rules(sizes):
            raise ConfigError(message)
        return section


class _NothingDrawn(PathSection):
    """Methods that train all layers that the model has."""

    paths_per_step: ClassVar[int] = 1
    skipped_update: ClassVar[str] = "freeze"


class SkippingSection(PathSection):
    """Methods that skip layers or parts of them."""

    residual_scale: Literal["none", "sqrt", "inverse"] = "none"
    """sqrt multiplies each active residual branch by sqrt(L / path length); width: sqrt(heads / active heads). inverse
    divides it by its layer's probability of being in the path; width: by the share of heads that run. layer_dropout's
    default is inverse."""
    skipped_update: Literal["freeze", "zero_grad"] = "freeze"
    """What the optimizer does to a skipped layer: nothing at all, or a step with zero gradients, in which AdamW's
    moments shrink and move the weights, and these decay. zero_grad reproduces the paper and is slower."""


class DrawingSection(SkippingSection):
    """Methods that draw the layers of a step."""

    paths_per_step: Count = 1
    """Paths drawn for a step. Each is taken by an equal share of the global batch, in its order, so that
    gradient_accumulation_steps must be a multiple; if it is equal, each micro batch has a path of its own. The layers
    of any of them are the step's."""


class RandomSection(DrawingSection):
    """Methods that draw a given number of layers."""

    fixed_layers: Annotated[tuple[Whole, ...], Field(strict=False, examples=[[0, -1]])] = (0, -1)
    """Layers that are in every path; 0-based, negative ones count from the end."""
    sampling: Literal["uniform", "bernoulli", "balanced"] = "uniform"
    """uniform: all subsets of the phase's length are equally likely. bernoulli: each layer is kept by an independent
    draw. balanced: as many layers in each pipeline stage as make the slowest stage lightest (raptr_ds/paths/balance.py
    explains the trade-off)."""
    balance_stages: Parts | None = None
    """balanced: stages that paths are balanced over. Derived: pipeline_model_parallel_size. Paths depend on it: set it
    to keep a run's paths in another layout. Balanced over 4 is balanced over 2 too, where the depth divides by 4. The
    stages are those of raptr_ds.parallel.pipeline_layers if it has that number, else as even as possible."""

    def fixed_in(self, num_layers: int) -> tuple[int, ...]:
        """Return the fixed layers of such a model, as sorted, distinct 0-based indices."""
        return tuple(sorted({layer % num_layers for layer in self.fixed_layers}))

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """Balanced sampling balances the pipeline's stages."""
        stages = sizes.num_stages if self.sampling == "balanced" and self.balance_stages is None else None
        return super().derived(sizes) | ({} if stages is None else {"balance_stages": stages})

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """Fixed layers exist, a path has a layer, and so has each stage that paths are balanced over."""
        yield from super().broken_rules(sizes)
        layers, stages = sizes.num_layers, self.balance_stages
        outside = [layer for layer in self.fixed_layers if not -layers <= layer < layers]
        if outside:
            yield (
                f"raptr_ds.path.fixed_layers={list(self.fixed_layers)} has {outside[0]}; with raptr_ds.model.num_layers"
                f"={layers} a layer is {-layers}..{layers - 1}, negative ones counting from the end. Correct or remove "
                "it."
            )
        if self.sampling == "bernoulli" and not self.fixed_layers:
            yield (
                "raptr_ds.path.sampling='bernoulli' with raptr_ds.path.fixed_layers=[] could draw a path without "
                "layers. Fix a layer, or set sampling to 'uniform'."
            )
        # Too many pipeline stages are reported as such, by the rule on pipeline_model_parallel_size.
        if stages is not None and stages > layers and stages != sizes.num_stages:
            yield (
                f"raptr_ds.path.balance_stages={stages} needs at least {stages} layers, one for each stage; "
                f"raptr_ds.model.num_layers={layers}. Set it to {layers} or less, or remove it: it is derived."
            )


class ScheduledSection(PathSection):
    """Methods whose paths grow by phases."""

    default_schedule: ClassVar[str] = "paper"
    parts: ClassVar[str] = "layers"
    """What the schedule counts: the model's layers, or each layer's heads."""
    may_begin_empty: ClassVar[bool] = False
    """Whether the first phase may have none of them."""

    schedule: Schedule | None = None
    """raptr: path length of each phase, as `6-8-10-12`; the last is num_layers. Derived: 1/2, 2/3, 5/6 and all of L,
    `paper` by name. stacking: layers of the model in each phase; derived: 1/2, 3/4 and all, `gradual`. width: heads
    of each layer that run, of num_attention_heads; derived: `paper`. More names: `half` is 1/6, 1/4, 7/12 and all,
    `late` 1/4 in four phases of five and all in the last, `one_expansion` one layer in four of five and all in the
    last, `doubling` 1/4, 1/2 and all."""
    split: Split = "uniform"
    """Phases of equal length in steps (`uniform`), in proportion to their path length (`proportional`) or to a power of
    their number (`power:1` gives the third phase three times the steps of the first), or by their fractions of the
    steps, as [0.8, 0.2]."""

    @property
    def phase_lengths(self) -> tuple[int, ...]:
        """Layers, or heads, of each phase of a completed schedule; empty if it cannot be read."""
        return read_schedule(self.schedule, self.may_begin_empty)

    def least_length(self, sizes: RunSizes) -> int:
        """Return the shortest length that a phase may have."""
        return 1

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """A schedule that is left out or named gets numbers."""
        name = self.schedule or self.default_schedule
        update = super().derived(sizes)
        if name in NAMED_SCHEDULES:
            update["schedule"] = numbers_of(name, self._num_parts(sizes), self.least_length(sizes))
        return update

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """The schedule is lengths that grow to the whole model, and the split has a part for each."""
        yield from super().broken_rules(sizes)
        lengths = self.phase_lengths
        yield from broken_schedule("schedule", self.schedule, lengths, self._num_parts(sizes), self.parts)
        if lengths:
            yield from broken_split(self.split, self.schedule, len(lengths))

    def _num_parts(self, sizes: RunSizes) -> int:
        return sizes.num_layers if self.parts == "layers" else sizes.num_heads


class WarmedUpSection(ScheduledSection):
    """Scheduled methods that may start with steps on the full model."""

    full_warmup_steps: CountOrZero = 0
    """Steps on the full model before the first path is drawn."""
    full_warmup_ratio: Probability | None = None
    """The same as a fraction of raptr_ds.train.steps; set one of the two."""

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """A ratio becomes steps."""
        update = super().derived(sizes)
        if self.full_warmup_ratio is not None and "full_warmup_steps" not in self.model_fields_set:
            # A ratio below 1 leaves a step, however it is rounded.
            num_steps = min(round(self.full_warmup_ratio * sizes.num_steps), sizes.num_steps - 1)
            update |= {"full_warmup_steps": num_steps, "full_warmup_ratio": None}
        return update

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """The warm-up is given once and leaves steps for the schedule."""
        yield from super().broken_rules(sizes)
        warmup = f"raptr_ds.path.full_warmup_steps={self.full_warmup_steps}"
        if self.full_warmup_ratio is not None:
            yield f"{warmup} and full_warmup_ratio={self.full_warmup_ratio} set the same thing twice. Keep one."
        if self.full_warmup_steps >= sizes.num_steps:
            yield (
                f"{warmup} must be less than raptr_ds.train.steps={sizes.num_steps}, or no random path is ever "
                "trained. Lower it, or write raptr_ds.path.full_warmup_ratio, a fraction of the steps."
            )


class FullSection(_NothingDrawn):
    """full: all layers, always."""

    method: Literal["full"] = "full"


class RaptrSection(WarmedUpSection, RandomSection):
    """raptr: random paths that grow by phases, in depth or in depth and width."""

    method: Literal["raptr"] = "raptr"
    width_schedule: Schedule | None = None
    """Heads that run of each layer of a path in each phase of the schedule, of num_attention_heads, and as many blocks
    of its MLP; by numbers or by name, as a schedule. Left out: all."""

    @property
    def phase_widths(self) -> tuple[int, ...]:
        """Heads of each phase of a completed width_schedule; empty without one, and if it cannot be read."""
        return read_schedule(self.width_schedule)

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """Widths by name get numbers."""
        update, name = super().derived(sizes), self.width_schedule
        return update | ({"width_schedule": numbers_of(name, sizes.num_heads, 1)} if name in NAMED_SCHEDULES else {})

    def least_length(self, sizes: RunSizes) -> int:
        """Return the number of fixed layers, which are in every path."""
        return len(self.fixed_in(sizes.num_layers))

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """Every phase has room for the fixed layers, and a width if there are any."""
        yield from super().broken_rules(sizes)
        lengths, fixed, widths = self.phase_lengths, self.least_length(sizes), self.phase_widths
        if self.width_schedule is not None:
            written = f"raptr_ds.path.width_schedule={self.width_schedule!r}"
            yield from broken_schedule("width_schedule", self.width_schedule, widths, sizes.num_heads, "heads")
            if widths and lengths and len(widths) != len(lengths):
                yield (
                    f"{written} has {len(widths)} phases and raptr_ds.path.schedule={self.schedule!r} has "
                    f"{len(lengths)}: a phase has a length and a width. Write as many of both."
                )
            if self.paths_per_step > 1:
                yield (
                    f"{written} with raptr_ds.path.paths_per_step={self.paths_per_step}: heads and blocks are drawn "
                    "for a whole step. Remove one."
                )
        if lengths and min(lengths) < fixed:
            yield (
                f"raptr_ds.path.schedule={self.schedule!r} has paths of {min(lengths)} layers, fewer than the {fixed} "
                f"of raptr_ds.path.fixed_layers={list(self.fixed_layers)}, which are in every path. "
                f"Raise the schedule to at least {fixed}, or fix fewer layers."
            )


class PldSection(DrawingSection):
    """pld: progressive layer dropping."""

    method: Literal["pld"] = "pld"
    pld_gamma: Positive = 0.001
    """Decay rate of the keep probability, per step."""
    pld_theta: OpenFraction = 0.5
    """The keep probability's limit."""


class ConstantSection(RandomSection):
    """constant: random paths of one length (stochastic depth at a constant rate)."""

    method: Literal["constant"] = "constant"
    constant_length: Count | None = None
    """Layers of every path. Derived: the mean of RaPTr's default schedule, so at RaPTr's compute."""

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """The length is the mean of the schedule `paper`, to whole layers, halves up."""
        update = super().derived(sizes)
        if self.constant_length is None:
            lengths = named_schedule("paper", sizes.num_layers, len(self.fixed_in(sizes.num_layers)))
            update["constant_length"] = (2 * sum(lengths) + len(lengths)) // (2 * len(lengths))
        return update

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """A path holds the fixed layers and fits the model."""
        yield from super().broken_rules(sizes)
        length, least = self.constant_length, max(1, len(self.fixed_in(sizes.num_layers)))
        if length is not None and not least <= length <= sizes.num_layers:
            yield (
                f"raptr_ds.path.constant_length={length} must be {least}..{sizes.num_layers}: at least the fixed "
                "layers, at most raptr_ds.model.num_layers. Change it, or remove it: one is derived."
            )


class LayerDropSection(DrawingSection):
    """layerdrop: each layer is dropped with one probability, independently of the others."""

    method: Literal["layerdrop"] = "layerdrop"
    layerdrop: OpenFraction = derived_key(le=0.999)
    """Probability of dropping a layer. Derived: paths have the derived constant_length on average, in models of a few
    layers more. At most 0.999, as a path without layers is drawn again."""

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """The mean draw, empty ones included, has the constant length; of a single layer half is dropped."""
        update = super().derived(sizes)
        if self.layerdrop is None:
            length = ConstantSection().derived(sizes)["constant_length"]
            update["layerdrop"] = 1.0 - min(length, sizes.num_layers - 0.5) / sizes.num_layers
        return update


class LayerDropoutSection(DrawingSection):
    """layer_dropout: the deeper a layer, the more often it is dropped; all less often with time, at the end never."""

    method: Literal["layer_dropout"] = "layer_dropout"
    residual_scale: Literal["none", "sqrt", "inverse"] = "inverse"
    layer_dropout: OpenFraction = 0.8
    """Probability of dropping the last layer at the first step; linear in depth, from 0 for the first layer, and in
    time, to 0 at the end. A quarter of it is what the run saves of its layers' work."""


class StackingSection(_NothingDrawn, ScheduledSection):
    """stacking: some layers alone, then new ones on top of them or in their middle."""

    default_schedule: ClassVar[str] = "gradual"
    may_begin_empty: ClassVar[bool] = True

    method: Literal["stacking"] = "stacking"
    growth_position: Literal["top", "middle"] = "top"
    """Where new layers are put: on top, or behind the middle one of the blocks of as many layers that the model has."""
    growth_init: Literal["copied", "zero", "random"] = "copied"
    """What a new layer begins with: a copy of the layers that it is put behind; its initial weights, but zeros in the
    two projections that end its branches, so that the model computes what it did; its initial weights."""
    growth_optimizer_state: Literal["copied", "fresh"] | None = None
    """What optimizer state a new layer begins with: that of the layer it is a copy of, or none. Derived: copied for
    copies."""
    growth_warmup_steps: CountOrZero = 0
    """Steps after each growth over which the learning rate rises again, from nothing to the scheduler's."""

    def derived(self, sizes: RunSizes) -> dict[str, Any]:
        """Copies have a copied optimizer state."""
        state = "copied" if self.growth_init == "copied" else "fresh"
        return super().derived(sizes) | ({} if self.growth_optimizer_state else {"growth_optimizer_state": state})

    def broken_rules(self, sizes: RunSizes) -> Iterator[str]:
        """Copies have something to copy."""
        yield from super().broken_rules(sizes)
        if self.growth_init == "copied" and self.phase_lengths[:1] == (0,):
            yield (
                f"raptr_ds.path.schedule={self.schedule!r} begins without layers: growth_init='copied' has none to "
                "copy. Set growth_init to 'random' or 'zero', or begin with a layer."
            )


class WidthSection(WarmedUpSection, SkippingSection):
    """width: all layers, each with random attention heads and blocks of its MLP, whose number grows by phases."""

    parts: ClassVar[str] = "heads"
    paths_per_step: ClassVar[int] = 1

    method: Literal["width"] = "width"


AnyPathSection = (
    FullSection
    | RaptrSection
    | PldSection
    | ConstantSection
    | LayerDropSection
    | LayerDropoutSection
    | StackingSection
    | WidthSection
)
PATH_SECTIONS: dict[str, type[AnyPathSection]] = {
    section.model_fields["method"].default: section for section in get_args(AnyPathSection)
}
"""The section of each method; the first is the default."""
METHODS = tuple(PATH_SECTIONS)
