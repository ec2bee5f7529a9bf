"""Small random models, costs, and a naive float64 oracle that shares no code with the package."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parents[1]
LONG = (  # what only `bash tests/long.sh` runs: of each kind a cheaper test is always run
    "tests/bench/test_bench.py::test_a_comparison_ends_in_a_page_and_goes_on",
    "tests/benchmarks/test_gpu.py::test_the_script_runs_every_part_at_toy_size",
    "tests/exactness/test_part.py::test_it_equals_one_process[ddp shard 4 4 uneven full packed]",
    "tests/exactness/test_part.py::test_it_equals_one_process[fsdp vocab_parallel 2 4 uneven",
    "tests/exactness/test_part.py::test_it_equals_one_process[zero2 shard 2 4 uneven lora padded]",
    "tests/faults/test_part.py::test_it_holds[five equal runs]",
    "tests/faults/test_part.py::test_it_holds[full and failing disks]",
    "tests/faults/test_part.py::test_it_holds[kill in a save]",
    "tests/faults/test_part.py::test_it_holds[kill the group]",
    "tests/faults/test_part.py::test_it_holds[resume at every step]",
    "tests/losses/backends/test_backends.py::test_random_problems[triton]",
    "tests/losses/backends/test_chunked.py::test_extra_memory_is_one_chunk_whatever_the_number_of_"
    "tokens[emo-None]",
    *(
        "tests/losses/test_own.py::test_a_restated_mode_equals_the_built_in_one_to_the_bit"
        f"[triton-{mode}"
        for mode in ("dft", "emd", "emo-none", "emo2", "mix", "mle", "tailr")
    ),
    "tests/models/test_lora.py::test_trained_embeddings_and_added_tokens_go_through_files[fsdp",
    "tests/models/test_lora.py::test_trained_embeddings_and_added_tokens_go_through_files[zero3",
    "tests/models/test_lora.py::test_two_processes_train_and_write_the_same_adapter[fsdp]",
    "tests/models/test_merge.py::test_the_script",
    "tests/preflight/test_preflight.py::test_ranks_send_what_was_estimated",
    "tests/run/test_legacy_flags.py::test_alpacas_llama_command_as_printed",
    "tests/run/test_legacy_flags.py::test_alpacas_opt_command_as_printed_and_its_offload_variant",
    "tests/run/test_resumed_flags.py::test_every_engine_holds_to_the_flags[fsdp-False]",
    "tests/test_checkpoint.py::test_four_ranks_of_fsdp_go_on_as_two_as_one_and_without_fsdp",
    "tests/test_experiments.py::test_the_oracle_experiment_measures_every_student_and_goes_on",
    "tests/test_launcher.py::test_from_inside_the_package_folder_with_two_processes_and_an_inexact",
    "tests/test_launcher.py::test_the_real_form_with_the_published_recipe",
    "tests/test_options.py::test_a_teacher_pulls_the_student_towards_itself",
    "tests/test_options.py::test_options_that_must_not_change_the_steps[torch_compile_backend]",
    "tests/test_options.py::test_the_best_checkpoint_by_any_metric_is_what_is_saved[emo]",
    "tests/test_packaging.py::test_an_editable_install_reads_the_checkout",
    "tests/test_prompts.py::test_lora_merged_and_exported_folders_stop_and_ask_as_was_trained",
    "tests/test_train.py::test_two_processes_equal_one_step_by_step[fsdp]",
    "tests/training/test_cost_sharding.py::test_a_resumed_vocab_parallel_run_has_the_costs_of_the",
    "tests/training/test_cost_sharding.py::test_other_objectives_with_a_sharded_output_layer",
    "tests/training/test_guard.py::test_sharded_engines_stop_and_skip_alike[fsdp]",
    "tests/training/test_guard.py::test_sharded_engines_stop_and_skip_alike[zero3]",
    "tests/training/test_packed.py::test_a_step_over_all_rows_is_one_over_all_examples",
    "tests/training/test_sampled.py::test_it_learns_as_the_exact_gradient_does",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests of LONG, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves LONG out, except where a test is asked for by name or --long is given.

    The README's commands come first: they take longest, and other workers continue beside them.
    """
    named = any("::" in argument for argument in config.args)
    if not (config.getoption("long") or named):
        long = [item for item in items if item.nodeid.startswith(LONG)]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.nodeid.startswith(LONG)]
    items.sort(key=lambda item: "test_the_commands_run" not in item.name)


def pytest_collection_finish() -> None:
    """Exempts everything imported so far from garbage collection.

    The Trainer collects garbage after training. Without this, that took longer than the training.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The root folder of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # transformers' arguments leave this set. The next Trainer in this process would then use FSDP.
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def exact_statistics(logits: torch.Tensor, targets: torch.Tensor, embedding: torch.Tensor):
    """Computes nll and emo in float64 by their definitions.

    It is independent of the package: softmax by exponentials, 1 - p_y as a sum over the other
    tokens, and costs from differences of unit rows, c_i = |u_i - u_y|^2 / 2, so nothing cancels.
    Returns nll [N], emo [N], probabilities [N, V] and costs [N, V].
    """
    z, e = logits.double(), embedding.double()
    norms = e.norm(dim=1, keepdim=True)
    units = torch.where(norms > 0, e / norms.clamp_min(1e-300), 0.0)
    rows = torch.arange(len(targets))
    p = torch.softmax(z, dim=1)
    others = p.clone()
    others[rows, targets] = 0
    nll = torch.where(
        p[rows, targets] > 0.5, -torch.log1p(-others.sum(1)), -torch.log(p[rows, targets])
    )
    costs = torch.stack([(units - units[t]).pow(2).sum(1) / 2 for t in targets])
    zero = norms.squeeze(1) == 0  # a row of zeros has cosine 0 with every row
    for row, t in enumerate(targets.tolist()):
        costs[row, zero] = 1.0
        if zero[t]:
            costs[row] = 1.0
        costs[row, t] = 0.0
    costs = torch.where(costs < 1e-6, 0.0, costs)
    return nll, (p * costs).sum(1), p, costs


@pytest.fixture
def exact():
    """The oracle ``exact_statistics``."""
    return exact_statistics


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Gives logits of a few units, so that a scale or a cap changes the loss.
SHARP = {"initializer_range": 0.3}
FAMILIES = {  # name: (architecture, fields of its configuration)
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "mistral": ("mistral", LLAMA),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        LLAMA
        | SHARP
        | {"head_dim": 8, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    ),
    "gemma3": ("gemma3_text", LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", LLAMA),
    "opt": ("opt", OPT),
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", LLAMA),
    "falcon": ("falcon", FALCON),
    "olmo2": ("olmo2", LLAMA),
    "cohere": ("cohere", LLAMA | SHARP | {"logit_scale": 0.0625, "tie_word_embeddings": True}),
    "granite": ("granite", LLAMA | SHARP | {"logits_scaling": 3.0}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4}),
    "mixtral-routed": (
        "mixtral",
        LLAMA | {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}


def tiny_model(family: str, vocab_size: int = 97, positions: int = 128, **changes):
    """Returns a randomly initialized model of two layers in eval mode.

    ``changes`` are fields of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    architecture, fields = FAMILIES[family]
    fields = {"vocab_size": vocab_size, "max_position_embeddings": positions} | fields
    config = AutoConfig.for_model(
        architecture, **fields | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def make_model():
    """The builder ``tiny_model``."""
    return tiny_model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family that ``tiny_model`` builds."""
    return request.param


@pytest.fixture
def arguments(root, tmp_path):
    """Writes 40 shipped examples for training and 11 as held-out data.

    Returns a function that makes the argv of a short run of the tiny base model, with changes.
    """
    records = json.loads((root / "data" / "instructions" / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records[:40]))
    (tmp_path / "held.json").write_text(json.dumps(records[40:51]))
    defaults = {
        "model_name_or_path": root / "data" / "tiny-base",
        "data_path": tmp_path / "train.json",
        "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "mode": "emo",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "global_batch": 16,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }

    def argv(*flags, **changes):
        chosen = {name: value for name, value in (defaults | changes).items() if value is not None}
        return [
            text for name, value in chosen.items() for text in (f"--{name}", str(value))
        ] + list(flags)

    return argv
