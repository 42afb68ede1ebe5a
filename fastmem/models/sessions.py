"""Memory contents: one per session, apart from trained weights, saved atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmem._files import atomic_write
from fastmem.nn import DualMemoryLayer, DualMemoryState
from fastmem.nn.memory_cross_attention import MemoryView
from fastmem.ops.gated_write import Bank, SurpriseStats

FORMAT = "fastmem memory 2"
_FORMAT_1 = "fastmem memory 1"  # read still; its checksum covers the tensors' names and contents alone
DEFAULT = "default"


def _flatten(states: list[DualMemoryState]) -> dict[str, Tensor]:
    out = {}
    for i, state in enumerate(states):
        for part in ("buffer", "store", "stats"):
            for name, x in getattr(state, part)._asdict().items():
                out[f"{i}.{part}.{name}"] = x.detach().cpu().contiguous()
    return out


def checksum(tensors: dict[str, Tensor], meta: dict[str, str]) -> str:
    """sha256 of a memory file: names, types, shapes and contents of its tensors, and its metadata but for "sha256"."""
    digest = hashlib.sha256()
    if meta.get("format") != _FORMAT_1:
        covered = {key: text for key, text in meta.items() if key != "sha256"}
        shapes = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
        digest.update(json.dumps([covered, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        if meta.get("format") == _FORMAT_1:
            digest.update(name.encode())
        digest.update(
            tensors[name].flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def session_names(path: Path, meta: dict[str, str]) -> list[str]:
    """The sessions that a memory file holds, by its metadata.

    Raises:
        ValueError: if it is no memory file.
    """
    if meta.get("format") not in (FORMAT, _FORMAT_1):
        raise ValueError(f"{path}: not a fastmem memory file (format {meta.get('format')!r})")
    names = json.loads(meta["sessions"])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise ValueError(f"{path}: damaged or not a memory file (its sessions are {str(names)[:80]})")
    return names


def _unflatten(tensors: dict[str, Tensor], layers: int, device: torch.device) -> list[DualMemoryState]:
    def part(i: int, name: str, kind: Any) -> Any:
        return kind(*(tensors[f"{i}.{name}.{field}"].to(device) for field in kind._fields))

    return [
        DualMemoryState(part(i, "buffer", Bank), part(i, "store", Bank), part(i, "stats", SurpriseStats))
        for i in range(layers)
    ]


def _rows(state: DualMemoryState, pick: Any) -> DualMemoryState:
    return DualMemoryState(
        Bank(*(pick(x) for x in state.buffer)),
        Bank(*(pick(x) for x in state.store)),
        SurpriseStats(*(pick(x) for x in state.stats)),
    )


def stack_states(states: Sequence[DualMemoryState]) -> DualMemoryState:
    """Memories side by side in one batch."""
    if len(states) == 1:
        return states[0]
    return DualMemoryState(
        Bank(*(torch.cat(x) for x in zip(*(s.buffer for s in states), strict=True))),
        Bank(*(torch.cat(x) for x in zip(*(s.store for s in states), strict=True))),
        SurpriseStats(*(torch.cat(x) for x in zip(*(s.stats for s in states), strict=True))),
    )


class Sessions:
    """The memories of a MemoryModel, by session name.

    A session that was never written is empty; asking for it by `inspect`, `decay`, `clear` or `save` is an error.
    """

    def __init__(self, layers: nn.ModuleList, fingerprint: dict[str, Any]) -> None:
        self._layers = layers
        self._fingerprint = fingerprint
        self._held: dict[str, list[DualMemoryState]] = {}
        self._names: list[str] | None = None
        self._states: list[DualMemoryState | None] = []
        self._views: list[MemoryView | None] = []
        self._changed = False
        self._before: dict[str, list[DualMemoryState] | None] = {}

    def _layer(self, i: int) -> DualMemoryLayer:
        return cast(DualMemoryLayer, self._layers[i])

    @property
    def _device(self) -> torch.device:
        return self._layer(0).key_proj.weight.device

    # What the model calls during a pass.

    def activate(self, names: Sequence[str] | None, batch: int | None = None) -> None:
        """Choose the sessions of the rows to come; None: "default", or "default-0", ... for a batch."""
        if isinstance(names, str):
            names = [names]
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
            raise TypeError(f"sessions: expected strings, got {names!r}")
        if names is not None and len(set(names)) != len(names):
            raise ValueError(f"sessions: expected one session per prompt, each once, got {list(names)}")
        if names is not None and batch is not None and len(names) != batch:
            raise ValueError(f"sessions: expected {batch}, one per prompt, got {len(names)}")
        if names is None and batch is not None:
            names = self.default_names(batch)
        self._names = None if names is None else list(names)
        self._states, self._views = [None] * len(self._layers), [None] * len(self._layers)
        self._changed = False
        self._before = {}

    @staticmethod
    def default_names(batch: int) -> list[str]:
        """Sessions of a batch for which none were named."""
        return [DEFAULT] if batch == 1 else [f"{DEFAULT}-{i}" for i in range(batch)]

    def commit(self) -> None:
        """Put the rows' memories back under their names: a pass through all layers is complete."""
        if self._changed and self._names is not None:
            for row, name in enumerate(self._names):

                def pick(x: Tensor, row: int = row) -> Tensor:
                    return x[row : row + 1].detach()

                self._before.setdefault(name, self._held.get(name))
                self._held[name] = [_rows(self._stacked(i), pick) for i in range(len(self._layers))]
        self._changed = False

    def rollback(self) -> None:
        """Undo what was committed since `activate`: the turn has failed half way."""
        for name, states in self._before.items():
            self._put_back(name, states)
        self._before = {}

    @contextmanager
    def unless_failed(self, name: str) -> Iterator[None]:
        """An error inside leaves this session as it was before."""
        before = self._held.get(name)
        try:
            yield
        except BaseException:
            self._put_back(name, before)
            raise

    def _put_back(self, name: str, states: list[DualMemoryState] | None) -> None:
        if states is None:
            self._held.pop(name, None)
        else:
            self._held[name] = states

    def deactivate(self) -> None:
        """Let go of the rows; what was not committed is dropped."""
        self._names, self._changed = None, False
        self._states, self._views, self._before = [], [], {}

    def batch_of(self, rows: int) -> int:
        """How many sessions stand behind `rows` rows; beams of one prompt share a session."""
        if self._names is None or not self._states:
            self.activate(None, rows)
        assert self._names is not None
        if rows % len(self._names):
            raise ValueError(f"sessions: {len(self._names)} of them do not fit {rows} rows")
        return len(self._names)

    def _stacked(self, i: int) -> DualMemoryState:
        state = self._states[i]
        if state is None:
            assert self._names is not None
            state = stack_states(
                [self._held[n][i] if n in self._held else self._layer(i).empty(1) for n in self._names]
            )
            self._states[i] = state
        return state

    def states(self, i: int, rows: int) -> DualMemoryState:
        """The memories of layer i behind these rows."""
        self.batch_of(rows)
        return self._stacked(i)

    def view(self, i: int, rows: int) -> MemoryView:
        """Layer i's memories as `rows` rows read them; made once until something is written."""
        beams = rows // self.batch_of(rows)
        view = self._views[i]
        if view is None or view.live.shape[0] != rows:
            view = self._layer(i).view(self._stacked(i))
            if beams > 1:
                view = view.repeat(beams)
            self._views[i] = view
        return view

    def replace(self, i: int, state: DualMemoryState) -> None:
        """Layer i's memories after a write."""
        self._states[i], self._views[i], self._changed = state, None, True

    # What users call.

    @property
    def names(self) -> tuple[str, ...]:
        """Sessions that hold something or were loaded."""
        return tuple(self._held)

    def __contains__(self, session: str) -> bool:
        return session in self._held

    def _known(self, session: str) -> list[DualMemoryState]:
        if session not in self._held:
            raise KeyError(f"unknown session {session!r}; known: {', '.join(self._held) or 'none'}")
        return self._held[session]

    def clear(self, session: str | None = None) -> None:
        """Forget one session, or all."""
        if session is None:
            self._held.clear()
        else:
            self._known(session)
            del self._held[session]

    def decay(self, cycles: int = 1, session: str | None = None) -> None:
        """Let decay cycles pass for one session, or all."""
        if isinstance(cycles, bool) or not isinstance(cycles, int):
            raise TypeError(f"cycles: expected an int, got {type(cycles).__name__}")
        if not 0 <= cycles <= 10**9:
            raise ValueError(f"cycles: expected 0 to 1e9, got {cycles}")
        for name in self._held if session is None else [session]:
            self._held[name] = [self._layer(i).decay(s, cycles) for i, s in enumerate(self._known(name))]

    def states_of(self, session: str) -> list[DualMemoryState]:
        """One state per memory layer, each of batch 1."""
        return self._known(session)

    def put(self, sessions: Sequence[str], states: Sequence[DualMemoryState]) -> None:
        """Set what sessions hold: one state per memory layer, its batch the sessions in order."""
        for row, name in enumerate(sessions):

            def pick(x: Tensor, row: int = row) -> Tensor:
                return x[row : row + 1].detach().clone()

            self._held[name] = [_rows(state, pick) for state in states]

    def copy(self, session: str, new: str) -> None:
        """Let a new session begin with what another holds."""
        self._held[new] = [_rows(state, torch.clone) for state in self._known(session)]

    def inspect(self, session: str = DEFAULT) -> dict[str, Any]:
        """What a session holds: per memory layer the live slots, their strengths, reads and ages.

        Raises:
            KeyError: if there is no such session.
        """
        layers = []
        for position, state in zip(self._fingerprint["memory_layer_positions"], self._known(session), strict=True):
            entry: dict[str, Any] = {"position": position}
            for part in ("buffer", "store"):
                bank: Bank = getattr(state, part)
                live = (bank.strength[0] > 0).nonzero().flatten().tolist()
                entry[part] = {
                    "slots": bank.strength.shape[1],
                    "live": len(live),
                    "strength": [round(bank.strength[0, s].item(), 4) for s in live],
                    "reads": [round(bank.access[0, s].item(), 4) for s in live],
                    "age": [int(bank.age[0, s].item()) for s in live],
                }
            layers.append(entry)
        return {"session": session, "layers": layers}

    def _identity(self) -> dict[str, Any]:
        """Whose memories these are: sizes, and the weights that made the keys (rounded: an adapter kept in float16
        is the same adapter)."""
        digest = hashlib.sha256()
        for i in range(len(self._layers)):
            for proj in (self._layer(i).key_proj, self._layer(i).content_proj):
                digest.update(proj.weight.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
        return {**self._fingerprint, "weights": digest.hexdigest()[:12]}

    def save(self, path: str | Path, sessions: Sequence[str] | None = None) -> None:
        """Write memories to one file, whole or not at all.

        Args:
            path: the file; an older one stays intact until the new one is complete.
            sessions: which; None: all.

        Raises:
            KeyError: if a session is unknown.
            OSError: if the file cannot be written.
        """
        from safetensors.torch import save

        if isinstance(sessions, str):
            sessions = [sessions]
        names = list(self._held) if sessions is None else list(sessions)
        tensors = {f"{k}/{key}": x for k, name in enumerate(names) for key, x in _flatten(self._known(name)).items()}
        meta = {
            "format": FORMAT,
            "sessions": json.dumps(names),
            "model": json.dumps(self._identity(), sort_keys=True),
        }
        content = save(tensors, metadata=meta | {"sha256": checksum(tensors, meta)})
        atomic_write(path, content, private=True)

    def load(self, path: str | Path) -> tuple[str, ...]:
        """Read memories from a file; sessions of the same name are replaced, others stay. Returns the names.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, or of another model; nothing has changed then.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no memory file here")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                names = session_names(path, meta)
                # Copies: what stays mapped changes, or crashes, when the file does.
                tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
            if meta["sha256"] != checksum(tensors, meta):
                raise ValueError(f"{path}: damaged (its checksum does not fit its content)")
            self._check_model(path, json.loads(meta["model"]))
            loaded = {}
            for n, name in enumerate(names):
                prefix = f"{n}/"
                own = {k[len(prefix) :]: x for k, x in tensors.items() if k.startswith(prefix)}
                loaded[name] = _unflatten(own, len(self._layers), self._device)
                self._check_shapes(path, loaded[name])
        except (SafetensorError, KeyError, json.JSONDecodeError, EOFError, RecursionError) as error:
            raise ValueError(f"{path}: damaged or not a memory file ({type(error).__name__}: {error})") from None
        self._held.update(loaded)
        return tuple(loaded)

    def _check_model(self, path: Path, model: Any) -> None:
        here = self._identity()
        if model != here:
            saved = model if isinstance(model, dict) else {}
            k = next((k for k in here if saved.get(k) != here[k]), "model")
            raise ValueError(f"{path}: this memory is of another model ({k}: {saved.get(k)}, here {here.get(k)})")

    def _check_shapes(self, path: Path, states: list[DualMemoryState]) -> None:
        for i, state in enumerate(states):
            empty = self._layer(i).empty(1)
            for part in ("buffer", "store", "stats"):
                for field, x, like in zip(
                    getattr(empty, part)._fields, getattr(state, part), getattr(empty, part), strict=True
                ):
                    if x.shape != like.shape or x.dtype != like.dtype:
                        raise ValueError(
                            f"{path}: {part}.{field} of layer {i} is {tuple(x.shape)} {x.dtype}, "
                            f"expected {tuple(like.shape)} {like.dtype}"
                        )
