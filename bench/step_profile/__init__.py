"""Where a step's time goes: phases, kernel launches and waits of the real model, from PyTorch's profiler.

The model is watched from outside, by forward hooks that open a range of the trace around each stage; all numbers are
read back from the trace that is written, so that what is printed can be looked up in it.

- `command`: `mrcnn-bench profile`
- `run`: the steps under the profiler; `phases`: the ranges
- `trace`: from the trace's events to phases and waits
- `report`: what is printed
"""
