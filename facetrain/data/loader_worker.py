"""Processes that decode: how they start, and whose signals they obey."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread

import cv2

from facetrain.config import DataConfig

# A cluster or a terminal that ends a job signals all its processes, but when to stop is for the training process to
# decide: it may still take some steps, and a worker's death would raise in the middle of its last checkpoint.
_OF_A_JOB = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP})


@contextmanager
def signals_kept_from_workers(config: DataConfig) -> Iterator[None]:
    """Let workers start with a job's signals blocked: threads that their imports start couldn't be told later."""
    if not config.workers or sys.platform != "linux":
        yield
        return
    if config.start_method == "spawn":
        resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_A_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """Prepare a worker process."""
    gc.freeze()  # or the first collection would write to, and so copy, all that was imported before the fork
    cv2.setNumThreads(0)  # its thread pool doesn't survive a fork, and the workers are the parallelism
    if sys.platform == "linux":
        Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """Exit on the parent's SIGTERM, which is blocked everywhere; swallow everybody else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
