"""A pool of processes that reads slices while TFDS writes them.

Results come in the order of the jobs, so that a build is the same with any number of workers. Only
a few jobs per worker are under way at once, so that memory does not grow with the data set.

The standard pools share one queue among their workers: one that is ended while it writes a result
leaves the others, and the interpreter's own exit, waiting for ever. Here each worker has its own
pipes, so that it can be ended at any moment.
"""

import collections
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from rg_jax.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

# Enough that no worker waits for the writer, little enough that memory stays flat.
IN_FLIGHT_PER_WORKER = 4
_DIED = "a worker process ended abruptly, probably for want of memory: use fewer --workers"


class Pool:
    """Processes that are started when first needed; 0 workers = all in this process.

    They end with `close`, with any error or early end of a `map`, and with this process even if
    that is killed.
    """

    def __init__(self, workers: int):
        if workers < 0:
            raise UserError(f"--workers={workers}: must be 0 (this process) or more")
        self.workers = workers
        self._running: list[_Worker] = []

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`function` of every job, in order.

        `function` is a function of a module (it is sent by name), jobs and results can be pickled.
        Jobs are drawn only as far ahead as needed. An exception in a worker is raised here when
        its turn comes. Raises UserError if a worker dies (the system killed it for its memory).
        """
        if self.workers == 0:
            yield from map(function, jobs)
            return
        waiting: collections.deque[_Worker] = collections.deque()
        try:
            for number, job in enumerate(jobs):
                if not self._running:
                    self._running = [_Worker() for _ in range(self.workers)]
                worker = self._running[number % self.workers]
                worker.send((function, job))
                waiting.append(worker)
                if len(waiting) >= self.workers * IN_FLIGHT_PER_WORKER:
                    yield waiting.popleft().receive()
            while waiting:
                yield waiting.popleft().receive()
        except BaseException:  # a generator that is closed early ends here too
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they are at. A later `map` starts new ones."""
        running, self._running = self._running, []
        for worker in running:
            worker.process.terminate()
        for worker in running:
            worker.process.join()
            worker.jobs.close()
            worker.results.close()


class _Worker:
    """A process, and the two ends of its pipes that are ours."""

    def __init__(self):
        # Not forked: the writing process has threads, and a fork may copy a lock that one holds.
        context = multiprocessing.get_context("spawn")
        theirs_in, self.jobs = context.Pipe(duplex=False)
        self.results, theirs_out = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(theirs_in, theirs_out), daemon=True)
        self.process.start()
        # Only the worker holds them now, so that its end shows as the end of the pipe.
        theirs_in.close()
        theirs_out.close()

    def send(self, work: Any) -> None:
        try:
            self.jobs.send(work)
        except OSError as error:
            raise UserError(_DIED) from error

    def receive(self) -> Any:
        try:
            fine, value = self.results.recv()
        except (EOFError, OSError) as error:
            raise UserError(_DIED) from error
        if fine:
            return value
        raise value


def _work(jobs: Connection, results: Connection) -> None:
    """The life of a worker process."""
    # Ctrl-C reaches the whole group: the writing process handles it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(jobs, waiting), daemon=True).start()
    while True:
        function, job = waiting.get()
        try:
            answer = (True, function(job))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            answer = (False, error)
        try:
            message = pickle.dumps(answer)
        except Exception as error:
            message = pickle.dumps((False, RuntimeError(f"cannot be sent back: {error!r}")))
        results.send_bytes(message)


def _take(jobs: Connection, waiting: "queue.SimpleQueue[Any]") -> None:
    """Take jobs as they come, so that the writing process never waits to be rid of one.

    The pipe ends with that process, even if it is killed, and so does the worker.
    """
    try:
        while True:
            waiting.put(jobs.recv())
    except (EOFError, OSError):
        os._exit(1)
    except Exception:  # a job that cannot be unpacked here: its module is missing, say
        traceback.print_exc()
        os._exit(1)
