"""Check and run an ONNX model, in the bounded process; the result has the form of worker.py's."""

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnxruntime

from robust_submission.checker.probes import (
    BATCH,
    BatchRunner,
    Interface,
    Probes,
    Stage,
    run_worker,
)

COUNTED = {  # products, also onnxruntime's own, and which of their inputs is the second factor
    **dict.fromkeys(("Conv", "ConvInteger", "ConvTranspose", "FusedConv"), 1),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "MatMulInteger", "FusedMatMul"), 1),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
}
UNCOUNTED = ("If", "Loop", "Scan", "LSTM", "GRU", "RNN", "Einsum", "Attention", "DeformConv")
STANDARD_DOMAINS = ("", "ai.onnx")
INDICES = {  # also shapes: parameters only if a product reads them or they are cast to floats
    getattr(onnx.TensorProto, name)
    for name in ("BOOL", "INT32", "INT64", "UINT32", "UINT64", "STRING")
}


def open_session(
    model: onnx.ModelProto, threads: int, plain: bool = False
) -> onnxruntime.InferenceSession:
    """A session on the CPU; `plain` keeps the graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes: branches, bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from all_graphs(inner)


def constants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The tensors that a model holds, with their names; two branches may use the same name.

    Of a sparse tensor only the values that are stored.
    """
    for graph in all_graphs(model.graph):
        yield from ((each.name, each) for each in graph.initializer)
        yield from ((each.values.name, each.values) for each in graph.sparse_initializer)
        for node in (node for node in graph.node if node.op_type == "Constant"):
            for value in node.attribute:
                kinds = {"value": value.t, "sparse_value": value.sparse_tensor.values}
                floats = [value.f] if value.name == "value_float" else value.floats
                listed = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [len(floats)], floats)
                yield node.output[0], kinds.get(value.name, listed)


def load_onnx(path: str) -> onnx.ModelProto:
    """Read this file alone, never files that it points to, and inline its functions."""
    model = onnx.load(path, load_external_data=False)
    model = onnx.inliner.inline_local_functions(model)
    outside = onnx.TensorProto.EXTERNAL
    if names := [name for name, each in constants(model) if each.data_location == outside]:
        raise ValueError(f"{len(names)} tensors in other files, {names[0]} first")
    onnx.checker.check_model(model)
    return model


def read_interface(model: onnx.ModelProto) -> Interface:
    """Inputs, and the version of the operators."""
    initialized = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in initialized]
    first = inputs[0].type.tensor_type
    return Interface(
        inputs=len(inputs),
        shape=[each.dim_param or each.dim_value or "?" for each in first.shape.dim],
        float32=first.elem_type == onnx.TensorProto.FLOAT,
        opset=max(each.version for each in model.opset_import if not each.domain),
    )


def onnx_runner(model: onnx.ModelProto, fixed: int | None, threads: int) -> BatchRunner:
    """The model as a function of arrays, in batches of the size that it is `fixed` to, if any."""
    session = open_session(model, threads)
    name = session.get_inputs()[0].name
    batch = fixed or BATCH

    def run(images: np.ndarray) -> np.ndarray:
        found = list[np.ndarray]()
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            padding = np.zeros((batch - len(part) if fixed else 0, *images.shape[1:]), np.float32)
            logits = session.run(None, {name: np.concatenate([part, padding])})[0]
            found.append(np.asarray(logits)[: len(part)])
        return np.concatenate(found)

    return run


def count_stored(model: onnx.ModelProto) -> int:
    """How many numbers the graph stores, without indices and shapes."""
    multiplied = set[str]()
    for node in (node for graph in all_graphs(model.graph) for node in graph.node):
        if node.op_type in (*COUNTED, "Cast", "DequantizeLinear"):
            multiplied |= {node.input[0], node.input[COUNTED.get(node.op_type, 0)]}
    counted = (
        math.prod(each.dims)
        for name, each in constants(model)
        if name in multiplied or each.data_type not in INDICES
    )
    return sum(counted)


def product_names(node: onnx.NodeProto) -> tuple[str, str, str]:
    """The names of a product's two factors and of its result."""
    return node.input[0], node.input[COUNTED[node.op_type]], node.output[0]


def multiply_adds(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Of one product: elements of the result times products per element."""
    first, second, made = (shapes[name] for name in product_names(node))
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if "Conv" in node.op_type:
        return math.prod(made) * math.prod(second[1:])
    transposed = len(first) > 1 and any(each.name == "transA" and each.i for each in node.attribute)
    return math.prod(made) * first[-2 if transposed else -1]


def count_in_graph(model: onnx.ModelProto, images: np.ndarray, threads: int) -> float:
    """Multiply-adds per image, from the shapes that occur when the graph runs."""
    products = [node for node in model.graph.node if node.op_type in COUNTED]
    shapes = {each.name: tuple(each.dims) for each in model.graph.initializer}
    wanted = {name for node in products for name in product_names(node)} - {*shapes}
    given = {each.name for each in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - given))
    session = open_session(model, threads, plain=True)
    name = session.get_inputs()[0].name
    found = session.run(None, {name: images})
    names = [each.name for each in session.get_outputs()]
    shapes |= {key: np.asarray(value).shape for key, value in zip(names, found, strict=True)}
    shapes[name] = images.shape
    return sum(multiply_adds(node, shapes) for node in products) / len(images)


def find_uncounted(model: onnx.ModelProto) -> list[str]:
    """Operators that may multiply but are not counted."""
    kinds = {
        node.op_type
        for node in model.graph.node
        if node.op_type in UNCOUNTED or node.domain not in STANDARD_DOMAINS
    }
    return sorted(kinds - COUNTED.keys())


def probe_onnx(probes: Probes) -> None:
    """Every probe in turn."""
    request, result = probes.request, probes.result
    model = probes.attempt(Stage.LOAD, lambda: load_onnx(request.submission))
    if model is None:
        return
    result.parameters = probes.attempt(Stage.PARAMETERS, lambda: count_stored(model))
    result.interface = probes.attempt(Stage.INTERFACE, lambda: read_interface(model))
    first = result.interface.shape[0] if result.interface and result.interface.shape else "?"
    fixed = first if isinstance(first, int) else None
    run = probes.attempt(Stage.LOAD, lambda: onnx_runner(model, fixed, request.threads))
    if run is None:
        return
    result.loaded = True
    if probes.probe_outputs(run):
        one = probes.images[:1].repeat(fixed or 1, 0)
        probes.count("graph", lambda: count_in_graph(model, one, request.threads))
        result.uncounted = find_uncounted(model)


if __name__ == "__main__":
    run_worker(probe_onnx)
