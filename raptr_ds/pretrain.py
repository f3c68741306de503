"""Pretrain BERT or UL2 by random paths: the entry, and the loop.

deepspeed [launcher flags] raptr_ds/pretrain.py --deepspeed_config FILE [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file, by a launcher
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.errors import FIRST_WORD_SECONDS, Exit, RaptrError
from raptr_ds.parallel.launch import Launch, detect_launch, is_first_rank_there, prepare_imports
from raptr_ds.runtime.host_memory import keep_freed_memory, uncollected_imports
from raptr_ds.runtime.signals import StopSignals
from raptr_ds.user_paths import print_any_name

if TYPE_CHECKING:  # torch and DeepSpeed take seconds to import: a wrong run file is reported before
    from raptr_ds.runtime.session import Session


_FIRST_RANK_SECONDS = 30.0  # that rank 0 may take from its run file to the rendezvous


def main(arguments: Sequence[str] | None = None) -> Exit:
    """Run the command line and return the exit code; one rank prints a user's mistake."""
    print_any_name()
    options = parse(arguments)
    launch = None
    try:
        launch = detect_launch()
        config = load(options, launch)
        with StopSignals(watch_launcher=launch.launcher != "none") as signals:
            return pretrain(config, launch, signals)
    except RaptrError as error:
        if launch is None or error.is_printed_by(launch.rank):
            with contextlib.suppress(OSError):  # nobody to read it, or a full disk: the exit code still says what it is
                print(f"\nraptr_ds: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(FIRST_WORD_SECONDS)
        return error.exit_code


def load(options: argparse.Namespace, launch: Launch) -> RunConfig:
    """Return the run's configuration. Where this rank alone cannot, as on a node without the file, the others do not
    wait for it: they end with its error, and rank 0 prints it.
    """
    try:
        return load_run_config(
            options.deepspeed_config, options.set, launch.world_size, is_restart=launch.restart_count > 0
        )
    except RaptrError as error:
        if launch.rank and is_first_rank_there(launch, _FIRST_RANK_SECONDS):  # rank 0 has no such error
            from raptr_ds.parallel.roll_call import refuse

            refuse(launch, str(error))
        raise


def pretrain(config: RunConfig, launch: Launch, signals: StopSignals) -> Exit:
    """Set the run up, train it, and return with everything on disk."""
    with uncollected_imports():
        import torch

        has_gpu = torch.cuda.is_available()
        prepare_imports(has_gpu)
        from raptr_ds.runtime.lost_ranks import lost_ranks_explained
        from raptr_ds.runtime.out_of_memory import memory_errors_explained
        from raptr_ds.runtime.setup import open_session
    if not has_gpu:
        keep_freed_memory()
    with (
        lost_ranks_explained(),
        open_session(config, launch, signals) as session,
        memory_errors_explained(session.config, session.groups, lambda: session.num_trained),
    ):
        return session.finish(train(session))


def train(session: Session) -> Exit:
    """Train from the session's state to the end, or to a stop that all ranks agreed on.

    Raises: NonFiniteError, on all ranks, if too many steps in a row were skipped and the run may not go on.
    """
    from raptr_ds.runtime.non_finite import must_recover, recover
    from raptr_ds.runtime.session import evaluate

    config, state = session.config, session.state
    if session.has_open_evaluation and not evaluate(session, state):
        session.save(state)
        return Exit.CONTINUE_LATER
    while state.step < config.train.steps:
        path, stop = session.agreed_path(state.step)  # the same on all ranks; step n + 1 is under way while n runs
        if stop:
            session.save(state)
            return Exit.CONTINUE_LATER
        started = time.perf_counter()
        if growth := session.method.growth_at(state.step):  # stacking only
            session.engine.grow(growth)
        learning_rate = session.learning_rate_at(state.step)
        batch = session.load(state)
        result = session.engine.train_step(batch, path, state.step, learning_rate)
        before, state = state, state.after(session.cost, result, path)
        session.record(state, result, path, learning_rate, time.perf_counter() - started)
        if must_recover(state, config.train.max_non_finite_steps):
            state = recover(session, state, result)
            continue
        if config.evaluates_after(state.step) and not evaluate(session, state):
            session.save(state)
            return Exit.CONTINUE_LATER
        if session.is_checkpoint_due(before, state):
            session.save(state)
    if config.checkpoint.saves_at_end:  # also where there was nothing left to train after another run's checkpoint
        session.save(state)
    return Exit.DONE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; argparse ends with exit code 2 on a mistake, as we do."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--deepspeed_config", type=Path, required=True, metavar="FILE", help="the run file (HJSON)")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override dotted keys of the run file: --set raptr_ds.train.steps=100 zero_optimization.stage=2",
    )
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # DeepSpeed users' habit
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        exit_code = int(main())
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        exit_code = int(Exit.FAULT)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Threads of libraries and of gloo may wait for ranks that are gone: leave without waiting for them.
    os._exit(exit_code)
