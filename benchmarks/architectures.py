"""Search and swap over hundreds of architectures with random weights: does it work, is the budget met, is it exact?

python -m benchmarks.architectures [--libraries torchvision timm transformers] [--names resnet18 ...] [--limit 10]
    [--seconds 900] [--resume] [--compress]

Needs torchvision, timm and transformers (those of --libraries). Each model is kept to half its parameters,
or, where too few can be factorised, to the floor that the error states. A second copy has every layer
factorised at full rank, where its outputs must be those of the dense model. Results are written after every
model; --resume leaves out the models that are in them without a failure. --compress runs `compress_` with
its default objective and healing instead, by default on a few small models.
"""

from __future__ import annotations

import argparse
import collections
import copy
import multiprocessing
import multiprocessing.connection
import re
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from benchmarks.common import earlier_rows, publish, save
from benchmarks.zoo import Entry, Specimen, build, list_entries, recorded
from lightning_compress import Budget, LayerPlan, Plan, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import Layer, take_inventory
from lightning_compress.analysis.trace import trace, whole_arguments
from lightning_compress.core.errors import InfeasibleBudgetError
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.unfused import unfused

KEEP = 0.5
EXACT = 1e-4
"""Largest relative difference of the outputs at full rank."""
EXACT_KINDS = ("svd", "channel_svd")
"""The kinds of the full-rank copy, the first that a layer has; else the layer's first kind."""
PER_WORKER = 20
"""Models after which a worker is replaced, so that what libraries cache does not add up."""
MOST_MEMORY = 6 * 2**30
"""Bytes a worker may hold."""
LIBRARIES = ("torchvision", "timm", "transformers")
COMPRESSED = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "ssdlite320_mobilenet_v3_large", "r3d_18"]
COMPRESSED += [
    "efficientvit_m0",
    "resnet10t",
    "deit_tiny_patch16_224",
    "bert",
    "gpt2",
    "t5",
    "vit",
    "wav2vec2",
    "mamba",
]
"""The models of --compress."""
_REASONS = {
    "no kind factorises": "type",
    "is a subclass of": "subclass",
    "depthwise": "depthwise",
    "is factorised with it": "tied to a factorised one",
    "tied": "tied",
    "used outside": "read elsewhere",
    "not called": "not called",
    "computed from": "computed",
    "forward method was replaced": "own forward",
    "larger or slower": "too small",
    "the search keeps it": "kept by the search",
}
"""Part of a reason to its short form."""


def main(entries: list[Entry], *, seconds: float, resume: bool, compress: bool) -> None:
    """Prints one row per model; see the module."""
    name = "architectures_healed" if compress else "architectures"
    how = "compress_ with objective auto and healing" if compress else "objective weight, no healing"
    title = f"Random weights, params <= {KEEP:g}, kinds auto, {how}; difference = largest relative one at full rank"
    old = earlier_rows(name) if resume else []
    rows: dict[tuple[str, str], dict[str, Any]] = {(row["library"], row["model"]): row for row in old}
    left = [e for e in entries if rows.get((e.library, e.name), {}).get("status") != "ok"]
    for row in _in_workers(left, seconds, compress=compress):
        rows[row["library"], row["model"]] = row
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        save(name, title, rows.values())
    if rows:
        publish(name, title, rows.values(), shown=[_shown(row) for row in rows.values()])
        print(summary(list(rows.values())))


def summary(rows: list[dict[str, Any]]) -> str:
    """Returns counts: models, families and failures by library, and what layers were left for."""
    lines = []
    for library in dict.fromkeys(row["library"] for row in rows):
        own = [row for row in rows if row["library"] == library]
        failed = [row["model"] for row in own if row["status"] != "ok"]
        families = len({row["family"] for row in own})
        floors = sum(row["status"] == "ok" and row["budget"] > KEEP for row in own)
        lines.append(
            f"{library}: {len(own)} models of {families} families, {len(failed)} failures{failed or ''}, {floors} at "
            f"their floor; {sum(row['seconds'] for row in own):.0f} s, {sum(row['CPU s'] for row in own):.0f} s of CPU"
        )
    return "\n".join(lines)


def run(entry: Entry, *, compress: bool = False) -> dict[str, Any]:
    """Returns the row of one model; whatever is wrong is its status."""
    start, cpu = time.perf_counter(), time.process_time()
    row = _row(entry)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(build(entry), row, compress=compress)
        row["status"] = "ok"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        row["status"] = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    row["seconds"], row["CPU s"] = time.perf_counter() - start, time.process_time() - cpu
    return row


def _row(entry: Entry) -> dict[str, Any]:
    """Returns the columns of a model of which nothing is known yet."""
    return {
        "model": entry.name,
        "library": entry.library,
        "family": entry.family,
        "params": 0,
        "factorised": 0,
        "left": 0,
        "budget": KEEP,
        "kept": float("nan"),
        "difference": float("nan"),
        "in": "",
        "seconds": 0.0,
        "CPU s": 0.0,
        "status": "",
        "reasons": "",
    }


def _examine(specimen: Specimen, row: dict[str, Any], *, compress: bool) -> None:
    model = specimen.model
    row["params"] = measure_costs(model).params
    dense = _outputs(specimen)
    if not compress:
        row["in"], row["difference"] = _at_full_rank(specimen, dense)
    plan = _compress(specimen, row, compress=compress)
    row["factorised"], row["left"] = len(plan.factorised), len(plan.layers) - len(plan.factorised)
    row["reasons"] = _counted(model, plan)
    params = sum(p.numel() for p in model.parameters())
    row["kept"] = params / row["params"]
    _require(params == plan.compressed.params, f"the plan promised {plan.compressed.params} parameters, got {params}")
    _require(params <= row["budget"] * row["params"] + 1, f"{params} parameters are more than the budget allows")
    compressed = _outputs(specimen)
    _require_alike(dense, compressed, loose=bool(specimen.heads))
    if _is_finite(dense):
        _require(_is_finite(compressed), "the compressed model's outputs are not finite")
    if not compress:
        _require(row["difference"] <= EXACT, f"at full rank the outputs differ by {row['difference']:.1e}")


def _compress(specimen: Specimen, row: dict[str, Any], *, compress: bool) -> Plan:
    """Compresses the model to the budget, else to the smallest that the error states."""

    def once() -> Plan:
        budget = Budget(params=row["budget"])
        if compress:
            return compress_(specimen.model, budget, example_input=specimen.example)
        plan = search_ranks(specimen.model, budget, example_input=specimen.example, objective="weight")
        apply_plan_(specimen.model, plan)
        return plan

    try:
        return once()
    except InfeasibleBudgetError as error:
        found = re.search(r"params=([\d.]+\d)", str(error))
        _require(found is not None, f"the error states no floor: {error}")
        row["budget"] = float(found[1]) if found else KEEP
        return once()


def _at_full_rank(specimen: Specimen, dense: Any) -> tuple[str, float]:
    """Returns the precision and the largest relative difference of the outputs at full rank.

    Where it is too large in float32 it is worked out again in float64: behind hundreds of layers, or the
    choice of a box or an expert, rounding alone can make a difference. Random weights give boxes the same score
    to the last digits, so where a detector's boxes are others even then, what they are made from is compared.
    """
    difference = _difference(dense, _full_rank_outputs(specimen))
    if difference <= EXACT:
        return "float32", difference
    del dense
    double = Specimen(
        copy.deepcopy(specimen.model).double(),
        tree_map(lambda leaf: leaf.double() if _is_float(leaf) else leaf, specimen.example),
        specimen.heads,
    )
    dense, full = _outputs(double), _full_rank_outputs(double)
    difference = _difference(dense, full)
    if difference > EXACT and specimen.heads:
        return "float64, heads", _difference(dense["heads"], full["heads"])
    return "float64", difference


def _full_rank_outputs(specimen: Specimen) -> Any:
    twin = copy.deepcopy(specimen.model)
    with unfused(twin):
        layers = take_inventory(twin, trace=trace(twin, specimen.example))
    costs = measure_costs(twin)
    apply_plan_(twin, Plan(tuple(_full_rank(layer) for layer in layers if layer.reason is None), costs, costs))
    return _outputs(Specimen(twin, specimen.example, specimen.heads))


def _full_rank(layer: Layer) -> LayerPlan:
    kind = next((kind for kind in EXACT_KINDS if kind in layer.kinds), layer.kinds[0])
    ranks = DECOMPOSITIONS[kind].max_ranks(layer.operator.shape)
    return LayerPlan(layer.name, layer.type, kind, ranks, layer.weight_shape, 0.0, layer.parameters, layer.parameters)


def _outputs(specimen: Specimen) -> Any:
    torch.manual_seed(0)
    args, kwargs = whole_arguments(specimen.model, specimen.example)
    with torch.no_grad(), recorded(specimen.model, specimen.heads) as found:
        outputs = specimen.model(*args, **kwargs)
    return {"outputs": outputs, "heads": found}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_finite(outputs: Any) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(outputs) if _is_float(leaf))


def _difference(expected: Any, got: Any) -> float:
    """Returns max ‖a − b‖ / ‖a‖ over the pairs of tensors, infinite if their structures differ."""
    pairs = list(zip(tree_leaves(expected), tree_leaves(got), strict=False))
    if _structure(expected) != _structure(got):
        return float("inf")
    return max((_relative(a, b) for a, b in pairs if _is_float(a)), default=0.0)


def _relative(expected: Tensor, got: Tensor) -> float:
    same = expected == got  # infinite masks too
    expected, got = (torch.where(same, 0.0, t.double()) for t in (expected, got))
    distance, norm = float((expected - got).norm()), float(torch.where(same, got, expected).norm())
    return distance / max(norm, 1e-30) if distance else 0.0


def _structure(outputs: Any, *, loose: bool = False) -> tuple[Any, ...]:
    leaves, spec = tree_flatten(outputs)
    first = 1 if loose else 0
    sizes = [(leaf.dtype, tuple(leaf.shape)[first:]) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(spec), sizes


def _require_alike(expected: Any, got: Any, *, loose: bool) -> None:
    a, b = _structure(expected, loose=loose), _structure(got, loose=loose)
    _require(a == b, f"the outputs were {a}, now {b}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _counted(model: nn.Module, plan: Plan) -> str:
    """Returns how many layers were left for which reason; those without a matrix, norms and the like, as one."""
    counts: collections.Counter[str] = collections.Counter()
    with unfused(model):
        modules = dict(model.named_modules(remove_duplicate=False))
    for layer in plan.layers:
        if not layer.is_dense:
            continue
        own = modules[layer.name].parameters(recurse=False)
        short = next((s for part, s in _REASONS.items() if part in (layer.reason or "")), layer.reason or "?")
        if short == "type":
            short = layer.type if any(p.ndim > 1 and p.numel() > max(p.shape) for p in own) else "no matrix"
        elif short == "subclass":
            short = f"subclass {layer.type}"
        counts[short] += 1
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def _in_workers(entries: list[Entry], seconds: float, *, compress: bool) -> Iterable[dict[str, Any]]:
    """Yields a row per entry, each made in a process that is ended if it takes too long or too much memory."""
    spawn = multiprocessing.get_context("spawn")
    for first in range(0, len(entries), PER_WORKER):
        left = entries[first : first + PER_WORKER]
        while left:
            here, there = spawn.Pipe()
            worker = spawn.Process(target=_work, args=(there, left, compress), daemon=True)
            worker.start()
            there.close()
            for row in _rows_from(here, worker.pid or 0, left, seconds):
                left = left[1:]
                yield row
            worker.kill()
            worker.join()


def _rows_from(
    here: multiprocessing.connection.Connection, pid: int, entries: list[Entry], seconds: float
) -> Iterable[dict[str, Any]]:
    """Yields the rows a worker sends, the last one its failure if it fails."""
    for entry in entries:
        start, failure = time.monotonic(), None
        try:
            while failure is None and not here.poll(0.5):
                if time.monotonic() - start > seconds:
                    failure = f"not done after {seconds:g} s"
                elif _memory(pid) > MOST_MEMORY:
                    failure = f"needed more than {MOST_MEMORY / 2**30:g} GiB"
            if failure is None:
                yield here.recv()
        except EOFError:
            failure = "the process died"
        if failure is not None:
            elapsed = time.monotonic() - start
            yield {**_row(entry), "seconds": elapsed, "CPU s": elapsed, "status": failure}
            return


def _work(there: multiprocessing.connection.Connection, entries: list[Entry], compress: bool) -> None:
    torch.set_num_threads(1)
    for entry in entries:
        there.send(run(entry, compress=compress))


def _memory(pid: int) -> int:
    """Returns the bytes a process holds, 0 where that cannot be read."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * 4096


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the table on the screen."""
    return {
        "model": row["model"][:31],
        "library": row["library"],
        "params": row["params"],
        "factorised": f"{row['factorised']} of {row['factorised'] + row['left']}",
        "budget": row["budget"],
        "kept": row["kept"],
        "difference": f"{row['difference']:.0e}{' f64' if row['in'] == 'float64' else ''}",
        "s": round(row["seconds"]),
        "status": row["status"][:14],
        "left": row["reasons"][:30],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--limit", type=int, help="models of each library, evenly spread")
    parser.add_argument("--seconds", type=float, default=900, help="after which a model counts as failed")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compress", action="store_true")
    arguments = parser.parse_args()
    wanted = arguments.names or (COMPRESSED if arguments.compress else None)
    chosen: list[Entry] = []
    for library in arguments.libraries:
        listed = [e for e in list_entries([library]) if wanted is None or e.name in wanted]
        step = max(1, len(listed) // arguments.limit) if arguments.limit else 1
        chosen += listed[::step][: arguments.limit]
    main(chosen, seconds=arguments.seconds, resume=arguments.resume, compress=arguments.compress)
