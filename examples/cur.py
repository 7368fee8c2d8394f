"""CUR on a language model: the default form, and the published algorithm for comparison.

python examples/cur.py [MODEL] [RATIO]     MODEL: folder or .gguf file; default: SmolLM2-135M from its package
"""

from __future__ import annotations

import sys

import tinycomp as tc
from tinycomp.io import default_model


def main(source: str | None = None, ratio: str = "0.8") -> None:
    for config in (tc.CUR(ratio=float(ratio)), tc.CUR(preset="paper")):
        model, tokenizer = tc.load_model(source or default_model())
        report = tc.compress_(model, config, tokenizer=tokenizer)
        result = tc.evaluate(model, tokenizer)
        print(
            f"CUR {config.preset}: kept {report.ratio_achieved:.3f} of the targeted parameters, "
            f"{report.parameters_before:,} -> {report.parameters_after:,} in all; "
            f"{result['protocol']} {result['perplexity']:.2f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
