"""How much of its perplexity a compressed SmolLM2 gets back, against the processor time spent; and the control.

    python bench/recovery.py [--ratio 0.8] [--output recovery.json] [--work folder] [FIELD=VALUE ...]

The student is SVD at `ratio` of the linear parameters. Control: the uncompressed model through the same recipe. Time is
that of all threads of the process (15 minutes on 2 cores are 1,800 s); it holds the teacher's pass, the closed form,
training and the judgements, not the compression and the perplexities. Perplexity is measured on text that neither
training nor the judgements see.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import tinycomp as tc
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.io import default_model
from tinycomp.recovery import make_config

RECIPE = {
    "steps": 24, "batch_size": 4, "gradient_accumulation": 4, "train": "lora", "learning_rate": 3e-4, "warmup_steps": 4,
    "kl": 1.0, "heal_samples": 32, "eval_every": 6, "held_out": 0.04,
}  # fmt: skip
LENGTH = 256


def the_student(teacher: Any, tokenizer: Any, ratio: float, folder: Path | None) -> Any:
    """SVD at `ratio`; kept in `folder` between runs."""
    if folder is not None and folder.exists():
        return tc.load_model(folder)[0]
    student = copy.deepcopy(teacher)
    tc.compress_(student, tc.SVD(ratio=ratio), tokenizer=tokenizer, num_calibration_samples=16)
    if folder is not None:
        student.save_pretrained(folder)
    return student


def main(options: argparse.Namespace) -> None:
    teacher, tokenizer = tc.load_model(default_model())
    protocol = DEFAULT.shortened(options.tokens)
    config = make_config(options.settings, **RECIPE)
    samples = int(config.steps * config.batch_size * config.gradient_accumulation / (1 - config.held_out)) + 1
    sizes: dict[str, Any] = {"tokenizer": tokenizer, "num_samples": samples, "max_seq_length": LENGTH}
    dense = perplexity(teacher, tokenizer, protocol)
    results: dict[str, Any] = {
        "protocol": protocol.name, "hash": dense.hash, "dense": dense.perplexity, "config": config.model_dump(),
        "samples": samples, "length": LENGTH,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        start = time.process_time()
        tc.cache_teacher(teacher, None, work / "teacher", config, progress=False, **sizes)
        results["teacher_seconds"] = time.process_time() - start
        for name in options.models:
            model = (
                the_student(teacher, tokenizer, options.ratio, options.student) if name == "student"
                else copy.deepcopy(teacher)
            )  # fmt: skip
            before = perplexity(model, tokenizer, protocol).perplexity
            start = time.process_time()
            report = tc.recover_(
                model, work / "teacher", None, config, output_dir=work / name, resume=True, progress=False, **sizes
            )
            seconds = time.process_time() - start + results["teacher_seconds"]
            after = perplexity(model, tokenizer, protocol).perplexity
            results[name] = {"before": before, "after": after, "processor_seconds": seconds, "report": report.to_dict()}
            print(f"{name:8} perplexity {before:.3f} -> {after:.3f} in {seconds:.0f} s of processor time", flush=True)
            for point in report.curve:
                print("  " + "  ".join(f"{k} {v:.4g}" for k, v in point.items()), flush=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    if "student" in results:
        lost, left = (results["student"][k] - dense.perplexity for k in ("before", "after"))
        print(f"{1 - left / lost:.0%} of the lost perplexity is back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--output", type=Path, default=Path("recovery.json"))
    parser.add_argument("--tokens", type=int, default=2048, help="of the evaluation text")
    parser.add_argument("--work", type=Path, help="folder for the teacher's answers and checkpoints")
    parser.add_argument("--student", type=Path, help="folder that keeps the compressed model between runs")
    parser.add_argument("--models", nargs="+", choices=["student", "control"], default=["student", "control"])
    main(parser.parse_args())
