"""``step_scale="common"``: one q² for all layers, the geometric mean of the layers' own, max(tr/N, 1).

Muon's step has the same size in every layer, for its shape, whatever the gradient's. A q of each layer's own would
divide by the fan-in a second time, and hold wide layers back; what is left to bound is how the step should shrink with
the batch, which is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bnp_optim.bank import StatisticsBank

__all__ = ["share_scale"]


def share_scale(banks: Sequence[StatisticsBank]) -> None:
    """Give the layers with samples in this step one q², between ``propose`` and ``conclude``; the others keep theirs.

    The mean is over the layers with samples. It is not finite if one of theirs is not.
    """
    home = banks[0].proposed_q2
    total, layers = home.new_zeros(2)
    for bank in banks:
        touched = bank.ledger.touched
        logs = bank.proposed_q2.log()
        total = total + (logs if touched is None else logs.where(touched, 0.0)).sum().to(total)
        layers = layers + (len(bank.rows) if touched is None else touched.sum().to(total))
    common = (total / layers).exp()
    for bank in banks:
        q2, touched = bank.proposed_q2, bank.ledger.touched
        q2.copy_(common if touched is None else torch.where(touched, common.to(q2), q2))
