# Generated from book/chapters/30b_engine.md, book/chapters/97_serving_details.md by `make sync`; edit the chapters.
"""Serving: many requests, one batch whose rows come and go.
"""

from annotated_moe.generate import RUN_CHECKS
from annotated_moe.serving.checks import check_serving
from annotated_moe.serving.engine import Engine, Stats
from annotated_moe.serving.requests import (
    Event,
    Handle,
    QueueFull,
    Request,
    Result,
)

# %% book/chapters/30b_engine.md, cell 47
__all__ = ["Engine", "Event", "Handle", "QueueFull", "Request",
           "Result", "Stats"]


# %% book/chapters/97_serving_details.md, cell 13
RUN_CHECKS.append(check_serving)
