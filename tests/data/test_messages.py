"""Fields of a record beside its texts: weights, reasoning, tools and history.

Fields that are not read are named.
"""

import json
import sys

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.messages import more_of
from stanford_alpaca.data.records import parse_record, unused_fields
from stanford_alpaca.data.report import EMPTY, KEPT, REFUSED
from stanford_alpaca.data.tokenize import IGNORE_INDEX, ExampleEncoder, tokenize_records
from stanford_alpaca.errors import UserError
from tests.helpers import trained_texts

CHAT = (
    "{% for m in messages %}{{ m.role + ':\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture
def tokenizer(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.chat_template = CHAT
    return tokenizer


def encoded(tokenizer, record, form=None, template="auto", reading="text", **options):
    row = parse_record(record, "here", **options)
    form = form or (
        "chat"
        if "messages" in row
        else "alpaca"
        if "instruction" in row
        else next(iter(row)).replace("prompt", "completion")
    )
    encode = ExampleEncoder.of(tokenizer, form, 512, template, reading)
    return {
        name: column[0]
        for name, column in encode({name: [value] for name, value in row.items()}).items()
    }


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}]
)
def test_a_turn_that_counts_for_nothing_is_context(tokenizer, off):
    conversation = [USER, {**ANSWER, **off}, USER, {**ANSWER, "content": "That."}]
    for template in ("chat", "alpaca"):
        row = encoded(tokenizer, {"messages": conversation}, template=template)
        assert trained_texts(tokenizer, row["labels"]) == [
            "That.</s>"
        ] and "This." in tokenizer.decode(row["input_ids"])
        assert row["weights"] == [] and row["fate"] == KEPT
    for record in (
        {"messages": [USER, ANSWER]},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"text": "a b"},
    ):
        row = encoded(tokenizer, record | off)
        assert row["fate"] == EMPTY and set(row["labels"]) == {IGNORE_INDEX}


def test_weights_of_turns_and_records_multiply(tokenizer):
    conversation = [USER, {**ANSWER, "weight": 0.5}, USER, {**ANSWER, "weight": 2}, USER, ANSWER]
    for weight in (1, 3):
        row = encoded(tokenizer, {"messages": conversation, "weight": weight})
        by_label = [
            (label, w)
            for label, w in zip(row["labels"], row["weights"], strict=True)
            if label != IGNORE_INDEX
        ]
        each = len(by_label) // 3
        assert [w for _, w in by_label] == [0.5 * weight] * each + [2 * weight] * each + [
            weight
        ] * each
        assert all(
            w == 1
            for label, w in zip(row["labels"], row["weights"], strict=True)
            if label == IGNORE_INDEX
        )
    for record in (
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"text": "a b"},
    ):
        row = encoded(tokenizer, record | {"weight": "0.25"})  # a string, as from CSV
        assert {
            w
            for label, w in zip(row["labels"], row["weights"], strict=True)
            if label != IGNORE_INDEX
        } == {0.25}
        assert encoded(tokenizer, record)["weights"] == []


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan"), "-0.5", 1e300, 10**400])
def test_a_weight_that_cannot_be_is_refused(weight):
    with pytest.raises(
        UserError, match=r"here: 'weight' is .*, wanted a number from 0 to 1,000,000"
    ):
        parse_record({"instruction": "a", "output": "b", "weight": weight}, "here")
    with pytest.raises(UserError, match="message 2: 'weight' is"):
        parse_record({"messages": [USER, {**ANSWER, "weight": weight}]}, "here")


def test_what_is_no_weight_is_something_else():
    record = parse_record(
        {"instruction": "a", "output": "b", "weight": "12 kg", "train": "ICE 577"}, "here"
    )
    assert more_of(record) == {"unused": ["train", "weight"]}
    record = parse_record({"messages": [{**USER, "weight": 2}, ANSWER]}, "here")
    assert more_of(record) == {"unused": ["messages.weight"]}
    record = parse_record({"messages": [{**USER, "weight": 1}, {**ANSWER, "weight": True}]}, "here")
    assert more_of(record) == {}  # these weights change nothing


# ---- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("completion", [[ANSWER], "This."])
def test_the_prompts_answers_are_context(tokenizer, completion):
    record = {"prompt": [USER, {**ANSWER, "content": "No."}, USER], "completion": completion}
    for template in ("chat", "alpaca"):
        row = encoded(tokenizer, record, template=template)
        assert trained_texts(tokenizer, row["labels"]) == [
            "This.</s>"
        ] and "No." in tokenizer.decode(row["input_ids"])


def test_history_is_context_unless_it_is_trained(tokenizer):
    record = {"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"], ["f", "g"]]}
    row = encoded(tokenizer, record)
    assert trained_texts(tokenizer, row["labels"]) == ["e</s>"]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith(
        "<s>Below is an instruction that describes a task. Write"
    ) and text.endswith(
        "### Instruction:\na\n\n### Response:b</s>\n\n### Instruction:\nf\n\n### Response:g</s>"
        "\n\n### Instruction:\nc\n\n### Input:\nd\n\n### Response:e</s>"
    )
    assert trained_texts(tokenizer, encoded(tokenizer, record, train_history=True)["labels"]) == [
        "b</s>",
        "g</s>",
        "e</s>",
    ]
    assert trained_texts(tokenizer, encoded(tokenizer, record, template="chat")["labels"]) == [
        "e</s>"
    ]
    for nothing in (None, [], "", "[]"):
        assert encoded(tokenizer, record | {"history": nothing}) == encoded(
            tokenizer, {**record, "history": []}
        )
    for wrong, message in [
        ("x", "is a string that is no JSON"),
        ([["a"]], "is no list of pairs"),
        ([["a", 1]], "pair 1 is a number"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_record(record | {"history": wrong}, "here")


@pytest.mark.parametrize("as_text", [False, True])
def test_messages_as_json_or_as_columns(tmp_path, as_text):
    messages = [USER, ANSWER]
    if as_text:
        record = {"messages": json.dumps(messages)}
    else:
        record = {"messages": {"role": ["user", "assistant"], "content": ["What?", "This."]}}
    Dataset.from_list([record]).to_parquet(tmp_path / "a.parquet")
    (row,) = load_records(tmp_path / "a.parquet", str(tmp_path / "cache"))
    assert row["messages"] == [{**message, "more": ""} for message in messages]
    with pytest.raises(UserError, match="is a string that is no JSON, wanted a list of messages"):
        parse_record({"messages": "hello"}, "here")


# ---- reasoning and tools -------------------------------------------------------------------------


def test_reasoning_without_a_place_is_counted(tokenizer):
    record = {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}
    (note,) = encoded(tokenizer, record)["notes"]
    assert note.startswith(
        "the template leaves out the reasoning of the last answer, "
        "and all of it is lost; --chat_template"
    )
    (note,) = encoded(tokenizer, record, template="alpaca")["notes"]
    assert note.startswith("the reasoning of a turn has no place in this template")


def test_tools_have_no_place_in_alpacas_template(tokenizer):
    for record in (
        {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]},
        {"messages": [USER, ANSWER], "tools": json.dumps([CALL])},
        {"instruction": "a", "output": "b", "tools": [CALL]},
    ):
        row = encoded(tokenizer, record, template="alpaca")
        assert row["fate"] == REFUSED and "Alpaca's template has no place for" in row["refusal"]
    for nothing in ("", "[]", [], None):
        assert (
            encoded(tokenizer, {"instruction": "a", "output": "b", "tools": nothing})["fate"]
            == KEPT
        )


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([{"name": "f", "arguments": "{"}], "'arguments' of a call is a string that is no JSON"),
        ([{"name": "f", "arguments": [1]}], "'arguments' of a call is a list, wanted an object"),
        ([{"arguments": {}}], "is no call of a tool"),
        ("not JSON", "is a string that is no JSON, wanted a call"),
    ],
)
def test_broken_calls(calls, message):
    with pytest.raises(UserError, match=message):
        parse_record({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}, "here")
    with pytest.raises(UserError, match=message):
        parse_record(
            {
                "conversations": [
                    {
                        "from": "function_call",
                        "value": calls if isinstance(calls, str) else json.dumps(calls),
                    }
                ]
            },
            "here",
        )


def test_a_call_in_every_spelling():
    spellings = [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]},
        {
            "tool_calls": json.dumps([{"function": {"name": "add", "arguments": {"a": 1}}}]),
            "content": None,
        },
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}},
    ]
    for spelling in spellings:
        record = parse_record({"messages": [USER, {"role": "assistant", **spelling}]}, "here")
        assert (
            more_of(record["messages"][1]) == {"tool_calls": [CALL]}
            and record["messages"][1]["content"] == ""
        )


def test_nulls_that_a_table_adds_are_no_arguments(tmp_path):
    other = {"type": "function", "function": {"name": "mul", "arguments": {"b": 2}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in (CALL, other)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    found = load_records(tmp_path / "a.parquet", str(tmp_path / "cache"))
    assert [more_of(row["messages"][1]) for row in found] == [
        {"tool_calls": [CALL]},
        {"tool_calls": [other]},
    ]


# ---- what is not read ----------------------------------------------------------------------------


def test_fields_that_are_not_read_are_named_and_counted(tokenizer, tmp_path):
    records = [
        {
            "instruction": "a",
            "output": "b",
            "score": i,
            **({"id": "x"} if i < 2 else {}),
            "empty": None,
        }
        for i in range(5)
    ]
    records[0]["text"] = "a b"
    (tmp_path / "a.json").write_text(json.dumps(records))
    read = load_records(tmp_path / "a.json", str(tmp_path / "cache"))
    assert unused_fields(read) == {"score": 5, "id": 2, "text": 1}
    report = tokenize_records(read, tokenizer, 512)[1]
    assert report.lines()[1:] == ["not used: score (5 of 5 records), id (2), text (1)"]
    messages = [{**USER, "id": 7}, {**ANSWER, "logprobs": [1], "refusal": None}]
    assert more_of(parse_record({"messages": messages, "n": 1}, "here")) == {
        "unused": ["messages.id", "messages.logprobs", "n"]
    }
    columns = {"instruction": "question", "output": "answer"}
    assert more_of(
        parse_record({"question": "a", "answer": "b", "output": "c"}, "here", columns)
    ) == {"unused": ["output"]}


# ---- special tokens ------------------------------------------------------------------------------


@pytest.fixture
def thinking(tokenizer):
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>", "<|python_tag|>"]}
    )
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% set c = m.content.split('</think>')[-1] if not loop.last else m.content %}"
        "{{ m.role + ':\\n' + c + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    return tokenizer


def test_tags_that_mark_reasoning_are_tokens_in_answers_and_reach_the_template(thinking):
    answer = {"role": "assistant", "content": "<think>Hm.</think>This."}
    user = {"role": "user", "content": "a <think> b"}
    row = encoded(thinking, {"messages": [user, answer, user, answer]}, template="chat")
    open_id, close_id = thinking.convert_tokens_to_ids(["<think>", "</think>"])
    # The tags in the user's messages stay text.
    assert row["input_ids"].count(open_id) == row["input_ids"].count(close_id) == 1
    assert trained_texts(thinking, row["labels"]) == ["This.</s>", "<think>Hm.</think>This.</s>"]
    assert any(
        note.startswith("'<think>' in a field is text, not the special token")
        for note in row["notes"]
    )
    without = encoded(thinking, {"messages": [USER, answer]}, template="chat")
    own = thinking.apply_chat_template([USER, answer], tokenize=True)["input_ids"]
    assert without["input_ids"] == own and not without["notes"]
    for record in (
        {"instruction": "a", "output": answer["content"]},
        {"prompt": "a", "completion": answer["content"]},
    ):
        row = encoded(thinking, record)
        assert [row["labels"].count(number) for number in (open_id, close_id)] == [
            1,
            1,
        ] and not row["notes"]


def test_texts_that_are_rendered_already(thinking):
    tag = thinking.convert_tokens_to_ids("<|python_tag|>")
    record = {"prompt": "<s>[INST] a [/INST]", "completion": " <|python_tag|>b</s>"}
    row = encoded(thinking, record, reading="parse")
    assert (
        row["input_ids"]
        == thinking(record["prompt"] + record["completion"], add_special_tokens=False)["input_ids"]
    )
    assert row["input_ids"].count(0) == row["input_ids"].count(1) == 1  # neither token is doubled
    assert trained_texts(thinking, row["labels"]) == [" <|python_tag|>b</s>"] and not row["notes"]
    as_text = encoded(thinking, record)
    assert tag not in as_text["input_ids"] and as_text["input_ids"].count(1) == 1
    assert [note.split(" in ")[0] for note in as_text["notes"]] == [
        "'<s>'",
        "'<|python_tag|>'",
        "'</s>'",
    ]
    row = encoded(thinking, {"text": "<s>a</s>"}, reading="parse")
    assert row["input_ids"] == thinking("<s>a</s>", add_special_tokens=False)["input_ids"]
    row = encoded(
        thinking,
        {"messages": [USER, {"role": "assistant", "content": "<|python_tag|>x"}]},
        reading="parse",
        template="chat",
    )
    assert tag in row["labels"]


# ---- ends ----------------------------------------------------------------------------------------


def test_a_token_that_reaches_past_the_end_of_an_answer_is_not_trained(tokenizer):
    """The answer's last letters and the text that ends the turn form one token."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + 'uction\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    row = encoded(
        tokenizer,
        {"messages": [USER, {"role": "assistant", "content": "One instr"}, USER, ANSWER]},
        template="chat",
    )
    assert "\u0120instruction" in tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert trained_texts(tokenizer, row["labels"]) == ["One", "This.</s>"] and row["straddling"]


def test_an_end_of_turn_token_that_the_author_leaves_out_is_trained_and_said(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    row = encoded(tokenizer, {"messages": [USER, {**ANSWER, "weight": 0.5}, USER, ANSWER]})
    assert trained_texts(tokenizer, row["labels"]) == ["This.</s>", "This.</s>"]
    assert (
        row["notes"][0] == "the template's {% generation %} marks leave the end-of-turn token out: "
        "it is trained too"
    )
    assert sorted(
        {w for label, w in zip(row["labels"], row["weights"], strict=True) if label != IGNORE_INDEX}
    ) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        (
            {"content": [{"type": "text", "text": None}]},
            "the 'text' of a part is null, wanted a string",
        ),
        (
            {"content": [{"type": "text", "text": {"a": 1}}]},
            "the 'text' of a part is an object, wanted a string",
        ),
        ({"content": [{"type": "text"}]}, "the 'text' of a part is null, wanted a string"),
        (
            {"tool_calls": '{"name": "f", "name": "g"}'},
            "wanted a call or a list of calls .the key 'name' stands twice",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]},
            "'arguments' of a call is a string that is no JSON",
        ),
    ],
)
def test_nothing_of_a_message_becomes_something_else(message, refused):
    with pytest.raises(UserError, match=refused):
        parse_record({"messages": [USER, {"role": "assistant", **message}]}, "here")


def test_columns_of_unequal_lengths_are_refused():
    columns = {"role": ["user", "assistant"], "content": ["a", "b", "c"]}
    with pytest.raises(
        UserError,
        match="here: 'messages': an object of lists of several lengths, "
        "wanted one for each message",
    ):
        parse_record({"messages": columns}, "here")


def test_fields_within_calls_and_parts_are_named():
    call = {
        "id": 7,
        "index": 0,
        "type": "function",
        "function": {"name": "f", "arguments": "", "strict": True},
    }
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    record = {
        "messages": [
            {"role": "user", "content": [part]},
            {"role": "assistant", "tool_calls": [call]},
        ]
    }
    wanted = ["content.cache_control", "tool_calls.id", "tool_calls.index", "tool_calls.strict"]
    assert more_of(parse_record(record, "here"))["unused"] == [
        f"messages.{name}" for name in wanted
    ]


def test_yes_and_no_in_other_words(tokenizer):
    for off in ({"train": 0}, {"train": "no"}, {"weight": False}):
        assert encoded(tokenizer, {"messages": [USER, ANSWER], **off})["fate"] == EMPTY
    assert encoded(tokenizer, {"messages": [USER, ANSWER], "train": 1})["fate"] == KEPT


def test_records_without_messages_may_have_a_field_called_tools():
    for record in (
        {"text": "a", "tools": "saw"},
        {"prompt": "a", "completion": "b", "tools": "saw"},
    ):
        assert more_of(parse_record(record, "here"))["unused"] == ["tools"]


def test_texts_as_they_are_have_no_place_for_tools(tokenizer):
    calling = {**ANSWER, "tool_calls": [CALL]}
    for record, what in (
        ({"messages": [USER, ANSWER], "tools": [CALL]}, "tools"),
        ({"messages": [USER, calling]}, "the calls of tools"),
        ({"messages": [USER, {"role": "tool", "content": "1"}, ANSWER]}, "the results of tools"),
    ):
        for template, who in (
            ("plain", "texts as they are have"),
            ("alpaca", "Alpaca's template has"),
        ):
            row = encoded(tokenizer, record, template=template)
            assert row["refusal"] == f"{who} no place for {what}; use --prompt_template chat"


@pytest.mark.parametrize(
    "record",
    [
        {
            "tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}],
            "messages": [USER, ANSWER],
        },
        {"x\ud800": 1, "instruction": "a", "output": "b"},
        {"messages": [USER, {**ANSWER, "tool_calls": [{"id": "\ud800", **CALL}]}]},
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(record):
    with pytest.raises(UserError, match="has a lone surrogate, which is no text; remove it"):
        parse_record(record, "here")


def test_a_field_nested_too_deep_is_refused(tokenizer):
    # JSON is read, and then no Python function can go so deep; from 3.12 on their limits differ
    levels = 900 if sys.version_info < (3, 12) else 1400
    deep = '{"x":' + "[" * levels + "]" * levels + "}"
    row = encoded(
        tokenizer,
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": deep}]}]},
        template="chat",
    )
    assert row["fate"] == REFUSED and "nested too deep" in row["refusal"]
