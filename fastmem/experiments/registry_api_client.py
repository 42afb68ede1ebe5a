"""A client of a JSON API that breaks in recurring ways: learnt fixes repair its answers, and relearn after it changes.

The API stands on localhost: products, orders and users, whose answers come damaged every other time: fields renamed,
inverted, wrapped, as text, in cents, or left out. The client checks each answer against what it expects. A damaged one
has a signature, and the registry may know its fix; if that makes the answer right, it is used. Otherwise the client
takes the slow way, a search over repairs, each checked against the API's slow checksum, and registers what it found.
Halfway the API changes two of its habits, so that two learnt fixes begin to fail.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastmem.experiments.registry_command import Result, main, option, positive, table
from fastmem.registry import ErrorSignature, ErrorType, Fix, FixRegistry, FixType, create_signature

Record = dict[str, Any]
WINDOW = 50  # requests


@dataclass(frozen=True)
class Config:
    """What `run` does; the help text of a field says what it is. A number that makes no sense is a ValueError."""

    requests: int = option(1000, "requests of each client")
    epoch_every: int = option(100, "requests between two epochs of the registry")
    registry: str = option("", "where the fixes are kept: a file or redis:// address; empty: in memory")
    processes: int = option(1, "clients, each in a process; more than one share a registry in Redis")
    plot: str = option("", "draw a PNG; needs matplotlib")
    seed: int = option(0, "records, requests and damages")

    def __post_init__(self) -> None:
        positive(self, "requests", "epoch_every", "processes")
        if self.processes > 1 and self.registry and not self.registry.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"registry: processes share one in Redis, got {self.registry!r}")


# ---- the API: true records, and what it makes of them


def record(endpoint: str, number: int) -> Record:
    """The truth about a product, a user or an order, in currency units and years."""
    draw = random.Random(f"{endpoint} {number}")
    if endpoint == "products":
        return {"id": number, "price": draw.randrange(600, 45_000) / 100, "stock": draw.randrange(90)}
    if endpoint == "users":
        return {"id": number, "age": draw.randrange(18, 90), "active": draw.random() < 0.5}
    net = draw.randrange(1000, 90_000) / 100
    return {"id": number, "net": net, "vat": 0.19}


def served(endpoint: str, number: int, late: bool) -> Record:
    """What the API says when nothing is damaged. Late, value added tax is another, and an order's total follows."""
    truth = record(endpoint, number)
    if endpoint == "orders":
        truth["vat"] = 0.21 if late else 0.19
        truth["total"] = round(truth["net"] * (1 + truth["vat"]), 2)
    return truth


def _renamed(of: str, to: str) -> Any:
    return lambda answer: {(to if name == of else name): value for name, value in answer.items()}


def damages(endpoint: str, late: bool) -> list[Any]:
    """The ways in which an endpoint's answers are damaged."""
    return {
        "products": [
            _renamed("price", "amount" if late else "unit_price"),
            lambda answer: answer | {"price": round(answer["price"] * 100)},
        ],
        "orders": [
            lambda answer: {name: value for name, value in answer.items() if name != "vat"},
            lambda answer: answer | {"net": f"{answer['net']:.2f}"},
        ],
        "users": [
            lambda answer: {"data": answer},
            lambda answer: _renamed("active", "inactive")(answer | {"active": not answer["active"]}),
        ],
    }[endpoint]


def checksum(answer: Record) -> str:
    """sha256 of an answer, in hex; what tells a repair that is right from one that only looks so."""
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()


class _Api(BaseHTTPRequestHandler):
    """/ENDPOINT/NUMBER/TURN/SEED: an answer; TURN early or late. /checksum/ENDPOINT/NUMBER/TURN: of the right one."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts[0] == "checksum":
            content: Any = checksum(served(parts[1], int(parts[2]), parts[3] == "late"))
        else:
            late, draw = parts[2] == "late", random.Random(self.path)
            content = served(parts[0], int(parts[1]), late)
            if draw.random() < 0.5:
                content = draw.choice(damages(parts[0], late))(content)
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def api() -> Iterator[str]:
    """The API on a free port; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


# ---- the client

FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "products": {"id": (int,), "price": (float, int), "stock": (int,)},
    "orders": {"id": (int,), "net": (float, int), "vat": (float,), "total": (float, int)},
    "users": {"id": (int,), "age": (int,), "active": (bool,)},
}


def problems(endpoint: str, answer: Record) -> list[tuple[str, str]]:
    """(field, what is wrong with it), empty for an answer that is as expected."""
    fields = FIELDS[endpoint]
    wrong = [(name, "missing") for name in fields if name not in answer]
    wrong += [("", "unexpected") for name in answer if name not in fields]
    wrong += [(n, "type") for n, kinds in fields.items() if n in answer and not isinstance(answer[n], kinds)]
    if wrong:
        return wrong
    if endpoint == "products" and not 5 <= answer["price"] <= 500:
        return [("price", "range")]
    if endpoint == "orders" and abs(answer["total"] - answer["net"] * (1 + answer["vat"])) > 0.006:
        return [("vat", "total")]
    return []


def signature_of(endpoint: str, wrong: list[tuple[str, str]]) -> ErrorSignature:
    """The endpoint is the context, the fields are the categories; how many of them are wrong is how bad it is."""
    kinds = {kind for _, kind in wrong}
    if kinds == {"missing", "unexpected"}:
        error_type = ErrorType.STRUCTURAL_SWAP if len(wrong) > 2 else ErrorType.SUBSTITUTION
    else:
        error_type = {
            "missing": ErrorType.REMOVAL,
            "range": ErrorType.INTENSITY_SHIFT,
            "total": ErrorType.INTENSITY_SHIFT,
        }.get(min(kinds), ErrorType.PARTIAL_DEFINITION)
    fields = sorted({field for field, _ in wrong if field})
    return create_signature(error_type, endpoint, fields, min(1.0, len(fields) / len(FIELDS[endpoint])))


def repair(answer: Record, fix: Fix) -> Record:
    """An answer with a fix applied. How this client reads a fix: `category_moves` renames fields, and what moves to ""
    is unwrapped; INVERT_RELATIONSHIP turns the renamed ones; `value_adjustments` are factors, of numbers in text too;
    `elements_to_add` are values of fields that are missing, `elements_to_remove` fields to drop."""
    fixed = dict(answer)
    for of, to in fix.category_moves.items():
        if of not in fixed:
            continue
        value = fixed.pop(of)
        if to == "":
            fixed |= value if isinstance(value, dict) else {}
        else:
            fixed[to] = not value if fix.fix_type is FixType.INVERT_RELATIONSHIP else value
    for name, factor in fix.value_adjustments.items():
        with suppress(KeyError, TypeError, ValueError):  # then it does not fit, and the check says so
            fixed[name] = round(float(fixed[name]) * factor, 2)
    fixed |= {name: value for name, value in fix.elements_to_add.items() if name not in fixed}
    return {name: value for name, value in fixed.items() if name not in fix.elements_to_remove}


def candidates(endpoint: str, answer: Record) -> Iterator[Fix]:
    """All repairs that the slow way tries."""
    missing = [name for name in FIELDS[endpoint] if name not in answer]
    strange = [name for name in answer if name not in FIELDS[endpoint]]
    for name in strange:
        yield Fix(FixType.RESTORE_CATEGORY, category_moves={name: ""})
        for to in missing:
            yield Fix(FixType.SWAP_ELEMENTS, category_moves={name: to})
            yield Fix(FixType.INVERT_RELATIONSHIP, category_moves={name: to})
    for name in missing:
        for value in (0.0, 0.05, 0.07, 0.19, 0.21, 0.25, 1.0):
            yield Fix(FixType.ADD_ELEMENTS, elements_to_add={name: value})
    for name in answer:
        for factor in (1.0, 0.1, 0.01, 0.001, 10.0, 100.0):
            yield Fix(FixType.ADJUST_VALUES, value_adjustments={name: factor})


class Client:
    """Asks, checks, repairs, learns. Without a registry every damaged answer takes the slow way."""

    def __init__(self, address: str, registry: FixRegistry | None) -> None:
        self.address, self.registry = address, registry
        self.learnt: set[str] = set()
        self.counts = {
            "damaged": 0,
            "repaired_at_once": 0,
            "by_others_fixes": 0,
            "slow": 0,
            "tries": 0,
            "failed_fixes": 0,
        }

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=30) as response:
            return json.load(response)

    def fetch(self, endpoint: str, number: int, turn: str, seed: int) -> Record:
        """A right answer."""
        answer = self.get(f"{endpoint}/{number}/{turn}/{seed}")
        wrong = problems(endpoint, answer)
        if not wrong:
            return answer
        self.counts["damaged"] += 1
        signature = signature_of(endpoint, wrong)
        fix = self.registry.lookup(signature) if self.registry is not None else None
        if fix is not None and self.registry is not None:
            fixed = repair(answer, fix)
            if not problems(endpoint, fixed):
                self.registry.report_success(signature)
                self.counts["repaired_at_once"] += 1
                self.counts["by_others_fixes"] += signature.text not in self.learnt
                return fixed
            self.registry.report_failure(signature)
            self.counts["failed_fixes"] += 1
        return self.slowly(endpoint, number, turn, answer, signature)

    def slowly(self, endpoint: str, number: int, turn: str, answer: Record, signature: ErrorSignature) -> Record:
        self.counts["slow"] += 1
        right = self.get(f"checksum/{endpoint}/{number}/{turn}")
        for fix in candidates(endpoint, answer):
            self.counts["tries"] += 1
            fixed = repair(answer, fix)
            if checksum(fixed) == right:
                if self.registry is not None:
                    self.registry.register(signature, fix)
                    self.learnt.add(signature.text)
                return fixed
        raise RuntimeError(f"{endpoint}/{number}: no repair found for {answer}")


def work(config: Config, address: str, location: str | None, with_registry: bool = True) -> dict[str, Any]:
    """One client's requests: counts, wrong answers that were delivered, slow ways in each window, and seconds."""
    registry = FixRegistry(location or None) if with_registry else None
    client, draw = Client(address, registry), random.Random(config.seed)
    wrong, slow, start = 0, [], time.perf_counter()
    for turn in range(config.requests):
        late = turn >= config.requests // 2
        endpoint, number = draw.choice(list(FIELDS)), draw.randrange(500)
        before = client.counts["slow"]
        answer = client.fetch(endpoint, number, "late" if late else "early", draw.randrange(10**9))
        slow.append(client.counts["slow"] - before)
        wrong += answer != served(endpoint, number, late)
        if registry is not None and (turn + 1) % config.epoch_every == 0:
            registry.advance_epoch()
    seconds = time.perf_counter() - start
    if registry is not None:
        registry.close()
    windows = [sum(slow[first : first + WINDOW]) for first in range(0, len(slow), WINDOW)]
    return {**client.counts, "wrong": wrong, "windows": windows, "seconds": seconds, "learnt": len(client.learnt)}


def run(config: Config) -> Result:
    """The client with a registry, and without one on the same requests."""
    with api() as address:
        if config.processes == 1:
            clients = [work(config, address, config.registry)]
        else:
            with (
                _redis(config.registry) as location,
                multiprocessing.get_context("spawn").Pool(config.processes) as pool,
            ):
                jobs = [(replace(config, seed=config.seed + i), address, location) for i in range(config.processes)]
                clients = pool.starmap(work, jobs)
        control = work(config, address, None, with_registry=False)
    damaged = sum(client["damaged"] for client in clients)
    final = {
        "damaged": float(damaged),
        "repaired_at_once_rate": sum(client["repaired_at_once"] for client in clients) / damaged,
        "slow": float(sum(client["slow"] for client in clients)),
        "slow_in_last_window": float(sum(client["windows"][-1] for client in clients)),
        "slow_in_last_window_control": float(control["windows"][-1]),
        "slow_control": float(control["slow"]),
        "wrong_answers": float(sum(client["wrong"] for client in clients)),
        "failed_fixes": float(sum(client["failed_fixes"] for client in clients)),
        "repaired_by_others_fixes": float(sum(client["by_others_fixes"] for client in clients)),
    }
    rows = [_row(f"client {i + 1}", client) for i, client in enumerate(clients)] + [_row("no registry", control)]
    lines = [
        *table(["", "damaged", "at once", "by others' fixes", "slow", "tries", "failed fixes", "wrong"], rows),
        f"slow ways in windows of {WINDOW} requests: {' '.join(str(count) for count in clients[0]['windows'])}; "
        f"without a registry {' '.join(str(count) for count in control['windows'])}",
    ]
    if config.plot:
        _plot(Path(config.plot), clients[0]["windows"], control["windows"])
        lines.append(f"drawn in {config.plot}")
    history = [
        {"requests": (place + 1) * WINDOW, "slow": ours, "slow_control": theirs}
        for place, (ours, theirs) in enumerate(zip(clients[0]["windows"], control["windows"], strict=True))
    ]
    return Result(final, history, lines)


def _row(name: str, client: dict[str, Any]) -> list[str]:
    keys = ("damaged", "repaired_at_once", "by_others_fixes", "slow", "tries", "failed_fixes", "wrong")
    return [name, *(str(client[key]) for key in keys)]


@contextmanager
def _redis(location: str) -> Iterator[str]:
    """The given server's address, or that of one that lives as long as this."""
    if location:
        yield location
        return
    program = shutil.which("redis-server")
    if program is None:
        raise ValueError("registry: several processes need a Redis server, and there is no redis-server here to start")
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/redis.sock"
        command = [program, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                end = time.monotonic() + 10
                while not Path(socket).exists() and time.monotonic() < end:
                    time.sleep(0.02)
                yield f"unix://{socket}"
            finally:
                server.terminate()


def _plot(path: Path, ours: list[int], control: list[int]) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError('plot: needs matplotlib; pip install "fastmem[experiments]"') from None
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    places = [WINDOW * (place + 1) for place in range(len(ours))]
    axes.plot(places, control, color="#999", marker="o", markersize=3, label="no registry")
    axes.plot(places, ours, color="#2a7", marker="o", markersize=3, label="with the registry")
    axes.axvline(WINDOW * len(ours) / 2, color="#c54", linestyle="--", label="the API changes its habits")
    axes.set_xlabel("requests")
    axes.set_ylabel(f"errors that took the slow way, of {WINDOW} requests")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def command(arguments: list[str] | None = None) -> int:
    """`fastmem registry api-client`; its exit status."""
    return main("api-client", __doc__.splitlines()[0] if __doc__ else "", Config, run, arguments)
