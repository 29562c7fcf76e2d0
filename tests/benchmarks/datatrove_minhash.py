"""Near duplicates by datatrove's four MinHash stages; runs in a venv of its own, without slmops.

python datatrove_minhash.py WORDS BANDS BAND_SIZE SOURCE DIRECTORY
"""

import json
import sys
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
    minhash,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


class BetweenSpaces:
    """A word is what stands between spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split()


def row(self: object, data: dict[str, Any], path: str, id_in_file: int) -> dict[str, Any]:
    """What datatrove calls a document: the same text that slmops compares."""
    return {"text": f"{data['prompt']} {data['completion']}", "id": str(id_in_file), "metadata": {}}


def main() -> None:
    """Run the stages one after the other in this process, and print how many rows are left."""
    size, bands, band_size, source, directory = sys.argv[1:]
    folder = Path(directory)
    config = MinhashConfig(n_grams=int(size), num_buckets=int(bands), hashes_per_bucket=int(band_size))

    def reader() -> JsonlReader:
        path = Path(source)
        return JsonlReader(str(path.parent), glob_pattern=path.name, adapter=row)

    minhash.load_word_tokenizer = lambda language: BetweenSpaces()  # its own for English takes longer, and spaCy
    signature = MinhashDedupSignature(output_folder=f"{folder}/signatures", config=config)
    stages = [
        ([reader(), signature], 1),
        ([MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)], config.num_buckets),
        ([MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config)], 1),
        (
            [
                reader(),
                MinhashDedupFilter(f"{folder}/remove"),
                JsonlWriter(f"{folder}/kept", output_filename="${rank}.jsonl", compression=None),
            ],
            1,
        ),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/logs/{number}", skip_completed=False
        ).run()
    kept = 0
    for path in Path(f"{folder}/kept").iterdir():
        with open(path) as lines:
            kept += sum(1 for line in lines if json.loads(line))
    print(kept)


if __name__ == "__main__":
    main()
