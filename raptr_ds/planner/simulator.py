"""Simulator: how long a pipeline takes for one step, from what each stage takes for a micro batch.

It plays the instructions of every stage in their order: forward, backward, and the transfers between stages. Times may
be arrays, so that thousands of paths are simulated at once. With equal stages and free transfers it gives the closed
forms (m + p - 1)(f + b) for 1F1B and m (f + b) + (p - 1)(f + b) / v interleaved; tools/validate_simulator.py holds it
against DeepSpeed's own pipeline.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SCHEDULES = ("1f1b", "interleaved", "deepspeed")
FORWARD, BACKWARD, SEND, RECEIVE = "forward", "backward", "send", "receive"


class Instruction(NamedTuple):
    """One thing that a stage does.

    part: the virtual stage (pipeline stage s holds parts s, s + p, ...) that computes, or for a transfer the one that
    receives; a micro batch's activation and gradient reach a part once each; is_gradient distinguishes them.
    """

    kind: str
    part: int
    micro_batch: int
    is_gradient: bool = False


def pipeline_seconds(
    forward: np.ndarray,
    backward: np.ndarray,
    num_micro_batches: int,
    transfer_seconds: float = 0.0,
    *,
    num_chunks: int = 1,
    schedule: str = "1f1b",
) -> np.ndarray:
    """Return when each stage has finished its last backward pass, counted from the start of the step.

    Shapes: forward and backward (..., parts) seconds of a micro batch, parts = stages x num_chunks in the model's
    order; returns (..., stages). The pipeline's time is the largest of them.
    schedule: "1f1b" sends without waiting for the receiver; "interleaved" is Megatron's with num_chunks parts a stage,
    and needs num_micro_batches to be a multiple of the stages; "deepspeed" is 1F1B as DeepSpeed 0.19.8 plays it
    (runtime/pipe/schedule.py, TrainSchedule): a stage receives the next gradient before it sends its activation, and
    a sender waits for the receiver.
    """
    assert schedule in SCHEDULES, schedule
    num_parts = forward.shape[-1]
    assert forward.shape == backward.shape
    assert num_parts % num_chunks == 0, f"{num_parts} parts, {num_chunks} chunks"
    assert num_chunks == 1 or schedule == "interleaved", f"{schedule} has one part a stage"
    num_stages = num_parts // num_chunks
    if schedule == "interleaved" and num_chunks > 1:
        orders = [_interleaved_order(stage, num_stages, num_micro_batches, num_chunks) for stage in range(num_stages)]
    else:
        orders = [_1f1b_order(stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    lazy = schedule == "deepspeed"
    programs = [_with_transfers(order, num_parts, sends_late=lazy) for order in orders]
    return _play(programs, forward, backward, transfer_seconds, waits=lazy)


def _1f1b_order(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Return a stage's computations: forward passes until the pipeline is full, then backward and forward in turns."""
    ahead = min(num_stages - stage, num_micro_batches)
    order = [Instruction(FORWARD, stage, micro) for micro in range(ahead)]
    for micro in range(num_micro_batches):
        order.append(Instruction(BACKWARD, stage, micro))
        if ahead + micro < num_micro_batches:
            order.append(Instruction(FORWARD, stage, ahead + micro))
    return order


def _interleaved_order(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Instruction]:
    """Return a stage's computations in Megatron's interleaved order (Narayanan et al. 2021, arXiv 2104.04473)."""
    assert num_micro_batches % num_stages == 0, f"{num_micro_batches} micro batches, {num_stages} stages"
    total, group = num_micro_batches * num_chunks, num_stages * num_chunks

    def instruction(kind: str, number: int) -> Instruction:
        chunk, micro = number % group // num_stages, number // group * num_stages + number % num_stages
        chunk = chunk if kind == FORWARD else num_chunks - 1 - chunk
        return Instruction(kind, chunk * num_stages + stage, micro)

    ahead = min(2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages, total)
    order = [instruction(FORWARD, number) for number in range(ahead)]
    for number in range(total):
        if ahead + number < total:
            order.append(instruction(FORWARD, ahead + number))
        order.append(instruction(BACKWARD, number))
    return order


def _with_transfers(order: Sequence[Instruction], num_parts: int, sends_late: bool) -> list[Instruction]:
    """Return the computations with each one's receive from a neighbour before it and its send to one after it.

    sends_late: an activation leaves after the next gradient was received, once the pipeline is full.
    """
    program: list[Instruction] = []
    waiting: list[Instruction] = []
    for kind, part, micro, _ in order:
        is_forward = kind == FORWARD
        source = part - 1 if is_forward else part + 1
        if is_forward:
            program += waiting
            waiting = []
        if 0 <= source < num_parts:
            program.append(Instruction(RECEIVE, part, micro, not is_forward))
        program += waiting
        program.append(Instruction(kind, part, micro))
        target = part + 1 if is_forward else part - 1
        waiting = [Instruction(SEND, target, micro, not is_forward)] if 0 <= target < num_parts else []
        is_full = micro >= num_parts - 1 - part
        if not (sends_late and is_forward and is_full):
            program += waiting
            waiting = []
    return program + waiting


def _play(
    programs: Sequence[Sequence[Instruction]],
    forward: np.ndarray,
    backward: np.ndarray,
    transfer_seconds: float,
    waits: bool,
) -> np.ndarray:
    """Run every stage's program and return the clocks at their ends, (..., stages).

    waits: a transfer begins when both sides are there, and holds both until it is done.

    Every stage has a clock of its own; two stages meet only in a transfer. A stage plays its program up to a transfer
    whose other side is not there yet, and is put aside under that transfer; the stage that brings the other side makes
    it ready again. Two stages, two micro batches, forward 1 and 3 seconds, backward 2 and 3, free transfers:

        seconds   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
        stage 0  F0 F1  .  .  .  .  . B0 B0  .  .  .  . B1 B1
        stage 1   . F0 F0 F0 B0 B0 B0 F1 F1 F1 B1 B1 B1

    Stage 1 cannot begin and is put aside under "receive activation 0". Stage 0 plays F0 and sends at 1, which makes
    stage 1 ready; it plays F1, sends at 2, and is put aside at 2 under "receive gradient 0". Stage 1 goes on from 1,
    and after B0, at 7, sends that gradient: stage 0 goes on from the later of 2 and 7. Which ready stage plays first
    changes no clock, as every transfer has one sender and one receiver.
    """
    clocks = [np.zeros(forward.shape[:-1]) for _ in programs]
    position = [0] * len(programs)
    # By the receiver's instruction, which names the transfer:
    arrivals: dict[Instruction, np.ndarray] = {}  # when it is done, seen from the side that comes later
    asked: dict[Instruction, tuple[int, np.ndarray]] = {}  # receivers that are put aside, and since when
    offered: dict[Instruction, tuple[int, np.ndarray]] = {}  # senders that are put aside, and since when
    ready = list(range(len(programs)))
    while ready:
        stage = ready.pop()
        while position[stage] < len(programs[stage]):
            kind, part, micro, is_gradient = programs[stage][position[stage]]
            if kind == FORWARD:
                clocks[stage] = clocks[stage] + forward[..., part]
            elif kind == BACKWARD:
                clocks[stage] = clocks[stage] + backward[..., part]
            else:
                key = Instruction(RECEIVE, part, micro, is_gradient)
                if kind == SEND and not waits:  # the activation or gradient travels by itself
                    arrivals[key] = clocks[stage] + transfer_seconds
                    if key in asked:
                        ready.append(asked.pop(key)[0])
                elif key in arrivals:
                    clocks[stage] = np.maximum(clocks[stage], arrivals.pop(key))
                elif waits and key in (other := asked if kind == SEND else offered):  # both sides are there
                    partner, since = other.pop(key)
                    arrivals[key] = clocks[stage] = np.maximum(clocks[stage], since) + transfer_seconds
                    ready.append(partner)
                else:
                    (offered if kind == SEND else asked)[key] = (stage, clocks[stage])
                    break
            position[stage] += 1
    assert all(at == len(program) for at, program in zip(position, programs, strict=True)), "stages wait for each other"
    return np.stack(clocks, axis=-1)
