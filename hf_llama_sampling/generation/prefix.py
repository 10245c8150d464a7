"""A prefix tree of texts, so that tokens which several texts share are forwarded once.

Texts are sorted, so neighbours share the longest prefixes. The tree branches where they differ::

    1 5 6 7 9          1 5 ─┬─ 6 7 ─┬─ 9        edges are runs of tokens; a text is a path from the root
    1 5 6 7 8 8             │       └─ 8 8
    1 5 2                   └─ 2

The last token of a text is never forwarded, since its score is in the logits before it. So texts that differ in their
last token alone share one path, as do a text and its own prefixes. What this module does not do: it runs no model and
holds no tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


@dataclass(eq=False)
class Edge:
    """A run of tokens that some texts share, after the runs above it; leaves end at the end of a text.

    Entry i of `logprobs` and `greedy` is about the token after token i of the edge: the edge's own next token, and the
    best one. `at_branch[i, t]` is the logprob of another token t there.
    """

    start: int  # position of its first token in the text
    tokens: Ids  # (n,)
    parent: "Edge | None"
    children: list["Edge"] = field(default_factory=list)
    read: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # (n,) which logits are read
    at_branch: dict[tuple[int, int], float] = field(default_factory=dict)
    logprobs: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # (n,)
    greedy: Ids = field(default_factory=lambda: np.zeros(0, np.int32))  # (n,) the best token
    top: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # by index, the best tokens
    ids: list[int] = field(default_factory=list)  # all ids that some text names
    named: dict[int, dict[int, tuple[float, int]]] = field(default_factory=dict)  # by index and id, logprob and rank
    weight: int = 0  # edges below it
    longest: int = 0  # end of the longest text below it

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)


@dataclass(eq=False)
class Text:
    """A text, and the position from which its tokens are scored."""

    tokens: Ids
    first: int  # position of the first token whose score is wanted, at least 1
    begin: int = 0  # position of its first token in the caller's text, if this is a window of it
    named: Sequence[int] = ()  # ids whose logprobs and ranks are wanted too
    leaf: Edge | None = None  # end of the path that holds its inputs; None if it has no token to score

    def path(self) -> Iterator[tuple[Edge, int, int]]:
        """Yield the edges whose logits it needs, each with the range of indices: edge, begin, end."""
        edges = []
        edge = self.leaf
        while edge is not None and edge.end >= self.first:
            edges.append(edge)
            edge = edge.parent
        for edge in reversed(edges):
            begin, end = max(self.first - 1, edge.start), min(len(self.tokens) - 1, edge.end)
            if begin < end:
                yield edge, begin - edge.start, end - edge.start

    def reads(self, edge: Edge, index: int) -> bool:
        """Whether it needs the logits after this token of an edge."""
        return any(other is edge and begin <= index < end for other, begin, end in self.path())

    def logprobs(self) -> list[float]:
        """Return the logprobs of its tokens from `first` on."""
        found: list[float] = []
        for edge, begin, end in self.path():
            found += edge.logprobs[begin:end].tolist()
            last = edge.start + end  # position of the token after the edge's last index in use
            key = (end - 1, int(self.tokens[last]))
            if key in edge.at_branch:
                found[-1] = edge.at_branch[key]
        return found

    def is_greedy(self) -> bool:
        """Whether each of its tokens from `first` on is the most probable one."""
        return all(
            np.array_equal(edge.greedy[begin:end], self.tokens[edge.start + begin + 1 : edge.start + end + 1])
            for edge, begin, end in self.path()
        )

    def top(self) -> list[list[tuple[int, float]]]:
        """Return the best tokens at each position from `first` on."""
        return [edge.top[index] for edge, begin, end in self.path() for index in range(begin, end)]

    def named_logprobs(self) -> list[list[tuple[int, float, int]]]:
        """Return the named ids with logprobs and ranks, at each position from `first` on."""
        return [
            [(token, *edge.named[index][token]) for token in self.named] if self.named else []
            for edge, begin, end in self.path()
            for index in range(begin, end)
        ]


def grow(texts: Sequence[Text], *, shared: bool = True) -> Edge:
    """Build the tree; its root holds no tokens. With `shared=False` only texts with equal inputs share an edge."""
    inputs = [text.tokens[:-1] for text in texts]
    # Big-endian bytes sort as the ids do, and faster.
    keys = [ids.astype(">u4").tobytes() for ids in inputs]
    order = sorted((index for index, text in enumerate(texts) if text.first < len(text.tokens)), key=keys.__getitem__)
    root = Edge(0, np.zeros(0, np.int32), None)
    path = [root]
    before: Ids | None = None
    held: list[Text] = []  # texts whose inputs will lie on the next path
    for place, index in enumerate(order):
        held.append(texts[index])
        following = keys[order[place + 1]] if place + 1 < len(order) else None
        if following is not None and (following.startswith(keys[index]) if shared else following == keys[index]):
            continue
        row = inputs[index]
        common = _common(before, row) if before is not None and shared else 0
        below = None
        while path[-1].end > common:
            below = path.pop()
        if path[-1].end < common:
            assert below is not None
            path.append(_split(below, common))
        leaf = Edge(path[-1].end, row[path[-1].end :], path[-1])
        path[-1].children.append(leaf)
        path.append(leaf)
        for text in held:
            text.leaf = leaf
        before, held = row, []
    _measure(root)
    for text in texts:
        _mark(text)
    return root


def _common(ids: Ids, others: Ids) -> int:
    """The length of the longest common prefix."""
    most = min(len(ids), len(others))
    differs = ids[:most] != others[:most]
    return int(differs.argmax()) if differs.any() else most


def _split(edge: Edge, position: int) -> Edge:
    """Split an edge at a position of the text; return the upper part, whose only child is the lower one."""
    parent = edge.parent
    assert parent is not None
    upper = Edge(edge.start, edge.tokens[: position - edge.start], parent, [edge])
    parent.children[-1] = upper  # the edges on the path are the youngest children
    edge.tokens, edge.start, edge.parent = edge.tokens[position - edge.start :], position, upper
    return upper


def _measure(root: Edge) -> None:
    """Fill in `weight` and `longest`, which depend on the edges below, and clear `read`."""
    above = [root]
    for edge in above:
        above += edge.children
    for edge in reversed(above):
        edge.read = np.zeros(len(edge.tokens), bool)
        edge.weight = sum(1 + child.weight for child in edge.children)
        edge.longest = max((child.longest for child in edge.children), default=edge.end)


def _mark(text: Text) -> None:
    """Mark on a text's path the logits that it needs, and the tokens that it scores with them."""
    for edge, begin, end in text.path():
        edge.read[begin:end] = True
        edge.ids += [token for token in dict.fromkeys(text.named) if token not in edge.ids]
        token = int(text.tokens[edge.start + end])
        if end == len(edge.tokens) or token != edge.tokens[end]:
            edge.at_branch[end - 1, token] = 0.0


@dataclass(eq=False)
class Step:
    """Tokens to forward after a cache of the `start` tokens before them: one edge, or several joined.

    `edges` are those that this step scores, each with its first index in `tokens`.
    """

    start: int
    tokens: Ids
    edges: list[tuple[Edge, int]]
    last: Edge

    @property
    def is_leaf(self) -> bool:
        """Whether nothing follows, so that its cache is not needed."""
        return not self.last.children

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)

    def columns(self) -> npt.NDArray[np.bool_]:
        """(n,) which of its logits are needed."""
        read = np.zeros(len(self.tokens), bool)
        for edge, at in self.edges:
            read[at : at + len(edge.tokens)] |= edge.read
        return read


def steps_below(edge: Edge, keep: Callable[[Step], bool]) -> list[Step]:
    """List the steps to forward from an edge's cache; join each edge that `keep` rejects to every edge below it.

    A joined edge is forwarded once for each edge below it, and scored in the first of these steps only.
    """
    found: list[Step] = []
    waiting: list[tuple[Edge, Ids, list[tuple[Edge, int]]]] = [
        (child, np.zeros(0, np.int32), []) for child in reversed(edge.children)
    ]
    while waiting:
        child, before, edges = waiting.pop()
        step = Step(edge.end, np.concatenate([before, child.tokens]), [*edges, (child, len(before))], child)
        if step.is_leaf or keep(step):
            found.append(step)
            continue
        for index, grandchild in reversed(list(enumerate(child.children))):
            waiting.append((grandchild, step.tokens, [] if index else step.edges))
    return found
