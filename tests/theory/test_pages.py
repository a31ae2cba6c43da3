"""The code of the pages runs as it stands, and says what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    exec(code, scope)
    return scope


def test_theory_page(capsys: pytest.CaptureFixture[str]) -> None:
    scope = run("theory.md")
    assert "λ_max 330.6" in capsys.readouterr().out
    assert scope["rate"] == pytest.approx(3.8 / 330.6, rel=1e-3)
    assert scope["told"].lambda_max == pytest.approx(scope["seen"], rel=0.35)  # one narrow net
    assert scope["raw"].condition_number > 100 * scope["preconditioned"].condition_number
    assert scope["edge"] == pytest.approx(14.93, abs=0.01)


def test_fisher_page() -> None:
    scope = run("fisher.md")
    assert scope["after"] != scope["before"]
