"""The command line. Exit codes: 0 ok, 2 usage, 3 refused by a guard, 4 quality gate failed, 130 interrupted.

Code 2 means that the command itself is wrong (an unknown verb, method or field, a ratio out of range); 3 that it was
understood and refused because of the model, the data, the environment or the output folder. Nothing is written then.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinycomp.console import GATE_FAILED, cell, emit, err, guarded, out, table
from tinycomp.errors import UsageError
from tinycomp.exporting import elastic, export
from tinycomp.recovery import recover

QUICK_START = """\
tinycomp makes Hugging Face transformers smaller and faster; the result loads like any other model.
  tinycomp plan MODEL --method cur --ratio 0.8            what it would give; no weights needed
  tinycomp compress MODEL --method auto --ratio 0.8 --output-dir OUT
  tinycomp eval OUT                                       size and perplexity; inspect OUT says what was done
  tinycomp demo      every method on a real model         tinycomp COMMAND --help    tinycomp doctor"""

app = typer.Typer(
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help=__doc__,
)

Model = Annotated[str, typer.Argument(help="model folder, .gguf file or Hub name", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Methods = Annotated[str, typer.Option("--method", help="one name or several in order: cur,svd")]
Ratio = Annotated[float | None, typer.Option(help="fraction of the targeted parameters that is kept, in (0, 1]")]
Preset = Annotated[str | None, typer.Option(help="default, or paper for the published algorithm")]
Seed = Annotated[int | None, typer.Option(help="every random choice derives from it")]
Targets = Annotated[list[str] | None, typer.Option(help="modules to compress: name, re:REGEX or class; repeatable")]
Ignore = Annotated[list[str] | None, typer.Option(help="modules to leave alone, in the same language; repeatable")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE or METHOD.FIELD=VALUE; repeatable")]
ProtocolName = Annotated[str | None, typer.Option("--protocol", help="ppl/TEXT/CONTEXT/STRIDE/token[/first-TOKENS]")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(QUICK_START)


def _configs(
    method: str, ratio: float | None, preset: str | None, seed: int | None, targets: Any, ignore: Any, settings: Any
) -> list[Any]:
    from tinycomp.recipe import make_configs

    return make_configs(
        method, settings or (), ratio=ratio, preset=preset, seed=seed, targets=targets or None, ignore=ignore or None
    )


def _protocol(name: str | None, tokens: int | None = None) -> Any:
    from tinycomp.eval.quality import DEFAULT
    from tinycomp.measure import protocol_of

    try:
        protocol = DEFAULT if name is None else protocol_of(name)
        return protocol if tokens is None else protocol.shortened(tokens)
    except ValueError as error:
        raise UsageError(str(error)) from error


@app.command()
@guarded
def compress(
    model: Model,
    output_dir: Annotated[Path, typer.Option(help="new folder for the result", show_default=False)],
    method: Methods = "auto",
    ratio: Ratio = None,
    preset: Preset = None,
    seed: Seed = None,
    targets: Targets = None,
    ignore: Ignore = None,
    settings: Settings = None,
    data: Annotated[str | None, typer.Option(help=".txt, .jsonl or .parquet; default: bundled speeches")] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(min=1, help="default: 48, paper 128")] = None,
    max_seq_length: Annotated[int | None, typer.Option(min=1, help="default: 512, paper 128")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_perplexity: Annotated[float | None, typer.Option(help="exit 4, writing nothing, when it is higher")] = None,
    protocol: ProtocolName = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run of the same command")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace what is in the output folder")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model and save it as a model folder."""
    configs = _configs(method, ratio, preset, seed, targets, ignore, settings)
    gate = _protocol(protocol) if max_perplexity is not None or protocol is not None else None
    from tinycomp.job import Calibration, run

    result = run(
        model,
        configs,
        output_dir,
        Calibration(data, num_calibration_samples, max_seq_length, batch_size),
        protocol=gate,
        max_perplexity=max_perplexity,
        resume=resume,
        force=force,
        command=shlex.join(["tinycomp", *sys.argv[1:]]),
        progress=not as_json,
    )
    if as_json:
        emit(result)
    else:
        _print_result(result)
    if not result["saved"]:
        err.print(f"error: perplexity {result['evaluation']['perplexity']:.4g} is above {max_perplexity:g}; not saved")
        raise typer.Exit(GATE_FAILED)


def _print_result(result: dict[str, Any]) -> None:
    report = result["report"]
    for name in ("parameters_before", "parameters_after", "ratio_requested", "ratio_achieved", "seconds"):
        out.print(f"{name.replace('_', ' '):24} {cell(report.get(name))}")
    if result["evaluation"]:
        found = result["evaluation"]
        out.print(f"{'perplexity':24} {found['perplexity']:.4g}   {found['protocol']} {found['hash']}")
    for note in report.get("fallbacks", []):
        out.print(f"note: {note}", markup=False)
    if report.get("skipped"):
        out.print(f"left alone: {len(report['skipped'])} modules; tinycomp inspect lists them with reasons")
    if result["saved"]:
        out.print(f"saved in {result['output_dir']}", markup=False, soft_wrap=True)


@app.command()
@guarded
def plan(
    model: Annotated[str, typer.Argument(help="model folder, config.json or Hub name", show_default=False)],
    method: Methods = "auto",
    ratio: Ratio = None,
    preset: Preset = None,
    seed: Seed = None,
    targets: Targets = None,
    ignore: Ignore = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Sizes a compression would give, per matrix and in all, from the config alone."""
    configs = _configs(method, ratio, preset, seed, targets, ignore, settings)
    from tinycomp.job import plan_source

    result = plan_source(model, configs)
    if as_json:
        emit(result)
        return
    rows = [
        [row["path"], "x".join(map(str, row["shape"])), row.get("rank"), row["size_before"], row["size_after"],
         row.get("break_even_rank")]
        for row in result["modules"]
    ]  # fmt: skip
    table("planned", ["module", "shape", "rank", "numbers before", "after", "break-even"], rows)
    for name in ("parameters_before", "parameters_after", "bytes_before", "bytes_after", "ratio_achieved"):
        out.print(f"{name.replace('_', ' '):24} {cell(result.get(name))}")
    for note in result["notes"]:
        out.print(f"note: {note}", markup=False)


@app.command(name="eval")
@guarded
def evaluate(
    model: Model,
    protocol: ProtocolName = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="predictions, instead of the protocol's")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="also time prefill and decode")] = False,
    max_perplexity: Annotated[float | None, typer.Option(help="exit 4 when it is higher")] = None,
    as_json: Json = False,
) -> None:
    """Size, perplexity and speed of a model."""
    chosen = _protocol(protocol, tokens)
    from tinycomp.io import load_model
    from tinycomp.measure import evaluate as measure

    loaded, tokenizer = load_model(model)
    row = {"model": model} | measure(
        loaded, tokenizer, chosen, folder=model if Path(model).is_dir() else None, speed=speed
    )
    if max_perplexity is not None and "perplexity" not in row:
        raise UsageError(
            f"--max-perplexity: {type(loaded).__name__} has no perplexity; it needs a causal language model"
        )
    if as_json:
        emit(row)
    else:
        for name, value in row.items():
            out.print(f"{name.replace('_', ' '):24} {cell(value)}", markup=False, soft_wrap=True)
    if max_perplexity is not None and not row["perplexity"] <= max_perplexity:
        err.print(f"error: perplexity {row['perplexity']:.4g} is above {max_perplexity:g}")
        raise typer.Exit(GATE_FAILED)


@app.command()
@guarded
def inspect(
    folder: Annotated[Path, typer.Argument(help="model folder", show_default=False)], as_json: Json = False
) -> None:
    """What was done to a model, per module, with sizes."""
    from tinycomp.inspection import inspect_folder

    found = inspect_folder(folder)
    if as_json:
        emit(found)
        return
    rows = [
        [m["path"], m.get("layer") or m["op"], m["kwargs"].get("rank") if "kwargs" in m else None, m["size_before"],
         m["numbers"], m["bytes"]]
        for m in found["modules"]
    ]  # fmt: skip
    if rows:
        table("changed modules", ["module", "now", "rank", "numbers before", "after", "bytes"], rows)
    for name in ("model_type", "plain", "numbers", "bytes_weights", "bytes_folder", "recipe"):
        out.print(f"{name.replace('_', ' '):24} {cell(found[name])}", markup=False, soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@guarded
def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="ops, model, gpu (needs one), or a file to compare")] = "ops",
    model_gpu: Annotated[str | None, typer.Option(help="print bounds of a GPU's time: modelled, unmeasured")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="print files that `bench gpu` wrote as a table")] = False,
) -> None:
    """Speed against dense torch and other libraries; further options go to bench/WHAT.py, see its --help."""
    if model_gpu is not None or compare:
        given = ["--compare", what, *context.args] if compare else ["--model", str(model_gpu)]
        what, context.args = "gpu", given
    if what not in ("ops", "model", "gpu"):
        raise UsageError(f"bench: got {what!r}, allowed ops, model, gpu; choose one")
    script = Path(__file__).parent.parent / "bench" / f"{what}.py"
    if not script.is_file():
        raise RuntimeError(f"bench: {script} is missing, benchmarks come with a checkout of the source; run it there")
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args]).returncode)


@app.command()
@guarded
def doctor(as_json: Json = False) -> None:
    """Versions, the native library, and which backend every op uses, with reasons."""
    from tinycomp.doctor import diagnose

    found = diagnose()
    if as_json:
        emit(found)
        return
    for name in ("tinycomp", "python", "system", "cpu_threads", "cpu_capability", "cuda", "plugin", "native"):
        out.print(f"{name:24} {found[name]}", markup=False, soft_wrap=True)
    packages = [[name, version, "required"] for name, version in found["packages"].items()]
    packages += [[name, entry["version"], entry["for"]] for name, entry in found["optional"].items()]
    table("packages", ["package", "version", "for"], packages)
    rows = [[row["op"], row["backend"], row["available"], row["active"], row["reason"]] for row in found["ops"]]
    table("ops", ["op", "backend", "available", "active", "reason"], rows)


@app.command()
@guarded
def demo(
    model: Annotated[str | None, typer.Argument(help="default: SmolLM2-135M from its package")] = None,
    output_dir: Annotated[Path, typer.Option()] = Path("demo_out"),
    ratio: Annotated[list[float] | None, typer.Option(help="default: 0.8 and 0.5; repeatable")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="default: 0; repeatable")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="evaluation tokens")] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(min=1)] = None,
    full: Annotated[
        bool, typer.Option("--full", help="three models, two tracks, three seeds; a killed run continues")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace what is in the output folder")] = False,
    as_json: Json = False,
) -> None:
    """Compress a real model with every method, print one table, and prove that the result reloads."""
    command = shlex.join(["tinycomp", *sys.argv[1:]])
    chosen: dict[str, Any] = {"ratios": ratio, "seeds": seed, "tokens": tokens}
    chosen["num_calibration_samples"] = num_calibration_samples
    if full:
        from tinycomp.tracks import run_tracks

        given: dict[str, Any] = {key: value for key, value in chosen.items() if value}
        results = run_tracks(output_dir, model, **given, force=force, quiet=as_json, command=command)
        if not as_json:
            out.print((output_dir / "report.md").read_text(), markup=False, highlight=False)
    else:
        from tinycomp.demo import Demo, run_demo

        results = run_demo(model, output_dir, Demo().changed(**chosen), force=force, quiet=as_json, command=command)
    if as_json:
        emit(results)


for verb in (recover, elastic, export):
    app.command()(guarded(verb))
