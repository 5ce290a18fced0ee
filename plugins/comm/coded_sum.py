"""One job's gradient, summed up from plain and coded results as they come in (arXiv 1612.03301, 2211.13802)."""

from typing import Any

from torch import Tensor

from fulgurite.plugins.comm.encoding import Code, decode_vector, encoding_matrix


class Coder:
    """A code's rows, and how its results are put together."""

    def __init__(self, n: int, s: int, code: Code, seed: int) -> None:
        self.n, self.s, self.matrix = n, s, encoding_matrix(n, s, code, seed)
        supports = [row.nonzero()[:, 0] for row in self.matrix]
        self.rows = [(support.tolist(), row[support]) for support, row in zip(supports, self.matrix, strict=True)]
        self.sums_runs = code != "cyclic"
        self.classes_alike = n % (s + 1) == 0  # then each run of chunks is that of s + 1 workers, and any one will do

    def place(self, worker: int) -> tuple[int, int, int]:
        """The piece of the batch that a worker's result belongs to, its class, and the results that fill the piece."""
        k = worker % (self.s + 1)
        return (worker // (self.s + 1), k, 1) if self.classes_alike else (0, k, len(range(k, self.n, self.s + 1)))

    @property
    def pieces(self) -> int:
        """Pieces that each class fills."""
        return self.n // (self.s + 1) if self.classes_alike else 1


class JobSum:
    """What is known of one job's gradient: a sum of all that is final, and the groups that are not."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.done: set[int] = set()  # groups in the sum
        self.filled: dict[int, set[int]] = {}  # pieces of other groups in the sum
        self.parts: dict[int, dict[tuple[int, int], tuple[Tensor, int]]] = {}  # group -> place -> sum and count
        self.error = 0.0  # of the cyclic code's combinations

    def add_coded(self, code: Coder, group: int, worker: int, result: Tensor) -> None:
        """Adds a worker's coded result, once."""
        if group not in self.done:
            (self._add_run if code.sums_runs else self._add_row)(code, group, worker, result)

    def add(self, result: Tensor, weight: float = 1) -> None:
        """Adds what belongs to the gradient as it is."""
        if self.total is None:
            self.total = result * weight
        else:
            self.total.add_(result, alpha=weight)

    def _add_run(self, code: Coder, group: int, worker: int, result: Tensor) -> None:
        """Adds to the sum of the worker's class; the first class that fills a piece is taken, the others dropped."""
        piece, k, size = code.place(worker)
        filled, parts = self.filled.setdefault(group, set()), self.parts.setdefault(group, {})
        if piece in filled:
            return
        if (piece, k) in parts:
            total, count = parts[piece, k]
            parts[piece, k] = total.add_(result), count + 1
        elif size > 1:
            parts[piece, k] = result.clone(), 1
        if size == 1 or parts[piece, k][1] == size:
            self.add(result if size == 1 else parts[piece, k][0])
            filled.add(piece)
            self.parts[group] = {place: part for place, part in parts.items() if place[0] != piece}
        if len(filled) == code.pieces:
            self._finish(group)

    def _add_row(self, code: Coder, group: int, worker: int, result: Tensor) -> None:
        """Keeps the result until its weight is known: when all but ``s`` are there."""
        parts = self.parts.setdefault(group, {})
        parts[worker, 0] = result.clone(), 1
        if len(parts) == code.n - code.s:
            weights = decode_vector(code.matrix, [place[0] for place in parts])
            self.error = max(self.error, float((weights @ code.matrix - 1).abs().max()))
            for (sender, _), (vector, _) in sorted(parts.items(), key=lambda part: part[0]):
                self.add(vector, float(weights[sender]))
            self._finish(group)

    def _finish(self, group: int) -> None:
        self.done.add(group)
        self.parts.pop(group, None)
        self.filled.pop(group, None)

    def state_dict(self) -> dict[str, Any]:
        """The sums as they are now, in tensors and plain containers."""
        parts = [
            [group, *place, total.clone(), count]
            for group, places in self.parts.items()
            for place, (total, count) in places.items()
        ]
        filled = {group: sorted(pieces) for group, pieces in self.filled.items()}
        total = None if self.total is None else self.total.clone()
        return {"total": total, "done": sorted(self.done), "filled": filled, "parts": parts}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "JobSum":
        """Goes on from :meth:`state_dict`."""
        loaded = cls()
        loaded.total = None if state["total"] is None else state["total"].clone()
        loaded.done = set(state["done"])
        loaded.filled = {group: set(pieces) for group, pieces in state["filled"].items()}
        for group, piece, k, total, count in state["parts"]:
            loaded.parts.setdefault(group, {})[piece, k] = total.clone(), count
        return loaded
