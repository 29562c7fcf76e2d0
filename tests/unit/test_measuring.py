"""Limits, energy and token counts of a measurement: on the kernel's own files where that can be, else on a copy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slmops.errors import SlmopsError
from slmops.inference.batched import BatchedRuntime
from slmops.inference.genai import GenAIRuntime, TokenizedRuntime
from slmops.measuring import energy, limits, process, streams
from slmops.measuring.limits import MIB, Limits
from slmops.measuring.worker import peak_rss_bytes
from tests.limited import needs_cgroup

HOLD = "x = bytearray({size}); import time; print('held', flush=True); time.sleep({sleep_s})"


def groups() -> list[Path]:
    """The cgroups of measured processes that there are below this process's own."""
    return [path for parent, _ in limits._parents(Path("/proc/self")) for path in parent.glob(f"{limits.PREFIX}*")]


@needs_cgroup
def test_a_process_that_takes_more_than_its_limit_is_ended_and_its_cgroup_is_gone() -> None:
    with limits.memory_group(64 * MIB) as group:
        assert group
        assert group.path in groups()
        code = HOLD.format(size=200 * MIB, sleep_s=0)
        ended = subprocess.run(group.command([sys.executable, "-c", code]), capture_output=True)
        assert ended.returncode == -signal.SIGKILL
        assert limits.num_killed(group) == 1
    assert not group.path.exists()


@needs_cgroup
def test_a_process_within_its_limit_ends_by_itself_and_counts_from_its_start() -> None:
    with limits.memory_group(256 * MIB) as group:
        assert group
        shown = subprocess.run(
            group.command([sys.executable, "-c", "print(open('/proc/self/cgroup').read())"]),
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert group.path.name in shown
        assert limits.num_killed(group) == 0


@needs_cgroup
def test_the_cgroup_is_removed_with_what_still_runs_in_it() -> None:
    with limits.memory_group(256 * MIB) as group:
        assert group
        code = HOLD.format(size=1, sleep_s=60)
        running = subprocess.Popen(group.command([sys.executable, "-c", code]), stdout=subprocess.PIPE)
        assert running.stdout
        running.stdout.readline()
    assert running.wait(timeout=10) == -signal.SIGKILL
    running.stdout.close()
    assert not group.path.exists()


@needs_cgroup
def test_what_a_killed_measurement_leaves_the_next_one_removes() -> None:
    code = """
        import subprocess, sys, time
        from slmops.measuring import limits
        with limits.memory_group(1 << 28) as group:
            subprocess.Popen(group.command([sys.executable, "-c", "import time; time.sleep(60)"]))
            print(group.path, flush=True)
            time.sleep(60)
    """
    maker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout
    left = Path(maker.stdout.readline().strip())
    with limits.memory_group(MIB):
        assert left.exists(), "its maker is alive"
    maker.kill()
    maker.wait()
    maker.stdout.close()
    assert left.exists()
    with limits.memory_group(MIB):
        assert not left.exists()


@needs_cgroup
def test_ctrl_c_leaves_no_cgroup_and_no_worker(tiny_variants: Path, tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from slmops.measuring import limits, process
        from slmops.measuring.limits import Limits
        task = process.Task(quantized=True, num_threads=1, max_new_tokens=512,
                            prompts=[[{{"role": "user", "content": "go"}}]] * 10_000)
        with limits.memory_group(1 << 30) as group:
            print(group.path, flush=True)
            process.run_worker(Path({str(tiny_variants / "cpu-int4")!r}), task, Limits(1, 1 << 30), group)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout
    group = Path(run.stdout.readline().strip())
    while not (members := (group / "cgroup.procs").read_text().split()):
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(timeout=30) == -signal.SIGINT
    run.stdout.close()
    assert not group.exists()
    assert not Path(f"/proc/{members[0]}").exists()


def test_a_cgroup_of_version_2_gets_its_limit_and_no_swap(tmp_path: Path) -> None:
    """On ordinary files: a machine has one version only. The kernel would make the files, and the limits real."""
    process_files = write_process_files(tmp_path, "0::/user.slice/session.scope\n", "cgroup2", "rw")
    hierarchy = tmp_path / "sys"
    own = hierarchy / "user.slice" / "session.scope"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("\n")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (hierarchy / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (found, version), *others = limits._parents(process_files)
    assert (found, version) == (own.parent, 2), "the nearest that passes memory on, as the own one holds processes"
    assert [path for path, _ in others] == [hierarchy]
    group = limits._make(found, version, 300 * MIB)
    assert group
    assert (group.path / "memory.max").read_text() == str(300 * MIB)
    assert (group.path / "memory.swap.max").read_text() == "0"
    (group.path / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert limits.num_killed(group) == 1


def test_a_container_that_is_shown_its_own_cgroup_as_the_root_is_understood(tmp_path: Path) -> None:
    process_files = write_process_files(tmp_path, "4:memory:/kubepods/pod1/abc\n", "cgroup", "rw,memory")
    (tmp_path / "sys").mkdir()
    assert list(limits._parents(process_files)) == [(tmp_path / "sys", 1)]


def test_where_no_cgroup_may_be_made_there_is_none(tmp_path: Path) -> None:
    process_files = write_process_files(tmp_path, "0::/\n", "cgroup2", "ro")
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys" / "cgroup.subtree_control").write_text("cpu\n")
    with limits.memory_group(MIB, process_files) as group:
        assert group is None


def write_process_files(tmp_path: Path, cgroup: str, kind: str, options: str) -> Path:
    """What procfs says of a process whose cgroups are mounted at `tmp_path`/sys."""
    files = tmp_path / "proc"
    files.mkdir()
    (files / "cgroup").write_text(cgroup)
    (files / "mountinfo").write_text(f"30 23 0:26 / {tmp_path}/sys rw,nosuid shared:4 - {kind} cgroup {options}\n")
    return files


def test_cpus_are_of_different_cores_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert limits.choose_cpus(2, tmp_path) == [0, 2]
    assert limits.choose_cpus(3, tmp_path) == [0, 1, 2]
    assert limits.choose_cpus(9, tmp_path) == [0, 1, 2, 3]


def test_a_process_that_cannot_enter_its_cgroup_is_no_result(tiny_variants: Path, tmp_path: Path) -> None:
    task = process.Task(quantized=True, num_threads=1, max_new_tokens=1, prompts=[[{"role": "user", "content": "a"}]])
    (tmp_path / "memory.events").write_text("oom_kill 0\n")
    group = limits.MemoryGroup(tmp_path, 2)
    (tmp_path / "cgroup.procs").mkdir()
    with pytest.raises(SlmopsError, match="cannot enter"):
        process.run_worker(tiny_variants / "cpu-int4", task, Limits(1, MIB), group)


@pytest.fixture(params=["one batch", "a generator each"])
def runtime(request: pytest.FixtureRequest, tiny_variants: Path) -> TokenizedRuntime:
    directory = tiny_variants / "cpu-int4"
    if request.param == "one batch":
        return BatchedRuntime(directory, num_threads=1, num_slots=4)
    return GenAIRuntime(directory, num_threads=1)


def test_prompts_have_exactly_the_tokens_that_are_asked_for(runtime: TokenizedRuntime) -> None:
    ids = [int(token) for token in runtime.tokenizer.encode("switch the lamp on")]
    lengths = [1, 7, 64, 200]
    found = streams.time_first_tokens(runtime, ids, lengths)
    assert [entry["prompt_tokens"] for entry in found] == lengths
    assert all(1 <= len(entry["first_s"]) <= streams.MAX_SAMPLES for entry in found)
    assert streams.prompt_of([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_answers_at_once_have_their_tokens_counted(runtime: TokenizedRuntime) -> None:
    ids = [int(token) for token in runtime.tokenizer.encode("switch the lamp on in the hall")]
    one, many = streams.decode(runtime, ids, [1, 3], 1024, peak_rss_bytes)
    assert (one["streams"], one["num_tokens"]) == (1, streams.DECODED_TOKENS)
    assert many["streams"] == 3
    # In a batch, the first ones lead by a token for each that comes after them.
    assert 3 * (streams.DECODED_TOKENS - 2) <= many["num_tokens"] <= 3 * streams.DECODED_TOKENS
    # A small context is never overrun.
    (entry,) = streams.decode(runtime, ids, [2], 32, peak_rss_bytes)
    assert 0 < entry["num_tokens"] <= 2 * (32 - 8 - 1)


def test_answers_run_at_once(runtime: TokenizedRuntime) -> None:
    times = runtime.run_streams([[5, 6, 7, number] for number in range(4)], 40)
    assert [len(moments) for moments in times] == [40] * 4
    assert max(moments[0] for moments in times) < min(moments[-1] for moments in times)


def test_energy_is_read_from_the_packages_and_across_a_counters_end(tmp_path: Path) -> None:
    def write(zone: str, name: str, energy_uj: int) -> None:
        (tmp_path / zone).mkdir(exist_ok=True)
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text(f"{energy_uj}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9999999\n")

    assert energy.read(tmp_path) is None, "a machine without counters"
    assert energy.read(tmp_path / "absent") is None
    write("intel-rapl:0", "package-0", 1_000_000)
    write("intel-rapl:1", "package-1", 9_500_000)
    write("intel-rapl:0:0", "core", 7)  # a part of package-0
    write("intel-rapl:2", "psys", 7)  # the whole machine, packages included
    before = energy.read(tmp_path)
    write("intel-rapl:0", "package-0", 3_000_000)
    write("intel-rapl:1", "package-1", 500_000)
    after = energy.read(tmp_path)
    assert before
    assert after
    assert before.joules_until(after) == 2.0 + 1.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy.read(tmp_path) is None, "not half of a machine"


def test_the_edge_image_has_what_a_measurement_needs(tiny_variants: Path) -> None:
    """Everything that its extra does not bring is kept from being imported, in the measured process, too."""
    code = """
        import sys

        ABSENT = {"yaml", "torch", "transformers", "tokenizers", "onnx", "kfp", "kubernetes", "olive", "scipy"}

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ABSENT:
                    raise ModuleNotFoundError(f"{name} is not in the edge image")

        sys.meta_path.insert(0, Refuse())
        import slmops.edge.measure
        from slmops.measuring import worker

        worker.main()
    """
    task = {
        "directory": str(tiny_variants / "cpu-int4"), "quantized": True, "by_token": True, "dtype": "float32",
        "num_threads": 1, "max_new_tokens": 2, "warmup_prompts": [], "prompts": [[{"role": "user", "content": "a"}]],
        "prompt_lengths": [4], "streams": [1], "cpus": [], "context_length": 64,
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], input=json.dumps(task), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["streams"]
