"""Names that records, tables and pictures share."""

from periln.eval.formats.recipes import ACTIVATIONS, KV, STREAM, WEIGHTS

AS_IT_IS, CURED = "as it is", "cured"
PLACES = {WEIGHTS: "weights", ACTIVATIONS: "activations", STREAM: "stream", KV: "KV cache", "recipes": "recipes"}
EMULATION = (
    "By emulation: scaled, cast, cast back, and every product in FP32. This says what a format does to the numbers, "
    "never how fast it is. Embedding, head, norms, softmax and the outputs of products stay in FP32."
)
