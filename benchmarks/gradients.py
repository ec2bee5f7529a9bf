"""Compares the gradient norms of the modes on the same batches, without training.

Run ``python -m benchmarks.gradients [CHECKPOINT]``. The costs come from the shipped base model. It
also checks, token by token, that

    grad(emo2) = (2 emo / nll) grad(emo)
"""

from pathlib import Path

import fire
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import IGNORE_INDEX, tokenize_records
from stanford_alpaca.flags import exit_on_user_error
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.losses.functional import emo_loss
from stanford_alpaca.losses.objectives import MODES
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.attach import attach_objective
from stanford_alpaca.objective.head import head_of

DATA = Path(__file__).resolve().parents[1] / "data"


def run(checkpoint: str = str(DATA / "tiny-base"), batches: int = 8) -> None:
    """Prints each mode's mean gradient norm, and emo2's gradient against emo's.

    The mean is over batches of 32 examples.
    """
    model, tokenizer = load_for_generation(ModelSource(checkpoint))
    base, _ = load_for_generation(ModelSource(str(DATA / "tiny-base")))
    cost = CostEmbedding(head_of(base).weight)
    records = (
        load_records(str(DATA / "instructions" / "train.json"))
        .shuffle(seed=0)
        .select(range(32 * batches))
    )
    examples, _ = tokenize_records(records, tokenizer, 512)
    loader = list(
        DataLoader(examples, batch_size=32, collate_fn=PadCollator(tokenizer.pad_token_id))
    )

    norms = {mode: mean_norm(model, loader, mode, cost) for mode in MODES}
    for mode, norm in norms.items():
        print(f"{mode}: gradient norm {norm:.4g}, {norm / norms['mle']:.3f} of mle's")

    logits, targets = map(
        torch.cat, zip(*(supervised(model, batch) for batch in loader), strict=True)
    )
    emd, _ = loss_and_gradient(logits, targets, cost, "emd")
    nll, _ = loss_and_gradient(logits, targets, cost, "mle")
    _, emo_gradient = loss_and_gradient(logits, targets, cost, "emo")
    _, emo2_gradient = loss_and_gradient(logits, targets, cost, "emo2")
    ratio = 2 * emd / nll
    error = (emo2_gradient - ratio[:, None] * emo_gradient).norm(dim=1) / emo2_gradient.norm(dim=1)
    quantiles = ratio.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=ratio.dtype)).tolist()
    print(
        f"grad(emo2) = (2 emo / nll) grad(emo) over {len(ratio)} tokens: greatest relative error "
        f"{error.max():.1e}"
    )
    print(
        f"2 emo / nll by token: mean {ratio.mean():.3f}, quantiles 10 / 50 / 90 % "
        f"{' / '.join(f'{q:.3f}' for q in quantiles)}"
    )
    of_sums, of_norms = 2 * emd.sum() / nll.sum(), norms["emo2"] / norms["emo"]
    print(f"2 sum emo / sum nll: {of_sums:.3f}; norm of emo2's gradient over emo's: {of_norms:.3f}")


def mean_norm(model, loader: list[dict[str, Tensor]], mode: str, cost: CostEmbedding) -> float:
    """Returns the norm of the gradient of all parameters, averaged over the batches."""
    handle, norms = attach_objective(model, mode, cost), []
    for batch in loader:
        model.zero_grad()
        model(**batch).loss.backward()
        norms.append(
            torch.nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None]
            ).item()
        )
    handle.detach()
    return sum(norms) / len(norms)


@torch.no_grad()
def supervised(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the logits and targets of the supervised tokens of a batch.

    Logits are [N, V] in float64; targets are [N].
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    targets = batch["labels"][:, 1:]
    keep = targets != IGNORE_INDEX
    return logits[keep].double(), targets[keep]


def loss_and_gradient(
    logits: Tensor, targets: Tensor, cost: CostEmbedding, mode: str
) -> tuple[Tensor, Tensor]:  # [N], [N, V]
    """Returns the loss of every token and its gradient with respect to the logits."""
    leaf = logits.clone().requires_grad_()
    loss = emo_loss(leaf, targets, cost, mode=mode, reduction="none")
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
