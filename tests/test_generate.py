"""Tests generating samples.

Batching and padding change nothing, and a seed repeats its samples. Bad input ends the command
before anything is written.
"""

import gzip
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import RECORD_LIMIT
from stanford_alpaca.generate import main, run
from stanford_alpaca.generation.prompts import read_prompts
from stanford_alpaca.generation.responses import generate_batch, load_for_generation
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.models.load import ModelSource

RECORDS = [
    {"instruction": "Say what a robin is.", "input": "", "output": "A robin is a bird."},
    {
        "instruction": "Put the sentence into the past.",
        "input": "The cook washes the pot again and again.",
        "output": "",
    },
    {"instruction": "Why?", "input": "", "output": ""},
]


@pytest.fixture(scope="module")
def base(root):
    return load_for_generation(ModelSource(str(root / "data" / "tiny-base")))


@pytest.fixture(scope="module")
def folder(root):
    return str(root / "data" / "tiny-base")


@pytest.fixture
def lively(base, make_model):
    """A random model with sharp enough distributions to write different texts.

    It uses the base's tokenizer.
    """
    model = make_model("llama", vocab_size=2048, positions=512)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model, base[1]


def one_by_one(model, tokenizer, records, tokens):
    """Decodes greedily with nothing but the model's logits."""
    texts = []
    for record in records:
        ids = tokenizer(format_prompt(record))["input_ids"]
        start = len(ids)
        while len(ids) < start + tokens and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        texts.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_greedy_batches_with_left_padding_equal_one_at_a_time(lively, batch_size):
    want = one_by_one(*lively, RECORDS, 12)
    assert len(set(want)) >= 2
    got = generate_batch(*lively, RECORDS, Sampling(max_new_tokens=12), batch_size=batch_size)
    assert got == want


def test_the_output_layer_gets_contiguous_states(lively):
    """PyTorch copies the weight for each row of others, in bfloat16 on a CPU."""
    model, tokenizer = lively
    head, seen = model.get_output_embeddings(), []
    known = model.generate(torch.tensor([[1, 2, 3]] * 2), max_new_tokens=2, do_sample=False)
    forward = head.forward
    head.forward = lambda states: (seen.append(states.is_contiguous()), forward(states))[1]
    try:
        generate_batch(model, tokenizer, RECORDS, Sampling(2), batch_size=3)
    finally:
        del head.forward
    assert seen and all(seen)
    again = model.generate(torch.tensor([[1, 2, 3]] * 2), max_new_tokens=2, do_sample=False)
    assert again.equal(known) and not head._forward_pre_hooks


def test_sampling_repeats_by_seed(base):
    sampled = [
        generate_batch(
            *base, RECORDS, Sampling(12, temperature=1.5, top_k=50, top_p=0.95), seed=seed
        )
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_beams_find_likelier_text_than_greedy(lively):
    model, tokenizer = lively

    def likelihood(num_beams):
        prompt = torch.tensor([tokenizer("Why?")["input_ids"]])
        config = Sampling(6, num_beams=num_beams).config(tokenizer)
        config.eos_token_id = None
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])
        return logs[prompt.shape[1] - 1 :].sum().item()

    assert likelihood(16) > likelihood(1) + 1e-3


def test_the_command_writes_jsonl_side_by_side(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    (tmp_path / "copy").symlink_to(folder)
    out = tmp_path / "samples" / "s.jsonl"
    run(
        folder,
        str(tmp_path / "copy"),
        prompts=str(tmp_path / "p.jsonl"),
        out=str(out),
        max_new_tokens=5,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["instruction"] for row in rows] == [record["instruction"] for record in RECORDS]
    assert rows[0]["reference"] == "A robin is a bird."
    assert rows[0]["sampling"]["max_new_tokens"] == 5 and rows[0]["sampling"]["seed"] == 0
    for row in rows:
        one, two = row["responses"].values()
        assert one == two != ""
    assert "reference:   A robin is a bird." in capsys.readouterr().out


def test_several_samples_per_prompt_repeat_by_seed(folder, tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps(RECORDS))

    def drawn(name, **flags):
        flags = {"num_samples": 3, "max_new_tokens": 8, "temperature": 1.5, "batch_size": 4} | flags
        run(folder, prompts=str(tmp_path / "p.json"), out=str(tmp_path / name), **flags)
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["instruction"] for row in rows] == [record["instruction"] for record in RECORDS]
        assert rows[0]["sampling"]["num_samples"] == 3 or flags["num_samples"] == 1
        return [row["responses"][folder] for row in rows]

    one, again, other = drawn("1"), drawn("2"), drawn("3", seed=1)
    assert one == again != other
    assert all(len(set(texts)) == 3 for texts in one)
    assert f"  {folder} 2 | {one[0][1].splitlines()[0]}" in capsys.readouterr().out
    greedy = drawn("4", num_samples=1, temperature=0)  # each response is a text, not a list
    assert len(set(greedy)) == 2
    # each text belongs to its own prompt
    assert drawn("5", min_p=1) == [[text] * 3 for text in greedy]


def test_the_command_writes_all_forms_and_needs_no_outputs(folder, tmp_path):
    plain = [
        {"instruction": r["instruction"], "input": r["input"] or None, "dataset": "koala"}
        for r in RECORDS
    ]
    (tmp_path / "p.json").write_text(json.dumps(plain))
    files = {name: str(tmp_path / "new" / name) for name in ("out", "alpaca_eval", "markdown")}
    run(
        folder,
        prompts=str(tmp_path / "p.json"),
        max_new_tokens=5,
        repetition_penalty=1.2,
        seed=7,
        **files,
    )
    texts = [
        json.loads(line)["responses"][folder]
        for line in (tmp_path / "new" / "out").read_text().splitlines()
    ]
    assert len(set(texts)) == 2
    assert json.loads((tmp_path / "new" / "alpaca_eval").read_text()) == [
        {
            "instruction": record["instruction"]
            + ("\n\n" + record["input"] if record["input"] else ""),
            "output": text,
            "generator": "tiny-base",
            "dataset": "koala",
        }
        for record, text in zip(RECORDS, texts, strict=True)
    ]
    page = (tmp_path / "new" / "markdown").read_text()
    assert "`repetition_penalty` 1.2" in page and "`seed` 7" in page and "**Reference**" not in page
    assert all(f"**Response of** `{folder}`\n\n```text\n{text}\n```\n" in page for text in texts)


def test_prompts_from_a_text_file_and_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("Say what a robin is.\n\nWhy?\n")
    run(folder, prompts=str(tmp_path / "p.txt"), max_new_tokens=5)
    lines = capsys.readouterr().out
    assert lines.count("instruction: ") == 2
    run(folder, instruction="Why?", max_new_tokens=5)
    answer = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert answer[0] in lines


def test_the_command_line_leaves_texts_as_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["generate", folder, "--instruction", "1e3", "--input", "a, b", "--out", "s.jsonl"],
    )
    main()
    (row,) = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert (row["instruction"], row["input"]) == ("1e3", "a, b")


def test_a_base_without_pad_token_and_with_settings_of_its_own(folder, base, tmp_path):
    model, tokenizer = load_for_generation(ModelSource(folder))
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    bare = load_for_generation(ModelSource(str(tmp_path)))
    assert bare[0].get_input_embeddings().weight.shape[0] == len(bare[1]) == 2049
    sampling = Sampling(max_new_tokens=12)
    assert generate_batch(*bare, RECORDS, sampling) == generate_batch(*base, RECORDS, sampling)


def test_interactive_streams_until_an_empty_line(folder, monkeypatch, capsys):
    typed = iter(["Say what a robin is.", "word " * 2000, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    run(folder, interactive=True, max_new_tokens=5)
    shown = capsys.readouterr().out
    assert shown.strip() and "leaves room for 1019" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"promts": "x"}, "unknown argument --promts; did you mean --prompts"),
        ({}, "give the prompts"),
        ({"prompts": "none.json"}, "none.json: no such file"),
        ({"prompts": "broken.json"}, "broken JSON"),
        ({"prompts": "empty.txt"}, "there is no prompt"),
        ({"prompts": "p.txt", "instruction": "x"}, "give the prompts"),
        ({"instruction": "x", "temperature": -1}, "--temperature -1"),
        ({"instruction": "x", "temperature": "hot"}, "--temperature hot"),
        ({"instruction": "x", "top_p": 0.5}, "--top_p belongs to sampling: give --temperature too"),
        ({"instruction": "x", "top_p": 1.5, "temperature": 1}, "--top_p 1.5"),
        ({"instruction": "x", "num_beams": 2, "temperature": 1}, "give one of them"),
        ({"instruction": "x", "max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"instruction": "x", "batch_size": 0}, "--batch_size 0"),
        (
            {"instruction": "x", "out": "p.txt"},
            "--out p.txt: give the name of a file that does not exist",
        ),
        ({"instruction": "x", "out": "p.txt/s.jsonl"}, "p.txt is a file"),
        ({"instruction": "x", "out": "True"}, "--out True"),
        ({"instruction": "x", "seed": "a"}, "--seed a"),
        ({"instruction": "word " * 2000}, "prompt 1 has 20.. tokens"),
        ({"interactive": True, "out": "o"}, "takes one checkpoint and no"),
        ({"interactive": True, "markdown": "o"}, "takes one checkpoint and no"),
        (
            {"interactive": True, "num_samples": 2, "temperature": 1},
            "takes one checkpoint and no",
        ),
        ({"instruction": "x", "num_samples": 0}, "--num_samples 0: give a whole number from 1 on"),
        (
            {"instruction": "x", "num_samples": 2},
            "--num_samples 2: greedy gives the same one every time; give --temp",
        ),
        (
            {"instruction": "x", "num_samples": 2, "temperature": 1, "alpaca_eval": "o"},
            "and no --num_samples",
        ),
        (
            {"instruction": "x", "alpaca_eval": "p.txt"},
            "--alpaca_eval p.txt: give the name of a file that",
        ),
        ({"instruction": "x", "markdown": "True"}, "--markdown True: give the name of a file that"),
        (
            {"instruction": "x", "out": "o", "markdown": "./o"},
            "--markdown o and --out o are in each other's place",
        ),
        ({"instruction": "x", "min_p": 0.5}, "--min_p belongs to sampling"),
        ({"instruction": "x\udcff"}, "--instruction: 'instruction' has a lone surrogate"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, dict) else None,
)
def test_bad_arguments(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("kept\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "broken.json").write_text('[{"instruction": ')
    if "tokens" not in message:  # counting tokens needs the tokenizer
        monkeypatch.setattr(
            "stanford_alpaca.generation.responses.load_for_generation",
            lambda _: pytest.fail("loaded a model"),
        )
    with pytest.raises(UserError, match=message):
        run(folder, **flags)
    assert (tmp_path / "p.txt").read_text() == "kept\n" and not (tmp_path / "o").exists()
    with pytest.raises(
        UserError, match="--alpaca_eval holds one response per prompt: give one checkpoint"
    ):
        run(folder, "another", instruction="x", alpaca_eval="o")
    with pytest.raises(UserError, match="cannot load a model"):
        run("no/such-model", instruction="x")
    with pytest.raises(UserError, match="give a checkpoint"):
        run(instruction="x")


def test_the_command_line_rejects_an_unknown_flag_before_it_writes(root, folder, tmp_path):
    out = tmp_path / "s.jsonl"
    command = [
        sys.executable,
        "-m",
        "stanford_alpaca.generate",
        folder,
        "--instruction",
        "x",
        "--out",
        str(out),
        "--sed",
        "1",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: unknown argument --sed; did you mean --seed?" in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


def test_a_mixture_that_trains_with_its_routers_loss_generates(root, make_model):
    model = make_model("mixtral-routed", vocab_size=2048, positions=256)
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    records = [{"instruction": "Name a bird."}, {"instruction": "What is another word for big?"}]
    texts = generate_batch(model, tokenizer, records, Sampling(5))
    model.config.output_router_logits = False
    assert texts == generate_batch(model, tokenizer, records, Sampling(5)) and all(texts)


def test_prompts_may_be_gzipped_and_are_bounded(tmp_path, monkeypatch):
    file = tmp_path / "p.txt.gz"
    content = gzip.compress("Add é.\n\n Say hi. \n".encode())
    file.write_bytes(content)
    read = [record["instruction"] for record in read_prompts(str(file), None, None)]
    assert read == ["Add é.", "Say hi."]
    for broken in (content[:-9], content[:-6] + b"abcdef", b"plain"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"p\.txt\.gz: cannot be read"):
            read_prompts(str(file), None, None)
    monkeypatch.setattr(RECORD_LIMIT, "mib", 1)
    for name in ("p.txt.gz", "p.jsonl.gz"):  # each line is small, all of them are not
        line = "a" * 1000 if "txt" in name else json.dumps({"text": "a" * 1000})
        (tmp_path / name).write_bytes(gzip.compress(f"{line}\n".encode() * 1100))
        with pytest.raises(UserError, match="all of it: larger than 1 MiB"):
            read_prompts(str(tmp_path / name), None, None)


def test_a_text_is_continued_and_an_empty_prompt_is_refused(base, folder, tmp_path, capsys):
    from copy import deepcopy

    from stanford_alpaca.data.tokenize import PromptEncoder
    from stanford_alpaca.generation.prompts import encode_prompts

    model, tokenizer = base
    (tmp_path / "p.JSONL").write_text(json.dumps({"text": "A robin is"}))
    run(folder, prompts=str(tmp_path / "p.JSONL"), max_new_tokens=5)
    assert "A robin is" in capsys.readouterr().out
    records = read_prompts(str(tmp_path / "p.JSONL"), None, None)
    assert PromptEncoder(tokenizer)(records) == tokenizer(["A robin is"])["input_ids"]
    bare = deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match="prompt 1 is empty"):
        encode_prompts(model.config, PromptEncoder(bare), [{"prompt": "", "completion": ""}], 5)
