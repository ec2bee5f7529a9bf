"""Reading data files: which records come out, and the error for each kind of broken file."""

import json
import re
from functools import partial

import pytest
from datasets import Dataset, DatasetDict

from stanford_alpaca.data.formats import load_records, parse_columns, several_files
from stanford_alpaca.data.records import unused_fields
from stanford_alpaca.errors import UserError

RECORDS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say {hello}.", "output": "hé \u2028 llo", "extra": 7},
    {"instruction": "Nothing.", "input": None, "output": ""},
]
ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": ""},
    {"instruction": "Say {hello}.", "input": "", "output": "hé \u2028 llo", "system": ""},
    {"instruction": "Nothing.", "input": "", "output": "", "system": ""},
]


def plain(records):
    """Checks that the column ``more`` of records and messages is empty, and removes it."""

    def without(row):
        assert not row.pop("more"), row
        return row

    return [
        without(
            {**row, **({"messages": [*map(without, row["messages"])]} if "messages" in row else {})}
        )
        for row in records
    ]


def lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(RECORDS)),
        ("lines.jsonl", lines(RECORDS)),
        ("lines.json", lines(RECORDS)),
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("crlf.jsonl", lines(RECORDS).replace("\n", "\r\n")),
    ],
)
def test_good_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert [row | {"more": ""} for row in ROWS] == [
        row | {"more": row["more"].replace('{"unused": ["extra"]}', "")}
        for row in load_records(tmp_path / name, str(tmp_path / "cache"))
    ]


def test_a_changed_file_is_read_anew(tmp_path):
    file, cache = tmp_path / "data.json", str(tmp_path / "cache")
    file.write_text(json.dumps(RECORDS[:1]))
    assert load_records(file, cache)["output"][:] == ["3"]
    file.write_text(json.dumps([{**RECORDS[0], "output": "three"}]))
    assert load_records(file, cache)["output"][:] == ["three"]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_records(tmp_path / "none.json")
    with pytest.raises(UserError, match="a folder without data files"):
        load_records(tmp_path)
    with pytest.raises(UserError, match="the hub did not give it"):
        load_records("nobody/nothing-here")


MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        (
            {"instruction": "a", "output": "b", "system": "s"},
            {"instruction": "a", "input": "", "output": "b", "system": "s"},
        ),
        ({"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b"}),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, {"messages": MESSAGES}),
        ({"messages": MESSAGES}, {"messages": MESSAGES}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            {"messages": MESSAGES[1:2]},
        ),
        ({"prompt": MESSAGES[:2], "completion": "b"}, {"messages": MESSAGES}),
        (
            {"messages": [{**m, "role": m["role"].title()} for m in MESSAGES]},
            {"messages": MESSAGES},
        ),
        (
            {"prompt": None, "completion": None, "instruction": None, "output": None, "text": "a"},
            {"text": "a"},
        ),
        ({"conversations": SHAREGPT, "id": "x"}, {"messages": MESSAGES[1:]}),
        ({"system": "s", "conversations": SHAREGPT}, {"messages": MESSAGES}),
        ({"text": "a b"}, {"text": "a b"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_form(tmp_path, record, row, suffix):
    file = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        Dataset.from_list([record] * 3).to_parquet(file)
    else:
        file.write_text(lines([record] * 3))
    for streaming in (False, True):
        records = [
            row | {"more": row["more"].replace('{"unused": ["id"]}', "")}
            for row in load_records(file, str(tmp_path / "cache"), streaming=streaming)
        ]
        assert plain(records) == [row] * 3


def test_csv_and_tsv(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,completion\r\n"a, ""b""\nc",d\r\n'.encode())
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    assert plain(load_records(tmp_path / "a.csv", str(tmp_path))) == [
        {"prompt": 'a, "b"\nc', "completion": "d"}
    ]
    assert plain(load_records(tmp_path / "a.tsv", str(tmp_path))) == [
        {"prompt": "a, b", "completion": "c"}
    ]


def test_columns_are_mapped(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        lines([{"question": "a", "answer": "b", "output": "not this"}])
    )
    columns = {"instruction": "question", "output": "answer"}
    assert list(load_records(tmp_path / "a.jsonl", str(tmp_path), columns=columns)) == [
        {
            "instruction": "a",
            "input": "",
            "output": "b",
            "system": "",
            "more": '{"unused": ["output"]}',
        }
    ]
    (tmp_path / "b.jsonl").write_text(lines([{"dialog": [{"who": "user", "says": "a"}]}]))
    columns = {"messages": "dialog", "role": "who", "content": "says"}
    assert plain(load_records(tmp_path / "b.jsonl", str(tmp_path), columns=columns)) == [
        {"messages": MESSAGES[1:2]}
    ]


@pytest.mark.parametrize(
    ("columns", "row", "unused"),
    [
        (
            {"completion": "a"},
            {"prompt": "p", "completion": "a"},
            ["completion", "messages", "q", "text"],
        ),
        ({"text": "text"}, {"text": "t"}, ["a", "completion", "messages", "prompt", "q"]),
        (
            {"instruction": "q", "output": "a"},
            {"instruction": "q", "input": "", "output": "a", "system": ""},
            ["completion", "messages", "prompt", "text"],
        ),
        (
            {"prompt": "completion", "completion": "prompt"},
            {"prompt": "c", "completion": "p"},
            ["a", "messages", "q", "text"],
        ),
    ],
)
def test_columns_that_are_asked_for_decide_the_form(tmp_path, columns, row, unused):
    record = {
        "messages": MESSAGES,
        "prompt": "p",
        "completion": "c",
        "text": "t",
        "q": "q",
        "a": "a",
    }
    (tmp_path / "a.jsonl").write_text(lines([record]))
    records = load_records(tmp_path / "a.jsonl", str(tmp_path), columns=columns)
    assert [{name: found[name] for name in row} for found in records] == [row]
    assert unused_fields(records) == dict.fromkeys(unused, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_that_have_other_forms(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a"}]))
    (tmp_path / "b.jsonl").write_text(lines([{"prompt": "a", "completion": "b"}]))
    with pytest.raises(
        UserError, match=r"b.jsonl:line 1: a record of the form completion after text"
    ):
        list(load_records(tmp_path, str(tmp_path / "cache"), streaming=streaming))


def test_hidden_files_are_no_data_and_only_a_word_is_a_split(tmp_path):
    data = tmp_path / "data"
    (data / ".cache").mkdir(parents=True)
    (data / "constraints.JSONL").write_text(lines([{"text": "1"}]))
    (data / "more.jsonl").write_text(lines([{"text": "2"}]))
    (data / "._more.jsonl").write_bytes(b"\xff")
    (data / ".cache" / "train.json").write_text("{}")
    assert load_records(data, str(tmp_path))["text"][:] == ["1", "2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, streaming):
    from pathlib import Path

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "a.jsonl").write_text(lines([{"text": "a"}]))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read .*Permission denied"):
        list(load_records(tmp_path / "a.jsonl", str(tmp_path / "cache"), streaming=streaming))


def test_a_folder_is_read_as_a_whole_and_only_its_training_split(tmp_path):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "b.jsonl").write_text(lines([{"text": "2"}]))
    (data / "a.jsonl").write_text(lines([{"text": "1"}]))
    (data / "deep" / "c.csv").write_text("text\n3\n")
    (data / "README.md").write_text("no data")
    assert load_records(data, str(tmp_path))["text"][:] == ["1", "2", "3"]
    (data / "train-0.jsonl").write_text(lines([{"text": "4"}]))
    assert load_records(data, str(tmp_path))["text"][:] == ["4"]


def test_a_list_cannot_be_streamed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    with pytest.raises(
        UserError,
        match="a JSON list has to be read as a whole; for --streaming give one object a line",
    ):
        load_records(tmp_path / "a.json", streaming=True)


def test_a_hub_sets_configuration_stands_behind_a_colon_and_its_rows_are_joined(
    tmp_path, monkeypatch
):
    from stanford_alpaca.data import formats

    rows = [
        "",
        " = First = \n",
        "",
        " One . \n",
        " = = Part = = \n",
        " Two . \n",
        " = Second = \n",
        " Three . \n",
    ]
    asked = []

    def load_dataset(*names, split, cache_dir, streaming):
        asked.append(names)
        return Dataset.from_dict({"text": rows})

    monkeypatch.setattr(formats, "load_dataset", load_dataset)
    records = load_records("some/wikitext:raw-v1", str(tmp_path), documents="auto", max_sentences=5)
    assert asked == [("some/wikitext", "raw-v1")]
    assert records["text"] == [" = First = \n\n One . \n = = Part = = \n Two . ", " = Second = \n"]
    assert len(load_records("some/wikitext:raw-v1", str(tmp_path))) == len(rows)


def test_a_hub_set_goes_the_same_way(tmp_path, monkeypatch):
    """The hub cannot be reached here, so data sets in memory stand for what it would return."""
    from stanford_alpaca.data import formats

    hub = {
        "good/set": Dataset.from_list(
            [*RECORDS[:1], {"instruction": "a", "input": None, "output": "b"}]
        ),
        "other/columns": Dataset.from_list([{"question": "a", "answer": "b"}]),
        "null/output": Dataset.from_list(
            [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]
        ),
    }
    monkeypatch.setattr(
        formats, "load_dataset", lambda name, split, cache_dir, streaming: hub[name]
    )
    assert plain(load_records("good/set", str(tmp_path))) == [
        ROWS[0],
        {"instruction": "a", "input": "", "output": "b", "system": ""},
    ]
    with pytest.raises(
        UserError, match="other/columns:record 1: no field 'instruction'; it has question, answer"
    ):
        load_records("other/columns")
    with pytest.raises(UserError, match="null/output:record 2: 'output' is null"):
        load_records("null/output")


# ---- sources -------------------------------------------------------------------------------------


@pytest.fixture
def three():
    return Dataset.from_list([{"text": str(i)} for i in range(3)])


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_saved_is_read(tmp_path, three, streaming):
    cache = str(tmp_path / "cache")
    three.select([2, 0]).save_to_disk(tmp_path / "one")
    DatasetDict({"test": three, "train": three.select([1])}).save_to_disk(tmp_path / "splits")
    DatasetDict({"a": three, "b": three}).save_to_disk(tmp_path / "ab")
    for folder, texts in (("one", ["2", "0"]), ("splits", ["1"]), ("ab/b", ["0", "1", "2"])):
        records = load_records(tmp_path / folder, cache, streaming=streaming)
        assert [record["text"] for record in records] == texts
    with pytest.raises(
        UserError, match=r"ab: several splits \(a, b\); name one: --data_path .*ab/a"
    ):
        load_records(tmp_path / "ab", cache)
    with pytest.raises(
        UserError, match=f"a folder without data files, wanted .*; is it {tmp_path}/under/one[?]"
    ):
        three.save_to_disk(tmp_path / "under" / "one")
        load_records(tmp_path / "under", cache)
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="a saved data set without its file data-00000-of-00001"):
        load_records(tmp_path / "one", cache)


SHARDS = [f"data/train_sft-0000{i}-of-00002-0123456789abcde{i}.parquet" for i in range(2)]
SETS = [  # files of a folder, and how many rows they have together, or why they are refused
    ([*SHARDS, "dataset_infos.json"], 6),
    (
        [*SHARDS, "data/train_gen-00000-of-00001.parquet"],
        r"sets of data \(data/train_gen, data/train_sft\); name one: --data_path .*train_gen",
    ),
    (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], 3),
    (
        [f"{place}-00000-of-00001.parquet" for place in ("main/train", "main/test", "soc/train")],
        r"several sets of data \(main/train, soc/train\)",
    ),
    (["train/a.parquet", "train/b.parquet", "test/a.parquet"], 6),
    (
        ["main/a.parquet", "soc/a.parquet"],
        r"sets of data \(main/a, soc/a\); name one: --data_path .*main/a.parquet$",
    ),
    (
        ["dev.parquet", "good.parquet"],
        r"several sets of data \(dev, good\); name one: --data_path .*good.parquet$",
    ),
    (
        ["train.parquet", "train.jsonl"],
        r"train in several formats \(.jsonl, .parquet\); name one file",
    ),
    (
        ["train.jsonl", "train.jsonl.gz"],
        r"train in several formats \(.jsonl, .jsonl.gz\); name one file",
    ),
    (["trainData.parquet", "testData.parquet"], 3),
    (
        ["train.parquet", "train_filtered.parquet"],
        r"\(train, train_filtered\); name one: --data_path .*folder/train.parquet$",
    ),
]


def fill(folder, names, rows):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            rows.to_parquet(folder / name)
        else:
            (folder / name).write_text('{"text": "0"}')


@pytest.mark.parametrize(("names", "found"), SETS)
def test_several_training_sets_in_a_folder_are_not_one(names, found, tmp_path, three):
    fill(tmp_path / "folder", names, three)
    load = partial(load_records, tmp_path / "folder", str(tmp_path / "cache"))
    if isinstance(found, int):
        assert len(load()) == found
    else:
        with pytest.raises(UserError, match=found):
            load()


def test_files_of_one_set_are_named(tmp_path, three):
    fill(tmp_path / "parts", ["code.parquet", "maths.parquet"], three)
    assert len(load_records(tmp_path / "parts", str(tmp_path / "cache"))) == 6
    (line,) = several_files(tmp_path / "parts")
    assert line == f"{tmp_path / 'parts'}: 2 files: code.parquet, maths.parquet"


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"conversation": [{"role": "user", "content": "a"}]}, "--columns messages=conversation"),
        ({"conversation": [{"from": "human", "value": "a"}]}, "--columns messages=conversation"),
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            "--columns output=response input=context",
        ),
        ({"question": "a", "answer": "b"}, "--columns instruction=question output=answer"),
        (
            {"data": [{"instruction": "a", "output": "b"}]},
            "is it a file of records under 'data'? write that list alone",
        ),
        ({"body": "a"}, "another name? --columns instruction=NAME, or text=body"),
    ],
)
def test_hints_name_what_works(tmp_path, record, hint):
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=re.escape(f"({hint})")):
        load_records(tmp_path / "a.json", str(tmp_path / "cache"))
    if hint.startswith("--columns"):
        columns = parse_columns(hint.removeprefix("--columns ").split(" "))
        assert len(load_records(tmp_path / "a.json", str(tmp_path / "cache"), columns=columns)) == 1


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a"}]))
    monkeypatch.chdir(tmp_path)
    assert len(load_records(".", str(tmp_path / "cache"))) == 1
    for name in ("", " "):
        with pytest.raises(
            UserError, match="data without a name, as of a variable that is not set"
        ):
            load_records(name, str(tmp_path / "cache"))


def test_wide_records_take_no_longer_for_their_width(tmp_path):
    """These would take minutes if each name were compared with all names before it."""
    (tmp_path / "a.json").write_text(
        "[" + json.dumps({f"k{i}": 0 for i in range(120_000)})[:-1] + ', "k5": 1}]'
    )
    with pytest.raises(UserError, match="the key 'k5' stands twice"):
        load_records(tmp_path / "a.json")
    names = ["text", *(f"c{i}" for i in range(60_000))]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join("x" * len(names)) + "\n")
    (record,) = load_records(tmp_path / "a.csv", str(tmp_path / "cache"))
    assert record["text"] == "x" and record["more"].count("c") == 60_000
    (tmp_path / "a.csv").write_text(",".join([*names, "c7"]) + "\n")
    with pytest.raises(UserError, match="the column 'c7' stands twice"):
        load_records(tmp_path / "a.csv")
