"""How well a model predicts given answers: the references, and its own."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.errors import DataError
from slmops.evaluate.metrics import Loss
from slmops.inference.runtime import Runtime, shortest_first
from slmops.progress import Progress, log
from slmops.records import ChatRecord


def reference_losses(runtime: Runtime, records: Sequence[ChatRecord], batch_size: int) -> list[Loss | None]:
    """The loss of each record's own completion; None for a row that is longer than the model's context.

    Raises:
        DataError: no row fits.
    """
    losses = _losses(runtime, records, batch_size, "evaluate perplexity")
    num_too_long = sum(loss is None for loss in losses)
    if num_too_long == len(losses):
        raise DataError(
            f"none of the {len(losses):,} rows fits into the model's context with its reference answer; "
            "give shorter rows, or a model with a longer context"
        )
    if num_too_long:
        log.info("%d of %d rows are too long for the model: no perplexity of them", num_too_long, len(losses))
    return losses


def own_losses(
    runtime: Runtime,
    records: Sequence[ChatRecord],
    answers: Sequence[str],
    references: Sequence[Loss | None],
    batch_size: int,
) -> list[Loss | None]:
    """The loss of the model's own answers; `references` has it already where an answer is its reference.

    An answer that the model did not end, because it ran into `max_new_tokens`, is taken as if it had ended there. None
    for a blank answer, as chat templates differ on whether a turn without text is one, and for one that is too long.
    """
    losses = [
        loss if answer == record.completion else None
        for record, answer, loss in zip(records, answers, references, strict=True)
    ]
    asked = [
        index
        for index, (record, answer) in enumerate(zip(records, answers, strict=True))
        if answer != record.completion and answer.strip()
    ]
    own = [_with_answer(records[index], answers[index]) for index in asked]
    for index, loss in zip(asked, _losses(runtime, own, batch_size, "evaluate confidence"), strict=True):
        losses[index] = loss
    return losses


def _with_answer(record: ChatRecord, answer: str) -> ChatRecord:
    last = record.messages[-1].model_copy(update={"content": answer})
    return record.model_copy(update={"messages": (*record.messages[:-1], last)})


def _losses(runtime: Runtime, records: Sequence[ChatRecord], batch_size: int, what: str) -> list[Loss | None]:
    order = shortest_first([record.prompt for record in records])
    losses: dict[int, Loss | None] = {}
    with Progress(what, len(records)) as progress:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            found: Sequence[Loss | None] = _fitting(runtime, [records[index] for index in indices])
            if len(found) < len(indices):  # which one is missing shows only when each is asked alone
                found = [next(iter(_fitting(runtime, [records[index]])), None) for index in indices]
            losses |= zip(indices, found, strict=True)
            progress.advance(len(indices))
    return [losses[index] for index in range(len(records))]


def _fitting(runtime: Runtime, records: Sequence[ChatRecord]) -> list[Loss]:
    """The losses of the rows that the model's context has room for; none if the runtime refuses them together."""
    try:
        return runtime.answer_losses(records)
    except (DataError, RuntimeError) as error:
        # transformers' rows are left out until none is left; ONNX Runtime GenAI refuses with an error that has no type.
        if isinstance(error, DataError) or "context_length" in str(error):
            return []
        raise
