"""The prompts that a model was trained with are saved in its tokenizer.

Transformers writes them from its chat template, and this package follows them.
"""

import pytest
from transformers import AutoTokenizer, GenerationConfig

from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.prompts import TurnsTemplate, alpaca_turns, plain_turns
from stanford_alpaca.data.records import parse_record
from stanford_alpaca.data.templates import (
    follow,
    resolve_template,
    set_stops,
    sign,
    told_templates,
    trained_prompts,
    use_chat_template,
)
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.errors import UserError
from tests.data.test_tokenize import tokenizers  # noqa: F401 - a fixture

KINDS = ["sentencepiece", "byte-level", "unigram"]
CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [
    ({"instruction": "Add.", "output": "x"}, [{"role": "user", "content": "Add."}]),
    (
        {"instruction": "Add.", "input": "1\n and 2"},
        [{"role": "user", "content": "Add.\n\n### Input:\n1\n and 2"}],
    ),
    (
        {"instruction": "Ünïcode ☃ 漢字", "system": "Be brief."},
        [SYSTEM, {"role": "user", "content": "Ünïcode ☃ 漢字"}],
    ),
    (
        {"instruction": "c", "input": "d", "history": [["a", " b "], ["", "e"]]},
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": " b "},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "e"},
            {"role": "user", "content": "c\n\n### Input:\nd"},
        ],
    ),
]


@pytest.fixture
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


def ids_of(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)[
        "input_ids"
    ]


def asked_as_trained(tokenizer, record, turns=alpaca_turns):
    template = TurnsTemplate(turns, TextEncoder.of(tokenizer))
    ((ids, _),) = template.encoder(
        [template.prompt(parse_record(record, "here", needs_output=False))]
    )
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_writes_alpacas_prompts_as_training_did(
    tokenizers,  # noqa: F811
    kind,
    tmp_path,
):
    tokenizers[kind].save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert sign(tokenizer, ["alpaca"]) == []
    tokenizer.save_pretrained(tmp_path / "trained")
    saved = AutoTokenizer.from_pretrained(tmp_path / "trained")
    for record, messages in ASKED:
        assert ids_of(saved, messages) == asked_as_trained(tokenizer, record), record
        assert PromptEncoder(saved)([parse_record(record, "here", needs_output=False)]) == [
            ids_of(saved, messages)
        ]
        assert PromptEncoder(saved)([{"messages": messages}]) == [ids_of(saved, messages)]
    assert trained_prompts(saved) == ("alpaca", "text")
    with pytest.raises(Exception, match="turns have to alternate"):
        ids_of(saved, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_writes_prompts_that_stand_alone_as_training_did(
    tokenizers,  # noqa: F811
    kind,
    tmp_path,
):
    tokenizers[kind].save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert sign(tokenizer, ["plain"]) == []
    record = {"prompt": "Another word for\n", "completion": "x"}
    assert ids_of(tokenizer, [{"role": "user", "content": record["prompt"]}]) == asked_as_trained(
        tokenizer, record, plain_turns
    )
    assert PromptEncoder(tokenizer)([{"instruction": "Add.", "input": ""}]) == [
        ids_of(tokenizer, [{"role": "user", "content": "Add."}])
    ]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith(f"ab{tokenizer.eos_token}c")


def test_a_tokenizer_that_puts_no_token_before_texts_gets_none(tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert sign(tokenizer, ["alpaca"]) == []
    assert not tokenizer.chat_template.startswith("{{-") and tokenizer.bos_token_id not in ids_of(
        tokenizer, ASKED[0][1]
    )


def test_what_was_trained_is_followed_and_something_else_can_be_asked_for(tokenizer):
    tokenizer.chat_template = CHAT
    assert trained_prompts(tokenizer) is None
    # The chat template is not signed, so the prompts are those that training would choose.
    assert follow(tokenizer, "alpaca", "auto", None) == ("alpaca", "text")
    assert follow(tokenizer, "chat", "auto", None) == ("chat", "text")
    sign(tokenizer, ["chat"], "parse")
    assert tokenizer.chat_template == CHAT and trained_prompts(tokenizer) == ("chat", "parse")
    for form in ("alpaca", "chat", "completion"):
        assert follow(tokenizer, form, "auto", None) == ("chat", "parse")
    assert follow(tokenizer, "text", "auto", None) == ("plain", "parse")
    assert follow(tokenizer, "alpaca", "alpaca", "text") == ("alpaca", "text")
    asked = PromptEncoder(tokenizer)([{"instruction": "Add.", "input": "1"}])
    assert asked == [ids_of(tokenizer, [{"role": "user", "content": "Add.\n\n1"}])]
    tokenizer.chat_template += " "  # as if somebody else had changed it
    assert trained_prompts(tokenizer) is None and follow(tokenizer, "alpaca", "auto", None) == (
        "alpaca",
        "text",
    )


def test_a_model_of_alpacas_prompts_is_trained_on_with_them(tokenizer):
    sign(tokenizer, ["alpaca"])
    assert (
        resolve_template("auto", "chat", tokenizer) == "alpaca"
        and resolve_template("chat", "chat", tokenizer) == "alpaca"
    )
    assert told_templates(["alpaca"], tokenizer) == ["prompts: Alpaca's template"]
    tokenizer.chat_template = CHAT
    assert (
        "which is not used: --prompt_template chat uses it"
        in told_templates(["alpaca"], tokenizer)[0]
    )
    assert sign(tokenizer, ["alpaca"]) == [
        "the saved chat_template writes the prompts that are trained; "
        "the tokenizer's own is not kept"
    ]
    sign(tokenizer, ["plain"])  # its Jinja cannot train chats
    assert resolve_template("auto", "chat", tokenizer) == "alpaca"
    tokenizer.chat_template = {"default": CHAT}
    sign(tokenizer, ["chat"])
    assert tokenizer.chat_template == CHAT  # as a saved tokenizer is read back


def test_several_templates_leave_the_one_that_serves_most_and_a_line(tokenizer):
    (line,) = sign(tokenizer, ["plain", "alpaca"])
    assert (
        line == "several templates write the prompts (alpaca, plain): "
        "the saved chat_template is Alpaca's"
    )
    assert follow(tokenizer, "completion", "auto", None).template == "plain"
    assert follow(tokenizer, "alpaca", "auto", None).template == "alpaca"
    tokenizer.chat_template = CHAT
    (line,) = sign(tokenizer, ["alpaca", "chat"])
    assert "the tokenizer's own" in line and tokenizer.chat_template == CHAT
    # Training on running text changes nothing.
    assert sign(tokenizer, []) == [] and trained_prompts(tokenizer) is not None


def test_named_templates_keep_their_names(tokenizer, tmp_path):
    tokenizer.chat_template = {"default": CHAT, "tool_use": CHAT + " "}
    sign(tokenizer, ["chat"])
    tokenizer.save_pretrained(tmp_path)
    assert trained_prompts(AutoTokenizer.from_pretrained(tmp_path)) == ("chat", "text")


def test_a_chat_template_is_given_as_a_file_a_folder_or_a_name(tokenizer, root, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT, encoding="utf-8")
    use_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == CHAT
    tokenizer.save_pretrained(tmp_path / "other")
    fresh = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    use_chat_template(fresh, str(tmp_path / "other"))
    assert fresh.chat_template == CHAT
    fresh.chat_template = {"rag": CHAT + "r", "tool_use": CHAT + "t"}
    with pytest.raises(
        UserError,
        match="chat templates named rag, tool_use, and none is the default: "
        "choose one with --chat_template NAME",
    ):
        PromptEncoder(fresh, "chat")([{"instruction": "a", "input": ""}])
    with pytest.raises(
        UserError,
        match=r"--chat_template rga: no file.*the tokenizer's own are named rag, tool_use",
    ):
        use_chat_template(fresh, "rga")
    use_chat_template(fresh, "rag")
    assert fresh.chat_template == CHAT + "r"
    (tmp_path / "broken.jinja").write_text("{% for %}")
    for source, message in [
        (tmp_path / "broken.jinja", "no Jinja"),
        (root / "data" / "tiny-base", "its tokenizer has no chat template"),
        (tmp_path / "none.jinja", "no such file"),
        (tmp_path / "none", "no file, and no tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            use_chat_template(fresh, str(source))


@pytest.mark.parametrize(("before", "after"), [(None, 1), (1, 1), (0, [1, 0]), ([0, 5], [1, 0, 5])])
def test_the_tokens_that_end_answers_join_those_of_the_base(tokenizer, before, after):
    config = GenerationConfig(eos_token_id=before)
    assert tokenizer.eos_token_id == 1
    set_stops(config, tokenizer)
    assert config.eos_token_id == after


def test_a_system_message_may_be_empty(tokenizer):
    sign(tokenizer, ["alpaca"])
    question = {"role": "user", "content": "Add."}
    assert ids_of(tokenizer, [{"role": "system", "content": ""}, question]) == ids_of(
        tokenizer, [question]
    )


def test_a_question_of_nothing_is_a_prompt_of_nothing(tokenizer):
    sign(tokenizer, ["plain"])
    assert PromptEncoder(tokenizer)([{"messages": [{"role": "user", "content": ""}]}]) == [
        [tokenizer.bos_token_id]
    ]


def test_a_templates_file_may_begin_with_a_mark(tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT, encoding="utf-8-sig")
    use_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == CHAT
    for source, message in (("", "without a name"), ("a" * 300, "no file, and no tokenizer")):
        with pytest.raises(UserError, match=message):
            use_chat_template(tokenizer, source)


def test_tags_that_the_tokenizer_has_names_for_are_tags(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(tmp_path)
    names = {"think_token": "<think>", "think_end_token": "</think>"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens=names)
    assert tokenizer.special_tokens_map["think_token"] == "<think>"
    assert TextEncoder.of(tokenizer).tags == {"<think>", "</think>"}


def test_a_model_asked_otherwise_than_it_was_trained(tokenizer):
    tokenizer.chat_template = CHAT
    sign(tokenizer, ["alpaca", "chat"])
    for asked, said in (
        (("auto", None), ""),
        (("chat", None), ""),
        (("auto", "parse"), "trained with --special_tokens text, asked here with parse"),
        (
            ("alpaca", None),
            "trained with the tokenizer's chat template, asked here with Alpaca's template",
        ),
    ):
        encode = PromptEncoder(tokenizer, *asked)
        encode([{"messages": [{"role": "user", "content": "a"}]}])
        assert encode.otherwise == {"chat": said}
