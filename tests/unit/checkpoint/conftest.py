"""What the checkpoint tests stand on: a lone process's groups, an engine of a few plain tensors, a folder of both."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raptr_ds.checkpoint.folder import checkpoints_in
from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.config.sections import ModelSection
from raptr_ds.engine.fragments import Fragment, Geometry
from raptr_ds.parallel.groups import ProcessGroups

SHAPES = {"embedding.word.weight": (7, 4), "layers.0.mlp.weight": (6, 4), "layers.0.mlp.bias": (6,)}


@pytest.fixture
def small_model() -> Callable[..., ModelSection]:
    """Returns a model section, with other values where said."""

    def make(**values: Any) -> ModelSection:
        fields = {"architecture": "bert", "num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "seq_length": 8}
        return ModelSection(**{**fields, "vocab_size": 7, **values})

    return make


class TensorsEngine:
    """Holds weights and one optimizer state of some shapes; `step` moves them all to values that only `step` has."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.shapes = dict(SHAPES if shapes is None else shapes)
        self.tensors = {(name, "weight"): torch.zeros(shape) for name, shape in self.shapes.items()}
        self.counts: dict[str, float] = {}
        self.loss_scaler: dict[str, float] = {}
        self.refreshed = 0

    def step(self, number: int) -> None:
        """Train step `number`; layers before it have no optimizer state."""
        for name, shape in self.shapes.items():
            self.tensors.setdefault((name, "exp_avg"), torch.zeros(shape))
        for index, tensor in enumerate(self.tensors.values()):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000.0 * number + 100.0 * index)
        self.counts = dict.fromkeys(self.shapes, float(number))

    def values(self) -> dict[tuple[str, str], list[float]]:
        """Return all tensors as lists."""
        return {key: tensor.flatten().tolist() for key, tensor in sorted(self.tensors.items())}

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, kind, Geometry.of_whole(tensor), tensor.view(-1))
            for (name, kind), tensor in self.tensors.items()
        ]

    def owns(self, fragment: Fragment) -> bool:
        return True

    def step_counts(self) -> dict[str, float]:
        return self.counts

    def create_state(self, kinds: Mapping[str, set[str]], counts: Mapping[str, float]) -> None:
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if key[1] == "weight"}
        for name, shape in self.shapes.items():
            for kind in kinds.get(name, set()) - {"weight"}:
                self.tensors[name, kind] = torch.zeros(shape)
        self.counts = dict(counts)

    def refresh_weights(self) -> None:
        self.refreshed += 1

    def loss_scaler_state(self) -> dict[str, float]:
        return self.loss_scaler

    def load_loss_scaler_state(self, values: Mapping[str, float]) -> None:
        self.loss_scaler = dict(values)


@pytest.fixture
def make_engine() -> type[TensorsEngine]:
    """Makes engines of a few plain tensors."""
    return TensorsEngine


class SavedRun:
    """Checkpoints of one folder, with what they said."""

    def __init__(self, folder: Path, groups: ProcessGroups, model: ModelSection, engine: type[Any], keep: int) -> None:
        self.folder, self.model, self.new_engine = folder, model, engine
        self.said: list[str] = []
        self.checkpoints = Checkpoints(folder, groups, keep, self.said.append)
        self.engine = engine()

    def save(self, *steps: int) -> list[str | None]:
        """Train and save these steps; return the errors."""
        for step in steps:
            self.engine.step(step)
            self.checkpoints.save(self.engine, step, self.model, {"tokens": 10 * step})
        return [report.error for report in self.checkpoints.wait()]

    def steps(self) -> list[str]:
        return [path.name[-1] for path in checkpoints_in(self.folder)]

    def names(self) -> list[str]:
        """Return all names in the folder."""
        return sorted(path.name for path in self.folder.iterdir())

    def restore(self, where: str = "auto") -> int | None:
        """Restore a new engine, see that it has exactly what was saved, and return the step."""
        fresh = self.new_engine()
        restored = self.checkpoints.restore(fresh, where, self.model)
        if restored is None:
            assert fresh.values() == self.new_engine().values()
            return None
        expected = self.new_engine()
        expected.step(restored.step)
        assert fresh.values() == expected.values()
        assert fresh.counts == expected.counts
        assert fresh.refreshed >= 1
        assert restored.run_state == {"tokens": 10 * restored.step}
        return restored.step


@pytest.fixture
def new_run(
    tmp_path: Path, groups: ProcessGroups, small_model: Callable[..., ModelSection], make_engine: type[Any]
) -> Iterator[Callable[..., SavedRun]]:
    made: list[SavedRun] = []

    def make(keep: int = 2, folder: Path = tmp_path / "run" / "checkpoints") -> SavedRun:
        made.append(SavedRun(folder, groups, small_model(), make_engine, keep))
        return made[-1]

    yield make
    for run in made:
        run.checkpoints.close()


@pytest.fixture
def run(new_run: Callable[..., SavedRun]) -> SavedRun:
    return new_run()
