"""Train the denoiser and the text encoders of ``scenes-flux``.

    python -m cache4diffusion.reference.training.flow --vae runs/vae --folder runs/flow --minutes 240

The same as `cache4diffusion.reference.training.denoiser` with ``scenes-flux`` as its model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cache4diffusion.reference.training import denoiser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    denoiser.main(["scenes-flux", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
