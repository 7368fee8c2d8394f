"""Running tinycomp's command line in process."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from tinycomp import cli

PROTOCOL = "ppl/sotu-2013-2014/64/64/token/first-128"
SMALL = ["--num-calibration-samples", "4", "--max-seq-length", "32"]


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def as_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def compress(folder: Path, out: Path, text: Path, *more: object):
    return run("compress", folder, "--output-dir", out, "--data", text, *SMALL, *more)
