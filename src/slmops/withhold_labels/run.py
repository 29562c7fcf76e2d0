"""withhold_labels: a few rows of each class keep their label, and all others are prompts for a teacher.

Labels are what costs money; prompts are there in masses. A teacher is fine-tuned on the labelled rows, and a student
learns from the teacher on all of them. Where every row has a label, withholding most shows what that is worth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.errors import DataError
from slmops.progress import log
from slmops.records import ROWS, ChatRecord, stream_records, write_jsonl
from slmops.withhold_labels.config import WithholdLabelsConfig

STEP = "withhold_labels"


def run(config: WithholdLabelsConfig, *, rows: Path, labelled: Path, prompts: Path) -> tuple[Sidecar, Sidecar]:
    """Write the `labelled` rows, and `prompts`: all rows, none but those with its label.

    The class of a row is its answer. Ids stay those of the rows as they were, so that they can be found again.

    Raises:
        ArtifactError: `rows` is missing or half-written.
        DataError: no row has a label.
    """
    parents = [artifacts.expect(rows, "chat_dataset")]
    with ExitStack() as stack:
        # Left in reverse order: whoever finds the labelled rows finds the prompts.
        labelled_draft, prompts_draft = (
            stack.enter_context(artifacts.writing(path, kind="chat_dataset", step=STEP, config=config, parents=parents))
            for path in (labelled, prompts)
        )
        kept: Counter[str] = Counter()
        num_prompts = write_jsonl(prompts_draft.path / ROWS, _with_few_labels(config, stream_records(rows), kept))
        if not kept:
            raise DataError(f"no row of {rows} has a label; all answer {config.no_label!r}; see no_label")
        num_labelled = write_jsonl(
            labelled_draft.path / ROWS,
            (record for record in stream_records(prompts_draft.path) if record.completion != config.no_label),
        )
        facts = {"num_classes": len(kept), "rows_of_smallest_class": min(kept.values())}
        labelled_draft.facts |= {"num_rows": num_labelled, **facts}
        prompts_draft.facts |= {"num_rows": num_prompts, "num_labelled": num_labelled, **facts}
    log.info("%d of %d rows keep their label, of %d classes", num_labelled, num_prompts, len(kept))
    return labelled_draft.sidecar, prompts_draft.sidecar


def _with_few_labels(
    config: WithholdLabelsConfig, records: Iterable[ChatRecord], kept: Counter[str]
) -> Iterator[ChatRecord]:
    for record in records:
        label = record.completion
        if label != config.no_label and kept[label] < config.rows_per_class:
            kept[label] += 1
            yield record
        else:
            answer = record.messages[-1].model_copy(update={"content": config.no_label})
            yield record.model_copy(update={"messages": (*record.messages[:-1], answer), "stratum": ""})
