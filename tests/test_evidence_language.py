"""The character GPT: its text, its net, one training, the plan and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

import matplotlib.pyplot as plt

from benchmarks import language
from benchmarks.evidence import contenders, corpus, language_engine, language_times
from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.corpus import ALPHABET, corpus_of, encode, files, standard_library
from benchmarks.evidence.gpt import GPT, loss_of
from benchmarks.evidence.language_engine import (
    UNIFORM,
    LanguageRun,
    Net,
    factor,
    fingerprint,
    score,
    train,
    training_windows,
    validation_windows,
)
from benchmarks.evidence.language_figure import LINES, language_figure
from benchmarks.evidence.language_plan import METHODS, PRESETS, LanguageScope, cells_of, choose
from benchmarks.evidence.language_report import curves_of, markdown
from benchmarks.evidence.language_times import steps_to
from benchmarks.evidence.tables import lifts

TINY = Net(1, 32, 8)


def test_every_method_has_a_line_of_its_own() -> None:
    styles = [str(sorted(LINES[name].items())) for name in METHODS]
    assert len(set(styles)) == len(METHODS)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twenty files of eight letters each, and what is left out."""
    root = tmp_path / "lib"
    names = [f"{chr(97 + i)}/m.py" if i % 2 else f"m{i}.py" for i in range(20)]
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((chr(97 + i) + chr(65 + i)) * 40)
    for name in ("test/x.py", "a/tests/x.py", "site-packages/x.py", "_sysconfigdata_x.py", "data.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("!!!!")
    return root


@pytest.fixture
def toy(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The digest of a text that is learned at once, in the place of the standard library."""
    monkeypatch.setattr(corpus, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(library)}))
    standard_library.cache_clear()
    yield standard_library().digest
    standard_library.cache_clear()


def run(name: str, digest: str, rate: float = 0.01, steps: int = 60, batch_size: int = 4, seed: int = 0) -> LanguageRun:
    return LanguageRun(TINY, CONTENDERS[name], rate, batch_size, steps, seed, digest)


def decoded(ids: Tensor) -> str:
    return "".join(ALPHABET[i] for i in ids.tolist())


def test_the_text_is_split_by_file_and_follows_the_files_alone(library: Path) -> None:
    found = corpus_of(library)
    train_set, validation_set = set(decoded(found.train)), set(decoded(found.validation))
    assert len(found.train) == 18 * 80 and len(found.validation) == 2 * 80
    assert not train_set & validation_set and len(train_set | validation_set) == 40
    assert "!" not in train_set | validation_set
    again = corpus_of(library)
    assert again.digest == found.digest and torch.equal(again.train, found.train)
    capped = corpus_of(library, max_bytes=12 * 80 + 1)
    assert decoded(found.train).startswith(decoded(capped.train))
    assert len(capped.train) + len(capped.validation) == 12 * 80
    names = [p.relative_to(library).as_posix() for p in files(library)]
    assert names != sorted(names) and len(names) == len(set(names)) == 20
    (library / "m0.py").write_text("z" * 80)
    assert corpus_of(library).digest != found.digest


def test_characters_beyond_the_alphabet_are_dropped() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == 97
    assert encode("a\tb\r\nµ€\x0c~ ".encode()).tolist() == [ALPHABET.index(c) for c in "a\tb\n~ "]
    with pytest.raises(FileNotFoundError, match=r"too few \.py files"):
        corpus_of(Path(__file__).parent / "no such folder")


def test_the_standard_library_is_source_and_its_halves_differ() -> None:
    found = standard_library()
    assert 500_000 < len(found.train) + len(found.validation) <= corpus.MAX_BYTES
    assert 0.03 < len(found.validation) / len(found.train) < 0.3
    assert int(found.train.max()) < 97
    for text in (decoded(found.train[:200_000]), decoded(found.validation)):
        assert text.count("    def ") > 100 and text.count("import ") > 50


def test_windows(toy: str) -> None:
    found = standard_library()
    fixed = validation_windows(found, 8)
    assert fixed.shape == (256, 9)
    assert torch.equal(fixed[0], found.validation[:9]) and torch.equal(fixed[-1], found.validation[-9:])
    drawn = training_windows(found, 8, 2000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 9)
    assert set(drawn.unique().tolist()) == set(found.train.unique().tolist())
    text = decoded(found.train)
    assert all(decoded(w) in text for w in drawn[:20])


def slow_logits(net: GPT, ids: list[int]) -> Tensor:
    """The net's formula, position by position and head by head."""

    def dense(layer: nn.Linear, a: Tensor) -> Tensor:
        return layer.weight @ a + layer.bias

    def normal(layer: nn.LayerNorm, a: Tensor) -> Tensor:
        return (a - a.mean()) / (a.var(unbiased=False) + 1e-5).sqrt() * layer.weight + layer.bias

    stream = [net.characters.weight[c] + net.positions.weight[t] for t, c in enumerate(ids)]
    for block in net.blocks:
        layer = block.attention
        normed = [normal(block.norm1, x) for x in stream]
        for t in range(len(ids)):
            query, heads = dense(layer.query, normed[t]), []
            for h in range(0, len(query), 32):
                here = slice(h, h + 32)
                scores = torch.stack([query[here] @ dense(layer.key, a)[here] / 32**0.5 for a in normed[: t + 1]])
                share = (scores - scores.max()).exp()
                values = torch.stack([dense(layer.value, a)[here] for a in normed[: t + 1]])
                heads.append((share[:, None] * values).sum(0) / share.sum())
            stream[t] = stream[t] + dense(layer.out, torch.cat(heads))
        for t, x in enumerate(stream):
            inner = dense(block.mlp[0], normal(block.norm2, x))
            inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
            stream[t] = x + dense(block.mlp[2], inner)
    return torch.stack([dense(net.head, normal(net.norm, x)) for x in stream])


def test_the_net_is_its_formula_and_its_loss_the_mean_surprise() -> None:
    torch.manual_seed(0)
    net = GPT(2, 64, 8).double()
    windows = torch.randint(97, (3, 9), dtype=torch.uint8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms and embeddings that matter
        expected = torch.stack([slow_logits(net, w[:-1].tolist()) for w in windows])
        torch.testing.assert_close(net(windows[:, :-1].long()), expected, rtol=1e-10, atol=1e-10)
        surprise = [
            math.log(sum(map(math.exp, row))) - row[int(c)]
            for logits, window in zip(expected.tolist(), windows, strict=True)
            for row, c in zip(logits, window[1:], strict=True)
        ]
        assert loss_of(net, windows).item() == pytest.approx(sum(surprise) / len(surprise), rel=1e-10)


def test_no_logit_sees_a_later_character() -> None:
    torch.manual_seed(0)
    net = GPT(2, 64, 16)
    ids = torch.randint(97, (1, 16))
    before = net(ids)
    for t in (0, 7, 15):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % 97
        after = net(other)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # and every later one does


@pytest.mark.parametrize("net", [Net(3, 96, 64), Net(2, 64, 32)], ids=lambda n: n.name)
def test_an_untrained_net_guesses(net: Net) -> None:
    torch.manual_seed(0)
    model = net.build()
    windows = torch.randint(97, (64, net.context + 1))
    with torch.no_grad():
        loss = loss_of(model, windows).item()
    # logits have the variance 1/3 of torch's default weights on a normalized input: ln V + 1/6
    assert loss == pytest.approx(UNIFORM + 1 / 6, abs=0.05)


def test_warm_up_then_decay() -> None:
    assert [factor(s, 20) for s in (1, 2, 3, 11, 20)] == pytest.approx([1 / 2, 1, 18 / 19, 10 / 19, 1 / 19])
    assert [factor(s, 3) for s in (1, 2, 3)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert max(factor(s, 300) for s in range(1, 301)) == factor(30, 300) == 1


def test_every_group_follows_the_schedule(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    make = contenders.BASES["muon"]

    def spied(model: nn.Module, lr: float) -> Any:
        optimizer = make(model, lr)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
        return optimizer

    monkeypatch.setitem(contenders.BASES, "muon", spied)
    train(run("Muon", toy, steps=20), standard_library())
    assert [rates[1] for rates in seen] == pytest.approx([0.01 * factor(s, 20) for s in range(1, 21)])
    assert [rates[0] for rates in seen] == pytest.approx([0.1 * factor(s, 20) for s in range(1, 21)])


def test_a_diverged_run_scores_the_uniform_guess_and_no_run_scores_worse(toy: str) -> None:
    result = train(run("momentum", toy, rate=1e30), standard_library())
    assert result["diverged"] and result["loss"] == pytest.approx(math.log(97), abs=1e-5)
    assert result["curve"][-1] == (60, result["loss"])
    model, windows = TINY.build(), validation_windows(standard_library(), 8)
    assert score(model, windows) < UNIFORM + 1e-9
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    assert loss_of(model, windows).item() > 100
    assert score(model, windows) == UNIFORM


@pytest.mark.parametrize("name", ["momentum", "BNP-momentum", "BNP-AdamW", "BNP-Muon"])
def test_methods_learn_to_repeat(name: str, toy: str) -> None:
    """Each file repeats two letters; those of validation were never seen, so that the training text is asked."""
    found = standard_library()
    found = found._replace(validation=found.train)
    rate = {"momentum": 0.1, "BNP-momentum": 0.3, "BNP-AdamW": 0.03}.get(name, 0.01)
    result = train(run(name, toy, rate, steps=80), found)
    assert result["loss"] < 0.8 and not result["diverged"], result["loss"]
    assert [n for n, _ in result["curve"]][-1] == 80


def test_equal_runs_are_equal_and_contenders_share_weights_and_windows(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_engine, "UNIFORM", 9.0)  # the net at its start is a little worse than a guess
    found = standard_library()
    first, again = (train(run("BNP-AdamW", toy), found) for _ in range(2))
    assert first["curve"] == again["curve"] and first["loss"] == again["loss"]
    still = {train(run(name, toy, rate=1e-30, steps=5), found)["loss"] for name in ("momentum", "AdamW", "Muon")}
    assert len(still) == 1
    assert still != {train(run("AdamW", toy, rate=1e-30, steps=5, seed=1), found)["loss"]}


def test_bnp_takes_all_dense_layers_and_muon_the_matrices_of_the_blocks() -> None:
    model = Net(2, 64, 8).build()
    dense = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    parts = [f"blocks.{i}.{part}" for i in range(2) for part in (
        "attention.query", "attention.key", "attention.value", "attention.out", "mlp.0", "mlp.2")]  # fmt: skip
    assert dense == {*parts, "head"}
    optimizer = CONTENDERS["BNP-Muon"].make(model, 0.01)
    assert set(optimizer.coverage().preconditioned) == {f"{n}.{p}" for n in dense for p in ("weight", "bias")}
    names = {id(p): n for n, p in model.named_parameters()}
    muon, adamw = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert muon == {f"{n}.weight" for n in parts}
    assert {"characters.weight", "positions.weight", "head.weight", "norm.weight", "blocks.0.mlp.0.bias"} <= adamw
    assert len(muon) + len(adamw) == len(names)


def test_keys_tell_apart_what_matters_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("AdamW", "x")
    others = [run("AdamW", "y"), run("AdamW", "x", rate=0.1), run("AdamW", "x", steps=61), run("AdamW", "x", seed=1),
              run("AdamW", "x", batch_size=1), run("BNP-AdamW", "x"), replace(first, net=Net(1, 32, 16))]  # fmt: skip
    assert len({r.key for r in (first, *others)}) == 1 + len(others)
    assert replace(first, contender=replace(first.contender, name="something else")).key == first.key
    before = fingerprint("adamw", None)
    fingerprint.cache_clear()
    assert fingerprint("adamw", None) == before
    fingerprint.cache_clear()
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x.relu())
    assert fingerprint("adamw", None) != before
    fingerprint.cache_clear()


SCOPE = LanguageScope(TINY, {16: 60, 1: 120}, ("AdamW", "BNP-AdamW", "SOAP"), seeds=(1, 2), slow_seeds=(1,))


def made_up(scope: LanguageScope) -> dict[LanguageRun, dict[str, Any]]:
    """AdamW is best at .001 and .003, BNP .1 below it, more in some seeds; SOAP at the edge; at 1 BNP is .2 above."""

    def result(loss: float, r: LanguageRun) -> dict[str, Any]:
        curve = [(r.steps // 2, loss + 1), (r.steps, loss)]
        return {"loss": loss, "diverged": loss == UNIFORM, "seconds": 1.0, "curve": curve}

    results = {}
    for r in scope.tuning():
        bad = {"AdamW": {1e-3: 2.5, 3e-3: 2.5}, "BNP-AdamW": {0.01: 2.4}, "SOAP": {0.1: 2.0}}[r.contender.name]
        loss = bad.get(r.learning_rate, 3.0) + (0.2 if r.batch_size == 1 and r.contender.bnp is not None else 0.0)
        results[r] = result(UNIFORM if r.learning_rate == 0.03 else loss, r)
    for r in scope.reporting(results):
        loss = {"AdamW": 2.5, "BNP-AdamW": 2.38 if r.seed == 1 else 2.42, "SOAP": 2.1}[r.contender.name]
        results[r] = result(loss + 0.1 * r.seed + (0.2 if r.batch_size == 1 and r.contender.bnp is not None else 0), r)
    return results


def test_rates_are_chosen_on_the_tuning_seed_and_the_report_says_so(toy: str) -> None:
    results = made_up(SCOPE)
    assert choose(SCOPE, CONTENDERS["AdamW"], 16, results) == 1e-3  # the lowest of equals
    reported = [r for r in results if r.seed]
    assert {(r.contender.name, r.learning_rate) for r in reported} == {
        ("AdamW", 1e-3), ("BNP-AdamW", 0.01), ("SOAP", 0.1),
    }  # fmt: skip
    assert [r.seed for r in reported if r.contender.name == "SOAP"] == [1, 1]
    cells = cells_of(SCOPE, results)
    at_16, at_1 = lifts(cells)
    assert at_16.at_best == (pytest.approx(-0.1), pytest.approx(0.02)) and at_16.seeds == 2
    assert at_16.over_grid == pytest.approx((2.4 + 5 * 3.0 - 2 * 2.5 - 4 * 3.0) / 7)
    assert at_1.at_best[0] == pytest.approx(0.1)
    curves = curves_of(SCOPE, cells, results)
    assert curves["BNP-AdamW", 16] == [(30, pytest.approx(3.55)), (60, pytest.approx(2.55))]
    times = {16: {"AdamW": 10.0, "BNP-AdamW": 20.0}}
    text = markdown(SCOPE, cells, curves, times, document())
    assert "| SOAP | **2.200**, 1 seed (0.1*) | **2.200**, 1 seed (0.1*) |" in text
    assert "| BNP-AdamW | 2.550 ± .070 (0.01) | 2.750 ± .070 (0.01) |" in text
    assert "| BNP-AdamW − AdamW | -.100 ± .020; +.057 | +.100 ± .020; +.229 |" in text
    assert "| BNP-AdamW below AdamW, best rates | 16 | **met** | -.100 ± .020 |" in text
    assert "| BNP-AdamW below AdamW, best rates | 1 | **missed** | +.100 ± .020 |" in text
    assert "| BNP-AdamW below AdamW, mean over the grid | 16 | **missed** | +.057 |" in text
    near = {**cells, ("BNP-AdamW", 16, "warm-up + decay"): replace(
        cells["BNP-AdamW", 16, "warm-up + decay"], accuracies={1: 2.5, 2: 2.82})}  # fmt: skip
    assert "| 16 | **missed**, within two errors | +.010 ± .110 |" in markdown(SCOPE, near, curves, times, document())
    assert "| AdamW | 0.6 (60, 10.0 ms) |" in text
    assert "| BNP-AdamW | 1.1 (57, 20.0 ms) |" in text  # 3.55 at step 30, 2.55 at 60: 2.65 at 57
    assert "| AdamW | 1 | 3.000 | 3.000 | **2.500** | 2.500 | 3.000 | 4.575 | 3.000 |" in text
    assert "**Trimmed**: the full protocol has 2,000 at 16, 8,000 at 1." in text


def test_the_figure_has_a_row_of_seconds_where_they_were_measured(toy: str, tmp_path: Path) -> None:
    results = made_up(SCOPE)
    cells = cells_of(SCOPE, results)
    curves = curves_of(SCOPE, cells, results)
    heights = []
    for times in ({}, {16: {"AdamW": 10.0}}):
        language_figure(SCOPE, cells, curves, times, tmp_path / "x.png")
        heights.append(plt.imread(tmp_path / "x.png").shape[0])
    assert heights == [pytest.approx(110 * 3.6 * rows, abs=1) for rows in (2, 3)]


def test_a_cell_without_its_whole_grid_chooses_nothing(toy: str) -> None:
    results = made_up(SCOPE)
    results.pop(SCOPE.tuning()[3])
    assert set(cells_of(SCOPE, results)) == {
        (n, b, "warm-up + decay") for n in SCOPE.methods for b in (16, 1) if (n, b) != ("AdamW", 16)
    }


def document() -> dict[str, Any]:
    environment = {"cpu": "c", "cores": 1, "python": "3", "torch": "2", "numpy": "2", "date": "2026-01-01T00:00"}
    text = {"digest": "d", "train": 1440, "validation": 160, "alphabet": 97}
    return {"environment": environment, "cpu_seconds": 1.0, "configuration": {"text": text}}


def test_steps_to_a_loss_are_read_off_the_mean_curve() -> None:
    curves = [[(10, 4.0), (20, 3.0), (40, 2.0)], [(10, 4.0), (20, 3.4), (40, 2.0)]]
    assert steps_to(curves, 3.0) == pytest.approx(20 + 20 * 0.2 / 1.2)
    assert steps_to(curves, 1.9) is None
    assert steps_to([[(10, 2.0), (20, 3.0), (30, 1.0)]], 2.5) == pytest.approx(22.5)  # for good
    assert steps_to([[(10, 2.0)]], (UNIFORM + 2.0) / 2) == pytest.approx(5)  # from a guess on


def test_the_whole_command_resumes_reports_and_times(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = LanguageScope(TINY, {4: 3, 1: 5}, ("AdamW", "BNP-AdamW"), seeds=(1, 2))
    monkeypatch.setitem(PRESETS, "full", (scope,))
    monkeypatch.setattr("benchmarks.evidence.language_report.FULL", {4: 3, 1: 6})
    drawn: list[Path] = []
    monkeypatch.setattr("benchmarks.evidence.language_report.language_figure", lambda *a: drawn.append(a[-1]))
    arguments = ["--output", str(tmp_path), "--workers", "1"]
    language.main([*arguments, "--batch-sizes", "4"])
    files = set((tmp_path / ".cache" / "evidence").glob("*.json"))
    assert len(files) == 2 * 7 + 2 * 2
    language.main(arguments)
    monkeypatch.setattr(language_engine, "train", lambda *_: pytest.fail("it was there already"))
    in_turn = language_times.in_turn
    monkeypatch.setattr(language_times, "in_turn", lambda *a: in_turn(*a, rounds=2, burst=1))
    language.main([*arguments, "--times"])
    times = json.loads((tmp_path / "language_1x32_times.json").read_text())["step_ms"]
    assert set(times) == {"4", "1"} and all(v > 0 for t in times.values() for v in t.values())
    text = (tmp_path / "language_1x32.md").read_text()
    assert "CPU seconds to the loss AdamW ends with" in text and "the full protocol has 6 at 1." in text
    stored = json.loads((tmp_path / "language_1x32.json").read_text())
    assert len(stored["runs"]) == 2 * (2 * 7 + 2 * 2) and stored["configuration"]["text"]["digest"] == toy
    for path in files:
        path.unlink()
    language.main([*arguments, "--report"])  # a fresh clone goes on from what is published
    assert (tmp_path / "language_1x32.md").read_text() == text
    assert drawn == [tmp_path / "language_1x32.png"] * 4
    with pytest.raises(SystemExit):
        language.main([*arguments, "--batch-sizes", "7"])
    assert "--batch-sizes 7 is none of [1, 4]" in capsys.readouterr().err
