"""Few-shot tasks: the package's task files, records from files and from the hub, and errors."""

import json

import pytest
from datasets import Dataset

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.tasks import choose_tasks, load_task, read_tasks

SEVEN = {"tweet_eval": 4, "trec": 6, "sst2": 2, "subj": 2, "cr": 2, "rt": 2, "ag_news": 4}


def test_the_seven_tasks_are_there_and_a_label_can_be_put_first(tmp_path):
    known = read_tasks()
    assert {name: len(task.classes) for name, task in known.items()} == SEVEN
    assert all(task.hub for task in known.values())
    assert known["trec"].write("Who ?", 3).endswith("Who ?\nAnswer type: person")
    (tmp_path / "mine.yaml").write_text('template: "{label}: {text}"\nclasses: ["yes", "no"]\n')
    assert read_tasks(tmp_path)["mine"].write("a {b}", 1) == "no: a {b}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, b]", "no task"),
        ('template: "{text} {label} {other}"\nclasses: [a, b]', "needs {text} and {label}"),
        (
            'template: "{text} {label}"\nclasses: [a, ab]',
            "none of which begins with another's name",
        ),
        ('template: "{text} {label}"\nclasses: [a, b]\nspilts: x', "unknown field spilts"),
        ("[", "no task"),
        ('template: "{text!r} {label}"\nclasses: [a, b]', "nothing else in braces"),
        ('template: "{text:d} {label}"\nclasses: [a, b]', "nothing else in braces"),
        (
            'template: "{text} {label}"\nclasses: [yes, no]',
            "classes is \\[True, False\\]; wanted a list of words, in quotes",
        ),
    ],
)
def test_a_bad_task_file(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_tasks(tmp_path)


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_records_of_files_and_which_tasks_a_folder_has(tmp_path):
    known = read_tasks()
    for name in ("rt_train", "rt_test", "subj_train"):
        write(tmp_path, name, [{"text": f"{name} {i}", "label": i % 2} for i in range(3)])
    assert [task.name for task in choose_tasks(None, known, tmp_path)] == ["rt"]
    data = load_task(known["rt"], tmp_path, limit=2)
    assert data.train == (["rt_train 0", "rt_train 1", "rt_train 2"], [0, 1, 0])
    assert data.test == (["rt_test 0", "rt_test 1"], [0, 1])
    with pytest.raises(UserError, match=r"subj_test\.jsonl: no such file"):
        load_task(known["subj"], tmp_path)
    with pytest.raises(UserError, match="did you mean subj"):
        choose_tasks("rt,subi", known, tmp_path)
    assert [task.name for task in choose_tasks("subj,rt,subj", known, None)] == ["subj", "rt"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": 2},
            "line 1: label 2 is no class of task rt: 0 negative, 1 positive",
        ),
        ({"text": "a", "label": True}, "label True is no class"),
        ({"text": "a", "label": "1"}, "label '1' is no class"),
        ({"text": "a"}, "label None is no class"),
        ({"label": 1}, "line 1: no text"),
        ("a", "line 1: no text"),
        (None, "line 1: no text"),
    ],
)
def test_a_bad_record(tmp_path, row, message):
    write(tmp_path, "rt_train", [row])
    write(tmp_path, "rt_test", [row])
    with pytest.raises(UserError, match=message):
        load_task(read_tasks()["rt"], tmp_path)


def test_the_hub_is_asked_for_the_splits_and_columns_of_the_task(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return Dataset.from_dict(
            {"text": [f"who {options['split']} ?"], "coarse_label": [3], "fine_label": [9]}
        )

    monkeypatch.setattr("stanford_alpaca.evaluation.fewshot.tasks.load_dataset", load)
    data = load_task(read_tasks()["trec"])
    assert data.test == (["who test ?"], [3]) and data.train.texts == ["who train ?"]
    assert asked[0] == (
        ("CogComp/trec", None),
        {"revision": "refs/convert/parquet", "split": "train"},
    )
    with pytest.raises(UserError, match="record 1: label 3 is no class of task rt"):
        monkeypatch.setattr(
            "stanford_alpaca.evaluation.fewshot.tasks.load_dataset",
            lambda *_, **__: Dataset.from_dict({"text": ["a"], "label": [3]}),
        )
        load_task(read_tasks()["rt"])


def test_without_a_network_files_are_advised():
    with pytest.raises(
        UserError,
        match=r"the hub did not give it .*; give files: --data_dir DIR with subj_train.jsonl and",
    ):
        load_task(read_tasks()["subj"])
