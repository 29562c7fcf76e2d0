"""Near duplicates: MinHash signatures of all rows, candidates by bands of them, clusters of those alike enough.

Broder 1997, "On the resemblance and containment of documents"; bands as in Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", chapter 3. Permutations and the number of bands come from datasketch; here they are applied to many
rows at once, and candidates are found by sorting instead of a table of buckets, so that memory holds one band only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from slmops.prepare_data.words import Hashes, Indices, Ragged, mix

Signatures = npt.NDArray[np.uint16]

SHINGLE_WORDS = 5
"""Words in a row that are compared as one."""
NUM_HASHES = 128
"""Length of a signature; the similarity that it shows is off by 0.035 (one standard deviation) at 0.8."""
# Bands are chosen so that few pairs are missed; pairs that come up wrongly are found out by their signatures.
FALSE_POSITIVE_WEIGHT, FALSE_NEGATIVE_WEIGHT = 0.05, 0.95
PAIRS_AT_ONCE = 16_384


class MinHasher:
    """Makes signatures whose share of equal values estimates the Jaccard similarity of two texts' shingles."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

        weights = (FALSE_POSITIVE_WEIGHT, FALSE_NEGATIVE_WEIGHT)
        bands = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES, weights=weights)
        self.num_bands, self.band_size = int(bands.b), int(bands.r)
        self._factors, self._addends = MinHash(num_perm=NUM_HASHES, seed=1, scheme="affine32").permutations

    def sign(self, shingles: Ragged) -> tuple[Signatures, Hashes]:
        """Signatures of texts, and hashes of their bands.

        A signature keeps 16 bits of each value, of which one in 65,536 is equal by chance (Li and König 2010, "b-bit
        minwise hashing"). Texts without a shingle must be left out of any comparison.

        Returns:
            [num_texts, NUM_HASHES] uint16, and [num_bands, num_texts] uint64.
        """
        filled = shingles.lengths > 0
        minima = np.zeros((NUM_HASHES, len(filled)), np.uint32)
        if filled.any():
            # The hashes are mixed, so their upper halves are hashes as well.
            values = (shingles.values >> np.uint64(32)).astype(np.uint32)
            starts = shingles.starts[:-1][filled]
            permuted = np.empty_like(values)
            found = np.empty((NUM_HASHES, len(starts)), np.uint32)
            for factor, addend, row in zip(self._factors, self._addends, found, strict=True):
                np.multiply(values, factor, out=permuted)
                np.add(permuted, addend, out=permuted)
                np.minimum.reduceat(permuted, starts, out=row)
            minima[:, filled] = found
        return minima.T.astype(np.uint16), self._bands(minima)

    def _bands(self, minima: npt.NDArray[np.uint32]) -> Hashes:
        bands = np.zeros((self.num_bands, minima.shape[1]), np.uint64)
        for band, values in enumerate(bands):
            for row in minima[band * self.band_size : (band + 1) * self.band_size]:
                values[:] = mix(values + row)
        return bands


def candidates(band: Hashes, rank: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of rows whose band is the same, some thousands at a time, so few that work stays linear.

    In a run of n rows with one band each is paired with the first of them and with its neighbour, 2 (n - 1) pairs in
    all. `rank` orders rows by what does not depend on their place in the file.

    Yields:
        Two arrays of row numbers; the first of a pair has the lower rank.
    """
    order = np.lexsort((rank, band))
    values = band[order]
    alike = values[1:] == values[:-1]
    run_starts = np.flatnonzero(np.r_[True, ~alike])
    first = np.repeat(order[run_starts], np.diff(np.r_[run_starts, len(order)]))[1:]
    places = np.flatnonzero(alike)
    for begin in range(0, len(places), PAIRS_AT_ONCE):
        some = places[begin : begin + PAIRS_AT_ONCE]
        left, right = np.r_[first[some], order[some]], np.r_[order[some + 1], order[some + 1]]
        yield left, right


class Clusters:
    """Rows that belong together; each cluster is known by its member of the lowest rank."""

    def __init__(self, rank: Indices) -> None:
        self._rank = rank
        self._row_of_rank = np.empty_like(rank)
        self._row_of_rank[rank] = np.arange(len(rank))
        self._parent = np.arange(len(rank))  # by rank, so that the smaller one is the root

    def join(self, left: Indices, right: Indices) -> None:
        """Make one cluster of the clusters of each pair of rows."""
        a, b = self._rank[left], self._rank[right]
        while True:
            low, high = np.minimum(self._parent[a], self._parent[b]), np.maximum(self._parent[a], self._parent[b])
            apart = low < high
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            np.minimum.at(self._parent, high[apart], low[apart])
            self._flatten()

    def apart(self, left: Indices, right: Indices) -> npt.NDArray[np.bool_]:
        """Which pairs of rows are in different clusters."""
        return np.not_equal(self._parent[self._rank[left]], self._parent[self._rank[right]])

    def roots(self) -> Indices:
        """[num_rows] the row that stands for the cluster of each row; itself where it is alone."""
        return self._row_of_rank[self._parent[self._rank]]

    def _flatten(self) -> None:
        while True:
            above = self._parent[self._parent]
            if np.array_equal(above, self._parent):
                return
            self._parent = above


def cluster(
    bands: Iterator[Hashes],
    rows: Indices,
    rank: Indices,
    signatures: Callable[[Indices], Signatures],
    threshold: float,
) -> Clusters:
    """Clusters of rows that are alike by at least `threshold`, directly or through others.

    Args:
        bands: Each band's hashes of all rows, one band after the other.
        rows: Numbers of the rows to compare.
        rank: [num_rows] a number for each row of `bands` that does not depend on the rows' order.
        signatures: Gives the signatures of rows by number.
        threshold: Share of equal values that two signatures must have.
    """
    clusters = Clusters(rank)
    for band in bands:
        for left, right in candidates(band[rows], rank[rows]):
            left, right = rows[left], rows[right]
            new = clusters.apart(left, right)
            left, right = left[new], right[new]
            if not len(left):
                continue
            alike = (signatures(left) == signatures(right)).mean(axis=1) >= threshold
            clusters.join(left[alike], right[alike])
    return clusters
