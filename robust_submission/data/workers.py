"""How images are read while others are used: the worker processes, and a thread without them."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import TypeVar

Read = TypeVar("Read")


def prepare_worker(worker: int) -> None:
    """Make a worker ignore Ctrl-C, and SIGTERM from any process but the one that started it.

    A launcher or a scheduler sends both to all processes; the main process ends its workers itself,
    by SIGTERM, when it exits. Without sigwaitinfo (macOS), workers keep torch's handling.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, name="signals", daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def read_ahead(batches: Iterator[Read]) -> Iterator[Read]:
    """The same batches; a thread reads the next one while this one is used."""
    with ThreadPoolExecutor(1, "reader") as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch
