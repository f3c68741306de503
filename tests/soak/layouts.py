"""Run files at random, each in layouts at random: every layout must come to what one process comes to.

python -m tests.soak.layouts --data FOLDER [--minutes 30] [--seed 1] [--only N] [--output FOLDER]

A case is a tiny run of a few steps, drawn with its model, path method, objective, optimizer, schedule and precision.
One process trains it; then a drawn layout of up to four (tensor, pipeline and data parallel, ZeRO and its keys,
recomputation, micro batches) trains it; and of most cases another layout continues the checkpoint that this one wrote
after some step. Paths, tokens, learning rates and, without recomputation, FLOPs must be equal in every line, losses and
norms equal to rounding. A drawn run file that is refused is drawn again. Prints a line for each case, what differs or
failed, and at the end how far apart fp32 was; the run files of a case that is wrong stay in --output. The exit code is
1 if there is one. It is no test of pytest: it takes as long as one likes.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from raptr_ds.checkpoint.folder import CHECKPOINTS, step_folder
from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError
from tests.integration.conftest import forked_ranks, lines_of
from tests.soak.drawn import Draw, Keys, Layout, write_run

_EQUAL = ("path", "paths", "path_length", "phase", "tokens", "lr", "skipped_steps")
_CLOSE = {
    "fp32": {"loss": 2e-6, "eval_loss": 2e-6, "grad_norm": 2e-5},
    "bf16": {"loss": 2e-3, "eval_loss": 2e-3, "grad_norm": 0.02},  # sums in another order, of 8 bits
    "fp16": {"loss": 5e-4, "eval_loss": 5e-4, "grad_norm": 0.01},
}
"""How far apart values may be, relative, by precision."""

_ALONE = Layout(1, {"zero_optimization.stage": 0, "train_micro_batch_size_per_gpu": 1})
_RECOMPUTES = "raptr_ds.parallel.activation_checkpointing"

Lines = dict[tuple[int, bool], Keys]
"""Lines of metrics.jsonl by step, and whether they are evaluations."""


class Case:
    """One drawn run, and the layouts that train it."""

    def __init__(self, seed: str, folder: Path, data: Path) -> None:
        self.folder, self.refusals = folder, 0
        self.apart: dict[str, float] = {}
        common = {"raptr_ds.data.path": str(data), "raptr_ds.log.tensorboard": False, "raptr_ds.log.progress": "plain"}
        draw = Draw(seed)
        self.run = {**common, **draw.run()}
        while not self._is_accepted(_ALONE):
            self.run = {**common, **draw.run()}
        self.layouts: list[Layout] = []
        while len(self.layouts) < 2:
            layout = draw.layout(self.run)
            self.layouts += [layout] if self._is_accepted(layout) else []
        last = self.run["raptr_ds.train.steps"] - 1
        self.handover = draw.random.randint(1, last) if draw.random.random() < 0.7 else None
        self.precision = next((name for name in ("bf16", "fp16") if f"{name}.enabled" in self.run), "fp32")

    def differences(self) -> list[str]:
        """Train in all layouts and return what differs; `apart` then says how far values were. Raises: RuntimeError."""
        expected = self._train("alone", _ALONE, {})
        first, second = self.layouts
        if self.handover is None:
            return self._compared("first", first, expected, self._train("first", first, {}))
        saving = {"raptr_ds.checkpoint.interval": self.handover, "raptr_ds.checkpoint.keep": 9}
        wrong = self._compared("first", first, expected, self._train("first", first, saving))
        origin = step_folder(self.folder / "first" / CHECKPOINTS, self.handover)
        found = self._train("second", second, {"raptr_ds.checkpoint.load": str(origin)})
        # A run that begins from another's step evaluates there too, as its metrics do not have that yet.
        rest, found = ({key: of[key] for key in of if key[0] > self.handover} for of in (expected, found))
        both = Layout(second.processes, first.keys | second.keys)  # FLOPs are summed from the start
        return wrong + self._compared("second", both, rest, found)

    def _is_accepted(self, layout: Layout) -> bool:
        file = self.folder / "drawn.json"
        write_run(file, self.run | layout.keys)
        try:
            load_run_config(file, [], layout.processes)
        except ConfigError:
            self.refusals += 1
            return False
        return True

    def _train(self, name: str, layout: Layout, more: Keys) -> Lines:
        file, save = self.folder / f"{name}.json", self.folder / name
        write_run(file, self.run | layout.keys | more | {"raptr_ds.train.save": str(save)})
        ended = forked_ranks(file, processes=layout.processes)
        if any(rank.returncode for rank in ended):
            ends = [f"rank {at} ended with {rank.returncode}: {rank.stderr[-2000:]}" for at, rank in enumerate(ended)]
            raise RuntimeError("\n".join([f"{name}.json failed", *ends]))
        return {(line["step"], "eval_loss" in line): line for line in lines_of(save)}

    def _compared(self, name: str, layout: Layout, expected: Lines, found: Lines) -> list[str]:
        wrong = [] if expected.keys() == found.keys() else [f"{name}: {sorted(expected)} became {sorted(found)}"]
        equal = _EQUAL if _RECOMPUTES in layout.keys else (*_EQUAL, "flops")
        for key in sorted(expected.keys() & found.keys()):
            one, other = expected[key], found[key]
            for kind in equal:
                if one.get(kind) != other.get(kind):
                    wrong.append(f"{name}, step {key[0]}: {kind} {one.get(kind)} became {other.get(kind)}")
            for kind, most in _CLOSE[self.precision].items():
                if kind in one:
                    apart = abs(one[kind] - other[kind]) / abs(one[kind])
                    self.apart[kind] = max(self.apart.get(kind, 0.0), apart)
                    if not apart <= most:
                        wrong.append(f"{name}, step {key[0]}: {kind} {one[kind]} became {other[kind]}")
        return wrong

    def __str__(self) -> str:
        """What is trained where."""
        ranks = " then ".join(str(layout.processes) for layout in self.layouts[: 1 if self.handover is None else 2])
        method = self.run["raptr_ds.path.method"]
        return f"{self.run['raptr_ds.model.architecture']}, {method}, {self.precision}, on {ranks} ranks"


def main() -> int:
    """Parse the command line, and try cases until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to begin cases (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the cases (default 1)")
    parser.add_argument("--only", type=int, metavar="N", help="try case N alone")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/layouts"), help="must not exist (default runs/layouts)"
    )
    options = parser.parse_args()
    output: Path = options.output.absolute()
    output.mkdir(parents=True)
    end, number, refusals = time.monotonic() + 60 * options.minutes, options.only or 0, 0
    wrong_cases: list[int] = []
    apart: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    while time.monotonic() < end:
        folder = output / f"{number}"
        folder.mkdir()
        case = Case(f"{options.seed}/{number}", folder, options.data.absolute())
        wrong = tried(case)
        refusals += case.refusals
        methods[case.run["raptr_ds.path.method"]] += 1
        if case.precision == "fp32":
            apart |= Counter(case.apart)  # the larger of both
        values = ", ".join(f"{kind} {value:.0e}" for kind, value in case.apart.items())
        print(f"case {number}: {case}: {values} apart", flush=True)
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
        if wrong:
            wrong_cases.append(number)
        elif options.only is None:
            shutil.rmtree(folder)
        number += 1
        if options.only is not None:
            break
    print(
        f"{sum(methods.values())} cases ({', '.join(f'{count} {name}' for name, count in methods.most_common())}), "
        f"{refusals} drawn files refused; wrong: {wrong_cases or 'none'}"
    )
    print("fp32 apart by at most: " + ", ".join(f"{kind} {value:.1e}" for kind, value in apart.items()))
    return int(bool(wrong_cases))


def tried(case: Case) -> list[str]:
    """Return what is wrong with a case: differences, or how it failed."""
    try:
        return case.differences()[:8]
    except (RuntimeError, AssertionError) as error:  # AssertionError: ranks that hung
        return str(error).splitlines()


if __name__ == "__main__":
    sys.exit(main())
