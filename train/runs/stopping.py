"""Requests to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from train.errors import Stopped


class StopRequests:
    """Notes the first SIGTERM or SIGINT inside its `with` block; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None  # the signal's number
        self._at_once = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install_handlers()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install_handlers(self) -> None:
        """Handle both signals from here on, whoever has handled them since."""
        for number in self._previous:
            signal.signal(number, self._note)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped for a request, also for an earlier one: in what may take long, and saves nothing."""
        self._at_once = True
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if self._at_once:
            raise Stopped(number)
        # Not print, in the middle of which the signal may have come.
        with contextlib.suppress(OSError):  # where nobody reads it any more
            os.write(2, b"\nstopping: saves first; a second signal ends it at once\n")
