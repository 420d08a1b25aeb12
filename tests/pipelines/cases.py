"""All cases, and the pipelines that have none because they cannot be had here."""

from __future__ import annotations

from pipelines import images, unets, videos
from pipelines.case import Case

CASES: dict[str, Case] = {case.name: case for case in (*images.CASES, *unets.CASES, *videos.CASES)}
