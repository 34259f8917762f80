"""Heads of attention: whole heads go, so scale and mixing within the others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.measure import watched
from kd.compress.sites import Site, Touch


def head_sites(net: nn.Module, shape: Sequence[int]) -> tuple[list[Site], list[str]]:
    """The attentions whose heads can go, without scores yet; and the layers that only they may cut.

    Known are attentions with one `qkv` and a `proj` (timm), and with `query`, `key`, `value` whose outputs a `dense` of
    a neighbour called `output` takes (BERT as in transformers).

    Args:
        net: is not changed.
        shape: of one sample.

    >>> from timm.layers.attention import Attention
    >>> sites, apart = head_sites(nn.Sequential(Attention(8, num_heads=4)), (3, 8))
    >>> sites[0].slots, apart
    (4, ['0.qkv'])
    """
    found, apart = [], []
    tokens = _tokens(net, shape)
    for path, module in net.named_modules():
        made = _fused(path, module) or _parted(net, path, module)
        if made is None:
            continue
        heads, width, touches, inside, finish = made
        apart += inside
        count = tokens.get(path, 0)
        # Queries times keys and weights times values, for each pair of tokens.
        cost = 2.0 * count * count * width
        found.append(Site(path, "heads", heads, touches, tag=type(module).__name__, macs=cost, finish=finish))
    return found, apart


def _fused(path: str, module: Any) -> Any:
    qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or not isinstance(heads, int):
        return None
    width = proj.in_features // heads
    if qkv.out_features != 3 * heads * width or isinstance(getattr(module, "norm", None), nn.LayerNorm):
        return None
    own = torch.arange(heads).repeat_interleave(width)
    touches = [Touch(f"{path}.qkv", "out", own.repeat(3)), Touch(f"{path}.proj", "in", own)]
    if isinstance(getattr(module, "gate", None), nn.Linear):
        touches.append(Touch(f"{path}.gate", "out", own))

    def finish(net: nn.Module, count: int) -> None:
        attention: Any = net.get_submodule(path)
        attention.num_heads -= count
        if hasattr(attention, "attn_dim"):
            attention.attn_dim -= count * width

    inside = [f"{path}.qkv", *([f"{path}.gate"] if len(touches) > 2 else [])]
    return heads, width, touches, inside, finish


def _parted(net: nn.Module, path: str, module: Any) -> Any:
    named = [getattr(module, name, None) for name in ("query", "key", "value")]
    heads, width = getattr(module, "num_attention_heads", None), getattr(module, "attention_head_size", None)
    if not all(isinstance(layer, nn.Linear) for layer in named) or not isinstance(heads, int):
        return None
    owner = path.rpartition(".")[0]
    dense = f"{owner}.output.dense" if owner else "output.dense"
    try:
        out = net.get_submodule(dense)
    except AttributeError:
        return None
    if not isinstance(out, nn.Linear) or not isinstance(width, int) or out.in_features != heads * width:
        return None
    own = torch.arange(heads).repeat_interleave(width)
    inside = [f"{path}.{name}" for name in ("query", "key", "value")]
    touches = [*(Touch(layer, "out", own) for layer in inside), Touch(dense, "in", own)]

    def finish(net: nn.Module, count: int) -> None:
        attention: Any = net.get_submodule(path)
        attention.num_attention_heads -= count
        attention.all_head_size = attention.num_attention_heads * width

    return heads, width, touches, inside, finish


def _tokens(net: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """How many tokens each attention sees, for one sample."""
    found: dict[str, int] = {}

    def note(path: str, module: Any, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 3:
            found[path] = inputs[0].shape[1]

    watched(net, shape, lambda m: hasattr(m, "num_heads") or hasattr(m, "num_attention_heads"), note)
    return found
