"""What an adapter says of a class of layers whose weight is computed, or that does something around its operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError

PLAIN = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Classes that another class can be reduced to."""
_ALONE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Those with nothing before and after: they take the size of their output too."""


@dataclass(frozen=True)
class LayerAdapter:
    """Reduces a class of layers to a plain one of torch: after(plain(before(…))), with a weight that may be computed.

    A computed weight is folded at the swap: the layer is factorised as it is then, and what computed its weight is
    gone, in training too. Functions should be those of a module, so that layers can be pickled.

    Attributes:
        plain: The torch class of the operation: nn.Linear, nn.Embedding, a convolution or a transposed one.
        weight: Returns the weight of a layer as the plain class has it; None if that is `layer.weight` itself.
        before: Returns what enters the plain operation, called with the layer and the arguments of its forward; None
            for the argument itself. It may read what the plain class has, and the settings.
        after: Returns the output, called with the layer and what the plain operation puts out; of the same shape.
        settings: Names of the attributes that `before` and `after` read beside those of the plain class. A factorised
            layer has those that are plain values too.
        example: Returns positional arguments for a layer's forward, on which it is compared with its adapter; None for
            random values of a small size.
    """

    plain: type[nn.Module]
    weight: Callable[[Any], Tensor] | None = None
    before: Callable[..., Tensor] | None = None
    after: Callable[[Any, Tensor], Tensor] | None = None
    settings: tuple[str, ...] = ()
    example: Callable[[Any], tuple[Any, ...]] | None = None

    def __post_init__(self) -> None:
        known = ", ".join(f"nn.{cls.__name__}" for cls in PLAIN)
        if self.plain not in PLAIN:
            msg = f"LayerAdapter(plain={self.plain!r}): expected one of {known}."
            raise ConfigurationError(msg)
        for name in ("weight", "before", "after", "example"):
            if (value := getattr(self, name)) is not None and not callable(value):
                msg = f"LayerAdapter({name}={value!r}): expected a function that takes the layer first, or None."
                raise ConfigurationError(msg)
        settings = cast(Any, self.settings)
        if isinstance(settings, str) or not all(isinstance(name, str) for name in settings):
            msg = f"LayerAdapter(settings={settings!r}): expected names of attributes, such as ('eps',)."
            raise ConfigurationError(msg)
        if self.plain in _ALONE and self.surrounds:
            msg = f"LayerAdapter(plain=nn.{self.plain.__name__}): it can have no before and after."
            raise ConfigurationError(msg)

    @property
    def surrounds(self) -> bool:
        """Whether something happens before or after the plain operation."""
        return self.before is not None or self.after is not None

    def entering(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Returns what enters the plain operation."""
        if self.before is not None:
            return self.before(layer, *args, **kwargs)
        return cast(Tensor, args[0] if args else next(iter(kwargs.values())))

    def leaving(self, layer: nn.Module, output: Tensor) -> Tensor:
        """Returns the output of the layer for that of the plain operation."""
        return output if self.after is None else self.after(layer, output)
