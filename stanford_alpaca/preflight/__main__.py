"""Estimates what a run needs: ``python -m stanford_alpaca.preflight --model_name_or_path M``.

For every engine and cost sharding it prints memory per rank, communication, time and the largest
batch, and it says which to take. It needs no weights and no GPU. The formulas are in
``estimate.py``; ``model_profile.py`` counts parameters and activations.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from typing import NoReturn

from transformers import HfArgumentParser

from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.records import form_of
from stanford_alpaca.data.statistics import WHOLE, statistics_of
from stanford_alpaca.data.tokenize import ExampleEncoder, encode_records
from stanford_alpaca.distributed.engine import ENGINES
from stanford_alpaca.errors import UserError, nearest
from stanford_alpaca.flags import choice, exit_on_user_error
from stanford_alpaca.losses.objectives import MODES, Objective
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preflight.estimate import Setup, precision_of, shardings_of
from stanford_alpaca.preflight.model_profile import Parameters, describe
from stanford_alpaca.preflight.plans import Machine, Plan, Row, advise, rows_of
from stanford_alpaca.training.cost_sharding import PLACES
from stanford_alpaca.training.hardware import PEAK_FLOPS

RECIPE = 128  # rows per step, as in train_emo.sh


# ---- the command ---------------------------------------------------------------------------------


@dataclass
class Options:
    model_name_or_path: str = field(
        metadata={"help": "A folder, of which config.json is enough, or a hub name."}
    )
    nproc: int = field(default=1, metadata={"help": "Ranks of a node."})
    nodes: int = field(default=1, metadata={"help": "Nodes."})
    mode: str = choice(*MODES, default="mle", help="The objective.")
    engine: str | None = field(
        default=None, metadata={"choices": list(ENGINES), "help": "Restricts the table to it."}
    )
    cost_sharding: str | None = field(
        default=None, metadata={"choices": list(PLACES), "help": "Restricts the table to it."}
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Rows of a micro-batch on one rank."}
    )
    global_batch: int | None = field(
        default=None, metadata={"help": "Rows per step; 128 or near, as in train_emo.sh."}
    )
    model_max_length: int = field(
        default=512, metadata={"help": "Tokens of the longest row, for which memory has to last."}
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "Keeps each layer's input and computes it again."}
    )
    packing: bool = field(default=False, metadata={"help": "Every row is filled with examples."})
    bf16: bool = field(default=True, metadata={"help": "Computes in bfloat16."})
    cost_cache_mib: float = field(
        default=2048, metadata={"help": "MiB of cost rows kept between steps, if replicated."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs."})
    examples: int | None = field(
        default=None, metadata={"help": "Examples of an epoch; without them no time for the run."}
    )
    mean_tokens: float | None = field(
        default=None, metadata={"help": "Of an example; default: every row is full."}
    )
    supervised_share: float = field(default=1.0, metadata={"help": "Of the tokens."})
    data_path: str | None = field(
        default=None, metadata={"help": "Counts the three above: needs the model's tokenizer."}
    )
    gpu: str = choice(*PEAK_FLOPS, default="A100", help="Whose peak counts.")
    gpu_gib: float = field(default=80.0, metadata={"help": "Memory of a GPU in GiB."})
    mfu: float = field(
        default=0.4, metadata={"help": "Share of the peak that is assumed to be reached."}
    )
    intra_gb_s: float = field(
        default=200.0, metadata={"help": "GB/s of a rank assumed within a node (NVLink)."}
    )
    inter_gb_s: float = field(
        default=25.0, metadata={"help": "GB/s of a rank assumed between nodes (InfiniBand)."}
    )
    host_gb_s: float = field(
        default=25.0, metadata={"help": "GB/s of a rank assumed to the host's memory (PCIe)."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the hub's models are kept."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Runs the code that the model's repository brings along."}
    )
    json: bool = field(
        default=False, metadata={"help": "Prints the same as JSON, in bytes and seconds."}
    )

    @property
    def ranks(self) -> int:
        return self.nproc * self.nodes

    def source(self) -> ModelSource:
        """Returns the source that the model is read from."""
        return ModelSource(self.model_name_or_path, self.cache_dir, self.trust_remote_code)

    def check(self) -> None:
        """Raises UserError for the first flag with an impossible value."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 0 if name == "cost_cache_mib" else None
            if not (value > 0 or value == least) or not math.isfinite(value):
                raise UserError(
                    f"--{name} {value}: give a number {'from 0 on' if least == 0 else 'above 0'}"
                )
        if self.supervised_share > 1 or self.mfu > 1:
            raise UserError("--supervised_share and --mfu are shares: give at most 1")
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


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # type: ignore[override]
        raise UserError(message)


def parse(argv: list[str]) -> Options:
    """Returns the flags. Raises UserError for an unknown flag or an impossible value."""
    parser = _Parser(
        Options, allow_abbrev=False, prog="python -m stanford_alpaca.preflight", description=__doc__
    )
    options, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {name}{nearest(name, known)}")
    options.check()
    return options


def count_data(options: Options) -> Options:
    """Returns the options with the counts of --data_path.

    These are the number of examples, their mean tokens and the share of supervised tokens.
    """
    if options.data_path is None:
        return options
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


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    exit_on_user_error(lambda: preflight(parse(sys.argv[1:] if argv is None else argv)))


def preflight(options: Options) -> None:
    """Prints the estimate."""
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
    anatomies = {
        precision: describe(config, options.model_max_length, precision, source.remote_code)
        for precision in sorted(precisions)
    }
    counts = next(iter(anatomies.values())).parameters
    engines = options.engines(counts)
    link = options.intra_gb_s if options.nodes == 1 else options.inter_gb_s
    machine = Machine(options.gpu, options.gpu_gib, options.mfu, link, options.host_gb_s)
    mean = float(options.model_max_length)
    if options.mean_tokens is not None and not options.packing:
        mean = options.mean_tokens

    def table(tried: Setup) -> list[Row]:
        return rows_of(anatomies, tried, machine, mean, engines, options.cost_sharding)

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
    print(plan.as_json() if options.json else "\n".join(plan.lines()))


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


if __name__ == "__main__":
    main()
