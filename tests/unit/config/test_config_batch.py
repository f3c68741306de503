"""The batch triangle: what can be derived is, what cannot names values that fit."""

import itertools

import pytest

from raptr_ds.config.batch import BatchGeometry, check_micro_batches, check_paths_per_step, solve_batch
from raptr_ds.errors import ConfigError


@pytest.mark.parametrize(("micro", "accumulation", "ranks"), list(itertools.product((1, 2, 3), (1, 2, 5), (1, 2, 4))))
def test_any_one_of_three_is_derived(micro, accumulation, ranks):
    whole = BatchGeometry(micro * accumulation * ranks, micro, accumulation, ranks)
    assert solve_batch(whole.global_batch, micro, accumulation, ranks) == whole
    assert solve_batch(whole.global_batch, micro, None, ranks) == whole
    assert solve_batch(whole.global_batch, None, accumulation, ranks) == whole
    assert solve_batch(None, micro, accumulation, ranks) == whole


def test_one_given_means_no_accumulation():
    assert solve_batch(8, None, None, 2) == BatchGeometry(8, 4, 1, 2)
    assert solve_batch(None, 4, None, 2) == BatchGeometry(8, 4, 1, 2)


@pytest.mark.parametrize(
    ("sizes", "ranks", "says"),
    [
        ((None, None, None), 1, ["train_batch_size is missing"]),
        ((None, None, 2), 1, ["train_batch_size is missing"]),
        ((8, 3, None), 1, ["train_batch_size=8", "train_micro_batch_size_per_gpu=3", "= 3", "Set", "6 or 9"]),
        ((8, None, None), 3, ["train_batch_size=8", "3 data-parallel ranks", "6 or 9"]),
        ((8, None, 3), 2, ["gradient_accumulation_steps=3", "= 6", "6 or 12"]),
        ((2, 4, None), 1, ["to 4"]),
        ((8, 2, 3), 2, ["8 is not", "=2 x", "=3 x 2 data-parallel ranks = 12", "Remove gradient_accumulation_steps"]),
    ],
)
def test_what_does_not_divide_is_refused_with_a_fix(sizes, ranks, says):
    with pytest.raises(ConfigError) as error:
        solve_batch(*sizes, ranks)
    for fragment in says:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("batch", "paths", "says"),
    [
        (BatchGeometry(8, 8, 1, 1), 2, ["paths_per_step=2", "steps=1", "Set train_micro_batch_size_per_gpu to 4"]),
        (BatchGeometry(24, 6, 2, 2), 3, ["steps=2", "to 4 and remove gradient_accumulation_steps"]),
        (BatchGeometry(4, 2, 2, 1), 3, ["Enlarge train_batch_size", "or change paths_per_step"]),
    ],
)
def test_every_path_of_a_step_gets_as_many_micro_batches(batch, paths, says):
    check_paths_per_step(batch, 1)
    with pytest.raises(ConfigError) as error:
        check_paths_per_step(batch, paths)
    for fragment in says:
        assert fragment in str(error.value)


def test_a_run_file_is_held_to_it(load):
    with pytest.raises(ConfigError, match=r"paths_per_step=2 must divide the micro batches of a step"):
        load("raptr_ds.path.paths_per_step=2")
    assert load("raptr_ds.path.paths_per_step=2", "train_micro_batch_size_per_gpu=4").path.paths_per_step == 2


def test_micro_batches_of_the_phases_make_up_a_step(load):
    check_micro_batches(BatchGeometry(24, 2, 6, 2), (12, 6, 2, 1))
    with pytest.raises(ConfigError, match=r"\[12, 5\]: 5 must divide .*, train_batch_size=24 / 2 = 12\. .*1, 2, 3, 4"):
        check_micro_batches(BatchGeometry(24, 2, 6, 2), (12, 5))
    with pytest.raises(ConfigError, match="3 must divide"):
        load("raptr_ds.parallel.micro_batches=[8,4,3,2]")


@pytest.mark.parametrize("value", ["true", "false"])
def test_grow_micro_batch_of_earlier_versions_says_what_replaces_it(load, value):
    with pytest.raises(ConfigError, match=r"is replaced by raptr_ds\.parallel\.micro_batches") as error:
        load(f"raptr_ds.parallel.grow_micro_batch={value}")
    assert error.value.exit_code == 2
    assert "Remove it" in str(error.value)
    assert "where it is true, add the line that `python tools/plan.py FILE --processes N --mic" in str(error.value)
