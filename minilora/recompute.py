"""How a layer is run where gradients are wanted: what autograd keeps of it, and compiled or not.

What is not kept backward makes again: memory for time, in four steps.

    none      everything is kept that backward needs
    cheap     what takes a few operations a number is made again: the norms, GELU, GELU · up. No
              matrix product is, so a few percent of time buy about a third of the memory
    all       a layer keeps its input and runs once more in backward: a third more time
    offload   the same, and the input waits in the host's memory: for the longest rows

The gradients are the same bits in each, where layers are not compiled: what is made again is made
by the same operations.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from minilora.attention import compiled


def run_layer(layer: nn.Module, x: Tensor, view: tuple, mode: str, compile: bool) -> Tensor:
    """layer(x, *view), of which autograd keeps what the mode says."""
    call = compiled(_call) if compile else _call
    if mode == "none":
        return call(layer, x, view)
    if mode == "cheap":
        with _within_budget() if compile else saved_tensors_hooks(pack, unpack):
            return call(layer, x, view)
    # Only x goes through checkpoint, so that the masks and angles of all layers are not offloaded.
    with save_on_cpu(pin_memory=x.is_cuda) if mode == "offload" else nullcontext():
        return checkpoint(lambda x: call(layer, x, view), x, use_reentrant=False)


def _call(layer: nn.Module, x: Tensor, view: tuple) -> Tensor:
    """One function for every layer, so that those of one kind share what the compiler made."""
    return layer(x, *view)


# How the output of a node of autograd's graph is made again from what the node keeps anyway.
_AGAIN: dict[str, Callable[[Node], Tensor]] = {
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
}


def _maker(node: Node | None) -> Callable[[Node], Tensor] | None:
    """What makes a node's output again, if that is cheap: `_AGAIN`, or a Function's own `again`."""
    if node is None or node.name() in _AGAIN and None in (edge for edge, _ in node.next_functions):
        return None  # with a factor that needs no gradient, a product does not keep the other
    return _AGAIN.get(node.name()) or getattr(getattr(node, "_forward_cls", None), "again", None)


def pack(tensor: Tensor) -> object:
    """What `cheap` keeps of a tensor: itself, or the node that makes it and the tensor's layout.

    A tensor may be a view of what the node made, as the rows of a linear's input are.
    """
    node = (tensor if tensor._base is None else tensor._base).grad_fn
    if _maker(node) is None:
        return tensor
    return node, tensor.shape, tensor.stride(), tensor.storage_offset()


def unpack(kept: object) -> Tensor:
    """The tensor that `pack` was given."""
    if isinstance(kept, Tensor):
        return kept
    node, *layout = kept
    with torch.no_grad():
        return _maker(node)(node).as_strided(*layout)


def _within_budget() -> AbstractContextManager:
    """A compiled layer chooses what to keep, here of 80 % of the bytes that are fastest to keep.

    The compiler makes again what costs the fewest FLOPs first, and all but products costs none.
    """
    import torch._functorch.config

    return torch._functorch.config.patch(activation_memory_budget=0.8)
