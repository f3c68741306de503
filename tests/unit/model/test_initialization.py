"""Initial weights: a function of seed and name, however many threads draw them."""

from collections.abc import Iterator

import pytest
import torch

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.initialization import initialize
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import ProcessGroups

SECTION = ModelSection(
    architecture="bert", num_layers=3, hidden_size=32, num_attention_heads=2, seq_length=16, vocab_size=64
)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leave torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_initial_weights(groups: ProcessGroups) -> None:
    found = []
    for count in (1, 5):
        torch.set_num_threads(count)
        stage = build_stage(SECTION, groups, range(3), recompute=False, seed=7)
        found.append({name: parameter.detach().clone() for name, parameter in stage.named_parameters()})
    assert len(found[0]) > 20
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.usefixtures("threads")
def test_what_fails_in_a_thread_is_raised(groups: ProcessGroups) -> None:
    torch.set_num_threads(3)
    stage = build_stage(SECTION, groups, range(3), recompute=False, seed=7)
    stage.extra = torch.nn.Parameter(torch.zeros(2))
    stage.extra.shard = "not a shard"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="full_shape"):
        initialize(stage, SECTION, 7)
