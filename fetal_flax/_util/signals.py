"""Signals that end a piece of work early, with what is done kept."""

import signal
import threading
import types
from typing import Any


class EndOnSignal:
    """Notes SIGINT and SIGTERM while it is entered; the second acts as it would without.

    Leaving raises KeyboardInterrupt if there was one. Signals reach the main thread alone; in
    another one nothing is noted.
    """

    _WATCHED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self.received = False
        """Whether to end."""

    def __enter__(self) -> "EndOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in self._WATCHED:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if self.received and kind is None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
