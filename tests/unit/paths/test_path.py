"""The path value: its rules and queries, and that its repr holds all of it."""

import math

import pytest

from raptr_ds.paths import LayerPath
from raptr_ds.paths.path import Parts


def test_full_path_holds_every_layer():
    path = LayerPath.full(5, phase=2)
    assert path.layers == (0, 1, 2, 3, 4)
    assert (path.length, path.phase, path.residual_scale, path.work) == (5, 2, 1.0, 5)


def test_queries_of_a_partial_path():
    path = LayerPath((0, 2, 5), num_layers=6)
    assert path.length == 3
    assert [path.is_active(layer) for layer in range(6)] == [True, False, True, False, False, True]
    assert path.active_in(range(2, 6)) == (2, 5)
    assert path.active_in(range(3, 5)) == ()


def test_paths_that_differ_in_anything_have_another_repr():
    heads, blocks = ((0, 2), (1, 2), (0, 1)), ((1, 2), (0, 1), (0, 2))
    paths = [
        LayerPath((0, 1, 2), 3, 2, 1.5),
        LayerPath((0, 1), 3, 2, 1.5),
        LayerPath((0, 1, 2), 4, 2, 1.5),
        LayerPath((0, 1, 2), 3, 1, 1.5),
        LayerPath((0, 1, 2), 3, 2, math.nextafter(1.5, 2.0)),
        LayerPath((0, 1, 2), 3, 2, 1.5, layer_scales=(1.5, 1.5, 1.5)),
        LayerPath((0, 1, 2), 3, 2, 1.5, Parts(3, heads, blocks)),
        LayerPath((0, 1, 2), 3, 2, 1.5, Parts(3, blocks, heads)),
        LayerPath((0, 1, 2), 3, 2, 1.5, Parts(4, heads, blocks)),
    ]
    paths += [LayerPath.of_shares(shares) for shares in (paths[:2], paths[1::-1])]
    assert len({repr(path) for path in paths}) == len(set(paths)) == len(paths)


def test_the_work_of_parts_is_their_share_of_the_layers():
    heads, blocks = ((0, 2), (1, 2), (0, 1)), ((1, 2), (0, 1), (0, 2))
    assert LayerPath((0, 1, 2), 3, parts=Parts(3, heads, blocks)).work == 2.0
    assert LayerPath((0, 1, 2), 3, parts=Parts(3, ((0, 1, 2),) * 3, ((0, 1, 2),) * 3)).work == 3.0


def test_parts_are_of_active_layers():
    heads, blocks = ((0, 2), (), (0, 1)), ((1, 2), (), (0, 2))
    path = LayerPath((0, 2), 3, parts=Parts(3, heads, blocks))
    assert path.work == pytest.approx(4 / 3)
    with pytest.raises(AssertionError, match="parts of no layer"):
        LayerPath((0,), 3, parts=Parts(3, heads, blocks))
    with pytest.raises(AssertionError, match="parts of some layers"):
        LayerPath((0,), 3, parts=Parts(3, heads[:2], blocks[:2]))


def test_layers_may_have_scales_of_their_own():
    path = LayerPath((0, 2), 3, 1, layer_scales=(1.0, 4.0, 1.25))
    assert [path.scale_of(layer) for layer in path.layers] == [1.0, 1.25]
    assert LayerPath((0, 2), 3, residual_scale=1.5).scale_of(2) == 1.5
    for scales in ((1.0, 1.25), (1.0, 4.0, -1.0), (1.0, 4.0, math.nan)):
        with pytest.raises(AssertionError):
            LayerPath((0, 2), 3, layer_scales=scales)


def test_a_step_of_several_paths_moves_the_layers_of_any():
    shares = LayerPath((0, 1, 5), 6, 1, 2.0), LayerPath((0, 3, 5), 6, 1, 1.5), LayerPath((), 6, 1)
    path = LayerPath.of_shares(shares)
    assert (path.layers, path.phase, path.num_layers) == ((0, 1, 3, 5), 1, 6)
    assert (path.length, path.mean_length, path.work) == (4, 2.0, 2.0)
    assert [path.of_micro_batch(n, 6) for n in range(6)] == [share for share in shares for _ in range(2)]
    assert [path.of_micro_batch(n, 3) for n in range(3)] == list(path.draws) == list(shares)
    assert LayerPath.of_shares([LayerPath.full(6), LayerPath.full(6)]).work == 6
    plain = LayerPath((0, 3), 6)
    assert [plain.of_micro_batch(n, 5) for n in range(5)] == [plain] * 5
    with pytest.raises(AssertionError, match="3 paths for 4 micro batches"):
        path.of_micro_batch(0, 4)


@pytest.mark.parametrize("parts", [(0, 0), (1, 0), (0, 3), (-1, 1)])
def test_wrong_parts_cannot_be_made(parts):
    with pytest.raises(AssertionError):
        Parts(3, (parts,), ((0, 1),))


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1, 2), (0, 6)])
def test_a_path_of_wrong_layers_cannot_be_made(layers):
    with pytest.raises(AssertionError):
        LayerPath(layers, 6)
