"""The graph of a plan as lines of text: the last stage, and under each stage what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kd.pipeline.plan import Node
from kd.roles import labels_of, teachers

TEE, ELBOW, BAR, SPACE = "├─ ", "└─ ", "│  ", "   "


def tree(nodes: Sequence[Node]) -> list[str]:
    r"""One line for each edge, and one for the last stage; a teacher's soft labels stand beside it.

    What stands under a stage is written where the stage comes first, and not again.

    Args:
        nodes: of one plan, in order.

    >>> teacher, labels = Node("teacher", "t", {}, {}, {}), Node("labels", "l", {}, {"teacher": "t"}, {})
    >>> student = Node("student", "s", {}, {"teacher": "t", "labels": "l"}, {})
    >>> print("\n".join(tree([teacher, labels, student])))
    student
    └─ teacher, through labels
    """
    by_key = {node.key: node for node in nodes}
    seen: set[str] = set()
    lines = [nodes[-1].name]

    def walk(node: Node, indent: str) -> None:
        seen.add(node.key)
        edges = [edge for edge in _edges(node.inputs) if edge[1] in by_key]
        for place, (role, key, labels) in enumerate(edges):
            last = place == len(edges) - 1
            below = by_key[key]
            said = below.name if below.name == role else f"{role}: {below.name}"
            said += f", through {by_key[str(labels)].name}" if labels in by_key else ""
            again = key in seen and bool(below.inputs)
            lines.append(f"{indent}{ELBOW if last else TEE}{said}{' (as above)' if again else ''}")
            if not again:
                walk(below, indent + (SPACE if last else BAR))

    walk(nodes[-1], "")
    return lines


def shape(nodes: Sequence[Node]) -> str:
    """A text that plans of the same graph share.

    >>> shape([Node("teacher", "t", {}, {}, {}), Node("student", "s", {}, {"teacher": "t"}, {})])
    'teacher() student(teacher=teacher)'
    """
    names = {node.key: node.name for node in nodes}
    return " ".join(
        f"{node.name}({', '.join(f'{role}={names.get(key)}' for role, key in node.inputs.items())})" for node in nodes
    )


def _edges(inputs: Mapping[str, str]) -> list[tuple[str, str, str | None]]:
    """(role, key, key of the soft labels that it is heard through) for each input."""
    heard = teachers(inputs)
    through = {labels_of(role) for role in heard}
    edges = [(role, inputs[role], inputs.get(labels_of(role))) for role in heard]
    return edges + [(role, key, None) for role, key in inputs.items() if role not in {*heard, *through}]
