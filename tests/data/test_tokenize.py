"""Ids and labels equal those of the original Alpaca recipe, on three kinds of tokenizer.

Also tested are the rules that the recipe does not have.
"""

import io
import json

import pytest
from datasets import Dataset

from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.data.tokenize import (
    EMPTY,
    IGNORE_INDEX,
    ExampleEncoder,
    label_spans,
    tokenize_records,
)
from stanford_alpaca.errors import UserError

RECORDS = [
    {
        "instruction": "Give a synonym of big.",
        "input": "",
        "output": "Another word for big is large.",
    },
    {"instruction": "Classify.", "input": "The film was awful.\nTruly.", "output": "negative"},
    {
        "instruction": "Braces {x} and <angle>",
        "input": "",
        "output": "  spaces first,\n\nlines\ttabs",
    },
    {"instruction": "Ünïcode ☃ 漢字", "input": "émoji 🎉", "output": "漢字 🎉 ☃"},
    {"instruction": "Count.", "input": "", "output": "1, 2, 3"},
]


def sentencepiece_model(kind: str) -> bytes:
    """Trains a sentencepiece model: ``bpe`` with byte fallback, or ``unigram``."""
    import sentencepiece

    texts = [format_prompt(record) + record["output"] for record in RECORDS] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        byte_fallback=kind == "bpe",
        hard_vocab_limit=False,
        pad_id=-1,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, root):
    """Returns tokenizers of the three kinds, loaded from folders as a user's would be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "spm").mkdir()
    (folder / "spm" / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    (folder / "spm" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'
    )

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    texts = [format_prompt(record) + record["output"] for record in RECORDS]
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    unigram.train_from_iterator(texts * 20, trainer)
    unigram.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "unigram")
    return {
        "sentencepiece": AutoTokenizer.from_pretrained(folder / "spm"),
        "byte-level": AutoTokenizer.from_pretrained(root / "data" / "tiny-base"),
        "unigram": AutoTokenizer.from_pretrained(folder / "unigram"),
    }


def alpaca(record, tokenizer, max_length):
    """Returns ids and labels as the original recipe makes them.

    It encodes prompt, response and end-of-sequence text together, encodes the prompt alone, and
    masks as many tokens as the prompt has.
    """
    prompt = format_prompt(record)
    ids = tokenizer(
        prompt + record["output"] + tokenizer.eos_token, truncation=True, max_length=max_length
    )["input_ids"]
    masked = len(tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"])
    return ids, [IGNORE_INDEX] * min(masked, len(ids)) + ids[masked:]


def ours(record, tokenizer, max_length=512, form="alpaca", template="auto"):
    encode = ExampleEncoder.of(tokenizer, form, max_length, template)
    return {
        name: column[0]
        for name, column in encode({name: [value] for name, value in record.items()}).items()
    }


@pytest.mark.parametrize("max_length", [512, 40])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "unigram"])
def test_ids_and_labels_are_alpacas(tokenizers, kind, max_length):
    tokenizer, compared = tokenizers[kind], 0
    for record in RECORDS:
        row = ours(record, tokenizer, max_length)
        if not row["straddling"]:
            assert (row["input_ids"], row["labels"]) == alpaca(record, tokenizer, max_length)
            compared += 1
    assert compared >= 4
    if max_length == 512:
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id


def test_kinds_are_what_they_are_called(tokenizers):
    ids = tokenizers["sentencepiece"]("☄", add_special_tokens=False)["input_ids"]
    assert "<0xE2>" in tokenizers["sentencepiece"].convert_ids_to_tokens(ids)  # byte fallback
    assert tokenizers["unigram"].backend_tokenizer.model.__class__.__name__ == "Unigram"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "unigram"])
def test_special_token_text_stays_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    row = ours(
        {"instruction": "Say </s> and <s>.", "input": "<unk></s>", "output": "a</s>b"}, tokenizer
    )
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_straddling_token_is_counted_and_not_trained():
    # The third token holds the prompt's last character and the response's first.
    offsets = [(0, 0), (0, 4), (4, 7), (7, 9), (9, 13)]
    row = label_spans([1, 10, 11, 12, 2], offsets, [(5, 13)], 512)
    assert row["labels"] == [-100, -100, -100, 12, 2]
    assert row["straddling"] and row["length"] == row["full_length"] == 5
    assert row["supervised"] == 2


def test_tokens_of_several_spans_and_what_a_cut_leaves():
    offsets = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    row = label_spans([10, 11, 12, 13, 14, 15], offsets, [(2, 4), (8, 10)], 512)
    assert row["labels"] == [-100, 11, -100, -100, 14, -100] and not row["straddling"]
    # One token reaches past the first span's end.
    row = label_spans([10, 11, 12, 13, 14, 15], offsets, [(2, 5), (7, 12)], 5)
    assert row["labels"] == [-100, 11, -100, -100, 14] and row["straddling"]
    assert (row["length"], row["full_length"], row["supervised"], row["full_supervised"]) == (
        5,
        6,
        2,
        3,
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "unigram"])
def test_prompts_with_completions_and_texts_are_taken_as_they_are(tokenizers, kind):
    tokenizer = tokenizers[kind]
    whole = tokenizer("Another word for big is large." + tokenizer.eos_token)["input_ids"]
    row = ours(
        {"prompt": "Another word for", "completion": " big is large."}, tokenizer, form="completion"
    )
    masked = len(tokenizer("Another word for")["input_ids"])
    assert row["input_ids"] == whole
    assert row["labels"] == [IGNORE_INDEX] * masked + whole[masked:]
    row = ours({"text": "Another word for big is large."}, tokenizer, form="text")
    bos = [IGNORE_INDEX] if tokenizer.bos_token_id == whole[0] else []
    assert row["input_ids"] == whole and row["labels"] == bos + whole[len(bos) :]
    with pytest.raises(
        UserError, match="--prompt_template alpaca cannot write records of the form text"
    ):
        ExampleEncoder.of(tokenizer, "text", 512, "alpaca")
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        ExampleEncoder.of(tokenizer, "alpaca", 512, "chat")


def test_an_end_of_sequence_token_added_by_the_tokenizer_is_not_doubled(tokenizers):
    from copy import deepcopy

    from tokenizers import processors

    plain = tokenizers["byte-level"]
    closing = deepcopy(plain)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id)],
    )
    assert closing("a")["input_ids"][-1] == plain.eos_token_id
    for record in [
        RECORDS[0],
        {**RECORDS[0], "output": "ends in </s>"},
        {**RECORDS[0], "output": ""},
    ]:
        assert ours(record, closing) == ours(record, plain)
    assert ours({**RECORDS[0], "output": ""}, plain)["fate"] == EMPTY


def test_the_report_counts_what_was_dropped_and_cut(tokenizers, tmp_path):
    tokenizer = tokenizers["byte-level"]
    long = {"instruction": "Talk.", "input": "", "output": "word " * 100}
    filled = {"instruction": "word " * 100, "input": "", "output": "never seen"}
    empty = {"instruction": "Say nothing.", "input": "", "output": ""}
    records = Dataset.from_list([RECORDS[0], long, filled, empty])
    examples, report = tokenize_records(records, tokenizer, 64)
    assert (report.records, report.kept, report.no_response, report.filled, report.truncated) == (
        4,
        2,
        1,
        1,
        1,
    )
    assert [len(ids) for ids in examples["input_ids"]] == [
        len(ours(RECORDS[0], tokenizer)["input_ids"]),
        64,
    ]
    supervised = sum(label != IGNORE_INDEX for labels in examples["labels"] for label in labels[1:])
    assert report.supervised_tokens == supervised
    assert report.tokens == sum(len(ids) for ids in examples["input_ids"])
    with pytest.raises(UserError, match="no example has a token to train on"):
        tokenize_records(records.select([2, 3]), tokenizer, 64)


def test_parallel_and_serial_agree_and_the_cache_serves(tokenizers, tmp_path, monkeypatch):
    from stanford_alpaca.data import formats, tokenize

    file = tmp_path / "data.json"
    file.write_text("\n".join(json.dumps(record) for record in RECORDS * 4))
    monkeypatch.setattr(tokenize, "PARALLEL_FROM", 10)
    records = formats.load_records(file, str(tmp_path / "cache"))
    parallel, _ = tokenize_records(records, tokenizers["byte-level"], 512, num_proc=2)
    monkeypatch.setattr(tokenize, "PARALLEL_FROM", 1000)
    serial, _ = tokenize_records(Dataset.from_list(list(records)), tokenizers["byte-level"], 512)
    assert list(parallel) == list(serial)

    again = formats.load_records(file, str(tmp_path / "cache"))
    assert again._fingerprint == records._fingerprint
    monkeypatch.setattr(tokenize, "label_spans", None)  # fails if anything is tokenized again
    monkeypatch.setattr(tokenize, "PARALLEL_FROM", 10)
    cached, _ = tokenize_records(again, tokenizers["byte-level"], 512, num_proc=2)
    assert list(cached) == list(serial)
