"""How much of its perplexity a compressed SmolLM2 gets back, against the processor time spent; and the control.

    python bench/recovery.py [--ratio 0.8] [--steps 40] [--output recovery.json]

The student is SVD at `ratio` of the linear parameters. Control: the uncompressed model through the same recipe. Time is
that of all threads of the process (15 minutes on 2 cores are 1,800 s); it holds the teacher's pass, the closed form,
training and the judgements, not the compression and the perplexities. Perplexity is measured on text that neither
training nor the judgements see.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import tinycomp as tc
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.io import default_model


def main(ratio: float, steps: int, output: Path, student_dir: Path | None, wanted: list[str]) -> None:
    teacher, tokenizer = tc.load_model(default_model())
    protocol = DEFAULT.shortened(2048)
    if student_dir is not None and student_dir.exists():
        student, _ = tc.load_model(student_dir)
    else:
        student = copy.deepcopy(teacher)
        tc.compress_(student, tc.SVD(ratio=ratio), tokenizer=tokenizer, num_calibration_samples=16)
        if student_dir is not None:
            student.save_pretrained(student_dir)
    control = copy.deepcopy(teacher)
    config = tc.Distill(
        steps=steps, batch_size=2, kl=1.0, heal_samples=24, eval_every=max(steps // 4, 1),
        held_out=0.08,
    )  # fmt: skip
    dense = perplexity(teacher, tokenizer, protocol)
    results: dict[str, Any] = {
        "protocol": protocol.name, "hash": dense.hash, "dense": dense.perplexity, "config": config.model_dump(),
    }  # fmt: skip
    for name, model in (("student", student), ("control", control)):
        if name not in wanted:
            continue
        before = perplexity(model, tokenizer, protocol).perplexity
        start = time.process_time()
        report = tc.recover_(
            model,
            teacher,
            None,
            config,
            tokenizer=tokenizer,
            num_samples=int(2 * steps / 0.92) + 1,
            max_seq_length=256,
            progress=False,
        )
        seconds = time.process_time() - start
        after = perplexity(model, tokenizer, protocol).perplexity
        results[name] = {"before": before, "after": after, "processor_seconds": seconds, "report": report.to_dict()}
        print(f"{name:8} perplexity {before:.3f} -> {after:.3f} in {seconds:.0f} s of processor time")
        for point in report.curve:
            print("  " + "  ".join(f"{k} {v:.4g}" for k, v in point.items()))
        output.write_text(json.dumps(results, indent=1) + "\n")
    if "student" in results:
        lost, left = (results["student"][k] - dense.perplexity for k in ("before", "after"))
        print(f"{1 - left / lost:.0%} of the lost perplexity is back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("recovery.json"))
    parser.add_argument("--student", type=Path, help="folder that keeps the compressed model between runs")
    parser.add_argument("--models", nargs="+", choices=["student", "control"], default=["student", "control"])
    options = parser.parse_args()
    main(options.ratio, options.steps, options.output, options.student, options.models)
