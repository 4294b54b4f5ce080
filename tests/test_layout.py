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


def test_the_script_and_the_front_page_can_be_read_to_the_end():
    assert len((ROOT / "main_MAGIA_sel.py").read_text().splitlines()) < 450
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_attack_asks_where_the_head_is():
    name = re.compile(r"[\"']head[.\"']|model\.head")
    spelled = [file.name for file in (ROOT / "attack").rglob("*.py") if name.search(file.read_text())]
    assert spelled == []
