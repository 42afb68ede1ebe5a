from __future__ import annotations

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
