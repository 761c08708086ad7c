"""Imports run one way, from the top of the house to the bottom, without a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From top to bottom; a name stands for the module and all below it. A module imports its own layer and those under it.
LAYERS = (
    ("fastattn.__main__", "fastattn.demo"),
    ("fastattn.profiling", "fastattn.testing", "fastattn.testing_lstm"),
    ("fastattn",),
    ("fastattn.patching", "fastattn.integrations", "fastattn.replacing"),
    ("fastattn.models",),
    ("fastattn.modules",),
    ("fastattn.functional", "fastattn.plain_call", "fastattn.additive", "fastattn.varlen", "fastattn.varlen_op",
     "fastattn.varlen_eager", "fastattn.kv_cache", "fastattn.kv_cache_op", "fastattn.kv_cache_eager",
     "fastattn.layer_norm_lstm", "fastattn.double_backward"),
    ("fastattn.dispatch", "fastattn.lstm_dispatch", "fastattn.sdpa", "fastattn.validation",
     "fastattn.additive_validation", "fastattn.varlen_checks"),
    ("fastattn.reference", "fastattn.reference_additive", "fastattn.reference_lstm",
     "fastattn.reference_layer_norm_lstm"),
    ("fastattn.kernels",),
    ("fastattn.philox", "fastattn.debug", "fastattn.transforms"),
)  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "fastattn").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that are imported when this file is; imports inside functions come later."""
    found: set[str] = set()
    for node in _at_import(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in whole}
    return found & modules.keys()


def _at_import(node: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += [child, *_at_import(child)]
    return nodes


def _layer(module: str) -> int:
    """The layer of the longest name that covers the module."""
    fits = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "fastattn" and module.startswith(name + "."))
    ]
    assert fits, f"{module}: put it into a layer"
    return max(fits)[1]


def test_no_module_imports_one_above_it() -> None:
    modules = _modules()
    for module, path in modules.items():
        for imported in _imports(path, modules):
            assert _layer(imported) >= _layer(module), f"{module} imports {imported}, which stands above it"


def test_no_circle() -> None:
    modules = _modules()
    TopologicalSorter({module: _imports(path, modules) - {module} for module, path in modules.items()}).prepare()


def test_only_tests_and_benchmarks_import_testing() -> None:
    modules = _modules()
    testing = {"fastattn.testing", "fastattn.testing_lstm"}
    assert not [name for name, path in modules.items() if name not in testing and testing & _imports(path, modules)]
