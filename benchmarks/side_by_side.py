"""Methods beside one another on a reference model, as ``c4d bench`` measures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache4diffusion.cli.models import Model, captions_for
from cache4diffusion.compare import compare
from cache4diffusion.measure import Results

BATCH = 16


def side_by_side(model: Model, methods: Sequence[Any], captions: int, **options: Any) -> Results:
    """Methods on the first captions that nothing was trained or chosen on.

    Args:
        model: a reference model.
        methods: as `compare` takes them.
        captions: how many.
        **options: further ones of `compare`.
    """
    prompts, model = captions_for(model, captions, None, 0)
    return compare(
        model.pipe,
        prompts,
        list(methods),
        steps=model.steps,
        batch=BATCH,
        judge=model.judge,
        family=model.family,
        name=model.name,
        call=model.call,
        flops_captions=2,
        **options,
    ).results
