"""``run.yaml``: the record of a run, saved beside what it trained."""

import json
from pathlib import Path
from typing import Any

from stanford_alpaca.checkpoint.bounded import read_yaml
from stanford_alpaca.checkpoint.manifest import is_record

RUN_FILE, RUN_FILE_FROM = "run.yaml", "run-from-{}.yaml"
MADE_WITH = "made_with"  # the only key of a record that is not a flag


def read_run(output: Path, name: str = RUN_FILE) -> dict[str, Any] | None:
    """Returns the record that a run left in its output folder, or None."""
    try:
        record = read_yaml(output / name)
        return json.loads(json.dumps(record)) if is_record(record) else None
    except (OSError, ValueError, TypeError):
        return None
