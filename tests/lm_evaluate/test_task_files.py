"""Task files of one's own: what is missing or broken is named, and nothing in them runs code unless it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops.errors import ConfigError, DataError
from slmops.records import write_jsonl
from tests.lm_evaluate.lm_tasks import (
    TASKS,
    lm_evaluate,
    samples,
    write_task,
)


def test_missing_data_says_how_to_bring_it(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    (task_files / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"the data of task choose is not there.*rows.jsonl.*count from that folder"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")
    write_task(task_files, "choose", TASKS["choose"] | {"dataset_path": "nobody/nothing", "dataset_kwargs": {}})
    with pytest.raises(DataError, match=r"the data of task choose is not there.*machine with network.*HF_HOME"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")


@pytest.mark.slow
def test_public_tasks_are_known_by_name(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data of task sciq is not there.*TaskManager\(\).load\(\['sciq'\]\)"):
        lm_evaluate(tmp_path, tiny_model, None, "sciq")
    with pytest.raises(ConfigError, match=r"no task is called 'choos'; is it choose"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choos")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"doc_to_text": "{{ question }}"}, "cannot be set up .*'question' is undefined"),
        ({"output_type": "juggling"}, "cannot be set up .*juggling"),
        ({"metric_list": [{"metric": "acc"}], "test_split": "holdout"}, "cannot be set up"),
        ({"include": "nowhere.yaml"}, "includes 'nowhere.yaml', which is not there"),
    ],
)
def test_a_broken_task_is_named(
    changed: dict[str, Any], said: str, tiny_model: Path, task_files: Path, tmp_path: Path
) -> None:
    write_task(task_files, "choose", TASKS["choose"] | changed)
    with pytest.raises(ConfigError, match=said):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")


def test_a_row_that_does_not_fit_the_template_is_said(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    write_jsonl(task_files / "rows.jsonl", [{"request": text, "command": "on tv"} for text in ("turn on", "turn")])
    write_task(task_files, "choose", TASKS["choose"] | {"doc_to_text": "{{ request.split()[1] }}"})
    with pytest.raises(DataError, match="a template does not fit a row of its task"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")


@pytest.mark.parametrize("text", ["task: [open", "- a\n- list", "a: &x [*x]\nb: *y", "task: choose\n---\ntask: b"])
def test_broken_yaml_is_named_with_its_file(text: str, tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    (task_files / "choose.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"choose\.yaml (is no YAML|holds list)"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")


STEAL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef pick(doc): return doc['request']\n"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("doc_to_text: !function steal.pick", "names the function steal.pick"),
        ("doc_to_text: !function steal.pick\ndoc_to_text: hello", "names the function steal.pick"),
        ("? !function steal.pick\n: 1", "names the function steal.pick"),
        ("%TAG !x! !func\n---\ntask: t\ndoc_to_text: !x!tion steal.pick", "names the function steal.pick"),
        ("include: ../outside.yaml", "includes '../outside.yaml', outside of the folder"),
        ("include: part", "part: names the function steal.pick"),
        ("dataset_path: pandas", "dataset_path is 'pandas', not arrow"),
        ("dataset_kwargs: {data_files: {test: /etc/passwd}}", "data_files names '/etc/passwd'"),
        ("dataset_kwargs: {data_files: [../rows.jsonl]}", "data_files names '../rows.jsonl'"),
        ("dataset_kwargs: {data_files: 'http://host/rows.jsonl'}", "data_files names 'http://host"),
        ("metric_list: [{metric: ./mine.py}]", "metric './mine.py' is none of lm_eval's own"),
        ("metric_list: [{metric: exact_match, hf_evaluate: true}]", "metric 'exact_match' is none"),
        ("use_prompt: ../prompts.yaml:one", "use_prompt reads another file"),
        ("group: g\ntask: [{task: niah_single_1, metadata: {tokenizer: ./evil}}]", "metadata of another task"),
    ],
)
def test_a_folder_of_task_files_runs_no_code_and_reads_nothing_else(
    added: str, said: str, tiny_model: Path, task_files: Path, tmp_path: Path
) -> None:
    (task_files / "steal.py").write_text(STEAL)
    (task_files / "part").write_text("doc_to_text: !function steal.pick\n")
    (tmp_path / "outside.yaml").write_text("doc_to_text: x\n")
    (task_files / "bad.yaml").write_text(added if added.startswith(("%", "group")) else f"task: bad\n{added}\n")
    with pytest.raises(ConfigError, match=said):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")
    assert not (task_files / "ran").exists()


def test_a_link_out_of_the_folder_is_refused(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    (task_files / "link.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match=r"link\.jsonl links out of the folder"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")


def test_a_template_cannot_reach_python(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    """Jinja without a sandbox runs any program that a template names."""
    path = tmp_path / "ran"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {path}') }}}}"
    write_task(task_files, "choose", TASKS["choose"] | {"doc_to_text": attack})
    with pytest.raises(ConfigError, match=r"task choose cannot be set up .*unsafe"):
        lm_evaluate(tmp_path, tiny_model, task_files, "choose")
    assert not path.exists()


def test_code_runs_where_it_is_allowed(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    (task_files / "steal.py").write_text(STEAL)
    text = yaml.safe_dump({"task": "choose"} | TASKS["choose"] | {"doc_to_text": "steal.pick"})
    (task_files / "choose.yaml").write_text(text.replace("doc_to_text:", "doc_to_text: !function"))
    lm_evaluate(tmp_path, tiny_model, task_files, "choose", allow_code=True, max_rows=1)
    (sample,) = samples(tmp_path, "choose")
    assert sample["arguments"][0][0] == sample["doc"]["request"]
    assert (task_files / "ran").exists()


def test_code_that_a_model_writes_runs_only_where_it_is_allowed(
    tiny_model: Path, task_files: Path, tmp_path: Path
) -> None:
    write_task(task_files, "answer", TASKS["answer"] | {"unsafe_code": True})
    with pytest.raises(ConfigError, match="task answer runs code that the model writes; set allow_code=true"):
        lm_evaluate(tmp_path, tiny_model, task_files, "answer")
    lm_evaluate(tmp_path, tiny_model, task_files, "answer", allow_code=True, max_rows=1)
