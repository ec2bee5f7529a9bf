"""The command ``python -m stanford_alpaca.cost``: what it reads and writes, and what it refuses.

Training accepts its file.
"""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stanford_alpaca import __version__
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost import build as build_module
from stanford_alpaca.cost.__main__ import build, main
from stanford_alpaca.cost.build import documents, from_text
from stanford_alpaca.cost.cooccurrence import TextSettings
from stanford_alpaca.errors import UserError
from stanford_alpaca.train import train


@pytest.fixture
def base(root):
    return str(root / "data" / "tiny-base")


@pytest.fixture
def story(tmp_path):
    return tmp_path / "story.txt"


@pytest.fixture(autouse=True)
def files(root, tmp_path, story, monkeypatch):
    """Writes input files into a fresh folder, which becomes the current one.

    The text of answers does not contain every token of the vocabulary. Some files are broken.
    """
    monkeypatch.chdir(tmp_path)
    records = json.loads((root / "data" / "instructions" / "train.json").read_text())[:400]
    story.write_text("\n".join(record["output"] for record in records))
    (tmp_path / "records.json").write_text(json.dumps(records[:40]))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("the cat")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"word " * 99)[:-9])
    (tmp_path / "broken.json").write_text('[{"text": ')
    (tmp_path / "odd.json").write_text('[{"text": "fine"}, {"body": "not"}]')
    (tmp_path / "number.json").write_text('[{"instruction": "a", "output": 3}]')
    (tmp_path / "surrogate.json").write_text('[{"text": "\\ud800"}]')


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("a.txt", "one\n two \r\nthree", ["one", " two ", "three"]),
        ("a.txt", "\n\none\ntwo\n\n", ["one", "two"]),
        ("a.md", "\ufeffone\ntwo\n \n\nthree\n\n", ["one\ntwo", "three"]),
        ("a.txt", "\n\n", []),
        ("a.json", '[{"text": "one\\n\\ntwo", "id": 7}]', ["one\n\ntwo"]),
        (
            "a.jsonl",
            '{"instruction": "i", "output": "o"}\n'
            '{"instruction": "i", "input": "n", "output": "o"}',
            ["i\no", "i\nn\no"],
        ),
    ],
)
def test_documents(tmp_path, name, content, want):
    (tmp_path / name).write_text(content)
    assert list(documents(tmp_path / name)) == want


def rows_of(path):
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["cost_embedding"]
        return file.get_tensor("cost_embedding"), file.metadata()


def test_text_gives_a_file_that_says_what_it_is(base, tmp_path, capsys):
    build(
        "records.json",
        text="story.txt",
        tokenizer=base,
        out="new/cost.safetensors",
        width=16,
        vocab_size=2050,
    )
    rows, metadata = rows_of("new/cost.safetensors")
    assert rows.shape == (2050, 16) and rows.dtype == np.float32
    assert metadata["source"] == "story.txt records.json" and metadata["tokenizer"] == base
    assert "width=16" in metadata["method"] and metadata["stanford_alpaca"] == __version__

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [text for name in ("story.txt", "records.json") for text in documents(tmp_path / name)]
    ids = [
        token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert rows[sorted(set(ids))].any(axis=1).all() and rows.any(axis=1).sum() == len(set(ids))

    out = capsys.readouterr().out
    assert f"{len(ids):,} tokens" in out and "2,050 rows of 16" in out
    assert f"{len(set(ids)):,} with data, {2050 - len(set(ids)):,} of zeros" in out
    words = [token for token in ids if len(tokenizer.decode([token]).strip()) >= 4]
    first = max(sorted(set(words)), key=words.count)
    nearest = out.split("nearest to ")[1]
    assert nearest.startswith(repr(tokenizer.decode([first])))
    costs = CostEmbedding.from_file("new/cost.safetensors").costs(torch.tensor([first]), 2050)[0]
    near = costs.argsort()[1].item()
    assert f": {tokenizer.decode([near])!r} {costs[near]:.2f}," in nearest


def test_chunks_change_nothing_and_special_text_stays_text(base, story, monkeypatch):
    story.write_text(story.read_text() + "\n</s> is text")
    build(text="story.txt", tokenizer=base, out="one.safetensors", width=8)
    monkeypatch.setattr(build_module, "CHUNK", 500)
    build(text="story.txt", tokenizer=base, out="many.safetensors", width=8)
    one, many = rows_of("one.safetensors")[0], rows_of("many.safetensors")[0]
    np.testing.assert_allclose(one @ one.T, many @ many.T, atol=1e-4)
    assert not one[AutoTokenizer.from_pretrained(base).all_special_ids].any()


def test_the_unknown_token_has_no_row(story):
    backend = Tokenizer(
        models.WordLevel(
            {"<unk>": 0, "</s>": 1, "is": 2, "a": 3, "word": 4, "for": 5}, unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    rows, order, _ = from_text([story], tokenizer, 6, TextSettings(width=1, window=1))
    assert not rows[:2].any() and rows[2:].any() and sorted(order) == [2, 3, 4, 5]


def test_rare_tokens_get_zeros(base):
    build(text="story.txt", tokenizer=base, out="all.safetensors", width=8)
    build(text="story.txt", tokenizer=base, out="some.safetensors", width=8, min_count=20)
    every, some = (
        rows_of("all.safetensors")[0].any(axis=1),
        rows_of("some.safetensors")[0].any(axis=1),
    )
    assert 8 < some.sum() < every.sum() and not (some & ~every).any()


def test_training_takes_the_file(base, root, tmp_path):
    build(text="story.txt", tokenizer=base, out="cost.safetensors", width=16)
    flags = (
        f"--model_name_or_path {base} --data_path records.json --output_dir out "
        "--cache_dir cache --mode mix --max_steps 2"
    )
    more = (
        "--cost cost.safetensors --per_device_train_batch_size 4 --logging_steps 1 "
        "--save_strategy no --disable_tqdm True"
    )
    train([*flags.split(), *more.split()])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(0 < entry["emo"] < 1 for entry in log[:2]) and log[0]["emo"] != log[1]["emo"]


def test_a_head_is_copied_with_its_padding(base, make_model, tmp_path, capsys):
    model, tokenizer = make_model("llama", vocab_size=2060), AutoTokenizer.from_pretrained(base)
    model.save_pretrained("padded")
    tokenizer.save_pretrained("padded")
    want = model.lm_head.weight.detach().numpy()
    build(head="padded", out="own.safetensors")
    assert np.array_equal(rows_of("own.safetensors")[0], want)
    build(head="padded", tokenizer=base, out="base.safetensors")
    assert np.array_equal(rows_of("base.safetensors")[0], want[:2048])
    build(head="padded", vocab_size=2064, out="more.safetensors")
    rows, metadata = rows_of("more.safetensors")
    assert np.array_equal(rows[:2060], want) and not rows[2060:].any()
    assert metadata["source"] == "padded" and metadata["method"] == "output embedding"
    assert (
        "2,060 rows of tokens with the same text"
        in capsys.readouterr().out.split("more.safetensors")[1]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"widht": 3}, "unknown argument --widht; did you mean --width"),
        ({}, "give one source"),
        ({"text": "story.txt", "head": "x"}, "give one source"),
        ({"text": "none.txt"}, "--text none.txt: no such file"),
        ({"text": "empty.txt"}, "--text empty.txt: there is no text"),
        ({"text": "short.txt"}, "--width 128: the text has . tokens"),
        ({"text": "latin.txt"}, "latin.txt: byte 3 is not UTF-8"),
        ({"text": "cut.txt.gz"}, "cut.txt.gz: cannot be read"),
        ({"text": "broken.json"}, "broken JSON"),
        ({"text": "odd.json"}, "odd.json:record 2: no field 'instruction'"),
        ({"text": "number.json"}, "number.json:record 1: 'output' is a number"),
        ({"text": "surrogate.json"}, "lone surrogate"),
        ({"text": "story.txt", "width": 2048}, "--width 2048: give less than the 2048 tokens"),
        ({"text": "story.txt", "width": 0}, "--width 0"),
        (
            {"text": "story.txt", "vocab_size": 2000},
            "--vocab_size 2000: the tokenizer has 2048 tokens",
        ),
        ({"text": "story.txt", "vocab_size": "big"}, "--vocab_size big"),
        ({"text": "story.txt", "tokenizer": None}, "--text needs --tokenizer"),
        ({"text": "story.txt", "tokenizer": "./nowhere"}, "nowhere: cannot load"),
        ({"text": "story.txt", "out": None}, "--out None"),
        (
            {"text": "story.txt", "out": "short.txt"},
            "--out short.txt: give the name of a file that does not exist",
        ),
        ({"text": "story.txt", "out": "short.txt/cost"}, "short.txt is a file"),
        ({"head": "./nowhere"}, "nowhere: cannot load a model"),
        ({"head": "x", "window": 3}, "--window, .* belong to --text"),
    ],
    ids=lambda value: " ".join(map(str, value.values()))[:40] if isinstance(value, dict) else None,
)
def test_bad_arguments(base, tmp_path, flags, message):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        build(**{"tokenizer": base, "out": "cost.safetensors"} | flags)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line(base, tmp_path, monkeypatch, capsys):
    command = [
        "cost",
        "build",
        "--tokenizer",
        base,
        "--out",
        "c.safetensors",
        "--width",
        "8",
        "--text",
        "story.txt",
    ]
    for argv, message in (
        ([*command, "none.txt"], "--text none.txt: no such file"),
        ([*command, "--windo", "3"], "unknown argument --windo; did you mean --window?"),
        (
            ["cost", "bild"],
            "give a command: python -m stanford_alpaca.cost build --help, or describe --help",
        ),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "c.safetensors").exists()
    monkeypatch.setattr(sys, "argv", [*command, "records.json"])
    main()
    assert "c.safetensors from story.txt records.json" in capsys.readouterr().out


def test_the_loss_imports_nothing_that_builds(root):
    code = (
        "import sys, stanford_alpaca.cost; "
        "print(sorted(n for n in sys.modules if n.startswith('stanford_alpaca.') and "
    )
    code += "n.split('.')[1] in ('cost', 'data', 'models')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.replace("'", chr(34))) == [
        "stanford_alpaca.cost",
        *(
            f"stanford_alpaca.cost.{name}"
            for name in ("alias", "cache", "embedding", "sharded", "types")
        ),
    ]
