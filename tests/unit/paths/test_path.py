"""The path value: queries and encoding."""

import math

import numpy as np
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


@pytest.mark.parametrize("num_layers", [1, 12, 70])
def test_encoding_has_one_size_and_returns_the_same_path(num_layers):
    generator = np.random.default_rng(3)
    for _ in range(20):
        layers = tuple(np.flatnonzero(generator.random(num_layers) < 0.5).tolist())
        path = LayerPath(layers, num_layers, phase=3, residual_scale=math.sqrt(num_layers / max(1, len(layers))))
        words = path.encode()
        assert words.dtype == np.int64
        assert words.shape == (5 + 2 * num_layers,)
        assert LayerPath.decode(words) == path
        assert all(type(layer) is int for layer in LayerPath.decode(words).layers)


def test_parts_of_layers_are_encoded_too():
    heads, blocks = ((0, 2), (1, 2), (0, 1)), ((1, 2), (0, 1), (0, 2))
    path = LayerPath((0, 1, 2), 3, 2, math.sqrt(1.5), Parts(3, heads, blocks))
    words = path.encode()
    assert words.shape == (5 + 2 * 3 + 3 * 2 * 3,)
    assert LayerPath.decode(words) == path
    assert path.work == 2.0
    assert LayerPath((0, 1, 2), 3, parts=Parts(3, ((0, 1, 2),) * 3, ((0, 1, 2),) * 3)).work == 3.0
    others = [
        LayerPath(path.layers, 3, 2, math.sqrt(1.5)),
        LayerPath(path.layers, 3, 2, math.sqrt(1.5), Parts(3, blocks, heads)),
        LayerPath(path.layers, 3, 2, math.sqrt(1.5), Parts(4, heads, blocks)),
    ]
    assert len({path, *others}) == 4
    assert all(LayerPath.decode(other.encode()) == other for other in others)


def test_parts_are_of_active_layers():
    heads, blocks = ((0, 2), (), (0, 1)), ((1, 2), (), (0, 2))
    path = LayerPath((0, 2), 3, parts=Parts(3, heads, blocks))
    assert LayerPath.decode(path.encode()) == path
    assert path.work == pytest.approx(4 / 3)
    with pytest.raises(AssertionError, match="parts of no layer"):
        LayerPath((0,), 3, parts=Parts(3, heads, blocks))
    with pytest.raises(AssertionError, match="parts of some layers"):
        LayerPath((0,), 3, parts=Parts(3, heads[:2], blocks[:2]))


def test_layers_may_have_scales_of_their_own():
    path = LayerPath((0, 2), 3, 1, layer_scales=(1.0, 4.0, 1.25))
    assert [path.scale_of(layer) for layer in path.layers] == [1.0, 1.25]
    assert LayerPath((0, 2), 3, residual_scale=1.5).scale_of(2) == 1.5
    words = path.encode()
    assert words.shape == LayerPath((0, 2), 3, 1).encode().shape
    assert LayerPath.decode(words) == path
    assert LayerPath.decode(LayerPath.of_shares([path, path]).encode()).shares == (path, path)
    with pytest.raises(AssertionError):
        LayerPath((0, 2), 3, layer_scales=(1.0, 1.25))
    words[-1] = -1
    with pytest.raises(ValueError, match="layer scales"):
        LayerPath.decode(words)


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


def test_shares_are_encoded_in_their_order():
    shares = LayerPath((0, 1, 5), 6, 1, 2.0), LayerPath((0, 3, 5), 6, 1, 1.5)
    path = LayerPath.of_shares(shares)
    words = path.encode()
    assert words.shape == (3 * (5 + 2 * 6),)
    assert LayerPath.decode(words) == path
    assert not np.array_equal(words, LayerPath.of_shares(shares[::-1]).encode())


@pytest.mark.parametrize(
    ("place", "value", "says"), [(4, 4, "4 shares in 51"), (5 + 4, 1, "3 layers and flags 4|not those of its 2 shares")]
)
def test_damaged_shares_are_refused(place, value, says):
    words = LayerPath.of_shares([LayerPath((0, 1), 6), LayerPath((0, 2), 6)]).encode()
    words[place] = value
    with pytest.raises(ValueError, match=says):
        LayerPath.decode(words)


@pytest.mark.parametrize("parts", [(0, 0), (1, 0), (0, 3), (-1, 1)])
def test_wrong_parts_cannot_be_made(parts):
    with pytest.raises(AssertionError):
        Parts(3, (parts,), ((0, 1),))


@pytest.mark.parametrize(
    ("position", "value"), [(1, 4), (2, 0), (2, -1), (3, 1), (3, -1), (4, 1), (4, -1), (5, 2), (5, 0)]
)
def test_damaged_words_are_refused(position, value):
    words = LayerPath((0, 2, 5), 6).encode()
    words[position] = value
    with pytest.raises(ValueError, match="encoded path"):
        LayerPath.decode(words)


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1, 2), (0, 6)])
def test_a_path_of_wrong_layers_cannot_be_made(layers):
    with pytest.raises(AssertionError):
        LayerPath(layers, 6)
