"""Dense and flex attention are one rule; compiled layers are one graph a kind; recomputing keeps
less and changes nothing. What only a GPU runs is tested on one where there is one."""

import pytest
import torch
from conftest import GPU, LAW, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from minilora import attention, recompute
from minilora.attention import (
    LONG,
    attend,
    blocks,
    compiles,
    flex_fits,
    kernel_options,
    visible,
)
from minilora.config import FAMILIES, LoraConfig
from minilora.lora import attach, trainable
from minilora.loss import token_loss
from minilora.model import Gemma, KVCache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain_flex(monkeypatch):
    """On a CPU flex attention has a plain form that the compiler is asked for each time, and whose

    gradient it knows but refuses, because no kernel has it. A test can do without the one and have
    the other.
    """
    if not torch.cuda.is_available():
        module = "torch.nn.attention.flex_attention"
        monkeypatch.setattr(f"{module}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr(f"{module}._validate_device", lambda *_: None)


def packed(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Documents [B, T] of 1 to 90 tokens each, and padding at the end of every second row."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        at = number = 0
        while at < length - (row % 2) * length // 5:
            size = int(torch.randint(1, 91, (), generator=generator))
            number += 1
            documents[row, at:at + size] = number
            at += size
    return documents


def heads(B: int, N: int, K: int, T: int, H: int, dtype: torch.dtype = torch.float32,
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, N, T, H], keys and values [B, K, T, H], wide enough for a cap to bite."""
    generator = torch.Generator().manual_seed(1)
    return tuple((3 * torch.randn(B, heads, T, H, generator=generator)).to(dtype)
                 for heads in (N, K, K))


# --- one rule, two kernels ------------------------------------------------------------------------

@settings(LAW, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 3), st.none() | st.integers(1, 200), st.booleans(),
       st.integers(0, 99))
def test_blocks_show_what_the_dense_mask_shows(length, rows, window, with_documents, seed):
    """The rule that flex asks, and the tiles of 128 × 128 that it visits because of it."""
    documents = packed(rows, length, seed) if with_documents else None
    slots = torch.arange(length)
    dense = visible(slots, slots, documents, documents, window)
    made = blocks(length, documents, window, 24, CPU, torch.float32).mask
    assert torch.equal(create_mask(made.mask_mod, len(dense), 1, length, length, device="cpu"),
                       dense)
    tiles = -(-length // 128)
    whole = torch.zeros(len(dense), tiles * 128, tiles * 128, dtype=torch.bool)
    whole[:, :length, :length] = dense[:, 0]
    visited = whole.unflatten(2, (tiles, 128)).unflatten(1, (tiles, 128)).any(4).any(2)
    assert torch.equal(made.to_dense()[:, 0].bool(), visited)


def compare(T: int, K: int, H: int, window: int | None, with_documents: bool,
            softcap: float | None, device: torch.device, dtype: torch.dtype = torch.float32,
            ) -> float:
    """The largest difference of flex from dense, as a share, in what comes out and in gradients."""
    documents = packed(2, T).to(device) if with_documents else None
    slots = torch.arange(T, device=device)
    made = blocks(T, documents, window, H, device, dtype)
    dense = visible(slots, slots, documents, documents, window)
    results = []
    for mask, as_dtype in ((made, dtype), (dense, torch.float32)):
        inputs = [x.to(device, dtype).to(as_dtype).requires_grad_()
                  for x in heads(2, 4, K, T, H)]
        out = attend(*inputs, mask, 0.3 / H ** 0.5, softcap)
        out.backward(torch.cos(torch.arange(out.numel(), device=device).view_as(out)).to(out.dtype))
        results.append([out.detach(), *(x.grad for x in inputs)])
    return max(float((ours - theirs).abs().max() / theirs.abs().max())
               for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("T, K, window, with_documents", [
    (300, 2, None, True), (300, 4, 70, True), (256, 1, 150, False), (131, 2, 5, True),
    (5, 2, None, False)])
def test_flex_is_dense(T, K, window, with_documents, softcap):
    assert compare(T, K, 24, window, with_documents, softcap, CPU) < 1e-5


@GPU
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("T, K, H, window, with_documents", [
    (300, 2, 256, None, True), (1000, 4, 256, 70, True), (256, 1, 64, 150, False),
    (131, 2, 24, 5, True)])
def test_flex_is_dense_on_a_gpu(T, K, H, window, with_documents, softcap, dtype, bar):
    """The same by its kernels, in both dtypes, at Gemma's head dim and at odd lengths."""
    assert compare(T, K, H, window, with_documents, softcap, torch.device("cuda"), dtype) < bar


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_reads_with_flex_as_it_does_with_dense_masks(family, monkeypatch):
    """Packed rows; and a prompt padded on the left into a cache, which then decodes as it would."""
    model = tiny_model(family)
    ids, documents = (torch.arange(280).view(2, 140) * 37 + 11) % 512, packed(2, 140)
    left = (torch.arange(140) >= torch.tensor([[0], [30]])).long()
    results = []
    for flex in (False, True):
        monkeypatch.setattr("minilora.model.flex_fits", lambda *_, flex=flex: flex)
        cache = KVCache(model.config, 2, 150, torch.float32)
        results.append([model(ids, documents=documents), model(ids, None, left, cache),
                        model(ids[:, :1], cache=cache), model(ids[:, :3], cache=cache)])
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-4)
        assert not torch.equal(flex, dense)  # another kernel it was, at least in what came before


@pytest.mark.parametrize("T, S", [(1, 20), (20, 20)])
def test_the_plain_form_is_the_one_in_blocks(T, S):
    """A GPU without flex takes it, and every step of decoding."""
    q, k, v = (x.double() for x in heads(2, 4, 2, 20, 24))
    q, mask = q[:, :, :T].unflatten(1, (2, 2)), visible(torch.arange(S - T, S), torch.arange(S))
    expected = attention._BlockAttention.apply(q, k, v, mask.expand(2, -1, -1, -1), 5.0, False)
    torch.testing.assert_close(attention._plain(q, k, v, mask, 5.0), expected)


def test_flex_is_for_training_and_long_prompts_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "compiles", lambda device: True)
    gpu = torch.device("cuda")
    assert [flex_fits(gpu, 256, T) for T in (1, 2, 4096)] == [False, True, True]
    assert not flex_fits(CPU, 256, 4096) and not flex_fits(gpu, 8, 4096)
    with torch.no_grad():
        assert [flex_fits(gpu, 256, T) for T in (2, LONG - 1, LONG)] == [False, False, True]
    monkeypatch.setattr(attention, "compiles", lambda device: False)
    assert not flex_fits(gpu, 256, 4096)


@pytest.mark.parametrize("capability, small", [((8, 0), False), ((8, 6), True), ((8, 9), True),
                                               ((9, 0), False), ((10, 0), False), ((12, 0), True)])
def test_small_tiles_are_for_gpus_without_room(capability, small, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    for dtype, rows in ((torch.bfloat16, 32), (torch.float32, 16)):
        options = kernel_options(256, device, dtype)
        assert options == attention.FLEX_OPTIONS or small and options["bwd_BLOCK_M1"] == rows
        assert small == (options != attention.FLEX_OPTIONS)
        assert kernel_options(128, device, dtype) == attention.FLEX_OPTIONS
    assert kernel_options(256, CPU, dtype) == attention.FLEX_OPTIONS


def test_nothing_compiles_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles.__wrapped__(CPU)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert compiles.__wrapped__(CPU) and not compiles.__wrapped__(torch.device("meta"))


# --- compiled layers ------------------------------------------------------------------------------

def model_with_lora(family: str, **settings) -> Gemma:
    """LoRA on every linear, its numbers drawn; wide enough in F that GELU counts."""
    model = tiny_model(family, intermediate_size=288, **settings)
    attach(model, LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def compile_with(monkeypatch, backend, **settings) -> None:
    torch._dynamo.reset()
    call = torch.compile(recompute._call, backend=backend, **settings)
    monkeypatch.setattr(recompute, "compiled", lambda function: call)


@pytest.mark.parametrize("family, flex", [("gemma3_text", False), ("gemma2", False),
                                          ("gemma2", True)])
def test_layers_of_a_kind_share_one_graph(family, flex, monkeypatch):
    """No break in a layer, no graph of its own for a layer or for a new batch of the same shape.

    Flex attention knows the window while a dense mask hides it: a graph for each kind, or one.
    """
    graphs = []
    compile_with(monkeypatch, lambda graph, _: graphs.append(graph) or graph.forward,
                 fullgraph=True)
    monkeypatch.setattr("minilora.model.flex_fits", lambda *_: flex)
    model = model_with_lora(family)
    model.embed_tokens.add_rows([512], torch.ones(1, model.config.hidden_size))
    ids = (torch.arange(280).view(2, 140) * 37 + 11) % 512
    for seed in range(2):
        norms = []
        for model.compiled in (False, True):
            hidden = model.hidden_states(ids, documents=packed(2, 140, seed))
            loss, _ = token_loss(model, hidden, ids)
            norms.append([loss, *(g.norm() for g in
                                  torch.autograd.grad(loss, list(trainable(model).values())))])
        torch.testing.assert_close(*map(torch.stack, norms), rtol=1e-3, atol=0)
        assert len(graphs) == (2 if flex else 1)


def loss_and_gradients(model: Gemma) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Of one batch, and the bytes that autograd keeps of the layers for it."""
    device, kept = model.embed_tokens.weight.device, {}
    ids = (torch.arange(120, device=device).view(2, 60) * 37 + 11) % 512

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # The innermost hooks count: those of `cheap` hand on what they keep themselves.
    inner = recompute.pack
    with pytest.MonkeyPatch.context() as patch, \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(recompute, "pack", lambda tensor: keep(tensor)
                      if inner(tensor) is tensor else inner(tensor))
        patch.setattr(recompute, "save_on_cpu", lambda pin_memory: (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)))
        hidden = model.hidden_states(ids, documents=packed(2, 60).to(device))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    loss, _ = token_loss(model, hidden, ids)
    loss.backward()
    gradients = {name: p.grad for name, p in trainable(model).items()}
    return loss.detach(), gradients, sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_keeps_less_and_changes_no_bit(family, dtype):
    base, before, most = loss_and_gradients(model_with_lora(family, dtype=dtype))
    assert all(gradient.any() for gradient in before.values())
    for mode, share in (("cheap", 0.75), ("all", 0.1), ("offload", 0.1)):
        model = model_with_lora(family, dtype=dtype)
        model.recompute = mode
        loss, gradients, kept = loss_and_gradients(model)
        assert torch.equal(loss, base) and kept < share * most, (mode, kept / most)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, before[name]), (mode, name)


def test_recomputing_with_dropout_drops_the_same():
    gradients = []
    for mode in ("none", "cheap", "all"):
        model = tiny_model("gemma2")
        attach(model, LoraConfig(rank=2, dropout=0.5))
        model.recompute = mode
        torch.manual_seed(3)
        gradients.append(loss_and_gradients(model.train())[1])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
        assert torch.equal(gradients[2][name], gradient), name


def test_a_compiled_layer_keeps_less_too(monkeypatch):
    """By a budget: inductor's own choice of what to keep, without the code that inductor makes."""
    compile_with(monkeypatch, "aot_eager_decomp_partition")
    base, before, most = loss_and_gradients(model_with_lora("gemma", num_hidden_layers=1))
    sizes = []
    for mode in ("none", "cheap"):
        model = model_with_lora("gemma", num_hidden_layers=1)
        model.recompute, model.compiled = mode, True
        torch._dynamo.reset()
        loss, gradients, kept = loss_and_gradients(model)
        sizes.append(kept)
        torch.testing.assert_close(loss, base)
        for name, gradient in gradients.items():
            assert (gradient - before[name]).norm() < 1e-4 * before[name].norm(), name
    assert sizes[1] < 0.85 * sizes[0] < most


@GPU
@pytest.mark.parametrize("mode", ["none", "cheap", "all", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_are_eager_ones_on_a_gpu(family, mode):
    torch._dynamo.reset()  # or a mode would take over what was compiled for another
    results = []
    for compiled in (False, True):
        model = model_with_lora(family).cuda()
        model.recompute, model.compiled = mode, compiled
        results.append(loss_and_gradients(model)[:2])
    (loss, gradients), (theirs, others) = results
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() < 1e-3 * gradient.norm(), name


@GPU
@pytest.mark.parametrize("family, dtype", [*((family, torch.float32) for family in FAMILIES),
                                           ("gemma2", torch.bfloat16)])
def test_a_model_learns_with_flex_as_it_does_with_dense_masks_on_a_gpu(family, dtype):
    """Packed rows past the window, with caps: loss and gradient, eager and compiled.

    In bfloat16 every way is off from float32 by roundings of its own, and none may be off by twice
    as much as dense masks are. These models triple a gradient in each layer, its noise, too, which
    is why there are two layers then, and small adapters.
    """
    torch._dynamo.reset()
    found = {}
    for way in ("float32", "dense", "flex", "compiled"):
        settings = {} if dtype == torch.float32 else {"num_hidden_layers": 2}
        model = model_with_lora(family, dtype=torch.float32 if way == "float32" else dtype,
                                **settings).cuda()
        model.compiled = way == "compiled"
        with torch.no_grad():
            for parameter in trainable(model).values() if settings else ():
                parameter.mul_(0.2)
        with pytest.MonkeyPatch.context() as patch:
            if way in ("float32", "dense"):
                patch.setattr("minilora.model.flex_fits", lambda *_: False)
            loss, gradients, _ = loss_and_gradients(model)
        found[way] = loss, torch.cat([each.flatten() for each in gradients.values()])
    exact, straight = found.pop("float32")
    off = {way: (float((loss - exact).abs() / exact),
                 float((gradient - straight).norm() / straight.norm()))
           for way, (loss, gradient) in found.items()}
    loss_bar, bar = (1e-5, 1e-3) if dtype == torch.float32 else (5e-3, 2 * off["dense"][1])
    assert bar < 0.2, off
    for way in ("flex", "compiled"):
        assert off[way][0] < loss_bar and off[way][1] < bar, (way, off)
