"""Checks each sampling setting against decoding by hand from the model's logits."""

import pytest
import torch

from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.responses import generate_batch
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.models.load import ModelSource

RECORDS = [
    {"instruction": "Why?"},
    {"instruction": "Put it into the past.", "input": "The cook washes the pot."},
]
TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer(root):
    return ModelSource(str(root / "data" / "tiny-base")).tokenizer()


@pytest.fixture
def model(make_model):
    """A random model with sharp enough distributions to write different texts."""
    model = make_model("llama", vocab_size=2048, positions=512)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def by_hand(model, tokenizer, choose):
    """Decodes by hand and returns the token ids of the responses.

    ``choose`` takes the logits [V] and all ids so far, and returns the next id.
    """
    responses = []
    for record in RECORDS:
        ids = tokenizer(format_prompt(record))["input_ids"]
        start = len(ids)
        while len(ids) < start + TOKENS and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(choose(model(input_ids=torch.tensor([ids])).logits[0, -1], ids)))
        responses.append(ids[start:])
    return responses


def texts(tokenizer, responses):
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in responses]


def generated(model, tokenizer, seed=0, **settings):
    return generate_batch(model, tokenizer, RECORDS, Sampling(TOKENS, **settings), seed=seed)


def greedy(logits, ids):
    return logits.argmax()


def penalised(penalty):
    def choose(logits, ids):
        seen = torch.tensor(sorted(set(ids)))
        logits = logits.clone()
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits.argmax()

    return choose


def most_typical(temperature):
    def choose(logits, ids):
        logs = (logits / temperature).log_softmax(0)
        entropy = -(logs.exp() * logs).sum()
        token = (-logs - entropy).abs().argmin()
        # so this token alone reaches the mass that the test asks for
        assert logs[token].exp() > 0.001
        return token

    return choose


def test_min_p_of_one_leaves_the_likeliest_token(model, tokenizer):
    want = texts(tokenizer, by_hand(model, tokenizer, greedy))
    # Whole numbers, as they come from a shell.
    assert generated(model, tokenizer, temperature=2, min_p=1) == want
    assert generated(model, tokenizer, temperature=2, min_p=0) != want


def test_the_smallest_typical_p_leaves_the_token_nearest_to_the_entropy(model, tokenizer):
    want = texts(tokenizer, by_hand(model, tokenizer, most_typical(0.7)))
    assert want != texts(tokenizer, by_hand(model, tokenizer, greedy))
    for seed in (0, 1):
        assert generated(model, tokenizer, seed, temperature=0.7, typical_p=0.001) == want
    assert generated(model, tokenizer, temperature=0.7, typical_p=1) != want


def test_repetition_penalty_in_greedy_decoding_and_in_sampling(model, tokenizer):
    with torch.no_grad():  # the last token read becomes the likeliest next one
        model.lm_head.weight.copy_(20 * model.get_input_embeddings().weight)
    plain, mild, harsh = (by_hand(model, tokenizer, penalised(penalty)) for penalty in (1, 2, 100))
    once, some, all_new = (len(set(ids)) for ids in (plain[0], mild[0], harsh[0]))
    assert 1 == once < some < all_new == TOKENS and mild[0] != mild[1]
    for penalty, want in ((1, plain), (2, mild), (100, harsh)):
        assert generated(model, tokenizer, repetition_penalty=penalty) == texts(tokenizer, want)
        assert generated(
            model, tokenizer, temperature=3, min_p=1, repetition_penalty=penalty
        ) == texts(tokenizer, want)


def test_extreme_values_still_give_text(model, tokenizer):
    want = texts(tokenizer, by_hand(model, tokenizer, greedy))
    assert generated(model, tokenizer, temperature=0.001) == want
    for penalty in (0.01, 100):
        assert all(generated(model, tokenizer, temperature=0.001, repetition_penalty=penalty))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": -0.1, "temperature": 1}, "--min_p -0.1: give a number from 0 to 1"),
        ({"min_p": 1.1, "temperature": 1}, "--min_p 1.1"),
        ({"min_p": 0.1}, "--min_p belongs to sampling: give --temperature too"),
        ({"typical_p": 0, "temperature": 1}, "--typical_p 0: give a number from 0.001 to 1"),
        ({"typical_p": 2, "temperature": 1}, "--typical_p 2"),
        ({"typical_p": 0.5}, "--typical_p belongs to sampling"),
        ({"top_k": 5}, "--top_k belongs to sampling"),
        ({"repetition_penalty": 0}, "--repetition_penalty 0: give a number from 0.01 to 100"),
        ({"repetition_penalty": float("nan")}, "--repetition_penalty nan"),
        ({"repetition_penalty": True}, "--repetition_penalty True"),
        ({"repetition_penalty": "much"}, "--repetition_penalty much"),
        ({"temperature": 1e-9}, "give at least 0.001, or 0 for greedy"),
    ],
    ids=str,
)
def test_values_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
