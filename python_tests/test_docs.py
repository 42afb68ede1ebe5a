"""The pages are true: their code runs, the shapes beside it are those that come, links lead somewhere, and every
environment variable is described.

The blocks of a page run in order, in one namespace and one empty folder. A comment before a block, which readers do not
see, makes an exception: `<!-- slow -->`: run by `make test-slow` alone; `<!-- compile only: why -->`: never run.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_chat import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_LANGUAGE_MODEL = ROOT / "docs" / "guides" / "llm_memory.md"  # all of its code needs a trained model
BLOCK = re.compile(r"^(?P<mark><!-- (?:slow|compile only: [^>]+) -->\n+)?```python\n(?P<code>.*?)^```$", re.M | re.S)
SHAPES = re.compile(r"#\s*((?:\([\d, ]*\)(?:, )?)+)(?:[^\d,]|$)")
READS = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\(|ParallelCompile\()\s*["'](FASTMEM_[A-Z_]+)""")


class Block(NamedTuple):
    """Python code of a page; `mark` is "" for code that runs, "slow" or "compile only"."""

    page: Path
    line: int
    code: str
    mark: str

    def compiled(self):
        """The code with the page's line numbers, and a call of `_shapes` after each line whose comment has some."""
        tree = ast.parse(self.code)
        tree = ast.fix_missing_locations(_Checks(self.code.splitlines(), self.line - 1).visit(tree))
        return compile(ast.increment_lineno(tree, self.line - 1), str(self.page), "exec")


class _Checks(ast.NodeTransformer):
    def __init__(self, lines, offset):
        self.lines, self.offset = lines, offset

    def _checked(self, node, names):
        comments = (self.lines[n - 1].partition("  # ")[2] for n in (node.end_lineno, node.lineno))
        given = SHAPES.match(f"# {next(filter(None, comments), '')}")
        if given is None:
            return node
        names = names.elts if isinstance(names, ast.Tuple) else [names]
        shapes = [tuple(map(int, re.findall(r"\d+", s))) for s in re.findall(r"\([\d, ]*\)", given[1])]
        pairs = [(ast.unparse(n), s) for n, s in zip(names, shapes, strict=False)]
        values = ", ".join(name for name, _ in pairs)
        check = f"_shapes({node.lineno + self.offset}, {pairs}, [{values}])"
        return [node, *(ast.copy_location(n, node) for n in ast.parse(check).body)]

    def visit_Assign(self, node):
        return self._checked(node, node.targets[0])

    def visit_Expr(self, node):
        return self._checked(node, node.value)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """The Python blocks of a page."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        mark = (match["mark"] or "").removeprefix("<!-- ").partition(":")[0].removesuffix(" -->\n").strip()
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["code"], "compile only" if page == WITH_LANGUAGE_MODEL else mark))
    assert len(found) == text.count("```python"), f"{page}: a block that this test does not see"
    return found


def run(chosen):
    """Run blocks, and return how many shapes were compared: where a comment begins with shapes, they are those of what
    its line assigns, or is."""
    checked = 0

    def shapes(line, pairs, values):
        nonlocal checked
        for (name, shape), value in zip(pairs, values, strict=True):
            assert tuple(value.shape) == shape, f"line {line}: {name} is {tuple(value.shape)}, not {shape}"
            checked += 1

    namespace = {"__name__": "__main__", "_shapes": shapes}
    for block in chosen:
        exec(block.compiled(), namespace)
    return checked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_compiles(page):
    for block in blocks(page):
        block.compiled()


@pytest.mark.parametrize("page", [p for p in PAGES if any(not b.mark for b in blocks(p))], ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)
    checked = run(b for b in blocks(page) if not b.mark)
    if page.parent.name == "ops":
        assert checked >= 2, "an op's example shows the shapes of what comes out"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "slow" for b in blocks(p))], ids=name_of)
def test_slow_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(b for b in blocks(page) if b.mark in ("", "slow"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "ops").glob("*.md")), ids=name_of)
def test_an_op_opens_with_an_example(page):
    first, *_ = blocks(page)
    before = page.read_text().splitlines()[: first.line - 2]
    assert first.mark == "" and f"fastmem.{page.stem}(" in first.code
    assert sum(line.startswith("#") for line in before) <= 2, "sections before the example"


def test_a_wrong_shape_is_found():
    code = "import torch\nif True:\n    x, y = torch.zeros(2, 3), torch.zeros(4)  # (2, 3), (4,): both\n"
    right = Block(ROOT / "README.md", 11, code, "")
    assert run([right]) == 2
    with pytest.raises(AssertionError, match=r"^line 13: y is \(4,\), not \(5,\)"):
        run([right._replace(code=code.replace("(4,)", "(5,)"))])
    with pytest.raises(AssertionError, match=r"^line 12: torch.zeros\(2\) is \(2,\), not \(3,\)"):
        run([right._replace(code="import torch\ntorch.zeros(2)  # (3,)\n")])


def test_every_environment_variable_is_documented():
    sources = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("fastmem", "kernels", "csrc", "benches"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".sh")]
    read = {name for path in sources for name in READS.findall(path.read_text())}
    page = (ROOT / "docs" / "guides" / "install.md").read_text()
    described = set(re.findall(r"^\| `(FASTMEM_[A-Z_]+)` \|", page, re.M))
    assert read == described and "FASTMEM_CPU_ISA" in read


def test_every_extra_is_described():
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", table, re.M)
    page = (ROOT / "docs" / "guides" / "install.md").read_text()
    described = page.partition("| extra |")[2].partition("\n\n")[0]
    assert set(extras) == set(re.findall(r"^\| `(\w+)` \|", described, re.M)) and "llm" in extras


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
        other = page if not target else (page.parent / target).resolve()
        assert other.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", other.read_text(), re.M)), f"{page}: #{anchor}"
    for path in re.findall(r"`((?:fastmem|csrc|kernels|docs|benches|python_tests)/[\w./*]+)`", text):
        assert any(ROOT.glob(path.rstrip("/"))), f"{page}: {path}"
