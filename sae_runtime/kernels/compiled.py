"""Loops over a few numbers as machine code.

Between two products with its weights a decoding step has little to compute, but every operation of torch or NumPy costs
several microseconds there, ten and more when the weights have pushed its code out of the caches. A loop compiled by
Numba does the work of dozens of them in one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be added up in another order. With "nsz" besides, LLVM takes every number for finite. Numba does not see that
# kept code was made with other flags; who changes them deletes *.nbi.
_FREEDOM = {"reassoc", "contract"}


def compiled(function: Function) -> Function:
    """Compiles a function when it is first called with arguments of a type, and lets other threads run meanwhile.

    What was compiled is kept beside the source for later processes, or in the user's cache where that cannot be
    written, or not at all.
    """

    @functools.cache
    def machine_code() -> Callable[..., Any]:
        import numba  # takes half a second, and most commands do without

        njit = functools.partial(numba.njit, nogil=True, fastmath=_FREEDOM, error_model="numpy")
        found: Callable[..., Any]
        try:
            found = njit(cache=True)(function)
        except RuntimeError:  # no folder for the cache
            found = njit()(function)
        return found

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return machine_code()(*arguments)

    return cast(Function, call)
