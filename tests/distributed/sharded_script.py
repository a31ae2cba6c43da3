"""What every rank runs for test_sharded.py: ``python -m tests.distributed.sharded_script CHECK...``.

Prints one line of JSON, the answers by check; the first check that fails ends the rank.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
import warnings
from typing import Any

from torch import distributed as dist

from tests.distributed import sharded_fsdp, sharded_parallel, sharded_state  # noqa: F401  # they register their checks
from tests.distributed.sharded_checks import CHECKS
from tests.distributed.sharded_models import ALONE


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    for rank in range(dist.get_world_size()):
        ALONE[rank] = dist.new_group([rank])
    answers: dict[str, Any] = {}
    for name in sys.argv[1:]:
        try:
            answers[name] = CHECKS[name]()
        except Exception:
            answers[name] = {"failed": traceback.format_exc()}
            break
    print(json.dumps(answers), flush=True)
    if not any(isinstance(a, dict) and "failed" in a for a in answers.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would not let a rank go whose partner has failed


if __name__ == "__main__":
    main()
