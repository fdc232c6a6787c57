"""What a call on a GPU comes to is settled once, for all calls that have its shapes, strides, dtypes and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

# That are kept of a kind; each is some hundred bytes.
MOST = 4096

Plan = TypeVar("Plan")


def key(Q: Tensor, D: Tensor, cu_q: Tensor | None, cu_d: Tensor | None, query_index: Tensor | None) -> tuple[Any, ...]:
    """What of these a plan depends on; addresses, and their alignment, are not in it."""
    return (
        (Q.dtype, Q.shape, Q.stride(), Q.device),
        (D.dtype, D.shape, D.stride()),
        None if cu_q is None else cu_q.shape[0],
        None if cu_d is None else cu_d.shape[0],
        None if query_index is None else query_index.shape[0],
    )


def kept(plans: dict[Any, Plan], of: Any, make: Callable[[], Plan]) -> Plan:
    """The plan that is there, else one that is made. Another thread may clear them at any moment."""
    try:
        return plans[of]
    except KeyError:
        return keep(plans, of, make())


def keep(plans: dict[Any, Plan], of: Any, plan: Plan) -> Plan:
    """The plan itself, which is in `plans` from now on."""
    if len(plans) >= MOST:
        plans.clear()
    plans[of] = plan
    return plan
