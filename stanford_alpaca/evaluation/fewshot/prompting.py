"""From examples and a question to token ids: a prompt per class, split where the classes part."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.tasks import TaskData

SEPARATOR = "\n\n"


class Choices(NamedTuple):
    """The prompts of a test item, one per class: ``context + endings[c]``."""

    context: list[int]  # tokens that all classes share, at least one
    endings: list[list[int]]  # of each class the others, at least one
    examples: list[int]  # the training examples in the prompt, the nearest last


def write_prompts(data: TaskData, item: int, examples: list[int]) -> list[str]:
    """The text of the prompt for every class."""
    shots = [data.task.write(data.train.texts[i], data.train.labels[i]) for i in examples]
    text = data.test.texts[item]
    return [
        SEPARATOR.join([*shots, data.task.write(text, label)])
        for label in range(len(data.task.classes))
    ]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of whole prompts, with the token that the tokenizer puts before a text, but none that it puts after it."""
    rows = tokenizer(texts, verbose=False)["input_ids"]
    closes = tokenizer("a", verbose=False)["input_ids"][-1] == tokenizer.eos_token_id
    return [row[:-1] for row in rows] if closes else rows


def split_stem(rows: list[list[int]], first_token: int) -> tuple[list[int], list[list[int]]]:
    """Context and endings of prompts. Each ending has a token; if nothing is left before, ``first_token`` is put there."""
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
    """The prompts of all test items. What does not fit into ``positions`` loses its least similar examples, the first ones.

    Raises:
        UserError: an item that does not fit without any example.
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
                    f"task {data.task.name}: test record {item + 1} has {max(map(len, own))} tokens without any example, and "
                    f"the model has {positions} positions: shorten it, or take another model"
                )
            ids = ids[1:]
            own = encode(tokenizer, write_prompts(data, item, ids))
        found.append(Choices(*split_stem(own, first_token), ids))
    return found
