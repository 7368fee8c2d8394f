"""Write docs/_build/api.md: the public names with their docstrings and signatures, then every op's contract."""

from __future__ import annotations

import inspect
from pathlib import Path

import tinycomp
from tinycomp import ops
from tinycomp.layers import LAYERS

OUT = Path(__file__).parent / "_build" / "api.md"


def section(title: str, value: object) -> str:
    """A heading, the signature where there is one, and the docstring."""
    lines = [f"### {title}", ""]
    if callable(value) and not (inspect.isclass(value) and hasattr(value, "model_fields")):
        lines += ["```python", f"{title}{inspect.signature(value)}", "```", ""]
    return "\n".join([*lines, "```text", inspect.getdoc(value) or "", "```", ""])


def build() -> str:
    """The whole page."""
    parts = ["# tinycomp: reference", "", f"Version {tinycomp.__version__}.", "", "## Public names", ""]
    parts += [section(name, getattr(tinycomp, name)) for name in tinycomp.__all__]
    parts += ["## Layers", ""]
    parts += [section(name, LAYERS[name]) for name in sorted(LAYERS)]
    parts += ["## Ops", ""]
    parts += [section(name, getattr(ops, name)) for name in sorted(ops.OPS)]
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(build())
    print(OUT)
