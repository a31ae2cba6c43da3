"""Lightning under both of its names, and without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.callbacks.runs import hessian_in_a_script, pl

ROOT = Path(__file__).parent.parent.parent

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_utilities", "lightning_fabric"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import lightning_callbacks
assert "HessianConditionMonitor" in dir(lightning_callbacks)
for name in lightning_callbacks.__all__:
    try:
        getattr(lightning_callbacks, name)
    except ImportError as error:
        assert "pip install 'bnp-optim[lightning]'" in str(error), error
    else:
        raise AssertionError("no error")
try:
    lightning_callbacks.nothing
except AttributeError as error:
    print(error)
"""


def run(code: str, *paths: Path) -> str:
    environment = {"PYTHONPATH": ":".join(map(str, [*paths, ROOT])), "PATH": "", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1]


def test_the_package_imports_without_lightning_and_names_the_extra() -> None:
    assert run(WITHOUT) == "module 'lightning_callbacks' has no attribute 'nothing'"


def test_monitors_are_callbacks_of_every_installed_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's classes, in the places where Lightning has them."""
    from lightning_callbacks import _lightning

    class Theirs:
        def on_train_start(self) -> str:
            return "theirs"

    class TheirError(Exception):
        pass

    fakes = {
        "lightning": {"__path__": []},
        "lightning.pytorch": {"__path__": []},
        "lightning.pytorch.callbacks": {"Callback": Theirs},
        "lightning.pytorch.utilities": {"__path__": []},
        "lightning.pytorch.utilities.exceptions": {"MisconfigurationException": TheirError},
    }
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_lightning, "_exists", lambda name: True)
    packages = _lightning.installed()
    assert [p.__name__ for p in packages] == ["pytorch_lightning", "lightning.pytorch"]
    both: Any = _lightning._both(packages, "callbacks", "Callback")
    assert issubclass(both, pl.Callback) and issubclass(both, Theirs)
    error = _lightning._both(packages, "utilities.exceptions", "MisconfigurationException")
    assert issubclass(error, TheirError) and issubclass(error, Exception)
    # a single name: its own class
    assert _lightning._both(packages[:1], "callbacks", "Callback") is pl.Callback


TRAIN = """
import sys
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
import lightning_callbacks
from lightning_callbacks._lightning import MisconfigurationException
from lightning.fabric.utilities.exceptions import MisconfigurationException as Theirs

assert issubclass(lightning_callbacks.HessianConditionMonitor, Callback)
assert issubclass(MisconfigurationException, Theirs)
both = "pytorch_lightning" in sys.modules
if both:
    import pytorch_lightning
    assert issubclass(lightning_callbacks.HessianConditionMonitor, pytorch_lightning.Callback)
CODE
print("pytorch_lightning" in sys.modules, train(LightningModule, Trainer))
"""


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
def test_trainers_of_the_other_name(alone: bool, tmp_path: Path) -> None:
    """`lightning` is pytorch_lightning and lightning_fabric under other names, and so it is made here."""
    for package, name in (("pytorch_lightning", "pytorch"), ("lightning_fabric", "fabric")):
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        home = tmp_path / "lightning" / name
        shutil.copytree(Path(spec.origin).parent, home, ignore=shutil.ignore_patterns("__pycache__"))
        for file in home.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            text = text.replace("pytorch_lightning", "lightning.pytorch").replace(
                "lightning_fabric", "lightning.fabric"
            )
            file.write_text(text, encoding="utf-8")
    (tmp_path / "lightning" / "__init__.py").write_text("")
    hidden = WITHOUT.split("sys.meta_path")[0].replace('"lightning", "lightning_utilities", ', "")
    code = TRAIN.replace("CODE", hessian_in_a_script())
    if alone:
        code = hidden + "sys.meta_path.insert(0, Missing())\n" + code
    here = f"import sys\nfrom pytorch_lightning import LightningModule, Trainer\n{hessian_in_a_script()}\n"
    expected = run(here + "print(True, train(LightningModule, Trainer))")
    assert run(code, tmp_path) == expected.replace("True", str(not alone), 1)
