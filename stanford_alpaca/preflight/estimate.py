"""Memory, communication and time of a run by engine and cost sharding, in closed form.

Engines shard over all R ranks. PyTorch's engines (none, ddp, fsdp) keep float32 weights.
DeepSpeed's engines keep weights and gradients in the compute dtype, with c bytes a number, and
float32 master weights with the optimizer state. A rank's memory is that of its worst moment:

    loss      all activations are held, and a chunk of logits
    backward  all activations are still held, and the last layer is being processed
    end       no activations, all gradients
    step      the optimizer's own copies
"""

from dataclasses import dataclass
from typing import NamedTuple

from stanford_alpaca.distributed.engine import ENGINES
from stanford_alpaca.losses.backends.chunked import TILE_PRODUCTS
from stanford_alpaca.losses.backends.torch_kernels import CHUNK_LOGITS, SLICE_LOGITS
from stanford_alpaca.preflight.model_profile import ModelProfile, Parameters

NO_COST = "-"  # in place of a cost sharding if the mode reads no costs
# DeepSpeed's defaults: parameters that ZeRO-3 keeps gathered, and that its optimizer steps at once
LIVE = 10**9


@dataclass(frozen=True)
class Setup:
    """What an estimate depends on besides the model, the engine and the cost sharding."""

    ranks: int
    batch: int  # rows of a micro-batch on one rank
    accumulation: int  # micro-batches per step
    length: int  # tokens of the longest row
    priced: bool  # whether the mode reads costs
    checkpointing: bool = False
    bf16: bool = True
    device: str = "cuda"
    supervised_share: float = 1.0
    # different targets per supervised token: the most seen in 8192 tokens of prose
    unique_share: float = 0.31
    cost_cache_mib: float = 2048

    @property
    def itemsize(self) -> int:
        """c: bytes of a number in the compute dtype."""
        return 2 if self.bf16 else 4

    @property
    def targets(self) -> int:
        """Supervised tokens of a micro-batch on one rank."""
        return max(1, round(self.batch * self.length * self.supervised_share))


class Memory(NamedTuple):
    """Bytes on one rank at one moment."""

    weights: float
    gradients: float
    optimizer: float
    cost: float
    activations: float
    loss: float
    gather: float  # gathered weights and costs, and buckets of gradients

    @property
    def total(self) -> float:
        return sum(self)


def precision_of(engine: str, bf16: bool) -> str:
    """Returns an engine's precision, as ``model_profile.profile_model`` takes it."""
    if not bf16:
        return "float32"
    return "autocast" if engine in ("none", "ddp") else "bfloat16"


def shardings_of(engine: str, setup: Setup, counts: Parameters) -> list[str]:
    """Returns the cost shardings that go with an engine, the simplest first."""
    some = ["replicate", *(["shard"] if setup.ranks > 1 else [])] if setup.priced else [NO_COST]
    columns = -(-counts.vocab_size // setup.ranks)  # every rank needs at least one
    parallel = (
        engine == "fsdp" and not counts.tied and columns * (setup.ranks - 1) < counts.vocab_size
    )
    return [*some, *(["vocab_parallel"] if parallel else [])]


# ---- memory --------------------------------------------------------------------------------------


def peak_memory(profile: ModelProfile, setup: Setup, engine: str, sharding: str) -> Memory:
    """Returns memory at the worst moment of a training step, on the rank that needs the most."""
    return max(moments(profile, setup, engine, sharding).values(), key=lambda memory: memory.total)


def moments(profile: ModelProfile, setup: Setup, engine: str, sharding: str) -> dict[str, Memory]:
    """Returns the memory at each of the four moments."""
    counts, saved = profile.parameters, profile.activations
    weights, optimizer = state(counts.total, setup, engine)
    held, final = gradients(counts, setup, engine, sharding)
    at_loss, in_backward, at_end = gathered(counts, setup, engine, sharding)
    cost = cost_bytes(counts, setup, sharding)
    layer = saved.layer.of(setup.batch)
    kept = saved.outside.of(setup.batch) + (
        saved.inputs if setup.checkpointing else saved.layers
    ).of(setup.batch)
    working = 3 * saved.widest.of(setup.batch) + (layer if setup.checkpointing else 0)
    head = counts.vocab_size * counts.width / (setup.ranks if sharding == "vocab_parallel" else 1)
    float32_head = sharding == "vocab_parallel" or precision_of(engine, setup.bf16) == "autocast"
    d_head = head * (4 if float32_head else setup.itemsize)
    copies = step_copies(counts.total, setup, engine)
    spread = 4 * counts.vocab_size * counts.width if sharding == "shard" else 0
    return {
        "loss": Memory(
            weights,
            held,
            optimizer,
            cost,
            kept,
            loss_bytes(counts, setup, engine, sharding),
            at_loss + spread,
        ),
        "backward": Memory(weights, held + d_head, optimizer, cost, kept + working, 0, in_backward),
        "end": Memory(weights, final, optimizer, cost, working, 0, at_end),
        "step": Memory(
            weights, final, optimizer + copies, cost, 0, 0, at_end if engine == "ddp" else 0
        ),
    }


def state(total: int, setup: Setup, engine: str) -> tuple[float, float]:
    """Returns the bytes of the weights and of the optimizer state.

    The optimizer state is AdamW's two moments and, for DeepSpeed, the master weights.
    """
    what = ENGINES[engine]
    if what.offload:
        return 0, 0
    weights = (
        total
        * (setup.itemsize if what.deepspeed else 4)
        / (setup.ranks if "w" in what.sharded else 1)
    )
    return weights, total * (12 if what.deepspeed else 8) / (
        setup.ranks if "o" in what.sharded else 1
    )


def gradients(counts: Parameters, setup: Setup, engine: str, sharding: str) -> tuple[float, float]:
    """Returns the bytes of gradients during a micro-batch and at the end of the last one.

    With several micro-batches per step, the first number is that of a later micro-batch.
    """
    what, ranks, several = ENGINES[engine], setup.ranks, setup.accumulation > 1
    if what.offload:
        return 0, 0
    if engine == "fsdp":
        # gradients are reduced and sharded at the last micro-batch; until then they are whole,
        # except those of the head under vocab_parallel
        apart = counts.head if sharding == "vocab_parallel" else 0
        whole = 4 * (counts.total - apart) + 4 * apart / ranks
        return (whole, whole) if several else (0, 4 * counts.total / ranks)
    size = (
        counts.total
        * (setup.itemsize if what.deepspeed else 4)
        / (ranks if "g" in what.sharded else 1)
    )
    return (size if several or "g" in what.sharded else 0), size


def gathered(
    counts: Parameters, setup: Setup, engine: str, sharding: str
) -> tuple[float, float, float]:
    """Returns the bytes of weights gathered from other ranks and of gradients in buckets.

    The three numbers are for the moments loss, backward and end.
    """
    c, what = setup.itemsize, ENGINES[engine]
    if engine == "ddp":  # its buckets are a second copy of the gradients
        return (4 * counts.total,) * 3
    if engine == "fsdp":
        # a unit's weights and gradients, the float32 input of its reduce-scatter, and the next
        # unit's weights
        embedding, tail = fsdp_units(counts, sharding)
        largest = max(counts.layer, embedding)
        in_layer = (2 * c + 4) * counts.layer + c * counts.layer
        return c * tail, c * tail + in_layer, max(in_layer, (2 * c + 4) * largest)
    if not what.deepspeed:
        return 0, 0, 0
    # two buckets of hidden x hidden numbers, which transformers sets for "auto"
    buckets = 2 * c * min(counts.width**2, counts.total)
    live = c * min(counts.total, LIVE) if "w" in what.sharded else 0
    return (live + buckets,) * 3


def fsdp_units(counts: Parameters, sharding: str) -> tuple[int, int]:
    """Returns the parameters of the embedding's unit and of the tail.

    The tail is the final norm and the output layer. It stays gathered until the backward pass.
    """
    if counts.tied:
        return 0, counts.embedding + counts.norm
    return counts.embedding, counts.norm + (0 if sharding == "vocab_parallel" else counts.head)


def cost_bytes(counts: Parameters, setup: Setup, sharding: str) -> float:
    """Returns the bytes of the frozen cost: float32 rows, and bfloat16 rows kept between steps."""
    if not setup.priced:
        return 0
    rows = 4 * counts.vocab_size * counts.width
    if sharding != "replicate":
        return rows / setup.ranks
    row = 2 * counts.vocab_size
    return rows + min(counts.vocab_size, int(setup.cost_cache_mib * 2**20) // row) * row


def loss_bytes(counts: Parameters, setup: Setup, engine: str, sharding: str) -> float:
    """Returns the bytes of one chunk of the loss.

    They are the logits, the costs of the different targets, slices, and the gradients of the head
    and of the hidden states.
    """
    c, width = setup.itemsize, counts.width
    parallel = sharding == "vocab_parallel"
    tokens = setup.targets * (setup.ranks if parallel else 1)
    vocab = counts.vocab_size / (setup.ranks if parallel else 1)
    most = max(16, CHUNK_LOGITS[setup.device] / vocab)
    logits = min(tokens, most) * vocab
    part = logits if parallel else min(logits, SLICE_LOGITS[setup.device])
    # the product, and of a slice the softmax and, in a lower precision, the float32 logits
    chunk = c * logits + 4 * part * (2 if setup.bf16 else 1)
    if setup.priced:
        chunk += 4 * logits * setup.unique_share + 4 * part
    head = 4 * vocab * width + (c * min(TILE_PRODUCTS, vocab * width) if setup.bf16 else 0)
    float32_head = parallel or precision_of(engine, setup.bf16) == "autocast"
    copy = c * vocab * width if setup.bf16 and float32_head else 0
    hidden = (
        tokens * width * c
        + setup.targets * width * c
        + (4 * tokens * width if parallel else tokens * width * c)
    )
    return chunk + head + copy + hidden


def step_copies(total: int, setup: Setup, engine: str) -> float:
    """Returns the bytes that the optimizer's step adds.

    DeepSpeed copies gradients to float32. PyTorch's AdamW is fused and adds nothing.
    """
    what = ENGINES[engine]
    if not what.deepspeed or what.offload:
        return 0
    part = total / setup.ranks
    return 4 * (min(part, LIVE) if "w" in what.sharded else part)


def host_memory(total: int, setup: Setup, engine: str) -> float:
    """Returns the bytes of host memory that offloading takes, of all ranks together."""
    return total * (setup.itemsize + 12 + 4) if ENGINES[engine].offload else 0


# ---- communication and time ----------------------------------------------------------------------


def traffic(counts: Parameters, setup: Setup, engine: str, sharding: str) -> float:
    """Returns the bytes that a rank receives (and sends) per step, with collectives over rings.

    An all-gather or reduce-scatter of n bytes moves n (R - 1) / R, an all-reduce twice as much.
    """
    share, c, batches = (setup.ranks - 1) / setup.ranks, setup.itemsize, setup.accumulation
    total = counts.total
    if engine in ("none", "ddp"):
        moved = 8.0 * total
    elif engine == "fsdp":
        # weights are gathered for the forward and the backward pass, the tail's only once;
        # gradients are reduced once per step
        apart = counts.head if sharding == "vocab_parallel" else 0
        moved = batches * c * (2 * (total - apart) - fsdp_units(counts, sharding)[1]) + 4.0 * (
            total - apart
        )
    elif "w" in ENGINES[engine].sharded:
        # weights are gathered for the forward pass, and again for the backward pass if they did
        # not stay; gradients are reduced
        moved = batches * c * (total + max(0, total - LIVE) + total)
    else:
        # DeepSpeed all-reduces gradients here, in stage 1 once per step, and gathers the weights
        # after the step
        moved = c * (2.0 * total * (1 if engine == "zero1" else batches) + total)
    return share * (moved + batches * loss_traffic(counts, setup, sharding))


def loss_traffic(counts: Parameters, setup: Setup, sharding: str) -> float:
    """Returns the same bytes for the loss of one micro-batch, times R / (R - 1)."""
    if sharding == "shard":
        return 4.0 * counts.vocab_size * counts.width
    if sharding != "vocab_parallel":
        return 0
    tokens = setup.targets * setup.ranks
    rows = min(counts.vocab_size, tokens * setup.unique_share) * counts.width if setup.priced else 0
    hidden_and_gradients = tokens * counts.width * (setup.itemsize + 4)
    return hidden_and_gradients + 8 * tokens + 2 * 4 * (rows + (5 if setup.priced else 3) * tokens)


def compute_flops(profile: ModelProfile, setup: Setup, mean_tokens: float) -> float:
    """Returns the FLOPs of one rank and step, for rows of ``mean_tokens`` tokens.

    Checkpointed layers run their forward pass twice.
    """
    linear, quadratic = profile.flops
    if setup.checkpointing:
        linear, quadratic = linear + profile.layer_flops / 3, quadratic * 4 / 3
    return setup.batch * setup.accumulation * (linear * mean_tokens + quadratic * mean_tokens**2)


def host_traffic(counts: Parameters, setup: Setup, engine: str) -> float:
    """Returns the bytes per step between host and GPU under offloading.

    Weights are read for each gather, and gradients are written back.
    """
    if not ENGINES[engine].offload:
        return 0
    return setup.accumulation * setup.itemsize * 3.0 * counts.total / setup.ranks
