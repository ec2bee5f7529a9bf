"""Collators: padding is masked by length, and positions restart at each example.

Masked rows fill up an incomplete batch.
"""

import torch
from datasets import Dataset

from stanford_alpaca.data.batching import (
    PadCollator,
    SegmentCollator,
    count_examples,
    count_tokens,
    pad_to_multiple,
)


def test_padding_is_masked_by_length_even_where_the_pad_id_is_an_ordinary_token():
    batch = PadCollator(pad_id=2)(
        [{"input_ids": [5, 2, 2], "labels": [-100, 2, 2]}, {"input_ids": [7], "labels": [-100]}]
    )
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 2, 2], [7, 2, 2]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 2, 2], [-100, -100, -100]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))


def test_fill_up_adds_rows_without_targets():
    examples = Dataset.from_dict(
        {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[-100, 2], [3], [-100, 5, 6]]}
    )
    filled = pad_to_multiple(examples, 4, token_id=9)
    assert filled[:3] == examples[:3]
    assert filled[3] == {"input_ids": [9], "labels": [-100]}
    assert pad_to_multiple(examples, 3, token_id=9) is examples


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, -100, 9], "lengths": [3, 2]},
    {"input_ids": [4, 3], "labels": [-100, 3]},  # one example that is not packed
    {"input_ids": [], "labels": [], "lengths": []},
]


def test_positions_restart_and_no_example_is_predicted_from_the_one_before():
    batch = SegmentCollator(pad_id=1)(ROWS)
    assert batch.pop("use_cache") is False
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 1, 1, 1], [1, 1, 1, 1, 1]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100], [-100] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0] * 5],
    }
    assert count_examples(batch) == 3
    assert [x.item() for x in count_tokens(batch)] == [7, 9 + 4 + 4]
    assert [
        x.item() for x in count_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    ] == [5, 4 + 9]


def test_flat_batches_have_no_padding():
    batch = SegmentCollator(pad_id=1, flat=True)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    fillers = SegmentCollator(pad_id=1, flat=True)(ROWS[2:])
    assert fillers["input_ids"].tolist() == [[1]] and fillers["labels"].tolist() == [[-100]]


def test_what_flash_attention_is_given_are_the_bounds_in_all_rows_one_after_the_other():
    batch = SegmentCollator(pad_id=1, apart_by="cu_seq_lens")(ROWS[:2])
    assert (
        batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 8, 9, 10]
        and batch["cu_seq_lens_q"].dtype == torch.int32
    )
    assert batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert batch["max_length_q"] == batch["max_length_k"] == 3 and "attention_mask" not in batch


def test_masks_of_models_that_do_not_read_positions():
    mask = SegmentCollator(pad_id=1, apart_by="mask")(ROWS[1:2] + ROWS[:1])["attention_mask"]
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    bias = SegmentCollator(pad_id=1, apart_by="bias")(ROWS[1:2] + ROWS[:1])["attention_mask"]
    assert torch.equal(bias == 0, mask) and torch.equal(bias == -torch.inf, ~mask)
