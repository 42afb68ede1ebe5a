"""A thread that dreams and forgets while the program does other things."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastmem.registry.dreaming import DreamGenerator, register_dreams
from fastmem.registry.fix_registry import FixRegistry

_log = logging.getLogger(__name__)


class ProcessorState(Enum):
    """What a `BackgroundProcessor` does."""

    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    ERROR = "error"  # the last cycle failed; the next one is tried in its turn


@dataclass(frozen=True)
class ProcessorConfig:
    """When a `BackgroundProcessor` does what.

    Attributes:
        poll_interval_seconds: between two cycles.
        batch_size: concepts between two looks at stop and pause.
        max_items_per_cycle: concepts dreamed of in a cycle; the others wait.
        epoch_interval_seconds: between two epochs of the registry.
        min_item_age_seconds: a concept waits until it is as old, counted from its "created_at" (a time.time())
            or, without such a number, from when it was first seen.
    """

    poll_interval_seconds: float = 30.0
    batch_size: int = 10
    max_items_per_cycle: int = 50
    epoch_interval_seconds: float = 3600.0
    min_item_age_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("poll_interval_seconds", "batch_size", "max_items_per_cycle", "epoch_interval_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)!r}")
        if not self.min_item_age_seconds >= 0:
            raise ValueError(f"min_item_age_seconds: expected 0 or more, got {self.min_item_age_seconds!r}")


class BackgroundProcessor:
    """Dreams of new concepts, and lets epochs pass, in a daemon thread.

    A registry in a file or in Redis is written by these calls themselves. An error of the source, of a dream or of the
    registry is logged, stands in `get_metrics()["last_error"]` and makes the state ERROR until a cycle goes well again;
    the concept that could not be dreamed of is dropped.

    Args:
        config: None: the defaults.
        dream_generator: dreams of what the source gives; None: one that knows the registry.
        fix_registry: whose epochs pass, and where the dreams of a generator without a registry go; None: the
            generator's.
        item_source: gives the concepts that are new since it was last asked; called once a cycle, from the thread.
    """

    def __init__(
        self,
        config: ProcessorConfig | None = None,
        dream_generator: DreamGenerator | None = None,
        fix_registry: FixRegistry | None = None,
        item_source: Callable[[], Iterable[dict[str, Any]]] | None = None,
    ) -> None:
        self.config = config or ProcessorConfig()
        if dream_generator is None and fix_registry is not None:
            dream_generator = DreamGenerator(fix_registry)
        if fix_registry is None and dream_generator is not None:
            fix_registry = dream_generator.registry
        self.dream_generator = dream_generator
        self.fix_registry = fix_registry
        self.item_source = item_source
        self._waiting: deque[tuple[float, dict[str, Any]]] = deque()  # (when it is old enough, concept)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._state = ProcessorState.STOPPED
        self._failed = False
        self._thread: threading.Thread | None = None
        self._metrics = {"cycles": 0, "items": 0, "dreams": 0, "epochs": 0, "pruned": 0, "errors": 0}
        self._last_error: str | None = None

    @property
    def state(self) -> ProcessorState:
        with self._lock:
            running = self._state is ProcessorState.RUNNING
            return ProcessorState.ERROR if running and self._failed else self._state

    def start(self) -> None:
        """Begin; nothing happens where it runs already. After `stop` it may be started again."""
        with self._lock:
            if self._state is not ProcessorState.STOPPED:
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="fastmem-background", daemon=True)
                thread.start()
                self._thread = thread
            self._state, self._failed = ProcessorState.RUNNING, False  # one that has not ended yet goes on

    def stop(self, timeout: float | None = None) -> None:
        """End, and wait for the thread: at most for the source's answer or the batch that it is in the middle of.

        Raises:
            TimeoutError: it did not end within `timeout` seconds; it will when that answer or batch is done.
        """
        with self._lock:
            thread = self._thread
            self._state = ProcessorState.STOPPED
            self._wake.notify_all()
            if thread is None or thread is threading.current_thread():
                return
            # or until somebody has started it again meanwhile
            ended = self._wake.wait_for(
                lambda: self._thread is not thread or self._state is not ProcessorState.STOPPED, timeout
            )
        if not ended:
            raise TimeoutError(f"the background processor did not stop within {timeout} seconds")

    def pause(self) -> None:
        """Do nothing until `resume`; epochs do not pass either."""
        self._switch(ProcessorState.RUNNING, ProcessorState.PAUSED)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._switch(ProcessorState.PAUSED, ProcessorState.RUNNING)

    def get_metrics(self) -> dict[str, Any]:
        """state, epoch (None: the registry does not say), waiting (concepts), cycles, items, dreams, epochs, pruned,
        errors and last_error."""
        state = self.state.value
        epoch: int | None = 0
        if self.fix_registry is not None:
            try:
                epoch = self.fix_registry.current_epoch
            except (OSError, ValueError):  # a server out of reach: the metrics are there to tell
                epoch = None
        with self._lock:
            return {
                "state": state,
                "epoch": epoch,
                "waiting": len(self._waiting),
                **self._metrics,
                "last_error": self._last_error,
            }

    def _switch(self, of: ProcessorState, to: ProcessorState) -> None:
        with self._lock:
            if self._state is of:
                self._state = to
                self._wake.notify_all()

    def _run(self) -> None:
        next_cycle = time.monotonic()
        next_epoch = next_cycle + self.config.epoch_interval_seconds
        try:
            while True:
                if not self._may_go_on(min(next_cycle, next_epoch)):
                    if self._end():
                        return
                    continue
                now = time.monotonic()
                try:
                    if now >= next_epoch:
                        next_epoch = now + self.config.epoch_interval_seconds
                        self._advance()
                    if now >= next_cycle:
                        next_cycle = now + self.config.poll_interval_seconds
                        self._cycle()
                        self._failed = False
                except Exception as error:
                    _log.exception("background processor")
                    with self._lock:
                        self._failed = True
                        self._metrics["errors"] += 1
                        self._last_error = f"{type(error).__name__}: {error}"
        except BaseException:  # a source that exits its thread
            with self._lock:
                self._state = ProcessorState.STOPPED
            self._end()
            raise

    def _end(self) -> bool:
        """Be this processor's thread no longer; False: it was started again."""
        with self._lock:
            if self._state is not ProcessorState.STOPPED:
                return False
            self._thread = None
            self._wake.notify_all()
            return True

    def _may_go_on(self, until: float) -> bool:
        """Wait until then, and for the end of a pause. False: stopped."""
        with self._lock:
            while self._state is not ProcessorState.STOPPED:
                rest = until - time.monotonic()
                if self._state is ProcessorState.RUNNING and rest <= 0:
                    return True
                running = self._state is ProcessorState.RUNNING
                self._wake.wait(min(rest, threading.TIMEOUT_MAX) if running else None)
            return False

    def _advance(self) -> None:
        if self.fix_registry is None:
            return
        pruned = self.fix_registry.advance_epoch()
        self._count(epochs=1, pruned=pruned)

    def _cycle(self) -> None:
        if self.item_source is not None:
            now = time.time()
            for item in self.item_source():
                born = item.get("created_at") if isinstance(item, dict) else None
                age = self.config.min_item_age_seconds
                self._waiting.append(((born if isinstance(born, (int, float)) else now) + age, item))
        taken = 0
        for _ in range(len(self._waiting)):
            if taken == self.config.max_items_per_cycle:
                break
            if taken % self.config.batch_size == 0 and not self._may_go_on(time.monotonic()):
                return
            ripe, item = self._waiting.popleft()
            if ripe > time.time():
                self._waiting.append((ripe, item))
                continue
            taken += 1
            self._count(items=1, dreams=self._dream(item))
        self._count(cycles=1)

    def _dream(self, item: dict[str, Any]) -> int:
        if self.dream_generator is None:
            return 0
        dreams = self.dream_generator.dream(item)
        if self.dream_generator.registry is None and self.fix_registry is not None:
            register_dreams(self.fix_registry, dreams)
        return len(dreams)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._metrics[name] += number
