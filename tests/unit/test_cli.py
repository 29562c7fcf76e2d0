"""The command: what it says when something is wrong, and that its help teaches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from slmops import __version__
from slmops.cli import app
from slmops.errors import ConfigError, SlmopsError

COMMANDS = ("compile", "run", "submit", "doctor", "new", "edge pull", "edge serve")


def _slmops(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slmops.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def _error(*arguments: str) -> str:
    """The message of the error that a command raises."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SlmopsError), result.output
    return str(result.exception)


def test_version() -> None:
    assert _slmops("--version").stdout == f"slmops {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_parses(command: str) -> None:
    found = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]  # type: ignore[attr-defined]
    words = (found.help or "").partition("Example: slmops ")[2].split()
    name, arguments = words[: len(command.split())], words[len(command.split()) :]
    assert name == command.split()
    found.make_context(command, arguments)  # raises on an option that does not exist


def test_an_error_is_one_line_with_an_exit_code(tmp_path: Path) -> None:
    ran = _slmops("run", "distil_to_edge", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith(
        "error: no pipeline is called distil_to_edge; the pipelines are: distill_pair_to_edge, distill_to_edge, "
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_parameters_are_named_together() -> None:
    message = _error("run", "distill_to_edge")
    for name in ("data_uri", "base_model_uri", "store_uri"):
        assert f"--set {name}=..." in message
    assert "channel" not in message


def test_an_unknown_parameter_gets_a_suggestion() -> None:
    message = _error("run", "distill_to_edge", "--set", "data_url=x")
    assert "data_url: no such run-time parameter; did you mean data_uri?" in message
    assert "base_model_uri" in message


def test_an_unknown_field_gets_a_suggestion() -> None:
    message = _error("compile", "distill_to_edge", "--set", "distill.num_epoch=3")
    assert "did you mean distill.num_epochs?" in message


def test_all_wrong_fields_are_told_together() -> None:
    message = _error("compile", "distill_to_edge", "--set", "distill.num_epochs=-1", "--set", "quantize.block_size=7")
    assert "distill.num_epochs" in message
    assert "quantize.block_size" in message


@pytest.mark.parametrize("setting", ["data_uri", "=x", ""])
def test_a_setting_without_key_and_value_is_refused(setting: str) -> None:
    assert "--set takes key=value" in _error("run", "distill_to_edge", "--set", setting)


def test_a_list_that_is_not_json_is_refused() -> None:
    assert "distill.keep_layers: not JSON" in _error("compile", "distill_to_edge", "--set", "distill.keep_layers=[0,")


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    assert "its recipes are: banking77_few_labels, default, demo, smoke" in _error(
        "compile", "distill_to_edge", "--recipe", "fast"
    )


def test_compile_lists_pipelines_and_recipes() -> None:
    output = CliRunner().invoke(app, ["compile"]).output
    assert "distill_to_edge: recipes banking77_few_labels, default, demo, smoke" in output


def test_compile_writes_what_run_takes(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    arguments = ["compile", "distill_to_edge", "--recipe", "smoke", "--set", "distill.num_epochs=2", "-o", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "--set data_uri=..." in _error("run", str(target)), "it is a pipeline with the same parameters"
    assert "its recipe is fixed" in _error("run", str(target), "--recipe", "demo")
    assert "its recipe is fixed" in _error("run", str(target), "--set", "distill.num_epochs=2")


def test_compile_does_not_swallow_run_time_parameters(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    message = _error("compile", "distill_to_edge", "--set", "data_uri=x", "-o", str(target))
    assert "run-time parameters are not compiled in" in message
    assert not target.exists()


@pytest.mark.parametrize("content", ["", "a: 1", "{", "[1, 2]"])
def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.yaml").write_text(content)
    assert "is no compiled pipeline" in _error("run", str(tmp_path / "p.yaml"))


def test_a_pipeline_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in _error("run", str(tmp_path / "p.yaml"))


def test_doctor_tells_a_usable_store_and_a_broken_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    arguments = ["doctor", "--store", str(tmp_path / "store"), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(app, arguments)
    lines = result.output.splitlines()
    assert result.exit_code == 2
    assert f"ok    store: {tmp_path / 'store'} can be written, and keeps conditional writes" in lines
    assert any(line.startswith("fail  model:") and "config.json" in line for line in lines)
    assert any("CPU cores" in line for line in lines)
    assert all(line.split()[0] in {"ok", "warn", "fail"} for line in lines)


def test_errors_are_config_errors() -> None:
    result = CliRunner().invoke(app, ["run", "distill_to_edge", "--set", "nonsense=1"])
    assert isinstance(result.exception, ConfigError)
