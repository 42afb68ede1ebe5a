import json
import subprocess
import sys

import pytest
import torch

import fastmem
from fastmem import _native, cli


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["fastmem"] == fastmem.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["instruction_set"] == _native.isa
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())
    assert set(facts["ops"]) == set(fastmem._OPS)
    for devices in facts["ops"].values():
        assert devices["cpu"]["chosen"] == ("reference" if _native.missing else "cpp")
        assert set(devices["cpu"]["refused"]) == {"triton", "cpp", "reference"} - {devices["cpu"]["chosen"]}


def test_info_text(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"threads          {torch.get_num_threads()}" in text
    for op in fastmem._OPS:
        assert f"{op} on cpu: " in text
    assert "    not triton: " in text


def test_help_needs_no_torch():
    code = "import sys; from fastmem import cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, (text, _) in cli.COMMANDS.items():
        assert f"{name:8} {text}" in done.stdout


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmem {fastmem.__version__}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["info", "--json"], ["memory", "--help"], []])
def test_the_package_is_the_command(arguments):
    """`python -m fastmem` says and returns what the installed command does."""
    script = "import sys; from fastmem.cli import main; sys.exit(main())"
    package, command = (
        subprocess.run([sys.executable, *call, *arguments], capture_output=True, text=True)
        for call in (("-m", "fastmem"), ("-c", script))
    )
    assert (package.returncode, package.stdout, package.stderr) == (command.returncode, command.stdout, command.stderr)
    assert package.returncode == (0 if arguments else 2) and package.stdout


def test_wrong_calls(capsys):
    assert cli.main([]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            ImportError("memory needs tyro: pip install 'fastmem[experiments]'"),
            1,
            "error: memory needs tyro: pip install",
        ),
        (ValueError("bank: expected width 576, got 64\nmore"), 1, "error: bank: expected width 576, got 64 ("),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device ("),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_a_failing_command_says_one_line(capsys, monkeypatch, error, status, said):
    def fail(arguments):
        assert arguments == ["--flag", "x"]
        raise error

    monkeypatch.setattr(cli, "info", fail)
    assert cli.main(["info", "--flag", "x"]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(said) and captured.err.count("\n") == 1


def test_every_command_can_be_imported():
    for _, target in cli.COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_a_bad_instruction_set_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "fastmem.cli", "info"],
        env={"FASTMEM_CPU_ISA": "mmx", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: FASTMEM_CPU_ISA: expected one of generic, avx2, avx512, got 'mmx'")
    assert done.stderr.count("\n") == 1
