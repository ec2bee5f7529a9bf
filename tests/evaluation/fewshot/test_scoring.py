"""Few-shot scoring: the fast ways equal the plain loop, and prompts equal hand-written ones.

The log-likelihoods equal those of lm-eval.
"""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot import scoring
from stanford_alpaca.evaluation.fewshot.prompting import Choices, encode_choices, split_stem
from stanford_alpaca.evaluation.fewshot.scoring import (
    Scorer,
    batches,
    choose_way,
    common_start,
    plain,
    score,
)
from stanford_alpaca.evaluation.fewshot.tasks import Split, Task, TaskData

NEEDS_LM_EVAL = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval==0.4.13"
)
REVIEWS = Task("reviews", "Review: {text}\nSentiment: {label}", ["negative", "positive"])


def made_up(stem: int) -> list[Choices]:
    """Returns items of different lengths behind a common start of ``stem`` tokens.

    Their endings have one or several tokens.
    """
    random = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(3, 97, (count,), generator=random).tolist()

    start, shapes = ids(stem), [(5, (1, 1, 3)), (30, (2, 1, 4)), (1, (1, 1, 1)), (60, (1, 5, 2))]
    return [
        Choices(start + ids(length), [ids(count) for count in counts], [])
        for length, counts in shapes
    ]


def furthest(scores, others):
    return max(
        abs(a - b) for pair in zip(scores, others, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gemma3", "mixtral-routed"])
def test_every_fast_way_gives_the_plain_loops_scores(make_model, family, whole, capsys):
    model = make_model(
        family, initializer_range=0.3, **({"init_std": 0.3} if family == "opt" else {})
    )
    for stem in (0, 20):
        choices, scorer = made_up(stem), Scorer(model, whole)
        want = plain(model, choices, whole)
        assert scorer.head is not None
        with torch.inference_mode():
            starts = common_start([item.context for item in choices])[:stem]
            found = [scorer.padded(choices), scorer.shared(choices), scorer.shared(choices, starts)]
            # This call reads the kept cache, which the call before must not have changed.
            found.append(scorer.shared(choices[1:], starts))
        for scores in found:
            assert furthest(scores, want[-len(scores) :]) < 1e-4
        assert furthest(score(model, choices, 3, whole), want) < 1e-4
    assert capsys.readouterr().out == ""  # no fast way was given up


def test_the_plain_loop_is_the_sum_of_the_logarithms(make_model):
    model, (item, *_) = make_model("llama"), made_up(0)
    ids = item.context + item.endings[2]
    p = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(1)
    logs = [p[place - 1, ids[place]].log().item() for place in range(1, len(ids))]
    assert plain(model, [item])[0][2] == pytest.approx(sum(logs[-3:]), abs=1e-5)
    assert plain(model, [item], whole=True)[0][2] == pytest.approx(sum(logs), abs=1e-5)


def test_what_a_model_cannot_do_is_found_and_said(make_model, monkeypatch, capsys):
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    mamba, choices = AutoModelForCausalLM.from_config(config).eval(), made_up(20)
    assert furthest(score(mamba, choices), plain(mamba, choices)) < 1e-4
    said = capsys.readouterr().out
    assert (
        said.count("done without") == 2
        and "MambaForCausalLM: sharing what the classes share does not work here" in said
    )

    # Padding behind the stem moves the sliding window.
    window = make_model("mistral", sliding_window=8, initializer_range=0.3)
    assert furthest(score(window, choices), plain(window, choices)) < 1e-4
    llama = make_model("llama", initializer_range=0.3)
    monkeypatch.setattr(
        Scorer, "shared", lambda self, batch, *stem: [[0.0] * len(item.endings) for item in batch]
    )
    monkeypatch.setattr(
        Scorer, "padded", lambda self, batch: [[float("nan")] * len(item.endings) for item in batch]
    )
    assert choose_way(llama, choices, False)(choices) == plain(llama, choices)
    said = capsys.readouterr().out
    assert "MistralForCausalLM: sharing what all items share does not" in said
    assert "LlamaForCausalLM: batching does not work here (log-likelihoods move by nan)" in said


def test_an_output_layer_that_is_not_recognised_gives_the_models_own_logits(
    make_model, monkeypatch
):
    model, choices = make_model("llama", initializer_range=0.3), made_up(20)
    layer = model.lm_head
    layer.register_forward_hook(lambda layer, inputs, output: 2 * output + 1)
    layer.register_forward_hook(lambda layer, inputs, output: output.cumsum(-1) / 9)
    assert Scorer(model, False).head is None
    assert furthest(score(model, choices), plain(model, choices)) < 1e-4


def test_batches_and_common_starts():
    assert list(batches([5, 9, 2, 9], 3, 0)) == [[1, 3, 0], [2]]
    # With padding the batches have 9, 2 x 5 and 2 tokens.
    assert list(batches([5, 9, 2, 3], None, 10)) == [[1], [0, 3], [2]]
    assert common_start([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2] and common_start([[1], [2]]) == []


def test_prompts_part_where_the_classes_do():
    assert split_stem([[1, 5, 6], [1, 5, 7, 8]], 9) == ([1, 5], [[6], [7, 8]])
    assert split_stem([[1, 5], [1, 5, 7]], 9) == ([1], [[5], [5, 7]])  # each ending keeps a token
    assert split_stem([[5], [6]], 9) == ([9], [[5], [6]])  # and a token stands before it


@pytest.fixture(scope="module")
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


@pytest.fixture
def reviews():
    train = Split(["a fine film", "dull", "not good , not bad", "a waste of time"], [1, 0, 1, 0])
    return TaskData(
        REVIEWS, train, Split(["a fine {film} </s>", "two long hours of my life"], [1, 0])
    )


def test_prompts_hold_the_examples_in_order_and_too_long_ones_lose_the_first(tokenizer, reviews):
    shots = ["Review: dull\nSentiment: negative", "Review: a fine film\nSentiment: positive"]
    want = "\n\n".join([*shots, "Review: a fine {film} </s>\nSentiment: "])
    whole = encode_choices(tokenizer, reviews, [[1, 0], []], None)
    for label, name in enumerate(REVIEWS.classes):
        assert whole[0].context + whole[0].endings[label] == tokenizer(want + name)["input_ids"]
        assert tokenizer.decode(whole[0].endings[label]).strip() == name
    assert whole[0].context[0] == tokenizer.bos_token_id
    assert [item.examples for item in whole] == [[1, 0], []]
    longest = max(len(whole[0].context + ending) for ending in whole[0].endings)
    cut = encode_choices(tokenizer, reviews, [[1, 0], []], longest - 1)
    assert [item.examples for item in cut] == [[0], []]
    assert (
        cut[0].context + cut[0].endings[0]
        == tokenizer(want.split("\n\n", 1)[1] + "negative")["input_ids"]
    )
    with pytest.raises(
        UserError,
        match=r"record 2 has \d+ tokens without any example, and the model has 20 positions",
    ):
        encode_choices(
            tokenizer, reviews._replace(test=Split(["a", "a " * 20], [0, 0])), [[], []], 20
        )


def test_a_token_that_the_tokenizer_puts_at_the_end_is_left_out(root, reviews, tokenizer):
    from tokenizers.processors import TemplateProcessing

    closing = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    ids = [(token, closing.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    assert closing("a")["input_ids"][-1] == closing.eos_token_id
    assert encode_choices(closing, reviews, [[0], [1]], None) == encode_choices(
        tokenizer, reviews, [[0], [1]], None
    )


@NEEDS_LM_EVAL
def test_log_likelihoods_are_those_of_lm_eval(root, tokenizer, reviews):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base")
    choices = encode_choices(tokenizer, reviews, [[1, 2, 0], [3, 0]], 1024)
    texts = [[tokenizer.decode(ids) for ids in (item.context, *item.endings)] for item in choices]
    pairs = [
        (context.removeprefix("<s>"), ending) for context, *endings in texts for ending in endings
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    theirs = [
        value
        for value, _ in HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood(
            requests
        )
    ]
    assert [value for row in score(model, choices) for value in row] == pytest.approx(
        theirs, abs=1e-4
    )
    assert pairs[0][1] == " negative" and len(choices[0].context) > scoring.STEM
