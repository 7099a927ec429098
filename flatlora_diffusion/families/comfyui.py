"""Workflows of ComfyUI: in the format of its server, and from that in the format of its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_COLUMN, _HEIGHT = 340, 280  # distance of nodes on the page, in pixels


class Kind(NamedTuple):
    """A node type: its linked inputs, its outputs, and its widgets in order."""

    links: Mapping[str, str]
    outputs: tuple[str, ...]
    widgets: tuple[str, ...]


class Nodes:
    """The nodes of a workflow in the format of ComfyUI's server: by number, links as [node, output]."""

    def __init__(self) -> None:
        self.by_number: dict[str, Any] = {}

    def add(self, kind: str, **inputs: Any) -> str:
        """Add a node and return its number."""
        number = str(len(self.by_number) + 1)
        self.by_number[number] = {"class_type": kind, "inputs": inputs}
        return number


def page_of(api: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return a workflow in the format of ComfyUI's page from that of its server.

    Args:
        api: nodes by number.
        kinds: node types by class name.
    """
    links = [
        [int(node["inputs"][name][0]), node["inputs"][name][1], int(number), slot, kind]
        for number, node in api.items()
        for slot, (name, kind) in enumerate(kinds[node["class_type"]].links.items())
    ]
    return {
        "last_node_id": len(api),
        "last_link_id": len(links),
        "nodes": [_on_page(int(number), node, kinds[node["class_type"]], links) for number, node in api.items()],
        "links": [[number, *link] for number, link in enumerate(links, 1)],
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _on_page(number: int, node: dict[str, Any], kind: Kind, links: list[list[Any]]) -> dict[str, Any]:
    """Return a node with its position; links are numbered from 1."""
    values = {"control_after_generate": "fixed", **node["inputs"]}
    incoming = {link[3]: index for index, link in enumerate(links, 1) if link[2] == number}
    return {
        "id": number,
        "type": node["class_type"],
        "pos": [_COLUMN * ((number - 1) // 2), _HEIGHT * ((number - 1) % 2)],
        "size": [_COLUMN - 40, _HEIGHT - 60],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [
            {"name": name, "type": value, "link": incoming[slot]}
            for slot, (name, value) in enumerate(kind.links.items())
        ],
        "outputs": [
            {
                "name": name,
                "type": name,
                "slot_index": slot,
                "links": [index for index, link in enumerate(links, 1) if link[:2] == [number, slot]],
            }
            for slot, name in enumerate(kind.outputs)
        ],
        "properties": {"Node name for S&R": node["class_type"]},
        "widgets_values": [values[name] for name in kind.widgets],
    }
