"""Check a built wheel: what is in it, and that it works alone in a fresh environment.

The wheel is installed with its dependencies into a temporary environment, outside the checkout; there
`bnp_optim` must import, and `lightning_callbacks` must import or name the extra it needs. Then the extra is
added, and both must import.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGES = ("bnp_optim", "lightning_callbacks")
EXTRA = "bnp-optim[lightning]"

IMPORT = "import {package}; print('{package} imports from', {package}.__file__)"
IMPORT_OR_NAME_EXTRA = f"""
try:
    import lightning_callbacks
except ImportError as error:
    assert {EXTRA!r} in str(error), f"the error does not name {EXTRA}: {{error}}"
    print("lightning_callbacks without its extra says:", error)
else:
    print("lightning_callbacks imports without its extra")
"""


def check_contents(wheel: Path) -> None:
    """Exit with a message unless the wheel holds both packages, their py.typed, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    for package in PACKAGES:
        marker = f"{package}/py.typed"
        if marker not in names:
            sys.exit(f"{wheel.name}: {marker} is missing")
        print(f"{wheel.name}: {marker} is there")
    strangers = sorted({n.split("/")[0] for n in names if ".dist-info/" not in n} - set(PACKAGES))
    if strangers:
        sys.exit(f"{wheel.name}: holds more than {', '.join(PACKAGES)}: {', '.join(strangers)}")


def check_install(wheel: Path, constraints: Path) -> None:
    """Install the wheel alone, then with its extra, into a temporary environment, and import from it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts" if os.name == "nt" else "bin", "python")

        def run(*arguments: str) -> None:
            subprocess.run([python, *arguments], cwd=folder, check=True)

        def install(requirement: str) -> None:
            run("-m", "pip", "install", "--quiet", "-c", str(constraints), requirement)

        # -I: neither the current folder nor PYTHONPATH can lend the checkout's packages.
        install(str(wheel))
        run("-I", "-c", IMPORT.format(package="bnp_optim"))
        run("-I", "-c", IMPORT_OR_NAME_EXTRA)
        install(f"{wheel}[lightning]")
        for package in PACKAGES:
            run("-I", "-c", IMPORT.format(package=package))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--constraints", type=Path, required=True, help="versions to install with")
    arguments = parser.parse_args()
    check_contents(arguments.wheel)
    check_install(arguments.wheel.resolve(), arguments.constraints.resolve())


if __name__ == "__main__":
    main()
