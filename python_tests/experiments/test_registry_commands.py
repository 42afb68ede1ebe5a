from __future__ import annotations

import subprocess
import sys

import pytest

from fastmem import cli
from fastmem.experiments import fix_registry
from fastmem.registry import ErrorType, Fix, FixRegistry, FixType, create_signature


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["registry", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in ("stream", "report", "metrics", "export", "import", "check", *fix_registry._experiments()):
        assert f"    {name} " in text


def test_a_wrong_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["registry", "dance"])
    assert stopped.value.code == 2
    assert "dance" in capsys.readouterr().err


def test_an_experiment_gets_its_own_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["registry", "hash-collisions", "--help"])
    assert stopped.value.code == 0
    assert "fastmem registry hash-collisions" in capsys.readouterr().out


def test_check(tmp_path, capsys):
    path = tmp_path / "fixes.db"
    with FixRegistry(path) as registry:
        registry.register(create_signature(ErrorType.REMOVAL, "task", [], 0.5), Fix(FixType.DECOMPOSE))
    assert cli.main(["registry", "check", str(path)]) == 0
    assert capsys.readouterr().out == "1 sound entries, epoch 0\n"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"decompose", b"dec\xffmpose"))
    assert cli.main(["registry", "check", str(path)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from fastmem import cli\n"
        f"from fastmem.registry import FixRegistry; FixRegistry({str(tmp_path / 'a.db')!r}).close()\n"
        f"assert cli.main(['registry', 'metrics', {str(tmp_path / 'a.db')!r}]) == 0\n"
        "cli.main(['registry', '--help'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["fixes.db", "link.db"])
def test_nothing_is_written_over_the_registry_that_is_read(tmp_path, name):
    path = tmp_path / "fixes.db"
    with FixRegistry(path) as registry:
        registry.register(create_signature(ErrorType.REMOVAL, "task", ["a"], 0.6), Fix(FixType.DECOMPOSE))
    (tmp_path / "link.db").symlink_to(path)
    content = path.read_bytes()
    for arguments in (["export", str(path), str(tmp_path / name)], ["report", str(path), "-o", str(tmp_path / name)]):
        with pytest.raises(ValueError, match="is the registry itself"):
            fix_registry.main(arguments)
    assert path.read_bytes() == content


def test_a_report_of_text_that_utf_8_cannot_hold(tmp_path):
    path, page = tmp_path / "fixes.db", tmp_path / "page.html"
    with FixRegistry(path) as registry:
        strange = Fix(FixType.DECOMPOSE, decomposition=["\ud800"])
        registry.register(create_signature(ErrorType.REMOVAL, "task", ["a"], 0.6), strange)
    assert not fix_registry.main(["report", str(path), "-o", str(page)])
    assert page.read_bytes().decode().startswith("<!doctype html>"[:5])
