"""Convert a model to an ONNX graph for prediction. This module needs the onnx package."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from npbn.backend import to_numpy
from npbn.layers import Activation, AvgPool2d, BatchNorm, Conv2d, Flatten, Linear, Sequential

OPSET = 13  # This version, of 2020, has all needed operators, and every current runtime reads it.
IR_VERSION = 8


def onnx_graph(model: Sequential, image: tuple[int, int, int]) -> bytes:
    """Return the ONNX graph of a model in prediction mode, serialized.

    The input "images" has the shape (N, C, H, W) for any N, and contains floats, pixels / 255. The
    outputs are "logits", (N, classes), and "classes", (N,), which are the predicted classes.

    Each batch norm is merged into the convolution or linear layer before it. For a feature with the
    moving mean μ and the moving variance v, scale is γ/√(v + eps). The merged weight is
    weight·scale, and the merged bias is (bias − μ)·scale + β.

    Args:
        model: the model. Each batch norm must directly follow a convolution or a linear layer.
        image: the shape (C, H, W) of an image.
    """
    state = {key: to_numpy(value).astype(np.float64) for key, value in model.state_dict().items()}
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []
    classes = 0
    x = "images"

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(name: str, value: np.ndarray) -> str:
        value = np.ascontiguousarray(value, np.float32)
        constants.append(numpy_helper.from_array(value, name))
        return name

    neighbours = [None, *model.layers, None]
    for i, layer in enumerate(model.layers):
        previous, following = neighbours[i], neighbours[i + 2]
        y = f"y{i}"
        if isinstance(layer, Conv2d | Linear):
            weight, bias = state[f"{i}.weight"], state[f"{i}.bias"]
            if isinstance(following, BatchNorm):
                gamma, beta, mean, var = (
                    state[f"{i + 1}.{name}"].reshape(-1)
                    for name in ("gamma", "beta", "moving_mean", "moving_var")
                )
                scale = gamma / np.sqrt(var + following.eps)
                weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
                bias = (bias - mean) * scale + beta
            inputs = [x, constant(f"weight{i}", weight), constant(f"bias{i}", bias)]
            if isinstance(layer, Conv2d):
                pads = [*layer.padding, *layer.padding]
                x = node("Conv", inputs, y, strides=[*layer.stride], pads=pads)
            else:
                x = node("Gemm", inputs, y, transB=1)
                classes = len(bias)
        elif isinstance(layer, Activation):
            x = node(type(layer).__name__.capitalize(), [x], y)  # ONNX spells ReLU as Relu.
        elif type(layer) is AvgPool2d and layer.padding == (0, 0):
            size, stride = [*layer.kernel_size], [*layer.stride]
            x = node("AveragePool", [x], y, kernel_shape=size, strides=stride)
        elif isinstance(layer, Flatten):
            x = node("Flatten", [x], y)
        elif not (isinstance(layer, BatchNorm) and isinstance(previous, Conv2d | Linear)):
            raise ValueError(f"expected a layer of LeNet, got {layer!r}")
    node("Identity", [x], "logits")
    node("ArgMax", [x], "classes", axis=1, keepdims=0)

    def value(name: str, kind: int, *shape: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["N", *shape])

    graph = helper.make_graph(
        nodes,
        "LeNet",
        [value("images", TensorProto.FLOAT, *image)],
        [value("logits", TensorProto.FLOAT, classes), value("classes", TensorProto.INT64)],
        constants,
    )
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    made.doc_string = "images: float32, pixels / 255"
    checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())
