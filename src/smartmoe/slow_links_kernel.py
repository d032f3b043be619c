"""The delay of smartmoe.slow_links on a GPU. Imported only there: it needs Triton."""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit(do_not_specialize=["nanoseconds"])
def hold(nanoseconds):
    """Return when so much time has passed, by the clock of the device that does not depend on its frequency."""
    nanoseconds = nanoseconds.to(tl.int64)
    start = globaltimer()
    now = start
    while now - start < nanoseconds:
        now = globaltimer()
