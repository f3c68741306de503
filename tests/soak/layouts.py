"""Run files at random, each in layouts at random: every layout must come to what one process comes to.

python -m tests.soak.layouts --data FOLDER [--minutes 30] [--seed 1] [--only N] [--output FOLDER]

A case is a tiny run of a few steps, drawn with its model, path method, objective, optimizer, schedule and precision.
One process trains it, and a drawn layout of up to four (tensor, pipeline and data parallel, ZeRO and its keys,
recomputation, micro batches). Then it may happen that a second layout continues the first one's checkpoint; that keys
of the run change there; that a signal ends the run at some moment, and it is started again in the second layout, or
by a supervisor on another number of processes; or that steps overflow, and the run rolls back (case.py). Paths,
tokens, learning rates and, without recomputation, FLOPs must be equal in every line; losses, norms and the weights at
the end equal to rounding. A drawn run file that is refused is drawn again. Prints a line for each case, what differs
or failed, and at the end how far apart fp32 was; the run files of a case that is wrong stay in --output. The exit
code is 1 if there is one. It is no test of pytest: it takes as long as one likes.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from tests.soak.case import Case, drawn_case


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
        case = drawn_case(f"{options.seed}/{number}", folder, options.data.absolute())
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
