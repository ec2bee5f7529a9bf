"""Transferring an output layer's rows to another tokenizer, compared with means taken by hand."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stanford_alpaca.cost.transfer import Matches, transfer_rows

LETTERS = ["c", "a", "t", "h", "e", "s", "x"]


def bpe(
    start: list[str], merges: list[tuple[str, str]], kind: str = "bytes", **special: str
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with these first tokens, followed by the tokens that the merges make.

    ``kind``: spaces are written as Ġ (``bytes``) or as ▁ (``metaspace``).
    """
    tokens = [*start, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=special.get("unk_token")))
    if kind == "bytes":
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def source():
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t")]
    return bpe(
        ["<s>", "</s>", "<unk>", "Ġ", "Ċ", *LETTERS],
        merges,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture
def head(source):
    """Returns a diagonal of distinct powers of two, so that a mean shows its source rows."""
    return np.eye(len(source), dtype=np.float32) * 2.0 ** np.arange(len(source), dtype=np.float32)


def test_the_same_tokenizer_gives_the_head(source, head):
    rows, matches = transfer_rows(head, source, source, len(source) + 3)
    assert np.array_equal(rows[: len(source)], head) and not rows[len(source) :].any()
    assert matches == Matches(exact=len(source), zero=3)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_another_tokenizer_gives_same_texts_means_and_roles(source, head, kind):
    space = "Ġ" if kind == "bytes" else "▁"
    merges = [
        ("t", "h"),
        ("th", "e"),
        (space, "the"),
        ("c", "a"),
        ("ca", "t"),
        (space, "cat"),
        ("t", "e"),
    ]
    target = bpe(
        ["[END]", "[GO]", "[FILL]", space, *LETTERS, "z"],
        merges,
        kind,
        eos_token="[END]",
        bos_token="[GO]",
        pad_token="[FILL]",
    )
    target.add_tokens([AddedToken("<|x|>", special=True)])
    rows, matches = transfer_rows(head, source, target, len(target) + 1)
    row = {name: rows[token] for name, token in target.get_vocab().items()}
    own = {name: head[token] for name, token in source.get_vocab().items()}

    for name in [*LETTERS, "th", "the"]:
        assert np.array_equal(row[name], own[name]), name
    assert np.array_equal(row[space], own["Ġ"])
    assert np.array_equal(row[f"{space}the"], own["Ġthe"])
    # The source merges "a" and "t", not "c" and "a".
    np.testing.assert_array_equal(row["cat"], (own["c"] + own["at"]) / 2)
    np.testing.assert_array_equal(row[f"{space}cat"], (own["Ġ"] + own["c"] + own["at"]) / 3)
    np.testing.assert_array_equal(row["ca"], (own["c"] + own["a"]) / 2)
    np.testing.assert_array_equal(row["te"], (own["t"] + own["e"]) / 2)
    assert np.array_equal(row["[END]"], own["</s>"]) and np.array_equal(row["[GO]"], own["<s>"])
    # The source has no pad token and does not know "z", and "<|x|>" is special without a role.
    for name in ("[FILL]", "z", "<|x|>"):
        assert not row[name].any(), name
    assert not rows[-1].any()
    assert matches == Matches(exact=11, averaged=4, special=2, zero=4)


def test_a_token_of_several_roles_goes_by_the_first_that_the_source_has(source, head):
    target = bpe(["[X]", "a"], [], eos_token="[X]", bos_token="[X]", pad_token="[X]")
    assert np.array_equal(transfer_rows(head, source, target, 2)[0][0], head[1])
    source.eos_token = None
    assert np.array_equal(transfer_rows(head, source, target, 2)[0][0], head[0])


def test_a_source_that_puts_a_space_first_splits_as_within_text():
    merges = [("▁", "t"), ("a", "t"), ("▁", "c")]
    source = bpe(["</s>", "▁", "\n", *LETTERS], merges, "metaspace", eos_token="</s>")
    target = bpe(
        ["</s>", "Ġ", *LETTERS],
        [("t", "e"), ("c", "a"), ("ca", "t"), ("Ġ", "cat")],
        eos_token="</s>",
    )
    head = np.eye(len(source), dtype=np.float32)
    rows, matches = transfer_rows(head, source, target, len(target))
    row = {name: rows[token] for name, token in target.get_vocab().items()}
    own = {name: head[token] for name, token in source.get_vocab().items()}
    np.testing.assert_array_equal(row["te"], (own["t"] + own["e"]) / 2)
    np.testing.assert_array_equal(row["cat"], (own["c"] + own["at"]) / 2)
    np.testing.assert_array_equal(row["Ġcat"], (own["▁c"] + own["at"]) / 2)
    assert matches == Matches(exact=8, averaged=4, special=1)


def test_parts_of_characters_match_by_name_and_nothing_else():
    """ByteLevel writes byte 0xC3 as Ã.

    Decoding replaces a part of a character by the replacement character, which ByteLevel writes as
    ï ¿ ½.
    """
    one = bpe(["</s>", "a", "Ċ", "Ã", "©", "ï", "¿", "½"], [("Ã", "©")], eos_token="</s>")
    two = bpe(["</s>", "b", "©", "Ã", "ð"], [], eos_token="</s>")
    head = np.diag(np.arange(1, 10, dtype=np.float32))
    rows, matches = transfer_rows(head, one, two, 5)
    np.testing.assert_array_equal(rows[2], head[4])
    np.testing.assert_array_equal(rows[3], head[3])
    assert not rows[4].any() and not rows[1].any()
    assert matches == Matches(exact=2, special=1, zero=2)
