"""Hidden states of a real model, for ``benchmarks.loss --states``, and how far gradients are off.

``python -m benchmarks.states MODEL --data FILE --out STATES`` runs a model over the records of a
data file, formatted as training formats them. It writes the hidden states of the supervised tokens,
their targets and the output layer, as safetensors. The file does not belong into the repository.
``python -m benchmarks.states moments STATES`` measures what sampling does to squared gradients.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.contenders import (
    CROSS_ENTROPIES,
    Batch,
    Case,
    Unavailable,
    build,
    make_batch,
    read_states,
)
from stanford_alpaca.checkpoint.space import MIB
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import IGNORE_INDEX, tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole, check_writable, command, exit_on_user_error, word
from stanford_alpaca.losses.backends import sampling
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.head import body_of


@dataclass(frozen=True)
class Options:
    """Writes hidden states: python -m benchmarks.states MODEL --data FILE --out STATES

    Args:
        model: a Hugging Face folder or a hub name.
        data: a data file in any form that training takes.
        out: the safetensors file to write.
        tokens: the number of supervised tokens, 4096 by default.
        max_length: longer examples are cut, as in training; 512 by default.
        small: the output layer in 8 bits with a scale for each row, and hidden states in bfloat16,
            for a file that has to be carried.
    """

    model: str | None = word()
    data: str | None = None
    out: str | None = None
    tokens: int = 4096
    max_length: int = 512
    small: bool = False


def write(options: Options) -> None:
    """Runs the model until there are enough tokens, and writes the file."""
    if options.model is None or options.data is None or options.out is None:
        raise UserError("give MODEL --data FILE --out STATES")
    check_whole("tokens", options.tokens, 1)
    check_whole("max_length", options.max_length, 2)
    check_writable("out", Path(options.out))
    source = ModelSource(options.model)
    tokenizer, model = source.tokenizer(), source.load().eval()
    examples, _ = tokenize_records(load_records(options.data), tokenizer, options.max_length)
    hidden: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.no_grad():
        for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
            if sum(map(len, targets)) >= options.tokens:
                break
            states = body_of(model)(input_ids=torch.tensor([ids])).last_hidden_state[0, :-1]
            wanted = torch.tensor(labels)[1:]
            hidden.append(states[wanted != IGNORE_INDEX])
            targets.append(wanted[wanted != IGNORE_INDEX])
    found = sum(map(len, targets))
    if found < options.tokens:
        raise UserError(
            f"--data {options.data}: {found} supervised tokens, wanted {options.tokens}"
        )
    tensors = {
        "hidden": torch.cat(hidden)[: options.tokens].contiguous(),
        "targets": torch.cat(targets)[: options.tokens].contiguous(),
        "weight": model.get_output_embeddings().weight.detach().clone(),
    }
    shape = tuple(tensors["weight"].shape)
    save_file(smaller(tensors) if options.small else tensors, options.out)
    size = Path(options.out).stat().st_size / MIB
    print(f"{options.out}: {found} tokens, weight {shape}, {size:.1f} MiB")


def smaller(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns hidden states in bfloat16, and the weight as int8 with a float32 scale for each row.

    An entry is off by at most half a scale, which is 1/254 of its row's greatest entry.
    """
    weight = tensors["weight"].float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    quantized = (weight / scale).round().to(torch.int8)
    return tensors | {"hidden": tensors["hidden"].bfloat16(), "weight": quantized, "scale": scale}


def read_shape(file: str) -> tuple[int, int, int]:
    """Returns N, H and V of a states file. Raises UserError for another file."""
    try:
        tensors = read_states(file)
        return *tensors["hidden"].shape, len(tensors["weight"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--states {file}: not what benchmarks.states writes ({error})") from None


# ---- errors --------------------------------------------------------------------------------------


def errors(case: Case, names: Iterable[str]) -> dict[str, dict[str, float | None]]:
    """Returns the relative L2 errors of the gradients of each contender that runs.

    They are those of d hidden, d weight, and the mean of d hidden over the tokens, against float64
    of the same objective. ``columns`` is the share of the columns that were multiplied.
    """
    batch = make_batch(case)
    exact: dict[str, tuple[Tensor, Tensor | None]] = {}
    found = {}
    for name in names:
        crossed = name in CROSS_ENTROPIES or name == "dropped" or "mle" in name
        objective = "chunked-mle" if crossed else "chunked-frozen"
        try:
            with counted() as share:
                d_hidden, d_weight = gradients(batch, name)
        except (KeyError, Unavailable):  # the floor, and what does not run here
            continue
        if objective not in exact:
            exact[objective] = gradients(doubled(batch), objective)
        want_hidden, want_weight = exact[objective]
        found[name] = {
            "columns": share(),
            "d_hidden": relative(d_hidden, want_hidden),
            "d_weight": None if d_weight is None else relative(d_weight, want_weight),
            "mean": relative(d_hidden.double().mean(0), want_hidden.mean(0)),
        }
    return found


def gradients(batch: Batch, name: str) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of hidden states and weight."""
    batch.hidden.grad = batch.weight.grad = None
    build(name, batch)().backward()
    assert batch.hidden.grad is not None
    return batch.hidden.grad, batch.weight.grad


def doubled(batch: Batch) -> Batch:
    hidden = batch.hidden.detach().double().requires_grad_()
    weight = batch.weight.detach().double().requires_grad_(batch.weight.requires_grad)
    return Batch(hidden, weight, batch.targets, batch.embedding.double())


def relative(found: Tensor, want: Any) -> float:
    return ((found.double() - want).norm() / want.norm()).item()


class counted:
    """Counts the columns that are drawn within the block; calling it gives their share."""

    def __enter__(self) -> Callable[[], float | None]:
        self._draw, self._kept, self._all = sampling.Columns.draw, 0, 0

        def draw(columns: sampling.Columns, bound: Tensor) -> Any:
            drawn = self._draw(columns, bound)
            self._kept += len(bound) if drawn is None else len(drawn[0])
            self._all += len(bound)
            return drawn

        sampling.Columns.draw = draw  # type: ignore[method-assign]
        return lambda: self._kept / self._all if self._all else None

    def __exit__(self, *_: object) -> None:
        sampling.Columns.draw = self._draw  # type: ignore[method-assign]


def table(found: dict[str, dict[str, float | None]]) -> str:
    """Returns the errors as a Markdown table."""
    lines = [["contender", "columns", "d hidden", "d weight", "mean of d hidden"], ["---"] * 5]
    for name, row in found.items():
        share = "all" if row["columns"] is None else f"{100 * row['columns']:.1f} %"
        values = (row["d_hidden"], row["d_weight"], row["mean"])
        lines.append([name, share, *("-" if each is None else f"{each:.1e}" for each in values)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- squares -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Compares squares of sampled gradients: python -m benchmarks.states moments STATES

    Adam divides by the root of the mean square. Prints, for the rows of the weight that make up a
    share of the exact gradient's squared norm, the root of E g^2 over |g|, with kept cost rows.

    Args:
        states: a file of ``benchmarks.states``.
        tokens: the number of tokens of a step.
        seeds: samples that are averaged.
    """

    states: str | None = word()
    tokens: int = 512
    seeds: int = 24


def compare_moments(options: Moments) -> None:
    """Prints a line per share."""
    if options.states is None:
        raise UserError("give STATES, a file of benchmarks.states")
    for name in ("tokens", "seeds"):
        check_whole(name, getattr(options, name), 1)
    found, width, vocab = read_shape(options.states)
    if options.tokens > found:
        raise UserError(f"--tokens {options.tokens}: {options.states} has {found}")
    case = Case("", width, vocab, options.tokens, states=options.states)
    batch = make_batch(case)
    exact = squares(batch, "chunked-cached")
    total = torch.zeros_like(exact)
    call = build("chunked-cached-sampled", batch)
    for _ in range(options.seeds):  # each call draws anew
        batch.weight.grad = None
        call().backward()
        assert batch.weight.grad is not None
        total += batch.weight.grad.square().sum(1)
    ratio = (total / options.seeds / exact).sqrt()
    order = exact.argsort(descending=True)
    shares = exact[order].cumsum(0) / exact.sum()
    for share in (0.9, 0.99, 0.999, 0.9999):
        count = int((shares < share).sum()) + 1
        rows = ratio[order[:count]]
        print(
            f"{100 * share:g} % of the squared norm: {count} of {vocab} rows, "
            f"ratio {rows.median():.3f} in the median, {rows.max():.3f} at most"
        )


def squares(batch: Batch, name: str) -> Tensor:  # [V]
    """Returns the squared norm of each row of the weight's gradient."""
    found = gradients(batch, name)[1]
    assert found is not None
    return found.square().sum(1)


run = command(Options, write)
moments = command(Moments, compare_moments)


def main() -> None:
    """Runs the command."""
    if sys.argv[1:2] == ["moments"]:
        exit_on_user_error(lambda: fire.Fire(moments, command=sys.argv[2:]))
    else:
        exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
