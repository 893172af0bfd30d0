"""What a process has when it begins to serve is looked through for garbage no more."""

from __future__ import annotations

import gc


def settle() -> None:
    """Call once, when everything is loaded that stays for good.

    The collector looks through all objects only when those that have lived a while are a quarter more than they were.
    With all that libraries hold, that would be after many thousand requests, whose garbage would stay until then; and
    it would take the longer.
    """
    gc.collect()
    gc.freeze()
