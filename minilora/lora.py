r"""LoRA: leave W as it is, and learn a low-rank change beside it.

             x  [.., in]
             │
      ┌──────┴───────┐
      │              ▼
      │         ┌─────────┐
      ▼         │ dropout │
  ┌────────┐    └────┬────┘
  │        │      ╲  A  ╱     [r, in]   Kaiming-uniform at the start
  │   W    │       ╲   ╱
  │ frozen │        │ r │     r numbers a token, where W has thousands
  │        │       ╱   ╲
  └───┬────┘      ╱  B  ╲     [out, r]  zero at the start, so that nothing changes yet
      │          └───┬───┘
      └─────►(+)◄────┘ × s    s = α / r   (α / √r with rsLoRA)
              │
              y  [.., out]

    y = x Wᵀ + s · (x Aᵀ) Bᵀ            W' = W + s · B A

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
With g = ∂L/∂y the gradients are, for one token, ∂L/∂B = s · gᵀ (x Aᵀ) and ∂L/∂A = s · (g B)ᵀ x;
`_Adapted` writes them out. Its variants, which may be combined:

    rsLoRA   s = α / √r, so that large ranks learn as fast        Kalajdzievski 2023, 2312.03732
    PiSSA    A and B start as W's r largest singular triples,      Meng et al. 2024, 2404.02948
             A₀, B₀, and W gives them up: W - s · B₀A₀ + s · BA
    DoRA     W' = m / ‖W + ΔW‖ · (W + ΔW), a row at a time:        Liu et al. 2024, 2402.09353
             m [out] is learned, and starts as ‖W‖
    LoRA+    B learns λ times faster than A: `make_optimizer`      Hayou et al. 2024, 2402.12354

A and B are float32 masters whatever W's dtype is: in bfloat16 an update of 1e-4 would be lost.
"""

import fnmatch
import math
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.config import LoraConfig, UserError
from minilora.files import BLOCK
from minilora.linear import linear, product


class LoRALinear(nn.Module):
    """A frozen linear without bias, and beside it the trained pair A, B (and DoRA's m).

    Takes the place of an `nn.Linear` and keeps its parameter name `weight`, so that a checkpoint's
    names stay what they are. "lora_" in a parameter's name is the whole rule for what is trained.
    """

    def __init__(self, wrapped: nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
                 rslora: bool = False, dora: bool = False, init: str = "kaiming") -> None:
        super().__init__()
        self.weight = wrapped.weight.requires_grad_(False)  # [out, in]
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        out_features, in_features = self.weight.shape
        # a = √5 gives U(-1/√in, 1/√in), nn.Linear's own start: what the paper's code and peft use.
        # Drawn on the CPU, so that a seed means the same start on every device.
        start = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
        device = self.weight.device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        # PiSSA's A₀ and B₀. W itself keeps its bytes: they are taken off beside it.
        start_A, start_B = self._principal(init) if init != "kaiming" else (None, None)
        self.register_buffer("lora_start_A", start_A, persistent=False)  # [r, in]
        self.register_buffer("lora_start_B", start_B, persistent=False)  # [out, r]
        if start_A is not None:
            self.lora_A.data, self.lora_B.data = start_A.clone(), start_B.clone()
        self.lora_magnitude = nn.Parameter(self._norm()) if dora else None  # [out]
        self.merged = False
        self.base: Tensor | None = None  # W's bytes from before a merge that may be undone

    @property
    def scaling(self) -> float:
        """s, the factor before B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B of a plain LoRA with the same ΔW = s · B A: with PiSSA [B, -B₀] [A; A₀]."""
        if self.lora_start_A is None:
            return self.lora_A, self.lora_B
        return (torch.cat([self.lora_A, self.lora_start_A]),        # [2 r, in]
                torch.cat([self.lora_B, -self.lora_start_B], 1))    # [out, 2 r]

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] → [.., out], in x's dtype."""
        if self.merged:
            return linear(x, self.weight)
        dropped = F.dropout(x, self.dropout, self.training)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if self.lora_start_A is None:
            y = _adapted(x, dropped, self.weight, A, B, self.scaling)               # [.., out]
        else:  # the difference comes first, so that it is exactly zero at the start
            start = linear(x, self.lora_start_A.to(x.dtype))                        # [.., r]
            change = (linear(linear(dropped, A), B)
                      - linear(start, self.lora_start_B.to(x.dtype)))               # [.., out]
            y = torch.add(linear(x, self.weight), change, alpha=self.scaling)
        if self.lora_magnitude is None:
            return y
        return y * (self.lora_magnitude / self._norm()).to(y.dtype)

    def _sum(self, rows: slice = slice(None)) -> Tensor:
        """Rows of W + ΔW [.., in], in float32 or wider."""
        A, B = self.pair()
        return torch.addmm(self.weight[rows].to(A.dtype), B[rows], A, alpha=self.scaling)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """‖W + ΔW‖ of each row, [out]. No gradient flows through it (DoRA, section 4.3)."""
        return torch.linalg.vector_norm(self._sum(), dim=1)

    @torch.no_grad()
    def _principal(self, init: str) -> tuple[Tensor, Tensor]:
        """A₀ = √(S / s) Vᵀ, B₀ = U √(S / s) of W's r largest singular values S (PiSSA, eq. 2, 3).

        Exactly, or by as many rounds of subspace iteration as `init` ends with (Halko et al. 2009,
        arXiv:0909.4061): seconds rather than minutes on a large model.
        """
        wide = self.weight.float()
        if self.rank > min(wide.shape):
            raise UserError(f"rank {self.rank}: PiSSA takes at most the {min(wide.shape)} singular "
                            f"values that a {'×'.join(map(str, wide.shape))} matrix has")
        if init == "pissa":
            U, S, Vt = torch.linalg.svd(wide, full_matrices=False)
        else:
            more = min(self.rank + 8, *wide.shape)  # a few more make the last of the r exact
            U, S, V = torch.svd_lowrank(wide, more, niter=int(init.rpartition("_")[2]))
            Vt = V.mT
        root = (S[:self.rank] / self.scaling).sqrt()
        return (root[:, None] * Vt[:self.rank]).contiguous(), U[:, :self.rank] * root

    @torch.no_grad()
    def merged_weight(self, rows: slice = slice(None)) -> Tensor:
        """Rows of W' [.., in], made in float32 and rounded once to W's dtype."""
        merged = self._sum(rows)
        if self.lora_magnitude is not None:
            norm = torch.linalg.vector_norm(merged, dim=1, keepdim=True)        # [.., 1]
            merged *= self.lora_magnitude[rows, None] / norm
        return merged.to(self.weight.dtype)

    @torch.no_grad()
    def merge(self, undo: bool = False) -> None:
        """W ← W', some rows at a time."""
        self.base = self.weight.clone() if undo else None
        for rows in row_blocks(self.weight):
            self.weight[rows] = self.merged_weight(rows)
        self._mark(merged=True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W ← the bytes it had before `merge(undo=True)`."""
        self.weight.copy_(self.base)
        self.base = None
        self._mark(merged=False)

    def _mark(self, merged: bool) -> None:
        """Once merged, what was trained acts no more and is not trained."""
        self.merged = merged
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(not merged)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features} → {out_features}, rank={self.rank}, scaling={self.scaling:g}" + (
            ", DoRA" if self.lora_magnitude is not None else "")


def _adapted(x: Tensor, dropped: Tensor, weight: Tensor, A: Tensor, B: Tensor,
             scale: float) -> Tensor:
    """x Wᵀ + s · (d Aᵀ) Bᵀ [.., out], d [.., in] being x after dropout."""
    if torch.compiler.is_compiling():  # the compiler finds products and sums to fuse by itself
        return F.linear(x, weight) + scale * F.linear(F.linear(dropped, A), B)
    return _Adapted.apply(x, dropped, weight, A, B, scale)


class _Adapted(torch.autograd.Function):
    """LoRA's forward and backward: all products of a step but attention's and the vocabulary's.

        y = x Wᵀ + l Bᵀ       l = s · d Aᵀ                                          [.., r]
        dB = gᵀ l             dl = s · g B             dA = dlᵀ d
        dx = g W              dd = dl A                (without dropout d is x: dx = g W + dl A)

    W is frozen. What is added goes into the product that it is added to, and makes no other pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropped: Tensor, weight: Tensor, A: Tensor, B: Tensor,
                scale: float) -> Tensor:
        """x, dropped [.., in] → [.., out]."""
        low = product(dropped, A) * scale                                           # [.., r]
        ctx.save_for_backward(dropped, low, weight, A, B)
        ctx.scale, ctx.same = scale, dropped is x
        return product(low, B, product(x, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [.., out] → gradients of x, dropped, A, B."""
        dropped, low, weight, A, B = ctx.saved_tensors
        d_low = product(grad, B.mT) * ctx.scale                                     # [.., r]
        dA = _sum_of_products(d_low, dropped)                                       # [r, in]
        dB = _sum_of_products(low, grad).mT                                         # [out, r]
        dx = dd = None
        if ctx.needs_input_grad[0]:
            dx = product(grad, weight.mT)                                           # [.., in]
            if ctx.same:
                dx = product(d_low, A.mT, dx)
            else:
                dd = product(d_low, A.mT)
        return dx, dd, None, dA, dB, None


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Σ aᵀ b over all tokens: a [.., r], b [.., n] → [r, n]."""
    return product(a.flatten(0, -2).mT, b.flatten(0, -2).mT)


def attach(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[str]:
    """Puts a LoRALinear in the place of each linear that `config.targets` choose; freezes all else.

    A target is a module's last name (`q_proj`) or a pattern over its full name (`layers.1?.mlp.*`);
    so is the left side of a rank or alpha pattern. Returns the names of what was wrapped, in the
    model's order. A is drawn from `seed`, in that order. Raises UserError for a target, pattern or
    layer that chooses nothing, and for a model that has LoRA already.
    """
    if adapted(model):
        raise UserError("this model has LoRA attached already; load the base anew to attach other")
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    chosen: set[str] = set()
    for target in config.targets:
        matches = {name for name in linears if _matches(name, target)}
        if not matches:
            known = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise UserError(f"target {target!r} matches no linear; use names such as "
                            f"{', '.join(known)} or patterns over {next(iter(linears))!r}")
        chosen |= matches
    if config.layers:
        chosen &= _of_layers(linears, config.layers)
        if not chosen:
            raise UserError(f"layers {','.join(config.layers)} hold none of the targets "
                            f"{','.join(config.targets)}")
    wrapped = [name for name in linears if name in chosen]
    ranks = _by_pattern(wrapped, config.rank_pattern, "rank_pattern", config.rank)
    alphas = _by_pattern(wrapped, config.alpha_pattern, "alpha_pattern", config.alpha)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name in wrapped:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(
                linears[name], int(ranks[name]), alphas[name], config.dropout, config.rslora,
                config.dora, config.init))
    return wrapped


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name is meant: by its last part, or by a pattern over the whole."""
    return name.rpartition(".")[2] == pattern or fnmatch.fnmatchcase(name, pattern)


def _by_pattern(names: list[str], patterns: tuple[str, ...], setting: str,
                default: float) -> dict[str, float]:
    """A number for each name: that of the first `pattern=number` that matches, or `default`."""
    numbers = {}
    for pattern, _, number in (text.rpartition("=") for text in reversed(patterns)):
        matches = [name for name in names if _matches(name, pattern)]
        if not matches:
            raise UserError(f"{setting}: {pattern!r} matches no adapted linear; use a name such as "
                            f"{names[0].rpartition('.')[2]} or a pattern over {names[0]!r}")
        numbers |= dict.fromkeys(matches, float(number))
    return {name: numbers.get(name, default) for name in names}


def _of_layers(names: Iterable[str], layers: tuple[str, ...]) -> set[str]:
    """The names that stand in the layers asked for, each a number or a range such as 8-15."""
    found: dict[int, list[str]] = {}
    for name in names:
        if layer := re.search(r"\blayers\.(\d+)\.", name):
            found.setdefault(int(layer[1]), []).append(name)
    chosen: set[str] = set()
    for text in layers:
        first, _, last = text.partition("-")
        wanted = range(int(first), int(last or first) + 1)
        if not wanted or wanted[-1] not in found:
            raise UserError(f"layers: {text} is not in this model, which has layers 0 to "
                            f"{max(found)}")
        chosen.update(name for layer in wanted for name in found[layer])
    return chosen


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its name, in the model's order."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: each adapter's A and B (and m), the rows of new tokens."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def row_blocks(tensor: Tensor) -> list[slice]:
    """A tensor's rows in slices, each BLOCK bytes of float32: what is made of one stays small."""
    step = max(1, BLOCK // (4 * math.prod(tensor.shape[1:])))
    return [slice(start, start + step) for start in range(0, len(tensor), step)]


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or Inf: several times as fast as `isfinite`, which makes masks."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is passed on by both


@torch.no_grad()
def merge(model: nn.Module, undo: bool = False) -> None:
    """Folds every adapter into its W, and every trained embedding row into its place.

    The sum is made in float32 and rounded once. `undo=True` keeps W's bytes (a second copy of the
    adapted weights) so that `unmerge` can put them back. Raises UserError, the model unchanged,
    for a NaN or Inf in A, B, W or a row, for a W' that W's dtype cannot hold, and for a model that
    is merged or has nothing to merge. So every sum is made twice: to be looked at, and to be kept.
    """
    parts = _parts(model)
    for name, module in parts.items():
        if module.merged:
            raise UserError(f"{name} is merged already; merging twice would add BA twice")
        for key, tensor in module.named_parameters(recurse=False):
            if not all(is_finite(tensor[rows]) for rows in row_blocks(tensor)):
                raise UserError(f"{name}.{key} holds NaN or Inf; not merged. Go back to an earlier "
                                "checkpoint of the run")
        if isinstance(module, LoRALinear) and not all(
                is_finite(module.merged_weight(rows)) for rows in row_blocks(module.weight)):
            raise UserError(f"{name}: W + BA overflows {module.weight.dtype}; load the base in "
                            "bfloat16 or float32 before merging")
    for module in parts.values():
        module.merge(undo)


def unmerge(model: nn.Module) -> None:
    """Puts back, bit for bit, the base that `merge(model, undo=True)` changed."""
    parts = _parts(model)
    for name, module in parts.items():
        if not module.merged or module.base is None:
            raise UserError(f"{name} was not merged with undo=True; load the base anew instead")
    for module in parts.values():
        module.unmerge()


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have something to merge: LoRALinears, and an embedding with new rows."""
    parts = {name: module for name, module in model.named_modules() if hasattr(module, "merged")}
    if not parts:
        raise UserError("nothing to merge: this model has no adapter attached")
    return parts
