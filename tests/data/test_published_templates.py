"""Ids and masks under published chat templates.

TRL's package has the originals, and twins of them that its authors marked for training.
"""

import json
import re
from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.records import parse_record
from stanford_alpaca.data.report import KEPT, REFUSED
from stanford_alpaca.data.tokenize import IGNORE_INDEX, WEIGHTED, ExampleEncoder, PromptEncoder
from tests.helpers import trained_texts

FOLDER = files("trl") / "chat_templates"
WIDE = "\uff5c"  # DeepSeek's bar
NAMES = re.compile(
    rf"<\|[^<>|\s]{{2,40}}\|>|<\|[a-z_]+>|<[a-z_]+\|>|<{WIDE}[^<>]{{2,40}}{WIDE}>"
    r"|<(?:start|end)_of_turn>|<end_of_utterance>"
)
PLAIN = [
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gptoss",
    "lfm2", "lfm2_v2", "llama3", "muse_glimmer", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink",
    "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "diffusion_gemma",
]  # fmt: skip
REASON = [
    "gptoss", "muse_glimmer", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3",
    "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "diffusion_gemma", "glm4moe",
]  # fmt: skip
CALLS = [
    "deepseekv3", "gptoss", "lfm2_v2", "muse_glimmer", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6",
    "qwen3_8", "qwen3_instruct_2507",
]  # fmt: skip
# In these templates a message's content is a list of parts.
IMAGES = ("idefics3_training", "llava_next_training", "smolvlm_training")
NO_CALLS = ["cohere", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5_vl"]
# As in SmolLM2-Instruct, a default system prompt stands where the messages have none.
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

USER, ANSWER = (
    {"role": "user", "content": "What is big?"},
    {"role": "assistant", "content": "Large."},
)
AGAIN = [
    {"role": "user", "content": "And small?"},
    {"role": "assistant", "content": "Little, or tiny."},
]
SPACE = [
    USER,
    {"role": "assistant", "content": " One word."},
    USER,
    {"role": "assistant", "content": " Two words."},
]
THOUGHT = {**ANSWER, "reasoning_content": "Of size, more than most."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "x"}},
            "required": ["a"],
        },
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": "Add 1."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call00001", "name": "add"},
    {"role": "assistant", "content": "It is 2."},
]


def template_of(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def tokenizer_with(root):
    """Returns a function that gives the shipped tokenizer a template and its special tokens."""

    def make(template):
        tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
        names = sorted(set(NAMES.findall(template)))
        if names:
            tokenizer.add_special_tokens(
                {"additional_special_tokens": names}, replace_extra_special_tokens=False
            )
        tokenizer.chat_template = template
        return tokenizer

    return make


def encoded(tokenizer, record):
    encode = ExampleEncoder.of(tokenizer, "chat", 4096, "chat")
    row = parse_record(record, "here")
    return encode, {
        name: column[0]
        for name, column in encode({name: [value] for name, value in row.items()}).items()
    }


def marked(tokenizer, name, messages, tools=None):
    """Returns the texts that TRL's twin of a template marks, as transformers renders them."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template_of(f"{name}_training"), **options
    )
    mask = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return trained_texts(tokenizer, [number if inside else IGNORE_INDEX for number, inside in mask])


def spelled(name, messages):
    """Returns messages as transformers 5.17 needs them for a template that says ``thinking``."""
    return [
        {**message, "thinking": message["reasoning_content"]}
        if name.startswith("gptoss") and "reasoning_content" in message
        else message
        for message in messages
    ]


def check(tokenizer, name, messages, tools=None, written=None):
    """Checks ids and trained texts, and returns the trained texts.

    The ids equal those of transformers. The trained texts are what the twin marks, without the
    generation prompt and without what follows the turn.
    """
    encode, row = encoded(tokenizer, {"messages": messages} | ({"tools": tools} if tools else {}))
    assert row["fate"] == KEPT, row["refusal"]
    own = tokenizer.apply_chat_template(
        spelled(name, written or messages), tools=tools, tokenize=True
    )["input_ids"]
    assert row["input_ids"] == own
    ours = trained_texts(tokenizer, row["labels"])
    theirs = marked(tokenizer, name, spelled(name, messages), tools)
    assert len(ours) == len(theirs) == sum(message["role"] == "assistant" for message in messages)
    for one, other in zip(ours, theirs, strict=True):
        before, found, after = other.partition(one)
        assert found and not after.strip(), (one, other)
        assert (
            not before
            or any(before in cue for cue in encode.template.cues)
            or before.startswith(f"<{WIDE}tool")
        ), (
            one,
            other,
        )
    return ours


@pytest.mark.parametrize("name", PLAIN)
def test_answers_are_what_the_twin_marks(tokenizer_with, name):
    tokenizer = tokenizer_with(template_of(name))
    assert (
        check(tokenizer, name, [USER, ANSWER])[0]
        .lstrip("<think>/\n")
        .replace("<|channel|>final<|message|>", "")
    )
    check(tokenizer, name, [USER, ANSWER, *AGAIN])
    trained = check(tokenizer, name, SPACE)
    # No first word is lost.
    assert ["One" in text for text in trained] == [True, False] and "Two" in trained[1]
    if name not in ("gemma", "phi3_5"):
        check(tokenizer, name, [{"role": "system", "content": "Be brief."}, USER, ANSWER])


@pytest.mark.parametrize("name", REASON)
def test_reasoning_is_trained_where_the_template_writes_it(tokenizer_with, name):
    tokenizer = tokenizer_with(template_of(name))
    for field in ("reasoning_content", "thinking", "reasoning"):
        _, row = encoded(
            tokenizer, {"messages": [USER, {**ANSWER, field: THOUGHT["reasoning_content"]}]}
        )
        (trained,) = trained_texts(tokenizer, row["labels"])
        assert trained.index("Of size, more than most.") < trained.index("Large.")
        if name == "qwen3_5_nothink":  # its prompt closes the thought at once
            assert row["notes"].pop().startswith("the answer does not follow the generation prompt")
        assert not row["notes"]
    # A turn of GLM ends with the first token of the next turn. The last turn gets the
    # end-of-sequence token here, so its ids differ from those of transformers.
    if name != "glm4moe":
        check(tokenizer, name, [USER, THOUGHT])
    _, row = encoded(tokenizer, {"messages": [USER, THOUGHT, *AGAIN]})
    kept = "Of size" in tokenizer.decode(row["input_ids"])
    assert ("the template leaves out the reasoning of a turn" in row["notes"]) == (not kept)


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_tools_are_trained_as_turns(tokenizer_with, name):
    tokenizer, written = tokenizer_with(template_of(name)), None
    # DeepSeek-V3's template writes arguments as they are, and leaves out the list of tools.
    if name == "deepseekv3":
        as_text = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}
        written = [
            {**message, "tool_calls": [as_text]} if "tool_calls" in message else message
            for message in CALLING
        ]
    tools = None if name == "deepseekv3" else [TOOL]
    call, answer = check(tokenizer, name, CALLING, tools, written)
    assert (
        "add" in call
        and "1" in call
        and "2" not in call.split("add")[1]
        and answer.count("It is 2.") == 1
    )
    in_sharegpt = [
        {"from": "human", "value": "Add 1."},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ]
    _, row = encoded(
        tokenizer,
        {"conversations": in_sharegpt, **({"tools": json.dumps([TOOL])} if tools else {})},
    )
    assert row["fate"] == KEPT and "add" in trained_texts(tokenizer, row["labels"])[0]


@pytest.mark.parametrize("name", ["idefics3", "llava_next", "smolvlm", *IMAGES])
def test_templates_that_want_lists_of_parts_get_them(tokenizer_with, name):
    tokenizer = tokenizer_with(template_of(name))
    _, row = encoded(tokenizer, {"messages": [USER, ANSWER, *AGAIN]})
    parts = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} for m in [USER, ANSWER, *AGAIN]
    ]
    own = tokenizer.apply_chat_template(parts, tokenize=True)["input_ids"]
    assert row["fate"] == KEPT and row["input_ids"][: len(own)] == own
    assert [text.split("<")[0].strip() for text in trained_texts(tokenizer, row["labels"])] == [
        "Large.",
        "Little, or tiny.",
    ]
    (prompt,) = PromptEncoder(tokenizer)([{"messages": [USER]}])
    assert (
        prompt
        == tokenizer.apply_chat_template(parts[:1], tokenize=True, add_generation_prompt=True)[
            "input_ids"
        ]
    )


TWINS = sorted(
    name
    for path in FOLDER.iterdir()
    if (name := path.name.removesuffix(".jinja")).endswith("_training")
)


@pytest.mark.parametrize("name", [name for name in TWINS if name not in IMAGES])
def test_an_authors_marks_are_taken_at_their_word(tokenizer_with, name):
    """Some authors mark an answer in several blocks, others mark its end in a separate block."""
    tokenizer = tokenizer_with(template_of(name))
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for messages in (
        [USER, ANSWER],
        [USER, ANSWER, *AGAIN],
        [USER, THOUGHT],
        [USER, THOUGHT, *AGAIN],
        SPACE,
    ):
        _, row = encoded(tokenizer, {"messages": messages})
        own = tokenizer.apply_chat_template(spelled(name, messages), **options)
        assert row["input_ids"] == own["input_ids"]
        assert [label != IGNORE_INDEX for label in row["labels"]] == [
            bool(marked) for marked in own["assistant_masks"]
        ]
        off = [
            {**message, "weight": 0} if message is messages[1] else message for message in messages
        ]
        _, row = encoded(tokenizer, {"messages": off})
        assert len(trained_texts(tokenizer, row["labels"])) == len(messages) // 2 - 1


@pytest.mark.parametrize(
    "name", ["lfm2_2_5", "qwen3_training", "glm4moe_training", "nemotron_3_nano_training"]
)
def test_a_block_is_that_of_its_answer_where_the_template_cuts_thoughts_out(tokenizer_with, name):
    tokenizer = tokenizer_with(template_of(name))
    plain, last = (
        {"role": "assistant", "content": "Plain."},
        {"role": "assistant", "content": "Last."},
    )
    thinking = {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\nFour."}
    for weights in ((1, 0, 1), (0, 1, 1), (1, 1, 0)):
        answers = [
            {**answer, "weight": w}
            for answer, w in zip((plain, thinking, last), weights, strict=True)
        ]
        _, row = encoded(
            tokenizer, {"messages": [message for answer in answers for message in (USER, answer)]}
        )
        trained = "".join(trained_texts(tokenizer, row["labels"]))
        assert [int(word in trained) for word in ("Plain.", "Four.", "Last.")] == list(weights)
        cut = "the template leaves out or rewrites part of an answer" in row["notes"]
        assert cut == ("Two." not in tokenizer.decode(row["input_ids"]))
    _, row = encoded(tokenizer, {"prompt": [USER, plain, USER], "completion": [thinking]})
    assert row["fate"] == KEPT and "Four." in trained_texts(tokenizer, row["labels"])[0]


@pytest.mark.parametrize(
    ("name", "said"), [("gemma4", False), ("deepseekv3", False), ("diffusion_gemma", True)]
)
def test_an_answer_is_compared_with_the_prompt_for_it(tokenizer_with, name, said):
    """Gemma 4's template writes no generation prompt after the result of a tool."""
    tokenizer, written = tokenizer_with(template_of(name)), CALLING
    if name == "deepseekv3":
        calls = [{**CALL, "function": {**CALL["function"], "arguments": '{"a": 1}'}}]
        written = [CALLING[0], {**CALLING[1], "tool_calls": calls}, *CALLING[2:]]
    _, row = encoded(tokenizer, {"messages": CALLING})
    prompt = tokenizer.apply_chat_template(written[:-1], tokenize=True, add_generation_prompt=True)[
        "input_ids"
    ]
    asked = row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt)] != IGNORE_INDEX
    assert (
        asked
        != said
        == any("does not follow the generation prompt" in note for note in row["notes"])
    )


def test_blocks_that_touch_are_one_turn(tokenizer_with):
    block = "{{% generation %}}{{{{ {} }}}}{{% endgeneration %}}"
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        + "".join(map(block.format, ["m.thinking or ''", "m.content", "'<|im_end|>'"]))
        + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [USER, {**ANSWER, "weight": 0.5}, *AGAIN, USER, {**THOUGHT, "weight": 2}]
    _, row = encoded(tokenizer, {"messages": turns})
    wanted = [
        "Large.<|im_end|>",
        "Little, or tiny.<|im_end|>",
        "Of size, more than most.Large.<|im_end|>",
    ]
    assert trained_texts(tokenizer, row["labels"]) == wanted and row["notes"] == [WEIGHTED]
    trained = [
        weight
        for label, weight in zip(row["labels"], row["weights"], strict=True)
        if label != IGNORE_INDEX
    ]
    assert [weight for i, weight in enumerate(trained) if i == 0 or weight != trained[i - 1]] == [
        0.5,
        1,
        2,
    ]


def test_an_answer_of_which_nothing_is_written_is_refused(tokenizer_with):
    _, row = encoded(
        tokenizer_with(template_of("gemma3")), {"messages": [USER, {**THOUGHT, "content": ""}]}
    )
    assert row["refusal"] == "the chat template leaves out message 2, which is reasoning alone"
    _, row = encoded(
        tokenizer_with(template_of("deepseek_r1_distill")),
        {"messages": [USER, {**ANSWER, "content": "<think>only</think>"}]},
    )
    assert row["refusal"] == "the chat template leaves out all that message 2 says"
    tokenizer = tokenizer_with(
        "{% for m in messages if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    _, row = encoded(tokenizer, {"messages": [USER, ANSWER]})
    assert "the template leaves out a message of the user" in row["notes"]


@pytest.mark.parametrize(
    ("tool", "named"),
    [
        ({"type": "web_search"}, "one of type 'web_search'"),
        ({"name": "as", "parameters": {}}, "'as'"),
    ],
)
def test_tools_that_a_template_leaves_out_are_found_whatever_their_name(
    tokenizer_with, tool, named
):
    _, row = encoded(
        tokenizer_with(template_of("gemma3")), {"messages": [USER, ANSWER], "tools": [tool]}
    )
    assert row["refusal"] == f"the chat template has no place for tools: it leaves out {named}"
    _, row = encoded(
        tokenizer_with(template_of("qwen3")), {"messages": [USER, ANSWER], "tools": [tool]}
    )
    assert row["fate"] == KEPT


@pytest.mark.parametrize("name", ["gptoss", "qwen3", "gemma4"])
def test_tools_reach_the_template_in_the_form_that_it_reads(tokenizer_with, name):
    tokenizer = tokenizer_with(template_of(name))
    _, bare = encoded(tokenizer, {"messages": [USER, ANSWER], "tools": [TOOL["function"]]})
    _, whole = encoded(tokenizer, {"messages": [USER, ANSWER], "tools": [TOOL]})
    assert bare["fate"] == KEPT and "Adds." in tokenizer.decode(bare["input_ids"])
    # Qwen3's template writes a tool as it is given.
    assert (bare["input_ids"] == whole["input_ids"]) == (name != "qwen3")


def test_what_a_template_leaves_out_of_calls_and_messages_is_said(tokenizer_with):
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
    )
    _, row = encoded(tokenizer, {"messages": CALLING})
    assert row["fate"] == KEPT and "the template leaves out the arguments of a call" in row["notes"]
    _, row = encoded(tokenizer, {"messages": [{**USER, "name": "Ada"}, ANSWER]})
    assert row["notes"] == ["the template leaves out the name of a message"]


def test_a_system_message_that_moves_is_said(tokenizer_with):
    _, row = encoded(
        tokenizer_with(template_of("gemma")),
        {"messages": [{"role": "system", "content": "Be."}, USER, ANSWER]},
    )
    assert (
        "the template takes no system message: it is put before the question, "
        "as it has to be when served" in row["notes"]
    )


@pytest.mark.parametrize("name", NO_CALLS)
def test_calls_that_a_template_has_no_place_for_are_refused(tokenizer_with, name):
    _, row = encoded(tokenizer_with(template_of(name)), {"messages": CALLING[:2]})
    assert (
        row["fate"] == REFUSED
        and "no place for the calls of tools: it leaves out message 2" in row["refusal"]
    )
    _, row = encoded(
        tokenizer_with(template_of(name)), {"messages": [USER, ANSWER], "tools": [TOOL]}
    )
    assert row["fate"] == KEPT or "no place for tools: it leaves out 'add'" in row["refusal"]


def test_the_tools_of_a_record_reach_the_prompt(tokenizer_with):
    tokenizer = tokenizer_with(template_of("qwen3"))
    record = parse_record({"messages": CALLING, "tools": [TOOL]}, "here")
    (ids,) = PromptEncoder(tokenizer)([record])
    prompt = {"tools": [TOOL], "add_generation_prompt": True, "tokenize": True}
    assert ids == tokenizer.apply_chat_template(CALLING[:3], **prompt)["input_ids"]
    named = tokenizer_with("{% for m in messages %}{{ m.content }}{% endfor %}")
    named.chat_template = {"default": named.chat_template, "tool_use": template_of("qwen3")}
    assert PromptEncoder(named, "chat")([record])[0] != []
    _, row = encoded(named, {"messages": CALLING, "tools": [TOOL]})
    assert row["fate"] == KEPT and "<tool_call>" in named.decode(row["input_ids"])


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("gptoss", ["<|return|>", "<|call|>"]),
        ("phi3", ["<|end|>"]),
        ("cohere2", ["<|END_OF_TURN_TOKEN|>"]),
        ("qwen3", ["<|im_end|>"]),
        ("glm4moe", []),
        ("gemma", ["<end_of_turn>"]),
        ("diffusion_gemma", ["<turn|>", "<|tool_response>"]),
    ],
)
def test_the_tokens_that_end_a_response(tokenizer_with, name, endings):
    tokenizer = tokenizer_with(template_of(name))
    assert stop_ids(tokenizer) == [
        tokenizer.eos_token_id,
        *tokenizer.convert_tokens_to_ids(endings),
    ]


def test_an_ending_may_look_like_a_closing_tag(tokenizer_with):
    ask = "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    turns = (
        "{% for m in messages %}"
        "{{ '<turn>' + m.role + '\\n' + m.content + '</turn>\\n' }}{% endfor %}"
    )
    tokenizer = tokenizer_with(turns + ask)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"]})
    assert stop_ids(tokenizer) == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("</turn>"),
    ]
    _, row = encoded(tokenizer, {"messages": [USER, ANSWER]})
    assert trained_texts(tokenizer, row["labels"]) == ["Large.</turn>"]


def test_line_breaks_that_are_tokens_end_nothing(tokenizer_with):
    """Gemma's tokenizer has line breaks as added tokens, and its template ends turns with one."""
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    )
    tokenizer.add_tokens(["\n", "\n\n"])
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    _, row = encoded(tokenizer, {"messages": [USER, ANSWER]})
    assert trained_texts(tokenizer, row["labels"])[0].endswith("Large.</s>")


def test_a_default_system_prompt_is_part_of_the_prompt(tokenizer_with):
    tokenizer = tokenizer_with(SMOLLM2)
    _, row = encoded(tokenizer, {"messages": [USER, ANSWER, *AGAIN]})
    assert trained_texts(tokenizer, row["labels"]) == [
        "Large.<|im_end|>",
        "Little, or tiny.<|im_end|>",
    ]
    assert (
        row["input_ids"]
        == tokenizer.apply_chat_template([USER, ANSWER, *AGAIN], tokenize=True)["input_ids"]
    )


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_what_a_template_strips_from_an_answer_is_said(tokenizer_with, name):
    tokenizer = tokenizer_with(template_of(name))
    _, row = encoded(
        tokenizer,
        {"messages": [USER, {"role": "assistant", "content": "<think>Of size.</think>Large."}]},
    )
    assert "the template leaves out or rewrites part of an answer" in row["notes"]
    _, row = encoded(tokenizer, {"messages": [USER, ANSWER]})
    wanted = (
        "the answer does not follow the generation prompt {!r}, which is what generation continues"
    )
    assert row["notes"] == [wanted.format(f"<{WIDE}Assistant{WIDE}><think>\n")]
    qwen = tokenizer_with(template_of("qwen3"))  # it writes the same thought in its own form
    _, row = encoded(
        qwen,
        {"messages": [USER, {"role": "assistant", "content": "<think>Of size.</think>Large."}]},
    )
    assert not row["notes"] and "Of size." in trained_texts(qwen, row["labels"])[0]
