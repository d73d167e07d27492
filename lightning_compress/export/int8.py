"""8-bit integers for the formats of torch: static by torchao's pt2e, or of the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.core.copies import detached_copy
from lightning_compress.export.subject import Inputs, Subject, optional, quiet, refusing, tensors_in
from lightning_compress.layers.interpolation import Interpolation
from lightning_compress.layers.transposed import TransposedLinear
from lightning_compress.layers.unfused import UnfusedModule

LEAST = 64
"""Entries of a weight below which its scales would take more than is won."""
_CLASSES = (_ConvNd, nn.Linear, nn.Embedding, Interpolation, TransposedLinear)
_HIGH = 127


def quantised(subject: Subject) -> tuple[torch.export.ExportedProgram, str]:
    """Returns the quantised model through torch.export, in operators that every torch has, and how it was quantised."""
    if not subject.calibration:
        return subject.exported(with_int8_weights(subject.model)), WEIGHTS_ALONE
    optional("torchao", "torchao", "int8=True of this format")
    x86 = cast(Any, optional("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torchao", "int8=True"))
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    converted = calibrated(subject, quantizer)
    program = subject.exported(converted)
    with quiet(), torch.no_grad(), refusing("writing quantised operators out"):
        program = program.run_decompositions(_written_out())
    samples = sum(len(tensors_in(batch)[0]) for batch in subject.calibration)
    return program, f"static, by torchao's pt2e on {samples} inputs, one scale per channel"


WEIGHTS_ALONE = "of the weights alone, one scale per channel: it computes in float"


def calibrated(subject: Subject, quantizer: Any) -> nn.Module:
    """Returns the model with what a quantizer of pt2e asks for quantised by the calibration inputs."""
    pt2e = optional("torchao.quantization.pt2e.quantize_pt2e", "torchao", "int8=True of this format")
    program = subject.exported()
    with quiet(), torch.no_grad(), refusing("torchao's static quantisation"):
        prepared = pt2e.prepare_pt2e(program.module(check_guards=False), quantizer)
        for inputs in subject.calibration:
            prepared(*_fitting(subject, inputs))
        return cast(nn.Module, pt2e.convert_pt2e(prepared))


def _fitting(subject: Subject, inputs: Inputs) -> Inputs:
    """Returns inputs whose shapes are those of the trace where they are fixed."""
    if subject.dynamic:
        return inputs
    pairs = zip(inputs, subject.inputs, strict=True)
    return tuple(own[: len(like)] if isinstance(own, Tensor) and own.ndim else own for own, like in pairs)


def with_int8_weights(model: nn.Module) -> nn.Module:
    """Returns a copy whose layers hold 8-bit weights with a scale per channel and compute with what these stand for."""
    twin = detached_copy(model)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    kept: list[Tensor] = []
    inner = {id(m) for unfused in twin.modules() if isinstance(unfused, UnfusedModule) for m in unfused.modules()}
    for layer in twin.modules():
        weight = layer._parameters.get("weight")
        if not isinstance(layer, _CLASSES) or not is_worth_it(weight) or id(layer) in inner:
            continue
        weight = cast(nn.Parameter, weight)
        if id(weight) not in done:
            done[id(weight)] = rounded(weight.detach(), channels_of(layer))
            kept.append(weight)  # so that no other tensor gets its identity
        del layer._parameters["weight"]
        for name, value in zip(("int8_weight", "weight_scale"), done[id(weight)], strict=True):
            layer.register_buffer(name, value)
        layer.__dict__["weight"] = None  # says that it has one, see `is_wrapper`; the property answers
        layer.__class__ = type(type(layer).__name__, (_Int8Weight, type(layer)), {})
    return twin


class _Int8Weight:
    """What such a layer has in the place of its weight."""

    int8_weight: Tensor
    weight_scale: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for."""
        return self.int8_weight.to(self.weight_scale.dtype) * self.weight_scale


def is_worth_it(weight: Tensor | None) -> bool:
    """Returns whether a weight is to be quantised."""
    return weight is not None and weight.is_floating_point() and weight.numel() >= LEAST and weight.ndim > 1


def channels_of(layer: nn.Module) -> int:
    """Returns the dimension of a layer's weight that has a scale per entry."""
    return 1 if isinstance(layer, (_ConvTransposeNd, TransposedLinear)) else 0


def rounded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns a weight as 8-bit integers from -127 to 127, and the scales that they are multiplied by."""
    others = [d for d in range(weight.ndim) if d != dim]
    scale = weight.abs().amax(dim=others, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / _HIGH
    return (weight / scale).round().clamp(-_HIGH, _HIGH).to(torch.int8), scale


def _written_out() -> dict[Any, Callable[..., Any]]:
    """Returns the quantised operators in terms of others: their own are only known where torchao is imported."""
    operators = torch.ops.quantized_decomposed

    def quantize(x: Tensor, *settings: Any) -> Tensor:
        scale, zero, low, high, dtype = settings
        return torch.clamp(torch.round(x * (1.0 / scale)) + zero, low, high).to(dtype)

    def dequantize(x: Tensor, scale: float, zero: int, *_: Any, out_dtype: Any = None) -> Tensor:
        return (x.to(out_dtype or torch.float32) - zero) * scale

    def by_channel(
        x: Tensor, scales: Tensor, zeros: Tensor | None, axis: int, *_: Any, out_dtype: Any = None
    ) -> Tensor:
        shape = [-1 if d == axis else 1 for d in range(x.ndim)]
        values = x.to(out_dtype or torch.float32)
        values = values if zeros is None else values - zeros.reshape(shape)
        return values * scales.to(values.dtype).reshape(shape)

    return {
        operators.quantize_per_tensor.default: quantize,
        operators.dequantize_per_tensor.default: dequantize,
        operators.dequantize_per_channel.default: by_channel,
    }
