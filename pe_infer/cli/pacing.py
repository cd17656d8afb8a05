"""A scanner's pace."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def paced(items: Iterable[Item], per_s: float) -> Iterator[Item]:
    """Give out every item when it is due; late ones at once, until the pace is met again."""
    due = time.perf_counter()
    for item in items:
        time.sleep(max(0.0, due - time.perf_counter()))
        due += 1.0 / per_s
        yield item
