"""The example task for lm-eval: its questions are right.

lm-eval answers them as this package scores them.
"""

import json
import runpy
from importlib.util import find_spec

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.evaluation.fewshot.prompting import Choices, split_stem
from stanford_alpaca.evaluation.fewshot.scoring import score

NEEDS_LM_EVAL = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval==0.4.13"
)


@pytest.fixture
def questions(root):
    records = json.loads((root / "data" / "instructions" / "held_out.json").read_text())
    rows = runpy.run_path(str(root / "examples" / "lm_eval" / "word_facts.py"))["process_docs"](
        Dataset.from_list(records)
    )
    return rows.to_list(), {record["output"] for record in records}


def test_one_of_four_words_makes_the_sentence_of_a_record(questions):
    rows, outputs = questions
    assert len(rows) == 63 and {row["answer"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        right = [f"{row['beginning']} {word}." in outputs for word in row["choices"]]
        assert right == [place == row["answer"] for place in range(4)]


@NEEDS_LM_EVAL
def test_lm_eval_runs_it_offline(root, questions, make_model, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(root)
    tokenizer = AutoTokenizer.from_pretrained("data/tiny-base")
    for model in (
        AutoModelForCausalLM.from_pretrained("data/tiny-base"),
        make_model("llama", vocab_size=2048),
    ):
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
            tasks=["word_facts"],
            bootstrap_iters=0,
            task_manager=TaskManager(include_path="examples/lm_eval", include_defaults=False),
        )
        prompts = [
            [f"{row['beginning']} {word}" for word in row["choices"]] for row in questions[0]
        ]
        rows = score(
            model, [Choices(*split_stem(tokenizer(texts)["input_ids"], 0), []) for texts in prompts]
        )
        right = [
            row.index(max(row)) == question["answer"]
            for row, question in zip(rows, questions[0], strict=True)
        ]
        assert found["results"]["word_facts"]["acc,none"] == pytest.approx(sum(right) / len(right))
