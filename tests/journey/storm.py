"""kill -9, again and again, of parts drawn from a deck by a seed: each as often as the others, some two at a time.

Whoever is killed is started again, and so is whoever ended because a neighbour was away, as systemd would do.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from wardlink.servers.process import PrivateServer

ALIVE_S = (0.2, 1.5)
"""Between two kills: often less than a recovery takes."""
AWAY_S = (0.05, 1.0)
TWO_SHARE = 0.25
"""Of the kills, in which a second part dies before the first one is back."""


class Storm:
    """Kills parts of a running chain, each of one process or several, in an order that the seed decides."""

    def __init__(self, parts: Mapping[str, Sequence[PrivateServer]], seed: int) -> None:
        self._parts = parts
        self._draw = random.Random(seed)
        self._deck: list[str] = []
        self.kills: Counter[str] = Counter()
        self.revived: Counter[str] = Counter()
        """Who ended without being killed, and was started again."""

    def run(self, kills: int) -> None:
        """So many kills; afterwards every part runs."""
        while self.kills.total() < kills:
            time.sleep(self._draw.uniform(*ALIVE_S))  # the storm's own pace: it waits for nothing
            self._revive()
            hit = [self._next()]
            if self._draw.random() < TWO_SHARE and self.kills.total() + 1 < kills:
                hit.append(self._next())
            for name in hit:
                for process in self._parts[name]:
                    process.kill()
                self.kills[name] += 1
                time.sleep(self._draw.uniform(*AWAY_S) / len(hit))
            for name in hit:
                for process in self._parts[name]:
                    process.start()
        self._revive()

    def _next(self) -> str:
        if not self._deck:
            self._deck = list(self._parts)
            self._draw.shuffle(self._deck)
        return self._deck.pop()

    def _revive(self) -> None:
        for process in (process for part in self._parts.values() for process in part):
            if process.pid is None:
                self.revived[process.name] += 1
                process.start()
