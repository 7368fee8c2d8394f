"""`tinycomp elastic` and `tinycomp export`: a model folder with every size in it, and one size of it as a folder."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tinycomp.errors import UsageError

Out = Annotated[Path, typer.Option(help="new folder for the result", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="replace what is in the output folder")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def elastic_folder(
    source: str, path_file: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, attention: bool = True,
    uniform: bool = False, round_to: int = 8, force: bool = False, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write an elastic model made of the model in `source` and a path.

    Returns:
        JSON: {"output_dir", "plain", "report"}.
    """
    from tinycomp.elastic import make_elastic_
    from tinycomp.io import check_output_dir, load_model
    from tinycomp.models import UnitPath, unit_groups

    started = time.perf_counter()
    out = check_output_dir(output_dir, force)
    path = UnitPath.load(path_file)
    model, tokenizer = load_model(source)
    groups = [g for g in unit_groups(model) if g.name in path.entry and (attention or g.kind == "ffn")]
    make_elastic_(model, path, groups=groups, uniform=uniform, round_to=round_to)
    settings = {"path": str(path_file), "attention": attention, "uniform": uniform, "round_to": round_to}
    return _save(source, model, tokenizer, out, "elastic", settings, {}, started, force, command)


def export_folder(
    source: str, ratio: float, output_dir: str | os.PathLike[str], *, refit: bool = False, data: str | None = None,
    force: bool = False, command: str = "", progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write one size of the elastic model in a folder to another folder.

    Returns:
        JSON: {"output_dir", "plain", "report", "bytes_predicted", "bytes_tensors"}.
    """
    from tinycomp.elastic import export, size_at
    from tinycomp.eval.size import size_of
    from tinycomp.inspection import stored_tensors
    from tinycomp.io import check_output_dir, load_model

    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"--ratio: got {ratio}, allowed above 0 up to 1; change it")
    started = time.perf_counter()
    out = check_output_dir(output_dir, force)
    model, tokenizer = load_model(source)
    planned = size_at(model, ratio)
    new = export(model, ratio, data, refit=refit, tokenizer=tokenizer, progress=progress)
    sizes = {"ratio_requested": ratio, "ratio_achieved": planned["ratio"]}
    sizes |= {"parameters_before": size_of(model, flops=False).parameters}
    settings = {"ratio": ratio, "refit": refit, "data": data}
    result = _save(source, new, tokenizer, out, "export", settings, sizes, started, force, command)
    stored = sum(size for _, _, size in stored_tensors(out).values())
    return result | {"bytes_predicted": planned["bytes"], "bytes_tensors": stored}


def _save(
    source: str, model: Any, tokenizer: Any, out: Path, verb: str, settings: dict[str, Any], sizes: dict[str, Any],
    started: float, force: bool, command: str,
) -> dict[str, Any]:  # fmt: skip
    from tinycomp import hf
    from tinycomp.eval.size import size_of
    from tinycomp.io import save_model

    plain = hf.plan_of(model) is None
    report = sizes | {"methods": [verb], "parameters_after": size_of(model, flops=False).parameters}
    report["seconds"] = time.perf_counter() - started
    recipe = {
        "model": source, "model_class": type(model).__name__, "method_names": [verb], "methods": [settings],
        "command": command, "quant_method": None if plain else "tinycomp",
    }  # fmt: skip
    save_model(model, tokenizer, out, report, recipe, force, source if os.path.isdir(source) else None)
    return {"output_dir": str(out), "plain": plain, "report": report}


def elastic(
    model: Annotated[str, typer.Argument(help="model folder, .gguf file or Hub name", show_default=False)],
    path: Annotated[Path, typer.Option(help="file with the order of the units, from a search", show_default=False)],
    output_dir: Out,
    ffn_only: Annotated[bool, typer.Option("--ffn-only", help="leave attention whole")] = False,
    uniform: Annotated[bool, typer.Option("--uniform", help="equal widths, so that exports can be plain")] = False,
    round_to: Annotated[int, typer.Option(min=1, help="widths are multiples of this")] = 8,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model whose every ratio is a prefix of its weights."""
    command = shlex.join(["tinycomp", *sys.argv[1:]])
    result = elastic_folder(
        model, path, output_dir, attention=not ffn_only, uniform=uniform, round_to=round_to, force=force,
        command=command,
    )  # fmt: skip
    _show(result, as_json)


def export(
    model: Annotated[str, typer.Argument(help="folder of an elastic model", show_default=False)],
    ratio: Annotated[float, typer.Option(help="fraction of the units' parameters that is kept, in (0, 1]")],
    output_dir: Out,
    refit: Annotated[bool, typer.Option("--refit", help="solve the projections anew on calibration data")] = False,
    data: Annotated[str | None, typer.Option(help=".txt, .jsonl or .parquet; default: bundled speeches")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one size of an elastic model as a model of its own, a plain one where that is exact."""
    command = shlex.join(["tinycomp", *sys.argv[1:]])
    result = export_folder(
        model, ratio, output_dir, refit=refit, data=data, force=force, command=command, progress=not as_json
    )
    _show(result, as_json)


def _show(result: dict[str, Any], as_json: bool) -> None:
    from tinycomp import console

    if as_json:
        console.emit(result)
        return
    rows = result["report"] | {key: value for key, value in result.items() if key not in ("report", "output_dir")}
    for name, value in rows.items():
        if name != "methods":
            console.out.print(f"{name.replace('_', ' '):24} {console.cell(value)}")
    console.out.print(f"saved in {result['output_dir']}", markup=False, soft_wrap=True)
