"""What a run says before its first step."""

from types import SimpleNamespace

import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.run import summary
from stanford_alpaca.run.parse import parse
from stanford_alpaca.train import train


def test_the_summary_says_what_is_about_to_happen(arguments, capsys, tmp_path):
    train(arguments(mode="emo", max_steps=1, save_strategy="no", global_batch=8, lora=True))
    lines = capsys.readouterr().out.splitlines()
    said = {name: rest.strip() for name, _, rest in (line.partition("  ") for line in lines)}
    assert said["objective"] == "emo, frozen cosine costs in the frozen output layer, no copy"
    trained, _, total = said["model"].partition(" of ")
    assert int(trained.split()[-1].replace(",", "")) < int(total.split()[0].replace(",", ""))
    assert (
        said["batch"].startswith("8 examples a step: ") and said["prompts"] == "Alpaca's template"
    )
    assert said["engine"] == "none, float32 on cpu" and said["output"] == str(tmp_path / "out")


def test_few_steps_are_said(arguments, capsys):
    for batch, few in ((24, True), (2, False)):  # 40 examples
        changes = {"global_batch": batch, "per_device_train_batch_size": 2, "max_steps": -1}
        run = parse(arguments(num_train_epochs=1, **changes))
        trainer = SimpleNamespace(args=run.training, eval_dataset=None)
        assert ("which are few" in summary._data(run, trainer, "examples", 40)) == few


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("--base_model", "--model_name_or_path"), ("--sequence-len", "--model_max_length")],
)
def test_what_others_call_it_is_understood(arguments, theirs, ours):
    with pytest.raises(UserError, match=f"unknown argument {theirs}; did you mean {ours}"):
        parse([*arguments(), theirs, "x"])
    with pytest.raises(UserError, match=f"unknown argument {theirs}; did you mean {ours}"):
        parse([theirs, "x"])  # and that is said before what is missing
