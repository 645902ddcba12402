"""Rows that belong together: they share a passage or a query, directly or through others.

A group is never divided between splits, and it is the unit of the statistics: its rows succeed or fail together.
"""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from shared.records import Row

COMPARED_AT_ONCE = 256  # texts; with 100,000 others a few hundred MB
COMMON = 1_000  # three-letter sequences that are multiplied as a dense matrix; of 100,000 texts 400 MB


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


def alike_group_ids(rows: list[Row], similarity: float) -> list[int]:
    """As `group_ids`, where rows whose queries or passages are `similarity` alike or more belong together, too."""
    labels = np.array(group_ids(rows))
    for column in ("anchor", "positive"):
        texts, first = [row[column] for row in rows], 0
        for alike in jaccard_similarities(texts, texts):
            ones, others = np.nonzero(alike >= similarity)
            joined = coo_array((np.ones(len(ones)), (labels[first + ones], labels[others])), shape=(len(rows),) * 2)
            labels = connected_components(joined, directed=False)[1][labels]
            first += len(alike)
    return np.unique(labels, return_inverse=True)[1].tolist()


def jaccard_similarities(texts: list[str], others: list[str]) -> Iterator[np.ndarray]:
    """How alike the texts are to the others, 0 to 1, some rows of shape (texts, others) at a time.

    That is the Jaccard similarity of the texts' sets of three-letter sequences. Every pair is compared.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # two seconds of imports that not all need pay

    counter = CountVectorizer(analyzer="char_wb", ngram_range=(3, 3), binary=True, dtype=np.float32)
    sequences = csr_array(counter.fit_transform(texts + others))
    sizes = sequences.sum(axis=1)
    # Common ones stand in so many texts that a dense product is faster: five times, of 30,000 passages of 150 words.
    by_frequency = np.argsort(-sequences.sum(axis=0), kind="stable")
    common, rare = sequences[:, by_frequency[:COMMON]].toarray(), sequences[:, by_frequency[COMMON:]]
    other_sizes, other_common, other_rare = sizes[len(texts) :], common[len(texts) :].T, rare[len(texts) :].T.tocsr()
    for start in tqdm(range(0, len(texts), COMPARED_AT_ONCE), "near-duplicates", unit="block", delay=5):
        rows = slice(start, min(start + COMPARED_AT_ONCE, len(texts)))
        shared = (rare[rows] @ other_rare).toarray() + common[rows] @ other_common
        yield shared / (sizes[rows, None] + other_sizes - shared)
