"""The Lua scripts, one typed function each; `lua/NAME.lua` documents its keys, arguments and return value.

A call takes at most CHUNK jobs and MAX_CALL_BYTES: a script blocks the server while it runs (128 jobs 3-6 ms, 1024
jobs 41-47 ms, measured on redis-server 7.0).
"""

from ._call import CHUNK, MAX_CALL_BYTES, now_iso, pack_exception, unpack_exception
from .ending import Finish, HandedBack, Outcome, finish, hand_back, hand_back_all
from .enqueueing import EnqueueOptions, JobNeeds, NewJob, adopt, enqueue, promote, retry, start_enqueue, write_barrier
from .groups import FetchedJob, cancel, fetch, tally, touch_group
from .leasing import MAX_PASSES, PASS_TIMEOUT, Admission, Gate, LeasedJob, LeaseReply, lease
from .lengths import learn
from .reservations import Need, Recount, Reservation, recount, reserve
from .workers import Presence, claim, machine_failed, renew, sign_off, write_fields

__all__ = [
    "CHUNK",
    "MAX_CALL_BYTES",
    "MAX_PASSES",
    "PASS_TIMEOUT",
    "Admission",
    "EnqueueOptions",
    "FetchedJob",
    "Finish",
    "Gate",
    "HandedBack",
    "JobNeeds",
    "LeaseReply",
    "LeasedJob",
    "Need",
    "NewJob",
    "Outcome",
    "Presence",
    "Recount",
    "Reservation",
    "adopt",
    "cancel",
    "claim",
    "enqueue",
    "fetch",
    "finish",
    "hand_back",
    "hand_back_all",
    "learn",
    "lease",
    "machine_failed",
    "now_iso",
    "pack_exception",
    "promote",
    "recount",
    "renew",
    "reserve",
    "retry",
    "sign_off",
    "start_enqueue",
    "tally",
    "touch_group",
    "unpack_exception",
    "write_barrier",
    "write_fields",
]
