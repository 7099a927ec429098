"""An ONNX model written byte by byte, so that no package is needed for it: scores of a mean colour."""

from __future__ import annotations

from typing import Any

import numpy as np

_FLOAT, _OPSET, _IR = 1, 13, 8


def mean_colour_model(side: int, weights: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> bytes:
    """sigmoid(mean over the pixels @ weights): pixels (N, side, side, 3) in, scores (N, columns of weights) out."""
    mean = _node("ReduceMean", ["pixels"], ["mean"], _ints("axes", [1, 2]), _int("keepdims", 0))
    nodes = [mean, _node("MatMul", ["mean", "weights"], ["logits"]), _node("Sigmoid", ["logits"], ["scores"])]
    tensor = b"".join(_number(1, size) for size in weights.shape) + _number(2, _FLOAT)
    tensor += _bytes(8, b"weights") + _bytes(9, weights.astype("<f4").tobytes())
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"graph") + _bytes(5, tensor)
    graph += _bytes(11, _value("pixels", ["N", side, side, 3]))
    graph += _bytes(12, _value("scores", ["N", weights.shape[1]]))
    return _number(1, _IR) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _number(2, _OPSET))


def _node(kind: str, inputs: list[str], outputs: list[str], *attributes: bytes) -> bytes:
    names = [_bytes(1, name.encode()) for name in inputs] + [_bytes(2, name.encode()) for name in outputs]
    return b"".join(names) + _bytes(4, kind.encode()) + b"".join(_bytes(5, one) for one in attributes)


def _int(name: str, value: int) -> bytes:
    return _bytes(1, name.encode()) + _number(3, value) + _number(20, 2)


def _ints(name: str, values: list[int]) -> bytes:
    return _bytes(1, name.encode()) + b"".join(_number(8, value) for value in values) + _number(20, 7)


def _value(name: str, shape: list[int | str]) -> bytes:
    sides = [_bytes(2, side.encode()) if isinstance(side, str) else _number(1, side) for side in shape]
    tensor = _number(1, _FLOAT) + _bytes(2, b"".join(_bytes(1, side) for side in sides))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
