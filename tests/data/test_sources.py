"""Several sources, weights and streams: which examples come out, how often, and in what order.

The batches are the same for every number of processes.
"""

import json
from collections import Counter

import pytest
from accelerate.data_loader import IterableDatasetShard
from transformers import AutoTokenizer

from stanford_alpaca.data.sources import Loading, identify, load_source, mix, stream_sources
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error


@pytest.fixture
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


@pytest.fixture
def make_source(tmp_path):
    def make(name: str, count: int, files: int = 1) -> str:
        """Returns a folder of JSON lines whose texts are NAME 0, NAME 1, ..."""
        folder = tmp_path / name
        folder.mkdir()
        for part in range(files):
            rows = [json.dumps({"text": f"{name} {i}"}) for i in range(part, count, files)]
            (folder / f"{part}.jsonl").write_text("\n".join(rows))
        return str(folder)

    return make


def texts(examples, tokenizer):
    return [
        tokenizer.decode(example["input_ids"], skip_special_tokens=True) for example in examples
    ]


def test_without_weights_every_example_is_there_once(tokenizer, make_source, tmp_path):
    loading = Loading(64, cache_dir=str(tmp_path / "cache"))
    sources = [
        load_source(make_source(name, count), tokenizer, loading)[0]
        for name, count in (("a", 5), ("b", 3))
    ]
    assert texts(mix(sources, None, 0), tokenizer) == [f"a {i}" for i in range(5)] + [
        f"b {i}" for i in range(3)
    ]


def test_weights_are_shares_and_the_small_source_starts_again(tokenizer, make_source, tmp_path):
    loading = Loading(64, cache_dir=str(tmp_path / "cache"))
    sources = [
        load_source(make_source(name, count), tokenizer, loading)[0]
        for name, count in (("a", 300), ("b", 10))
    ]
    drawn = texts(mix(sources, [3.0, 1.0], 7), tokenizer)
    assert {f"a {i}" for i in range(300)} <= set(drawn)  # until each source is used up
    share = sum(text.startswith("a") for text in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.08)
    counts = Counter(text for text in drawn if text.startswith("b"))
    assert max(counts.values()) - min(counts.values()) <= 1 and min(counts.values()) >= 5
    # Only the proportions of the weights count, and the order can be repeated.
    assert drawn == texts(mix(sources, [30.0, 10.0], 7), tokenizer)


def stream(paths, tokenizer, tmp_path, weights=None, buffer=4):
    return stream_sources(
        paths, weights, tokenizer, Loading(64, cache_dir=str(tmp_path), shuffle_buffer=buffer)
    )


def test_a_stream_holds_every_example_each_round_and_is_read_as_it_goes(
    tokenizer, make_source, tmp_path, monkeypatch
):
    from stanford_alpaca.data import formats

    path, read = make_source("a", 3000, files=4), []
    parse = formats.parse_record
    monkeypatch.setattr(
        formats, "parse_record", lambda *args, **kw: (read.append(1), parse(*args, **kw))[1]
    )
    examples = iter(stream([path], tokenizer, tmp_path, buffer=8))
    rounds = [next(examples) for _ in range(5)]
    assert len(read) < 1500  # at most one batch of each file
    rounds = texts([*rounds, *(next(examples) for _ in range(5995))], tokenizer)
    assert sorted(rounds[:3000]) != rounds[:3000]
    counts = Counter(rounds)
    assert set(counts) == {f"a {i}" for i in range(3000)} and set(counts.values()) <= {1, 2, 3}
    # The shuffle buffer mixes the end of a round with the next one.
    assert sum(count != 2 for count in counts.values()) <= 16


def test_ranks_take_their_parts_of_the_same_batches(tokenizer, make_source, tmp_path):
    path = make_source("a", 30, files=3)

    def batches(processes: int, size: int, count: int):
        parts = []
        for rank in range(processes):
            shard = IterableDatasetShard(
                stream([path], tokenizer, tmp_path), size // processes, False, processes, rank
            )
            rows = iter(shard)
            parts.append(
                [
                    texts([next(rows) for _ in range(size // processes)], tokenizer)
                    for _ in range(count)
                ]
            )
        return [sorted(text for part in step for text in part) for step in zip(*parts, strict=True)]

    assert batches(1, 4, 6) == batches(2, 4, 6) == batches(4, 4, 6)


def test_streams_are_drawn_by_weight_and_need_them(tokenizer, make_source, tmp_path):
    paths = [make_source("a", 10), make_source("b", 10)]
    with pytest.raises(UserError, match="needs --data_weights"):
        stream(paths, tokenizer, tmp_path)
    examples = iter(stream(paths, tokenizer, tmp_path, weights=[9.0, 1.0]))
    drawn = texts([next(examples) for _ in range(300)], tokenizer)
    assert sum(text.startswith("a") for text in drawn) / 300 == pytest.approx(0.9, abs=0.06)


def test_a_broken_record_in_a_stream_is_named_when_it_is_reached(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 400 + '{"tex')
    examples = iter(stream([str(tmp_path / "a.jsonl")], tokenizer, tmp_path, buffer=1))
    with pytest.raises(UserError, match=r"a.jsonl:line 401: broken JSON"):
        for _ in range(500):
            next(examples)


def test_what_a_workers_error_says_is_one_line(tokenizer, tmp_path, capsys):
    from torch.utils.data import DataLoader

    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 400 + '{"tex')
    examples = stream([str(tmp_path / "a.jsonl")], tokenizer, tmp_path, buffer=1)
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(
            lambda: list(DataLoader(examples, batch_size=1, num_workers=1, collate_fn=list))
        )
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a.jsonl:line 401: broken JSON")


def test_workers_share_the_files_of_a_stream(tokenizer, make_source, tmp_path):
    from torch.utils.data import DataLoader

    examples = stream([make_source("a", 24, files=4)], tokenizer, tmp_path, buffer=2)
    drawn = iter(DataLoader(examples, batch_size=4, num_workers=2, collate_fn=list))
    counts = Counter(text for _ in range(60) for text in texts(next(drawn), tokenizer))
    assert len(counts) == 24 and max(counts.values()) - min(counts.values()) <= 2


def test_an_identity_follows_the_contents(make_source, tmp_path):
    path = make_source("a", 3)
    before, by_size = identify(path), identify(path, streaming=True)
    (tmp_path / "a" / "0.jsonl").write_text(
        (tmp_path / "a" / "0.jsonl").read_text().replace("a 1", "a 9")
    )
    assert identify(path) != before and identify(path, streaming=True) == by_size
    assert before.startswith("sha256:") and identify("some/hub-set") == "hub:some/hub-set"
