"""An ONNX protobuf without what nobody who runs it needs."""

from __future__ import annotations

from typing import Any

_ZERO, _ONE = ("pads", "output_padding"), ("strides", "dilations")


def slim_(model: Any) -> Any:
    """Removes notes and documentation: traces of the code (with paths of this machine), of rewrites, of shapes.

    Returns:
        The model.
    """
    graph = model.graph
    holders = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions]
    holders += [node for function in model.functions for node in function.node]
    for holder in holders:
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]
        if holder.HasField("doc_string"):
            holder.ClearField("doc_string")
    del graph.value_info[:]
    return model


def shorten_(model: Any) -> Any:
    """Makes a small file smaller: short names, each constant once, no attributes that say the default.

    Models with parts of their own (loops, branches, functions), whose names may be used inside, stay as they are.

    Returns:
        The model.
    """
    graph = model.graph
    if len(model.functions) or any(a.HasField("g") or len(a.graphs) for n in graph.node for a in n.attribute):
        return model
    same = _merge_constants_(graph)
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}

    def short(name: str) -> str:
        name = same.get(name, name)
        return name if not name or name in kept else names.setdefault(name, f"_{len(names):x}")

    for node in graph.node:
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
        node.ClearField("name")
        _drop_defaults_(node)
    for constant in graph.initializer:
        constant.name = short(constant.name)
    return model


def _merge_constants_(graph: Any) -> dict[str, str]:
    """Keeps one of equal constants; returns the names of the others with that of the one."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    for constant in list(graph.initializer):
        name = constant.name
        constant.ClearField("name")
        content = constant.SerializeToString(deterministic=True)
        constant.name = name
        if content in first and name not in outputs:
            same[name] = first[content]
            graph.initializer.remove(constant)
        else:
            first.setdefault(content, name)
    return same


def _drop_defaults_(node: Any) -> None:
    """Drops attributes of convolutions that say what is so without them."""
    if "Conv" not in node.op_type:
        return
    for attribute in list(node.attribute):
        name, values = attribute.name, set(attribute.ints)
        usual = name in _ZERO and values == {0}
        usual |= name in _ONE and values == {1}
        usual |= name == "group" and attribute.i == 1
        usual |= name == "auto_pad" and attribute.s == b"NOTSET"
        usual |= name == "kernel_shape" and node.op_type != "ConvTranspose"
        if usual:
            node.attribute.remove(attribute)
