"""The learning rate of a step, and the wall clock of a run that may be stopped and resumed."""

import math
import time


def learning_rate(
    step: int, *, steps: int, highest: float, lowest: float, warmup_steps: int
) -> float:
    """Learning rate of one step: linear warm-up, then half a cosine [ours].

    Args:
        step: Number of the step, from 0.
        steps: Steps in all.
        highest: Reached at the end of the warm-up.
        lowest: Reached after the last step.
        warmup_steps: Steps of the warm-up.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * done))


class Stopwatch:
    """Minutes spent on a run, over all its parts, and when it is time to save."""

    def __init__(self, minutes: float) -> None:
        """Start, ``minutes`` having been spent before."""
        self._before = minutes
        self._started = self._saved = time.monotonic()

    @property
    def minutes(self) -> float:
        """Minutes spent so far."""
        return self._before + (time.monotonic() - self._started) / 60

    def save_due(self, every_minutes: float) -> bool:
        """Whether the last time this said yes, or the start, is longer ago than ``every_minutes``.

        Asked between two steps; a yes counts as a save.
        """
        now = time.monotonic()
        if now - self._saved <= 60 * every_minutes:
            return False
        self._saved = now
        return True
