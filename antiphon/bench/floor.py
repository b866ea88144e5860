"""The least that a frame can take here: weights that it reads over the bandwidth, operations over the rate.

Both are counted on one step of each box for one conversation, and measured on this machine just before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from antiphon.binding import bound
from antiphon.generate import Omni
from antiphon.layers import Experts, SparseMLP

READ = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes that the bandwidth is measured on
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that the rate is measured on
TRIES = 5


def steps(model: Omni) -> dict[str, Callable[[], object]]:
    """One step of each box for one conversation, as it is alone."""
    speech, device, dtype = model.speaking(), model.device, model.dtype
    thought, said = model.thinker.init_state(1, 512, device, dtype), speech.talker.init_state(1, 512, device, dtype)
    frame, sound = speech.mtp.init_state(1, device, dtype), speech.code2wav.init_state(1, device, dtype)
    think, talk, decode = bound(model.thinker), bound(speech.talker), bound(speech.code2wav)
    predict = speech.mtp.bind_predict()
    word = torch.ones(1, 1, model.thinker.config.hidden_size, device=device, dtype=dtype)
    hidden = torch.ones(1, speech.talker.config.text.hidden_size, device=device, dtype=dtype)
    codes = torch.zeros(1, 1, speech.mtp.codebooks, device=device, dtype=torch.long)
    return {
        "Thinker": lambda: model.thinker.logits(think(word, thought)[0]),
        "Talker": lambda: speech.talker.codec_head(talk(hidden[:, None], said)),
        "MTP": lambda: predict(hidden, hidden, lambda logits, codebook: logits.argmax(-1), frame),
        "Code2Wav": lambda: decode(codes, sound),
    }


def weights_read(model: Omni) -> dict[str, float]:
    """Bytes of weights that `steps` read: of experts those that are chosen, of embeddings nothing to speak of."""
    speech, thinker = model.speaking(), model.thinker
    again = speech.mtp.codebooks - 1  # MTP's layers, once for each codebook
    return {
        "Thinker": _read(thinker),
        "Talker": _read(speech.talker.model) + _read(speech.talker.codec_head),
        "MTP": again * _read(speech.mtp.model) + _read(speech.mtp.lm_head),
        "Code2Wav": _read(speech.code2wav),
    }


def _read(module: nn.Module, share: float = 1.0) -> float:
    """Bytes of the weights of a module that one row reads, `share` of its experts' among them."""
    if isinstance(module, nn.Embedding):
        return 0.0
    if isinstance(module, SparseMLP):
        share = module.top_k / module.experts.count
    own = sum(p.nbytes for p in module.parameters(recurse=False)) * (share if isinstance(module, Experts) else 1)
    return own + sum(_read(child, share) for child in module.children())


@torch.inference_mode()
def floor(model: Omni) -> dict[str, Any]:
    """Bytes and operations of a frame, and of a token of the Thinker, and the ms that they take at least."""
    read, done = weights_read(model), dict[str, float]()
    for name, step in steps(model).items():
        step()  # what is made once is made now
        done[name] = operations(step)
    bandwidth, rate = machine(model.device, model.dtype)
    boxes = {name: {"bytes": read[name], "operations": done[name]} for name in read}
    spoken = [boxes[name] for name in ("Talker", "MTP", "Code2Wav")]
    frame = {what: sum(box[what] for box in spoken) for what in ("bytes", "operations")}
    units = {"frame": frame, "token": boxes["Thinker"]}
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what was measured on is free for caches
    least = {f"{n}_ms": 1000 * max(u["bytes"] / bandwidth, u["operations"] / rate) for n, u in units.items()}
    return {"boxes": boxes, **units, "bytes_a_second": bandwidth, "operations_a_second": rate, **least}


def operations(run: Callable[[], object]) -> int:
    """What `run` does in matrix products, convolutions and attention, as PyTorch counts it, and in grouped products."""

    def grouped(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        """Of x [N, W] through weights [E, W, V]."""
        return 2 * x[0] * x[1] * weight[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter:
        run()
    return counter.get_total_flops()


def machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes that this machine reads a second and operations that it does, at best, with the threads that it has now."""
    x = torch.ones(READ[device.type] // 4, device=device)
    a = torch.ones(SIDE[device.type], SIDE[device.type], device=device, dtype=dtype)
    return x.nbytes / _best(x.max, device), 2 * len(a) ** 3 / _best(lambda: a @ a, device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs."""
    seconds = list[float]()
    for _ in range(TRIES):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
