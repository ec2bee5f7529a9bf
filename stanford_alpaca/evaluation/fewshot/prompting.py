"""Turns examples and a question into token ids.

There is one prompt per class, split where the classes begin to differ.
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.tasks import TaskData

SEPARATOR = "\n\n"


class Choices(NamedTuple):
    """The prompts of a test item, one per class: ``context + endings[c]``."""

    context: list[int]  # tokens that all classes share, at least one
    endings: list[list[int]]  # the other tokens of each class, at least one
    examples: list[int]  # the training records in the prompt, the nearest last


def write_prompts(data: TaskData, item: int, examples: list[int]) -> list[str]:
    """Returns the text of the prompt for every class."""
    shots = [data.task.write(data.train.texts[i], data.train.labels[i]) for i in examples]
    text = data.test.texts[item]
    return [
        SEPARATOR.join([*shots, data.task.write(text, label)])
        for label in range(len(data.task.classes))
    ]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns the token ids of whole prompts.

    The token that the tokenizer puts before a text is kept. The end-of-sequence token that it may
    put after a text is dropped.
    """
    rows = tokenizer(texts, verbose=False)["input_ids"]
    closes = tokenizer("a", verbose=False)["input_ids"][-1] == tokenizer.eos_token_id
    return [row[:-1] for row in rows] if closes else rows


def split_stem(rows: list[list[int]], first_token: int) -> tuple[list[int], list[list[int]]]:
    """Splits prompts into their common context and their endings.

    Each ending has at least one token. If the prompts have no token in common, the context is
    ``first_token``.
    """
    shared = 0
    shortest = min(map(len, rows))
    while shared < shortest - 1 and len({row[shared] for row in rows}) == 1:
        shared += 1
    return rows[0][:shared] or [first_token], [row[shared:] for row in rows]


def encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    examples: list[list[int]],
    positions: int | None,
) -> list[Choices]:
    """Returns the prompts of all test items.

    A prompt that does not fit into ``positions`` loses its first examples, which are the least
    similar ones.

    Raises:
        UserError: an item does not fit even without examples.
    """
    count = len(data.task.classes)
    first_token = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    texts = [text for item, ids in enumerate(examples) for text in write_prompts(data, item, ids)]
    rows = encode(tokenizer, texts)
    found = []
    for item, ids in enumerate(examples):
        own = rows[item * count : (item + 1) * count]
        while positions is not None and max(map(len, own)) > positions:
            if not ids:
                raise UserError(
                    f"task {data.task.name}: test record {item + 1} has {max(map(len, own))} "
                    f"tokens without any example, and the model has {positions} positions: "
                    "shorten it, or take another model"
                )
            ids = ids[1:]
            own = encode(tokenizer, write_prompts(data, item, ids))
        found.append(Choices(*split_stem(own, first_token), ids))
    return found
