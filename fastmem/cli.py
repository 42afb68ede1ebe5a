"""The `fastmem` command. Each subcommand is imported when it is called, so `fastmem --help` needs not even torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any

# name -> (one line of help, "module:function"). The function gets the arguments after the name and returns an exit
# status, or None for 0.
COMMANDS = {
    "info": ("versions, instruction set, threads, GPU, and which backend serves each op", "fastmem.cli:info"),
    "memory": (
        "a frozen language model with a memory: demo, train, chat, evaluate",
        "fastmem.experiments.llm_memory:main",
    ),
    "registry": (
        "from a failure to its fix: stream, report, metrics, import, export, check, and experiments",
        "fastmem.experiments.fix_registry:main",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run `fastmem NAME ...`. A wrong call or missing piece ends in one line on stderr and a status of 1 or 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("fastmem", description="Fast memory for neural networks.", add_help=False)
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="command")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true", help="print fastmem's version")
    parser.epilog = "\n".join(f"  {name:8} {text}" for name, (text, _) in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if arguments and arguments[0] in COMMANDS:
        return _run(arguments[0], arguments[1:])
    options = parser.parse_args(arguments)
    if options.version:
        from fastmem import __version__

        print(f"fastmem {__version__}")
        return 0
    parser.print_help()
    return 0 if options.help else 2


def _run(name: str, arguments: list[str]) -> int:
    module, function = COMMANDS[name][1].split(":")
    try:
        return getattr(import_module(module), function)(arguments) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FASTMEM_TRACEBACK"):
            traceback.print_exc()
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: {message} (FASTMEM_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def info(arguments: list[str]) -> int:
    """`fastmem info`: what is installed and what would run."""
    parser = argparse.ArgumentParser("fastmem info", description=COMMANDS["info"][0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    facts = gather()
    print(json.dumps(facts, indent=2) if options.json else _as_text(facts))
    return 0


def gather() -> dict[str, Any]:
    """The facts of `fastmem info`, ready for JSON."""
    import torch

    import fastmem
    from fastmem import _native, _system
    from fastmem.ops import _threads, _typical

    ops: dict[str, dict[str, Any]] = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for op, (args, kwargs) in _typical.calls(device).items():
            explanation = fastmem.explain(op, *args, **kwargs)
            ops.setdefault(op, {})[device] = {"chosen": explanation.chosen, "refused": explanation.refused}
    return {
        "versions": _system.versions(),
        "cpu": _system.cpu_name(),
        "instruction_set": _native.isa,
        "extension_missing": _native.missing,
        "threads": torch.get_num_threads(),
        "threads_of": "torch" if _threads.BORROWED else "fastmem",
        "gpu": _system.gpu_name(),
        "git": _system.git_commit(),
        "ops": ops,
    }


def _as_text(facts: dict[str, Any]) -> str:
    lines = [f"{name:16} {version}" for name, version in facts["versions"].items()]
    lines += ["", f"{'CPU':16} {facts['cpu']}"]
    lines.append(f"{'instruction set':16} {facts['extension_missing'] or facts['instruction_set']}")
    lines.append(f"{'threads':16} {facts['threads']} of {facts['threads_of']}")
    lines += [f"{'GPU':16} {facts['gpu'] or 'none that torch can use'}", ""]
    for op, devices in facts["ops"].items():
        for device, explanation in devices.items():
            lines.append(f"{op} on {device}: {explanation['chosen']}")
            lines += [f"    not {name}: {reason}" for name, reason in explanation["refused"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
