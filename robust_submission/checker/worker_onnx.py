"""Try an ONNX model: runs by itself, inside `run_isolated`; the result is that of worker.py."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from probing import (
    BATCH,
    REQUEST,
    attempt,
    describe_outputs,
    limit_memory,
    probe_images,
    reactions,
    stability,
    write_result,
)

sys.path.remove(str(Path(__file__).parent))

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnxruntime

COUNTED = {  # products, also onnxruntime's own: which of its inputs is the second factor
    **dict.fromkeys(("Conv", "ConvInteger", "ConvTranspose", "FusedConv"), 1),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "MatMulInteger", "FusedMatMul"), 1),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
}
UNCOUNTED = ("If", "Loop", "Scan", "LSTM", "GRU", "RNN", "Einsum", "Attention", "DeformConv")
OWN = ("", "ai.onnx")  # ONNX's domain
INDICES = {  # or shapes: parameters only where a product takes them, or numbers are made of them
    getattr(onnx.TensorProto, name)
    for name in ("BOOL", "INT32", "INT64", "UINT32", "UINT64", "STRING")
}


def session(model: onnx.ModelProto, plain: bool = False) -> onnxruntime.InferenceSession:
    """A session on the CPU; `plain` keeps the graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = REQUEST["threads"]
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that its nodes hold: branches, bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs(inner)


def constants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The numbers that a model holds, with their names, which the branches of an If may share.

    Of sparse tensors those that are written down.
    """
    for graph in graphs(model.graph):
        yield from ((each.name, each) for each in graph.initializer)
        yield from ((each.values.name, each.values) for each in graph.sparse_initializer)
        for node in (node for node in graph.node if node.op_type == "Constant"):
            for value in node.attribute:
                kinds = {"value": value.t, "sparse_value": value.sparse_tensor.values}
                floats = [value.f] if value.name == "value_float" else value.floats
                listed = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [len(floats)], floats)
                yield node.output[0], kinds.get(value.name, listed)


def load_model() -> onnx.ModelProto:
    """Read the file alone, never what it points to; its functions are inlined."""
    model = onnx.load(REQUEST["onnx"], load_external_data=False)
    model = onnx.inliner.inline_local_functions(model)
    outside = onnx.TensorProto.EXTERNAL
    if names := [name for name, each in constants(model) if each.data_location == outside]:
        raise ValueError(f"{len(names)} tensors in other files, {names[0]} first")
    onnx.checker.check_model(model)
    return model


def interface(model: onnx.ModelProto) -> dict[str, Any]:
    """Inputs, and the version of the operators."""
    constants = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in constants]
    first = inputs[0].type.tensor_type
    shape = [each.dim_param or each.dim_value or "?" for each in first.shape.dim]
    return {
        "inputs": len(inputs),
        "shape": shape,
        "float32": first.elem_type == onnx.TensorProto.FLOAT,
        "opset": max(each.version for each in model.opset_import if not each.domain),
    }


def runner(model: onnx.ModelProto, fixed: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """Images (N, 3, S, S) to outputs, in the batches that the model takes."""
    ready = session(model)
    name = ready.get_inputs()[0].name
    batch = fixed or BATCH

    def run(images: np.ndarray) -> np.ndarray:
        found = list[np.ndarray]()
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padding = np.zeros((batch - len(part) if fixed else 0, *images.shape[1:]), np.float32)
            logits = ready.run(None, {name: np.concatenate([part, padding])})[0]
            found.append(np.asarray(logits)[: len(part)])
        return np.concatenate(found)

    return run


def sizes(model: onnx.ModelProto) -> dict[str, int]:
    """How many numbers the graph holds, without indices and shapes."""
    taken = set[str]()
    for node in (node for graph in graphs(model.graph) for node in graph.node):
        if node.op_type in (*COUNTED, "Cast", "DequantizeLinear"):
            taken |= {node.input[0], node.input[COUNTED.get(node.op_type, 0)]}
    counted = (
        math.prod(each.dims)
        for name, each in constants(model)
        if name in taken or each.data_type not in INDICES
    )
    return {"total": sum(counted)}


def factors(node: onnx.NodeProto) -> tuple[str, str, str]:
    """The names of a product's factors and of what they make."""
    return node.input[0], node.input[COUNTED[node.op_type]], node.output[0]


def multiply_adds(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Of one node: output elements times the products that make each."""
    first, second, made = (shapes[name] for name in factors(node))
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if "Conv" in node.op_type:
        return math.prod(made) * math.prod(second[1:])
    turned = len(first) > 1 and any(each.name == "transA" and each.i for each in node.attribute)
    return math.prod(made) * first[-2 if turned else -1]


def operations(model: onnx.ModelProto, images: np.ndarray) -> dict[str, Any]:
    """Multiply-adds for one image, from the shapes that really occur."""
    nodes = [node for node in model.graph.node if node.op_type in COUNTED]
    shapes = {each.name: tuple(each.dims) for each in model.graph.initializer}
    wanted = {name for node in nodes for name in factors(node)} - {*shapes}
    given = {each.name for each in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - given))
    ready = session(model, plain=True)
    name = ready.get_inputs()[0].name
    found = ready.run(None, {name: images})
    names = [each.name for each in ready.get_outputs()]
    shapes |= {key: np.asarray(value).shape for key, value in zip(names, found, strict=True)}
    shapes[name] = images.shape
    others = [node for node in model.graph.node if node.op_type not in COUNTED]
    unseen = {
        each.op_type for each in others if each.domain not in OWN or each.op_type in UNCOUNTED
    }
    total = sum(multiply_adds(node, shapes) for node in nodes) / len(images)
    return {"graph": total, "uncounted": sorted(unseen)}


def examine() -> dict[str, Any]:
    """Every probe in turn."""
    results = dict[str, Any]()
    model = attempt(results, "load", load_model)
    if not isinstance(model, onnx.ModelProto):
        return results
    attempt(results, "parameters", lambda: sizes(model))
    first = attempt(results, "interface", lambda: interface(model)).get("shape", ["?"])[0]
    fixed = first if isinstance(first, int) else None
    run = attempt(results, "load", lambda: runner(model, fixed))
    if isinstance(run, dict):
        return results
    results["load"] = True
    images = probe_images()
    if REQUEST.get("logits"):
        attempt(results, "logits", lambda: run(images).tolist())
    found = attempt(results, "outputs", lambda: describe_outputs(run, images))
    if len(found.get("shape", ())) == 2:
        one = images[:1].repeat(fixed or 1, 0)
        attempt(results, "stability", lambda: stability(run, images[:4]))
        attempt(results, "operations", lambda: operations(model, one))
        if REQUEST.get("labelled"):
            attempt(results, "reactions", lambda: reactions(run, images))
    return results


if __name__ == "__main__":
    limit_memory()
    write_result(examine())
