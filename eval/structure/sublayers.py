"""The two sublayers of a decoder layer, read off one watched pass: norms, factors, and the points of the stream."""

from dataclasses import dataclass

import torch
from torch import nn

from periln.eval.structure.norms import NormFacts, is_norm, norm_facts
from periln.eval.structure.points import Call, Point, TensorCall
from periln.runkit.errors import UserError

ROUNDING = 8.0  # a sum may be off by this many units in the last place of the sum of its parts' sizes


@dataclass(frozen=True)
class Norm:
    """A norm module and its qualified name. `facts` is what it computes (`UserError` where that is unknown)."""

    name: str
    module: nn.Module

    @property
    def facts(self) -> NormFacts:
        return norm_facts(self.module, self.name)


@dataclass(frozen=True)
class Projection:
    """A linear map and its qualified name."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Sublayer:
    """One module f of a layer with its norms, factors, and the points where its tensors are seen.

    `layer` counts from 1; `residual_add` and `stream` are None for the first module of a parallel layer.
    `output_projection` is the linear map whose output is f's output, where there is one.
    """

    layer: int
    kind: str
    name: str
    module: nn.Module
    input_norm: Norm | None
    output_norm: Norm | None
    residual_norm: Norm | None
    alpha: float
    multiplier: float
    input_scale: float
    parallel: bool
    reads: Point
    branch: Point
    branch_output: Point
    residual_add: Point | None
    stream: Point | None
    output_projection: Projection | None

    @property
    def letters(self) -> str:
        """The places where it has norms, such as `AB`."""
        norms = (("A", self.input_norm), ("B", self.output_norm), ("C", self.residual_norm))
        return "".join(letter for letter, norm in norms if norm is not None)


def _eps(*tensors: torch.Tensor) -> float:
    return ROUNDING * max(torch.finfo(x.dtype).eps for x in tensors)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def ratio(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    """The factor k with a = k * b to rounding, or None."""
    if a is None or b is None or a.shape != b.shape:
        return None
    if torch.equal(a, b):
        return 1.0
    x, y = a.double().flatten(), b.double().flatten()
    if not y.square().sum() > 0:
        return None
    k = (x @ y / (y @ y)).item()
    return k if k != 0 and bool(((x - k * y).abs() <= _eps(a, b) * x.abs()).all()) else None


def _stated(fitted: float, layer: nn.Module) -> float:
    """The factor as stated by the layer, a child of it or its config, if one of their numbers is the fitted one."""
    owners = [layer, *layer.children(), *(m.config for m in (layer, *layer.children()) if hasattr(m, "config"))]
    numbers = [v for owner in owners for v in vars(owner).values() if isinstance(v, float)]
    return next((v for v in numbers if abs(v - fitted) <= 1e-6 * abs(fitted)), fitted)


def _closest(reader: torch.Tensor, norms: list[TensorCall], side: str) -> tuple[TensorCall | None, float]:
    """The norm whose `side` ("given", "result") is `reader` up to a factor, and the factor; equal ones come first.

    A norm of a normed vector is nearly that vector, so the last one counts among those that match only to rounding.
    """
    found = [(norm, k) for norm in norms if (k := ratio(reader, getattr(norm, side))) is not None]
    equal = [item for item in found if item[1] == 1.0]
    return found_or_none[-1] if (found_or_none := equal or found) else (None, 1.0)


def _factors(total: torch.Tensor, parts: list[torch.Tensor]) -> list[float] | None:
    """Factors with total = sum of factor * part to rounding; None where there are none. Plain ones are tried first."""
    t = total.double().flatten()
    columns = torch.stack([p.double().flatten() for p in parts], dim=1)
    near = _eps(total, *parts)
    if bool(((t - columns.sum(1)).abs() <= near * columns.abs().sum(1)).all()):
        return [1.0] * len(parts)
    # Rounding is proportional to an entry's parts: with these weights a small part next to a huge one keeps its factor.
    weights = columns.abs().sum(1).clamp(min=1e-300)
    rows = columns / weights[:, None]
    scale = rows.norm(dim=0).clamp(min=1e-300)
    fitted = torch.linalg.lstsq(rows / scale, (t / weights)[:, None]).solution.flatten() / scale
    if not bool(((t - columns @ fitted).abs() <= near * (columns * fitted).abs().sum(1)).all()):
        return None
    if fitted.abs().min() < near:
        return None  # a part that is not in the sum: for example, a module that adds the stream itself
    return [1.0 if abs(k - 1) < near else k for k in fitted.tolist()]


def _by_channel(total: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether each channel of the sum has its own factors, as from a learned vector."""
    columns = torch.stack([p.double().flatten(0, -2).T for p in parts], dim=-1)  # channels, tokens, parts
    t = total.double().flatten(0, -2).T[..., None]
    fitted = torch.linalg.lstsq(columns, t).solution
    near = _eps(total, *parts)
    exact = (t - columns @ fitted)[..., 0].abs() <= near * (columns * fitted.mT).abs().sum(-1)
    # A part with a factor of 0 is not in the sum, as when a module adds the stream itself.
    return bool(exact.all() and fitted.abs().min() > near and fitted.std(dim=0).max() > 1e-3)


_ATTENTION_WORDS = ("attention", "attn")


def _keeps_shape(call: Call, shape: torch.Size) -> TensorCall | None:
    """The call, if it turned a tensor of this shape into another."""
    given, result = call.given, call.result
    if given is None or result is None or not shape == given.shape == result.shape:
        return None
    return TensorCall(call.name, call.module, given, result)


class LayerReader:
    """Reads the sublayers of one decoder layer off the trace of its children."""

    def __init__(self, number: int, name: str, layer: nn.Module, calls: list[Call], whole: TensorCall):
        self.number, self.name, self.layer, self.whole = number, name, layer, whole
        shape = whole.given.shape
        self.deep = calls
        depth = name.count(".") + 1
        near = (_keeps_shape(c, shape) for c in calls if c.name.count(".") == depth)
        flat = [c for c in near if c is not None]
        self.norms = [c for c in flat if is_norm(c.module)]
        self.heavy = [c for c in flat if not is_norm(c.module) and any(p.ndim > 1 for p in c.module.parameters())]

    def refuse(self, why: str) -> UserError:
        return UserError(f"the residual stream of {self.name} ({type(self.layer).__name__}) cannot be followed: {why}")

    def _norm(self, call: Call | None) -> Norm | None:
        return None if call is None else Norm(call.name, call.module)

    def _input_norm(self, f: TensorCall) -> tuple[TensorCall | None, float]:
        """The norm that f reads, if it reads one (and not the stream), and the factor between."""
        return _closest(f.given, [n for n in self.norms if not same(n.given, f.result)], "result")

    def _output_norm(self, f: TensorCall) -> TensorCall | None:
        return _closest(f.result, self.norms, "given")[0]

    def _after(self, f: TensorCall, norm: TensorCall | None) -> torch.Tensor:
        return f.result if norm is None else norm.result

    def _order(self) -> tuple[TensorCall, TensorCall]:
        if len(self.heavy) != 2:
            names = ", ".join(c.name.rsplit(".", 1)[-1] for c in self.heavy) or "none"
            raise self.refuse(
                f"it does not have two modules that write to the stream, attention and MLP (found: {names})"
            )
        named = [any(w in type(c.module).__name__.lower() for w in _ATTENTION_WORDS) for c in self.heavy]
        if named == [False, True]:
            return self.heavy[1], self.heavy[0]
        return self.heavy[0], self.heavy[1]

    def read(self) -> list[Sublayer]:
        attn, mlp = self._order()
        a_out, m_out = self._output_norm(attn), self._output_norm(mlp)
        x, end = self.whole.given, self.whole.result
        branches = [self._after(attn, a_out), self._after(mlp, m_out)]
        factors = _factors(end, [x, *branches])
        if factors is not None and _reads(x, mlp, self._input_norm(mlp)[0]):
            return self._parallel(attn, mlp, a_out, m_out, factors)
        return self._sequential(attn, mlp, a_out, m_out)

    def _parallel(self, attn, mlp, a_out, m_out, factors: list[float]) -> list[Sublayer]:
        alpha, s_attn, s_mlp = factors
        end = Point(self.name, self.layer, "output")
        start = Point(self.name, self.layer, "input")
        make = self._make
        return [
            make("attn", attn, a_out, self._input_norm(attn), None, (alpha, s_attn), start, None, None, True),
            make("mlp", mlp, m_out, self._input_norm(mlp), None, (alpha, s_mlp), start, end, end, True),
        ]

    def _sequential(
        self, attn: TensorCall, mlp: TensorCall, a_out: TensorCall | None, m_out: TensorCall | None
    ) -> list[Sublayer]:
        x, end = self.whole.given, self.whole.result
        a_in, m_in = self._input_norm(attn), self._input_norm(mlp)
        before = m_in[0] if m_in[0] is not None else mlp
        total, between = before.given, Point(before.name, before.module, "input")
        first = _factors(total, [x, self._after(attn, a_out)])
        a_res, middle, stream = None, between, total
        if m_in[0] is not None and first is not None:
            # The norm that reads the sum is A of the MLP if the sum is the stream, and C of attention if its output is.
            continues = self._second(total, self._after(mlp, m_out), end)
            if continues is None:
                normed = m_in[0].result
                a_res, m_in, stream = m_in[0], (None, m_in[1]), normed
                middle = Point(a_res.name, a_res.module, "output")
        elif first is None:
            # The MLP reads the stream itself or a norm of it, and a norm C of attention made that stream.
            a_res = next((n for n in self.norms if same(n.result, total)), None)
            first = None if a_res is None else _factors(a_res.given, [x, self._after(attn, a_out)])
            if a_res is None or first is None:
                sums = [total, *(n.given for n in self.norms if same(n.result, total))]
                self._refuse_factors(sums, [x, self._after(attn, a_out)])
                raise self.refuse("what its MLP reads is not its input plus what attention gives")
            between = Point(a_res.name, a_res.module, "input")
            middle = Point(a_res.name, a_res.module, "output")
        second = self._second(stream, self._after(mlp, m_out), end)
        if second is None:
            sums = [end, *(n.given for n in self.norms if same(n.result, end))]
            self._refuse_factors(sums, [stream, self._after(mlp, m_out)])
            raise self.refuse("its output is not the stream after attention plus what its MLP gives")
        factors, m_res = second
        start, out = Point(self.name, self.layer, "input"), Point(self.name, self.layer, "output")
        last = out if m_res is None else Point(m_res.name, m_res.module, "input")
        make = self._make
        return [
            make("attn", attn, a_out, a_in, a_res, tuple(first), start, between, middle, False),
            make("mlp", mlp, m_out, m_in, m_res, tuple(factors), middle, last, out, False),
        ]

    def _refuse_factors(self, sums: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        if any(_by_channel(total, parts) for total in sums):
            raise self.refuse("its residual sum has another factor for each channel (a learned vector)")

    def _second(self, stream: torch.Tensor, branch: torch.Tensor, end: torch.Tensor):
        """Factors of the second add and its norm C: `end` is their sum, or a norm of it."""
        factors = _factors(end, [stream, branch])
        if factors is not None:
            return factors, None
        norm = next((n for n in self.norms if same(n.result, end)), None)
        factors = None if norm is None else _factors(norm.given, [stream, branch])
        return None if factors is None else (factors, norm)

    def _projection(self, f: Call) -> Projection | None:
        """The module inside f, with its own matrix, whose output is f's output."""
        inside = (c for c in self.deep if c.name.startswith(f"{f.name}.") and same(c.result, f.result))
        found = [c for c in inside if getattr(getattr(c.module, "weight", None), "ndim", 0) == 2]
        return Projection(found[-1].name, found[-1].module) if found else None

    def _make(self, kind, f, out, inner, residual, factors, reads, add, stream, parallel) -> Sublayer:
        norm, c = inner
        branch = Point(f.name, f.module, "output")
        return Sublayer(
            layer=self.number,
            kind=kind,
            name=f.name,
            module=f.module,
            input_norm=self._norm(norm),
            output_norm=self._norm(out),
            residual_norm=self._norm(residual),
            alpha=_stated(factors[0], self.layer),
            multiplier=_stated(factors[1], self.layer),
            input_scale=_stated(c, self.layer),
            parallel=parallel,
            reads=reads,
            branch=branch,
            branch_output=branch if out is None else Point(out.name, out.module, "output"),
            residual_add=add,
            stream=stream,
            output_projection=self._projection(f),
        )


def _reads(x: torch.Tensor, f: TensorCall, norm: TensorCall | None) -> bool:
    return same(x, f.given if norm is None else norm.given)
