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

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1
(rsLoRA's scale: Kalajdzievski 2023, arXiv:2312.03732). With g = ∂L/∂y the gradients are, for one
token, ∂L/∂B = s · gᵀ (x Aᵀ) and ∂L/∂A = s · (g B)ᵀ x; `tests/test_gradients.py` holds them to it.

A and B are float32 masters whatever W's dtype is: in bfloat16 an update of 1e-4 would be lost.
"""

import fnmatch
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.config import LoraConfig, UserError


class LoRALinear(nn.Module):
    """A frozen linear without bias, and beside it the trained pair A, B.

    Takes the place of an `nn.Linear` and keeps its parameter name `weight`, so that a checkpoint's
    names stay what they are. "lora_" in a parameter's name is the whole rule for what is trained.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
                 rslora: bool = False) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)  # [out, in]
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        out_features, in_features = self.weight.shape
        # a = √5 gives U(-1/√in, 1/√in), nn.Linear's own start: what the paper's code and peft use.
        # Drawn on the CPU, so that a seed means the same start on every device.
        start = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
        device = self.weight.device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.merged = False
        self.base: Tensor | None = None  # W's bytes from before a merge that may be undone

    @property
    def scaling(self) -> float:
        """s, the factor before B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """ΔW = s · B A in float32, [out, in]."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] → [.., out], in x's dtype."""
        y = F.linear(x, self.weight)  # [.., out]
        if self.merged:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return torch.add(y, F.linear(low, self.lora_B.to(x.dtype)), alpha=self.scaling)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s · B A [out, in], added in float32 and rounded once to W's dtype."""
        return (self.weight.float() + self.delta()).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self, undo: bool = False) -> None:
        """W ← W + s · B A. Raises UserError where W's dtype cannot hold that."""
        merged = self.merged_weight()
        if not torch.isfinite(merged).all():
            raise UserError(f"W + BA overflows {self.weight.dtype}; load the base in bfloat16 or "
                            "float32 before merging")
        self.base = self.weight.clone() if undo else None
        self.weight.copy_(merged)
        self._mark(merged=True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W ← the bytes it had before `merge(undo=True)`."""
        self.weight.copy_(self.base)
        self.base = None
        self._mark(merged=False)

    def _mark(self, merged: bool) -> None:
        """Once merged, A and B act no more and are not trained."""
        self.merged = merged
        self.lora_A.requires_grad_(not merged)
        self.lora_B.requires_grad_(not merged)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features} → {out_features}, rank={self.rank}, scaling={self.scaling:g}"


def attach(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[str]:
    """Puts a LoRALinear in the place of each linear that `config.targets` choose; freezes all else.

    A target is a module's last name (`q_proj`) or a pattern over its full name (`layers.1?.mlp.*`).
    Returns the names of what was wrapped, in the model's order. A is drawn from `seed`, in that
    order. Raises UserError for a target that matches nothing and a model that has LoRA already.
    """
    if adapted(model):
        raise UserError("this model has LoRA attached already; load the base anew to attach other")
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    chosen = set()
    for target in config.targets:
        matches = {name for name in linears
                   if name.rpartition(".")[2] == target or fnmatch.fnmatchcase(name, target)}
        if not matches:
            known = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise UserError(f"target {target!r} matches no linear; use names such as "
                            f"{', '.join(known)} or patterns over {next(iter(linears))!r}")
        chosen |= matches
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in (wrapped := [name for name in linears if name in chosen]):
            parent, _, child = name.rpartition(".")
            lora = LoRALinear(linears[name], config.rank, config.alpha, config.dropout,
                              config.rslora)
            setattr(model.get_submodule(parent), child, lora)
    return wrapped


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its name, in the model's order."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: the A and B of every adapter and the rows of new tokens."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge(model: nn.Module, undo: bool = False) -> None:
    """Folds every adapter into its W, and every trained embedding row into its place.

    The sum is made in float32 and rounded once. `undo=True` keeps W's bytes (a second copy of the
    adapted weights) so that `unmerge` can put them back. Raises UserError, the model unchanged,
    for a NaN or Inf in A, B, W or a row, and for a model that is merged or has nothing to merge.
    """
    parts = _parts(model)
    for name, module in parts.items():
        if module.merged:
            raise UserError(f"{name} is merged already; merging twice would add BA twice")
        for key, tensor in module.named_parameters(recurse=False):
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name}.{key} holds NaN or Inf; not merged. Go back to an earlier "
                                "checkpoint of the run")
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
