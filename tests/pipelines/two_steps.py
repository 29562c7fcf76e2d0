"""A pipeline of two small steps that write into $DIARY when they run, for the tests of the local runner."""

from pathlib import Path

from kfp import dsl
from kfp.compiler import Compiler
from kfp.dsl import HTML, Artifact, Input, Output


@dsl.component(base_image="slmops/base:test", install_kfp_package=False)
def first(rows: str, made: Output[Artifact], report: Output[HTML]) -> None:
    """Copies the rows."""
    import os
    from pathlib import Path

    from slmops.progress import log
    from slmops.step import step

    with step("first"), open(os.environ["DIARY"], "a") as entries:
        entries.write("first\n")
        log.info("first has something to say")
        Path(made.path).mkdir()
        (Path(made.path) / "rows").write_text(Path(rows).read_text())
        Path(report.path).write_text("<h1>first</h1>")


@dsl.component(base_image="slmops/base:test", install_kfp_package=False)
def second(how: str, made: Input[Artifact], result: Output[Artifact]) -> None:
    """Ends as it is told to."""
    import os
    import signal
    import time
    from pathlib import Path

    from slmops import errors
    from slmops.progress import log
    from slmops.step import step

    with step("second"), open(os.environ["DIARY"], "a", buffering=1) as entries:
        entries.write("second\n")
        log.info("second works in %s", os.environ["SLMOPS_WORK_DIR"])
        if how == "crash":
            raise ValueError("a defect")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how not in ("go", "sleep"):
            raise getattr(errors, how)("what is wrong, what was found, what to do")
        if how == "sleep" and not Path(os.environ["DIARY"] + ".go").exists():
            Path(os.environ["DIARY"] + ".go").touch()
            time.sleep(60)
            entries.write("second slept on\n")
        Path(result.path).write_text((Path(made.path) / "rows").read_text())


@dsl.pipeline(name="two-steps")
def two_steps(rows: str, how: str = "go") -> None:
    """Runs first, then second.

    Args:
        rows: A file that the first step reads.
        how: How the second step ends: go, sleep, crash, kill, or the name of an error.
    """
    made = first(rows=rows).set_display_name("make-rows")
    second(how=how, made=made.outputs["made"]).set_env_variable("SLMOPS_WORK_DIR", "/only/in/a/cluster")


@dsl.component(base_image="slmops/base:test", install_kfp_package=False)
def look_up(rows: str, found: Output[Artifact]) -> None:
    """Writes what it finds at the moment."""
    import os
    from pathlib import Path

    from slmops import artifacts
    from slmops.step import step

    with step("look_up"), open(os.environ["DIARY"], "a") as entries:
        entries.write("look_up\n")
        with artifacts.writing(Path(found.path), kind="variants", step="look_up") as draft:
            (draft.path / "rows").write_text(Path(rows).read_text().split()[0])
            draft.facts |= {"status": "found", "release": {"text": Path(rows).read_text()}}
        found.metadata.update(draft.sidecar.metadata())


@dsl.pipeline(name="looked-up")
def looked_up(rows: str) -> None:
    """Looks something up, each time anew, and does something with it.

    Args:
        rows: A file that the first step reads.
    """
    found = look_up(rows=rows).set_caching_options(False)
    second(how="go", made=found.outputs["found"])


def compile_looked_up(folder: Path) -> Path:
    """Write the compiled pipeline, whose first step is never cached, into `folder`."""
    path = folder / "looked-up.yaml"
    Compiler().compile(looked_up, str(path))
    return path


def compile_two_steps(folder: Path) -> Path:
    """Write the compiled pipeline into `folder`."""
    path = folder / "two-steps.yaml"
    Compiler().compile(two_steps, str(path))
    return path
