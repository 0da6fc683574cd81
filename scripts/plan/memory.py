"""The memory of a training step, by formula.

It follows the trainer's step (scripts/training/engine.py) operator by operator: what autograd keeps of every sublayer,
and what is alive at each of the moments at which a step can peak. `tests/scripts/test_plan.py` compares it with counted
tensors (scripts/plan/memory_meter.py). Not counted: the CUDA context, NCCL, and what the allocator cannot reuse.
"""

from dataclasses import dataclass
from typing import Literal

from modeling_periln import PeriLlamaConfig
from modeling_periln.placements import LayerPlan
from modeling_periln.slots import Learned
from periln.scripts.costs import count_parameters, hidden_entries, vectors_of_a_norm, widths
from periln.scripts.optimizers import find_row
from periln.scripts.recipe import Recipe

FP32, INT64 = 4, 8
CHUNK_TOKENS = 1024  # of modeling_periln.loss
Engines = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Situation:
    """What decides the memory of a step besides the model. Sizes in bytes an element."""

    micro: int  # sequences
    accumulates: bool  # more than one micro batch a step
    length: int
    local_batch: int  # sequences of a process and step
    module: int  # dtype of the linear layers' results
    stream: int  # dtype of the residual stream
    autocast: bool
    checkpointing: bool
    document_masking: bool
    fused_norms: bool  # x and its rstd are all that a norm keeps; else the plain operations' tensors
    emulated: bool  # FP16 on a CPU: products are computed from FP32 copies
    engine: Engines = "single"
    processes: int = 1
    optimizer: str = "adamw"  # a row of scripts/optimizers
    teacher: PeriLlamaConfig | None = None  # of the model of distill_from

    @property
    def tokens(self) -> int:
        return self.micro * self.length


def situation(
    recipe: Recipe,
    gpus: int = 1,
    engine: Engines = "single",
    micro: int | None = None,
    device: str = "cuda",
    teacher: PeriLlamaConfig | None = None,
) -> Situation:
    """The recipe on `gpus` processes, with `micro` as its micro batch; `teacher` is that of its `distill_from`."""
    mode, stream = recipe.precision.mode, recipe.precision.residual_dtype
    half = 2 if mode != "fp32" else FP32
    local = recipe.batch_size // gpus
    micro = micro or recipe.micro_batch_size or local
    fused = device == "cpu" or recipe.compile
    return Situation(
        micro=micro,
        accumulates=local > micro,
        length=recipe.sequence_length,
        local_batch=local,
        module=half,
        stream=FP32 if stream in (None, "float32") else 2,  # left open, it is the FP32 embedding's
        autocast=mode != "fp32",
        checkpointing=recipe.activation_checkpointing,
        document_masking=recipe.document_masking,
        fused_norms=fused and recipe.model.get("norm_type", "rmsnorm") == "rmsnorm",
        emulated=device == "cpu" and mode == "fp16",
        engine="single" if gpus == 1 else engine,
        processes=gpus,
        optimizer=recipe.optimizer.name,
        teacher=teacher,
    )


def _norm(width: int, size: int, s: Situation, config: PeriLlamaConfig) -> int:
    """Bytes a token that a norm over `width` channels of `size` bytes keeps for its backward pass."""
    statistics = FP32 * vectors_of_a_norm(config)
    if s.fused_norms:
        return width * size + statistics
    if config.norm_type == "layernorm":
        return width * FP32 + statistics
    return 2 * width * FP32 + statistics  # x in FP32, and x / rms(x)


def _read(width: int, size: int, readers: int, s: Situation) -> int:
    """Bytes a token that `readers` linear layers keep of the input they share. Autocast casts it for each of them."""
    casts = readers if s.autocast and size != s.module else 1
    return casts * width * s.module


def layer_activations(config: PeriLlamaConfig, plan: LayerPlan, s: Situation) -> float:
    """Bytes a token that autograd keeps of one layer: everything its backward pass reads."""
    d, f, q, k = widths(config)
    kept = 0.0
    for sublayer, readers, inner in ((plan.attn, 3, q), (plan.mlp, 2, f)):
        kept += _norm(d, s.stream, s, config) if sublayer.input_norm else 0
        kept += _read(d, s.stream, readers, s)
        kept += _norm(inner, s.module, s, config) if sublayer.inner_norm else 0
        kept += _norm(d, s.module, s, config) if sublayer.output_norm else 0
        kept += _norm(d, s.stream, s, config) if sublayer.residual_norm else 0
        kept += d * s.stream * sum(isinstance(factor, Learned) for factor in (sublayer.alpha, sublayer.s))
    for slot, norm in plan.projections.items():
        if norm.over == "full":
            kept += _norm(q if slot == "q_norm" else k, s.module, s, config)
        else:
            heads = config.num_attention_heads if slot == "q_norm" else config.num_key_value_heads
            kept += heads * _norm(config.head_dim, s.module, s, config)
    kept += (2 * q + 2 * k) * s.module + config.num_attention_heads * FP32  # q, k, v, output; log-sum-exp
    if s.document_masking:
        kept += s.length * s.module  # each layer turns the mask into numbers to add, and keeps them
    kept += 4 * f * s.module  # gate, silu(gate), up, their product
    return kept


def end_activations(config: PeriLlamaConfig, s: Situation) -> tuple[float, float]:
    """Bytes a token kept at the two ends of the stream: by the embedding norm; by the final norm and the loss."""
    plan, d = config.stream_plan(), config.hidden_size
    first = _norm(d, FP32, s, config) if plan.embedding_norm else 0.0
    last = _norm(d, s.stream, s, config) if plan.final_norm else 0.0
    return first, last + d * s.stream


# --- the moments of a step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step: bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def _standing(config: PeriLlamaConfig, s: Situation) -> dict[str, float]:
    """What is there during all of forward and backward."""
    count, shards = count_parameters(config), s.processes if s.engine == "fsdp2" else 1
    mask = s.micro * s.length**2 if s.document_masking else 0
    row, hidden = find_row(s.optimizer), hidden_entries(config)
    state = row.hidden_state * hidden + row.other_state * (count.total - hidden)
    parts = {
        "weights (FP32)": FP32 * count.total / shards,
        f"state of {s.optimizer} (FP32)": FP32 * state / shards,
        # Autocast keeps its casts of the weights until the step's forward and backward passes are done.
        "weights in half precision (autocast)": s.module * count.matrices if s.autocast else 0,
        "batch": 2 * INT64 * s.local_batch * s.length + mask,
    }
    if s.teacher is not None:
        parts["the teacher's weights (FP32)"] = FP32 * count_parameters(s.teacher).total
    if s.engine == "fsdp2":
        # Parameters are gathered in FP32: two layers at a time (one in use, the next under way), and all along the
        # two ends; and the gradients of one such group, before they are reduced.
        ends = count.embedding + count.head
        parts["all-gather buffers (FSDP2)"] = FP32 * (2 * count.layer + ends)
        parts["reduce-scatter buffers (FSDP2)"] = FP32 * max(count.layer, ends)
    return parts


def moments(config: PeriLlamaConfig, s: Situation) -> list[Moment]:
    """The moments of a step that can be its peak, in their order."""
    count, plan = count_parameters(config), config.stream_plan()
    shards = s.processes if s.engine == "fsdp2" else 1
    d, f, _, _ = widths(config)
    standing = _standing(config, s)
    layers = [s.tokens * layer_activations(config, layer, s) for layer in plan.layers]
    saved = len(layers) * s.tokens * d * s.stream if s.checkpointing else sum(layers)
    begin, end = (s.tokens * kept for kept in end_activations(config, s))
    # Gradients of the micro batches before: whole under FSDP2 too, which reduces them after the last one only.
    earlier = FP32 * count.total if s.accumulates else 0.0
    head_grad = FP32 * config.vocab_size * d  # while it is being summed up, sharded afterwards

    def moment(name: str, gradients: float, activations: float, recomputed: float, **work: float) -> Moment:
        parts = standing | {"gradients (FP32)": gradients, "activations": activations}
        if s.checkpointing:
            parts["activations of one layer, computed again"] = recomputed
        return Moment(name, parts | {k.replace("_", " "): v for k, v in work.items()})

    # The loss makes its gradient in the forward pass: the head's in FP32, the last hidden state's as the modules'.
    chunk = min(s.tokens, CHUNK_TOKENS)
    logits, table = chunk * config.vocab_size, config.vocab_size * d
    kept = {"head_gradient": FP32 * table, "hidden_gradient": s.module * s.tokens * d}
    half = s.module if s.module != FP32 else 0  # the logits beside their FP32 form, and d(logits) beside its own
    softmax = (FP32 + 2 * half) * logits  # d(logits) takes the place of the FP32 form
    loss = moment("the loss, softmax", earlier, saved + begin + end, 0.0, logits_of_a_chunk=softmax, **kept)
    product = s.module * logits + (s.module * table if half else 0)
    if s.emulated:
        product += FP32 * (logits + chunk * d + table)
    head = moment("the loss, LM head", earlier, saved + begin + end, 0.0, logits_of_a_chunk=product, **kept)
    if s.teacher is not None:
        both, product = _distillation(config, s)
        loss = moment("the divergence", earlier, saved + begin + end, 0.0, logits_of_both_models=both)
        head = moment("LM head", earlier, saved + begin + end, 0.0, gradient_of_the_logits=product)
    # In a layer's backward pass, at SwiGLU's product: the gradients of its two factors beside its own, which has taken
    # the place of the product, the stream's, and that of down_proj. Emulated, down_proj's backward pass is larger.
    work = 2 * s.tokens * f * s.module + FP32 * d * f
    if s.emulated:
        work = s.tokens * f * (FP32 + s.module) + FP32 * s.tokens * d + FP32 * d * f
    work += s.tokens * d * s.stream
    last = moment("backward of the last layer", max(earlier, head_grad / shards), saved + begin, layers[-1], work=work)
    rest = layers[0] if not s.checkpointing else s.tokens * d * s.stream
    everything = FP32 * count.total / shards
    first = moment(
        "backward of the first layer",
        max(earlier, everything - FP32 * table / shards),
        rest + begin,
        layers[0],
        work=work,
    )
    embedding = moment(
        "backward of the embedding", max(earlier, everything), 0.0, 0.0,
        work=FP32 * (s.tokens * d + (table if s.accumulates else 0)),
    )  # fmt: skip
    # Fused AdamW works in place; Muon takes one matrix after another, each of them whole.
    needed = find_row(s.optimizer).update_bytes * d * max(f, *widths(config)[2:])
    update = moment("the update", everything, 0.0, 0.0, work=needed)
    update.parts.pop("weights in half precision (autocast)")  # gone with the last micro batch
    return [loss, head, last, first, embedding, update]


def _distillation(config: PeriLlamaConfig, s: Situation) -> tuple[float, float]:
    """Bytes that a teacher puts in the place of the loss's: of both models' logits, and of the head's backward pass.

    The logits are whole ones; scripts/training/distill.py goes through them a sequence at a time.
    """
    assert s.teacher is not None
    d, logits = config.hidden_size, s.tokens * config.vocab_size
    sequence, table = s.length * config.vocab_size, config.vocab_size * config.hidden_size
    half = s.module if s.autocast else 0
    student = FP32 * logits  # Accelerate hands out FP32
    inside = s.tokens * FP32 * (2 * s.teacher.hidden_size + 3 * s.teacher.intermediate_size)
    both = student + FP32 * logits + max(2 * FP32 * sequence, half * logits)
    product: float = FP32 * logits + (FP32 + half) * table + s.module * s.tokens * d
    if half:  # d(logits) in FP32 is let go once it has been cast
        product = max(half * logits + (FP32 + half) * table + s.module * s.tokens * d, (FP32 + half) * logits)
    if s.emulated:
        product += FP32 * (logits + s.tokens * d + table)
    return max(both, student + inside), product


def peak(config: PeriLlamaConfig, s: Situation) -> Moment:
    """The moment at which most is alive."""
    return max(moments(config, s), key=lambda moment: moment.total)
