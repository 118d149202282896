"""One call of one provider between profiler marks, for `ncu` to look at: python -m bench.profile_call CALL VARIANT"""

from __future__ import annotations

import sys


def main(call_name: str, variant_name: str) -> None:
    """Run the call named as `str(Call)` and `str(Variant)` print it: warm up, then once between the marks."""
    import torch

    from .measure import Contestant, Draws
    from .providers import variants
    from .timing import make_clock
    from .workloads import calls

    call = next(c for c in calls("cuda") if str(c) == call_name)
    variant = next(v for v in variants(call) if str(v) == variant_name)
    clock = make_clock("cuda")
    contestant = Contestant(variant, Draws(call, "cuda"), clock)
    contestant()
    clock.synchronize()
    torch.cuda.profiler.start()
    contestant()
    clock.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
