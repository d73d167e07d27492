"""Smaller and faster: parameters and time of compressed networks over the dense ones, each ratio inside one run.

python -m benchmarks.latency [--networks vgg resnet20 …] [--targets torch:1 torch:16 onnxruntime:1] [--free] [--plain]
    [--fasterai]

Every network is compressed for its target, and dense and compressed model are then timed in turns on it, on one thread,
anew and not from the search's table: the dense model in the faster of the two memory formats, the median of all turns.
The reference networks are searched as the default does it (`accuracy` is that of the 10,000 test images right after the
compression), the others, whose weights are random, by their weights alone. `predicted` is what the search predicted
over what it measured; `table` are the seconds of timing the layers, which the next search finds in the cache. --free
adds a row without a bound on time, --plain what a loop over the layers does without a search: one share of ranks for
all; --fasterai the same by the decomposers of fasterai (`pip install --no-deps fasterai einops`), a row for each method
for convolutions, with the largest share of ranks that has no more parameters.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from benchmarks.common import IMAGE, earlier_rows, fashion_mnist, publish, reference
from benchmarks.zero_shot import accuracy
from lightning_compress import Budget, Plan, Target, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.latency.compare import measure_latency
from lightning_compress.analysis.latency.onnx import OnnxRuntime
from lightning_compress.analysis.trace import ExampleInput, whole_arguments
from lightning_compress.cli.demo.models import SmallCNN
from lightning_compress.core.effort import trying
from lightning_compress.core.target import Backend

PARAMS = 1 / 5.2
FASTERAI = ("tucker", "svd", "spatial", "cp")
"""Its methods for convolutions."""


@dataclass(frozen=True)
class Network:
    """One that is compressed.

    Attributes:
        build: Makes it.
        example: Its input.
        params: Kept fraction of the parameters.
        latency: Kept fraction of the time by target, where it is bounded.
        trained: Whether its weights are.
    """

    build: Callable[[], nn.Module]
    example: ExampleInput
    params: float
    latency: dict[str, float]
    trained: bool = False


def _vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import get_model  # noqa: PLC0415

        return cast(nn.Module, get_model(name))

    return build


def _vgg16() -> nn.Module:
    """VGG-16 with batch norm for images of 32 x 32 and one linear layer."""
    from torchvision.models import vgg16_bn  # noqa: PLC0415

    return nn.Sequential(vgg16_bn().features, nn.Flatten(), nn.Linear(512, 10))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    return cast(nn.Module, BertModel(BertConfig()))


COLOUR = (1, 3, 224, 224)
NETWORKS = {
    "small_cnn": Network(SmallCNN, (1, 1, 28, 28), PARAMS, {}),
    "resnet20": Network(lambda: reference("resnet20"), IMAGE, PARAMS, {"torch:1": 0.8, "torch:16": 0.66}, trained=True),
    "vgg": Network(
        lambda: reference("vgg"), IMAGE, PARAMS, {"torch:1": 0.47, "torch:16": 0.54, "onnxruntime:1": 0.5}, trained=True
    ),
    "vgg16": Network(_vgg16, (1, 3, 32, 32), PARAMS, {"torch:1": 0.25, "torch:16": 0.25, "onnxruntime:1": 0.3}),
    "resnet18": Network(_vision("resnet18"), COLOUR, PARAMS, {"torch:1": 0.33, "torch:16": 0.4, "onnxruntime:1": 0.4}),
    "resnet50": Network(_vision("resnet50"), COLOUR, PARAMS, {"torch:1": 0.55, "torch:16": 0.6}),
    "vit_b_16": Network(_vision("vit_b_16"), COLOUR, 0.3, {"torch:1": 0.5}),
    "bert": Network(_bert, torch.zeros(1, 128, dtype=torch.int64), 0.3, {"torch:1": 0.5}),
}


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--targets", nargs="+", default=["torch:1", "torch:16"])
    parser.add_argument("--free", action="store_true", help="also without a bound on time")
    parser.add_argument("--plain", action="store_true", help="what a plain loop does beside it, see `plain_loop`")
    parser.add_argument("--fasterai", action="store_true", help="what fasterai's decomposers do beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {(row["network"], row["budget"], row["target"]): row for row in earlier_rows("latency")}
    for name in arguments.networks:
        for target in arguments.targets:
            network = NETWORKS[name]
            bounds = [network.latency.get(target)] if not arguments.free else [None, network.latency.get(target)]
            found = [functools.partial(measure, name, network, target, bound) for bound in dict.fromkeys(bounds)]
            found += [functools.partial(plain_loop, name, network, target)] if arguments.plain else []
            if arguments.fasterai:
                found += [functools.partial(fasterai, name, network, target, method) for method in FASTERAI]
            for work in found:
                row = work()
                rows[row["network"], row["budget"], row["target"]] = row
                publish("latency", "Smaller and faster", list(rows.values()))


def measure(name: str, network: Network, target: str, bound: float | None) -> dict[str, Any]:
    """Returns the row of one network on one target."""
    torch.manual_seed(0)
    dense = network.build().eval()
    compressed = copy.deepcopy(dense)
    on = _target(target)
    budget = Budget(params=network.params, latency=bound)
    timed: dict[str, float] = {}

    def note(what: str, done: float) -> None:
        timed.setdefault(f"{what} {done == 1.0}", time.perf_counter())

    plan = compress_(
        compressed,
        budget,
        example_input=network.example,
        objective="auto" if network.trained else "weight",
        heal=network.trained,
        target=on,
        progress=note,
    )
    return _row(name, network, target, str(budget), dense, compressed, plan, on, table=_table_seconds(timed))


def plain_loop(name: str, network: Network, target: str) -> dict[str, Any]:
    """Returns the row of the same number of parameters by one share of ranks for all layers, Tucker-2 and SVD.

    That is what loops over a model's layers do: no search, nothing measured, the factors fitted to the weights.
    """
    torch.manual_seed(0)
    dense = network.build().eval()
    compressed = copy.deepcopy(dense)
    plan = search_ranks(dense, Budget(params=network.params), method="uniform", kinds=["svd", "tucker2"], target=None)
    apply_plan_(compressed, plan)
    return _row(name, network, target, "plain Tucker-2 and SVD loop", dense, compressed, plan, _target(target))


def fasterai(name: str, network: Network, target: str, method: str) -> dict[str, Any]:
    """Returns the row of fasterai's decomposers: one share of ranks for all layers."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer  # noqa: PLC0415
    from fasterai.misc.fc_decomposer import FC_Decomposer  # noqa: PLC0415

    torch.manual_seed(0)
    dense = network.build().eval()
    whole = measure_costs(dense).params
    for percent in range(1, 100):
        small = Conv_Decomposer().decompose(dense, percent_removed=percent / 100, method=method)
        small = cast(nn.Module, FC_Decomposer().decompose(small, percent_removed=percent / 100)).eval()
        params = measure_costs(small).params
        if params <= network.params * whole:
            break
    budget = f"fasterai {importlib.metadata.version('fasterai')}, {method}"
    return _row(name, network, target, budget, dense, small, None, _target(target), kept=params / whole)


def _row(  # noqa: PLR0917
    name: str,
    network: Network,
    target: str,
    budget: str,
    dense: nn.Module,
    compressed: nn.Module,
    plan: Plan | None,
    on: Target,
    *,
    table: float = 0.0,
    kept: float | None = None,
) -> dict[str, Any]:
    kept = kept or (plan and plan.kept["params"]) or 1
    timed = plan is not None and plan.target is not None
    before, after = timings(dense, compressed, network.example, on)
    return {
        "network": name,
        "budget": budget,
        "target": target,
        "smaller": 1 / kept,
        "dense ms": 1e3 * before,
        "ms": 1e3 * after,
        "faster": before / after,
        "predicted": (plan.predicted_latency or 0) / (plan.compressed.latency or 1) if plan and timed else None,
        "accuracy": accuracy(compressed, fashion_mnist()[0]) if network.trained else None,
        "format": (plan and plan.memory_format) or "as it was",
        "slower layers": len(plan.slower) if plan and timed else None,
        "table": table,
        "kinds": _kinds(plan) if plan else "its own",
    }


def _target(text: str) -> Target:
    backend, _, batch = text.partition(":")
    engine: Backend = "onnxruntime" if backend == "onnxruntime" else "torch"
    return Target(backend=engine, batch=int(batch), threads=1, compiled=backend == "compiled")


def timings(dense: nn.Module, compressed: nn.Module, example: ExampleInput, target: Target) -> list[float]:
    """Returns the seconds of both models on a target, measured in turns."""
    if target.backend == "torch":
        return measure_latency([dense, compressed], example, target=target, seconds=2.0)
    runtime = OnnxRuntime(1)
    args = whole_arguments(dense, example)[0]
    args = tuple(a.repeat(target.batch, *(1,) * (a.ndim - 1)) for a in args)
    with trying("thorough"):
        turns = [[runtime.seconds(model.eval(), args) for model in (dense, compressed)] for _ in range(5)]
    return [statistics.median(own) for own in zip(*turns, strict=True)]


def _table_seconds(timed: dict[str, float]) -> float:
    return timed.get("timing layers True", 0.0) - timed.get("timing the dense model False", 0.0)


def _kinds(plan: Plan) -> str:
    kinds = [layer.kind for layer in plan.factorised]
    return " ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


if __name__ == "__main__":
    main()
