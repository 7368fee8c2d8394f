"""The baselines that every other method has to beat, at one ratio: SVD, neuron pruning, Wanda, magnitude, random, int8.

python examples/baselines.py [MODEL] [RATIO]     MODEL: folder or .gguf file; default: SmolLM2-135M from its package
"""

from __future__ import annotations

import sys

import tinycomp as tc
from tinycomp.io import default_model


def main(source: str | None = None, ratio: str = "0.8") -> None:
    kept = float(ratio)
    configs = [
        tc.SVD(ratio=kept),
        tc.WidthPrune(ratio=kept),
        tc.Wanda(ratio=kept),
        tc.Magnitude(ratio=kept),
        tc.Random(ratio=kept),
        tc.Rounding(bits=8),
    ]
    original, tokenizer = tc.load_model(source or default_model())
    print(f"{'dense':12} perplexity {tc.evaluate(original, tokenizer)['perplexity']:10.2f}")
    for config in configs:
        model, report = tc.compress(original, config, tokenizer=tokenizer)
        result = tc.evaluate(model, tokenizer)
        print(
            f"{type(config).__name__:12} perplexity {result['perplexity']:10.2f}   kept {report.ratio_achieved:.3f}   "
            f"{result['bytes_memory'] / 1e6:6.0f} MB   {report.seconds:.0f} s"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
