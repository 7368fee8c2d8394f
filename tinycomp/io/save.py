"""Writing a result: an ordinary Hugging Face folder plus recipe, report and model card; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tinycomp.plain import plain

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "source.spm", "target.spm",
)  # fmt: skip
RECIPE = "tinycomp_recipe.yaml"
REPORT = "tinycomp_report.json"


def check_output_dir(out_dir: str | os.PathLike[str], force: bool = False) -> Path:
    """Refuse a folder that cannot take the result, before any work is done. Returns its absolute path.

    Raises:
        ValueError: it is a file, or not empty and `force` is false.
        RuntimeError: it or its nearest existing parent is not writable.
    """
    path = Path(out_dir).expanduser().absolute()
    if path.is_file():
        raise ValueError(f"save: output folder {path} is a file; name another folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise ValueError(f"save: output folder {path} is not empty; name another folder, empty it, or pass --force")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()  # asking for permission bits is wrong for root and mounts
    except OSError as error:
        raise RuntimeError(
            f"save: cannot write in {parent} ({error.strerror}); name an output folder that you may write"
        ) from error
    return path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Refuse while another process works towards `path`. The system frees the lock however a process ends."""
    lock = FileLock(path.parent / f".{path.name}.tinycomp-lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RuntimeError(
            f"save: another process is writing {path}; wait until it is done, or name another output folder"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _copy_companions(source: Path, folder: Path) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _publish(temporary: Path, path: Path, force: bool) -> None:
    """Put the finished folder in place; an old one steps aside first and returns if the rename fails."""
    check_output_dir(path, force)  # another process may have filled it since
    aside = temporary.with_name(temporary.name + ".old")
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    if aside.exists():
        shutil.rmtree(aside)


def save_model(
    model: Any,
    tokenizer: Any | None,
    out_dir: str | os.PathLike[str],
    report: dict[str, Any],
    recipe: dict[str, Any],
    force: bool = False,
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """Write model, tokenizer, recipe, report and card to `out_dir`, through a temporary sibling and one rename.

    Args:
        model: a transformers model, compressed or not.
        tokenizer: saved beside it unless `source` has tokenizer files to copy; None for none.
        out_dir: see `check_output_dir`.
        report: JSON, written to tinycomp_report.json and shown in the model card.
        recipe: JSON that repeats the job: {"model", "methods", "command", ...}, written as YAML.
        force: replace what is in `out_dir`.
        source: the folder the model came from; its tokenizer, processor and generation files are copied unchanged.
    """
    path = check_output_dir(out_dir, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if source is not None and os.path.isdir(source):
            _copy_companions(Path(source), temporary)
        (temporary / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
        text = json.dumps(plain(report), indent=1, sort_keys=True, allow_nan=False)
        (temporary / REPORT).write_text(text + "\n")
        (temporary / "README.md").write_text(model_card(report, recipe))
        temporary.chmod(0o755)  # mkdtemp makes private folders
        _publish(temporary, path, force)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise RuntimeError(
                f"save: cannot write the weights in {path.parent} ({error}); free space there"
            ) from error
        raise
    return path


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def model_card(report: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Markdown card with Hub front matter, the figures of the report, and the command that made the model."""
    methods = [str(name) for name in recipe.get("method_names", [])]
    base = str(recipe.get("model", ""))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["tinycomp", *(m.lower() for m in methods)]}
    if base and not os.path.exists(base):
        front |= {"base_model": base, "base_model_relation": "quantized"}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
    lines += [f"# {Path(base).name or 'Model'}, compressed with tinycomp ({', '.join(methods) or 'no method'})", ""]
    rows = [
        ("parameters before", report.get("parameters_before")),
        ("parameters after", report.get("parameters_after")),
        ("targeted parameters kept, asked", report.get("ratio_requested")),
        ("targeted parameters kept, achieved", report.get("ratio_achieved")),
        ("seconds to compress", report.get("seconds")),
    ]
    for result in report.get("evaluations", []):
        rows.append((f"perplexity, {result['protocol']} ({result['hash']})", result["perplexity"]))
    lines += ["| figure | value |", "|---|---|"]
    lines += [f"| {name} | {_number(value)} |" for name, value in rows if value is not None]
    needs = recipe.get("quant_method") == "tinycomp"
    lines += ["", "## Use", "", "```python"]
    lines += ["import tinycomp  # registers the layers this checkpoint uses"] if needs else []
    kind = recipe.get("model_class", "AutoModel")
    lines += [
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    lines += [
        "`tinycomp inspect` on this folder lists every changed module."
        if needs
        else "This is a plain transformers model.",
        "",
    ]
    if recipe.get("command"):
        lines += ["Made with:", "", "```bash", str(recipe["command"]), "```", ""]
    return "\n".join(lines)
