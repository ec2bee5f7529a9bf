"""Checks that the layouts of the packing benchmark hold the same work."""

import re

from benchmarks.packing import made_up, make_layouts, run


def test_every_layout_has_the_same_targets_and_padding_where_it_says_so(capsys):
    data = made_up(9, 100)
    layouts = make_layouts(data, 2, "positions")
    targets = {
        name: sorted(t for b in batches for t in b["labels"].flatten().tolist())
        for name, batches in layouts.items()
    }
    want = sorted(token for row in data["labels"] for token in row if token != -100)
    assert all([token for token in found if token != -100] == want for found in targets.values())
    assert {batch["input_ids"].shape[1] for batch in layouts["padded to 512"]} == {512}
    run(examples=5, batch=2, layers=1, hidden_size=64, vocab_size=100, rounds=1)
    printed = capsys.readouterr().out
    assert re.search(
        r"^padded to 512: \d+ supervised tokens/s, 1.00x; \d\d% of its", printed, re.MULTILINE
    )
    assert "--padding_free: " in printed and "100% of its tokens are no padding" in printed
