"""Imports go one way: a layer never reaches up."""

import ast

LAYERS = [
    {"errors", "collectives"},
    {"checkpoint", "environment"},
    {"data", "model", "sampling", "old_flags", "flash", "loading", "turns", "lock", "signals"},
    {"samples", "loadable"},
    {"cost"},
    {"token_stats"},
    {"losses", "head"},
    {"teacher", "isolation"},
    {"attach"},
    {"generate", "preview"},
    {"evaluation"},
    {"cost_sharding"},
    {"engines"},
    {"anatomy", "shards"},
    {"guard"},
    {"estimate"},
    {"plans"},
    {"resumable"},
    {"trainer"},
    {"arguments", "callbacks", "trainer_flags"},
    {"fit", "command_line"},
    {"checks", "record", "prepare"},
    {"resume", "adapters"},
    {"train", "launch", "preflight", "merge_lora"},
    {"continual"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def test_no_module_imports_from_a_higher_layer(root):
    package, seen = root / "stanford_alpaca", set()
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        here = parts[0]
        seen.add(here)
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.Import) and any(name.name.startswith("stanford_alpaca") for name in node.names))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stanford_alpaca":
                names = [name.name for name in node.names if name.name != "__version__"]
                there = [*node.module.split("."), *names, here][1]
                assert RANK[there] < RANK[here] or there == here, f"{file.name} imports {node.module}"
    assert seen == set(RANK)


def test_no_module_is_named_like_a_package_that_others_import(root):
    names = {file.stem for file in (root / "stanford_alpaca").glob("*.py")}
    assert not names & {"evaluate", "math", "triton", "datasets", "tokenizers", "types", "copy"}
