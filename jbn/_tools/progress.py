"""A progress bar for what takes long, on a terminal."""

import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
SECONDS = 2.0  # after which it is shown


def with_progress(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yield the items; if it takes long and stderr is a terminal, show there how many are done."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console  # as slow to import as it is seldom needed; Flax needs it too
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=operator.length_hint(items) or None)
    start = time.monotonic()
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not bar.live.is_started and time.monotonic() - start > SECONDS:
                bar.start()
    finally:
        bar.stop()
