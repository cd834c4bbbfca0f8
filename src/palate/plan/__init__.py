"""FLOPs, bytes and time of a recipe, without weights.

How: the recipe's own algorithm runs a few updates on a two-by-two model that only counts (images per call, with and
without backward); the real networks are built on the meta device and run once on one image, under torch's FLOP counter
and under hooks that see what autograd keeps. A plan is counts times units. Nothing in it is fitted.

Bytes leave out kernels' workspace, the allocator's fragmentation and the CUDA context: leave 10 to 15 % free.
"""

from __future__ import annotations

from palate.plan.activations import Unit, measure_unit
from palate.plan.count import count
from palate.plan.headroom import Room, require_room, room
from palate.plan.measure import measure
from palate.plan.memory import Plan, memory_savings, plan, require_equal_parts
from palate.plan.table import DEVICES, GIB, Device, as_json, can_fit, duration, table, this_machine

__all__ = [
    "DEVICES",
    "GIB",
    "Device",
    "Plan",
    "Room",
    "Unit",
    "as_json",
    "can_fit",
    "count",
    "duration",
    "measure",
    "measure_unit",
    "memory_savings",
    "plan",
    "require_equal_parts",
    "require_room",
    "room",
    "table",
    "this_machine",
]
