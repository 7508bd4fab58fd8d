"""A Grok-1-class mixture-of-experts model, built by a book."""

from annotated_moe.checkpoints import CheckpointError, load, save, verify
from annotated_moe.config import ModelConfig
from annotated_moe.families import PRESETS
from annotated_moe.generate import Model, Session
from annotated_moe.parallel import make_mesh
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.tokenizer import Tokenizer

__all__ = [
    "PRESETS", "CheckpointError", "Model", "ModelConfig",
    "QuantizedTensor", "Session", "Tokenizer", "load", "make_mesh",
    "save", "verify",
]
