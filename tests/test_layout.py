"""The house: what the import contracts of pyproject.toml cannot say."""

import ast
import re
import sys

import pytest
from conftest import ROOT

OURS = {
    "attack",
    "bench",
    "benchmark",
    "cli",
    "client",
    "data",
    "judge",
    "main_MAGIA_sel",
    "priors",
    "schedules",
    "network",
    "update",
}


@pytest.mark.parametrize("name", ["schedules", "priors"])
def test_schedules_and_priors_import_no_module_of_the_project(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {module.split(".")[0] for module in imported}
    assert not roots & OURS
    assert roots <= set(sys.stdlib_module_names) | {"torch"}


# Files and functions that are too long as yet. It must become empty.
TOO_LONG: set[str] = set()
NOT_SOURCES = {"tests", "results", "data", "venv", "build"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources():
    """Every file of the program, tests apart."""
    folders = [f for f in ROOT.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name not in NOT_SOURCES]
    return [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]


def lengths(file):
    """How many lines a file has, and each function in it, with its decorators."""
    text = file.read_text(encoding="utf-8")
    yield str(file.relative_to(ROOT)), len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            yield node.name, node.end_lineno - min(n.lineno for n in (node, *node.decorator_list)) + 1


def test_no_file_has_more_than_450_lines_and_no_function_more_than_60():
    """What one can read at a sitting; ruff's C901 bounds how many ways lead through a function."""
    found = [length for file in sources() for length in lengths(file)]
    assert {"main_MAGIA_sel.py", "main"} <= {name for name, _ in found}
    too_long = {(name, lines) for name, lines in found if lines > (450 if name.endswith(".py") else 60)}
    assert {(name, lines) for name, lines in too_long if name not in TOO_LONG} == set()


PAGES = {"README.md", "results/README.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))}
ONE_TOKEN = re.compile(r"([-*] )?(!?\[[^]]*\]\(\S+\)|\S*)")


def prose(text):
    """The lines of a page that can be broken: no table, heading or code, and no lone link, image or word."""
    is_fenced = is_code = False
    above = ""
    for line in text.splitlines():
        is_code = line.startswith("    ") and (is_code or not above.strip())
        above, bare = line, line.strip()
        if bare.startswith("```"):
            is_fenced = not is_fenced
        elif not (is_fenced or is_code or bare.startswith(("|", "#")) or ONE_TOKEN.fullmatch(bare)):
            yield line


@pytest.mark.parametrize("page", sorted(PAGES))
def test_prose_is_no_wider_than_code(page):
    wide = [line for line in prose((ROOT / page).read_text(encoding="utf-8")) if len(line) > 120]
    assert wide == []


PAGE = """# a b
a [b](c) d
| a | b |

    a b
    a b
*a b*
![a b](c.png)
- [a b](c)
```text
a b
```
- a [b](c)
    which goes on
a_b
"""


def test_prose_is_what_can_be_broken():
    assert list(prose(PAGE)) == ["a [b](c) d", "*a b*", "- a [b](c)", "    which goes on"]


def test_the_attack_asks_where_the_head_is():
    name = re.compile(r"[\"']head[.\"']|model\.head")
    files = list((ROOT / "attack").rglob("*.py"))
    assert len(files) > 10
    assert [file.name for file in files if name.search(file.read_text())] == []
