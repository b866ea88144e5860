"""One model over many devices: what FSDP shares out, what is gathered, and what is computed twice to save memory.

Every process holds a part of each weight, of its gradient, moments and average. A layer of the large stacks is gathered
when it is called and let go at once; all else is gathered for the time of a loss. Without torchrun nothing is shared
out, and the same statements run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from antiphon.aut import EncoderLayer
from antiphon.layers import DecoderLayer
from antiphon.train import ranks


def stacked(modules: nn.Module) -> list[nn.Module]:
    """The layers of AuT, Thinker and Talker. Not MTP's: it runs as often as a batch needs, another number each time."""
    layers = [(n, m) for n, m in modules.named_modules() if isinstance(m, EncoderLayer | DecoderLayer)]
    return [m for n, m in layers if not n.startswith("mtp.")]


def recompute(modules: nn.Module) -> None:
    """Keep of each large layer what goes into it, and compute the rest again on the way back."""
    for layer in stacked(modules):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def share_out(root: nn.Module, device: torch.device) -> None:
    """Leave a part of each weight of `root` to each process; gradients are added up over all of them."""
    if not ranks.many():
        return
    mesh = init_device_mesh(device.type, (ranks.world(),))
    for module in (*stacked(root), root):  # types are what autocast makes of them, as in one process
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in shared_out(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def shared_out(root: nn.Module) -> list[FSDPModule]:
    """The modules whose weights are gathered together."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """All weights of `root` whole in every process, and its modules plain ones, which a single process may call."""
    kept = list[tuple[Any, Any, Any]]()
    for module in shared_out(root):
        module.unshard()
        held: Any = module
        kept.append((held, held._forward_pre_hooks, held._forward_hooks))
        held._forward_pre_hooks, held._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for held, before, after in kept:
            held._forward_pre_hooks, held._forward_hooks = before, after
            held.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors from the parts that all processes hold; on the CPU of rank 0 alone where they were shared out."""
    made = dict[str, Tensor]()
    for name, tensor in tensors.items():  # one after another: no device needs room for all of them
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.rank() == 0:
            made[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return made


def put(target: Tensor, value: Tensor) -> None:
    """Fill a tensor, or the part of it that this process holds, from a whole one."""
    if isinstance(target, DTensor):
        value = local(distribute_tensor(value.to(target.device), target.device_mesh, target.placements))
    local(target).copy_(value)
