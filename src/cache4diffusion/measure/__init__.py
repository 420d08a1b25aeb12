"""Measuring honestly: quality and cost of cached runs beside uncached ones of the same seeds.

The metrics need the extra ``measure``; they are imported where they are used, and say so when they are missing.
"""

from .bench import Bench, bench, generators
from .cost import FlopCounter, PeakMemory, Timer, count_flops, flux_block_flops, synchronize
from .errors import MeasureError, MissingExtraError
from .metrics import as_images, as_pil, flip, paired_interval, psnr, ssim, wilson_interval
from .report import write_report
from .results import Conditions, Results, Row
from .table import console_table, markdown_table
from .variant import Variant
from .video import animate, as_clips, as_videos, filmstrip, frame_by_frame, temporal_error

__all__ = [
    "Bench",
    "Conditions",
    "FlopCounter",
    "MeasureError",
    "MissingExtraError",
    "PeakMemory",
    "Results",
    "Row",
    "Timer",
    "Variant",
    "animate",
    "as_clips",
    "as_images",
    "as_pil",
    "as_videos",
    "bench",
    "console_table",
    "count_flops",
    "filmstrip",
    "flip",
    "flux_block_flops",
    "frame_by_frame",
    "generators",
    "markdown_table",
    "paired_interval",
    "psnr",
    "ssim",
    "synchronize",
    "temporal_error",
    "wilson_interval",
    "write_report",
]
