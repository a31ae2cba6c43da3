"""Recurrent layers unrolled by hand, one sequence and one step at a time, in float64.

Only forward, and all that a run is for is which inputs every weight multiplied. Weights have PyTorch's names and
its order of gates: i, f, g, o of an LSTM and r, z, n of a GRU. Nothing here shares code with the package.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Cell:
    """One layer in one direction; `seen` collects what its weights multiplied, by their names."""

    mode: str  # "RNN_TANH" | "RNN_RELU" | "LSTM" | "GRU"
    weights: dict[str, Array]
    suffix: str = ""  # "_l0", "_l1_reverse", …
    seen: dict[str, list[Array]] = field(default_factory=lambda: defaultdict(list))

    def apply(self, which: str, a: Array) -> Array:
        """W [1; a] of the weight "ih" or "hh", written down."""
        self.seen[f"weight_{which}{self.suffix}"].append(a.copy())
        u = self.weights[f"weight_{which}{self.suffix}"] @ a
        bias = self.weights.get(f"bias_{which}{self.suffix}")
        return u if bias is None else u + bias

    def step(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        """The next (h, c); c is a LSTM's alone."""
        u, v = self.apply("ih", x), self.apply("hh", h)
        if self.mode == "GRU":
            u_r, u_z, u_n = np.split(u, 3)
            v_r, v_z, v_n = np.split(v, 3)
            r, z = sigmoid(u_r + v_r), sigmoid(u_z + v_z)
            return (1 - z) * np.tanh(u_n + r * v_n) + z * h, c
        if self.mode == "LSTM":
            i, f, g, o = np.split(u + v, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            projection = self.weights.get(f"weight_hr{self.suffix}")
            return h if projection is None else projection @ h, c
        return np.tanh(u + v) if self.mode == "RNN_TANH" else np.maximum(u + v, 0.0), c


def unroll(
    mode: str,
    weights: dict[str, Array],
    sequences: list[Array],
    h0: Array,
    c0: Array,
    *,
    layers: int,
    bidirectional: bool,
) -> tuple[list[Array], dict[str, Array]]:
    """The outputs of the last layer by sequence, and by weight the rows that it multiplied.

    `sequences` are (steps, features) each, of any lengths; `h0` and `c0` (layers × directions, sequences, units).
    """
    outputs = [np.array(s, dtype=np.float64) for s in sequences]
    seen: dict[str, Array] = {}
    directions = 2 if bidirectional else 1
    for layer in range(layers):
        halves = []
        for direction in range(directions):
            cell = Cell(mode, weights, f"_l{layer}" + ("_reverse" if direction else ""))
            start = layer * directions + direction
            halves.append([run(cell, x, h0[start, b], c0[start, b], direction) for b, x in enumerate(outputs)])
            seen |= {name: np.array(rows) for name, rows in cell.seen.items()}
        outputs = [np.concatenate(both, axis=1) for both in zip(*halves, strict=True)]
    return outputs, seen


def run(cell: Cell, x: Array, h: Array, c: Array, backwards: int) -> Array:
    """One sequence through one cell: its hidden states, in the order of time."""
    states = []
    for row in x[::-1] if backwards else x:
        h, c = cell.step(row, h, c)
        states.append(h)
    return np.array(states[::-1] if backwards else states)


def sigmoid(u: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-u))
