"""Tests soft targets from a teacher against transformers' own logits of both models."""

import pytest
import torch
from torch.nn import functional as F

from stanford_alpaca import attach_objective
from stanford_alpaca.objective.teacher import Teacher, same_vocabulary


@pytest.fixture
def batch():
    ids = torch.randint(3, 97, (3, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2, 9:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_is_cross_entropy_to_the_teachers_distribution(make_model, batch, family):
    # The teacher's vocabulary is padded by four tokens.
    student, teacher = make_model("llama"), make_model(family, vocab_size=101)
    labels = batch.pop("labels")
    keep = labels[:, 1:] != -100
    with torch.no_grad():
        taught = teacher(**batch).logits[:, :-1][keep][:, :97].softmax(1)
        student.lm_head.weight.mul_(3)
    logits = student(**batch).logits[:, :-1][keep]
    for top_k in (97, 5, 1):
        top = taught.topk(top_k)
        tau = torch.zeros_like(taught).scatter(
            1, top.indices, top.values / top.values.sum(1, keepdim=True)
        )
        want = F.cross_entropy(logits, tau)
        handle = attach_objective(student, "mle", None, teacher=Teacher(teacher, top_k))
        loss = student(**batch, labels=labels).loss
        handle.detach()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(loss, student.lm_head.weight)[0]
    torch.testing.assert_close(
        gradient, torch.autograd.grad(want, student.lm_head.weight)[0], rtol=1e-4, atol=1e-6
    )


def test_evaluation_is_by_the_labels_and_the_teacher_stays_as_it_was(make_model, batch):
    student, teacher = make_model("llama"), make_model("qwen2").train()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    with torch.no_grad():
        want = student(**batch).loss
    handle = attach_objective(student, "mle", "frozen", teacher=Teacher(teacher, 10))
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).loss, want, rtol=1e-5, atol=1e-6)
    loss = student(**batch).loss
    assert abs(loss - want) > 1e-3
    loss.backward()
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any("teacher" in name for name in student.state_dict())
    assert handle.teacher is not None and not teacher.training
    blank = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert student(**blank).loss == 0


def test_what_a_teacher_cannot_do(make_model, root):
    from transformers import AutoTokenizer

    student, teacher = make_model("llama"), make_model("llama")
    for options in ({"mode": "dft"}, {"mode": "emo", "emo_weighting": "upstream"}):
        with pytest.raises(ValueError, match="needs one target, not a teacher's"):
            attach_objective(student, cost="frozen", teacher=Teacher(teacher), **options)
    with pytest.raises(
        ValueError, match="top_k is 98: it has to lie between 1 and the teacher's 97 tokens"
    ):
        Teacher(teacher, 98)
    tokenizer, other = (
        AutoTokenizer.from_pretrained(root / "data" / "tiny-base") for _ in range(2)
    )
    other.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert same_vocabulary(tokenizer, other) and not same_vocabulary(other, tokenizer)
