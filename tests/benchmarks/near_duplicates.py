"""prepare_data on 10⁴, 10⁵ and 10⁶ rows, and its removal of near duplicates beside datatrove's, on one core.

    python -m tests.benchmarks.near_duplicates --peer .venv-bench/bin/python

The rows are made here, by seed: about 300 bytes of words as frequent as in text, 3 % of them copies of a row before,
5 % of them such a row with one or two words replaced; 30 % hold a number and 2 % an e-mail address. Each measurement
is a process of its own, bound to one core; the contestants take turns. datatrove gets the same runs of five words,
the same number of bands and hashes, and the same idea of a word: what stands between spaces. Its own English
tokenizer takes longer, and needs spaCy. It needs the extras io and processing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SEED = 7
VOCABULARY_SIZE = 30_000
COPY_FRACTION, NEAR_COPY_FRACTION = 0.03, 0.05
NUMBERS_FRACTION, EMAIL_FRACTION = 0.3, 0.02
REMEMBERED_ROWS = 10_000
THRESHOLD = 0.8
CHUNK_ROWS = 10_000
PEER_SCRIPT = Path(__file__).with_name("datatrove_minhash.py")


def make_rows(path: Path, num_rows: int) -> None:
    """Write rows of `prompt` and `completion`, and of `text` for both, which is what datatrove reads."""
    import numpy as np

    chance = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(chance.choice(letters, size)) for size in chance.integers(2, 9, VOCABULARY_SIZE)]
    frequencies = np.cumsum(1 / np.arange(10, VOCABULARY_SIZE + 10))
    frequencies /= frequencies[-1]
    remembered: list[list[str]] = []
    with open(path, "w") as file:
        for number in range(num_rows):
            kind = chance.random()
            if remembered and kind < COPY_FRACTION + NEAR_COPY_FRACTION:
                row = list(remembered[chance.integers(len(remembered))])
                for _ in range(0 if kind < COPY_FRACTION else chance.integers(1, 3)):
                    row[chance.integers(len(row))] = words[chance.integers(VOCABULARY_SIZE)]
            else:
                places = np.searchsorted(frequencies, chance.random(chance.integers(30, 65)))
                row = [words[place] for place in places.tolist()]
                if kind > 1 - NUMBERS_FRACTION:
                    row[chance.integers(len(row))] = str(chance.integers(10_000))
                if kind > 1 - EMAIL_FRACTION:
                    row[chance.integers(len(row))] = f"{row[0]}@{row[1]}.example"
            remembered[number % REMEMBERED_ROWS : number % REMEMBERED_ROWS + 1] = [row]
            cut = len(row) * 3 // 4
            prompt, completion = " ".join(row[:cut]), " ".join(row[cut:])
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def whole_step(source: Path, directory: Path) -> int:
    """The step as a pipeline runs it, near duplicates removed; returns how many rows came out."""
    from slmops.prepare_data.config import PrepareDataConfig
    from slmops.prepare_data.run import run

    config = PrepareDataConfig(
        source_uri=str(source), near_duplicates="remove", near_duplicate_threshold=THRESHOLD, max_rows=10_000_000
    )
    prepared = run(
        config,
        train=directory / "train",
        validation=directory / "validation",
        test=directory / "test",
        report=directory / "report.html",
    )
    return sum(int(sidecar.facts["num_rows"]) for sidecar in prepared)


def near_duplicates_alone(source: Path, directory: Path) -> int:
    """Read, find and drop near duplicates, write the rest: what datatrove does, by the functions of the step."""
    import numpy as np

    from slmops.prepare_data.duplicates import NUM_HASHES, SHINGLE_WORDS, MinHasher, cluster
    from slmops.prepare_data.selection import bands_of
    from slmops.prepare_data.spool import Spool
    from slmops.prepare_data.words import hash_runs, hash_words

    hasher, chunk_rows = MinHasher(THRESHOLD), []
    with Spool(directory / "spool", {}) as spool:
        with open(source, "rb") as lines:
            while chunk := [line for _, line in zip(range(CHUNK_ROWS), lines, strict=False)]:
                rows = [json.loads(line) for line in chunk]
                texts = [f"{row['prompt']} {row['completion']}" for row in rows]
                signatures, bands = hasher.sign(hash_runs(hash_words(texts), SHINGLE_WORDS))
                spool.append("signatures.bin", np.ascontiguousarray(signatures).data)
                spool.append("bands.bin", bands.data)
                chunk_rows.append(len(chunk))
            spool.commit({})
        numbers = np.arange(sum(chunk_rows))
        roots = cluster(
            bands_of(spool, chunk_rows),
            numbers,
            numbers,
            lambda some: spool.records("signatures.bin", np.uint16, (NUM_HASHES,), some),
            THRESHOLD,
        ).roots()
        keep = (roots == numbers).tolist()
        with open(source, "rb") as lines, open(directory / "kept.jsonl", "wb") as kept:
            kept.writelines(line for line, wanted in zip(lines, keep, strict=True) if wanted)
    return sum(keep)


OURS: dict[str, Callable[[Path, Path], int]] = {"step": whole_step, "near": near_duplicates_alone}


def measure(command: list[str], directory: Path) -> dict[str, float]:
    """Run a command that prints how many rows it kept as its last line, bound to one core.

    Returns:
        Seconds of the whole process, its peak resident memory in MB, and the rows that it kept.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    core = max(os.sched_getaffinity(0))
    started = time.monotonic()
    with open(directory / "output", "w+") as output, open(directory / "log", "w+") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command, str(directory)],
            stdout=output,
            stderr=log,
            env=os.environ | one_thread,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        output.seek(0)
        printed = output.read().split()
        if process.returncode or not printed:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu_seconds, "peak_mb": usage.ru_maxrss / 1000, "kept": int(printed[-1])}


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=os.environ.get("SLMOPS_BENCH_PYTHON"), help="python of a venv with datatrove")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--peer-rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--directory", type=Path, help="where the rows are kept; a temporary folder by default")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "SOURCE", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, source, directory = arguments.one
        print(OURS[what](Path(source), Path(directory)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.directory or Path(temporary)
        sources = {count: folder / f"rows-{count}.jsonl" for count in {*arguments.rows, *arguments.peer_rows}}
        for count, source in sources.items():
            if not source.exists():
                make_rows(source, count)
        if arguments.rows:
            print_steps(arguments.rows, sources, folder / "work")
        if arguments.peer and arguments.peer_rows:
            print_peers(arguments.peer, arguments.peer_rows, sources, folder / "work")


def ours(what: str, source: Path) -> list[str]:
    """The command for one of OURS, without the directory."""
    return [sys.executable, "-m", "tests.benchmarks.near_duplicates", "--one", what, str(source)]


def print_steps(counts: list[int], sources: dict[int, Path], work: Path) -> None:
    """The whole step at each number of rows."""
    print("| rows | MB | seconds | CPU seconds | rows/s | µs a row | peak MB | rows kept |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in counts:
        found = measure(ours("step", sources[count]), work)
        megabytes = sources[count].stat().st_size / 1e6
        print(
            f"| {count:,} | {megabytes:.0f} | {found['seconds']:.1f} | {found['cpu']:.1f} "
            f"| {count / found['seconds']:,.0f} | {1e6 * found['seconds'] / count:.0f} | {found['peak_mb']:.0f} "
            f"| {found['kept']:,} |",
            flush=True,
        )


def print_peers(peer: str, counts: list[int], sources: dict[int, Path], work: Path) -> None:
    """The contestants in turns, twice, the better of each; by CPU time, so that neighbours count for less."""
    from slmops.prepare_data.duplicates import SHINGLE_WORDS, MinHasher

    hasher = MinHasher(THRESHOLD)
    shape = [str(SHINGLE_WORDS), str(hasher.num_bands), str(hasher.band_size)]
    print(f"\nruns of {shape[0]} words, {shape[1]} bands of {shape[2]} hashes, similarity {THRESHOLD}\n")
    print("| rows | what | seconds | CPU seconds | of datatrove's CPU time | peak MB | rows kept |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in counts:
        source = sources[count]
        contestants = {
            "datatrove": [peer, str(PEER_SCRIPT), *shape, str(source)],
            "slmops, near duplicates alone": ours("near", source),
            "slmops, the whole step": ours("step", source),
        }
        best: dict[str, dict[str, float]] = {}
        for _ in range(2 if count <= 100_000 else 1):
            for name, command in contestants.items():
                found = measure(command, work)
                if name not in best or found["cpu"] < best[name]["cpu"]:
                    best[name] = found
        reference = best["datatrove"]["cpu"]
        for name, found in best.items():
            print(
                f"| {count:,} | {name} | {found['seconds']:.1f} | {found['cpu']:.1f} "
                f"| {found['cpu'] / reference:.2f} | {found['peak_mb']:.0f} | {found['kept']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
