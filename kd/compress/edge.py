"""A net as a program of ExecuTorch (`.pte`) on XNNPACK, for phones and boards: one image at a time."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.compress.export import lacks, needs, quiet
from kd.compress.measure import looking
from kd.compress.quantize import strip
from kd.errors import InputError, KDError

NEEDS = ("executorch",)


def fits(net: nn.Module, change: Mapping[str, Any] | None) -> None:
    """Refuse what this road has no kernels for.

    Raises:
        InputError: for recurrent layers, which it would unroll, and integers but those of `static` with 8 bits.
    """
    for path, module in net.named_modules():
        if isinstance(module, nn.RNNBase):
            raise InputError(
                f"export.format=pte would unroll {path}, a {type(module).__name__}, step by step: use onnx"
            )
    if change is not None and (change["how"], change["bits"]) != ("static", 8):
        raise InputError(
            f"export.format=pte knows integers of quantize.how=static and 8 bits alone, not {change['how']} of "
            f"{change['bits']}: use export.format=onnx"
        )


def to_pte(
    net: nn.Module, shape: Sequence[int], path: Path, change: Mapping[str, Any] | None, batches: Iterable[Tensor] = ()
) -> None:
    """Write a net as a program; of a quantised one, torchao's quantiser writes the integers, by the same samples.

    Args:
        net: the plain net; left as it was found.
        shape: of one image, (C, H, W).
        path: of the file.
        change: how it was quantised (`kd.compress.structure`), or None.
        batches: normalised images of the training split, for the ranges of activations.

    Raises:
        InputError: if ExecuTorch is missing, or has no kernels for the net.
        KDError: if the net does something that it lacks.
    """
    needs(NEEDS, "edge")
    fits(net, change)
    plain = strip(copy.deepcopy(net)).cpu().float()
    with quiet(), looking(plain):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            program = _program(plain, shape)
            if change is not None:
                program = _program(_integers(program.module(), change["layers"], batches), shape)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        except Exception as error:  # it raises what it likes
            raise KDError(lacks(type(net).__name__, "ExecuTorch", error)) from error
    path.write_bytes(lowered.buffer)


def _program(net: nn.Module, shape: Sequence[int]) -> Any:
    # Of any number of images, lowering makes at most 15: it asks torch which kernel of its own a batch would take.
    return torch.export.export(net, (torch.zeros(1, *shape),))


def _integers(net: nn.Module, layers: Iterable[str], batches: Iterable[Tensor]) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantiser = XNNPACKQuantizer()
    for path in layers:
        quantiser.set_module_name(path, get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(net, quantiser)
    with torch.no_grad():
        for image in (image for batch in batches for image in batch.unbind()):
            observed(image[None])
    made: nn.Module = convert_pt2e(observed)
    return made


def program(path: Path) -> Callable[[Tensor], Tensor]:
    """A file as a function of normalised images."""
    needs(NEEDS, "edge")
    with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from executorch.runtime import Runtime

        loaded = Runtime.get().load_program(path.read_bytes())  # a method reads its memory, and keeps it not alive
        method = loaded.load_method("forward")

    def answer(images: Tensor, loaded: Any = loaded) -> Tensor:
        return torch.cat([method.execute([image[None].contiguous()])[0].clone() for image in images.unbind()])

    return answer
