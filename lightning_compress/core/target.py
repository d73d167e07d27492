"""What the compressed model is to run on: whose time the search counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

from lightning_compress.core.checks import did_you_mean, from_mapping, require_count, require_type, shown
from lightning_compress.core.errors import ConfigurationError

Backend = Literal["torch", "onnxruntime"]
Dtype = Literal["float32", "float16", "bfloat16"]
MemoryFormat = Literal["auto", "preserve", "channels_last"]


@dataclass(frozen=True)
class Target:
    """An engine on this machine, and how the model is run there.

    Attributes:
        backend: "torch", or "onnxruntime" (extra `onnx`), to which models are exported.
        batch: Inputs per forward pass.
        threads: Intra-op threads, None for those of the process.
        dtype: The model is cast to it for measuring, None for its own.
        memory_format: "channels_last", "preserve" (that of the model), or "auto": the faster one, which becomes part
            of the plan. Of torch alone.
        compiled: Whether the model will run under `torch.compile`: whole models are measured compiled, layers are
            not, and their times are scaled to it. Of torch alone.
        merge: Whether layers whose factors would take longer than the dense layer may run multiplied out in eval mode
            (`LayerPlan.merged`). Of torch alone, uncompiled.

    Raises:
        ConfigurationError: If a name is unknown, a count is none, or a setting of torch is given for another backend.
    """

    backend: Backend = "torch"
    batch: int = 1
    threads: int | None = None
    dtype: Dtype | None = None
    memory_format: MemoryFormat = "auto"
    compiled: bool = False
    merge: bool = True

    def __post_init__(self) -> None:
        known = {"backend": Backend, "dtype": Dtype, "memory_format": MemoryFormat}
        for name, names in known.items():
            value = getattr(self, name)
            if value not in get_args(names) and not (name == "dtype" and value is None):
                msg = f"Target({name}={shown(value)}) is unknown.{did_you_mean(value, get_args(names))}"
                raise ConfigurationError(msg)
        require_count(f"Target(batch={shown(self.batch)})", self.batch, 1)
        if self.threads is not None:
            require_count(f"Target(threads={shown(self.threads)})", self.threads, 1)
        for name in ("compiled", "merge"):
            require_type("Target", name, getattr(self, name), bool, "true or false")
        if self.backend != "torch" and (self.compiled or self.memory_format == "channels_last"):
            setting = "compiled=True" if self.compiled else "memory_format='channels_last'"
            msg = f"Target(backend={shown(self.backend)}, {setting}): that is a setting of backend='torch'."
            raise ConfigurationError(msg)

    @property
    def can_merge(self) -> bool:
        """Whether layers may run multiplied out: by torch's own operators, uncompiled."""
        return self.merge and self.backend == "torch" and not self.compiled

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields."""
        return dataclasses.asdict(self)


@runtime_checkable
class Stopwatch(Protocol):
    """A device of the user's own: anything with this method."""

    def seconds(self, module: Any, example: tuple[Any, ...]) -> float:
        """Returns the seconds of one call `module(*example)` on the device.

        Args:
            module: A layer, or a whole model, in eval mode.
            example: Its positional arguments at the batch size to measure, tensors on the CPU.
        """


TargetLike = str | Path | Target | Stopwatch | Mapping[str, Any] | None


def target_of(value: object) -> Target | Stopwatch | Path | None:
    """Returns what a user passed as `target`: a Target, an own device, the path of a table, or None.

    Raises:
        ConfigurationError: If it is none of those.
    """
    if value is None or isinstance(value, (Target, Path)):
        return value
    if isinstance(value, str):
        if value.endswith(".json"):
            return Path(value)
        if value in get_args(Backend):
            return Target(backend=cast(Backend, value))
        msg = f"target={shown(value)} is unknown.{did_you_mean(value, get_args(Backend))} {_ELSE}"
        raise ConfigurationError(msg)
    if isinstance(value, Mapping):
        return from_mapping(Target, value, "target")
    if isinstance(value, Stopwatch) and not isinstance(value, type):
        return value
    msg = f"target={shown(value)}: expected 'torch', 'onnxruntime' or a Target. {_ELSE}"
    raise ConfigurationError(msg)


_ELSE = (
    "Else an object with a method seconds(module, example) that measures on a device of your own, the path of a table "
    "(.json) that was measured elsewhere, or None to leave time out."
)
