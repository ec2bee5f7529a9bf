"""Padding by length, and the masked rows that fill up a batch."""

import torch
from datasets import Dataset

from stanford_alpaca.data.batching import PadCollator, fill_up


def test_padding_is_masked_by_length_even_where_the_pad_id_is_an_ordinary_token():
    batch = PadCollator(pad_id=2)([{"input_ids": [5, 2, 2], "labels": [-100, 2, 2]}, {"input_ids": [7], "labels": [-100]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 2, 2], [7, 2, 2]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 2, 2], [-100, -100, -100]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))


def test_fill_up_adds_rows_without_targets():
    examples = Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[-100, 2], [3], [-100, 5, 6]]})
    filled = fill_up(examples, 4, token_id=9)
    assert filled[:3] == examples[:3]
    assert filled[3] == {"input_ids": [9], "labels": [-100]}
    assert fill_up(examples, 3, token_id=9) is examples
