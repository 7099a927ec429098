"""Tensors and optimizer state on disk: safetensors plus JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flatlora_diffusion.storage.atomic_io import atomic_write

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write `tensors` and a JSON-serializable `header` to one safetensors file."""
    metadata = {key: json.dumps(value) for key, value in (header or {}).items()}
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def cached_tensors(path: Path | None, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from the file, or compute them by `make` and save them there; they are on the CPU.

    Without a path they are always computed.
    """
    if path is not None and path.is_file():
        return load_tensors(path)[0]
    tensors = {name: value.cpu() for name, value in make().items()}
    if path is not None:
        save_tensors(path, tensors)
    return tensors


class Contents(NamedTuple):
    """The layout of a safetensors file.

    entries: header entry of each tensor; numbers: values of the 0-dimensional tensors; sha256: of all bytes after the
    header; first: the first of those bytes.
    """

    entries: dict[str, dict[str, Any]]
    numbers: dict[str, float]
    sha256: str
    first: bytes


def contents_of(tensors: Iterable[tuple[str, Tensor]], first: int = 0) -> Contents:
    """Return the layout of a file of these tensors, in their order, with its `first` bytes."""
    entries: dict[str, dict[str, Any]] = {}
    numbers: dict[str, float] = {}
    digest, start, head = hashlib.sha256(), 0, bytearray()
    for name, tensor in tensors:
        raw = tensor_bytes(tensor)
        end = start + len(raw)
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        if tensor.ndim == 0:
            numbers[name] = float(tensor)
        digest.update(raw)
        head += raw[: max(first - len(head), 0)]
        start = end
    return Contents(entries, numbers, digest.hexdigest(), bytes(head))


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return the start of a safetensors file: the header's length and the header, padded to a multiple of 8 bytes."""
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":"), ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def save_stream(
    path: Path, tensors: Callable[[], Iterable[tuple[str, Tensor]]], contents: Contents, metadata: Mapping[str, str]
) -> None:
    """Write tensors one after the other, so that a large file needs little memory.

    `tensors` must yield the same tensors that `contents` was computed from.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        handle.write(header_bytes(contents.entries, metadata))
        for _, tensor in tensors():
            handle.write(tensor_bytes(tensor))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header that `save_tensors` wrote."""
    with safe_open(path, framework="pt", device="cpu") as file:
        header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 (not a dict)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor as stored in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors named `optimizer.INDEX.FIELD` and a JSON-serializable header.

    A field that is a dict (as in bitsandbytes) is stored as `optimizer.INDEX.FIELD/KEY`.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, fields in state["state"].items():
        for name, value in _flat(fields):
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    flat: list[tuple[str, str, Any]] = []
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            flat.append((index, name, value))
    flat += [(index, name, value) for index, fields in header["scalars"].items() for name, value in fields.items()]
    state: dict[int, dict[str, Any]] = {}
    for index, name, value in flat:
        fields = state.setdefault(int(index), {})
        field, _, key = name.partition("/")
        if key:
            fields.setdefault(field, {})[key] = value
        else:
            fields[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": header["param_groups"]})


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield name, value
