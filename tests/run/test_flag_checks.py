"""Tests what is refused before anything is loaded or written."""

import math

import pytest
import torch

from stanford_alpaca.errors import UserError
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.run.flag_checks import check, unused_flags, warnings_of
from stanford_alpaca.run.parse import parse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4294967296}, "--seed 4294967296: give a number of at most 4,294,967,295"),
        ({"data_seed": 2**32}, "--data_seed 4294967296: give a number of at most 4,294,967,295"),
        ({"per_device_train_batch_size": "1e12"}, "per_device_train_batch_size.*invalid int"),
        ({"per_device_train_batch_size": 10**12}, "--per_device_train_batch_size 10+: give a num"),
        ({"global_batch": 4 * 10**18}, "give a number of at most 2,147,483,647"),
        ({"num_train_epochs": "1e308", "max_steps": -1}, r"--num_train_epochs 1e\+308: give a num"),
        ({"learning_rate": "1e308"}, r"--learning_rate 1e\+308: give a number of at most"),
        ({"save_steps": "1e308"}, r"--save_steps 1e\+308: give a number of at most"),
        ({"max_steps": 10**30}, "--max_steps 10+: give a number of at most"),
        ({"model_max_length": 10**12}, "--model_max_length 10+: give a number of at most"),
        ({"shuffle_buffer": 10**18}, "--shuffle_buffer 10+: give a number of at most"),
        ({"ddp_timeout": 10**30}, "--ddp_timeout 10+: give a number of at most"),
        ({"dataloader_num_workers": 10**6}, "--dataloader_num_workers 10+: give a number of at"),
        ({"preprocessing_num_workers": -1}, "--preprocessing_num_workers -1: give 1 or more"),
        ({"logging_steps": "inf"}, "--logging_steps: .*infinity.*; give a finite number"),
        ({"save_steps": "inf"}, "--save_steps inf: give a number"),
        ({"data_path": "~nosuchuser/x"}, "--data_path ~nosuchuser/x: there is no user ~nosuchuser"),
        ({"model_name_or_path": "~nosuchuser/x"}, "there is no user ~nosuchuser"),
        ({"output_dir": "~nosuchuser/x"}, "--output_dir ~nosuchuser/x: there is no user"),
        ({"cost": "~nosuchuser/x"}, "--cost ~nosuchuser/x: there is no user"),
        ({"output_dir": "x" * 256}, "--output_dir x+: File name too long"),
        ({"cost": "é" * 128}, "--cost é+: File name too long"),
        ({"cache_dir": "a/" + "x" * 256 + "/b"}, "--cache_dir a/x+: File name too long"),
        ({"chat_template": "a\0b"}, "--chat_template a\0b: .*null"),
        ({"max_steps": 0}, "--max_steps 0: give 1 or more"),
        ({"max_steps": -1, "num_train_epochs": 0}, "--num_train_epochs 0.0: give a number above 0"),
        ({"num_train_epochs": "nan"}, "--num_train_epochs nan"),
        ({"learning_rate": "inf"}, "--learning_rate inf"),
        ({"weight_decay": "nan"}, "--weight_decay nan: give 0 or more"),
        ({"max_grad_norm": -1}, "--max_grad_norm -1.0"),
        ({"adam_epsilon": "nan"}, "--adam_epsilon nan"),
        ({"adam_beta1": 1}, "--adam_beta1 1.0: give a number from 0 on and below 1"),
        ({"warmup_steps": "nan"}, "--warmup_steps nan"),
        ({"logging_steps": -3}, "--logging_steps -3.0"),
        ({"logging_steps": "nan"}, "--logging_steps nan"),
        ({"save_steps": 0}, "--save_steps 0.0"),
        ({"eval_strategy": "steps", "eval_steps": -1}, "--eval_steps -1.0"),
        ({"neftune_noise_alpha": "nan"}, "--neftune_noise_alpha nan"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1"),
        ({"optim": "lomo"}, "--optim lomo: .*lomo"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "--lr_scheduler_type cosine_with_min_lr.*min_lr",
        ),
        (
            {"lr_scheduler_kwargs": '{"num_cycles": 2}'},
            "--lr_scheduler_type linear, --lr_scheduler_kwargs: .*num_cycles",
        ),
        (
            {"metric_for_best_model": "eval_nl"},
            "--metric_for_best_model eval_nl: .*did you mean nll",
        ),
        ({"save_strategy": "best"}, "--save_strategy best needs --metric_for_best_model"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end .* need an --eval_strategy"),
    ],
    ids=str,
)
def test_flags_that_cannot_be(arguments, tmp_path, changes, message):
    check(parse(arguments(eval_path=tmp_path / "held.json")))
    with pytest.raises(UserError, match=message) as error:
        check(parse(arguments(**{"eval_path": tmp_path / "held.json"} | changes)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_warm_up_that_the_schedule_does_not_have_is_said(arguments, capsys):
    check(parse(arguments(warmup_steps=0.1, lr_scheduler_type="constant")))
    assert (
        "--warmup_steps 0.1 changes nothing with --lr_scheduler_type constant\n"
        in capsys.readouterr().out
    )
    check(parse(arguments(warmup_steps=0.1, lr_scheduler_type="constant_with_warmup")))
    assert "--warmup_steps" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"mode": "mle", "emo_weight": 0.3}, "--emo_weight 0.3 changes nothing with --mode mle"),
        ({"mode": "mle", "cost": "adaptive"}, "--cost adaptive changes nothing with --mode mle"),
        ({"mode": "emo", "mixce_eta": 0.1}, "--mixce_eta 0.1 changes nothing with --mode emo"),
        ({"lora_r": 4}, "--lora_r 4 changes nothing without --lora"),
        ({"teacher_top_k": 3}, "--teacher_top_k 3 changes nothing without --teacher"),
        ({"mode": "mix", "emo_weight": 0.3, "lora": True, "lora_r": 4}, ""),
        ({"mode": "emo", "cost_kind": "identity"}, ""),
    ],
    ids=str,
)
def test_a_flag_that_nothing_reads_is_said(arguments, flags, said):
    assert unused_flags(parse(arguments(**flags))) == ([said] if said else [])


def test_what_an_objective_does_is_said_with_the_figure():
    (line,) = warnings_of(Objective("emo2", emo_weighting="upstream"))
    assert "probability is 0.9999, the weight of its nll gradient is 10,000" in line
    nll = torch.tensor([-math.log(0.9999)], dtype=torch.float64, requires_grad=True)
    Objective("emo2", emo_weighting="upstream")(nll, torch.tensor([-30.0])).sum().backward()
    assert nll.grad.item() == pytest.approx(10_000, rel=1e-3)
    (line,) = warnings_of(Objective("tailr"))
    assert "where its probability is above 0.0001" in line
    weights = Objective("tailr", tailr_floor=0)(torch.tensor([0.0001]).log().neg(), None)
    assert 0.998 < weights.item() / -math.log(0.0001) < 1  # there it is 1/1000 away
    for quiet in (
        Objective("emo2"),
        Objective("emo", emo_weighting="upstream"),
        Objective("tailr", tailr_gamma=0.1),
    ):
        assert warnings_of(quiet) == []
