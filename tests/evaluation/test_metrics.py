"""The evaluation command: what it writes and prints for instructions and for running text.

Running text is scored in blocks, or continued from its first words.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation import metrics
from stanford_alpaca.evaluation.comparison import Margins, compare, tell_unknown, with_intervals
from stanford_alpaca.evaluation.intervals import Items, Replicates, mean_of
from stanford_alpaca.evaluation.measures.energy import Clouds
from stanford_alpaca.evaluation.measures.forced import teacher_forced
from stanford_alpaca.evaluation.measures.mauve import load_featuriser, mauve, mauve_of_halves
from stanford_alpaca.evaluation.measures.texts import exact_match, first_words, self_bleu
from stanford_alpaca.evaluation.metrics import match, run
from stanford_alpaca.evaluation.settings import Settings, continuations, read_records
from stanford_alpaca.evaluation.tables import format_differences, format_results
from stanford_alpaca.generation.responses import generate_batch, load_for_generation
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.models.load import ModelSource
from tests.helpers import refusal


@pytest.fixture
def base(root):
    return str(root / "data" / "tiny-base")


@pytest.fixture
def data(root, tmp_path):
    """Writes twelve held-out records and a file of running text, and returns the first file."""
    records = json.loads((root / "data" / "instructions" / "held_out.json").read_text())[:12]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "text.txt").write_text(
        "The king of the north is old.\nHis river runs to the sea.\n" * 9
    )
    return tmp_path / "data.json"


@pytest.fixture
def other(base, tmp_path):
    """Saves the base model with other weights in its last layer, and returns its folder."""
    model, tokenizer = load_for_generation(ModelSource(base))
    torch.nn.init.normal_(model.model.layers[-1].mlp.down_proj.weight, std=0.05)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "train_results.json").write_text(
        '{"train_supervised_tokens_per_s": 1234.5}'
    )
    return str(tmp_path / "other")


def read(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return json.loads((folder / "metrics.json").read_text()), [json.loads(line) for line in lines]


def generated(base: str, records: list[dict]) -> dict[str, list[list[str]]]:
    """Returns the responses of each way of decoding, once for each seed."""
    model, tokenizer = load_for_generation(ModelSource(base))
    ways = {
        "greedy": [({}, 0)],
        "sample": [({"temperature": 1.0}, 0), ({"temperature": 1.0}, 1)],
        "beam": [({"num_beams": 2}, 0)],
    }
    return {
        decoding: [
            generate_batch(model, tokenizer, records, Sampling(8, **of), batch_size=12, seed=seed)
            for of, seed in settings
        ]
        for decoding, settings in ways.items()
    }


def test_the_command_writes_what_it_prints_and_overwrites_nothing(
    base, other, tmp_path, data, capsys
):
    flags = {
        "decoding": "greedy,sample,beam",
        "seeds": "0,1",
        "max_new_tokens": 8,
        "num_beams": 2,
        "batch_size": 12,
    }
    run(base, other, data=str(data), out=str(tmp_path / "ev"), samples=2, **flags)
    metrics, samples = read(tmp_path / "ev")
    assert (
        metrics["records"] == 12
        and metrics["settings"]["seeds"] == "0,1"
        and metrics["settings"]["max_new_tokens"] == 8
    )
    results = metrics["results"]
    assert list(results) == [base, other, "(references)"]
    order = [sample["decoding"] for sample in samples[:4]]
    assert order == ["greedy", "sample", "beam", "greedy"] and len(samples) == 36
    records = json.loads(data.read_text())
    references = [record["output"] for record in records]
    for decoding, want in generated(base, records).items():
        chosen = [sample["responses"][base] for sample in samples if sample["decoding"] == decoding]
        assert chosen == (
            [list(pair) for pair in zip(*want, strict=True)] if len(want) > 1 else want[0]
        )
        means = {
            "exact_match": [exact_match(texts, references) for texts in want],
            "self_bleu": [*map(self_bleu, want)],
        }
        for name, values in means.items():
            assert results[base][f"{name} ({decoding})"]["value"] == pytest.approx(np.mean(values))
        assert (results[base][f"self_bleu ({decoding})"]["low"] is None) == (len(want) == 1)
    assert results["(references)"]["self_bleu (beam)"]["value"] == pytest.approx(
        self_bleu(references)
    )
    nll = {name: results[name]["nll"]["value"] for name in (base, other)}
    (pair,) = metrics["differences"]
    assert (pair["model"], pair["minus"]) == (other, base) and "rouge_l (sample)" in pair[
        "measures"
    ]
    assert (
        pair["measures"]["nll"]["mean"] == pytest.approx(nll[other] - nll[base])
        and pair["measures"]["nll"]["p"] <= 0.01
    )
    assert results[base]["nll"]["low"] < nll[base] < results[base]["nll"]["high"]
    assert results[other]["supervised tokens/s"] == {"value": 1234.5, "low": None, "high": None}
    shown = capsys.readouterr().out
    assert (
        f"{nll[base]:.4f} [" in shown
        and f"{nll[other] - nll[base]:+.4f}" in shown
        and shown.count("instruction: ") == 2
    )
    with pytest.raises(UserError, match="does not exist yet"):
        run(base, data=str(data), out=str(tmp_path / "ev"))


def test_running_text_is_scored_in_blocks_and_asks_nothing(base, data, tmp_path, capsys):
    run(base, data=str(tmp_path / "text.txt"), max_length=64, out=str(tmp_path / "out"))
    metrics, samples = read(tmp_path / "out")
    found = {name: row["value"] for name, row in metrics["results"][base].items()}
    model, tokenizer = load_for_generation(ModelSource(base))
    ids = torch.tensor(
        [
            *tokenizer((tmp_path / "text.txt").read_text().rstrip("\n"))["input_ids"],
            tokenizer.eos_token_id,
        ]
    )
    parts = [ids[start : start + 64] for start in range(0, len(ids) - 1, 63)]
    losses = [model(part[None], labels=part[None]).loss.item() * (len(part) - 1) for part in parts]
    assert found["supervised_tokens"] == len(ids) - 1
    assert found["nll"] == pytest.approx(sum(losses) / (len(ids) - 1), rel=1e-5)
    assert "exact_match" not in found and list(metrics["results"]) == [base] and samples == []
    assert "1 document(s) of" in capsys.readouterr().out


def test_running_text_is_cut_after_words_whatever_the_tokenizer(base, tmp_path, capsys):
    texts = [
        " The  king of\nthe north is old.",
        "Three words only",
        "",
        "The river runs to the sea ",
    ]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    settings = Settings(str(tmp_path / "text.jsonl"), prefix_words=3)
    records = read_records([base], settings)
    assert list(records) == [
        {"prompt": " The  king of", "completion": "\nthe north is old.", "more": ""},
        {"prompt": "The river runs", "completion": " to the sea ", "more": ""},
    ]
    # Blank rows are no documents.
    assert "1 of 3 documents have no word after the first 3" in capsys.readouterr().out
    with pytest.raises(UserError, match="no document has a word after so many"):
        continuations(records.rename_column("prompt", "text"), 9)
    run(
        base,
        data=settings.data,
        prefix_words=3,
        max_new_tokens=6,
        continuation_words=2,
        out=str(tmp_path / "out"),
    )
    metrics, samples = read(tmp_path / "out")
    assert (
        metrics["results"]["(references)"]["length"]["value"]
        == 2
        == metrics["results"][base]["length"]["value"]
    )
    assert samples[1]["reference"] == " to the" and len(samples[1]["responses"][base].split()) > 2
    assert "rouge_l" in metrics["results"][base] and "exact_match" not in metrics["results"][base]
    assert (
        Settings("", prefix_words=3, max_new_tokens=64).compared_words == 32
        and Settings("").compared_words is None
    )


def test_word_tokens_become_plain_text(base, tmp_path):
    (tmp_path / "text.txt").write_text(" The king is well @-@ known . \n A <unk> . \n")
    flags = {"data": str(tmp_path / "text.txt"), "max_length": 64}
    (record,) = read_records([base], Settings(**flags, detokenize=True))
    assert record["text"] == "The king is well-known."


# ---- temperature, entropy, cost -----------------------------------------------------------------


def test_models_of_other_tokens_have_no_common_entropy():
    forced, target = (SimpleNamespace(tokens=np.array(tokens)) for tokens in ([5, 4], [4, 5]))
    bench = SimpleNamespace(settings=SimpleNamespace(match_entropy="other"), target=target)
    with pytest.raises(UserError, match="mine cuts the data into other tokens than"):
        match("mine", forced, bench)


def test_a_margin_of_a_measure_that_there_is_not_is_told(capsys):
    found = {"a": {"nll": 1.0, "rouge_l (greedy)": 2.0}}
    tell_unknown(Margins.parse("nll=1,rouge_l=1,rouge_l (greedy)=2,nlll=0.01"), found)
    said = capsys.readouterr().out
    assert said == "--margin nlll: no such measure; there are nll, rouge_l (greedy)\n"


def values(folder, name):
    return {measure: row["value"] for measure, row in read(folder)[0]["results"][name].items()}


def test_a_model_at_the_entropy_of_another_is_measured_on_the_other_half(
    base, other, root, tmp_path, capsys
):
    data = str(root / "data" / "instructions" / "held_out.json")
    flags = {"limit": 24, "max_new_tokens": 4, "decoding": "sample", "batch_size": 24}
    run(base, other, data=data, match_entropy=base, out=str(tmp_path / "at"), **flags)
    metrics, samples = read(tmp_path / "at")
    assert metrics["records"] == 12 == len(samples)
    tau = metrics["temperatures"][other]
    assert metrics["temperatures"][base] == pytest.approx(1, abs=1e-5) and abs(tau - 1) > 0.01
    assert "intervals of temperature, nll," in capsys.readouterr().out
    # each half measured by itself, at that temperature
    records = json.loads((root / "data" / "instructions" / "held_out.json").read_text())[:24]
    for place, name in enumerate(("fit", "rest")):
        (tmp_path / f"{name}.json").write_text(json.dumps(records[place::2]))
        flags["data"] = str(tmp_path / f"{name}.json")
        run(base, out=str(tmp_path / f"{name}-base"), **flags | {"limit": None})
        plain = flags | {"limit": None, "cost": base}
        run(other, out=str(tmp_path / f"{name}-other"), temperature=tau, **plain)
    entropies = [
        values(tmp_path / f"fit-{which}", n)["entropy"]
        for which, n in (("base", base), ("other", other))
    ]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)
    alone, found = values(tmp_path / "rest-other", other), values(tmp_path / "at", other)
    for name in ("nll", "emo", "entropy", "costly_mass", "perplexity", "ece", "token_accuracy"):
        assert found[name] == pytest.approx(alone[name], rel=1e-4), name
    assert samples[0]["responses"][other] == read(tmp_path / "rest-other")[1][0]["responses"][other]
    curve = metrics["curves"][base]
    assert len(curve["temperature"]) == len(curve["nll"]) == 17
    at_one = np.interp(0, np.log(curve["temperature"]), curve["entropy"])
    assert at_one == pytest.approx(values(tmp_path / "at", base)["entropy"], rel=1e-3)


def test_an_entropy_that_no_temperature_gives_is_one_line(base, make_model, data, tmp_path):
    make_model("llama", vocab_size=2048, positions=512).save_pretrained(tmp_path / "flat")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "flat")
    with pytest.raises(UserError, match=r"--match_entropy .*flat: an entropy of 7\.\d+ is outside"):
        run(base, data=str(data), match_entropy=str(tmp_path / "flat"), max_new_tokens=2)


def test_emo_under_another_cost(base, other, data, tmp_path):
    flags = {"data": str(data), "max_new_tokens": 2}
    weight = load_for_generation(ModelSource(base))[0].lm_head.weight.detach()
    save_file({"cost": weight.clone()}, tmp_path / "cost.safetensors")
    emo = {}
    for name, changes in {
        "plain": {},
        "file": {"cost": str(tmp_path / "cost.safetensors")},
        "centred": {"cost_kind": "centred"},
        "shuffled": {"cost_kind": "shuffled", "cost_seed": 2},
        "identity": {"cost_kind": "identity"},
    }.items():
        run(base, out=str(tmp_path / name), **flags | changes)
        emo[name] = values(tmp_path / name, base)["emo"]
    assert emo["file"] == pytest.approx(emo["plain"], rel=1e-6)
    assert len({round(value, 6) for value in emo.values()}) == 4
    model, tokenizer = load_for_generation(ModelSource(base))
    examples, _ = tokenize_records(load_records(str(data)), tokenizer, 512)
    forced = teacher_forced(model, tokenizer, examples, CostEmbedding(weight, "centred"))
    assert emo["centred"] == pytest.approx(forced.emo.sum() / forced.tokens.sum(), rel=1e-5)


def test_energy_distance_equal_words_and_verdicts_in_the_command(
    base, other, root, tmp_path, capsys
):
    data = str(root / "data" / "instructions" / "held_out.json")
    flags = {"limit": 20, "max_new_tokens": 8, "equal_words": True, "margin": "nll=100,1%"}
    run(base, other, data=data, energy=base, out=str(tmp_path / "out"), **flags)
    metrics, samples = read(tmp_path / "out")
    references, ours, theirs = [], [], []
    for sample in samples:
        reference = json.loads(Path(data).read_text())[len(references)]["output"]
        texts = [reference, *(sample["responses"][name] for name in (base, other))]
        words = min(len(text.split()) for text in texts)
        for kept, text in zip((references, ours, theirs), texts, strict=True):
            kept.append(first_words(text, words) if words else "")
    features = load_featuriser(ModelSource(base))
    clouds = Clouds(features(references), np.stack([features(ours)]))
    found = {name: row["value"] for name, row in metrics["results"][base].items()}
    assert found["energy_distance"] == pytest.approx(clouds.measured().value, rel=1e-4)
    assert found["energy_p"] == clouds.p() and "exact_match" not in found
    whole = np.mean([len(sample["responses"][base].split()) for sample in samples])
    assert found["length"] == pytest.approx(whole)
    verdicts = {name: one["verdict"] for name, one in metrics["differences"][0]["measures"].items()}
    assert verdicts["nll"] in ("seen below the margin", "not seen")
    assert "energy distance" in capsys.readouterr().out


# ---- MAUVE ---------------------------------------------------------------------------------------


def test_features_are_the_last_state_of_a_causal_model_and_the_mean_of_an_encoder(base, tmp_path):
    texts = ["The king is old.", "A river", ""]
    model, tokenizer = load_for_generation(ModelSource(base))
    for text, vector in zip(texts[:2], load_featuriser(ModelSource(base))(texts), strict=False):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        np.testing.assert_allclose(
            vector, model.base_model(ids)[0][0, -1].detach().numpy(), atol=1e-5
        )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    encoder = BertModel(BertConfig(vocab_size=2048, max_position_embeddings=32, **sizes)).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "encoder")
    got = load_featuriser(ModelSource(str(tmp_path / "encoder")))(texts)
    want = [
        encoder(torch.tensor([tokenizer(text)["input_ids"]]))[0][0].mean(0).detach().numpy()
        for text in texts[:2]
    ]
    np.testing.assert_allclose(got[:2], want, atol=1e-5)
    assert np.isfinite(got[2]).all() and not np.allclose(got[0], want[1], atol=1e-3)


def test_mauve_is_one_of_equal_clouds_and_nearly_none_of_distant_ones():
    cloud = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    near = mauve(cloud, cloud[::-1].copy())
    assert near > 0.99 and mauve(cloud, cloud + 100) < 0.1


def test_a_larger_scale_leaves_less_and_halves_of_one_cloud_are_the_noise_floor():
    random = np.random.default_rng(0)
    cloud = random.normal(size=(200, 4)).astype(np.float32)
    other = cloud + random.normal(size=4).astype(np.float32)
    assert mauve(cloud, other, scale=1) > mauve(cloud, other) > mauve(cloud, other, scale=20)
    halves = mauve_of_halves(cloud)
    assert len(set(halves.values)) > 1 and 0.5 < halves.values.mean() < 1
    order = np.random.default_rng(3).permutation(200)
    again = mauve(cloud[order[:100]], cloud[order[100:]], 3)
    assert halves.values[3] == again
    assert mauve_of_halves(cloud, 20).values.mean() < halves.values.mean()


def without(find, missing):
    """Finds all modules but one."""
    return lambda name, *more: None if name == missing else find(name, *more)


def test_mauve_in_the_command(base, root, tmp_path, monkeypatch, capsys):
    data = str(root / "data" / "instructions" / "held_out.json")
    seen = []
    monkeypatch.setattr(
        "stanford_alpaca.evaluation.response_measures.mauve",
        lambda p, q, seed, scale: seen.append((p, q, seed)) or seed + scale,
    )
    halves = []
    monkeypatch.setattr(
        "stanford_alpaca.evaluation.response_measures.mauve_of_halves",
        lambda references, scale: halves.append((references, scale)) or mean_of(np.ones(20)),
    )
    flags = {"decoding": "sample", "seeds": "3,4", "max_new_tokens": 4}
    flags |= {"mauve_scale": 0.5}
    run(base, data=data, limit=20, mauve=base, out=str(tmp_path / "out"), **flags)
    metrics, samples = read(tmp_path / "out")
    assert metrics["results"][base]["mauve"]["value"] == 4.0
    assert metrics["results"]["(references)"]["mauve"]["value"] == 1.0
    assert halves[0][1] == 0.5 and np.array_equal(halves[0][0], seen[0][0])
    features = load_featuriser(ModelSource(base))
    for (wanted, given, seed), number in zip(seen, (0, 1), strict=True):
        assert seed == 3 + number
        np.testing.assert_allclose(
            wanted, features([sample["reference"] for sample in samples]), atol=1e-5
        )
        np.testing.assert_allclose(
            given, features([sample["responses"][base][number] for sample in samples]), atol=1e-5
        )
    with pytest.raises(UserError, match="19 texts are too few"):
        run(base, data=data, limit=19, mauve=base)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", without(find, "mauve"))
    with pytest.raises(UserError, match="pip install mauve-text"):
        run(base, data=data, limit=20, mauve=base)
    monkeypatch.setattr(importlib.util, "find_spec", without(find, "sacrebleu"))
    with pytest.raises(UserError, match="needs sacrebleu: pip install sacrebleu"):
        run(base, data=data, limit=20)


# ---- tables and comparisons ----------------------------------------------------------------------


def test_only_what_has_the_same_items_is_compared_and_nan_is_null():
    def model(shift: float, items: int) -> dict:
        return {"a": mean_of(np.arange(items) + shift), "b": Replicates(np.array([np.nan])), "c": 7}

    first, _, third = compare({"x": model(0, 15), "y": model(1, 15), "z": model(1, 14)})
    judged = {name: measures.pop("verdict") for name, measures in first["measures"].items()}
    assert judged == {"a": "seen", "b": ""}
    assert first["measures"]["a"] == pytest.approx({"mean": 1, "low": 1, "high": 1, "p": 2 / 2001})
    assert first["measures"]["b"] == {"mean": None, "low": None, "high": None, "p": None}
    assert (first["minus"], first["model"], third["minus"], third["model"]) == (
        "x",
        "y",
        "y",
        "z",
    ) and "a" not in third["measures"]
    shown = with_intervals(
        {"x": {"c": 7, "e": Items(np.ones((13, 1)), lambda sums: sums[..., 0])}}
    )["x"]
    assert shown["c"] == {"value": 7, "low": None, "high": None} and shown["e"] == {
        "value": 13,
        "low": 13,
        "high": 13,
    }


def test_tables():
    def row(value, low=None, high=None):
        return {"value": value, "low": low, "high": high}

    results = {
        "base": {"nll": row(2.0, 1.5, 2.56789), "n": row(1234)},
        "tuned": {"nll": row(0.5, 0.04567, 0.6), "x_y": row(1000.4)},
    }
    assert format_results(results).splitlines() == [
        "                   base                 tuned",
        "nll  2.0000 [1.5, 2.57]  0.5000 [0.0457, 0.6]",
        "n     1,234                   -",
        "x y       -               1,000",
    ]


def test_of_four_models_the_first_is_compared_with_each():
    found = {"mean": -0.25, "low": -0.5, "high": -0.0123, "p": 0.02}
    measures = {
        "nll": found,
        "length": found,
        "rouge_l (beam)": found,
        "mauve": dict.fromkeys(found),
    }
    names = "abcd"
    pairs = [
        {"model": y, "minus": x, "measures": measures}
        for i, x in enumerate(names)
        for y in names[i + 1 :]
    ]
    lines = format_differences(pairs).splitlines()
    assert [line for line in lines if line.endswith(":")] == [
        "b minus a:",
        "c minus a:",
        "d minus a:",
    ]
    assert [line.split() for line in lines[2:5]] == [
        ["nll", *"-0.2500 -0.5000 to -0.0123 0.0200".split()],
        ["rouge", "l", "(beam)", *"-0.2500 -0.5000 to -0.0123 0.0200".split()],
        [],
    ]
    alone = [{**pairs[0], "measures": {"mauve": dict.fromkeys(found)}}]
    assert format_differences(alone) == (
        "b minus a:\nno intervals: they need at least 10 records that a measure applies to"
    )
    assert len(
        format_differences(pairs[:3]).split(" minus ")
    ) == 4 and "length" in format_differences(pairs[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dat": "x"}, "unknown argument --dat; did you mean --data"),
        ({}, "give one or more checkpoints and --data"),
        ({"data": "none.json"}, "no such file"),
        ({"data": "data.json", "limit": 0}, "--limit 0"),
        ({"data": "data.json", "batch_size": 0}, "--batch_size 0"),
        ({"data": "data.json", "cost": "no/such-model"}, "cannot load a model"),
        (
            {"data": "data.json", "decoding": "greedy,nucleus"},
            "--decoding greedy,nucleus: choose from greedy, sample, beam",
        ),
        ({"data": "data.json", "seeds": "1,2"}, "--seeds 1,2 belongs to sampling"),
        (
            {"data": "data.json", "seeds": "0,x", "decoding": "sample"},
            "--seeds 0,x: give different whole numbers",
        ),
        (
            {"data": "data.json", "seeds": "1,1", "decoding": "sample"},
            "--seeds 1,1: give different whole numbers",
        ),
        ({"data": "data.json", "num_beams": 1}, "--num_beams 1: give a whole number from 2 on"),
        ({"data": "data.json", "prefix_words": 4}, "--prefix_words cuts running text"),
        ({"data": "text.txt", "prefix_words": 0}, "--prefix_words 0"),
        (
            {"data": "text.txt", "decoding": "beam"},
            "running text asks nothing: give --prefix_words N",
        ),
        ({"data": "data.json", "mauve": "data.json"}, "12 texts are too few"),
        ({"data": "data.json", "energy": "data.json"}, "--energy compares distributions, and 12"),
        ({"data": "data.json", "mauve_scale": 2}, "--mauve_scale 2 needs --mauve MODEL"),
        ({"data": "data.json", "temperature": 0}, "--temperature 0: give a number from 0.001 on"),
        (
            {"data": "data.json", "temperature": 2, "match_entropy": "x"},
            "--temperature and --match_entropy exclude each other",
        ),
        ({"data": "data.json", "match_entropy": "./none"}, "cannot load a model"),
        ({"data": "data.json", "margin": "0.1"}, "--margin 0.1: give NAME=NUMBER"),
        ({"data": "data.json", "cost_seed": 1}, "--cost_seed 1 belongs to --cost_kind shuffled"),
        (
            {"data": "data.json", "cost_seed": 10**20, "cost_kind": "shuffled"},
            "give a whole number of at most",
        ),
        ({"data": "data.json", "detokenize": True}, "--detokenize mends running text"),
        ({"data": "data.json", "cost": "x", "cost_kind": "identity"}, "needs no embedding"),
        ({"data": "data.json", "cost_kind": "cosin"}, "choose from cosine, identity"),
        ({"data": "data.json", "cost": "none.safetensors"}, "--cost none.safetensors"),
    ],
)
def test_bad_arguments_end_the_command_before_a_model_is_loaded(
    base, tmp_path, data, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, line = refusal(
        capsys, monkeypatch, lambda: run(base, out="out", **arguments), tmp_path / "out"
    )
    assert status == 2 and message in line


@pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="needs POT")
def test_an_oracle_in_the_command(base, other, tmp_path, data, make_model):
    flags = {"decoding": "greedy,sample", "seeds": "0,1", "max_new_tokens": 4, "limit": 2}
    run(base, other, data=str(data), out=str(tmp_path / "ev"), oracle=other, **flags)
    results = {
        name: {m: v["value"] for m, v in of.items()}
        for name, of in read(tmp_path / "ev")[0]["results"].items()
    }
    assert results[other]["total_variation"] < 1e-6 and results[other]["optimal_transport"] < 1e-6
    assert 0.05 < results[base]["total_variation"] < 1
    assert results[other]["forward_cross_entropy"] == pytest.approx(
        results[other]["reverse_cross_entropy"]
    )
    assert results[other]["forward_cross_entropy"] < results[base]["forward_cross_entropy"]
    assert (
        1
        < results[other]["oracle_perplexity (greedy)"]
        < results[other]["oracle_perplexity (sample)"]
    )

    make_model("llama").save_pretrained(tmp_path / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "foreign")
    with pytest.raises(UserError, match="has another vocabulary than the --oracle"):
        run(base, data=str(data), oracle=str(tmp_path / "foreign"))


def test_metrics_are_not_left_without_their_samples(tmp_path, monkeypatch):
    def evaluate(*args):
        out.mkdir()
        (out / "samples.jsonl").write_text("theirs")  # somebody else's, meanwhile
        return {}, []

    out = tmp_path / "out"
    monkeypatch.setattr(metrics, "read_records", lambda *args: None)
    monkeypatch.setattr(metrics, "evaluate", evaluate)
    with pytest.raises(UserError, match=r"samples\.jsonl: appeared while"):
        metrics.measure(metrics.Options(checkpoints=("a",), data="b", out=str(out)))
    assert [file.name for file in out.iterdir()] == ["samples.jsonl"]
