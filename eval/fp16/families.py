"""The families whose norms are known well enough to be moved, and the field of the configuration with their epsilon."""

SLOTS = "slots"  # an epsilon for every norm, as PeriLlama's configuration has it
# Families whose norms, scales and ties are known to be what the configuration's epsilon field says.
EPSILON_OF = {
    "peri_llama": SLOTS,
    "gemma2": "rms_norm_eps",
    "gemma3_text": "rms_norm_eps",
    "glm4": "rms_norm_eps",
    "hyperclovax": "rms_norm_eps",
    "olmo2": "rms_norm_eps",
    "llama": "rms_norm_eps",
    "qwen3": "rms_norm_eps",
    "mistral": "rms_norm_eps",
    "olmo3": "rms_norm_eps",
    "exaone4": "rms_norm_eps",
    "gpt_neox": "layer_norm_eps",
}
