"""Cached tables that are damaged before the same run is made again.

They are made anew, and nothing else changes.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.faults.harness import DDP, FSDP, PLAIN, Case, Setting, case, check, exact
from tests.faults.world import World

TABLES = ("generator-*.arrow", "tokenized-*.arrow")


def zeros(content: bytearray, share: float) -> bytearray:
    start = int(share * len(content))
    return content[:start] + bytes(len(content) - start)


def cut(content: bytearray, share: float) -> bytearray:
    return content[: int(share * len(content))]


def flipped(content: bytearray, share: float) -> bytearray:
    content[int(share * len(content))] ^= 1
    return content


def damaged(
    world: World, out: Path, setting: Setting, damage: Callable, table: str, share: float
) -> None:
    """Checks that the second of two equal runs finds the first one's damaged table."""
    first, cache = out.with_name("first"), out.with_name("cache")
    world.finish(setting, first, cache_dir=cache)
    (file,) = cache.rglob(table)
    file.write_bytes(damage(bytearray(file.read_bytes()), share))
    ended = world.finish(setting, out, cache_dir=cache)
    check("is not what was written there; it is made again" in ended.text, ended.text[-2000:])
    exact(first, out)


def caches(rng: Random) -> list[Case]:
    cases = []
    for setting in (PLAIN, DDP, FSDP):
        for damage in (zeros, cut, flipped):
            for table in TABLES:
                share = rng.random()
                what = (
                    f"{setting.name}, {damage.__name__} from {share:.3f} "
                    f"of {table.partition('-')[0]}"
                )
                cases.append(case(what, damaged, setting, damage, table, share))
    return cases


ROWS = {"damaged caches": caches}
