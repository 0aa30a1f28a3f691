"""The Transformer's own laws, and the configs that it is built from."""

import dataclasses
import functools
import itertools

import pytest
import torch
from conftest import LAW, tiny_config, tiny_model, tiny_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import recompute
from minilora.config import GemmaConfig, UserError
from minilora.data import IGNORED
from minilora.loss import token_loss
from minilora.model import Gemma, KVCache

FAMILIES = ("gemma", "gemma2", "gemma3_text")
IDS = (torch.arange(60).view(2, 30) * 37 + 11) % 512


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(family):
    model = tiny_model(family)
    changed = IDS.clone()
    changed[:, 20] += 1
    before, after = model(IDS), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@torch.no_grad()
def test_the_window_is_strict():
    """With window layers only, what a query sees reaches back window - 1 a layer, no further."""
    model = tiny_model("gemma2", num_hidden_layers=1, layer_types=["sliding_attention"])
    changed = IDS.clone()
    changed[:, 5] += 1
    same = (model(IDS) == model(changed)).all(-1)[0]
    assert same.tolist() == [not 5 <= t < 5 + 8 for t in range(30)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_and_padded_equal_alone(family):
    """Two documents and padding in one row, each as it would be in a row of its own."""
    model = tiny_model(family)
    row = torch.cat([IDS[0, :18], IDS[1, :13], torch.zeros(4, dtype=torch.int64)])[None]
    documents = torch.tensor([[1] * 18 + [2] * 13 + [0] * 4])
    positions = torch.cat([torch.arange(18), torch.arange(13), torch.zeros(4, dtype=int)])[None]
    packed = model(row, positions, documents)
    assert packed.isfinite().all()
    for start, ids in ((0, IDS[:1, :18]), (18, IDS[1:, :13])):
        torch.testing.assert_close(packed[:, start:start + ids.shape[1]], model(ids),
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [[30], [1] * 30, [11, 1, 1, 9, 8]])
@torch.no_grad()
def test_cached_equals_uncached_past_the_window(family, chunks):
    model = tiny_model(family)
    cache = KVCache(model.config, 2, 30, torch.float32)
    parts = [model(part, cache=cache) for part in IDS.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="holds 30 tokens; 31"):
        model(IDS[:, :1], cache=cache)


def full_cache(model, *sizes):
    """A cache whose window layers keep everything, as the others do."""
    config = dataclasses.replace(model.config, sliding_window=None)
    return KVCache(config, *sizes, torch.float32)


@settings(LAW, max_examples=30)
@given(data=st.data())
@torch.no_grad()
def test_a_ring_is_as_good_as_a_cache_of_everything(data):
    """Prompts shorter and longer than the window of 8, any chunks, padding, a row that leaves."""
    model = tiny_model(data.draw(st.sampled_from(FAMILIES[1:])), num_hidden_layers=2,
                       layer_types=["sliding_attention", "full_attention"])
    lengths = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 7, 8, 9, 16]), min_size=1))
    ends = [end for end in itertools.accumulate(lengths) if end <= 30]
    documents = torch.ones(2, 30, dtype=torch.int64)
    documents[1, :data.draw(st.integers(0, ends[0] - 1))] = 0
    positions = (documents.cumsum(1) - 1).clamp(min=0)
    leaves = data.draw(st.sampled_from([None, *ends]))

    plain = model(IDS, positions, documents)
    ring, full = KVCache(model.config, 2, ends[-1], torch.float32), full_cache(model, 2, ends[-1])
    rows = [0, 1]
    for start, end in itertools.pairwise([0, *ends]):
        if start == leaves:
            rows = [1]
            ring.keep(rows)
            full.keep(rows)
        part = [each[rows, start:end] for each in (IDS, positions, documents)]
        text = part[-1] > 0  # what padding makes of padding is nobody's concern
        by_ring = model(*part, ring)[text]
        torch.testing.assert_close(by_ring, model(*part, full)[text], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_ring, plain[rows, start:end][text], rtol=1e-4, atol=1e-4)
    sizes = [each.shape[3] for each in ring.rings + full.rings]
    assert sizes == [min(8, ends[-1])] + [ends[-1]] * 3


@pytest.mark.parametrize("chunks", [[3], [8], [9], [21], [16, 5], [5, 16, 1, 1], [1] * 20])
@torch.no_grad()
def test_a_ring_holds_the_last_tokens_of_the_window_each_in_its_cell(chunks):
    model, total = tiny_model("gemma2"), sum(chunks)
    ring, full = KVCache(model.config, 2, 30, torch.float32), full_cache(model, 2, 30)
    for cache in (ring, full):
        for part in IDS[:, :total].split(chunks, 1):
            model(part, cache=cache)
    for slot in range(max(0, total - 8), total):
        torch.testing.assert_close(ring.rings[0][..., slot % 8, :], full.rings[0][..., slot, :])
    assert ring.length == int(ring.next) == total


def test_five_window_layers_to_one_make_a_long_cache_a_fifth():
    """gemma-3-270m at 32,768 tokens: 18 layers, 15 of them with a window of 512."""
    config = tiny_config("gemma3_text", num_hidden_layers=18, sliding_window=512,
                         max_position_embeddings=32_768)
    sizes = [sum(ring.nbytes for ring in KVCache(of, 1, 32_768, torch.bfloat16, "meta").rings)
             for of in (config, dataclasses.replace(config, sliding_window=None))]
    share = (15 * 512 + 3 * 32_768) / (18 * 32_768)
    assert share < 0.19 and sizes[0] == share * sizes[1]


@torch.no_grad()
def test_compiled_steps_are_plain_steps_in_one_graph_a_kind_of_layer(monkeypatch):
    from torch._dynamo.backends.debugging import aot_eager  # takes seconds to import

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)  # all of the compiler but its kernels, which take a minute

    monkeypatch.setattr(recompute, "compiled", functools.cache(
        lambda function: torch.compile(function, backend=backend, fullgraph=True)))
    model = tiny_model("gemma2")
    cache = KVCache(model.config, 2, 14, torch.float32)
    cache.compiled = True
    parts = [model(part, cache=cache) for part in IDS[:, :14].split([5] + [1] * 9, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS[:, :14]), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2  # the rings are of 8 and of 14 cells


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_no_gradient(family):
    model = tiny_model(family).requires_grad_(True)
    grads = []
    for model.recompute in ("none", "cheap", "all", "offload"):
        model.zero_grad()
        total, _ = token_loss(model, model.hidden_states(IDS), IDS)
        total.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()
                      if p.grad is not None})
    for others in grads[1:]:
        assert grads[0].keys() == others.keys()
        assert all(torch.equal(grad, others[name]) for name, grad in grads[0].items())


def test_batch_of_two_is_two_of_one():
    """Sums and counts add up, whatever is trained in each row."""
    model = tiny_model("gemma2")
    labels = IDS.clone()
    labels[0, :25] = IGNORED
    both, number = token_loss(model, model.hidden_states(IDS), labels)
    alone = [token_loss(model, model.hidden_states(IDS[i:i + 1]), labels[i:i + 1])
             for i in range(2)]
    assert number == sum(count for _, count in alone) == 5 + 29
    torch.testing.assert_close(both, alone[0][0] + alone[1][0])


@torch.no_grad()
def test_logits_are_float32_and_capped():
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    logits = model(IDS)
    assert logits.dtype == torch.float32 and logits.shape == (2, 30, 512)
    assert logits.abs().max() <= 30.0


# --- configs --------------------------------------------------------------------------------------

def test_both_spellings_of_a_config_read_alike():
    """What the hub's files say and what transformers 5 writes."""
    old = dict(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6,
               rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = dict(layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
               rope_scaling=None, rope_parameters={
                   "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                   "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}})
    assert tiny_config("gemma3_text", **old) == tiny_config("gemma3_text", **new)
    assert (tiny_config("gemma2", rope_theta=5e4) == tiny_config(
        "gemma2", rope_parameters={"rope_type": "default", "rope_theta": 5e4}))


def test_image_text_gemma3_gives_its_text_config():
    """google/gemma-3-4b-it's config.json names few keys and leaves the rest to the family."""
    config = GemmaConfig.from_dict({"model_type": "gemma3", "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024}, "vision_config": {}})
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (262208, 256, 4)
    assert (config.sliding_window, config.rope_factor, config.rope_theta) == (1024, 8.0, 1e6)
    assert config.layer_types.count("full_attention") == 5


def test_gemma1_means_the_tanh_form_whatever_hidden_act_says():
    raw = tiny_raw("gemma", hidden_act="gelu", hidden_activation=None)
    config = GemmaConfig.from_dict(raw)
    assert config.query_pre_attn_scalar == config.head_dim
    assert set(config.layer_types) == {"full_attention"} and config.sliding_window is None


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "model_type is 'llama'"),
    (dict(model_type=None), "model_type is None"),
    (dict(hidden_size="72"), "hidden_size is '72'"),
    (dict(hidden_size=None), "hidden_size is None"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    (dict(num_key_value_heads=3), "not a multiple"),
    (dict(head_dim=7), "head_dim is 7"),
    (dict(hidden_activation="silu"), "hidden_activation is 'silu'"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"),
    (dict(layer_types=["full_attention"]), "layer_types"),
    (dict(layer_types=["full_attention"] * 3 + ["chunked"]), "layer_types"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type is 'yarn'"),
    (dict(rope_theta=-1), "rope_theta is -1"),
    (dict(rms_norm_eps=True), "rms_norm_eps is True"),
])
def test_configs_that_are_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        GemmaConfig.from_dict({**tiny_raw("gemma2"), **change}, "base/config.json")
    assert str(caught.value).startswith("base/config.json: ") and "\n" not in str(caught.value)


def test_every_parameter_is_named_as_the_checkpoint_names_it():
    names = {name for name, _ in Gemma(tiny_config("gemma3_text")).named_parameters()}
    assert {"embed_tokens.weight", "norm.weight", "layers.6.self_attn.q_norm.weight",
            "layers.0.post_feedforward_layernorm.weight", "layers.3.mlp.gate_proj.weight"} <= names
    assert len(names) == 2 + 7 * 13
