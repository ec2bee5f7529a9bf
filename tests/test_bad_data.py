"""Tests that bad data of every kind ends a run before a model is loaded.

The command ends with status 2 and one line, and nothing is written.
"""

import json
import pickle

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image

from stanford_alpaca.data import formats
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.reading import read_file
from stanford_alpaca.data.records import form_of
from stanford_alpaca.data.tokenize import ExampleEncoder, PromptEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.prompts import read_prompts
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.train import train
from tests.helpers import refusal

GOOD = '{"instruction": "a", "output": "b"}'


class Payload:
    """Its pickle opens a file for writing when it is loaded."""

    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # ---- whole files
        ("a.json", None, r"no such file; give a file"),
        ("a", "FOLDER", r"a folder without data files, wanted \.json"),
        ("a.json", b"", "there is no record in it; "),
        ("a.json", b"[]", "there is no record in it; "),
        (
            "a.json",
            b"[" + GOOD.encode(),
            r"a.json:record 1: broken JSON at line 1 column 37, expecting ',' or ']'; is",
        ),
        (
            "a.json",
            b"[\n" + GOOD.encode() + b',\n{"instr',
            "record 2: broken JSON at line 3 column 2, Unterminated",
        ),
        (
            "a.json",
            b"[" + GOOD.encode() + b"] 1",
            "a.json: broken JSON, something stands after the list; wanted",
        ),
        (
            "a.json",
            b'{\n "instruction": "a",\n "output": "b"\n}',
            "a.json: one object over several lines: put it into",
        ),
        (
            "a.json",
            b'{"data": [' + GOOD.encode() + b"]}",
            "a.json:line 1: no field 'instruction'; it has data",
        ),
        ("a.json", b"[" * 100_000, "a.json:record 1: broken JSON, nested too deep; "),
        (
            "a.json",
            b"[" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
            "record 1: broken JSON, nested too deep",
        ),
        ("a.jsonl", b'{"a":' * 100_000, "a.jsonl:line 1: broken JSON, nested too deep; "),
        (
            "a.jsonl",
            GOOD.encode() + b"\n{instr\n" + GOOD.encode(),
            "line 2: broken JSON at column 2, Expecting",
        ),
        (
            "a.jsonl",
            GOOD.encode() + b'\n{"n": ' + b"9" * 5000 + b"}",
            "a.jsonl:line 2: broken JSON, Exceeds the limit",
        ),
        (
            "a.json",
            f"[{GOOD}]".encode("utf-16"),
            "a.json: byte 0 is not UTF-8; convert the file to UTF-8",
        ),
        (
            "a.json",
            GOOD.encode("utf-16-le"),
            "a.json: holds NUL characters, as UTF-16 does; convert",
        ),
        ("a.json", f"[{GOOD[:-2]}é".encode("latin-1"), "a.json: byte 34 is not UTF-8; convert"),
        (
            "a.pkl",
            pickle.dumps(Payload()),
            r"a.pkl: not one of .json, .jsonl, .*; give such a file",
        ),
        ("a.pt", pickle.dumps(Payload()), r"a.pt: not one of .json, .jsonl, .*; give such a file"),
        # ---- records
        (
            "a.json",
            b'["a"]',
            "a.json:record 1: a string, wanted an object with instruction and output; ",
        ),
        ("a.json", b'"a"', "a.json:line 1: a string, wanted an object"),
        ("a.json", b"[[1]]", "a.json:record 1: a list, wanted an object"),
        ("a.json", b'[{"output": "a"}]', "a.json:record 1: no field 'instruction'; it has output"),
        (
            "a.json",
            b'[{"instruction": "a"}]',
            "a.json:record 1: no field 'output'; it has instruction",
        ),
        (
            "a.json",
            b'[{"instruction": "a", "output": null}]',
            "a.json:record 1: 'output' is null, wanted a string; ",
        ),
        (
            "a.json",
            b'[{"instruction": "a", "output": 3}]',
            "a.json:record 1: 'output' is a number, wanted a string; ",
        ),
        (
            "a.json",
            b'[{"instruction": "a", "output": true}]',
            "'output' is true or false, wanted a string; ",
        ),
        (
            "a.json",
            b'[{"instruction": "a", "input": [], "output": "b"}]',
            "'input' is a list, wanted a string; ",
        ),
        (
            "a.json",
            b'[{"instruction": "a", "output": "\\ud800"}]',
            "record 1: 'output' has a lone surrogate.*; remove it",
        ),
        ("a.jsonl", b'{"\\ud800": 1}', "a.jsonl:line 1: no field 'instruction'"),
        (
            "a.json",
            b'[{"output": "a", "instruction": "b", "output": "c"}]',
            "the key 'output' stands twice.*; is",
        ),
        (
            "a.jsonl",
            b'{"instruction": "a", "output": "b", "x": [{"y": 1, "y": 1}]}',
            "the key 'y' stands twice",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            "2: a record of the form completion after text: ",
        ),
        ("a.jsonl", b'{"prompt": null, "completion": "b"}', "line 1: 'prompt' is null"),
        ("a.jsonl", b'{"messages": []}', "line 1: 'messages' is no list of messages"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "message 1: no 'content'; it has role"),
        ("a.jsonl", b'{"messages": [{"role": "x", "content": "a"}]}', "role 'x'; known are system"),
        (
            "a.jsonl",
            b'{"messages": [{"role": ["user"], "content": "a"}]}',
            r"role \['user'\]; known are",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": 1}]}',
            "message 1: 'content' is a number",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}',
            "is no call of a tool",
        ),
        ("a.jsonl", b'{"conversations": ["a"]}', "'conversations', message 1: a string"),
        # ---- tables
        (
            "a.csv",
            b"instruction,output\na,b\nc\n",
            "a.csv:line 3: not the 2 fields of the first line; ",
        ),
        (
            "a.csv",
            b"instruction,output,output\na,b,c\n",
            "a.csv:line 1: the column 'output' stands twice; ",
        ),
        (
            "a.csv",
            b"question,answer\na,b\n",
            "line 2: no field 'instruction'.*--columns instruction=question output=answer",
        ),
        ("a.csv", b'instruction,output\na,"b\n', "a.csv: broken CSV at the end.*; "),
        ("a.csv", b"instruction,output\na,\xe9\n", "a.csv: byte 21 is not UTF-8; "),
        ("a.parquet", b"PAR1 no", "a.parquet: broken parquet.*; is the file complete"),
        # ---- nothing to train on
        (
            "a.json",
            b'[{"instruction": "a", "output": ""}]',
            "a.json: no example .* 1 without a response.*; ",
        ),
        (
            "a.json",
            json.dumps([{"instruction": "a " * 600, "output": "b"}]).encode(),
            "1 whose prompt fills the length.*; ",
        ),
    ],
)
def test_bad_data_is_one_line(arguments, tmp_path, monkeypatch, capsys, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content == "FOLDER":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    path = f"./{name}"
    status, line = refusal(
        capsys, monkeypatch, lambda: train(arguments(data_path=path)), tmp_path / "out"
    )
    assert status == 2 and line.removeprefix("./").startswith(name)
    with pytest.raises(UserError, match=message):
        raise UserError(line)
    assert not (tmp_path / "opened").exists()


def test_what_has_no_answer_or_no_room_is_dropped_and_counted(
    arguments, tmp_path, capsys, monkeypatch
):
    rows = [("a", "b"), ("a", ""), ("a " * 600, "b"), ("c", "d")]
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": i, "output": o} for i, o in rows]))
    # The run gets as far as making the model.
    monkeypatch.setattr("stanford_alpaca.train.make_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(arguments(data_path=tmp_path / "a.json"))
    printed = capsys.readouterr().out
    assert "2 of 4 examples" in printed
    assert "dropped: 1 without a response, 1 whose prompt fills the length" in printed


def test_all_sources_are_checked_before_the_first_is_tokenized(
    arguments, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text(f"{GOOD}\n[")
    monkeypatch.setattr("stanford_alpaca.run.data.load_source", lambda *_: pytest.fail("tokenized"))
    argv = [
        *arguments(data_path=None),
        "--data_path",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]
    assert (
        "b.jsonl:line 2: broken JSON"
        in refusal(capsys, monkeypatch, lambda: train(argv), tmp_path / "out")[1]
    )


def test_a_pickle_is_no_prompt_file_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"--prompts a\.pkl: .*; give"):
        read_prompts("a.pkl", None, None)
    assert not (tmp_path / "opened").exists()


SPECIAL = "</s><s><pad>"
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("record", "chat_template"),
    [
        ({"instruction": SPECIAL, "input": SPECIAL, "output": SPECIAL, "system": SPECIAL}, None),
        ({"prompt": SPECIAL, "completion": SPECIAL}, None),
        ({"text": SPECIAL}, None),
        (
            {
                "messages": [
                    {"role": "user", "content": SPECIAL},
                    {"role": "assistant", "content": SPECIAL},
                ]
            },
            CHAT,
        ),
    ],
    ids=["alpaca", "completion", "text", "chat"],
)
def test_text_of_special_tokens_stays_text_in_every_form(root, record, chat_template):
    tokenizer = ModelSource(str(root / "data" / "tiny-base")).tokenizer()
    tokenizer.chat_template = chat_template
    plain = {
        name: "a" if isinstance(value, str) else [m | {"content": "a"} for m in value]
        for name, value in record.items()
    }
    counts = []
    for row in (plain, record):
        encode = ExampleEncoder.of(tokenizer, form_of(row), 512)
        ids = encode({name: [value] for name, value in row.items()})["input_ids"][0]
        (prompt,) = PromptEncoder(tokenizer)(
            [row if "text" not in row else {"prompt": row["text"], "completion": ""}]
        )
        counts.append([sum(i in tokenizer.all_special_ids for i in part) for part in (ids, prompt)])
    assert counts[0] == counts[1]
    assert all(
        token in SPECIAL
        for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_records_name_are_not_opened(tmp_path, monkeypatch, streaming):
    """A path in a text is not opened.

    A path in an image column is not opened either, in a file or in a hub data set.
    """
    rows = [
        {
            "instruction": "see",
            "output": str(tmp_path / "secret.png"),
            "image": str(tmp_path / "secret.png"),
        }
    ]
    table = Dataset.from_list(rows).cast_column("image", Image())
    pq.write_table(table.data.table, tmp_path / "a.parquet")
    hub = table.to_iterable_dataset() if streaming else table
    monkeypatch.setattr(formats, "load_dataset", lambda *args, **kwargs: hub)
    # Opening secret.png would fail, because there is no such file.
    for path in (tmp_path / "a.parquet", "some/set"):
        records = load_records(path, str(tmp_path / "cache"), streaming=streaming)
        assert [record["output"] for record in records] == [str(tmp_path / "secret.png")]


def test_a_large_record_and_many_small_ones_are_read_once(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "word " * 2_000_000}, {"text": "é"}]))
    (large, small) = (value for _, value in read_file(tmp_path / "a.json"))
    assert len(large["text"]) == 10_000_000 and small == {"text": "é"}
