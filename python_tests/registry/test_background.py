from __future__ import annotations

import sys
import threading
import time

import pytest

from fastmem.registry import BackgroundProcessor, DreamGenerator, FixRegistry, ProcessorConfig, ProcessorState

FAST = {"poll_interval_seconds": 0.01, "min_item_age_seconds": 0.0}


def concept(number: int) -> dict:
    return {"term": f"concept {number}", "activations": {"a": 1.0, "b": 0.5}, "categories": ["spatial"]}


def wait_until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited for 20 s"
        time.sleep(0.005)


class Source:
    """Gives each of its lists once; an exception is raised."""

    def __init__(self, *given):
        self.given = list(given)

    def __call__(self):
        if not self.given:
            return []
        items = self.given.pop(0)
        if isinstance(items, Exception):
            raise items
        return items


def made(source, **config) -> BackgroundProcessor:
    return BackgroundProcessor(ProcessorConfig(**FAST | config), DreamGenerator(FixRegistry()), item_source=source)


def test_defaults():
    assert ProcessorConfig() == ProcessorConfig(30.0, 10, 50, 3600.0, 5.0)
    assert [state.value for state in ProcessorState] == ["stopped", "running", "paused", "error"]


def test_it_dreams_of_what_the_source_gives():
    processor = made(Source([concept(n) for n in range(7)], [concept(8)]))
    assert processor.state is ProcessorState.STOPPED
    processor.start()
    processor.start()
    wait_until(lambda: processor.get_metrics()["items"] == 8)
    assert processor.state is ProcessorState.RUNNING
    processor.stop()
    metrics = processor.get_metrics()
    assert metrics["state"] == "stopped" and metrics["dreams"] > 8 and metrics["errors"] == 0
    assert len(processor.fix_registry) > 8


def test_epochs_pass():
    processor = made(None, epoch_interval_seconds=0.01)
    processor.start()
    wait_until(lambda: processor.get_metrics()["epoch"] >= 3)
    processor.stop()
    epoch = processor.fix_registry.current_epoch
    assert processor.get_metrics()["epochs"] == epoch
    time.sleep(0.05)
    assert processor.fix_registry.current_epoch == epoch


def test_a_cycle_takes_so_many_and_the_others_wait():
    processor = made(Source([concept(n) for n in range(25)]), poll_interval_seconds=1000, max_items_per_cycle=12)
    processor.start()
    wait_until(lambda: processor.get_metrics()["cycles"] == 1)
    processor.stop()
    assert (processor.get_metrics()["items"], processor.get_metrics()["waiting"]) == (12, 13)


def test_young_items_wait():
    old = concept(1) | {"created_at": time.time() - 100}
    young = concept(2) | {"created_at": time.time() + 100}
    processor = made(Source([young, old, concept(3)]), min_item_age_seconds=50)
    processor.start()
    wait_until(lambda: processor.get_metrics()["cycles"] >= 3)
    processor.stop()
    assert (processor.get_metrics()["items"], processor.get_metrics()["waiting"]) == (1, 2)


def test_pause_and_resume():
    processor = made(Source([concept(1)], [concept(2)]), epoch_interval_seconds=0.01)
    processor.start()
    wait_until(lambda: processor.get_metrics()["cycles"] >= 1)
    processor.pause()
    wait_until(lambda: processor.state is ProcessorState.PAUSED)
    time.sleep(0.05)
    before = processor.get_metrics()
    time.sleep(0.1)
    assert processor.get_metrics() == before
    processor.resume()
    wait_until(lambda: processor.get_metrics()["items"] == 2)
    processor.pause()
    processor.stop()  # from a pause too
    assert processor.state is ProcessorState.STOPPED


def test_an_error_is_kept_and_the_next_cycle_goes_on(caplog):
    processor = made(
        Source(OSError("the source is gone"), [{"activations": 3}], [concept(1)]), poll_interval_seconds=0.2
    )
    processor.start()
    wait_until(lambda: processor.state is ProcessorState.ERROR)
    assert processor.get_metrics()["last_error"] == "OSError: the source is gone"
    wait_until(lambda: processor.get_metrics()["items"] == 1)
    wait_until(lambda: processor.state is ProcessorState.RUNNING)
    assert processor.get_metrics()["errors"] == 2
    processor.stop()


def test_it_can_be_started_again():
    processor = made(Source([concept(1)], [concept(2)], [concept(3)]), poll_interval_seconds=1000)
    for number in (1, 2, 3):
        processor.start()
        wait_until(lambda number=number: processor.get_metrics()["items"] == number)
        start = time.monotonic()
        processor.stop()
        assert time.monotonic() - start < 5


def test_the_source_may_stop_it():
    processor = made(None)
    processor.item_source = lambda: processor.stop() or []
    processor.start()
    wait_until(lambda: processor.state is ProcessorState.STOPPED)


def test_the_source_may_start_it_again():
    processor = made(None)
    calls = []

    def source():
        calls.append(1)
        if len(calls) == 1:
            processor.stop()
            processor.start()
        return []

    processor.item_source = source
    processor.start()
    wait_until(lambda: len(calls) >= 3)
    assert processor.state is ProcessorState.RUNNING
    processor.stop()


def test_a_stop_that_is_not_waited_for():
    asked, answer = threading.Event(), threading.Event()
    processor = made(lambda: asked.set() or (answer.wait(20) and []))
    processor.start()
    assert asked.wait(20)
    with pytest.raises(TimeoutError, match="did not stop"):
        processor.stop(0.01)
    assert processor.state is ProcessorState.STOPPED
    processor.start()  # while the source still holds the thread
    answer.set()
    wait_until(lambda: processor.get_metrics()["cycles"] >= 2)
    assert processor.state is ProcessorState.RUNNING
    processor.stop()
    assert processor._thread is None


def test_threads_may_start_and_stop_it_at_once():
    processor = made(None)

    def turn():
        for _ in range(50):
            processor.start()
            processor.pause()
            processor.resume()
            processor.stop()

    threads = [threading.Thread(target=turn, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    processor.stop()
    wait_until(lambda: all(thread.name != "fastmem-background" for thread in threading.enumerate()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_source_that_exits_its_thread():
    processor = made(Source([concept(1)]))
    processor.item_source = lambda: sys.exit()
    processor.start()
    wait_until(lambda: processor.state is ProcessorState.STOPPED)
    processor.stop()
    processor.item_source = Source([concept(1)])
    processor.start()
    wait_until(lambda: processor.get_metrics()["items"] == 1)
    processor.stop()


@pytest.mark.parametrize("generator", [None, DreamGenerator()])
def test_dreams_go_to_the_given_registry(generator):
    registry = FixRegistry()
    processor = BackgroundProcessor(ProcessorConfig(**FAST), generator, registry, Source([concept(1)]))
    processor.start()
    wait_until(lambda: processor.get_metrics()["items"] == 1)
    processor.stop()
    assert len(registry) > 0


def test_metrics_tell_of_a_registry_out_of_reach():
    class Gone(FixRegistry):
        current_epoch = property(lambda self: self.advance_epoch())

        def advance_epoch(self):
            raise ConnectionError("no server")

    processor = BackgroundProcessor(ProcessorConfig(**FAST, epoch_interval_seconds=0.01), None, Gone())
    processor.start()
    wait_until(lambda: processor.get_metrics()["errors"] > 0)
    metrics = processor.get_metrics()
    assert (metrics["epoch"], metrics["last_error"]) == (None, "ConnectionError: no server")
    processor.stop()


def test_intervals_may_be_infinite():
    processor = made(None, poll_interval_seconds=float("inf"), epoch_interval_seconds=float("inf"))
    processor.start()
    wait_until(lambda: processor.get_metrics()["cycles"] == 1)
    time.sleep(0.05)
    assert any(thread.name == "fastmem-background" for thread in threading.enumerate())
    processor.stop()


def test_an_age_that_is_no_number():
    processor = made(Source([concept(1) | {"created_at": "yesterday"}, concept(2)]))
    processor.start()
    wait_until(lambda: processor.get_metrics()["items"] == 2)
    processor.stop()
    assert processor.get_metrics()["errors"] == 0


def test_a_file_is_written(tmp_path):
    path = tmp_path / "fixes.db"
    with FixRegistry(path) as registry:
        processor = BackgroundProcessor(
            ProcessorConfig(**FAST), DreamGenerator(registry), item_source=Source([concept(1)])
        )
        processor.start()
        wait_until(lambda: processor.get_metrics()["items"] == 1)
        processor.stop()
        entries = set(registry.entries)
    with FixRegistry(path) as again:
        assert set(again.entries) == entries and entries


@pytest.mark.parametrize("change", [{"poll_interval_seconds": 0}, {"batch_size": -1}, {"min_item_age_seconds": -1}])
def test_bad_values_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ProcessorConfig(**change)
