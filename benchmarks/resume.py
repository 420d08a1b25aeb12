"""Going on with the result file of an earlier run; what ``--resume`` of the scripts beside this one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kept(stem: str, schema: int, conditions: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``<stem>.json``, which was made under the same conditions; none if there is no such file.

    Raises:
        SystemExit: the file's conditions are others.
    """
    path = Path(f"{stem}.json")
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["schema"] != schema or known["conditions"] != conditions:
        raise SystemExit(f"{path} was measured under other conditions: leave out --resume, or write elsewhere")
    return known["rows"]
