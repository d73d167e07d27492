"""Saving, tying and resizing of compressed Hugging Face models, under the names of their own methods.

These methods go over parameters by name, and those of a factorised embedding are others. So a compressed model gets
its own `save_pretrained`, `tie_weights` and `resize_token_embeddings`, and `load_pretrained` reads what was saved; the
dense model's come back with its layers. `transformers` is not imported but by `load_pretrained`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast
from warnings import warn

from torch import nn

from lightning_compress.analysis.inventory import Layer, list_layers
from lightning_compress.core.checks import path_of
from lightning_compress.core.errors import CompressionWarning, ConfigurationError, UnsupportedError, WeightsError
from lightning_compress.core.plan import LayerPlan
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.unfused import put_
from lightning_compress.surgery.build import build_layer, build_tied_layer
from lightning_compress.surgery.embodied import embodied_plan, owners_of

FOLDER = "compressed"
"""Where the weights of a compressed model lie beside its configuration: not where its class would read dense ones."""

_Pretrained = TypeVar("_Pretrained", bound=nn.Module)


def follow_structure(model: nn.Module) -> None:
    """Gives every Hugging Face model in a module the methods that fit its layers, compressed or dense again."""
    for module in model.modules():
        if not _is_pretrained(module):
            continue
        compressed = any(isinstance(part, FactorisedLayer) for part in module.modules())
        for name, function in _METHODS.items():
            if compressed:
                module.__dict__[name] = functools.partial(function, module)
            elif isinstance(own := module.__dict__.get(name), functools.partial) and own.func is function:
                del module.__dict__[name]


def _is_pretrained(module: nn.Module) -> bool:
    own = type(module)
    return hasattr(module, "config") and all(callable(getattr(own, name, None)) for name in _METHODS)


def load_pretrained(cls: type[_Pretrained], folder: str | Path) -> _Pretrained:
    """Returns the compressed Hugging Face model that its `save_pretrained` wrote, in eval mode.

        model.save_pretrained("folder")  # a compressed GPT2LMHeadModel
        model = load_pretrained(GPT2LMHeadModel, "folder")

    Args:
        cls: Its class, or one such as `AutoModelForCausalLM`.
        folder: Where it was saved.

    Raises:
        ConfigurationError: If `folder` is no path, or `cls` no class of such models.
        WeightsError: If there is no such model, or its files are damaged; PlanFormatError if the plan is.
    """
    from lightning_compress.surgery.save import load_compressed  # noqa: PLC0415 (which swaps)

    folder = path_of("folder", folder)
    build = getattr(cls, "_from_config", getattr(cls, "from_config", None))
    if build is None:
        msg = f"cls={cls!r}: expected a class of Hugging Face models, such as AutoModelForCausalLM."
        raise ConfigurationError(msg)
    if not (folder / "config.json").is_file() or not (folder / FOLDER).is_dir():
        msg = f"{str(folder)!r} holds no compressed model: expected what its save_pretrained wrote."
        raise WeightsError(msg)
    from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415 (no dependency)

    model = cast(_Pretrained, build(AutoConfig.from_pretrained(folder)))
    load_compressed(model, folder / FOLDER)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _save_pretrained(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True, **settings: Any
) -> None:
    """Writes the configuration and, in a folder of its own, the compressed model; see `load_pretrained`."""
    from lightning_compress.surgery.save import save_compressed  # noqa: PLC0415 (which swaps)

    if settings:
        msg = (
            f"save_pretrained({', '.join(settings)}=…) of a compressed model: it takes the folder alone. Compress a "
            "copy that is merged (merge_) for files in the layout of the dense model."
        )
        raise UnsupportedError(msg)
    if not is_main_process:
        return
    folder = path_of("save_directory", save_directory)
    save_compressed(model, folder / FOLDER)
    cast(Any, model.config).save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and cast(Any, model).can_generate():
        cast(Any, generation).save_pretrained(folder)


def _tie_weights(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Ties what is dense; factorised layers of one weight hold the same factors from the start."""
    own = cast("dict[str, str] | None", getattr(model, "all_tied_weights_keys", None))
    names = {name for name, module in model.named_modules() if isinstance(module, FactorisedLayer)}
    if own is None:
        if not any(_owner(key) in names for key in getattr(model, "_tied_weights_keys", None) or ()):
            cast(Any, type(model)).tie_weights(model, *args, **kwargs)
        return
    dense = {key: source for key, source in own.items() if not {_owner(key), _owner(source)} & names}
    model.all_tied_weights_keys = dense  # type: ignore[assignment]
    try:
        cast(Any, type(model)).tie_weights(model, recompute_mapping=False)
    finally:
        model.all_tied_weights_keys = own  # type: ignore[assignment]


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _resize_token_embeddings(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Multiplies the factors of embedding and output layer out, resizes those, and factorises them alike again."""
    whole = cast(Any, model)
    ends = [end for end in (whole.get_input_embeddings(), whole.get_output_embeddings()) if end is not None]
    found = [layer for layer in list_layers(model) if any(layer.module is end for end in ends)]
    factorised = [layer for layer in found if isinstance(layer.module, FactorisedLayer)]
    plans = {planned.name: planned for planned in embodied_plan(model).factorised}
    owners = owners_of(list_layers(model))
    dense: dict[str, nn.Module] = {}
    for layer in factorised:
        dense[layer.name] = cast(FactorisedLayer, layer.module).to_dense()
    for layer in factorised:
        owner = dense.get(owners.get(layer.name, layer.name), dense[layer.name])
        dense[layer.name].register_parameter("weight", owner._parameters["weight"])
        put_(model, layer.aliases, dense[layer.name])
    try:
        cast(Any, type(model)).resize_token_embeddings(model, *args, **kwargs)
    except BaseException:
        for layer in factorised:
            put_(model, layer.aliases, layer.module)
        raise
    names = {layer.name for layer in factorised}
    for layer in list_layers(model):
        planned = next((plans[alias] for alias in layer.aliases if alias in plans and alias in names), None)
        if planned is not None and not isinstance(layer.module, FactorisedLayer):
            _factorise_alike_(model, layer, planned)
    follow_structure(model)
    return cast(nn.Module, whole.get_input_embeddings())


def _factorise_alike_(model: nn.Module, layer: Layer, planned: LayerPlan) -> None:
    """Replaces a dense layer, and those of the same weight, in the kind and ranks of the plan of its former self.

    It stays dense, with a warning, where it has become too small for those ranks.
    """
    largest = DECOMPOSITIONS[planned.kind].max_ranks(layer.operator.shape)
    if any(rank > most for rank, most in zip(planned.ranks, largest, strict=True)):
        msg = (
            f"{layer.name!r} stays dense: its weight {layer.weight_shape} is too small for the ranks {planned.ranks} "
            f"({planned.kind}) that it had. Compress it again."
        )
        warn(msg, CompressionWarning, stacklevel=4)
        return
    new = build_layer(layer, replace(planned, weight_shape=layer.weight_shape), None, decompose=True)
    put_(model, layer.aliases, new)
    for aliases, partner in layer.partners:
        put_(model, aliases, build_tied_layer(partner, new))


_METHODS: Mapping[str, Callable[..., Any]] = {
    "save_pretrained": _save_pretrained,
    "tie_weights": _tie_weights,
    "resize_token_embeddings": _resize_token_embeddings,
}
