from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import threading

import pytest
from operations import CONFIGS, Pair, fix, signature

from fastmem.registry import DecayConfig, FixRegistry
from fastmem.registry.redis_registry import RedisFixRegistry


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_redis_answers_as_the_plain_model(redis_server, config):
    with FixRegistry(redis_server.url, DecayConfig(**config)) as registry:
        assert isinstance(registry, RedisFixRegistry)
        pair = Pair(registry, seed=7, names=40)
        for step in range(1500):
            pair.step()
            if step % 250 == 249:
                pair.compare()


def test_a_full_registry_drops_what_the_table_in_memory_drops(redis_server):
    """Earliest death first, then the longest without an event, through thousands of events of two clients."""
    decay = DecayConfig(exponential_rate=0.9, linear_rate=0.01, min_strength=0.2)
    memory = FixRegistry(decay_config=decay, capacity=12)
    clients = [FixRegistry(redis_server.url, decay, capacity=12) for _ in range(2)]
    draw = random.Random(1)
    for step in range(3000):
        one, client = signature(draw.randrange(40)), draw.choice(clients)
        what = draw.choices(
            ("register", "report_success", "report_failure", "lookup", "advance_epoch"), (9, 4, 4, 4, 1)
        )
        rest = {"register": (one, fix(step)), "advance_epoch": ()}.get(what[0], (one,))
        assert getattr(client, what[0])(*rest) == getattr(memory, what[0])(*rest)
        if step % 50 == 0:
            assert clients[0].entries.keys() == memory.entries.keys()
    assert len(clients[1]) == 12


def test_strengths_far_ahead(redis_server):
    """Beyond the epochs that are followed one by one, as in memory."""
    decay = DecayConfig(exponential_rate=0.9999, linear_rate=1e-6, min_strength=1e-3)
    memory, shared = FixRegistry(decay_config=decay), FixRegistry(redis_server.url, decay)
    for registry in (memory, shared):
        registry.register(signature(1), fix(1))
        registry.report_failure(signature(1))
    client = redis_server.client()
    for _ in range(20_000):
        memory.advance_epoch()
    client.hset("fastmem:registry", "epoch", 20_000)
    expected = memory.entry(signature(1)).strength
    assert 0 < expected < 0.2
    assert shared.entry(signature(1)).strength == pytest.approx(expected, rel=0, abs=1e-12)
    deaths = 0
    while not (pruned := memory.advance_epoch()):
        deaths += 1
    assert pruned == 1
    assert client.zrange("fastmem:deaths", 0, 0, withscores=True)[0][1] == 20_000 + deaths + 1


def test_a_death_costs_what_dies(redis_server):
    """An epoch without deaths touches no entry."""
    registry = FixRegistry(redis_server.url)
    registry.register_many([signature(n) for n in range(3000)], [fix(n) for n in range(3000)])
    client = redis_server.client()
    before = client.info("commandstats")
    registry.advance_epoch()
    after = client.info("commandstats")
    calls = {name: stats["calls"] - before.get(name, {"calls": 0})["calls"] for name, stats in after.items()}
    assert sum(calls.values()) < 12


def _hammer(url: str, seed: int, steps: int) -> None:
    registry = FixRegistry(url)
    draw = random.Random(seed)
    for step in range(steps):
        one = signature(draw.randrange(20))
        registry.lookup(one)
        registry.report_success(one)
        if step % 10 == 0:
            registry.report_failure(one)
        if step % 50 == 0:
            registry.register(one, fix(step))
            registry.advance_epoch()


def test_what_two_processes_do_adds_up(redis_server):
    registry = FixRegistry(redis_server.url, DecayConfig(min_strength=0.0))
    registry.register_many([signature(n) for n in range(20)], [fix(n) for n in range(20)])
    steps, context = 1500, multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(redis_server.url, seed, steps)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    entries = registry.entries.values()
    assert sum(entry.success_count for entry in entries) == 2 * steps
    assert sum(entry.failure_count for entry in entries) == 2 * steps // 10
    stats = registry.get_stats()
    assert (stats["hits"], stats["misses"]) == (2 * steps, 0)
    assert stats["current_epoch"] == 2 * steps // 50
    assert stats["registrations"] == 20 + 2 * steps // 50


def test_a_server_killed_in_mid_operation(redis_server):
    """One error that names the address; nothing is done twice; what was acknowledged is there after the restart."""
    registry = FixRegistry(redis_server.url)
    registry.register(signature(0), fix(0))
    acknowledged, errors = 0, []
    timer = threading.Timer(0.3, redis_server.kill)
    timer.start()
    while not errors:
        try:
            registry.report_success(signature(0))
            acknowledged += 1
        except ConnectionError as error:
            errors.append(str(error))
    timer.join()
    assert str(redis_server.socket) in errors[0] and "not known" in errors[0]
    with pytest.raises(ConnectionError, match=r"redis\.sock"):  # one clear error as long as it is away
        registry.lookup(signature(0))
    redis_server.start()
    count = registry.entry(signature(0)).success_count
    assert acknowledged > 0 and acknowledged <= count <= acknowledged + 1
    redis_server.kill()
    redis_server.start()
    assert registry.lookup(signature(0)) == fix(0)  # a connection that was lost while idle does not fail a call


def test_a_server_that_lost_everything_begins_anew(redis_server):
    registry = FixRegistry(redis_server.url, DecayConfig(exponential_rate=0.5))
    registry.register(signature(0), fix(0))
    redis_server.client().flushall()
    redis_server.client().script_flush()
    assert registry.lookup(signature(0)) is None
    registry.register(signature(0), fix(1))
    assert FixRegistry(redis_server.url).decay_config == DecayConfig(exponential_rate=0.5)
    assert registry.lookup(signature(0)) == fix(1)


def test_another_decay_rule_is_refused(redis_server):
    first = FixRegistry(redis_server.url, DecayConfig(exponential_rate=0.9))
    with pytest.raises(ValueError, match=r"0\.9, 0\.001, 0\.01"):
        FixRegistry(redis_server.url, DecayConfig(exponential_rate=0.8))
    assert FixRegistry(redis_server.url).decay_config == first.decay_config
    other = FixRegistry(f"{redis_server.url}?prefix=other", DecayConfig(exponential_rate=0.8))
    other.register(signature(1), fix(1))
    assert len(first) == 0 and len(FixRegistry(redis_server.url, prefix="other")) == 1


def test_a_newer_schema_is_refused(redis_server):
    registry = FixRegistry(redis_server.url)
    redis_server.client().hset("fastmem:registry", "schema", 2)
    for call in (lambda: FixRegistry(redis_server.url), lambda: registry.register(signature(1), fix(1))):
        with pytest.raises(ValueError, match="schema 2"):
            call()
    assert redis_server.client().keys("*") == ["fastmem:registry"]


@pytest.mark.parametrize(
    "make, call",
    [
        (lambda c: c.set("fastmem:registry", "x"), lambda r: r.lookup(signature(1))),
        (lambda c: c.hset("fastmem:registry", "x", "y"), lambda r: r.lookup(signature(1))),
        (lambda c: c.set("fastmem:deaths", "x"), lambda r: r.register(signature(1), fix(1))),
        (lambda c: c.set("fastmem:deaths", "x"), lambda r: r.advance_epoch()),
        (lambda c: c.set(f"fastmem:entry:{signature(1).text}", "x"), lambda r: r.lookup(signature(1))),
        (lambda c: c.hset(f"fastmem:entry:{signature(1).text}", "x", "y"), lambda r: r.register(signature(1), fix(1))),
        (lambda c: c.hset(f"fastmem:entry:{signature(1).text}", "fix", "y"), lambda r: r.lookup(signature(1))),
        (lambda c: c.hset(f"fastmem:entry:{signature(1).text}", "fix", b"\xff"), lambda r: r.lookup(signature(1))),
        (lambda c: c.hset(f"fastmem:entry:{signature(1).text}", "fix", "{}"), lambda r: r.report_success(signature(1))),
    ],
)
def test_keys_that_are_not_ours_are_refused_and_left(redis_server, make, call):
    registry = FixRegistry(redis_server.url)
    client = redis_server.client()
    client.delete("fastmem:registry")
    make(client)
    keys = set(client.keys("*"))
    with pytest.raises(ValueError, match=r"not of a fix registry|holds no fix|no text"):
        call(registry)
    assert set(client.keys("*")) - keys <= {"fastmem:registry"}


def test_an_entry_that_the_server_evicted_is_not_known(redis_server):
    registry = FixRegistry(redis_server.url, DecayConfig(exponential_rate=0.5, min_strength=0.3))
    registry.register(signature(1), fix(1))
    redis_server.client().delete(f"fastmem:entry:{signature(1).text}")
    assert registry.lookup(signature(1)) is None and registry.entries == {}
    registry.advance_epoch()
    registry.register(signature(1), fix(2))
    registry.advance_epoch()  # the first one's death is not the second one's
    assert registry.lookup(signature(1)) == fix(2)


def test_passwords_are_not_shown(redis_server):
    for url in ("redis://me:secret@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=secret"):
        with pytest.raises(ConnectionError, match=r"redis://127\.0\.0\.1:1/0") as caught:
            FixRegistry(url)
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="expected redis") as caught:
        FixRegistry("redis://:se/cret@host/0")
    assert "cret" not in str(caught.value)
    client = redis_server.client()
    client.config_set("requirepass", "secret")
    try:
        with FixRegistry(f"{redis_server.url}?password=secret") as registry:
            registry.register(signature(1), fix(1))
            assert "secret" not in repr(registry) + str(registry.location)
    finally:
        FixRegistry(f"{redis_server.url}?password=secret")._client.config_set("requirepass", "")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda url: FixRegistry(url, approximate=True), "approximate"),
        (lambda url: FixRegistry(url).match(signature(1)), "approximate"),
        (lambda url: FixRegistry(url).lookup_many(b""), "lists of ErrorSignatures"),
        (lambda url: FixRegistry(f"{url}?socket_timeout=soon"), "socket_timeout"),
        (lambda url: FixRegistry(f"{url}?colour=red"), "colour"),
        (lambda url: FixRegistry("redis://host/zero"), "expected redis"),
        (lambda url: FixRegistry("redis://host:port/0"), "expected redis"),
        (lambda url: FixRegistry(url).register_many([signature(1)], []), "one for each"),
    ],
)
def test_bad_input_is_named(redis_server, call, words):
    with pytest.raises(ValueError, match=words):
        call(redis_server.url)


def test_bad_types_are_named(redis_server):
    registry = FixRegistry(redis_server.url)
    for call in (lambda: registry.lookup("x"), lambda: registry.register(signature(1), {}), lambda: None in registry):
        with pytest.raises(TypeError, match="expected a"):
            call()
    registry.close()
    with pytest.raises(ValueError, match="closed"):
        registry.lookup(signature(1))


def test_without_the_package():
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from fastmem.registry import FixRegistry\n"
        "try: FixRegistry('redis://host/0')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('pip install "fastmem[redis]"')


def test_it_imports_neither_torch_nor_numpy(redis_server):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from fastmem.registry import FixRegistry\n"
        f"print(len(FixRegistry({redis_server.url!r})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
