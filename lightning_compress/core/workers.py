"""The linear algebra of single layers, worked out by other processes or machines: Ray (extra `ray`).

What is sent are functions of one layer, and what they return; everything else stays in the process that compresses.
A layer whose worker is lost is done again by another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

from lightning_compress.core.checks import did_you_mean, shown
from lightning_compress.core.effort import Effort, current_effort, trying
from lightning_compress.core.errors import ConfigurationError, UnsupportedError, WorkersLostError

Parallel = Literal["threads", "ray"]
RETRIES = 3
"""Times that a layer is done again after its worker was lost."""

Result = TypeVar("Result")


class Workers(Protocol):
    """Where functions of one layer are worked out.

    Attributes:
        size: How many at once.
    """

    size: int

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns what a function returns that another process runs."""


_CURRENT: ContextVar[Workers | None] = ContextVar("workers", default=None)


def current_workers() -> Workers | None:
    """Returns where functions of one layer are worked out, None for this process."""
    return _CURRENT.get()


def outsourced(function: Callable[..., Result], *args: Any) -> Result:
    """Returns the result of a function of one layer, worked out by a worker if there are any."""
    workers = _CURRENT.get()
    return function(*args) if workers is None else cast(Result, workers.call(function, *args))


def require_parallel(value: object) -> None:
    """Checks a setting.

    Raises:
        ConfigurationError: If it is unknown.
    """
    if value not in get_args(Parallel):
        msg = f"parallel={shown(value)} is unknown.{did_you_mean(value, get_args(Parallel))}"
        raise ConfigurationError(msg)


@contextlib.contextmanager
def working_on(parallel: Parallel) -> Iterator[None]:
    """Has single layers worked out there inside; within another such block it is that one.

    Raises:
        UnsupportedError: If Ray is not installed.
    """
    if parallel == "threads" or _CURRENT.get() is not None:
        yield
        return
    with _ray() as workers:
        token = _CURRENT.set(workers)
        try:
            yield
        finally:
            _CURRENT.reset(token)


@contextlib.contextmanager
def _ray() -> Iterator[Workers]:
    """Workers of the cluster that this process is connected to, or that RAY_ADDRESS names, else of a local one."""
    try:
        import ray  # noqa: PLC0415 (an extra)
    except ImportError as error:
        msg = "parallel='ray' needs Ray, which is not installed: pip install 'lightning_compress[ray]'."
        raise UnsupportedError(msg) from error
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield _RayWorkers(ray)
    finally:
        if own:
            ray.shutdown()


class _RayWorkers:
    """One task for each layer, on one core."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._run = ray.remote(_alone).options(num_cpus=1, max_retries=RETRIES)
        self.size = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns what a function returns that another process runs.

        Raises:
            Exception: Whatever the function raises.
            WorkersLostError: If worker after worker is lost.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._run.remote(current_effort(), function, args))
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            msg = (
                f"Ray lost the workers of a layer {RETRIES + 1} times ({type(error).__name__}: {str(error)[:200]}). "
                "Look for too little memory on its machines, or use parallel='threads'."
            )
            raise WorkersLostError(msg) from error


def _alone(effort: Effort, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Runs a function in a worker, on one thread and without gradients."""
    import torch  # noqa: PLC0415 (settings, which import this module, are made without torch)

    torch.set_num_threads(1)
    with trying(effort), torch.no_grad():
        return function(*args)
