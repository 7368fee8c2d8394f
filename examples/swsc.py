"""SWSC on a language model: channels share centroids, a low-rank term corrects what that loses.

python examples/swsc.py [MODEL] [RATIO]     MODEL: folder or .gguf file; default: SmolLM2-135M from its package
"""

from __future__ import annotations

import sys

import tinycomp as tc
from tinycomp.io import default_model


def main(source: str | None = None, ratio: str = "0.8") -> None:
    model, tokenizer = tc.load_model(source or default_model())
    report = tc.compress_(model, tc.SWSC(ratio=float(ratio)), tokenizer=tokenizer)
    worst = max(report.records, key=lambda record: record["relative_error"])
    print(
        f"kept {report.ratio_achieved:.3f}; worst matrix {worst['path']}, relative error {worst['relative_error']:.3f}"
    )
    result = tc.evaluate(model, tokenizer)
    print(f"{result['protocol']} {result['perplexity']:.2f}, {result['bytes_memory'] / 1e6:.0f} MB in memory")


if __name__ == "__main__":
    main(*sys.argv[1:])
