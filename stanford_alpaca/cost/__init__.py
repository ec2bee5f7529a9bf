"""The transport cost between tokens.

``python -m stanford_alpaca.cost build`` makes an embedding where a model has none yet, and ``cost
describe`` looks into one.
"""

from stanford_alpaca.cost.alias import CostAlias
from stanford_alpaca.cost.cache import CostRows
from stanford_alpaca.cost.embedding import (
    COST_KINDS,
    ZERO_BELOW,
    CostEmbedding,
    is_embedding_file,
)
from stanford_alpaca.cost.sharded import ShardedCost, as_cost, broadcast_cost
from stanford_alpaca.cost.types import Cost

# The modules that build an embedding are not imported here, because losses need none of them.
__all__ = [
    "COST_KINDS",
    "ZERO_BELOW",
    "Cost",
    "CostAlias",
    "CostEmbedding",
    "CostRows",
    "ShardedCost",
    "as_cost",
    "broadcast_cost",
    "is_embedding_file",
]
