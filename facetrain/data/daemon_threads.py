"""Threads that nobody waits for."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


class DaemonThreads:
    """Some threads that work through what is submitted.

    A process that ends doesn't wait for them, as it would for those of concurrent.futures: what a server sends slowly,
    or not at all, would keep a process alive that has failed, and its peers waiting for it.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        """Prepare the threads, which start with the first call of `submit`."""
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(num_threads)]
        self._is_started = False

    def submit(self, function: Callable[..., ResultT], *args: Any) -> "Future[ResultT]":
        """Let a thread call a function; returns what will have its value."""
        future: Future[ResultT] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    future.set_exception(error)

        self._queue.put(call)
        if not self._is_started:
            self._is_started = True
            for thread in self._threads:
                thread.start()
        return future

    def close(self, *, wait: bool) -> None:
        """Let the threads end after what was submitted; cancel that first, where it is no longer wanted.

        With `wait` they have ended afterwards.
        """
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads if wait and self._is_started else ():
            thread.join()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()
