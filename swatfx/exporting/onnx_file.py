"""ONNX files: exported programs, with names that a person finds again, and stored weights.

A stored weight is unpacked by a function of the file itself, made of standard operators, whose
inputs are constants: a runtime that folds constants, as ONNX Runtime does, unpacks it when it loads
the file, and computes what it would with a dense one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from swatfx.errors import ExportError
from swatfx.exporting.archives import need
from swatfx.exporting.names import Call, readable
from swatfx.exporting.packing import PARTS, Stored, stored
from swatfx.exporting.program import first_line
from swatfx.files.atomic import write_atomically

_DOMAIN = "swatfx"
_WEIGHTED = {"Conv": 0, "Gemm": 0, "MatMul": -1}  # operator -> the filters' axis of its weight
_SCOPES = "pkg.torch.onnx.name_scopes"


def write_onnx(program: ExportedProgram, path: Path, values: str, packed: bool) -> None:
    """Write a program, its weights stored as `swatfx.exporting.packing.stored` tells.

    Raises:
        ExportError: a missing package, or a model that torch.onnx cannot follow.
    """
    need("onnxscript", "onnx")
    try:
        found = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot export the model: {type(error).__name__}: {first_line(error)}"
        ) from error
    assert found is not None  # with dynamo=True it returns what it would write
    _rename(found.model.graph)
    if values != "exact" or packed:
        _store(found.model, values, packed)
    write_atomically(path, lambda temporary: found.save(str(temporary)))


def _rename(graph: Any) -> None:
    ours = {value.name for value in [*graph.inputs, *graph.outputs]}
    calls = (_call(node, graph.initializers) for node in graph)
    names = readable(calls, ours | graph.initializers.keys())
    for node in graph:
        node.name = names[node.outputs[0].name]
        node.metadata_props.clear()  # paths of the machine that it was made on
        for index, value in enumerate(node.outputs):
            if value.name not in ours:
                value.name = f"{node.name}:{index}" if index else node.name


def _call(node: Any, constants: Any) -> Call:
    scopes = node.metadata_props.get(_SCOPES, "")
    above = [scope.strip("'\" ") for scope in scopes.strip("[]").split(",")][:-1]
    module = above[-1] if above else ""
    read = [value.name for value in node.inputs if value is not None]
    for name in read[1:3]:
        if name in constants and name.endswith(".weight"):
            module = name.removesuffix(".weight")
    return Call(node.outputs[0].name, node.op_type.lower(), module, read)


def _store(model: Any, values: str, packed: bool) -> None:
    """Put stored weights in the place of dense ones."""
    import onnx_ir as ir

    graph = model.graph
    for constant, axis in list(_weights(graph)):
        name, array = constant.name, constant.const_value.numpy()
        weight = stored(torch.from_numpy(array.copy()), values, packed, axis)
        if weight.bitmask is None and weight.values.dtype == weight.dtype:
            continue
        inputs = [
            _constant(graph, f"{name}.{part}", tensor)
            for part in PARTS
            if (tensor := getattr(weight, part)) is not None
        ]
        function = _function(weight, model.opset_imports[""])
        model.functions.setdefault(function.identifier(), function)
        attributes = {"shape": list(weight.shape), "dtype": int(constant.dtype)}
        unpack = ir.node(
            function.name, inputs, attributes, domain=_DOMAIN, name=name, num_outputs=1
        )
        graph.initializers.pop(name)
        unpack.outputs[0].name = name
        unpack.outputs[0].type, unpack.outputs[0].shape = constant.type, constant.shape
        constant.replace_all_uses_with(unpack.outputs[0])
        graph.insert_before(graph[0], unpack)
    model.opset_imports[_DOMAIN] = 1


def _weights(graph: Any) -> Iterator[tuple[Any, int]]:
    """(constant, axis of its filters) of each float weight that only such layers read."""
    for constant in graph.initializers.values():
        uses = list(constant.uses())
        axes = {_WEIGHTED.get(use.node.op_type) if use.idx == 1 else None for use in uses}
        plain = len(axes) == 1 and None not in axes
        if plain and len(constant.shape) > 1 and constant.dtype.is_floating_point():
            yield constant, next(iter(axes))  # type: ignore[misc]


def _constant(graph: Any, name: str, tensor: torch.Tensor) -> Any:
    """A new constant of the graph."""
    import onnx_ir as ir
    from onnx_ir import tensor_adapters

    held = tensor_adapters.TorchTensor(tensor.contiguous(), name=name)
    type_ = ir.TensorType(held.dtype)
    value = ir.Value(name=name, type=type_, shape=held.shape, const_value=held)
    graph.register_initializer(value)
    return value


def _function(weight: Stored, opset: int) -> Any:
    """What unpacks such a weight, as a function of the file."""
    import onnx
    import onnx_ir as ir

    kinds = onnx.AttributeProto

    def made(operator: str, inputs: str, output: str, refers: Any = None, **options: Any) -> Any:
        """A node; `refers`: one of its attributes is what the function's is."""
        node = onnx.helper.make_node(operator, inputs.split(), [output], **options)
        if refers is not None:
            name, kind, of = refers
            node.attribute.append(kinds(name=name, type=kind, ref_attr_name=of))
        return node

    def constant(name: str, kind: int, *values: int) -> Any:
        tensor = onnx.helper.make_tensor(name, kind, [len(values)], values)
        return made("Constant", "", name, value=tensor)

    dtype = ("to", kinds.INT, "dtype")
    nodes = [
        made("Constant", "", "shape", ("value_ints", kinds.INTS, "shape")),
        made("Cast", "values", "dense", dtype),
    ]
    inputs, name, dense = ["values"], "Widen", "dense"
    if weight.bitmask is not None:
        inputs, name, dense = ["values", "bitmask"], "Unpack", "spread"
        nodes += [
            constant("shifts", onnx.TensorProto.UINT8, *range(8)),
            constant("two", onnx.TensorProto.UINT8, 2),
            constant("flat", onnx.TensorProto.INT64, -1),
            constant("start", onnx.TensorProto.INT64, 0),
            constant("one", onnx.TensorProto.INT64, 1),
            made("Unsqueeze", "bitmask one", "bytes"),
            made("BitShift", "bytes shifts", "shifted", direction="RIGHT"),
            made("Mod", "shifted two", "bits"),
            made("Reshape", "bits flat", "all"),
            made("ReduceProd", "shape", "count", keepdims=1),
            made("Slice", "all start count", "kept"),
            made("Cast", "kept", "mask", to=onnx.TensorProto.INT32),
            # The i-th value lies at the i-th bit that is set, and zero, before them, elsewhere.
            made("CumSum", "mask start", "counted"),
            made("Mul", "counted mask", "places"),
            made("ConstantOfShape", "one", "nothing"),
            made("Cast", "nothing", "zero", dtype),
            made("Concat", "zero dense", "choices", axis=0),
            made("Gather", "choices places", "spread"),
        ]
    if weight.scale is None:
        nodes.append(made("Reshape", f"{dense} shape", "weight"))
    else:
        inputs, name = [*inputs, "scale"], f"{name}Scaled"
        nodes += [made("Reshape", f"{dense} shape", "steps"), made("Mul", "steps scale", "weight")]
    opsets = [onnx.helper.make_opsetid("", opset)]
    attributes = ["shape", "dtype"]
    proto = onnx.helper.make_function(_DOMAIN, name, inputs, ["weight"], nodes, opsets, attributes)
    return ir.serde.deserialize_function(proto)
