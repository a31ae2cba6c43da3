"""Run by test_ddp on each of several processes: every check in turn. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import ddp_refusals, ddp_training  # noqa: F401  # they register their checks
from tests.distributed.ddp_checks import CHECKS
from tests.distributed.training import everywhere, start


def main(names: list[str]) -> None:
    rank, world = start()
    found: dict[str, Any] = {}
    for name in names or CHECKS:
        try:
            found[name] = CHECKS[name](rank, world)
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
            break  # the other ranks are elsewhere
    print(json.dumps(found), flush=True)
    warnings.simplefilter("ignore")  # what torch leaves behind at exit
    everywhere(torch.zeros(1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
