"""Worker processes for the tasks of preparation.

Each has a pipe of its own to the process that hands out tasks. When that one dies, however it does, its
workers find the pipe broken and end: nobody goes on writing into a folder that a new run may hold.
"""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

from openmoe.data.encode import Encoder, EncodeSettings, Receipt
from openmoe.data.errors import DataError
from openmoe.data.tasks import Task
from openmoe.data.tokenizer import Tokenizer

# Between two messages about the progress of a task.
_MESSAGE_SECONDS = 0.25

# Task, share of it that is done, tokens written.
TaskProgress = Callable[[Task, float, int], None]


class WorkerError(OSError):
    """A worker that failed for another reason than its data: killed, out of memory, a full disk."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None


def run_tasks(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    folder: Path,
    workers: int,
    progress: TaskProgress,
) -> Generator[tuple[Task, Receipt]]:
    """Run tasks in any order, yielding each with its receipt; one worker is this process itself.

    Raises DataError for bad data and WorkerError where a worker process was lost.
    """
    if min(workers, len(tasks)) <= 1:
        encoder = Encoder(tokenizer, settings, folder)
        for task in tasks:
            yield task, encoder.run(task, partial(progress, task))
        return
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, tokenizer.model, settings, folder), daemon=True
            )
            process.start()
            theirs.close()
            pool.append(_Worker(process, ours))
            _hand_out(pool[-1], waiting)
        while busy := {worker.connection: worker for worker in pool if worker.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                current = worker.task
                assert current is not None
                message = _receive(worker, current)
                if isinstance(message, Receipt):
                    _hand_out(worker, waiting)
                    yield current, message
                else:
                    progress(current, *message)
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.process.join()
            worker.connection.close()


def _hand_out(worker: _Worker, waiting: deque[Task]) -> None:
    worker.task = waiting.popleft() if waiting else None
    if worker.task is not None:
        try:
            worker.connection.send(worker.task)
        except ConnectionError:
            raise _lost(worker, worker.task) from None


def _receive(worker: _Worker, task: Task) -> Receipt | tuple[float, int]:
    try:
        message = worker.connection.recv()
    except (EOFError, ConnectionError):
        raise _lost(worker, task) from None
    if isinstance(message, Exception):
        raise message
    return message


def _lost(worker: _Worker, task: Task) -> WorkerError:
    worker.process.join()
    code = worker.process.exitcode
    return WorkerError(
        f"a worker ended with exit code {code} at {task.name}; start again to go on from there"
    )


def _work(connection: Connection, model: bytes, settings: EncodeSettings, folder: Path) -> None:
    """The life of a worker: takes tasks, sends (share, tokens) now and then, a receipt or an exception."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that hands out ends us
    last = monotonic()

    def progress(share: float, tokens: int) -> None:
        nonlocal last
        if monotonic() - last > _MESSAGE_SECONDS:
            last = monotonic()
            connection.send((share, tokens))

    try:
        encoder = Encoder(Tokenizer(model), settings, folder)
        while True:
            connection.send(encoder.run(connection.recv(), progress))
    except (EOFError, ConnectionError):
        return  # nobody is there any more
    except (DataError, OSError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
