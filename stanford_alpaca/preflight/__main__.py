"""Estimates what a run needs: ``python -m stanford_alpaca.preflight --model_name_or_path M``.

For every engine and cost sharding it prints memory per rank, communication, time and the largest
batch, and it says which to take. It needs no weights and no GPU. The formulas are in
``estimate.py``; ``model_profile.py`` counts parameters and activations.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import get_args

from stanford_alpaca.console import show
from stanford_alpaca.distributed.engine import ENGINES
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import (
    check_choice,
    check_number,
    check_whole,
    command,
    exit_on_user_error,
    from_command_line,
)
from stanford_alpaca.losses.objectives import MODES, Objective
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preflight.estimate import Setup, precision_of, shardings_of
from stanford_alpaca.preflight.model_profile import Parameters, profile_model
from stanford_alpaca.preflight.plans import Machine, Plan, Row, advise, rows_of
from stanford_alpaca.training.cost_sharding import PLACES
from stanford_alpaca.training.hardware import PEAK_FLOPS

RECIPE = 128  # rows per step, as in train_emo.sh
CHOICES = {"mode": MODES, "engine": ENGINES, "cost_sharding": PLACES, "gpu": PEAK_FLOPS}
SHARES = ("supervised_share", "mfu")


# ---- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Estimates what a run needs: python -m stanford_alpaca.preflight --model_name_or_path M ...

    Args:
        model_name_or_path: a folder, of which config.json is enough, or a hub name.
        nproc: ranks of a node, 1 by default.
        nodes: nodes, 1 by default.
        mode: the objective, as in training; mle by default.
        engine: restricts the table to none, ddp, fsdp, zero1, zero2, zero3 or zero3_offload.
        cost_sharding: restricts the table to replicate, shard or vocab_parallel.
        per_device_train_batch_size: rows of a micro-batch on one rank, 4 by default.
        global_batch: rows per step. By default 128 or near, as in train_emo.sh.
        model_max_length: tokens of the longest row, for which memory has to last; 512 by default.
        activation_checkpointing: keeps each layer's input and computes the rest again.
        packing: every row is filled with examples.
        bf16: computes in bfloat16, as by default. --bf16 False computes in float32.
        cost_cache_mib: MiB of cost rows kept between steps, if replicated; 2048 by default.
        num_train_epochs: epochs, 3 by default.
        examples: examples of an epoch. Without them there is no time for the run.
        mean_tokens: tokens of an example. By default every row is full.
        supervised_share: supervised tokens as a share of all, 1 by default.
        data_path: counts the three above in training data. It needs the model's tokenizer.
        gpu: whose peak counts, A100 by default: one of
            B200, H200, H100 PCIe, H100, L40S, L40, L4, A100, A10G, A10, RTX 6000 Ada, RTX 4090, RTX
            3090.
        gpu_gib: memory of a GPU in GiB, 80 by default.
        mfu: share of the peak that is assumed to be reached, 0.4 by default.
        intra_gb_s: GB/s of a rank assumed within a node (NVLink), 200 by default.
        inter_gb_s: GB/s of a rank assumed between nodes (InfiniBand), 25 by default.
        host_gb_s: GB/s of a rank assumed to the host's memory (PCIe), 25 by default.
        cache_dir: where the hub's models are kept.
        trust_remote_code: runs the code that the model's repository brings along.
        json: prints the same as JSON, in bytes and seconds.
    """

    model_name_or_path: str = ""
    nproc: int = 1
    nodes: int = 1
    mode: str = "mle"
    engine: str | None = None
    cost_sharding: str | None = None
    per_device_train_batch_size: int = 4
    global_batch: int | None = None
    model_max_length: int = 512
    activation_checkpointing: bool = False
    packing: bool = False
    bf16: bool = True
    cost_cache_mib: float = 2048
    num_train_epochs: float = 3.0
    examples: int | None = None
    mean_tokens: float | None = None
    supervised_share: float = 1.0
    data_path: str | None = None
    gpu: str = "A100"
    gpu_gib: float = 80.0
    mfu: float = 0.4
    intra_gb_s: float = 200.0
    inter_gb_s: float = 25.0
    host_gb_s: float = 25.0
    cache_dir: str | None = None
    trust_remote_code: bool = False
    json: bool = False

    @property
    def ranks(self) -> int:
        return self.nproc * self.nodes

    def source(self) -> ModelSource:
        """Returns the source that the model is read from."""
        return ModelSource(self.model_name_or_path, self.cache_dir, self.trust_remote_code)

    def check(self) -> None:
        """Raises UserError for the first flag with an impossible value."""
        if not self.model_name_or_path:
            raise UserError("give --model_name_or_path: a folder or a hub name")
        for name, values in CHOICES.items():
            check_choice(name, getattr(self, name), values)
        for each in fields(self):
            value, kinds = getattr(self, each.name), {each.type, *get_args(each.type)}
            if value is None or not kinds & {int, float}:
                continue
            if int in kinds:
                check_whole(each.name, value, 1)
            else:
                low = 0 if each.name == "cost_cache_mib" else 1e-6
                check_number(each.name, value, low, 1 if each.name in SHARES else math.inf)
        if self.data_path is not None and (
            self.examples is not None or self.mean_tokens is not None
        ):
            raise UserError(
                "--data_path counts what --examples and --mean_tokens say: give one or the other"
            )
        if self.mean_tokens is not None and self.mean_tokens > self.model_max_length:
            raise UserError(
                f"--mean_tokens {self.mean_tokens:g} is more than "
                f"--model_max_length {self.model_max_length}"
            )

    def setup(self) -> Setup:
        """Returns the step as it is launched. Raises UserError for an impossible global batch."""
        at_once = self.per_device_train_batch_size * self.ranks
        rows = self.global_batch or max(at_once, RECIPE // at_once * at_once)
        if rows % at_once:
            raise UserError(
                f"--global_batch {rows} is no multiple of {at_once} "
                f"({self.ranks} ranks of {self.per_device_train_batch_size})"
            )
        return Setup(
            ranks=self.ranks,
            batch=self.per_device_train_batch_size,
            accumulation=rows // at_once,
            length=self.model_max_length,
            priced=Objective(self.mode).needs_emo,
            checkpointing=self.activation_checkpointing,
            bf16=self.bf16,
            supervised_share=self.supervised_share,
            cost_cache_mib=self.cost_cache_mib if self.bf16 else 0,
        )

    def engines(self, counts: Parameters) -> list[str]:
        """Returns the engines that the ranks can use, or the one asked for.

        Raises UserError for flags that do not go together.
        """
        possible = (
            ["none", "zero3_offload"]
            if self.ranks == 1
            else [name for name in ENGINES if name != "none"]
        )
        if self.engine is not None and self.engine not in possible:
            raise UserError(
                f"--engine {self.engine} with {self.ranks} rank(s): "
                f"choose from {', '.join(possible)}"
            )
        chosen = possible if self.engine is None else [self.engine]
        setup = self.setup()
        if self.cost_sharding is not None and not any(
            self.cost_sharding in shardings_of(name, setup, counts) for name in chosen
        ):
            raise UserError(
                f"--cost_sharding {self.cost_sharding}: shard needs several ranks, vocab_parallel "
                "also engine fsdp and an output layer of its own with rows for every rank, "
                "replicate and shard a --mode with costs"
            )
        return chosen


def count_data(options: Options) -> Options:
    """Returns the options with the counts of --data_path.

    These are the number of examples, their mean tokens and the share of supervised tokens.
    """
    if options.data_path is None:
        return options
    # they import the library of data sets, which nothing else here needs
    from stanford_alpaca.data.formats import load_records
    from stanford_alpaca.data.records import form_of
    from stanford_alpaca.data.statistics import WHOLE, statistics_of
    from stanford_alpaca.data.tokenize import ExampleEncoder, encode_records

    tokenizer = options.source().tokenizer()
    records = load_records(options.data_path, options.cache_dir)
    encode = ExampleEncoder.of(tokenizer, form_of(records.column_names), WHOLE)
    counted = statistics_of(encode_records(records, encode), options.model_max_length)
    if not counted["kept"]:
        raise UserError(
            f"--data_path {options.data_path}: no example has a target within "
            f"{options.model_max_length} tokens"
        )
    mean = counted["tokens"] / counted["kept"]
    return replace(
        options,
        examples=counted["kept"],
        mean_tokens=mean,
        supervised_share=counted["supervised_share"],
    )


def preflight(options: Options) -> None:
    """Prints the estimate."""
    options.check()
    source = options.source()
    check_model(source, weights=False)
    options, config = count_data(options), source.config()
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and options.model_max_length > positions:
        raise UserError(
            f"--model_max_length {options.model_max_length} is more than "
            f"the model's {positions} positions"
        )
    setup = options.setup()
    precisions = {precision_of(engine, options.bf16) for engine in ENGINES}
    profiles = {
        precision: profile_model(config, options.model_max_length, precision, source.remote_code)
        for precision in sorted(precisions)
    }
    counts = next(iter(profiles.values())).parameters
    engines = options.engines(counts)
    link = options.intra_gb_s if options.nodes == 1 else options.inter_gb_s
    machine = Machine(options.gpu, options.gpu_gib, options.mfu, link, options.host_gb_s)
    mean = float(options.model_max_length)
    if options.mean_tokens is not None and not options.packing:
        mean = options.mean_tokens

    def table(tried: Setup) -> list[Row]:
        return rows_of(profiles, tried, machine, mean, engines, options.cost_sharding)

    plan = Plan(
        model=options.model_name_or_path,
        nodes=options.nodes,
        parameters=counts,
        setup=setup,
        machine=machine,
        mean_tokens=mean,
        steps=steps_of(options, setup),
        rows=table(setup),
        advice=advise(table, setup),
    )
    show(plan.as_json() if options.json else "\n".join(plan.lines()))


def steps_of(options: Options, setup: Setup) -> int | None:
    """Returns the optimizer steps of the run, or None if the number of examples is unknown."""
    if options.examples is None:
        return None
    rows = options.examples
    if options.packing and options.mean_tokens is not None:
        rows = math.ceil(rows * options.mean_tokens / options.model_max_length)
    return math.ceil(
        math.ceil(rows / (setup.batch * setup.accumulation * setup.ranks))
        * options.num_train_epochs
    )


run = command(Options, preflight)


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
