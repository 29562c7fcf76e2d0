"""Which artifact came from which: collected from the sidecars, laid out in layers for a small drawing.

The layout is Sugiyama's in short (Sugiyama et al. 1981, doi:10.1109/TSMC.1981.4308636): layers by depth, long edges
broken into pieces, rows ordered by the mean of their neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from slmops import champion
from slmops.artifacts import Sidecar, Summary
from slmops.pages.formatting import count, many

BOX_WIDTH, LINE_HEIGHT, BOX_PADDING = 128, 15, 8
COLUMN_GAP, ROW_GAP, LANE_HEIGHT = 40, 16, 6


@dataclass(frozen=True)
class Artifact:
    """One artifact in the words of the report."""

    name: str
    """teacher, train rows, benchmark of cpu-int4, …"""
    about: str
    """What is good to know of it: rows, parameters, variants."""
    summary: Summary

    @property
    def lines(self) -> tuple[str, str]:
        """Name and more for a narrow box."""
        head, _, measured = self.name.partition(" of ")
        return (head, f"of {measured}") if measured else (self.name, self.about or self.summary.digest[:12])


@dataclass(frozen=True)
class Box:
    """Artifacts with the same parents and children, drawn as one box. `x`, `y`: its upper left corner in pixels."""

    artifacts: tuple[Artifact, ...]
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class Picture:
    """Boxes, and the lines between them as SVG path data."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    paths: tuple[str, ...]


@dataclass
class _Node:
    """A box, or the place where a long line crosses a layer (then without artifacts)."""

    artifacts: list[Artifact]
    layer: int
    parents: list[_Node] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    middle: float = 0.0

    @property
    def height(self) -> float:
        return 2 * BOX_PADDING + 2 * LINE_HEIGHT * len(self.artifacts) if self.artifacts else LANE_HEIGHT

    @property
    def x(self) -> float:
        return self.layer * (BOX_WIDTH + COLUMN_GAP)


def collect(sidecars: Iterable[Sidecar], roles: dict[str, str]) -> list[Artifact]:
    """All of `sidecars` and their ancestors, each once, oldest first. `roles` names models by their digest."""
    found: dict[tuple[object, ...], Summary] = {}
    for sidecar in sidecars:
        for summary in (*sidecar.ancestors, sidecar.summary()):
            found.setdefault((summary.digest, summary.step, summary.parents), summary)
    oldest_first = sorted(found.values(), key=lambda summary: summary.created_at)
    return [Artifact(_name(summary, roles), _about(summary), summary) for summary in oldest_first]


def draw(artifacts: Sequence[Artifact]) -> Picture:
    """Lay the artifacts out from left to right, each behind all that it came from."""
    layers = _layers(_with_lanes(_stacked(artifacts)))
    for _ in range(4):
        for layer in layers[1:]:
            _order(layer, [node.parents for node in layer])
        for layer in reversed(layers[:-1]):
            _order(layer, [node.children for node in layer])
    nodes = [node for layer in layers for node in layer]
    top = min((node.middle - node.height / 2 for node in nodes), default=0.0) - 2
    for node in nodes:
        node.middle -= top
    return Picture(
        width=len(layers) * (BOX_WIDTH + COLUMN_GAP) - COLUMN_GAP,
        height=max((node.middle + node.height / 2 for node in nodes), default=0.0) + 2,
        boxes=tuple(
            Box(tuple(node.artifacts), node.x, round(node.middle - node.height / 2, 1), node.height)
            for node in nodes
            if node.artifacts
        ),
        paths=tuple(_line(node, child) for node in nodes for child in node.children),
    )


def _name(summary: Summary, roles: dict[str, str]) -> str:
    facts = summary.facts
    if summary.kind == "chat_dataset":
        return f"{facts.get('split', 'dataset')} rows"
    if summary.kind == "hf_model":
        return roles.get(summary.digest) or ("base model" if summary.step == "import" else "model")
    if summary.step == champion.STEP:
        return "champion"
    if summary.kind in ("evaluation", "benchmark"):
        measured = roles.get(str(facts.get("model_digest")), str(facts.get("variant", "")))
        return f"{summary.kind} of {measured}" if measured else summary.kind
    return str(summary.kind)


def _about(summary: Summary) -> str:
    facts = summary.facts
    if isinstance(parameters := facts.get("num_parameters"), int):
        return f"{many(parameters)} parameters"
    if isinstance(rows := facts.get("num_rows"), int):
        return f"{count(rows)} rows"
    if isinstance(variants := facts.get("variants"), dict):
        return ", ".join(variants)
    return str(facts.get("source", ""))


def _stacked(artifacts: Sequence[Artifact]) -> list[_Node]:
    """One node per set of artifacts that have the same parents and the same children, connected, in layers."""
    parents = _parents(artifacts)
    children: list[set[int]] = [set() for _ in artifacts]
    for number, of in enumerate(parents):
        for parent in of:
            children[parent].add(number)
    stacks: dict[object, list[int]] = {}
    for number, of in enumerate(parents):
        alone = None if of else number
        stacks.setdefault((frozenset(of), frozenset(children[number]), alone), []).append(number)
    nodes = [_Node([artifacts[number] for number in stack], 0) for stack in stacks.values()]
    node_of = {number: node for node, stack in zip(nodes, stacks.values(), strict=True) for number in stack}
    for node, stack in zip(nodes, stacks.values(), strict=True):
        node.parents = list({id(node_of[p]): node_of[p] for p in parents[stack[0]]}.values())
        for before in node.parents:
            before.children.append(node)
    _assign_layers(nodes)
    return nodes


def _parents(artifacts: Sequence[Artifact]) -> list[list[int]]:
    """The places of each one's parents in `artifacts`, oldest first.

    Two artifacts can have the same bytes, and so the same digest: a teacher that answers each prompt as the training
    rows do writes these rows again. A digest means the youngest artifact with it that is older than its child.
    """
    found: dict[str, int] = {}
    parents = []
    for number, artifact in enumerate(artifacts):
        parents.append(sorted({found[digest] for digest in artifact.summary.parents if digest in found}))
        found[artifact.summary.digest] = number
    return parents


def _assign_layers(nodes: Sequence[_Node]) -> None:
    """Each node one behind its last parent; those without parents right before their first child."""
    for _ in nodes:
        for node in nodes:
            node.layer = 1 + max((parent.layer for parent in node.parents), default=-1)
    for node in nodes:
        if not node.parents and node.children:
            node.layer = min(child.layer for child in node.children) - 1


def _with_lanes(nodes: list[_Node]) -> list[_Node]:
    """Break lines that cross a layer, so that they have a place in it and do not run behind its boxes."""
    lanes: list[_Node] = []
    for node in nodes:
        far = [child for child in node.children if child.layer > node.layer + 1]
        if not far:
            continue
        before = node
        for layer in range(node.layer + 1, max(child.layer for child in far)):
            lane = _Node([], layer, parents=[before])
            before.children.append(lane)
            for child in [child for child in far if child.layer == layer + 1]:
                node.children.remove(child)
                child.parents[child.parents.index(node)] = lane
                lane.children.append(child)
            lanes.append(lane)
            before = lane
    return nodes + lanes


def _layers(nodes: Sequence[_Node]) -> list[list[_Node]]:
    layers: list[list[_Node]] = [[] for _ in range(1 + max((node.layer for node in nodes), default=-1))]
    for node in nodes:
        layers[node.layer].append(node)
    for layer in layers:
        _order(layer, [[] for _ in layer])
    return layers


def _order(layer: list[_Node], neighbours: Sequence[Sequence[_Node]]) -> None:
    """Sort a layer by where its nodes want to be, and place them there as far as they leave each other room."""
    wanted = {
        id(node): fmean(other.middle for other in others) if others else node.middle
        for node, others in zip(layer, neighbours, strict=True)
    }
    layer.sort(key=lambda node: wanted[id(node)])
    bottom = float("-inf")
    for node in layer:
        node.middle = max(wanted[id(node)], bottom + ROW_GAP + node.height / 2)
        bottom = node.middle + node.height / 2
    shift = fmean(wanted[id(node)] - node.middle for node in layer)
    for node in layer:
        node.middle += shift


def _line(start: _Node, end: _Node) -> str:
    x, y = start.x + BOX_WIDTH, round(start.middle, 1)
    to_x, to_y = end.x, round(end.middle, 1)
    bend = COLUMN_GAP / 2
    through = f"M{start.x},{y} H{x} " if not start.artifacts else f"M{x},{y} "
    return f"{through}C{x + bend},{y} {to_x - bend},{to_y} {to_x},{to_y}"
