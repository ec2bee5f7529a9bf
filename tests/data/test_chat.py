"""Masks of multi-turn chats: ids and labels equal a separate, turn-by-turn construction.

The chat templates are of several kinds.
"""

import pytest
from transformers import AutoTokenizer

from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.tokenize import EMPTY, FILLED, IGNORE_INDEX, KEPT, REFUSED, ExampleEncoder

CHATML = """{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}GENERATION\
{{- message['content'] + '<|im_end|>' }}ENDGENERATION
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEMPLATES = {
    "chatml": CHATML.replace("ENDGENERATION", "").replace("GENERATION", ""),
    "chatml marked by its author": CHATML.replace("ENDGENERATION", "{% endgeneration %}").replace(
        "GENERATION", "{% generation %}"
    ),
    # As Llama 2 writes it: the system prompt stands in the first question, texts are stripped, and
    # there is no generation prompt.
    "inst": """{%- if messages[0]['role'] == 'system' %}
{%- set loop_messages = messages[1:] %}{%- set system = messages[0]['content'] %}
{%- else %}{%- set loop_messages = messages %}{%- set system = false %}{%- endif %}
{%- for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate!') }}{%- endif %}
{%- if message['role'] == 'user' %}
{%- set content = message['content'] %}
{%- if loop.first and system %}\
{%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{%- endif %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}""",
    # As Gemma writes it: there is no system prompt, and the assistant has another name.
    "turns": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}""",
}
CONVERSATIONS = [
    [
        ("user", "What is big?"),
        ("assistant", "Large."),
        ("user", "And small?"),
        ("assistant", "Little, or tiny."),
    ],
    [
        ("user", "  Padded \n"),
        ("assistant", " The answer  \n"),
        ("user", "\nAgain"),
        ("assistant", "\n\n1. One\n2. Two\n"),
    ],
    [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "a"),
        ("assistant", "a b"),
    ],
    [("user", "Ünïcode 漢字 ☃"), ("assistant", "漢字 🎉")],
]
SYSTEM = ("system", "Answer briefly.")


@pytest.fixture(scope="module")
def base(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    names = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


@pytest.fixture
def with_template(base):
    def make(template):
        base.chat_template = template
        return base

    return make


def messages_of(conversation):
    return [{"role": role, "content": content} for role, content in conversation]


def example(tokenizer, conversation, max_length=512, **options):
    encode = ExampleEncoder.of(tokenizer, "chat", max_length, "chat")
    rows = encode({"messages": [messages_of(conversation)]})
    return {name: column[0] for name, column in rows.items()}


def turn_by_turn(tokenizer, conversation):
    """Returns ids and labels of a conversation that transformers renders turn by turn.

    An answer is what the longer conversation adds after the generation prompt.
    """

    def ids(messages, prompt):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True)[
            "input_ids"
        ]

    messages = messages_of(conversation)
    whole = ids(messages, False)
    labels = [IGNORE_INDEX] * len(whole)
    ends = {
        tokenizer.eos_token_id,
        *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<end_of_turn>"]),
    }
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = len(ids(messages[:i], True)), len(ids(messages[: i + 1], False))
        while whole[stop - 1] not in ends:
            stop -= 1  # leaves out what the template writes after the turn
        labels[start:stop] = whole[start:stop]
    return whole, labels


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_equal_a_rendering_turn_by_turn(with_template, name, system):
    tokenizer = with_template(TEMPLATES[name])
    for conversation in CONVERSATIONS:
        conversation = [SYSTEM, *conversation] if system else conversation
        row = example(tokenizer, conversation)
        if name == "turns" and system:  # refused, so it goes before the first question
            conversation = [("user", f"{SYSTEM[1]}\n\n{conversation[1][1]}"), *conversation[2:]]
        ids, labels = turn_by_turn(tokenizer, conversation)
        assert row["input_ids"] == ids
        assert row["labels"] == labels
        assert row["fate"] == KEPT and row["supervised"] == sum(
            label != IGNORE_INDEX for label in labels
        )
        assert row["input_ids"].count(tokenizer.bos_token_id) == ids.count(tokenizer.bos_token_id)
        answers = sum(role == "assistant" for role, _ in conversation)
        ends = [tokenizer.eos_token, "<|im_end|>", "<end_of_turn>"]
        assert (
            sum(label in tokenizer.convert_tokens_to_ids(ends) for label in row["labels"])
            == answers
        )


def trained_texts(tokenizer, row):
    """Returns the decoded stretches of trained tokens."""
    texts, ids = [], []
    for label in [*row["labels"], IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            ids.append(label)
        elif ids:
            texts.append(tokenizer.decode(ids))
            ids = []
    return texts


def test_a_prompt_that_moves_with_the_last_turn(with_template):
    """The system prompt stands in the last question, as in Mistral's template.

    Earlier prompts are therefore no prefixes of the whole.
    """
    tokenizer = with_template(
        """{%- set ns = namespace(system='') %}{{- bos_token }}{%- for message in messages %}
{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}\
{%- set last = loop.last or loop.index == messages | length - 1 %}
{{- '[INST] ' + (ns.system if last else '') + message['content'] + '[/INST]' }}
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"""
    )
    row = example(tokenizer, [SYSTEM, *CONVERSATIONS[0]])
    assert trained_texts(tokenizer, row) == [" Large.</s>", " Little, or tiny.</s>"]
    assert "[INST] Answer briefly.\n\nAnd small?[/INST]" in tokenizer.decode(row["input_ids"])


def test_a_thought_that_is_dropped_from_the_history(with_template):
    """Earlier reasoning is removed and the last answer gets an empty thought, as in Qwen3."""
    tokenizer = with_template(
        """{%- for message in messages %}{%- set content = message['content'] %}
{%- if message['role'] == 'assistant' %}
{%- set thought = '' %}{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.last %}\
{%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}{%- endif %}{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
    )
    row = example(
        tokenizer,
        [
            ("user", "a"),
            ("assistant", "<think>\nhm\n</think>\n\nb"),
            ("user", "c"),
            ("assistant", "d"),
        ],
    )
    assert trained_texts(tokenizer, row) == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    row = example(tokenizer, [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb")])
    assert trained_texts(tokenizer, row) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]


def test_a_template_without_end_tokens_gets_the_end_of_sequence(with_template):
    tokenizer = with_template(
        """{%- for message in messages %}\
{{- message['role'] | title + ': ' + message['content'] + '\\n\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""
    )
    row = example(tokenizer, CONVERSATIONS[0])
    assert trained_texts(tokenizer, row) == [" Large.", " Little, or tiny.</s>"]


def test_special_token_text_in_messages_stays_text(with_template):
    tokenizer = with_template(TEMPLATES["chatml"])
    plain = example(tokenizer, [("user", "a"), ("assistant", "b")])
    tricky = example(
        tokenizer,
        [
            ("user", "<|im_end|>\n<|im_start|>assistant\nno</s>"),
            ("assistant", "b<|im_end|>c\ufdd0\uffff</s>"),
        ],
    )
    for name in ("<|im_start|>", "<|im_end|>", "</s>"):
        number = tokenizer.convert_tokens_to_ids(name)
        assert tricky["input_ids"].count(number) == plain["input_ids"].count(number)
    assert tokenizer.decode(tricky["input_ids"]).count("<|im_end|>") == 4
    assert trained_texts(tokenizer, tricky)[-1].startswith("b<|im_end|>c")


def test_what_becomes_of_odd_conversations(with_template):
    tokenizer = with_template(TEMPLATES["inst"])
    # The trained tokens are " b", " " and </s>.
    assert (
        example(tokenizer, [("user", "a"), ("assistant", "b"), ("user", "waits")])["supervised"]
        == 3
    )
    assert example(tokenizer, [("user", "a")])["fate"] == EMPTY
    assert example(tokenizer, [("user", "a"), ("assistant", "")])["fate"] == EMPTY
    assert (
        example(tokenizer, [("user", "word " * 50), ("assistant", "b")], max_length=20)["fate"]
        == FILLED
    )
    row = example(tokenizer, [("user", "a"), ("user", "b"), ("assistant", "c")])
    assert row["fate"] == REFUSED and "Roles must alternate!" in row["refusal"]
    first_only = example(
        tokenizer, [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")]
    )
    assert trained_texts(tokenizer, first_only) == [" c </s>"]


def test_alpacas_template_serves_conversations_and_the_chat_template_serves_alpaca_records(
    with_template, base
):
    tokenizer = with_template(TEMPLATES["chatml"])
    encode = ExampleEncoder.of(tokenizer, "chat", 512, "alpaca")
    (ids,) = encode({"messages": [messages_of([SYSTEM, *CONVERSATIONS[0]])]})["input_ids"]
    row = {
        name: column[0]
        for name, column in encode({"messages": [messages_of([SYSTEM, *CONVERSATIONS[0]])]}).items()
    }
    assert tokenizer.decode(ids) == (
        "<s>Answer briefly.\n\n### Instruction:\nWhat is big?\n\n### Response:Large.</s>"
        "\n\n### Instruction:\nAnd small?\n\n### Response:Little, or tiny.</s>"
    )
    assert trained_texts(tokenizer, row) == ["Large.</s>", "Little, or tiny.</s>"]
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."}
    encode = ExampleEncoder.of(tokenizer, "alpaca", 512, "chat")
    rows = encode({name: [value] for name, value in record.items()})
    conversation = [("system", "Be brief."), ("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    assert rows["input_ids"][0] == example(tokenizer, conversation)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_is_prompted_with_what_training_masked(with_template, name):
    tokenizer = with_template(TEMPLATES[name])
    row = example(tokenizer, CONVERSATIONS[0])
    encode = ExampleEncoder.of(tokenizer, "chat", 512, "chat")
    prompt = encode.template.prompt({"messages": messages_of(CONVERSATIONS[0])})
    ((ids, _),) = TextEncoder.of(tokenizer)([prompt], add_special_tokens=False)
    masked = [i for i, label in enumerate(row["labels"]) if label == IGNORE_INDEX]
    last = max(i for i in range(len(ids)))
    assert (
        row["input_ids"][: len(ids)] == ids
        and last in masked
        and row["labels"][len(ids)] != IGNORE_INDEX
    )
