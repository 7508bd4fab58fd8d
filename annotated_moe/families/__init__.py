"""The models that are known by name."""

from annotated_moe.families.grok import grok_config

# %% 08
PRESETS = {"grok-1": grok_config()}
