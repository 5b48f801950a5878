"""What ends a run before its last step: a request to stop, or memory that does not suffice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from .runs import Run


class Stopped(RuntimeError):
    """The run was asked to stop, and did so after a step, with a checkpoint of it."""


class StopRequest:
    """Whether SIGTERM has come: how batch systems say that time is up. Only the main thread is told of signals.

    Every process of a run must stop after the same step, or the others would wait for it forever; so they ask
    each other.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.came = accelerator, False

    def __enter__(self) -> StopRequest:
        self.listens = threading.current_thread() is threading.main_thread()
        if self.listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self.listens:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_) -> None:
        self.came = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.came
        came = torch.tensor(float(self.came), device=self.accelerator.device)
        return bool(self.accelerator.reduce(came, "sum"))


@contextmanager
def enough_memory(run: Run) -> Iterator[None]:
    """Say which settings to lower where memory does not suffice. Raises MemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise MemoryError(
            f"memory does not suffice ({said}). Lower micro_batch_size (the blocks that go "
            "through the models at once; the batch stays what it is), then the length of the blocks or eval_blocks. "
            f"{run.way_back}"
        ) from error
