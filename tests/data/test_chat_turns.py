"""Which text is trained where a template makes the assistant's turns hard to find.

Short templates imitate the habits of published ones.
"""

import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import AutoTokenizer

from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.encode import SPECIAL, TextEncoder
from stanford_alpaca.data.tokenize import KEPT, ExampleEncoder, PromptEncoder
from tests.helpers import trained_texts

NAMES = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TURN = "'<|' + m.role + '|>' + m.content + '<|end|>'"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def loop(body: str, after: str = ASK, before: str = "") -> str:
    return f"{before}{{% for m in messages %}}{body}{{% endfor %}}{after}"


# Qwen3: the last answer gets a thought.
THINKS = loop(
    "{% set t = '<think></think>' if loop.last and m.role == 'assistant' else '' %}"
    "{{ '<|' + m.role + '|>' + t + m.content + '<|end|>' }}"
)
# R1: the generation prompt opens a thought that training leaves out.
ASKS_FOR_THOUGHT = loop(f"{{{{ {TURN} }}}}", ASK.replace("t|>{", "t|><think>{"))
# OLMo 2: only the last turn has no line break after it.
LAST_DIFFERS = loop(f"{{{{ {TURN} + ('' if loop.last else '\\n') }}}}")
# Mistral: the system prompt stands in the last message.
SYSTEM_LAST = loop(
    "{% if m.role == 'system' %}{% set ns.s = m.content + ' ' %}{% elif m.role == 'user' %}"
    "{{ '<|user|>' + (ns.s if loop.last else '') + m.content + '<|system|>' }}{% else %}"
    "{{ ' ' + m.content + '<|end|>' }}{% endif %}",
    "",
    "{% set ns = namespace(s='') %}",
)
# Granite: the generation prompt is written within the loop.
ASKS_IN_LOOP = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "<|system|>{{ messages[0].content if messages[0].role == 'system' }}<|end|>"
    "{% for m in rest %}{{ " + TURN + " }}{% if loop.last and add_generation_prompt %}"
    "<|assistant|>{% endif %}{% endfor %}"
)
# GLM: a turn ends with the first token of the next one.
NO_END = loop("{{ '<|' + m.role + '|>' + m.content }}")
# Qwen3: the template looks at how a question ends.
LOOKS = loop(
    "{% set t = '!' if m.content.endswith('</r>') else '' %}"
    "{{ '<|' + m.role + '|>' + t + m.content + '<|end|>' }}"
)
HABITS = [  # template, turns (u: user, a: assistant, s: system), what is trained
    (THINKS, "a:one u:b a:two", ["one<|end|>", "<think></think>two<|end|>"]),
    (
        THINKS,
        "u:b a:one a:two u:c a:three",
        ["one<|end|>", "two<|end|>", "<think></think>three<|end|>"],
    ),
    (ASKS_FOR_THOUGHT, "u:a a:<b>one u:c a:<think>two", ["<b>one<|end|>", "two<|end|>"]),
    (ASKS_FOR_THOUGHT, "a:<b>one u:c a:<th", ["<b>one<|end|>", "<th<|end|>"]),
    (LAST_DIFFERS, "u:a a:one a:two u:c a:three", ["one<|end|>", "two<|end|>", "three<|end|>"]),
    (SYSTEM_LAST, "s:x u:a a:one u:c a:two", [" one<|end|>", " two<|end|>"]),
    (SYSTEM_LAST, "u: a:one u:c a:two", [" one<|end|>", " two<|end|>"]),
    (ASKS_IN_LOOP, "s:x a:one u:c a:two", ["one<|end|>", "two<|end|>"]),
    (NO_END, "u:a a:one u:c a:two", ["one", "two</s>"]),
    (NO_END, "u:a a:one a:two u:c a:three", ["one", "two", "three</s>"]),
    (LOOKS, "u:<r></r> a:one u:c a:two", ["one<|end|>", "two<|end|>"]),
]


@pytest.fixture
def tokenizer(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES})
    return tokenizer


def messages_of(turns):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns.split(" ")]


def encoded(tokenizer, messages):
    encode = ExampleEncoder.of(tokenizer, "chat", 512, "chat")
    return {name: column[0] for name, column in encode({"messages": [messages]}).items()}


@pytest.mark.parametrize(("template", "turns", "trained"), HABITS)
def test_what_the_assistant_writes(tokenizer, template, turns, trained):
    tokenizer.chat_template = template
    messages = messages_of(turns)
    row = encoded(tokenizer, messages)
    assert row["fate"] == KEPT and trained_texts(tokenizer, row["labels"]) == trained
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert row["input_ids"] == ids + [tokenizer.eos_token_id] * (template == NO_END)
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id] + [
        tokenizer.convert_tokens_to_ids("<|end|>")
    ] * (template != NO_END)
    (prompt,) = PromptEncoder(tokenizer)([{"messages": messages}])
    assert (
        prompt
        == tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)[
            "input_ids"
        ]
    )


def test_a_system_prompt_that_the_template_leaves_out_is_kept_and_never_the_assistants(tokenizer):
    tokenizer.chat_template = loop(f"{{% if m.role != 'system' %}}{{{{ {TURN} }}}}{{% endif %}}")
    row = encoded(tokenizer, messages_of("s:Brief. u:a a:one"))
    assert tokenizer.decode(row["input_ids"]) == "<|user|>Brief.\n\na<|end|><|assistant|>one<|end|>"
    row = encoded(tokenizer, messages_of("s:Brief. a:one u:b a:two"))
    assert tokenizer.decode(row["input_ids"]).startswith(
        "<|user|>Brief.<|end|><|assistant|>one<|end|>"
    )
    assert trained_texts(tokenizer, row["labels"]) == ["one<|end|>", "two<|end|>"]


@pytest.mark.parametrize("names", [["<x", "x>"], ["<x>", "<x>y", ">y"]])
def test_special_tokens_that_overlap_stay_text(tokenizer, names):
    tokenizer.add_special_tokens(
        {"additional_special_tokens": names}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = loop("{{ m.content + '<|end|>' }}")
    row = encoded(
        tokenizer, [{"role": "user", "content": "<x>y"}, {"role": "assistant", "content": "<x>y"}]
    )
    assert set(row["input_ids"]).isdisjoint(tokenizer.convert_tokens_to_ids(names))
    assert tokenizer.decode(row["input_ids"]) == "<x>y<|end|><x>y<|end|>"


def test_a_special_token_within_the_merges_of_others(tokenizer):
    """The special token is also part of a longer piece of the vocabulary."""
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair
        for pair in _state(tokenizer)["model"]["merges"]
    ]
    inner = next(first for first, _ in merges if ["".join(pair) for pair in merges].count(first))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(inner, special=True, normalized=False)]}
    )
    ((ids, _),) = TextEncoder.of(tokenizer)([f"{inner} text"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{inner} text"
    assert tokenizer.convert_tokens_to_ids(inner) not in ids


@pytest.mark.parametrize("option", ["single_word", "normalized", "lstrip", "rstrip"])
def test_a_special_token_that_is_written_is_found(tokenizer, option):
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|Im|>", special=True, **{option: True})]}
    )
    encoder = TextEncoder.of(tokenizer)
    ((ids, _),) = encoder([encoder.with_specials("word<|Im|>word")])
    assert ids.count(
        tokenizer.convert_tokens_to_ids("<|Im|>")
    ) == 1 and SPECIAL not in tokenizer.decode(ids)


def _state(tokenizer):
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_a_prompts_spaces_are_not_trained_whatever_the_tokenizer_says_of_offsets(tokenizer):
    """RoBERTa's and GPT-NeoX's tokenizers leave spaces out of a token's offsets."""
    encode = ExampleEncoder.of(tokenizer, "completion", 512)
    record = {"prompt": ["a  "], "completion": ["large"]}
    expected = encode(record)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), tokenizer.backend_tokenizer.post_processor]
    )
    row = ExampleEncoder.of(tokenizer, "completion", 512)(record)
    assert row == expected and row["straddling"] == [True]
