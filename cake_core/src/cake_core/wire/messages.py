"""Every message there is: its number, what answers it, and the fields a control message must have."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class Type(IntEnum):
    """Every message there is. A request is answered by its counterpart or by ERROR with the same request number."""

    ATTACH = 1  # master: what I expect you to serve
    ATTACHED = 2  # worker: what I serve
    OPEN = 3
    TRUNCATE = 4
    LENGTH = 5  # worker: positions really kept (answers OPEN and TRUNCATE)
    CLOSE = 6  # no answer
    FORWARD = 7
    OUTPUT = 8
    CALL = 9
    RESULT = 10
    RELEASE = 11  # master: an image request ended; no answer
    ALIVE = 12  # either side, when it has sent nothing for a while; no answer
    ERROR = 13
    DRAINING = 14  # worker: I am leaving, send nothing new
    STATUS = 15
    REPORT = 16  # worker: answers STATUS
    EXPECT = 32  # master: a worker will come with this ticket and hand this stage its batches
    NEXT = 33  # master: hand this stage's output to the stage there, with this ticket
    PEER = 34  # worker to worker: the ticket
    READY = 35  # answers EXPECT, NEXT, PEER and JOIN
    PARTED = 36  # worker: the hand-over of this ticket is lost; no answer
    PROFILE = 48  # master: what was measured of you?
    PROFILED = 49
    ASSIGN = 50  # master: fetch and load these layers
    ASSIGNED = 51  # worker: I shall
    PROGRESS = 52  # worker: how far I am; no answer
    LOADED = 53  # worker: what was assigned is loaded, or why not; no answer
    LEND = 54  # master: you may fetch over this link too; no answer
    FETCH = 55  # either side: a piece of a file, by content name
    PIECE = 56
    HOLDS = 57  # either side: which of these files have you?
    HELD = 58
    PROBE = 59  # master: bytes to measure the link by
    PROBED = 60
    JOIN = 61  # master: dial me once more, with this ticket in your hello


CHAINED = 1 << 31
"""Bit of a request number that a master chose for a whole chain of workers, of whom the last answers."""

ANSWERS: Mapping[Type, Type] = {
    Type.ATTACH: Type.ATTACHED,
    Type.OPEN: Type.LENGTH,
    Type.TRUNCATE: Type.LENGTH,
    Type.FORWARD: Type.OUTPUT,
    Type.CALL: Type.RESULT,
    Type.STATUS: Type.REPORT,
    Type.EXPECT: Type.READY,
    Type.NEXT: Type.READY,
    Type.PEER: Type.READY,
    Type.PROFILE: Type.PROFILED,
    Type.ASSIGN: Type.ASSIGNED,
    Type.FETCH: Type.PIECE,
    Type.HOLDS: Type.HELD,
    Type.PROBE: Type.PROBED,
    Type.JOIN: Type.READY,
}
"""What answers a request, unless an ERROR does."""

_OPTIONAL_INT = (int, type(None))
SCHEMAS: Mapping[Type, Mapping[str, Any]] = {
    Type.ATTACH: {"model_type": str, "stages": list},
    Type.ATTACHED: {"name": str, "identity": dict, "fingerprints": dict, "memory": list, "platform": dict},
    Type.OPEN: {"session": int, "spec": dict, "parent": _OPTIONAL_INT, "length": int},
    Type.TRUNCATE: {"session": int, "length": int},
    Type.LENGTH: {"length": int},
    Type.CLOSE: {"session": int},
    Type.CALL: {"layer": str, "method": str, "image": int, "scalars": dict, "tensors": list, "constants": list, "ids": dict},
    Type.RESULT: {"tensors": list, "seconds": float},
    Type.RELEASE: {"layer": str, "image": int},
    Type.ALIVE: {},
    Type.ERROR: {"kind": str, "message": str},
    Type.DRAINING: {},
    Type.STATUS: {},
    Type.REPORT: {"report": dict},
    Type.EXPECT: {"ticket": bytes},
    Type.NEXT: {"ticket": bytes, "host": str, "stage": int},
    Type.PEER: {"ticket": bytes},
    Type.READY: {},
    Type.PARTED: {"ticket": bytes, "message": str},
    Type.PROFILE: {},
    Type.PROFILED: {"profile": dict},
    Type.ASSIGN: {
        "master": str,
        "model": str,
        "model_type": str,
        "stages": list,
        "options": dict,
        "files": list,
        "sources": list,
        "ticket": int,
    },
    Type.ASSIGNED: {},
    Type.PROGRESS: {"what": str, "done": int, "total": int},
    Type.LOADED: {"received": int, "error": dict},
    Type.LEND: {"ticket": int},
    Type.FETCH: {"file": str, "piece": int},
    Type.PIECE: {"digest": bytes, "tensors": list},
    Type.HOLDS: {"files": list},
    Type.HELD: {"files": list},
    Type.PROBE: {"tensors": list},
    Type.PROBED: {},
    Type.JOIN: {"ticket": bytes},
}
"""Fields by name, with their types. Others are let be, so that later versions may add some."""
