"""Rows that belong together: they share a passage or a query, directly or through others.

A group is never divided between splits, and it is the unit of the statistics: its rows succeed or fail together.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shared.records import Row


def group_ids(rows: list[Row]) -> list[int]:
    """A group's number for each row, from 0 on without gaps. Upper and lower case are not told apart."""
    nodes: dict[tuple[str, str], int] = {}
    edges = [
        [nodes.setdefault((column, row[column].casefold()), len(nodes)) for column in ("anchor", "positive")]
        for row in rows
    ]
    queries, passages = np.array(edges, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (queries, passages)), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    return labels[queries].tolist()
