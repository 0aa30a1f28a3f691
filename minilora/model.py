"""Gemma 1, 2 and 3, the text part, driven by the config alone.

    ids ─► embedding × √D ─► layer ─► … ─► layer ─► norm ─► hidden ─► table ─► cap ─► logits

    layer:   x ──┬─► norm ─► attention ─► (norm) ─►(+)──┬─► norm ─► gate·up, down ─► (norm) ─►(+)─►
                 └──────────────────────────────────┘   └────────────────────────────────────┘

What differs between the generations (the norms in brackets are Gemma 2's and 3's):

    1  Gemma Team 2024, arXiv:2403.08295    every layer looks at everything
    2  Gemma Team 2024, arXiv:2408.00118    soft-caps; every other layer looks through a window
    3  Gemma Team 2025, arXiv:2503.19786    query and key norms, no caps, five window layers to one

Modules are named as the checkpoint names them. Details that no paper tells were read off
transformers `modeling_gemma.py`, `modeling_gemma2.py` and `modeling_gemma3.py`, and hold against
them in `tests/test_parity.py`. There is no mention of LoRA here: it takes the place of linears.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.attention import Blocks, attend, blocks, flex_fits, visible
from minilora.config import GemmaConfig
from minilora.embedding import TokenEmbedding
from minilora.linear import Linear
from minilora.recompute import run_layer


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · (1 + w), in float32; w is stored around 0, unlike Llama's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Normalized.apply(x, self.weight, self.eps)
        return _normalized(x, self.weight, self.eps)


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)


class _Normalized(torch.autograd.Function):
    """RMSNorm that keeps x alone, where autograd would keep a copy of it in float32.

    With s = 1 / √(mean(x²) + ε), n = s x and g = ∂L/∂y: dw = Σ g n and, with h = g (1 + w),

        dx = s (h - n · mean(h n))
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normalized(x, weight, eps)

    @staticmethod
    def again(ctx) -> Tensor:
        """What forward gave, from what it kept (minilora/recompute.py)."""
        return _normalized(*ctx.saved_tensors, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [.., D] → gradients of x and, where it is trained, w."""
        x, weight = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)         # [.., 1]
        normed = wide * scale                                                       # [.., D]
        d_normed = grad * (1.0 + weight.to(wide.dtype))
        dx = scale * torch.addcmul(
            d_normed, normed, (d_normed * normed).mean(-1, keepdim=True), value=-1)
        dw = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), None if dw is None else dw.to(weight.dtype), None


def rotation(positions: Tensor, head_dim: int, theta: float, factor: float,
             dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, H] of the angles that RoPE turns by (arXiv:2104.09864, section 3.4)."""
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    # Inverted, then multiplied, as transformers does: far out another rounding is another angle.
    turns = 1.0 / theta ** steps / factor                                       # [H/2]
    angles = positions[:, None, :, None].to(wide) * turns                       # [B, 1, T, H/2]
    angles = torch.cat([angles, angles], -1)                                    # [B, 1, T, H]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (i, i + H/2) of x [B, N, T, H] by its angle."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Memory(NamedTuple):
    """The ring of one layer in a cache, and where in it the tokens of a forward pass go."""

    keys: Tensor    # [B, K, R, H]
    values: Tensor  # [B, K, R, H]
    cells: Tensor   # of the new tokens that stay, the last R at most
    old: int        # how many cells were written before

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, K, T, H]; returns what these tokens may look at, [B, K, S, H]."""
        return self._extend(self.keys, k), self._extend(self.values, v)

    def _extend(self, ring: Tensor, new: Tensor) -> Tensor:
        # One token looks at the ring that holds it. Of several the last would take the cells of
        # what the first still see, so they look at what was there and at themselves.
        seen = ring if new.shape[2] == 1 else torch.cat([ring[:, :, :self.old], new], 2)
        ring.index_copy_(2, self.cells, new[:, :, -len(self.cells):])
        return seen


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory taken once.

    A layer's memory is a ring of R cells, and the token of slot s lies in cell s mod R. A layer
    that looks at everything has a cell for every token, one with a window no more than the window:

        slots 0 … 9, window 4     everything   0 1 2 3 4 5 6 7 8 9
                                  window       8 9 6 7

    So five window layers to one make Gemma 3's cache a fifth of the size in long contexts. A single
    token looks at its ring as a whole, cells not yet written being masked: each step of decoding
    has the same shapes, and knows its slot from a tensor, which a CUDA graph can count up.
    """

    def __init__(self, config: GemmaConfig, batch: int, capacity: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        window = min(capacity, config.sliding_window or capacity)
        self.sizes = {"full_attention": capacity, "sliding_attention": window}  # R
        self.rings = [torch.zeros(2, batch, config.num_key_value_heads, self.sizes[kind],
                                  config.head_dim, dtype=dtype, device=device)
                      for kind in config.layer_types]               # keys and values
        self.documents = torch.ones(batch, capacity, dtype=torch.int64, device=device)
        self.capacity, self.length = capacity, 0
        self.next = torch.zeros(1, dtype=torch.int64, device=device)  # the length, on the device
        self.compiled = False  # single tokens go through compiled layers

    def begin(self, T: int, documents: Tensor | None) -> Tensor:
        """The slots [T] of the next T tokens, whose documents [B, T] it keeps (default: 1)."""
        if self.length + T > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.length + T} are "
                             "needed")
        slots = self.next + torch.arange(T, device=self.next.device)
        if documents is not None:
            self.documents.index_copy_(1, slots, documents)
        return slots

    def place(self, kind: str, slots: Tensor) -> tuple[Tensor, Tensor, int]:
        """Where new tokens at `slots` [T] go in the rings of a kind of layer.

        Returns the slots of the keys that they may look at [S], the cells that they are written to,
        and how many cells were written before.
        """
        size = self.sizes[kind]
        cells = slots[-size:] % size
        if len(slots) == 1:
            return _held(slots, size, size), cells, size
        old = min(self.length, size)
        return torch.cat([_held(slots[:1] - 1, old, size), slots]), cells, old

    def end(self, T: int) -> None:
        """The T tokens are in the rings of all layers."""
        self.length += T
        self.next += T

    def rewind(self, length: int) -> bool:
        """Forgets all tokens but the first `length`, if no ring has given up one that they see."""
        if 0 < length < self.length and self.length > min(self.sizes.values()):
            return False
        self.length = length
        self.next.fill_(length)
        return True

    def keep(self, rows: list[int]) -> None:
        """Forgets all rows of the batch but these."""
        self.rings = [ring[:, rows] for ring in self.rings]
        self.documents = self.documents[rows]


def _held(newest: Tensor, count: int, size: int) -> Tensor:
    """The slots that the first `count` cells of a ring hold, [count], when `newest` is the last.

    A cell not yet written has the first slot that it will hold: a later one, which nobody sees.
    """
    cells = torch.arange(count, device=newest.device)
    slots = newest - (newest - cells) % size
    return torch.where(slots < 0, cells, slots)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar ** -0.5
        self.softcap = config.attn_logit_softcapping
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(config.hidden_size, heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, kv_heads * self.head_dim)
        self.o_proj = Linear(heads * self.head_dim, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | Blocks, turn: tuple[Tensor, Tensor],
                memory: Memory | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, N, T, H]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, K, T, H]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, K, T, H]
        q = rotate(self.q_norm(q), turn)
        k = rotate(self.k_norm(k), turn)
        if memory is not None:
            k, v = memory.extend(k, v)                                      # [B, K, S, H]
        out = attend(q, k, v, mask, self.scale, self.softcap)               # [B, N, T, H]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))           # [B, T, D]


class MLP(nn.Module):
    """down(GELU(gate x) · up x), GELU in its tanh form (GeGLU, arXiv:2002.05202)."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """One block: attention and feed-forward, each between norms, each added to the stream."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, mask: Tensor | Blocks, turn: tuple[Tensor, Tensor],
                memory: Memory | None = None) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        if self.sandwich:
            attended = self.self_attn(self.input_layernorm(x), mask, turn, memory)
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        # Gemma 1 has two norms, and the one named "post_attention" comes before the feed-forward.
        x = x + self.self_attn(self.input_layernorm(x), mask, turn, memory)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma(nn.Module):
    """The whole model: `hidden_states` runs the layers, `logits` the tied table and the cap."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = "none"  # what backward makes again, in the words of minilora/recompute.py
        self.compiled = False    # layers are compiled where gradients are wanted

    def hidden_states(self, input_ids: Tensor, positions: Tensor | None = None,
                      documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """input_ids [B, T] int64 → hidden states after the last norm, [B, T, D].

        positions [B, T] default to 0, 1, … (after what the cache holds). documents [B, T]: a token
        sees its own document only; padding gets a number of its own. The cache keeps those of
        earlier tokens, and counts a token without a document as of document 1.
        """
        T = input_ids.shape[1]
        if cache is None:
            slots = torch.arange(T, device=input_ids.device)
        else:
            slots = cache.begin(T, documents)
            documents = cache.documents[:, slots]
        if positions is None:
            positions = slots[None]

        config, x = self.config, self.embed_tokens.encode(input_ids)    # [B, T, D]
        alone = cache is None or not cache.length  # the rows read themselves and nothing else
        flex = alone and flex_fits(x.device, config.head_dim, T)
        views, places = {}, {}  # per kind of layer: mask and rotation, and its part of the cache
        for kind in dict.fromkeys(config.layer_types):
            near = kind == "sliding_attention"
            window = config.sliding_window if near else None
            keys, key_docs = slots, documents
            if cache is not None:
                keys, *places[kind] = cache.place(kind, slots)          # [S]
                key_docs = cache.documents[:, keys]
            mask = (blocks(T, documents, window, config.head_dim, x.device, x.dtype) if flex else
                    visible(slots, keys, documents, key_docs, window))  # [B, 1, T, S]
            theta = config.rope_local_theta if near else config.rope_theta
            factor = 1.0 if near else config.rope_factor
            views[kind] = mask, rotation(positions, config.head_dim, theta, factor, x.dtype)
        for number, (layer, kind) in enumerate(zip(self.layers, config.layer_types, strict=True)):
            if cache is not None:
                view = (*views[kind], Memory(*cache.rings[number], *places[kind]))
                x = run_layer(layer, x, view, "none", T == 1 and cache.compiled)
            elif torch.is_grad_enabled():
                x = run_layer(layer, x, views[kind], self.recompute, self.compiled)
            else:
                x = layer(x, *views[kind])
        if cache is not None:
            cache.end(T)
        return self.norm(x)

    def logits(self, hidden: Tensor, capped: bool = True) -> Tensor:
        """hidden [.., D] → logits [.., V'] in float32 (or wider), with their soft-cap if any.

        The cap changes no order. To find the largest alone it can be left out, which saves a sixth
        of a step of eight rows on a CPU.
        """
        logits = self.embed_tokens.decode(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.final_logit_softcapping
        return logits if cap is None or not capped else cap * torch.tanh(logits / cap)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None,
                documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """input_ids [B, T] → logits [B, T, V'] in float32."""
        return self.logits(self.hidden_states(input_ids, positions, documents, cache))
