"""Blocks of running text: every token is a target once, and documents are kept apart.

Both hold for every length of the blocks.
"""

from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stanford_alpaca.data import blocks as module
from stanford_alpaca.data.blocks import _blocks, make_blocks
from stanford_alpaca.errors import UserError

TEXTS = ["The king of the north.\nHe is old.\n", "A river.", "é ☃ </s> not an end"]


@pytest.fixture
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


def without_first(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def targets_of(blocks):
    return [label for block in blocks for label in block["labels"][1:] if label != -100]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=12), min_size=1, max_size=5),
    st.integers(2, 9),
)
def test_every_token_is_a_target_once_in_its_order(documents, size):
    data = Dataset.from_dict({"input_ids": [[*ids, 1] for ids in documents]})
    blocks = list(_blocks(data, size, None, 1))
    assert targets_of(blocks) == [token for ids in documents for token in [*ids, 1]]
    assert (
        all(len(block["input_ids"]) == size for block in blocks[:-1])
        and 2 <= len(blocks[-1]["input_ids"]) <= size
    )
    assert blocks[0]["input_ids"][0] == 1
    for before, block in pairwise(blocks):
        assert block["input_ids"][0] == before["input_ids"][-1]  # context, not a target again
        assert block["labels"][0] == -100


def test_documents_are_the_tokenizers_ids_and_end_with_a_token_that_text_cannot_be(
    tokenizer, tmp_path
):
    records = Dataset.from_dict({"text": TEXTS})
    for put_first in (True, False):
        tokenizer = tokenizer if put_first else without_first(tokenizer)
        blocks, report = make_blocks(
            records, tokenizer, 8, cache_dir=str(tmp_path / str(put_first))
        )
        ids = [
            blocks[0]["input_ids"][0],
            *(token for block in blocks["input_ids"] for token in block[1:]),
        ]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        decoded = "".join(
            tokenizer.decode(ids)
            .replace("<s>", "")
            .partition("</s>" if not put_first else "\0")[::2]
        )
        assert decoded == "</s>".join(TEXTS) + "</s>"
        assert ids.count(eos) == 3 + (not put_first) and ids.count(bos) == 3 * put_first
        targets = targets_of(blocks)
        assert targets.count(eos) == 3 and bos not in targets
        assert report.targets == len(targets) == len(ids) - (3 if put_first else 1)
        assert report.documents == 3 and report.blocks == len(blocks) == -(-(len(ids) - 1) // 7)


def test_a_tokenizer_that_puts_the_end_token_first_puts_nothing(tokenizer, tmp_path):
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[end]
    )
    blocks, _ = make_blocks(
        Dataset.from_dict({"text": TEXTS}), tokenizer, 1000, cache_dir=str(tmp_path)
    )
    (ids,) = blocks["input_ids"]
    assert ids[0] == end[1] and ids.count(end[1]) == 4 and targets_of(blocks).count(end[1]) == 3


def test_long_documents_are_tokenized_in_parts_that_end_with_a_line(
    tokenizer, tmp_path, monkeypatch
):
    text = "\n".join(f"The year {i} was long." for i in range(40))
    whole = make_blocks(
        Dataset.from_dict({"text": [text]}), tokenizer, 16, cache_dir=str(tmp_path / "a")
    )[0]
    monkeypatch.setattr(module, "PIECE", 50)
    places = list(module._parts(text))
    assert len(places) > 10 and "".join(text[start:end] for start, end in places) == text
    parts = make_blocks(
        Dataset.from_dict({"text": [text]}), tokenizer, 16, cache_dir=str(tmp_path / "b")
    )[0]
    ids = [
        [token for block in blocks["input_ids"] for token in block[1:]] for blocks in (whole, parts)
    ]
    assert ids[1] == ids[0]


def test_a_tokenizer_that_begins_with_a_space_puts_one_at_the_beginning_only(tmp_path, monkeypatch):
    """The ids do not depend on where a long document is cut. Llama 2 has such a tokenizer."""
    text = "\n".join(f"\n  Line {i} of the sea.\nIt ends." for i in range(30))
    model = models.BPE(byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    backend.train_from_iterator(
        text.split(), trainers.BpeTrainer(vocab_size=400, special_tokens=names)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    whole = module.DocumentEncoder.of(tokenizer).ids(text).tolist()
    monkeypatch.setattr(module, "PIECE", 40)
    assert len(list(module._parts(text))) > 8
    assert module.DocumentEncoder.of(tokenizer).ids(text).tolist() == whole


def test_instructions_are_no_running_text(tokenizer):
    records = Dataset.from_dict(
        {"instruction": ["a"], "input": [""], "output": ["b"], "system": [""]}
    )
    with pytest.raises(
        UserError,
        match="--block_size cuts running text, and these are records of the form alpaca: fine-tune",
    ):
        make_blocks(records, tokenizer, 8)


def test_names_of_special_tokens_are_text_or_tokens_as_asked(tokenizer, tmp_path):
    records = Dataset.from_dict({"text": ["<s>One.</s>Two.</s>\n", "Three."]})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for reading, counts in (("text", (2, 2)), ("parse", (2, 3))):
        blocks, report = make_blocks(
            records, tokenizer, 99, cache_dir=str(tmp_path / reading), special_tokens=reading
        )
        (ids,) = blocks["input_ids"]
        assert (ids.count(bos), ids.count(eos)) == counts and targets_of(blocks).count(
            eos
        ) == counts[1]
        named = [line for line in report.lines() if "is text, not the special token" in line]
        assert len(named) == (2 if reading == "text" else 0)
