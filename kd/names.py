"""How a view is called: its side, then a layer's path or a part that every network has, then what is done to it.

Planning reads these without torch; `kd.models.outline` finds what a part is in a network.
"""

from __future__ import annotations

import re

POOLED = ":pooled"  # one vector a sample
MAPS = ":maps"  # tokens, and maps with their channels last, as (N, C, H, W)
INPUT = ":input"  # what goes into the layer, not what comes out
OUTPUT = ":output"  # what comes out, as without it: a layer that is called like a part is meant
THROUGH = ":through:"  # what the layers behind it, joined by +, make of each position
EARLIER = "earlier.logits"  # what the student said of a sample when it saw it last
SEVERAL = ("stages", "preactivations", "branches")  # these stand for a list
_PART = re.compile(
    r"stages|preactivations|branches|middle|last|embedding|unpooled|classes|ensemble|(?:stage|preactivation|branch)[1-9]\d*"
)


def layer(name: str) -> str:
    """The path of the layer, without what is done to it.

    >>> layer("fc:input:pooled")
    'fc'
    """
    return name.partition(":")[0]


def suffix(name: str) -> str:
    """What is done to the layer's output.

    >>> suffix("blocks.3:maps:pooled"), suffix("conv3")
    (':maps:pooled', '')
    """
    return name[len(layer(name)) :]


def steps(name: str) -> list[tuple[str, str]]:
    """What is done, one after the other, each with what it names.

    >>> steps("blocks.3:maps:through:norm+head")
    [('maps', ''), ('through', 'norm+head')]
    >>> steps("conv3"), steps("conv3:pooled")
    ([], [('pooled', '')])
    """
    found, words = [], iter(suffix(name).split(":")[1:])
    for word in words:
        found.append((word, next(words, "") if word == "through" else ""))
    return found


def part(name: str) -> str | None:
    """The part that a name stands for, or None where it is the path of a layer.

    >>> part("stage2:pooled"), part("layer2"), part("stages.2"), part("stages:output")
    ('stage2', None, None, None)
    """
    path = layer(name)
    return path if _PART.fullmatch(path) and not suffix(name).startswith(OUTPUT) else None


def stored(name: str) -> str:
    """The name under which what a teacher said of a layer is stored: pooled, each suffix once.

    >>> stored("layer3"), stored("layer3:pooled"), stored("embedding")
    ('layer3:pooled', 'layer3:pooled', 'embedding:pooled')
    """
    return f"{name.removesuffix(POOLED)}{POOLED}"
