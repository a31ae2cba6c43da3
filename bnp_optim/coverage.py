"""Which parameters are preconditioned, which pass through, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Coverage", "CoverageRow"]


@dataclass(frozen=True)
class CoverageRow:
    """One parameter.

    Args:
        name: As in ``model.named_parameters()``; "group 0, parameter 3" for one that the model does not have.
        shape: Its shape.
        preconditioned: Whether its gradient goes through P.
        why: How it is preconditioned, or why not.
    """

    name: str
    shape: tuple[int, ...]
    preconditioned: bool
    why: str


@dataclass(frozen=True)
class Coverage:
    """All parameters of the model and of the optimizer; ``str()`` is a table."""

    rows: tuple[CoverageRow, ...]

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> CoverageRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def preconditioned(self) -> tuple[str, ...]:
        """Names of the parameters that go through P."""
        return tuple(row.name for row in self.rows if row.preconditioned)

    def __str__(self) -> str:
        head = ("parameter", "shape", "gradient", "how, or why not")
        cells = [
            (r.name, "×".join(map(str, r.shape)), "preconditioned" if r.preconditioned else "passed through", r.why)
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
            for line in (head, *cells)
        ]
        lines.insert(1, "  ".join("-" * w for w in (*widths, max(len(c[3]) for c in (head, *cells)))))
        return "\n".join([*lines, f"{len(self.preconditioned)} of {len(self.rows)} parameters preconditioned"])
