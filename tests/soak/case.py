"""One drawn run, what happens to it, and the layouts that train it: all must come to what one process comes to."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from raptr_ds.checkpoint.folder import CHECKPOINTS, step_folder
from raptr_ds.checkpoint.weights import load_trained_model
from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError, Exit
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.metrics_file import METRICS, ROLLED_BACK
from tests.integration.conftest import forked_ranks, lines_of
from tests.soak.accidents import Strike, overflow, without_its_user
from tests.soak.drawn import Draw, Keys, Layout, write_run

_EQUAL = ("non_finite", "path", "paths", "path_length", "phase", "tokens", "lr", "skipped_steps")
_CLOSE = {
    "fp32": {"loss": 2e-6, "eval_loss": 2e-6, "grad_norm": 2e-5},
    "bf16": {"loss": 2e-3, "eval_loss": 2e-3, "grad_norm": 0.02},  # sums in another order, of 8 bits
    "fp16": {"loss": 5e-4, "eval_loss": 5e-4, "grad_norm": 0.01},
}
"""How far apart values may be, relative, by precision."""
_CLOSE_WEIGHTS = 2e-4
_SMALL_WEIGHT = 0.01
"""How far apart weights of fp32 may be at the end, relative to the largest of their tensor and at least to this."""

_ALONE = Layout(1, {"zero_optimization.stage": 0, "train_micro_batch_size_per_gpu": 1})
_RECOMPUTES = "raptr_ds.parallel.activation_checkpointing"

Spoil = Callable[[Launch], None] | None
Ended = list[subprocess.CompletedProcess[str]]
"""How each rank ended."""
Lines = dict[tuple[int, bool], Keys]
"""Lines of metrics.jsonl by step, and whether they are evaluations."""


class Case:
    """A drawn run, and what happens to it in drawn layouts; each subclass draws what else it needs."""

    num_layouts = 2

    def __init__(self, draw: Draw, folder: Path, data: Path) -> None:
        self.folder, self.refusals = folder, 0
        self.apart: dict[str, float] = {}
        common = {"raptr_ds.data.path": str(data), "raptr_ds.log.tensorboard": False, "raptr_ds.log.progress": "plain"}
        self.run: Keys = {}
        self.run = self._accepted(lambda: {**common, **draw.run()}, _ALONE)
        self.layouts = [self._accepted_layout(draw) for _ in range(self.num_layouts)]
        self.step = draw.random.randint(1, self.run["raptr_ds.train.steps"] - 1)
        self.keys: Keys = {}
        self.draw(draw)
        enabled = {key for keys in (self.run, self.keys) for key in keys if keys[key] is True}
        self.precision = next((name for name in ("bf16", "fp16") if f"{name}.enabled" in enabled), "fp32")

    def draw(self, draw: Draw) -> None:
        """Draw what a kind of case needs besides."""

    def differences(self) -> list[str]:
        """Train in all layouts and return what differs; `apart` then says how far values were. Raises: RuntimeError."""
        self._train("alone", _ALONE, {})
        self._train("first", self.layouts[0], {})
        return self._compared("alone", "first", self.layouts[0])

    def _accepted(self, drawn: Callable[[], Keys], *layouts: Layout) -> Keys:
        """Return the first drawn keys with which the run is accepted in all these layouts."""
        while True:
            keys = drawn()
            if all(self._is_accepted(keys, layout) for layout in layouts):
                return keys

    def _accepted_layout(self, draw: Draw) -> Layout:
        while not self._is_accepted({}, layout := draw.layout(self.run)):
            pass
        return layout

    def _is_accepted(self, keys: Keys, layout: Layout) -> bool:
        file = self.folder / "drawn.json"
        write_run(file, self.run | layout.keys | keys)
        try:
            load_run_config(file, [], layout.processes)
        except ConfigError:
            self.refusals += 1
            return False
        return True

    def _ends(self, name: str, layout: Layout, keys: Keys, spoil: Spoil = None) -> Ended:
        """Train in a folder of that name and return how each rank ended."""
        file, save = self.folder / f"{name}-{layout.processes}.json", self.folder / name
        write_run(file, self.run | layout.keys | keys | {"raptr_ds.train.save": str(save)})
        return forked_ranks(file, processes=layout.processes, spoil=spoil)

    def _train(self, name: str, layout: Layout, keys: Keys, spoil: Spoil = None) -> None:
        ended = self._ends(name, layout, keys, spoil)
        if _codes(ended) != {Exit.DONE}:
            raise RuntimeError(_failure(name, ended))

    def _compared(
        self, expected: str, found: str, *layouts: Layout, file: str = METRICS, after: int = 0, weights: bool = True
    ) -> list[str]:
        """Return where the lines of a run after some step, and its weights, are not those expected.

        layouts: that trained it, as FLOPs are summed from the start.
        """
        lines, others = (self._lines(name, file, after) for name in (expected, found))
        wrong = [] if lines.keys() == others.keys() else [f"{found}: {sorted(lines)} became {sorted(others)}"]
        equal = _EQUAL if any(_RECOMPUTES in layout.keys for layout in layouts) else (*_EQUAL, "flops")
        for key in sorted(lines.keys() & others.keys()):
            one, other = lines[key], others[key]
            for kind in equal:
                if one.get(kind) != other.get(kind):
                    wrong.append(f"{found}, step {key[0]}: {kind} {one.get(kind)} became {other.get(kind)}")
            for kind, most in _CLOSE[self.precision].items():
                if kind in one and not one.get("non_finite"):
                    apart = abs(one[kind] - other[kind]) / abs(one[kind])
                    self.apart[kind] = max(self.apart.get(kind, 0.0), apart)
                    if not apart <= most:
                        wrong.append(f"{found}, step {key[0]}: {kind} {one[kind]} became {other[kind]}")
        return wrong + (self._compared_weights(expected, found) if weights and self.precision == "fp32" else [])

    def _compared_weights(self, expected: str, found: str) -> list[str]:
        """Return which weights of the newest checkpoint are not those expected."""
        one, other = (load_trained_model(self.folder / name) for name in (expected, found))
        wrong = [] if one.step == other.step else [f"{found}: checkpoint of step {one.step} became {other.step}"]
        if one.weights.keys() != other.weights.keys():
            return [*wrong, f"{found}: {sorted(one.weights)} became {sorted(other.weights)}"]
        for name, weight in one.weights.items():
            apart = float((weight - other.weights[name]).abs().max() / weight.abs().max().clamp(min=_SMALL_WEIGHT))
            self.apart["weights"] = max(self.apart.get("weights", 0.0), apart)
            if not apart <= _CLOSE_WEIGHTS:
                wrong.append(f"{found}: {name} is {apart:.1e} apart")
        return wrong

    def _lines(self, name: str, file: str, after: int) -> Lines:
        """Return the lines of a run; a line that was rolled back twice is there as it was the second time."""
        lines = (line for line in lines_of(self.folder / name, file) if line["step"] > after)
        return {(line["step"], "eval_loss" in line): line for line in lines}

    def __str__(self) -> str:
        """What is trained where, and what happens."""
        ranks = " then ".join(str(layout.processes) for layout in self.layouts)
        run = f"{self.run['raptr_ds.model.architecture']}, {self.run['raptr_ds.path.method']}, {self.precision}"
        return f"{run}, {type(self).__name__.lower()} on {ranks} ranks"


class Trained(Case):
    """One layout trains it."""

    num_layouts = 1


class Continued(Case):
    """The second layout continues the checkpoint that the first one wrote after some step."""

    def differences(self) -> list[str]:
        self._train("alone", _ALONE, {})
        self._train("first", self.layouts[0], self._saving)
        wrong = self._compared("alone", "first", self.layouts[0])
        self._train("second", self.layouts[1], self._loading("first"))
        # A run that begins from another's step evaluates there too, as its metrics do not have that yet.
        return wrong + self._compared("alone", "second", *self.layouts, after=self.step)

    @property
    def _saving(self) -> Keys:
        return {"raptr_ds.checkpoint.interval": self.step, "raptr_ds.checkpoint.keep": 9}

    def _loading(self, origin: str) -> Keys:
        return {"raptr_ds.checkpoint.load": str(step_folder(self.folder / origin / CHECKPOINTS, self.step))}


class Changed(Continued):
    """As that, with other keys from there on; one process does the same."""

    def draw(self, draw: Draw) -> None:
        self.keys = self._accepted(lambda: draw.change(self.run), _ALONE, *self.layouts)

    def differences(self) -> list[str]:
        self._train("alone", _ALONE, self._saving)
        self._train("first", self.layouts[0], self._saving)
        wrong = self._compared("alone", "first", self.layouts[0])
        expected = self._ends("changed", _ALONE, {**self.keys, **self._loading("alone")})
        found = self._ends("second", self.layouts[1], {**self.keys, **self._loading("first")})
        if _common_code(expected, found, Exit.USER_ERROR) == Exit.USER_ERROR:
            one, other = (
                ended[0].stderr.strip().splitlines()[-1].replace(str(self.folder / origin), "")
                for ended, origin in ((expected, "alone"), (found, "first"))
            )
            return wrong + ([] if one == other else [f"refused for another reason: {one}", other])
        return wrong + self._compared("changed", "second", *self.layouts, after=self.step)

    def __str__(self) -> str:
        """What is trained where, and what changes."""
        return f"{super().__str__()}, {self.keys}"


class Struck(Case):
    """A signal ends it at some moment in the first layout, and its user starts it again in the second."""

    first_line = 0
    starts_again: Spoil = None

    def draw(self, draw: Draw) -> None:
        line = draw.random.randint(self.first_line, self.run["raptr_ds.train.steps"] - 1)
        self.strike = Strike.drawn(draw.random, line, self.layouts[0].processes)
        self.saving = {"raptr_ds.checkpoint.interval": draw.one(1, 2, 3), "raptr_ds.checkpoint.keep": 1}

    def differences(self) -> list[str]:
        self._train("alone", _ALONE, {})
        ended = self._ends("struck", self.layouts[0], self.saving, self.strike.on(self.folder / "struck"))
        if not _codes(ended) <= self.strike.exit_codes:
            raise RuntimeError(_failure("struck", ended))
        self._train("struck", self.layouts[1], self.saving, type(self).starts_again)
        return self._compared("alone", "struck", *self.layouts)

    def __str__(self) -> str:
        """What is trained where, and what strikes it."""
        return f"{super().__str__()}, {self.strike}"


class Restarted(Struck):
    """As that, and a supervisor starts it again, with the same run file on another number of processes."""

    first_line = 1  # before there may be no record of the batch that a restart keeps
    starts_again = without_its_user

    def draw(self, draw: Draw) -> None:
        super().draw(draw)
        self.layouts[1] = draw.resized(self.run, self.layouts[0])


class Overflowing(Case):
    """Some sequences make steps overflow, after which it goes on, rolls back or stops."""

    num_layouts = 1

    def draw(self, draw: Draw) -> None:
        self.overflow = partial(overflow, draw.one(20, 40, 80))
        self.keys = self._accepted(draw.recovery, *self.layouts)

    def differences(self) -> list[str]:
        expected = self._ends("alone", _ALONE, self.keys, self.overflow)
        found = self._ends("first", self.layouts[0], self.keys, self.overflow)
        is_done = _common_code(expected, found, Exit.FAULT) == Exit.DONE
        wrong = self._compared("alone", "first", *self.layouts, weights=is_done)
        return wrong + self._compared("alone", "first", *self.layouts, file=ROLLED_BACK, weights=False)

    def __str__(self) -> str:
        """What is trained where, and what follows an overflow."""
        return f"{super().__str__()}, one in {self.overflow.args[0]} sequences, {self.keys}"


def drawn_case(seed: str, folder: Path, data: Path) -> Case:
    """Return a case of any kind, the same for one seed. folder: an empty one for it; data: a prepared one."""
    draw = Draw(seed)
    return draw.one(Trained, Continued, Changed, Struck, Restarted, Overflowing)(draw, folder, data)


def _codes(ended: Ended) -> set[int]:
    return {rank.returncode for rank in ended}


def _common_code(expected: Ended, found: Ended, allowed: Exit) -> Exit:
    """Return the exit code of all ranks of both. Raises: RuntimeError if it is not one, DONE or `allowed`."""
    codes = _codes(expected) | _codes(found)
    if len(codes) > 1 or not codes <= {Exit.DONE, allowed}:
        raise RuntimeError(f"{_failure('one process', expected)}\n{_failure('the layout', found)}")
    return Exit(codes.pop())


def _failure(name: str, ended: Ended) -> str:
    ends = [f"rank {at} ended with {rank.returncode}: {rank.stderr[-2000:]}" for at, rank in enumerate(ended)]
    return "\n".join([f"{name} failed", *ends])
