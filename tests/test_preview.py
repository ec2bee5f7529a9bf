"""Tests the preview.

Checks the texts and spans of examples, and that its statistics equal what training reports.
"""

import contextlib
import io
import json

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.statistics import WHOLE, statistics_of
from stanford_alpaca.data.tokenize import ExampleEncoder, encode_records, tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.preview import boundaries_of, coloured, pieces_of, run

RECORDS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "three"},
    {"instruction": "Talk.", "output": "word " * 60},
    {"instruction": "word " * 60, "output": "never seen"},
    {"instruction": "Say nothing.", "output": ""},
]


@pytest.fixture
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return tmp_path / "data.json"


def test_pieces_and_their_colours(tokenizer):
    encode = ExampleEncoder.of(tokenizer, "chat", 512, "alpaca")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b ☃"}]
    pieces = pieces_of({"messages": [*messages, *messages]}, encode)
    assert "".join(piece for piece, trained in pieces if trained) == "b ☃</s>b ☃</s>"
    assert pieces[0] == ("<s>", False)  # the beginning-of-sequence token
    assert "".join(piece for piece, _ in pieces).endswith(
        "### Response:b ☃</s>\n\n### Instruction:\na\n\n### Response:b ☃</s>"
    )
    assert boundaries_of(pieces) == [(":", "b"), (":", "b")]
    text = coloured(pieces)
    styled = {
        text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"
    }
    assert "b" in styled and "</s>" in styled and ":" not in styled
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(coloured(pieces, in_colour=False))
    assert capture.get().count("⟦b ☃</s>⟧") == 2


@pytest.mark.parametrize("max_length", [64, 100, 512])
def test_statistics_are_those_of_training(tokenizer, file, tmp_path, max_length):
    records = load_records(file, str(tmp_path / "cache"))
    _, report = tokenize_records(records, tokenizer, max_length)
    statistics = statistics_of(
        encode_records(records, ExampleEncoder.of(tokenizer, "alpaca", WHOLE)),
        max_length,
        [max_length],
    )
    for name in ("records", "kept", "truncated", "straddling", "tokens", "supervised_tokens"):
        assert statistics[name] == getattr(report, name), name
    dropped = {
        "no_response": report.no_response,
        "prompt_fills_the_length": report.filled,
        "refused_by_the_template": 0,
    }
    assert statistics["dropped"] == dropped
    budget = statistics["budgets"][max_length]
    assert (budget["kept"], budget["tokens"]) == (report.kept, report.tokens)
    _, whole = tokenize_records(records, tokenizer, 512)
    assert budget["supervised_lost"] == pytest.approx(
        1 - report.supervised_tokens / whole.supervised_tokens
    )
    lengths = sorted(len(ids) for ids in tokenize_records(records, tokenizer, 512)[0]["input_ids"])
    assert (
        statistics["token_quantiles"]["max"] == lengths[-1]
        and statistics["token_quantiles"]["50%"] == lengths[1]
    )


def test_only_examples_that_are_kept_count_as_straddling(tokenizer, file, tmp_path):
    """The prompt's last space shares a token with the response's first letters."""
    rows = [
        {"prompt": "a ", "completion": "large"},
        {"prompt": "word " * 60, "completion": "large"},
    ]
    file.write_text(json.dumps(rows))
    records = load_records(file, str(tmp_path / "cache"))
    encode = ExampleEncoder.of(tokenizer, "completion", WHOLE)
    for max_length, straddling in ((40, 1), (512, 2)):
        _, report = tokenize_records(records, tokenizer, max_length)
        statistics = statistics_of(encode_records(records, encode), max_length)
        assert statistics["straddling"] == report.straddling == straddling


def test_the_command_prints_tables_and_json(root, file, tmp_path, capsys):
    flags = {
        "data": str(file),
        "max_length": 64,
        "examples": 1,
        "cache_dir": str(tmp_path / "cache"),
    }
    run(str(root / "data" / "tiny-base"), **flags)
    printed = capsys.readouterr().out
    assert "⟦three</s>⟧" in printed and "boundary: ':' is masked, 't" in printed
    assert "dropped: no response" in printed and "supervised tokens lost" in printed
    run(str(root / "data" / "tiny-base"), **flags, json=True)
    (source,) = json.loads(capsys.readouterr().out).values()
    assert source["statistics"]["kept"] == 2
    assert (
        "".join(piece for piece, trained in source["examples"][0]["pieces"] if trained)
        == "three</s>"
    )


def test_brackets_in_texts_and_names_are_no_markup(root, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[/INST]"]})
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ m.content + ('[/INST]' if m.role == 'user' else '') }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(
        (root / "data" / "tiny-base" / "config.json").read_bytes()
    )
    messages = [{"role": "user", "content": "[/b]"}, {"role": "assistant", "content": "[bold]yes"}]
    (tmp_path / "a[b].jsonl").write_text(json.dumps({"messages": messages}))
    run(
        str(tmp_path / "model"),
        data=str(tmp_path / "a[b].jsonl"),
        cache_dir=str(tmp_path / "cache"),
    )
    printed = capsys.readouterr().out
    assert "a[b].jsonl, ex" in printed and "[/b][/INST]⟦[bold]yes</s>⟧" in printed
    assert "boundary: '[/INST]' is masked, '[' is trained" in printed


def test_data_is_given_as_training_takes_it_or_as_words(root, file):
    base, seen = str(root / "data" / "tiny-base"), []
    for words, flags in (((), {"data": str(file)}), ((), {"data_path": str(file)}), ((file,), {})):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run(base, *map(str, words), **flags, json=True)
        seen.append(json.loads(out.getvalue()))
    assert seen[0] == seen[1] == seen[2] and str(file) in seen[0]


def test_bad_arguments(root, file):
    base = str(root / "data" / "tiny-base")
    for arguments, message in [
        ({}, "give a model and --data FILE"),
        ({"model": base, "data": "none.json"}, "none.json: no such file"),
        ({"model": "./none", "data": str(file)}, "cannot load a model"),
        ({"model": base, "data": str(file), "examples": -1}, "--examples -1"),
        (
            {"model": base, "data": str(file), "prompt_template": "vicuna"},
            "--prompt_template vicuna: choose from auto",
        ),
        (
            {"model": base, "data": str(file), "columns": "outptu=a"},
            "outptu is no column of ours; did you mean output",
        ),
        (
            {"model": base, "data": str(file), "exmples": 1},
            "unknown argument --exmples; did you mean --examples",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            run(**arguments)


def test_columns_in_either_spelling_and_names_that_are_not_there(root, tmp_path, capsys):
    base, file = str(root / "data" / "tiny-base"), tmp_path / "qa.csv"
    file.write_text("question,answer,output\nWhat?,right,wrong\n")
    for more, columns in (
        ((), "instruction=question,output=answer"),
        (("output=answer",), "instruction=question"),
    ):
        run(
            base,
            *more,
            data=str(file),
            columns=columns,
            json=True,
            cache_dir=str(tmp_path / "cache"),
        )
        (source,) = json.loads(capsys.readouterr().out).values()
        assert (
            "".join(piece for piece, trained in source["examples"][0]["pieces"] if trained)
            == "right</s>"
        )
    with pytest.raises(
        UserError,
        match="output=anser: there is no 'anser'; the first record has question, answer, output",
    ):
        run(base, "output=anser", data=str(file), columns="instruction=question")
