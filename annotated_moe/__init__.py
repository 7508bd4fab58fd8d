# Generated from book/chapters/09_checkpoints.md, book/chapters/19_vocabularies.md by `make sync`; edit the chapters.
"""The front door of the package: what a reader types is here, and the
rest is one import further in.
"""

import gc
from typing import Any

import annotated_moe.chat as chat_module

# %% book/chapters/09_checkpoints.md, cell 163
looking = gc.isenabled()
gc.disable()
try:
    import annotated_moe.meta  # noqa: F401, `load` learns its layout
    from annotated_moe.checkpoints import (
        CheckpointError,
        load,
        save,
        verify,
    )
    from annotated_moe.model import PRESETS, Model, ModelConfig
    from annotated_moe.quantization import QuantizedTensor
    from annotated_moe.sharding import make_mesh
    from annotated_moe.tokenizer import Tokenizer
finally:
    if looking:
        gc.enable()


# %% book/chapters/09_checkpoints.md, cell 164
__all__ = [
    "PRESETS",
    "CheckpointError",
    "Model",
    "ModelConfig",
    "QuantizedTensor",
    "Tokenizer",
    "load",
    "make_mesh",
    "save",
    "verify",
]


# %% book/chapters/09_checkpoints.md, cell 165
def __getattr__(name: str) -> Any:
    """`__version__`, looked up when asked for: that takes a while."""
    if name != "__version__":
        raise AttributeError(f"annotated_moe has no {name!r}")
    from importlib.metadata import version

    return version("annotated-moe")


# %% book/chapters/19_vocabularies.md, cell 43
chat_module.register_chat()
