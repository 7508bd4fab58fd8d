"""The models that are known by name."""

from annotated_moe.config import ModelConfig
from annotated_moe.families.grok import grok_config
from annotated_moe.families.llama import LLAMAS
from annotated_moe.families.llama4 import LLAMA_4S
from annotated_moe.families.mixtral import MIXTRALS
from annotated_moe.families.olmoe import OLMOES
from annotated_moe.families.qwen import QWENS

# %% 08
PRESETS: dict[str, ModelConfig] = {"grok-1": grok_config()}

# %% 15
PRESETS |= LLAMAS

# %% 16
PRESETS |= MIXTRALS | QWENS | OLMOES

# %% 18
PRESETS |= LLAMA_4S
