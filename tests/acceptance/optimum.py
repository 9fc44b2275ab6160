"""The most that any rule can keep of independent drafts of one token."""

from __future__ import annotations

import itertools

import networkx
import torch
from torch import Tensor


def optimum(p: Tensor, q: Tensor, count: int) -> float:
    """The probability that the best rule keeps one of `count` independent draws from q, `p[V]` and `q[V]`.

    A rule sends the probability of each list of candidates to tokens in the list, to none more than p. So the most is
    the value of a linear program, a maximal flow; by duality (max-flow min-cut) that is the smallest of

        p(H) + 1 - q(H)^k      over all sets H of tokens

    where q(H)^k is the probability of lists that hold tokens of H only.
    """
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(p))), dtype=torch.float64)  # [2^V, V]
    return float((sets @ p + 1 - (sets @ q) ** count).min())


def optimum_of_flow(p: list[int], q: list[int]) -> float:
    """The same for two draws, by solving the linear program, in whole numbers. p and q have one sum."""
    total, lists = sum(p), itertools.product(range(len(q)), repeat=2)
    network = networkx.DiGraph()
    for pair in lists:
        network.add_edge("source", pair, capacity=q[pair[0]] * q[pair[1]])
        for token in pair:
            network.add_edge(pair, token)  # any amount
    for token, weight in enumerate(p):
        network.add_edge(token, "sink", capacity=weight * total)
    return float(networkx.maximum_flow_value(network, "source", "sink")) / total**2
