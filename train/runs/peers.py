"""Who of several processes is gone: noticed before JAX notices it, whose way to say so is a core dump.

Each process writes a beat to JAX's coordination service, which is a part of process 0, and process 0 reads
those of all. A process whose beat stays away for the peer timeout ends the others, with a sentence, which
process 0 gives out as its last beat. When process 0 itself ends, its system closes a connection.
"""

import contextlib
import itertools
import os
import socket
import threading
import time
from typing import Any

import jax

BEAT = "train/beat/{}"  # of a process: a number that grows; at last ENDED, or why the others have to end
ENDED = "ended"
ADVICE = "What it has printed may say why. Start all processes again to go on from the newest checkpoint."


class Watch:
    """Watches over the other processes, in threads, until the program ends."""

    def __init__(self, client: Any, *, address: str, me: int, count: int, timeout: float):
        """Begin to watch, as process `me` of `count`, with a client of the service at HOST:PORT."""
        self._client, self._address, self._me, self._count = client, address, me, count
        self._timeout, self._interval = timeout, min(2.0, timeout / 5)  # seconds
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._beating = threading.Thread(target=self._follow if me else self._lead, daemon=True)
        self._beating.start()
        if me:
            threading.Thread(target=self._hold_connection, daemon=True).start()

    def stop(self) -> None:
        """End what would not outlive the interpreter. The others do not miss this process."""
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._beat(ENDED)

    def gone(self) -> list[int]:
        """Return the processes that do not beat any more. It takes two beats to know."""
        try:
            before = self._beats()
            time.sleep(2.5 * self._interval)
            after = self._beats()
        except jax.errors.JaxRuntimeError:
            return [0]
        return [i for i in range(self._count) if i != self._me and before.get(i) == after.get(i) != ENDED]

    def claim(self) -> None:
        """Keep the threads from ending the program from here on: the caller does, and says why."""
        self._ending.acquire(blocking=False)

    def _beat(self, beat: str) -> None:
        self._client.key_value_set(BEAT.format(self._me), beat, allow_overwrite=True)

    def _beats(self) -> dict[int, str]:
        found = self._client.key_value_dir_get(BEAT.format(""))
        return {int(key.rpartition("/")[2]): beat for key, beat in found}

    def _lead(self) -> None:
        """Beat, and see who else does."""
        seen: dict[int, tuple[str | None, float]] = {}
        for number in itertools.count():
            self._beat(str(number))
            beats, now = self._beats(), time.monotonic()
            for i in range(1, self._count):
                if i not in seen or seen[i][0] != beats.get(i):
                    seen[i] = beats.get(i), now
                elif beats.get(i) != ENDED and now - seen[i][1] > self._timeout:
                    why = self._silent(i)
                    self._beat(why)
                    time.sleep(2 * self._interval)  # until all have read it
                    self._end(why)
            if self._ended.wait(self._interval):
                return

    def _follow(self) -> None:
        """Beat, and see whether process 0 does."""
        for number in itertools.count():
            try:
                # In this order, for only the first of the two can be told how long to wait.
                beat = self._client.blocking_key_value_get(BEAT.format(0), int(1000 * self._timeout))
                self._beat(str(number))
            except jax.errors.JaxRuntimeError:
                beat = self._silent(0)
            if beat != ENDED and not beat.isdigit():
                self._end(beat)
            if self._ended.wait(self._interval):
                return

    def _hold_connection(self) -> None:
        """Notice at once that process 0 has ended; where there is no way to connect, beats tell later."""
        host, _, port = self._address.rpartition(":")
        with contextlib.suppress(OSError):
            while True:
                try:
                    with socket.create_connection((host.strip("[]"), int(port)), self._timeout) as connection:
                        connection.settimeout(None)
                        while connection.recv(4096):  # The service gives up who does not talk to it.
                            pass
                except ConnectionRefusedError:
                    return self._end(f"process 0 has ended, without which the others cannot go on. {ADVICE}")
                except ConnectionResetError:
                    pass

    def _silent(self, process: int) -> str:
        return f"process {process} is silent since {self._timeout:g} s: it has ended, or hangs. {ADVICE}"

    def _end(self, why: str) -> None:
        # The main thread waits inside JAX, where no exception reaches it.
        if not self._ended.is_set() and self._ending.acquire(blocking=False):
            with contextlib.suppress(OSError):  # where nobody reads it any more
                os.write(2, f"failed: {why}\n".encode())
            os._exit(1)
