"""`tinycomp export`: one size of an elastic model in a folder, as a model folder of its own."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tinycomp.errors import UsageError


def export_folder(
    source: str, ratio: float, output_dir: str | os.PathLike[str], *, refit: bool = False, data: str | None = None,
    force: bool = False, command: str = "", progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write one size of the elastic model in a folder to another folder.

    Returns:
        JSON: {"output_dir", "plain", "bytes_predicted", "bytes_tensors", "report"}.
    """
    from tinycomp import hf
    from tinycomp.elastic import export, size_at
    from tinycomp.eval.size import size_of
    from tinycomp.inspection import stored_tensors
    from tinycomp.io import check_output_dir, load_model, save_model

    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"--ratio: got {ratio}, allowed above 0 up to 1; change it")
    started = time.perf_counter()
    path = check_output_dir(output_dir, force)
    model, tokenizer = load_model(source)
    planned = size_at(model, ratio)
    new: Any = export(model, ratio, data, refit=refit, tokenizer=tokenizer, progress=progress)
    report = {
        "methods": ["export"],
        "ratio_requested": ratio,
        "ratio_achieved": planned["ratio"],
        "parameters_before": size_of(model, flops=False).parameters,
        "parameters_after": size_of(new, flops=False).parameters,
        "seconds": time.perf_counter() - started,
    }
    plain = hf.plan_of(new) is None
    recipe = {
        "model": source, "model_class": type(new).__name__, "method_names": ["export"],
        "methods": [{"ratio": ratio, "refit": refit, "data": data}], "command": command,
        "quant_method": None if plain else "tinycomp",
    }  # fmt: skip
    save_model(new, tokenizer, path, report, recipe, force, source if os.path.isdir(source) else None)
    stored = sum(size for _, _, size in stored_tensors(path).values())
    sizes = {"bytes_predicted": planned["bytes"], "bytes_tensors": stored}
    return {"output_dir": str(path), "plain": plain, **sizes, "report": report}


def export(
    model: Annotated[str, typer.Argument(help="folder of an elastic model", show_default=False)],
    ratio: Annotated[float, typer.Option(help="fraction of the units' parameters that is kept, in (0, 1]")],
    output_dir: Annotated[Path, typer.Option(help="new folder for the result", show_default=False)],
    refit: Annotated[bool, typer.Option("--refit", help="solve the projections anew on calibration data")] = False,
    data: Annotated[str | None, typer.Option(help=".txt, .jsonl or .parquet; default: bundled speeches")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is in the output folder")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Write one size of an elastic model as a model of its own, a plain one where that is exact."""
    from tinycomp import console

    command = shlex.join(["tinycomp", *sys.argv[1:]])
    result = export_folder(
        model, ratio, output_dir, refit=refit, data=data, force=force, command=command, progress=not as_json
    )
    if as_json:
        console.emit(result)
        return
    for name in ("parameters_before", "parameters_after", "ratio_requested", "ratio_achieved"):
        console.out.print(f"{name.replace('_', ' '):24} {console.cell(result['report'][name])}")
    for name in ("bytes_predicted", "bytes_tensors", "plain"):
        console.out.print(f"{name.replace('_', ' '):24} {console.cell(result[name])}")
    console.out.print(f"saved in {result['output_dir']}", markup=False, soft_wrap=True)
