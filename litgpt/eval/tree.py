"""Contexts as a tree, in which what they have in common stands once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

LEAST_SHARED = 32  # tokens: a call of its own for fewer costs more than it saves

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A part of a context, or a continuation.

    Attributes:
        tokens: of this part.
        children: parts that follow it.
        requests: numbers of the requests whose context ends here; for a continuation, the number of its request.
        is_continuation: whether predictions after all of its tokens are needed, and not only after the last.
        row: of the caches.
    """

    tokens: Tokens
    children: list["Node"] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    is_continuation: bool = False
    row: int = 0


def tree_of(contexts: dict[Tokens, list[int]], share: bool = True) -> list[Node]:
    """The roots of a tree of contexts, each with the numbers of its requests.

    Args:
        contexts: each with at least one token.
        share: whether different contexts may share the calls for their first tokens.
    """
    ordered = sorted(contexts)
    if share:
        return _branches(ordered, contexts, 0)
    return [Node(context, requests=contexts[context]) for context in ordered]


def _branches(ordered: Sequence[Tokens], contexts: dict[Tokens, list[int]], start: int) -> list[Node]:
    """Nodes for sorted contexts that have their first `start` tokens in common."""
    common = [_common(a, b, start) for a, b in zip(ordered, ordered[1:], strict=False)]
    nodes, i = [], 0
    while i < len(ordered):
        shared = list(takewhile(lambda n: n >= start + LEAST_SHARED, common[i:]))
        members = ordered[i : i + len(shared) + 1]
        if shared:
            end = min(shared)
            ends_here = len(members[0]) == end  # and no other does
            children = _branches(members[1:] if ends_here else members, contexts, end)
            nodes.append(Node(members[0][start:end], children, contexts[members[0]] if ends_here else []))
        else:
            nodes.append(Node(members[0][start:], requests=contexts[members[0]]))
        i += len(members)
    return nodes


def _common(a: Tokens, b: Tokens, start: int) -> int:
    """Number of first tokens that two contexts have in common, if those before `start` are."""
    n, end = start, min(len(a), len(b))
    while n < end and a[n] == b[n]:
        n += 1
    return n


def assign_rows(roots: Sequence[Node]) -> int:
    """Assign a row to every node, the first child having its parent's. Returns their number."""
    n = 0

    def assign(node: Node, row: int) -> None:
        nonlocal n
        node.row = row
        for i, child in enumerate(node.children):
            if i:
                n += 1
            assign(child, n - 1 if i else row)

    for root in roots:
        n += 1
        assign(root, n - 1)
    return n
