"""Section `kernels`: where the time of one micro batch goes, by kind of kernel."""

from torch.profiler import ProfilerActivity, profile

from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import Place, step

KINDS = {  # kind: words in the names of its kernels (a GPU's) or operators (a CPU's), the first that fits
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "products": ("gemm", "gemv", "cutlass", "cublas", "xmma", "nvjet", "mm", "linear"),
    "softmax and loss": ("softmax", "nll", "cross_entropy", "scatter", "gather"),
    "optimizer": ("adam", "foreach", "multi_tensor"),
    "reductions": ("reduce", "norm", "sum", "mean", "amax"),
    "copies and casts": ("copy", "memcpy", "memset", "fill", "_to"),
    "fused by the compiler": ("triton", "cpp_fused"),
}


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def check_kernels(place: Place, notes: Notes) -> None:
    recipe = place.large("peri", name="profiled", batch_size=2, micro_batch_size=2)
    trainer = place.trainer(recipe)
    for witness in (True, False):
        step(trainer, witness=witness)
    place.synchronize()
    kinds = [ProfilerActivity.CPU, *([] if place.toy else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as seen:
        step(trainer)
        place.synchronize()
    totals: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in seen.key_averages():
        micros = event.self_cpu_time_total if place.toy else event.self_device_time_total
        if micros:
            kind = kind_of(event.key)
            totals[kind] = totals.get(kind, 0.0) + micros
            names[event.key] = names.get(event.key, 0.0) + micros
    tokens = recipe.batch_size * recipe.sequence_length
    ordered = sorted(totals.items(), key=lambda one: -one[1])
    notes.measure("microseconds_a_token_by_kind", {kind: micros / tokens for kind, micros in ordered})
    longest = sorted(names.items(), key=lambda one: -one[1])[:20]
    notes.measure("longest_kernels_microseconds", [[name[:120], micros] for name, micros in longest])
    share = totals.get("products", 0.0) / max(1e-9, sum(totals.values()))
    notes.check("matrix products are found in the profile", share > 0, share, "a share above 0")
