"""Tests options of a run.

Covers config files, the record of a run, samples during training, teachers, training from scratch,
and streams.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerState

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.models.identity import identify_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run.build import cache_costs
from stanford_alpaca.run.model_card import write_card
from stanford_alpaca.run.parse import parse
from stanford_alpaca.train import evaluation_of, train
from stanford_alpaca.training import hardware, trainer
from tests.helpers import BEST_OF_EACH_STEP, evaluations, steps


def same_weights(one: Path, two: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- config files and the record of a run --------------------------------------------------------


def test_a_run_repeats_from_its_run_yaml_and_flags_win(arguments, tmp_path, capsys):
    train(arguments(mode="mix", emo_weight=0.25, eval_fraction=0.2))
    written = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (written["mode"], written["emo_weight"], written["seed"], written["max_steps"]) == (
        "mix",
        0.25,
        42,
        3,
    )
    made = written["made_with"]
    assert made["torch"] == version("torch") and made["processes"] == 1
    assert list(made["data"]) == [str(tmp_path / "train.json")]
    train(["--config", str(tmp_path / "out" / "run.yaml"), "--output_dir", str(tmp_path / "again")])
    assert same_weights(tmp_path / "out", tmp_path / "again")
    assert "--config:" not in capsys.readouterr().out
    again = yaml.safe_load((tmp_path / "again" / "run.yaml").read_text())
    assert {**written, "output_dir": 0} == {**again, "output_dir": 0}

    (tmp_path / "train.json").write_text((tmp_path / "train.json").read_text().replace("the", "a"))
    flags = [
        "--output_dir",
        str(tmp_path / "other"),
        "--mode=mle",
        "--data-path",
        str(tmp_path / "train.json"),
    ]
    train([*flags, "--config", str(tmp_path / "out" / "run.yaml")])
    assert f"--config: {tmp_path / 'train.json'} has changed since" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "other" / "run.yaml").read_text())["mode"] == "mle"
    assert not same_weights(tmp_path / "out", tmp_path / "other")


def test_config_files_in_the_users_own_words(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model_name_or_path: m\ndata_path: [a.json, b.json]\n"
        "output-dir: o\nevaluation_strategy: 'no'\n"
        "bf16: false\nlr_scheduler_kwargs: {num_cycles: 2}\nteacher: null\nlearning_rate: 1e-5\n"
    )
    run = parse([f"--config={file}", "--learning_rate", "3e-5"])
    assert (
        run.data.data_path == ["a.json", "b.json"]
        and run.training.output_dir == "o"
        and run.model.teacher is None
    )
    assert run.training.learning_rate == 3e-5 and run.training.lr_scheduler_kwargs == {
        "num_cycles": 2
    }
    assert run.notes == ["--evaluation_strategy no is read as --eval_strategy no"]
    for content, message in [
        ("- a", "wanted a line 'flag: value' for each flag"),
        ("a: [", "cannot be read"),
        (
            "modle_name_or_path: m",
            "unknown argument --modle_name_or_path; did you mean --model_name_or_path",
        ),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            parse(
                [
                    "--config",
                    str(file),
                    "--model_name_or_path",
                    "m",
                    "--data_path",
                    "d",
                    "--output_dir",
                    "o",
                ]
            )
    with pytest.raises(UserError, match=r"--config none\.yaml: cannot be read"):
        parse(["--config", "none.yaml"])
    with pytest.raises(UserError, match="--config needs the name"):
        parse(["--config"])


def test_no_record_holds_a_secret_and_yamls_no_is_a_word(arguments, tmp_path):
    assert (
        yaml.safe_dump(parse(arguments(debug="underflow_overflow")).flags["debug"]).strip()
        == "- underflow_overflow"
    )
    assert "hf_secret" not in str(parse(arguments(hub_token="hf_secret")).flags)
    (tmp_path / "mine.yaml").write_text("save_strategy: no\neval_strategy: no\nbf16: no\n")
    training = parse(
        [*arguments(save_strategy=None), "--config", str(tmp_path / "mine.yaml")]
    ).training
    assert (training.save_strategy, training.eval_strategy, training.bf16) == ("no", "no", False)


def test_a_run_resumed_with_other_flags_leaves_a_record_of_its_own_and_an_evaluation(
    arguments, tmp_path
):
    train(arguments(save_strategy="steps"))
    first = (tmp_path / "out" / "run.yaml").read_text()
    resume = {"resume_from_checkpoint": True, "eval_path": tmp_path / "held.json"}
    train(arguments(**resume))  # resumes after the last step, so nothing is trained
    assert (tmp_path / "out" / "run.yaml").read_text() == first
    second = yaml.safe_load((tmp_path / "out" / "run-from-checkpoint-3.yaml").read_text())
    assert (
        second
        == yaml.safe_load(first)
        | {"save_strategy": "no"}
        | {
            "eval_path": [str(tmp_path / "held.json")],
            "resume_from_checkpoint": "True",
            "made_with": second["made_with"],
        }
        and len(steps(tmp_path / "out")) == 3
    )
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_nll"] > 0


def test_the_last_evaluation_is_of_the_weights_that_were_kept():
    """The best step may have no checkpoint.

    Then the weights that are loaded belong to another step.
    """
    log = [
        {"step": step, "eval_loss": loss} for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (4, 1.5)]
    ]
    state = TrainerState(
        global_step=4, log_history=log, best_global_step=3, best_model_checkpoint="out/checkpoint-2"
    )
    for load_best, loss in [(True, 2.0), (False, 1.5)]:
        args = SimpleNamespace(load_best_model_at_end=load_best)
        assert evaluation_of(SimpleNamespace(args=args, state=state)) == {"eval_loss": loss}
    state.best_model_checkpoint = None
    assert evaluation_of(
        SimpleNamespace(args=SimpleNamespace(load_best_model_at_end=True), state=state)
    ) == {"eval_loss": 1.5}


@pytest.mark.parametrize(("strategy", "times"), [("no", 1), ("epoch", 2), ("steps", 2)])
def test_no_step_is_evaluated_twice(arguments, tmp_path, strategy, times):
    train(
        arguments(
            eval_strategy=strategy, eval_steps=3, max_steps=4, eval_path=tmp_path / "held.json"
        )
    )
    assert (
        len(evaluations(tmp_path / "out")) == times
        and evaluations(tmp_path / "out")[-1]["step"] == 4
    )


def test_a_hub_models_commit_is_recorded(tmp_path):
    commit, folder = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--me--mine"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert identify_model("me/mine", str(tmp_path)) == f"hub:me/mine@{commit}"


def test_the_model_card_says_what_was_done(arguments, tmp_path):
    train(arguments(eval_path=tmp_path / "held.json"))
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (
        front["library_name"] == "transformers"
        and "emo" in front["tags"]
        and "base_model" not in front
    )
    loss = evaluations(tmp_path / "out")[-1]["eval_loss"]
    assert (
        f"| eval loss | {loss:.4g} |" in card
        and "`tiny-base`, fine-tuned with the objective `emo`" in card
    )
    assert "| data | train.json |" in card and "| cost | frozen, cosine |" in card
    assert str(tmp_path) not in card


def test_the_model_card_of_odd_names(arguments, tmp_path):
    argv = arguments(
        model_name_or_path="123",
        mode="mle",
        teacher="some/teacher",
        output_dir=tmp_path / 'a "b"',
        data_path="a|b",
    )
    (tmp_path / 'a "b"').mkdir()
    write_card(parse(argv), {}, None)
    card = (tmp_path / 'a "b"' / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "123"
    assert (
        "| data | a&#124;b |" in card
        and "| teacher | some/teacher, top 64 |" in card
        and "| cost |" not in card
    )
    (code,) = re.findall("```python\n(.*?)```", card, re.S)
    compile(code, "card", "exec")


# ---- samples and trackers ------------------------------------------------------------------------


def test_samples_while_training_change_nothing_and_reach_file_and_tracker(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    (tmp_path / "prompts.txt").write_text("What is another word for big?\nName a bird.\n")
    sampling = {
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_steps": 2,
        "sample_max_new_tokens": 5,
    }
    train(
        arguments(
            "--report_to",
            "tensorboard",
            output_dir=tmp_path / "shown",
            eval_path=tmp_path / "held.json",
            **sampling,
        )
    )
    assert "step 2 |" in capsys.readouterr().out
    train(arguments())
    assert same_weights(tmp_path / "shown", tmp_path / "out")
    rows = [
        json.loads(line) for line in (tmp_path / "shown" / "samples.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 3, 3]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    from stanford_alpaca.generation.responses import generate_batch
    from stanford_alpaca.generation.sampling import Sampling

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (text,) = generate_batch(model, tokenizer, [{"instruction": "Name a bird."}], Sampling(5))
    assert rows[5]["responses"] == {"step 3": text}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "board").rglob("events*")
    board = EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/nll", "train/emo", "train/grad_norm", "eval/emo"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.value for event in board.Scalars("train/nll")] == pytest.approx(
        [e["nll"] for e in steps(tmp_path / "shown")]
    )
    texts = board.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 2, 3] and b"Name a bird." in texts[
        0
    ].tensor_proto.string_val[0]


def test_samples_are_greedy_whatever_the_folder_asks_for(arguments, tmp_path, root):
    model = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base")
    model.generation_config.update(min_new_tokens=12, no_repeat_ngram_size=2)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("Name a bird.\n")
    sampling = {"sample_prompts": tmp_path / "prompts.txt", "sample_max_new_tokens": 20}
    train(arguments(model_name_or_path=tmp_path / "base", output_dir=tmp_path / "odd", **sampling))
    train(arguments(output_dir=tmp_path / "plain", **sampling))
    assert (tmp_path / "odd" / "samples.jsonl").read_text() == (
        tmp_path / "plain" / "samples.jsonl"
    ).read_text()
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "odd").generation_config.min_new_tokens
        == 12
    )


def test_mfu_is_logged_where_the_peak_is_known(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda: 1e9)
    train(arguments(bf16=True, max_steps=4))
    first, *others = steps(tmp_path / "out")
    assert "mfu" not in first and all(entry["mfu"] > 0 for entry in others)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    linear, quadratic = hardware.training_flops(model)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    matrices = (
        model.config.num_hidden_layers * layer
        + model.model.norm.weight.numel()
        + model.lm_head.weight.numel()
    )
    assert linear == 6 * matrices
    assert quadratic == 12 * model.config.num_hidden_layers * model.config.hidden_size
    assert "mfu" not in steps_without_peak(arguments, tmp_path, monkeypatch)[-1]


def test_only_the_experts_that_a_token_is_sent_to_count_as_flops(make_model):
    dense, *mixtures = (
        hardware.training_flops(make_model("mixtral", num_local_experts=n, num_experts_per_tok=1))[
            0
        ]
        for n in (1, 4)
    )
    router = 6 * 2 * 32 * 3  # two layers of width 32, with three more router rows each
    assert mixtures == [dense + router]


def steps_without_peak(arguments, tmp_path, monkeypatch):
    monkeypatch.undo()
    train(arguments(output_dir=tmp_path / "cpu", bf16=True))
    return steps(tmp_path / "cpu")


# ---- teachers, scratch, streams ------------------------------------------------------------------


def test_a_teacher_pulls_the_student_towards_itself(arguments, tmp_path, root):
    """The student is the base, and the teacher is a model tuned on other words.

    The student can learn those words only from the teacher.
    """
    records = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "odd.json").write_text(
        json.dumps([{**record, "output": "carpenter"} for record in records])
    )
    train(
        arguments(
            data_path=tmp_path / "odd.json",
            mode="mle",
            max_steps=20,
            global_batch=8,
            output_dir=tmp_path / "teacher",
        )
    )
    train(
        arguments(
            teacher=tmp_path / "teacher", teacher_top_k=20, mode="emo", max_steps=20, global_batch=8
        )
    )
    log = steps(tmp_path / "out")
    assert "target_prob" not in log[0] and log[-1]["nll"] < 0.7 * log[0]["nll"]
    from stanford_alpaca.generation.responses import generate_batch
    from stanford_alpaca.generation.sampling import Sampling

    answers = []
    for place in (root / "data" / "tiny-base", tmp_path / "out"):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(place),
            AutoTokenizer.from_pretrained(place),
        )
        answers.append(generate_batch(model, tokenizer, records[:4], Sampling(3)))
    assert not any(text.startswith("car") for text in answers[0]) and all(
        text.startswith("car") for text in answers[1]
    )
    assert not list((tmp_path / "out").glob("*teacher*"))


def test_training_from_scratch_needs_costs_of_its_own(arguments, tmp_path, root):
    for mode in ("emo", "mix"):
        with pytest.raises(
            UserError,
            match="a random output layer prices nothing; make a cost embedding with python -m stan",
        ):
            train(arguments("--from_config", mode=mode))
    base = load_file(root / "data" / "tiny-base" / "model.safetensors")
    save_file({"cost_embedding": base["lm_head.weight"]}, tmp_path / "cost.safetensors")
    train(arguments("--from_config", mode="mix", cost=tmp_path / "cost.safetensors"))
    first = steps(tmp_path / "out")[0]
    assert first["nll"] == pytest.approx(7.6, abs=0.5)  # log 2048: an untrained model is uniform
    assert first["loss"] == pytest.approx(0.5 * first["nll"] + 0.5 * first["emo"], rel=1e-5)
    assert (
        "trained from scratch with the objective `mix`"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_scratch_begins_from_the_seed_and_its_random_layer_prices_no_evaluation(
    arguments, tmp_path
):
    settings = {
        "from_config": True,
        "mode": "mle",
        "max_steps": 1,
        "eval_path": tmp_path / "held.json",
    }
    losses = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(arguments(output_dir=tmp_path / name, seed=seed, data_seed=0, **settings))
        losses.append(steps(tmp_path / name)[0]["loss"])
        torch.rand(1)  # earlier random draws must not matter
    assert losses[0] == losses[1] != losses[2]
    assert "eval_emo" not in evaluations(tmp_path / "a")[0]


def test_a_teacher_needs_as_many_positions_as_the_examples(arguments, tmp_path, root):
    config = AutoConfig.for_model(
        "gpt2", vocab_size=2048, n_embd=8, n_layer=1, n_head=1, n_positions=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        UserError, match="--model_max_length 512 is more than the teacher's 64 positions"
    ):
        train(arguments(teacher=tmp_path / "teacher"))
    # A teacher may have another architecture.
    train(arguments(teacher=tmp_path / "teacher", model_max_length=64, max_steps=1))


def test_a_folder_is_streamed(arguments, tmp_path):
    records = json.loads((tmp_path / "train.json").read_text())
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jsonl").write_text(
            "\n".join(json.dumps(record) for record in records[i::4])
        )
    stream = {"data_path": folder, "streaming": True, "shuffle_buffer": 8, "max_steps": 6}
    train(arguments(**stream, per_device_train_batch_size=8))
    train(arguments(**stream, per_device_train_batch_size=4, output_dir=tmp_path / "two"))
    one, two = steps(tmp_path / "out"), steps(tmp_path / "two")
    assert len(one) == 6  # 96 examples from 40 records: the stream began again
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert one[-1]["nll"] < 0.6 * one[0]["nll"]


def test_sources_of_several_forms_are_trained_on_together(arguments, tmp_path):
    chat = [
        {"role": "user", "content": "Name a bird."},
        {"role": "assistant", "content": "A robin is a bird."},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": chat * 2})] * 8))
    (tmp_path / "qa.csv").write_text("question,answer\n" + "What is big?,Large.\n" * 8)
    paths = [str(tmp_path / name) for name in ("train.json", "chat.jsonl", "qa.csv")]
    argv = arguments(data_path=None)
    extra = [
        "--data_path",
        *paths,
        "--data_weights",
        "2",
        "1",
        "1",
        "--columns",
        "instruction=question",
        "output=answer",
    ]
    train([*argv, *extra])
    assert (
        list(yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["made_with"]["data"])
        == paths
    )


# ---- options of the Trainer's own ----------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--activation_checkpointing", "True"],
        ["--torch_compile_backend", "aot_eager"],
        ["--attn_implementation", "eager"],
    ],
    ids=lambda flags: flags[0][2:],
)
def test_options_that_must_not_change_the_steps(arguments, tmp_path, root, flags):
    shallow = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base", num_hidden_layers=1)
    shallow.save_pretrained(tmp_path / "shallow")
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / "shallow")
    settings = {
        "model_name_or_path": tmp_path / "shallow",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
    }
    train(arguments(**settings))
    train(arguments(*flags, **settings, output_dir=tmp_path / "other"))
    for one, two in zip(steps(tmp_path / "out"), steps(tmp_path / "other"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_kept_cost_rows_hardly_change_the_steps(arguments, tmp_path, monkeypatch):
    asked, cache = [], CostEmbedding.cache
    monkeypatch.setattr(
        CostEmbedding, "cache", lambda self, *given: asked.append(given) or cache(self, *given)
    )
    settings = {"max_steps": 2, "mode": "emo2", "eval_path": tmp_path / "held.json"}
    train(arguments(**settings))
    assert not asked  # only a GPU with bf16 would cache rows by default
    for mib in ("8", "0.01"):  # enough for all rows, or for two of them
        train(arguments("--cost_cache_mib", mib, output_dir=tmp_path / mib, **settings))
        for one, two in zip(steps(tmp_path / "out"), steps(tmp_path / mib), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1 / 200)
        exact, kept = (
            evaluations(folder)[0]["eval_emo"] for folder in (tmp_path / "out", tmp_path / mib)
        )
        assert kept == pytest.approx(exact, rel=1 / 200) and kept != exact
    (_, none), (_, counts) = asked
    labels = torch.tensor(
        [
            label
            for labels in training_labels(tmp_path / "train.json")
            for label in labels
            if label != -100
        ]
    )
    assert none is None and torch.equal(counts, labels.bincount(minlength=len(counts)))


def test_rows_are_kept_unasked_where_every_step_reads_them(arguments, tmp_path, monkeypatch):
    def kept(**changes):
        run, cost = parse(arguments(**changes)), CostEmbedding(torch.randn(5, 2))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        run.training.bf16 = True
        cache_costs(cost, run, Dataset.from_dict({}))
        monkeypatch.undo()
        return cost._cached is not None

    assert kept(mode="emo") and kept(mode="mle", cost_cache_mib=1)
    assert not kept(mode="mle") and not kept(mode="emo", teacher="teacher")


def training_labels(file: Path) -> list[list[int]]:
    tokenizer = ModelSource(str(Path(__file__).parents[1] / "data" / "tiny-base")).tokenizer(512)
    return tokenize_records(load_records(str(file)), tokenizer, 512)[0]["labels"]


def test_neftune_disturbs_training_and_not_evaluation(arguments, tmp_path):
    settings = {"max_steps": 1, "learning_rate": 1e-12, "eval_path": tmp_path / "held.json"}
    train(arguments(**settings))
    train(arguments(neftune_noise_alpha=20, output_dir=tmp_path / "noisy", **settings))
    plain, noisy = steps(tmp_path / "out")[0], steps(tmp_path / "noisy")[0]
    assert abs(plain["loss"] - noisy["loss"]) > 0.01
    assert evaluations(tmp_path / "out")[0]["eval_loss"] == pytest.approx(
        evaluations(tmp_path / "noisy")[0]["eval_loss"], abs=1e-5
    )


@pytest.mark.parametrize("metric", ["emo", "target_prob"])
def test_the_best_checkpoint_by_any_metric_is_what_is_saved(arguments, tmp_path, metric):
    settings = {
        **BEST_OF_EACH_STEP,
        "eval_path": tmp_path / "held.json",
        "metric_for_best_model": metric,
        "learning_rate": 0.02,
    }
    train(arguments(**settings, lr_scheduler_type="constant", max_steps=4))
    log = [entry[f"eval_{metric}"] for entry in evaluations(tmp_path / "out")]
    best = (min if metric == "emo" else max)(log)
    assert log.index(best) != len(log) - 1 or log[-1] != log[0]
    assert (
        json.loads((tmp_path / "out" / "eval_results.json").read_text())[f"eval_{metric}"] == best
    )
    assert same_weights(tmp_path / "out", tmp_path / "out" / f"checkpoint-{log.index(best) + 1}")


def test_a_chat_models_folder_stops_at_the_end_of_a_turn(arguments, tmp_path, root):
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base").save_pretrained(
        tmp_path / "chat"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    message = [
        {"role": "user", "content": "Name a bird."},
        {"role": "assistant", "content": "A robin."},
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": message})] * 16))
    train(
        arguments(
            model_name_or_path=tmp_path / "chat",
            data_path=tmp_path / "chat.jsonl",
            max_steps=40,
            mode="mle",
        )
    )
    model, tokenizer = (
        cls.from_pretrained(tmp_path / "out") for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer.apply_chat_template(
        message[:1], add_generation_prompt=True, return_tensors="pt"
    )
    text = tokenizer.decode(
        model.generate(**ids, max_new_tokens=30)[0, ids["input_ids"].shape[1] :]
    )
    assert text == "A robin.<|im_end|>"


def test_the_finished_folder_goes_to_the_hub(arguments, tmp_path, monkeypatch):
    """The hub is replaced, because it cannot be reached.

    The folder that would be uploaded is complete and includes the card.
    """
    import huggingface_hub

    uploads = []
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self, token=None: {"name": "me"})
    url = type("Url", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: url)

    def upload_folder(self, folder_path, **kwargs):
        uploads.append([file.name for file in Path(folder_path).iterdir()])

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    train(arguments("--push_to_hub", "--hub_model_id", "me/mine"))
    (upload,) = uploads
    assert {"README.md", "run.yaml", "model.safetensors", "tokenizer.json"} <= set(upload)
    assert "fine-tuned with the objective `emo`" in (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("me/mine")' in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_that_refuses_is_one_line(arguments, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("403 Forbidden\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"--hub_model_id me/mine: .*403 Forbidden\)$"):
        train(arguments("--push_to_hub", "--hub_model_id", "me/mine"))
    assert not (tmp_path / "out").exists()
    url = type("Url", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: url)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"--push_to_hub: the model is complete in .*403 Forbidden"):
        train(arguments("--push_to_hub", "--hub_model_id", "me/mine"))
    assert (tmp_path / "out" / "README.md").exists() and (
        tmp_path / "out" / "model.safetensors"
    ).exists()


def test_a_teacher_has_as_many_tokens_as_are_asked_for(arguments, tmp_path, root):
    with pytest.raises(UserError, match="top_k is 5000"):
        train(arguments(teacher=root / "data" / "tiny-base", teacher_top_k=5000))
    assert not (tmp_path / "out").exists()
