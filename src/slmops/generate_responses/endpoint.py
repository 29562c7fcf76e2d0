"""A teacher behind an endpoint: any server with the OpenAI chat API."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import openai
from pydantic import BaseModel

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.config import TEACHER_API_KEY
from slmops.errors import DataError, SlmopsError, TransientError, UserError
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.progress import Progress, log
from slmops.records import ROWS, ChatRecord, Message, read_records, write_jsonl
from slmops.resume import work_dir

STEP = "generate_responses"
TIMEOUT_S = 600.0
"""Of one request; a long answer of a large teacher takes minutes."""
MAX_RETRIES = 5
"""Of one request, by the client: with growing pauses, or as long as Retry-After says."""


class Answer(BaseModel):
    """One answer, as it is kept until all are there."""

    index: int
    """Position of its prompt."""
    text: str
    finish_reason: str
    """`stop`, or why the answer ended before its end."""
    model: str
    """What the endpoint says that it is."""
    num_tokens: int


def run(config: GenerateResponsesConfig, *, prompts: Path, responses: Path) -> Sidecar:
    """Ask the endpoint each prompt once; an answer that came is kept whatever happens after it.

    Raises:
        ArtifactError: `prompts` is missing or half-written.
        UserError: the endpoint refuses: wrong key, model or address.
        TransientError: it does not answer, or has no capacity.
        DataError: no answer is left.
    """
    parents = [artifacts.expect(prompts, "chat_dataset")]
    unfinished = work_dir(STEP, config, parents, responses)
    with artifacts.writing(responses, kind="responses", step=STEP, config=config, parents=parents) as draft:
        records = read_records(prompts)[: config.max_rows]
        log.info("%d prompts to %s at %s", len(records), config.endpoint_model, config.endpoint_url)
        started = time.monotonic()
        answers = _answer_all(records, config, unfinished / "answers.jsonl")
        seconds = time.monotonic() - started
        rows = [
            record.model_copy(
                update={"messages": (*record.messages[:-1], Message(role="assistant", content=answer.text))}
            )
            for record, answer in zip(records, answers, strict=True)
            if answer.finish_reason == "stop" and answer.text
        ]
        truncated = sum(answer.finish_reason != "stop" for answer in answers)
        counts = {"num_truncated": truncated, "num_empty": len(records) - len(rows) - truncated}
        if not rows:
            raise no_usable_answer(len(records), counts)
        write_jsonl(draft.path / ROWS, rows)
        num_tokens = sum(answer.num_tokens for answer in answers)
        draft.facts |= {
            "num_rows": len(rows),
            **counts,
            "num_tokens": num_tokens,
            "tokens_per_s": round(num_tokens / seconds, 1),
            "teacher": ", ".join(sorted({answer.model for answer in answers})),
        }
    shutil.rmtree(unfinished)
    return draft.sidecar


def no_usable_answer(num_prompts: int, counts: Mapping[str, int]) -> DataError:
    """The error for a teacher from whom nothing can be learned."""
    reasons = ", ".join(f"{name} {count}" for name, count in counts.items())
    return DataError(
        f"the teacher gave no usable answer to {num_prompts} prompts ({reasons}); raise max_new_tokens, or fine-tune "
        "the teacher first"
    )


def _answer_all(records: Sequence[ChatRecord], config: GenerateResponsesConfig, path: Path) -> list[Answer]:
    """Answers in the order of `records`; `path` takes each as it comes."""
    answers = _kept(path)
    client = openai.OpenAI(
        base_url=config.endpoint_url,
        api_key=os.environ.get(TEACHER_API_KEY, "none"),
        timeout=TIMEOUT_S,
        max_retries=MAX_RETRIES,
    )
    missing = [index for index in range(len(records)) if index not in answers]
    lock = threading.Lock()
    with (
        client,
        open(path, "a", encoding="utf-8") as kept,
        Progress(STEP, len(records), done=len(answers)) as progress,
        ThreadPoolExecutor(config.batch_size) as pool,
    ):

        def ask(index: int) -> Answer:
            answer = _ask(client, config, index, records[index])
            with lock:
                kept.write(answer.model_dump_json() + "\n")
                kept.flush()
            return answer

        tasks = [pool.submit(ask, index) for index in missing]
        try:
            for task in as_completed(tasks):
                answers[task.result().index] = task.result()
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [answers[index] for index in range(len(records))]


def _kept(path: Path) -> dict[int, Answer]:
    """The answers of an earlier, killed run; its last line may be half a line."""
    if not path.exists():
        return {}
    *whole, _ = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at separators in answers
    path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    return {answer.index: answer for answer in (Answer.model_validate_json(line) for line in whole)}


def _ask(client: openai.OpenAI, config: GenerateResponsesConfig, index: int, record: ChatRecord) -> Answer:
    greedy = config.decoding == "greedy"
    try:
        completion = client.chat.completions.create(
            model=config.endpoint_model,
            messages=record.prompt,  # type: ignore[arg-type]
            max_completion_tokens=config.max_new_tokens,
            temperature=0.0 if greedy else config.temperature,
            top_p=1.0 if greedy else config.top_p,
            seed=config.seed + index,
        )
    except openai.APIError as error:
        raise _explained(error, config) from None
    choice = completion.choices[0]
    return Answer(
        index=index,
        text=choice.message.content or "",
        finish_reason=choice.finish_reason,
        model=completion.model,
        num_tokens=completion.usage.completion_tokens if completion.usage else 0,
    )


def _explained(error: openai.APIError, config: GenerateResponsesConfig) -> SlmopsError:
    """The endpoint's error as one of ours; none of them carries the key."""
    where = f"{config.endpoint_url} ({config.endpoint_model})"
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        if status in (401, 403):
            return UserError(f"{where} refuses the key ({status}); put a valid one into ${TEACHER_API_KEY}")
        if status == 404:
            return UserError(f"{where} has no such model or address (404); check endpoint_url and endpoint_model")
        if status != 429 and status < 500:
            return UserError(f"{where} refuses the request ({status}): {error.message[:300]}")
        return TransientError(f"{where} has no answer now ({status}), after {MAX_RETRIES} retries; try again later")
    return TransientError(f"{where} does not answer ({type(error).__name__}); check endpoint_url, and try again")
