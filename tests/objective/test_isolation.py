"""Tests that examples packed in one row do not see each other.

Loss, nll and gradients are the same as for separate rows, or the model is refused.
"""

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

from stanford_alpaca import attach_objective
from stanford_alpaca.data.batching import PadCollator, SegmentCollator
from stanford_alpaca.data.packing import PackedExamples
from stanford_alpaca.errors import UserError
from stanford_alpaca.objective.isolation import find_isolation
from stanford_alpaca.objective.teacher import Teacher

SIZES = (9, 4, 7, 2, 12)
ROWS = [[0, 1, 2], [3, 4]]


@pytest.fixture
def examples():
    rows = [torch.randint(3, 97, (size,)).tolist() for size in SIZES]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def packed(examples):
    return [PackedExamples(Dataset.from_list(examples), ROWS)[row] for row in range(len(ROWS))]


def step(model, batch):
    """Returns loss, sum of nll, and gradients of one batch."""
    handle = attach_objective(model, "emo")
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(29)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    sums = handle.train_meter.drain("cpu")
    handle.detach()
    assert sums.tokens == 29
    return loss.detach(), torch.tensor(sums.nll), gradients


def assert_same(model, want, batch):
    got = step(model, batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    for name, gradient in want[2].items():
        torch.testing.assert_close(got[2][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


NEWER = Version(transformers.__version__) >= Version("5.24")
WINDOW = {"sliding_window": 4}  # shorter than the examples


@pytest.mark.parametrize(
    ("family", "attention", "means", "changes"),
    [
        ("llama", "sdpa", "positions", {}),
        ("llama", "eager", "positions", {}),
        ("gpt2", "sdpa", "positions", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
        ("gpt2", "eager", "positions", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
        ("opt", "sdpa", "mask", {"dropout": 0}),
        ("opt", "eager", "bias", {"dropout": 0}),
        ("falcon", "sdpa", "positions" if NEWER else "mask", {}),
        ("mistral", "sdpa", "positions", WINDOW),
        ("mistral", "eager", "positions", WINDOW),
        ("gemma2", "eager", "positions", WINDOW | {"attn_logit_softcapping": 2.0}),
    ],
)
def test_packed_and_padding_free_are_what_padded_is(
    make_model, examples, family, attention, means, changes
):
    model = make_model(family, attn_implementation=attention, **changes)
    assert find_isolation(model) == means
    model.train()  # a cache or activation checkpointing would matter in this mode
    want = step(model, PadCollator(0)(examples))
    assert_same(model, want, SegmentCollator(0, apart_by=means)(packed(examples)))
    assert_same(model, want, SegmentCollator(0, flat=True, apart_by=means)(examples))


def test_a_teacher_keeps_examples_apart_too(make_model, examples):
    teacher = Teacher(make_model("gpt2", attn_implementation="sdpa"), 5)
    assert teacher.model.config.use_cache  # with a cache, the teacher would ignore positions
    losses = []
    for batch in (PadCollator(0)(examples), SegmentCollator(0)(packed(examples))):
        model = make_model("llama")
        attach_objective(model, "mle", teacher=teacher)
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """Does what FlashAttention's varlen function promises.

    It attends within each segment of [tokens, heads, D] separately.
    """
    assert (
        causal
        and torch.equal(cu_seqlens_q, cu_seqlens_k)
        and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    )
    CALLS.append(cu_seqlens_q.tolist())
    parts = []
    for start, end in zip(CALLS[-1][:-1], CALLS[-1][1:], strict=True):
        part = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        out = F.scaled_dot_product_attention(
            *part, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


CALLS: list[list[int]] = []


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("mistral", WINDOW), ("opt", {"dropout": 0})]
)
def test_flash_attention_is_told_where_examples_begin(
    make_model, examples, monkeypatch, family, changes
):
    """Runs transformers' path to FlashAttention.

    A function with the same contract replaces FlashAttention, because no GPU is available.
    """
    found = (None, varlen, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: found
    )
    model = make_model(family, attn_implementation="sdpa", **changes)
    want = step(model, PadCollator(0)(examples))
    model.config._attn_implementation = "flash_attention_2"
    CALLS.clear()
    # found without calling FlashAttention
    assert find_isolation(model) == "cu_seq_lens" and not CALLS
    assert_same(model, want, SegmentCollator(0, apart_by="cu_seq_lens")(packed(examples)))
    assert CALLS[0] == [0, 9, 13, 20, 22, 34, *range(35, 41)]
    CALLS.clear()
    assert_same(model, want, SegmentCollator(0, flat=True, apart_by="cu_seq_lens")(examples))
    assert CALLS[0] == [0, 9, 13, 20, 22, 34]


def test_models_that_would_mix_examples_are_refused(make_model):
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=97)
    with pytest.raises(
        UserError,
        match=r"the teacher \(MambaForCausalLM, .*\) cannot keep apart .* \(they see each other\)",
    ):
        find_isolation(AutoModelForCausalLM.from_config(config), "teacher")
    with pytest.raises(UserError, match="they see each other"):
        find_isolation(make_model("opt"), means="positions")
    # This mask does not know the window.
    with pytest.raises(UserError, match="they see each other"):
        find_isolation(make_model("mistral", **WINDOW), means="mask")


def test_flash_attention_that_is_not_told_is_refused(make_model):
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="they see each other"):
        find_isolation(model, means="positions")
