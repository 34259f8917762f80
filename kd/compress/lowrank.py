"""A layer as a chain of thinner ones: truncated SVD of linear layers, SVD, spatial SVD or Tucker-2 of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import KDError

FORMS = ("svd", "spatial", "tucker")
# These read the weights of layers inside them past the layers' own forward.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
ROUNDS = 3  # of orthogonal iteration after the start of a Tucker decomposition: the error hardly moves after them


def factors(layer: nn.Module, form: str, rank: Any) -> nn.Sequential:
    """The thinner layers that stand for one, with empty weights; the names `0`, `1`, … inside.

    `svd`: a linear layer as two; a convolution as one of the same kernel with `rank` channels, then 1x1. `spatial`: a
    kernel of k x 1, then 1 x k. `tucker`: 1x1 to the first of two ranks, the kernel to the second, 1x1.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`.
        form: one of `FORMS`; linear layers know `svd` alone.
        rank: 1 or more; for `tucker` two, [of the input, of the output].

    Raises:
        KDError: if the layer has no such form or rank.

    >>> [tuple(p.shape) for p in factors(nn.Conv2d(3, 5, 3), "spatial", 2).parameters()]
    [(2, 3, 3, 1), (5, 2, 1, 3), (5,)]
    """
    ranks = rank if form == "tucker" and isinstance(rank, list) and len(rank) == 2 else [rank]
    if not all(type(r) is int and r > 0 for r in ranks) or (form == "tucker") != (len(ranks) == 2):
        raise KDError(f"rank {rank!r} is none of form {form}: give a whole number of 1 or more, two for tucker")
    like: dict[str, Any] = {"device": next(layer.parameters()).device, "dtype": next(layer.parameters()).dtype}
    if isinstance(layer, nn.Linear) and form == "svd":
        _within(ranks, (min(layer.in_features, layer.out_features),))
        first = nn.Linear(layer.in_features, rank, bias=False, **like)
        return nn.Sequential(first, nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **like))
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        raise KDError(f"{type(layer).__name__} has no low-rank form {form!r}")
    wide, out, bias = layer.in_channels, layer.out_channels, layer.bias is not None
    (high, broad), step, pad, gap = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    if form == "svd":
        _within(ranks, (min(wide * high * broad, out),))
        whole: dict[str, Any] = {"stride": step, "padding": pad, "dilation": gap, "padding_mode": layer.padding_mode}
        first_ = nn.Conv2d(wide, rank, (high, broad), bias=False, **whole, **like)
        return nn.Sequential(first_, nn.Conv2d(rank, out, 1, bias=bias, **like))
    if layer.padding_mode != "zeros" or isinstance(pad, str):
        padded = pad if isinstance(pad, str) else layer.padding_mode
        raise KDError(f"a convolution padded with {padded!r} has no low-rank form {form!r}")
    if form == "spatial":
        _within(ranks, (min(wide * high, out * broad),))
        down: dict[str, Any] = {"stride": (step[0], 1), "padding": (pad[0], 0), "dilation": (gap[0], 1)}
        across: dict[str, Any] = {"stride": (1, step[1]), "padding": (0, pad[1]), "dilation": (1, gap[1])}
        return nn.Sequential(
            nn.Conv2d(wide, rank, (high, 1), bias=False, **down, **like),
            nn.Conv2d(rank, out, (1, broad), bias=bias, **across, **like),
        )
    _within(ranks, (wide, out))
    core: dict[str, Any] = {"stride": step, "padding": pad, "dilation": gap}
    return nn.Sequential(
        nn.Conv2d(wide, ranks[0], 1, bias=False, **like),
        nn.Conv2d(ranks[0], ranks[1], (high, broad), bias=False, **core, **like),
        nn.Conv2d(ranks[1], out, 1, bias=bias, **like),
    )


def _within(ranks: list[int], most: tuple[int, ...]) -> None:
    for rank, largest in zip(ranks, most, strict=True):
        if rank > largest:
            raise KDError(f"rank {rank} is more than the {largest} that the layer has")


@torch.no_grad()
def factorise(layer: nn.Linear | nn.Conv2d, form: str, rank: Any, root: Tensor | None = None) -> nn.Sequential:
    """The best thinner layers of a form and rank: weights in the least-squares sense, exact at full rank.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`.
        form: as for `factors`.
        rank: as for `factors`.
        root: a square root R of the inputs' second moment, R R^T = E[x x^T], for form `svd`: the error is then that of
            the outputs on such inputs instead of that of the weights (Yu & Wu 2023; ASVD, Yuan et al. 2023).

    >>> layer = nn.Linear(6, 4)
    >>> inputs = torch.randn(3, 6)
    >>> torch.allclose(factorise(layer, "svd", 4)(inputs), layer(inputs), atol=1e-6)
    True
    """
    chain = factors(layer, form, rank)
    weight = layer.weight.detach().double()
    if layer.bias is not None:
        dict(chain.named_parameters())[f"{len(chain) - 1}.bias"].copy_(layer.bias)
    if form == "svd":
        flat = weight.flatten(1)
        left, right = _truncated(flat if root is None else flat @ root.double(), rank)
        if root is not None:  # right R^-1, for a triangular R
            right = torch.linalg.solve_triangular(root.double(), right, upper=False, left=False)
        parts = [right, left]
    elif form == "spatial":
        out, wide, high, broad = weight.shape
        left, right = _truncated(weight.permute(0, 3, 1, 2).reshape(out * broad, wide * high), rank)
        parts = [right, left.reshape(out, broad, rank).permute(0, 2, 1)]
    else:
        core, outer, inner = tucker(weight, rank)
        parts = [inner.T, core, outer]
    for index, made in enumerate(parts):
        empty = dict(chain.named_parameters())[f"{index}.weight"]
        empty.copy_(made.reshape(empty.shape))
    return chain


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors of a matrix of that rank, which share its singular values evenly."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def tucker(weight: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Core (r_out, r_in, k, k), outer (O, r_out) and inner (I, r_in) of a kernel (O, I, k, k): Tucker-2 by HOOI.

    Kim et al. 2016 (arXiv:1511.06530); the bases are the leading singular vectors of one mode with the other projected.
    """
    few, many = ranks  # of the input, of the output
    inner = _leading(weight.transpose(0, 1).flatten(1), few)
    outer = _leading(weight.flatten(1), many)
    for _ in range(ROUNDS):
        outer = _leading(torch.einsum("oihw,ir->orhw", weight, inner).flatten(1), many)
        inner = _leading(torch.einsum("oihw,or->irhw", weight, outer).flatten(1), few)
    core = torch.einsum("oihw,ob,ia->bahw", weight, outer, inner)
    return core, outer, inner


def _leading(matrix: Tensor, rank: int) -> Tensor:
    left: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return left[:, :rank]


def candidates(
    net: nn.Module, form: str, least: int, keep: Sequence[str] = ()
) -> dict[str, tuple[nn.Linear | nn.Conv2d, str]]:
    """The layers that may be factorised, by path, with the form that each would take.

    Only plain `nn.Linear` and `nn.Conv2d`, for a subclass computes something of its own; none that its owner reads the
    weights of, none that stands under two names, none of fewer inputs than `least`, no 1x1 convolution but by SVD.

    >>> [path for path in candidates(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), "svd", 8)]
    ['0']
    """
    owners = [path for path, module in net.named_modules() if isinstance(module, READERS)]
    shared = [id(module) for _, module in net.named_modules(remove_duplicate=False)]
    found: dict[str, tuple[nn.Linear | nn.Conv2d, str]] = {}
    for path, module in net.named_modules():
        if any(path == name or path.startswith(f"{name}.") for name in (*keep, *owners)) or not path:
            continue
        if shared.count(id(module)) > 1 or type(module) not in (nn.Linear, nn.Conv2d):
            continue
        if isinstance(module, nn.Linear):
            if module.in_features >= least:
                found[path] = module, "svd"
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels >= least:
            how = "svd" if module.kernel_size == (1, 1) else form
            if how == "svd" or (module.padding_mode == "zeros" and not isinstance(module.padding, str)):
                found[path] = module, how
    return found


def spectrum(layer: nn.Linear | nn.Conv2d, form: str, root: Tensor | None = None) -> Tensor:
    """The squared singular values of what a form cuts, falling; for `tucker` those of the outputs' unfolding.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    >>> spectrum(layer, "svd").round()
    tensor([9., 4.], dtype=torch.float64)
    """
    weight = layer.weight.detach().double()
    if form == "spatial":
        out, wide, high, broad = weight.shape
        flat = weight.permute(0, 3, 1, 2).reshape(out * broad, wide * high)
    else:
        flat = weight.flatten(1)
    values: Tensor = torch.linalg.svdvals(flat if root is None else flat @ root.double())
    return values**2


def rank_of_energy(layer: nn.Linear | nn.Conv2d, form: str, share: float, root: Tensor | None = None) -> Any:
    """The lowest rank that keeps a share of the squared singular values; for `tucker` one of each mode.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> rank_of_energy(layer, "svd", 0.9)
    1
    """

    def lowest(values: Tensor) -> int:
        kept = values.cumsum(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return min(int((kept < share).sum()) + 1, len(values))

    if form != "tucker":
        return lowest(spectrum(layer, form, root if form == "svd" else None))
    weight = layer.weight.detach().double()
    modes = (weight.transpose(0, 1).flatten(1), weight.flatten(1))
    return [lowest(torch.linalg.svdvals(mode) ** 2) for mode in modes]


def ranks(layer: nn.Linear | nn.Conv2d, form: str) -> list[Any]:
    """The ranks of a form from 1 to full; of `tucker` pairs in the proportion of the layer's widths.

    >>> ranks(nn.Conv2d(2, 4, 3), "tucker")
    [[1, 1], [1, 2], [2, 3], [2, 4]]
    """
    if form != "tucker":
        return list(range(1, len(spectrum_shape(layer, form)) + 1))
    wide, out = layer.weight.shape[1], layer.weight.shape[0]
    most = max(wide, out)
    return [[-(-step * wide // most), -(-step * out // most)] for step in range(1, most + 1)]


def spectrum_shape(layer: nn.Linear | nn.Conv2d, form: str) -> range:
    """As many places as a form's matrix has singular values."""
    shape = layer.weight.shape
    if form == "spatial":
        return range(min(shape[0] * shape[3], shape[1] * shape[2]))
    return range(min(shape[0], layer.weight[0].numel()))


def weights(layer: nn.Linear | nn.Conv2d, form: str, rank: Any) -> int:
    """How many weights the factors of a rank hold, biases left out.

    >>> weights(nn.Linear(10, 20), "svd", 3)
    90
    """
    shape = layer.weight.shape
    out, wide = shape[0], shape[1]
    if form == "spatial":
        return int(rank * (wide * shape[2] + out * shape[3]))
    if form == "tucker":
        return int(wide * rank[0] + rank[0] * rank[1] * layer.weight[0, 0].numel() + rank[1] * out)
    return int(rank * (layer.weight[0].numel() + out))
