"""Methods that came after RaPTr's paper, in several layouts, against direct implementations in plain torch.

Tolerances are those of test_layouts.py: fp32 rounding, over six or nine steps.
"""

import math
from dataclasses import replace

import pytest

from tests.dist.plain_model import PlainModel, Taken, train
from tests.dist.trajectory import Case, path_method, run_case, weights_differ
from tests.dist.workers import run_distributed

LOSS, NORM = 1e-6, 2e-6  # relative
WEIGHT = 0.05  # of the learning rate, so of what one step may move
STEPS = 6  # two in each of three phases; with layer dropout a layer is active, skipped, and active again

LAYOUTS = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "DP2 ZeRO 1": (2, {"zero": 1}),
    "DP2 ZeRO 3": (2, {"zero": 3}),
    "TP2": (2, {"tensor": 2, "micro_batch": 4}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 DP2 ZeRO 1": (4, {"pipeline": 2, "zero": 1}),
    "PP2 TP2": (4, {"pipeline": 2, "tensor": 2, "micro_batch": 4}),
}


def compare(case: Case, layouts: tuple[str, ...], model: PlainModel, losses: list[float], norms: list[float]) -> None:
    """Compare a run in each layout with what a direct implementation has lost and become."""
    for layout in layouts:
        world_size, changes = LAYOUTS[layout]
        placed = replace(case, **changes)
        placed = replace(placed, micro_batch=min(placed.micro_batch, case.global_batch // case.paths_per_step))
        found = run_distributed(run_case, world_size, placed)[0]
        assert found.losses == pytest.approx(losses, rel=LOSS), layout
        assert found.grad_norms == pytest.approx(norms, rel=NORM), layout
        assert weights_differ(found.weights, model.named()) < WEIGHT * case.learning_rate, layout


@pytest.mark.parametrize(
    ("paths", "layouts"),
    [
        (1, ("DP2 ZeRO 3", "PP2 TP2")),
        (3, ("DP2", "DP2 ZeRO 1", "TP2", "PP2", "PP2 DP2 ZeRO 1")),
        (12, ("one process", "TP2")),  # one for each sequence
    ],
)
def test_layer_dropout_masks_blocks_and_divides_them_by_their_keep_probability(
    paths: int, layouts: tuple[str, ...]
) -> None:
    case = Case(
        method="layer_dropout",
        num_layers=3,
        steps=STEPS,
        dropout=0.0,
        paths_per_step=paths,
        micro_batch=12 // max(paths, 6),
    )
    case = replace(case, path_keys=(("layer_dropout", 0.7), ("residual_scale", "inverse")))
    method, model = path_method(case), PlainModel.of(case, (0, 1, 2))

    def taken_at(step: int, sequence: int) -> list[Taken]:
        kept = method.path_at(step).draws[sequence * paths // 12].layers
        rates = [0.7 * layer / 2 * (1 - step / STEPS) for layer in range(3)]
        return [Taken(layer, 1 / (1 - rates[layer])) for layer in kept]

    losses, norms = train(case, model, taken_at)
    assert len({tuple(method.path_at(step).draws) for step in range(STEPS)}) > 3
    compare(case, layouts, model, losses, norms)


ENDS = ("attention.output.weight", "mlp.contract.weight")


@pytest.mark.parametrize(
    ("init", "first", "layouts"),
    [
        ("copied", 1, ("one process", "DP2 ZeRO 3", "TP2", "PP2 DP2 ZeRO 1")),
        ("random", 1, ("DP2 ZeRO 1", "PP2 TP2")),
        ("random", 0, ("one process", "DP2 ZeRO 3", "PP2 DP2 ZeRO 1", "PP2 TP2")),
        ("zero", 1, ("DP2", "DP2 ZeRO 3", "PP2 TP2")),
        ("zero", 0, ("DP2 ZeRO 1", "PP2")),
    ],
)
def test_one_late_expansion(init: str, first: int, layouts: tuple[str, ...]) -> None:
    """A model of one layer, or none, to which the others are put at once after two thirds of the steps."""
    case = Case(method="stacking", schedule=f"{first}-3", num_layers=3, steps=STEPS, dropout=0.0)
    case = replace(case, path_keys=(("growth_init", init),))
    state = "copied" if init == "copied" else "fresh"
    case = replace(case, growth_optimizer_state=state, path_keys=(*case.path_keys, ("split", [0.7, 0.3])))
    model, all_layers = PlainModel.of(case, tuple(range(first))), PlainModel.of(case, (0, 1, 2)).layers

    def grow(step: int) -> None:
        if step != 4:
            return
        for layer in range(first, 3):
            new = model.copy_of(model.layers[0]) if init == "copied" else all_layers[layer]
            for name in ENDS if init == "zero" else ():
                new[name].detach().zero_()
            model.layers.append(new)

    losses, norms = train(case, model, lambda step, sequence: [Taken(i) for i in range(len(model.layers))], grow)
    compare(case, layouts, model, losses, norms)


def test_new_layers_with_zeros_at_their_ends_leave_the_function_unchanged() -> None:
    """The first step after the growth has the loss of the model that has not grown; the next has not."""
    keys = (("growth_init", "zero"), ("split", [0.7, 0.3]))
    case = Case(method="stacking", schedule="1-3", num_layers=3, steps=STEPS, dropout=0.0, path_keys=keys)
    case = replace(case, growth_optimizer_state="fresh")
    found = run_distributed(run_case, 1, case)[0].losses
    expected, _ = train(case, PlainModel.of(case, (0,)), lambda step, sequence: [Taken(0)])
    assert found[:5] == pytest.approx(expected[:5], rel=LOSS)
    assert found[5] != pytest.approx(expected[5], rel=100 * LOSS)


@pytest.mark.parametrize("state", ["copied", "fresh"])
def test_midas_repeats_the_middle_layer_in_a_list(state: str) -> None:
    """Layers really inserted into a list: the library's never move, and are skipped where they do not exist yet."""
    keys = (("growth_position", "middle"), ("split", "power:1"))
    case = Case(method="stacking", schedule="1-2-4", num_layers=4, steps=STEPS, dropout=0.0, path_keys=keys)
    case = replace(case, growth_optimizer_state=state)
    model = PlainModel.of(case, (0,))

    def grow(step: int) -> None:
        copied = state == "copied"
        if step == 1:  # the steps by 1, 2 and 3 sixths
            model.layers.insert(1, model.copy_of(model.layers[0], copied))
        if step == 3:  # a block of two: the first of one
            model.layers[2:2] = [model.copy_of(layer, copied) for layer in model.layers]

    losses, norms = train(case, model, lambda step, sequence: [Taken(i) for i in range(len(model.layers))], grow)
    compare(case, ("one process", "DP2 ZeRO 3", "TP2", "PP2", "PP2 DP2 ZeRO 1"), model, losses, norms)


@pytest.mark.parametrize(
    ("update", "scale", "layouts"),
    [
        ("freeze", "none", ("one process", "DP2", "TP2", "PP2", "PP2 TP2")),
        ("freeze", "inverse", ("DP2", "PP2 TP2")),
        ("zero_grad", "sqrt", ("DP2 ZeRO 1", "DP2 ZeRO 3", "TP2", "PP2 DP2 ZeRO 1")),
    ],
)
def test_random_parts_in_depth_and_width(update: str, scale: str, layouts: tuple[str, ...]) -> None:
    """Paths of two, three and all of four layers, of whose heads and blocks one, three and all of four run."""
    keys = (("width_schedule", "1-3-4"), ("residual_scale", scale))
    case = Case(schedule="2-3-4", num_layers=4, dropout=0.0, skipped_update=update, path_keys=keys)
    method, model = path_method(case), PlainModel.of(case, (0, 1, 2, 3))

    def taken_at(step: int, sequence: int) -> list[Taken]:
        path, length, width = method.path_at(step), 2 + step // 3, (1, 3, 4)[step // 3]
        assert path.parts is not None
        assert len(path.layers) == length
        drawn = [parts[layer] for layer in path.layers for parts in (path.parts.heads, path.parts.blocks)]
        assert {len(part) for part in drawn} == {width}
        keep = {0: 1.0, 1: (length - 2) / 2, 2: (length - 2) / 2, 3: 1.0}
        factor = {
            "none": lambda layer: 1.0,
            "sqrt": lambda layer: math.sqrt(4 / length * 4 / width),
            "inverse": lambda layer: 4 / width / keep[layer],
        }[scale]
        return [Taken(i, factor(i), path.parts.heads[i], path.parts.blocks[i]) for i in path.layers]

    losses, norms = train(case, model, taken_at, moves_idle=update == "zero_grad")
    compare(case, layouts, model, losses, norms)
