"""Coded rounds of whole numbers, whose sums are exact in whatever order they are made."""

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fulgurite.plugins.comm.coded_rounds import CodedRounds
from fulgurite.plugins.comm.gradient_codes import SequentialCode, Task

SIZE = 5


def gradient(window: int, job: int, chunk: int) -> Tensor:
    """Of a chunk, different for each chunk of each job of each window."""
    return torch.tensor([1.0, window, job, chunk, (7 * window + 5 * job + 3 * chunk) % 11])


def whole_weights(code: SequentialCode) -> Tensor:
    return (code.chunk_weights / code.chunk_weights.min()).round()


def gradient_of_batch(code: SequentialCode, window: int, job: int) -> Tensor:
    weights = whole_weights(code).tolist()
    return torch.stack([weight * gradient(window, job, chunk) for chunk, weight in enumerate(weights)]).sum(0)


def write(code: SequentialCode, window: int, task: Task, row: Tensor) -> None:
    """Puts what the task asks for into a row."""
    weights = whole_weights(code)[task.chunks] * task.coeffs
    parts = [w * gradient(window, task.job, c) for w, c in zip(weights.tolist(), task.chunks, strict=True)]
    row.copy_(torch.stack(parts).sum(0))


def until(condition: Callable[[], bool], patience_s: float = 30.0) -> None:
    end = time.monotonic() + patience_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


class Worker:
    """Computes tasks on time, but for some rounds, which it leaves to end without it.

    A worker on time takes a while, so that rank 0's patience, some times as much, outlasts the machine's hiccups. One
    that has become indispensable by such a hiccup answers in the end.
    """

    def __init__(self, rounds: CodedRounds, code: SequentialCode, late: Collection[int] = ()) -> None:
        self.rounds, self.code, self.late, self.window = rounds, code, late, 0
        self.begun: list[int] = []  # rounds

    def __call__(self, task: Task, row: Tensor) -> bool:
        if self.rounds.is_over():
            return False
        self.begun.append(self.rounds.round)
        if self.rounds.round in self.late:
            until(self.rounds.is_over, patience_s=3.0)
            if self.rounds.is_over():
                return False
        time.sleep(0.01)
        write(self.code, self.window, task, row)
        return True


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "coded rounds" in thread.name]


def outcome(action: Callable[[], Any]) -> str:
    """The error of an action, or that there is none."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "no error"
