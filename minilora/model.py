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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.attention import attend, visible
from minilora.config import GemmaConfig
from minilora.embedding import TokenEmbedding


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · (1 + w), in float32; w is stored around 0, unlike Llama's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


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


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory taken once."""

    def __init__(self, config: GemmaConfig, batch: int, capacity: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity,
                 config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.documents = torch.ones(batch, capacity, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [B, K, T, H] after what is there; returns all of them, [B, K, S, H]."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows: list[int]) -> None:
        """Forgets all rows of the batch but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.documents = self.documents[rows]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: GemmaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar ** -0.5
        self.softcap = config.attn_logit_softcapping
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor],
                cache: KVCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, N, T, H]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, K, T, H]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, K, T, H]
        q = rotate(self.q_norm(q), turn)
        k = rotate(self.k_norm(k), turn)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                           # [B, K, S, H]
        out = attend(q, k, v, mask, self.scale, self.softcap)               # [B, N, T, H]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))           # [B, T, D]


class MLP(nn.Module):
    """down(GELU(gate x) · up x), GELU in its tanh form (GeGLU, arXiv:2002.05202)."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """One block: attention and feed-forward, each between norms, each added to the stream."""

    def __init__(self, config: GemmaConfig, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor],
                cache: KVCache | None = None) -> Tensor:
        """x [B, T, D] → [B, T, D]."""
        if self.sandwich:
            attended = self.self_attn(self.input_layernorm(x), mask, turn, cache)
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        # Gemma 1 has two norms, and the one named "post_attention" comes before the feed-forward.
        x = x + self.self_attn(self.input_layernorm(x), mask, turn, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma(nn.Module):
    """The whole model: `hidden_states` runs the layers, `logits` the tied table and the cap."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # forget activations in forward, make them again in backward

    def hidden_states(self, input_ids: Tensor, positions: Tensor | None = None,
                      documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """input_ids [B, T] int64 → hidden states after the last norm, [B, T, D].

        positions [B, T] default to 0, 1, … (after what the cache holds). documents [B, T]: a token
        sees its own document only; padding gets a number of its own. The cache keeps those of
        earlier tokens, and counts a token without a document as of document 1.
        """
        T = input_ids.shape[1]
        past = cache.length if cache is not None else 0
        if cache is not None and past + T > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens; {past + T} are needed")
        slots = torch.arange(past + T, device=input_ids.device)
        if positions is None:
            positions = slots[None, past:]
        key_docs = documents
        if cache is not None:
            if documents is not None:
                cache.documents[:, past:past + T] = documents
            key_docs = cache.documents[:, :past + T]
            documents = key_docs[:, past:]

        config, x = self.config, self.embed_tokens.encode(input_ids)    # [B, T, D]
        views = {}  # per kind of layer: the mask, and the rotation of its positions
        for kind in dict.fromkeys(config.layer_types):
            near = kind == "sliding_attention"
            mask = visible(slots[past:], slots, documents, key_docs,
                           config.sliding_window if near else None)     # [B, 1, T, S]
            theta = config.rope_local_theta if near else config.rope_theta
            factor = 1.0 if near else config.rope_factor
            views[kind] = mask, rotation(positions, config.head_dim, theta, factor, x.dtype)
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, *views[kind], use_reentrant=False)
            else:
                x = layer(x, *views[kind], cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., D] → logits [.., V'] in float32 (or wider), with their soft-cap if any."""
        logits = self.embed_tokens.decode(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None,
                documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """input_ids [B, T] → logits [B, T, V'] in float32."""
        return self.logits(self.hidden_states(input_ids, positions, documents, cache))
