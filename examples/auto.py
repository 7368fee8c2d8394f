"""Auto: the best method for each part of the model under one budget; saves the result and says what it chose.

python examples/auto.py OUTPUT_DIR [MODEL] [RATIO]     default: SmolLM2-135M from its package
"""

from __future__ import annotations

import sys
from collections import Counter

import tinycomp as tc
from tinycomp.io import default_model


def main(output_dir: str, source: str | None = None, ratio: str = "0.8") -> None:
    model, tokenizer = tc.load_model(source or default_model())
    report = tc.compress_(model, tc.Auto(ratio=float(ratio)), tokenizer=tokenizer)
    chosen = Counter(record["method"] for record in report.records)
    print("chosen:", ", ".join(f"{method} for {count} matrices" for method, count in chosen.most_common()))
    print(f"left dense: {len(report.skipped)} modules; kept {report.ratio_achieved:.3f}")
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"saved in {output_dir}; load it with AutoModelForCausalLM.from_pretrained after `import tinycomp`")


if __name__ == "__main__":
    main(*sys.argv[1:])
