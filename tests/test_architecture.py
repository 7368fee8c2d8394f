"""Who may import whom, how long files and functions may be, and what importing the package may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinycomp"
EVERYTHING = {"*"}

# Which parts of tinycomp each part may import (itself always). "methods/<m>" is any method file; files of methods/
# whose names begin with an underscore are shared by them.
MAY_IMPORT = {
    "ops": set(),
    "layers": {"ops"},
    "triton_kernels": {"ops"},
    "kernels_dump": {"ops", "triton_kernels"},
    "edits": set(),
    "errors": set(),
    "linalg": {"ops"},
    "selection": {"ops", "linalg"},
    "surgery": {"edits", "layers"},
    "models": set(),
    "data": set(),
    "calib": {"models", "ops", "data"},
    "budget": {"methods"},
    "targets": {"calib", "errors", "linalg", "methods", "models"},
    "methods": {"edits", "calib", "models", "train", "linalg", "ops", "selection", "signals"},
    "train": {"models", "ops", "calib", "data", "eval", "io", "linalg", "progress"},
    "signals": {"calib", "data", "edits", "eval", "models"},
    "eval": {"models", "ops", "layers", "data"},
    "fused": {"ops"},
    "hf": {"edits", "layers", "models", "surgery"},
    "io": {"edits", "surgery", "hf", "plain"},
    "serve": {"hf", "io", "layers", "ops"},
    "pages": set(),
    "progress": set(),
    "parallel": set(),
    "layer_times": {"edits", "eval", "layers", "methods", "models"},
    "console": {"errors", "plain"},
    "plain": set(),
    "choosing": EVERYTHING,
    "compression": EVERYTHING,
    "planning": EVERYTHING,
    "pipeline": EVERYTHING,
    "__main__": {"cli"},
    "cli": EVERYTHING,
    "demo": EVERYTHING,
    "job": EVERYTHING,
    "elastic": EVERYTHING,
    "exporting": EVERYTHING,
    "tracks": EVERYTHING,
    "recipe": EVERYTHING,
    "recovery": EVERYTHING,
    "inspection": {"edits", "io"},
    "measure": {"eval"},
    "doctor": {"ops"},
    "__init__": {"hf"},
}

# What no file of the part may import, anywhere in it. "top" bans it at module level only: loading stays light.
BANNED = {
    "edits": {"torch", "numpy", "transformers"},
    "ops": {"transformers", "scipy"},
    "layers": {"transformers"},
    "linalg": {"transformers"},
    "selection": {"transformers"},
    "budget": {"transformers"},
}
NOT_AT_TOP = {"matplotlib", "datasets", "gguf", "pyarrow", "pandas", "lm_eval", "sklearn", "peft", "triton"}

# Auto chooses among the other methods, so it may name them.
MAY_IMPORT_METHODS = {"auto.py"}

FILE_LINES, FUNCTION_LINES = 350, 60
# name -> why it may be longer
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
    "ops/split_bregman_step_.py:split_bregman_step_": "a contract with 19 arguments, each on a line of its own twice",
    "triton_kernels/split_bregman_step_.py:split_bregman_kernel": "a GPU kernel whose arguments take a line each",
    "triton_kernels/split_bregman_step_.py:split_bregman_step_": "a contract with 19 arguments, as above",
    "triton_kernels/select_pivots.py:pivot_kernel": "a GPU kernel whose arguments take a line each",
    "triton_kernels/swsc_linears.py:shared_group_kernel": "a GPU kernel of three layers with 24 arguments each",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, package: str) -> list[str]:
    """Dotted names that the code imports; `from a import b` counts as `a.b` too. TYPE_CHECKING blocks do not count."""
    names = []
    stack = [tree]
    while stack:
        node = stack.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
        stack += list(ast.iter_child_nodes(node))
    return names


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


def known_part(name: str) -> str | None:
    """The part of tinycomp that a dotted name lies in; None for another package or the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "tinycomp" and len(parts) > 1 and parts[1] in MAY_IMPORT else None


def test_every_part_has_a_rule():
    assert {part_of(path) for path in sources()} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part]
    tree = ast.parse(path.read_text())
    names = imports(tree, package_of(path))
    if allowed != EVERYTHING:
        wrong = {n for n in names if (target := known_part(n)) is not None and target != part and target not in allowed}
        assert not wrong, f"{part} may import {sorted(allowed) or 'nothing of tinycomp'}, not {sorted(wrong)}"
    banned = {n for n in names if n.split(".")[0] in BANNED.get(part, ())}
    assert not banned, f"{part} must not import {sorted(banned)}"
    top = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    allowed_at_top = {"triton"} if part == "triton_kernels" else set()
    heavy = {n for n in imports(top, package_of(path)) if n.split(".")[0] in NOT_AT_TOP - allowed_at_top}
    assert not heavy, f"import {sorted(heavy)} where it is needed: loading must stay light"


def test_no_method_imports_another():
    files = [path for path in (PACKAGE / "methods").glob("*.py") if not path.name.startswith("_")]
    assert files
    for path in files:
        if path.name in MAY_IMPORT_METHODS:
            continue
        others = {f"tinycomp.methods.{other.stem}" for other in files if other != path}
        names = imports(ast.parse(path.read_text()), package_of(path))
        wrong = {n for n in names if any(n == other or n.startswith(other + ".") for other in others)}
        assert not wrong, f"{path.name} imports {sorted(wrong)}; shared code belongs in methods/_*.py"


def test_files_and_functions_stay_within_their_budgets():
    files, functions = {}, {}
    for path in sources():
        text = path.read_text()
        name = str(path.relative_to(PACKAGE))
        files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[f"{name}:{node.name}"] = node.end_lineno - node.lineno + 1
    long_files = {name: lines for name, lines in files.items() if lines > FILE_LINES}
    long_functions = {name: lines for name, lines in functions.items() if lines > FUNCTION_LINES}
    assert set(long_files) == set(LONG_FILES), long_files
    assert set(long_functions) == set(LONG_FUNCTIONS), long_functions


def test_kernel_files_stay_within_their_budget():
    kernels = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".cuh")]
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in kernels}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}


def test_no_utils_files():
    assert [p for p in sources() if p.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_importing_the_package_loads_no_method_and_nothing_heavy():
    code = (
        "import sys, tinycomp; from transformers import AutoConfig;"
        "print(tinycomp.plugin_error);"
        "print([n for n in sys.modules if n.startswith(('tinycomp.methods', 'tinycomp.calib', 'tinycomp.pipeline'))"
        " or n in ('matplotlib', 'datasets', 'gguf', 'sklearn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split("\n")[:2] == ["None", "[]"], done.stderr


def test_public_names_resolve():
    import tinycomp

    assert set(tinycomp.__all__) == set(tinycomp._LAZY)
    for name in tinycomp.__all__:
        assert getattr(tinycomp, name) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'; it has compress, "):
        _ = tinycomp.Nothing


def test_changed_quantizer_interface_gives_a_clear_warning(monkeypatch):
    import tinycomp
    from tinycomp import hf

    def fail() -> None:
        raise TypeError("register_quantizer() takes 3 arguments")

    monkeypatch.setattr(hf, "register", fail)
    with pytest.warns(RuntimeWarning, match=r"another quantizer interface .* takes 3 arguments.*Install transformers"):
        reason = tinycomp._register_plugin()
    assert reason == "TypeError: register_quantizer() takes 3 arguments"
