"""Tests prompts from training to serving.

A run's folders record the prompts it was trained with, and every command uses these prompts.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stanford_alpaca import merge_lora
from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.data.records import parse_record
from stanford_alpaca.data.templates import trained_prompts
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation import metrics, report
from stanford_alpaca.generate import run as generate
from stanford_alpaca.train import train
from tests.helpers import evaluations, steps

CHAT = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
ASKED = {"instruction": "Give a synonym of big.", "input": ""}


@pytest.fixture
def base(root, tmp_path):
    """The shipped model, with settings like the bases of Qwen2.5 and Llama 3.

    Its chat template ends turns with another token than the one at which its configuration stops.
    """
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=3, bos_token_id=0, pad_token_id=2).save_pretrained(folder)
    return folder


def stops_of(folder):
    return GenerationConfig.from_pretrained(folder).eos_token_id


def asked_of(folder, record=ASKED):
    return PromptEncoder(AutoTokenizer.from_pretrained(folder))(
        [parse_record(record, "here", needs_output=False)]
    )[0]


def ids_of(folder, content):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )["input_ids"]


def check_folders(run, merged, exported):
    """Checks that each folder stops and asks as was trained, and that the card says so."""
    for folder in (run, run / "checkpoint-2", merged, exported):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == CHAT, folder
        assert trained_prompts(tokenizer) == ("chat", "text"), folder
        assert stops_of(folder) == [1, 3], folder
        assert asked_of(folder) == ids_of(folder, ASKED["instruction"]), folder
    assert "`tokenizer.apply_chat_template" in (run / "README.md").read_text()
    assert "the tokenizer's chat template" in (run / "README.md").read_text()


def test_lora_merged_and_exported_folders_stop_and_ask_as_was_trained(
    arguments, base, tmp_path, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(ASKED["instruction"])
    train(
        arguments(
            "--lora",
            "--sample_prompts",
            str(prompts),
            model_name_or_path=base,
            prompt_template="chat",
            save_strategy="steps",
            save_steps=2,
            eval_path=tmp_path / "held.json",
        )
    )
    printed = capsys.readouterr().out
    assert (
        "prompts    the tokenizer's chat template" in printed
        and "not used: id (40 of 40 records)" in printed
    )
    run, merged, exported = tmp_path / "out", tmp_path / "merged", tmp_path / "exported"
    merge_lora.run(str(run), str(merged))
    export(run / "checkpoint-2", exported)
    check_folders(run, merged, exported)

    # Samples during training, generate, and metrics all use the same prompts. A command that uses
    # other prompts says so.
    sampled = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    file = tmp_path / "a.jsonl"
    generate(str(run), instruction=ASKED["instruction"], out=str(file), max_new_tokens=64)
    (answer,) = json.loads(file.read_text())["responses"].values()
    assert answer == sampled["responses"]["step 3"]
    capsys.readouterr()
    generate(str(run), instruction=ASKED["instruction"], prompt_template="alpaca", max_new_tokens=2)
    assert (
        f"{run}: trained with the tokenizer's chat template, asked here with Alpaca's template"
        in capsys.readouterr().out
    )
    names, held_out = [str(base), str(run), str(merged)], str(tmp_path / "held.json")
    metrics.run(*names, data=held_out, out=str(tmp_path / "ev"), max_new_tokens=2, samples=0)
    printed = capsys.readouterr().out
    assert (
        f"prompts of {base}: Alpaca's template" in printed
        and f"prompts of {run}: the tokenizer's chat template" in printed
    )
    measured = json.loads((tmp_path / "ev" / "metrics.json").read_text())
    nll = {name: measured["results"][name]["nll"]["value"] for name in names}
    assert (
        nll[str(run)]
        == pytest.approx(evaluations(run)[-1]["eval_nll"], abs=1e-4)
        == pytest.approx(nll[str(merged)], abs=1e-4)
    )
    assert abs(nll[str(base)] - nll[str(run)]) > 0.05
    page = tmp_path / "page.html"
    report.run(*names, out=str(page), evaluation=str(tmp_path / "ev"), transport_records=2)
    assert page.read_text().count("the tokenizer's chat template") >= 2


@pytest.mark.parametrize(
    ("form", "content"),
    [("alpaca", "Give a synonym of big."), ("completion", "Give a synonym of big.")],
)
def test_a_run_of_instructions_is_served_with_alpacas_words(
    arguments, base, tmp_path, capsys, form, content
):
    changes = {}
    if form == "completion":
        (tmp_path / "pairs.json").write_text(
            json.dumps([{"prompt": "a b", "completion": " c"}] * 20)
        )
        changes["data_path"] = tmp_path / "pairs.json"
    train(arguments(model_name_or_path=base, mode="mle", max_steps=1, **changes))
    printed = capsys.readouterr().out
    words = "prompts: Alpaca's template" if form == "alpaca" else "prompts: no template"
    assert words in printed and "which is not used: --prompt_template chat uses it" in printed
    assert asked_of(tmp_path / "out") == ids_of(tmp_path / "out", content) and stops_of(
        tmp_path / "out"
    ) == [1, 3]
    text = AutoTokenizer.from_pretrained(tmp_path / "out").decode(asked_of(tmp_path / "out"))
    assert text.startswith("<s>Below is an instruction") == (form == "alpaca")


def test_a_given_chat_template_is_used_saved_and_part_of_the_run(arguments, root, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT)
    given = {
        "mode": "mle",
        "max_steps": 1,
        "chat_template": tmp_path / "chat.jinja",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    train(arguments(**given))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT
    assert asked_of(tmp_path / "out") == ids_of(tmp_path / "out", ASKED["instruction"])
    (tmp_path / "chat.jinja").write_text(CHAT + "{# changed #}")
    with pytest.raises(UserError, match="the content of --chat_template has changed"):
        train(arguments(**given | {"max_steps": 2}, resume="auto"))


def test_weights_multiply_losses_in_training_and_evaluation(arguments, tmp_path):
    losses = {}
    for name, weight in (("all", 1), ("weighted", 2.5), ("packed", 2.5)):
        argv = arguments(
            *(["--packing"] if name == "packed" else []),
            mode="mle",
            max_steps=1,
            output_dir=tmp_path / name,
            data_path=tmp_path / "weighted.json",
            eval_path=tmp_path / "weighted.json",
        )
        records = json.loads((tmp_path / "train.json").read_text())[:16]
        (tmp_path / "weighted.json").write_text(
            json.dumps([r | {"weight": weight} for r in records])
        )
        train(argv)
        (step,) = steps(tmp_path / name)
        losses[name] = (
            step["loss"],
            step["nll"],
            evaluations(tmp_path / name)[-1]["eval_loss"],
            evaluations(tmp_path / name)[-1]["eval_nll"],
        )
    assert losses["all"][0] == pytest.approx(losses["all"][1], rel=1e-5)
    for name in ("weighted", "packed"):
        assert losses[name][:2] == pytest.approx(
            (2.5 * losses["all"][0], losses["all"][1]), rel=1e-5
        )
        assert losses[name][2] == pytest.approx(2.5 * losses[name][3], rel=1e-5)


def test_a_stream_in_which_nothing_has_a_target_is_one_line(arguments, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"instruction": "a", "output": ""}\n' * 300)
    (tmp_path / "good.jsonl").write_text('{"instruction": "a", "output": "b", "score": 1}\n' * 300)
    weights = ["--data_weights", "1", "1", "--streaming"]
    argv = arguments("--streaming", data_path=tmp_path / "empty.jsonl")
    with pytest.raises(
        UserError, match=r"empty.jsonl: no example has a token to train on: 0 of 256 examples"
    ):
        train(argv)
    argv = arguments(*weights)
    place = argv.index("--data_path") + 1
    argv[place : place + 1] = [str(tmp_path / "good.jsonl"), str(tmp_path / "empty.jsonl")]
    with pytest.raises(UserError, match=r"empty.jsonl: no example has a token"):
        train(argv)


def test_token_weights_are_exact_whatever_the_engine_computes_in(make_model):
    from stanford_alpaca.data.batching import PadCollator
    from stanford_alpaca.objective.attach import attach_objective

    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": [1.0, 0.3, 2.0]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    batch = PadCollator(0)(rows)
    # the bits of float32, so no engine rounds them
    assert batch["token_weights"].dtype == torch.int32
    assert batch["token_weights"].view(torch.float32).tolist() == [
        [1.0, pytest.approx(0.3), 2.0],
        [1.0, 1.0, 1.0],
    ]
    model = make_model("llama")
    attach_objective(model, "emo")
    each = [
        model(
            input_ids=torch.tensor([row["input_ids"]]),
            labels=torch.tensor([labels]),
            num_items_in_batch=1,
        ).loss
        for row, labels in [
            (rows[0], [-100, 6, -100]),
            (rows[0], [-100, -100, 7]),
            (rows[1], [-100, 9]),
        ]
    ]
    loss = model(**batch, num_items_in_batch=3).loss
    torch.testing.assert_close(loss, (0.3 * each[0] + 2 * each[1] + each[2]) / 3)
    assert "token_weights" not in PadCollator(0)([rows[1]])
