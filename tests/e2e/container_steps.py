"""A pipeline of one step that looks at the container it runs in, for the tests of `slmops run --runner docker`."""

from pathlib import Path

from kfp import dsl
from kfp.compiler import Compiler
from kfp.dsl import Artifact, Output


def compile_looking(folder: Path, image: str) -> Path:
    """Write the compiled pipeline, whose step runs in `image`, into `folder`."""

    @dsl.component(base_image=image, install_kfp_package=False)
    def look(how: str, data_uri: str, store_uri: str, addresses: list[str], found: Output[Artifact]) -> None:
        """Writes down what it finds, or ends as it is told to."""
        import json
        import os
        import signal
        import socket
        import time
        from pathlib import Path

        from slmops import errors
        from slmops.progress import log
        from slmops.step import step

        def reaches(address: str) -> bool:
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=3).close()
            except OSError:
                return False
            return True

        def may_write(folder: str) -> bool:
            try:
                (Path(folder) / "written").touch()
            except OSError:
                return False
            return True

        with step("look"):
            log.info("the step begins")
            if how == "crash":
                raise ValueError("a defect")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "sleep" and not (Path(os.environ["SLMOPS_WORK_DIR"]) / "began").exists():
                (Path(os.environ["SLMOPS_WORK_DIR"]) / "began").touch()
                time.sleep(120)
            if how not in ("go", "sleep"):
                raise getattr(errors, how)("what is wrong, what was found, what to do")
            status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
            stored = "not asked"
            if store_uri.startswith("s3://"):
                from slmops.storage import open_store

                open_store(store_uri).create("looked", b"from a container")
                stored = open_store(store_uri).read("looked", 100).decode()
            Path(found.path).write_text(
                json.dumps(
                    {
                        "ids": [os.getuid(), os.getgid()],
                        "capabilities": [status[n].strip() for n in ("CapEff", "CapPrm", "CapBnd")],
                        "no_new_privileges": status["NoNewPrivs"].strip(),
                        "interfaces": sorted(os.listdir("/sys/class/net")),
                        "reached": [address for address in addresses if reaches(address)],
                        "writable": [f for f in ("/", "/opt/slmops", "/etc", "/tmp", "/dev/shm") if may_write(f)],
                        "data": Path(data_uri).read_text(),
                        "data_writable": os.access(data_uri, os.W_OK),
                        "stored": stored,
                        "credentials": sorted(n for n in os.environ if n.startswith("AWS_")),
                    }
                )
            )

    @dsl.pipeline(name="looking")
    def looking(data_uri: str, how: str = "go", store_uri: str = "", addresses: list[str] = []) -> None:  # noqa: B006
        """Looks around.

        Args:
            data_uri: A file.
            how: How the step ends: go, sleep, crash, kill, or the name of an error.
            store_uri: A store to write to.
            addresses: host:port of what it tries to reach.
        """
        task = look(how=how, data_uri=data_uri, store_uri=store_uri, addresses=addresses)
        task.set_env_variable("SLMOPS_WORK_DIR", "/only/in/a/cluster")

    path = folder / "looking.yaml"
    Compiler().compile(looking, str(path))
    return path
