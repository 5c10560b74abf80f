"""Signals that end a piece of work early, with what is done kept."""

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Generator, Iterable


@contextlib.contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, types.FrameType | None], None]
) -> Generator[None, None, None]:
    """Gives the signals `numbers` to `handler` inside, and to whoever had them before afterwards.

    Signals reach the main thread alone; in another one nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class EndOnSignal:
    """Notes SIGINT and SIGTERM while it is entered; the second acts as it would without.

    Leaving raises KeyboardInterrupt if there was one.
    """

    def __init__(self) -> None:
        self._handlers = contextlib.ExitStack()
        self.received = False
        """Whether to end."""

    def __enter__(self) -> "EndOnSignal":
        self._handlers.enter_context(handled((signal.SIGINT, signal.SIGTERM), self._receive))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handlers.close()
        if self.received and kind is None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self.received = True
        self._handlers.close()
