"""`python -m tinycomp.kernels_dump OUT [--op OP] [--backend cuda|triton] [--shapes FILE] [--seed N]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tinycomp.kernels_dump import BACKENDS, dump


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinycomp.kernels_dump", description="PTX and launches of kernels.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--op", action="append", default=[], help="an op; all by default, may be repeated")
    parser.add_argument("--backend", choices=BACKENDS, help="both by default")
    parser.add_argument("--shapes", type=Path, help="JSON: op -> list of shapes, instead of the small awkward ones")
    parser.add_argument("--seed", type=int, default=0, help="of the numbers in the buffers")
    options = parser.parse_args(words)
    backends = BACKENDS if options.backend is None else (options.backend,)
    try:
        shapes = None if options.shapes is None else json.loads(options.shapes.read_text())
        cases = dump(options.out, options.op, backends, shapes, seed=options.seed)
    except (RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(cases)} cases in {options.out}; docs/gpu.md says how to run them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
