"""What a step costs where layers are recomputed, some or all."""

from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import StepFlops, step_flops
from tests.model_shapes import model_shape

SHAPE = model_shape("bert", layers=8, hidden=16, length=8, vocabulary=50, ffn=64)
STAGES = (range(0, 4), range(4, 8))
PATH = LayerPath((0, 1, 3, 4, 7), 8)  # three layers on the first stage, two on the second


def test_recomputed_layers_count_a_forward_pass_more() -> None:
    plain, all_of_them = (StepFlops(SHAPE, 4, recompute).flops(PATH, 9) for recompute in (False, True))
    assert plain == step_flops(SHAPE, 5, 4, 9)
    assert all_of_them == step_flops(SHAPE, 5, 4, 9, activation_checkpointing=True)


def test_short_paths_are_not_recomputed() -> None:
    def flops(keep_up_to: int, stages: tuple[range, ...] = ()) -> int:
        return StepFlops(SHAPE, 4, recompute=True, keep_up_to=keep_up_to, stages=stages).flops(PATH, 9)

    kept, recomputed = step_flops(SHAPE, 5, 4, 9), step_flops(SHAPE, 5, 4, 9, activation_checkpointing=True)
    assert flops(4) == recomputed
    assert flops(5) == kept
    assert flops(1, STAGES) == recomputed
    assert flops(2, STAGES) == kept + (recomputed - kept) * 3 // 5  # the first stage has more
    assert flops(3, STAGES) == kept


def test_several_paths_cost_the_mean_of_each() -> None:
    """Whether layers are kept is each micro batch's own matter: two layers of the stage are kept, three are not."""
    shares = LayerPath((0, 1, 3, 4, 7), 8), LayerPath((0, 2, 7), 8)
    cost = StepFlops(SHAPE, 4, recompute=True, keep_up_to=2, stages=STAGES)
    means = sum(cost.flops(share, 9) for share in shares) / 2
    assert cost.flops(LayerPath.of_shares(shares), 9) == means
    assert StepFlops(SHAPE, 4, recompute=False).flops(LayerPath.of_shares(shares), 9) == step_flops(SHAPE, 4, 4, 9)
