"""Wall time that can be paused."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Wall time in seconds that can be paused. It does not run until it is started."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, 0.0
        self.running = False

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self.running else 0.0)

    def start(self) -> None:
        if not self.running:
            self._since, self.running = time.perf_counter(), True

    def stop(self) -> None:
        self._seconds, self.running = self.seconds, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        running = self.running
        self.stop()
        yield
        if running:
            self.start()
