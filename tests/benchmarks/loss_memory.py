"""Peak memory of a distillation loss over vocabularies of 32k, 128k and 256k tokens: ours, and over full logits.

    python -m tests.benchmarks.loss_memory

Forward KL to a teacher that runs beside the student, and its gradient for the hidden states, at 1,024 positions. Each
figure is from a process of its own: what the process holds at most above what it held before. Hidden states are 64 wide
and heads frozen, so that what is left is the loss.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from multiprocessing.connection import Connection

VOCABULARIES = (32_768, 131_072, 262_144)
POSITIONS, WIDTH = 1024, 64


def held_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side: str, vocabulary: int, answer: Connection) -> None:
    """Send how much the loss took."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from slmops.training.head import SparseHead
    from slmops.training.losses import forward_kl, log_probs

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    head, teacher = (SparseHead(LlamaForCausalLM(config).requires_grad_(False)) for _ in range(2))
    ours, theirs = torch.randn(POSITIONS, WIDTH, requires_grad=True), torch.randn(POSITIONS, WIDTH)
    before = held_bytes()
    if side == "tiles":

        def tile(at: slice):  # type: ignore[no-untyped-def]
            logits = teacher.tile(theirs[at])
            return lambda student, rows: forward_kl(log_probs(student, 1.0), log_probs(logits(rows), 1.0))

        loss = head.loss(ours, tile)
    else:
        logits = F.log_softmax(head.head(ours), -1), F.log_softmax(teacher.head(theirs), -1)
        loss = F.kl_div(*logits, reduction="sum", log_target=True)
    loss.backward()
    answer.send(held_bytes() - before)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    context = multiprocessing.get_context("spawn")
    print("| tokens in the vocabulary | in tiles, MB | full logits, MB |\n| --- | --- | --- |")
    for vocabulary in VOCABULARIES:
        found = []
        for side in ("tiles", "full"):
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(side, vocabulary, there))
            process.start()
            found.append(here.recv() / 1e6)
            process.join()
        print(f"| {vocabulary:,} | {found[0]:,.0f} | {found[1]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
