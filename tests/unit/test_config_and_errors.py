"""Settings complain completely and in the user's terms; errors carry the exit code that says whether to retry."""

from __future__ import annotations

import errno
import importlib
import inspect
import pkgutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import Field

import slmops
from slmops import errors
from slmops.config import Config
from slmops.errors import ArtifactError, ConfigError, DiskFullError, explain_os_errors
from slmops.step import TERMINATION_LOG, step


class ExampleConfig(Config):
    """Settings of an example."""

    bits: int = Field(default=8, ge=4, le=16)
    """Bits per weight."""
    name: str = Field(min_length=1)
    """A name."""


def config_classes() -> Iterator[type[Config]]:
    for module in pkgutil.iter_modules(slmops.__path__):
        if module.ispkg and Path(str(slmops.__path__[0]), module.name, "config.py").is_file():
            found = importlib.import_module(f"slmops.{module.name}.config")
            for _, item in inspect.getmembers(found, inspect.isclass):
                if issubclass(item, Config) and item.__module__ == found.__name__:
                    yield item


def test_all_problems_come_together_with_what_was_found() -> None:
    with pytest.raises(ConfigError) as failure:
        ExampleConfig.create({"bits": 3, "nam": "x"})
    message = str(failure.value)
    assert message.startswith("ExampleConfig:")
    assert "bits: input should be greater than or equal to 4, got 3" in message
    assert "name: field required" in message
    assert "nam: extra inputs are not permitted" in message
    with pytest.raises(ConfigError, match=r"^ExampleConfig: bits: .*, got 17$"):
        ExampleConfig.create({"bits": 17, "name": "x"})


def test_a_component_picks_its_fields_and_leaves_artifacts_aside() -> None:
    config = ExampleConfig.pick({"bits": 4, "name": "x", "model": object()})
    assert config == ExampleConfig(bits=4, name="x")
    assert config.parameters("name") == {"bits": 4}
    with pytest.raises(ValueError, match="frozen"):
        config.bits = 5  # type: ignore[misc]


@pytest.mark.parametrize("config", list(config_classes()), ids=lambda config: config.__name__)
def test_every_setting_says_what_it_is_and_fits_a_kfp_parameter(config: type[Config]) -> None:
    for name, field in config.model_fields.items():
        assert field.description, f"{config.__name__}.{name} has no line that says what it is"
        assert "\n" not in field.description.strip(), f"{config.__name__}.{name}"
        for scalar in scalars(field.annotation):
            assert scalar in (int, float, str, bool, dict), f"{config.__name__}.{name}: {scalar} fits no KFP parameter"


def scalars(annotation: object) -> list[object]:
    """The types that a field may hold, those in a list or Literal among them; settings within settings are a dict."""
    if get_origin(annotation) is Literal:
        return [type(value) for value in get_args(annotation)]
    if get_origin(annotation) is list:
        return [scalar for item in get_args(annotation) for scalar in scalars(item)]
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Config)):
        return [dict]
    return [annotation]


def test_exit_codes_say_whether_a_retry_may_help() -> None:
    leaves = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, errors.SlmopsError)]
    for error in leaves:
        if issubclass(error, errors.Stopped):
            assert error.exit_code == 128 + signal.SIGTERM
        elif issubclass(error, errors.TransientError):
            assert error.exit_code == 75
        elif issubclass(error, errors.GateError):
            assert error.exit_code == 3
        elif issubclass(error, errors.UserError):
            assert error.exit_code == 2
        assert error is errors.SlmopsError or error.__name__ in (errors.__doc__ or ""), "drawn in the tree"


def test_a_step_ends_with_one_clear_line_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "termination"))
    with pytest.raises(SystemExit) as stopped, step("prepare_data"):
        raise errors.StoreUnavailable("the store does not answer; try again")
    assert stopped.value.code == 75
    assert capsys.readouterr().err == "error: prepare_data: the store does not answer; try again\n"
    assert (tmp_path / "termination").read_text().startswith("prepare_data: the store does not answer; try again")
    with pytest.raises(ZeroDivisionError), step("prepare_data"):
        raise ZeroDivisionError  # a defect keeps its traceback


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, DiskFullError, "no space left while writing .*; free some space and run the same command again"),
        (errno.EDQUOT, DiskFullError, "no space left"),
        (errno.ENOENT, ArtifactError, "/x does not exist; check the path"),
        (errno.EACCES, ArtifactError, "/x cannot be opened: permission denied; check its owner and mode"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_errors_of_the_operating_system_say_what_to_do(number: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), explain_os_errors("/x"):
        raise OSError(number, errno.errorcode[number] if number != errno.EIO else "Input/output error")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_full_disk() -> None:
    with (
        pytest.raises(DiskFullError, match="free some space"),
        explain_os_errors("/dev/full"),
        open("/dev/full", "w") as f,
    ):
        f.write("x" * 100_000)
