"""Workloads, timing and reports: how fast the detection ops are, against what, and on which machine.

`python -m bench study` measures within a time budget, `pytest bench --benchmark-only` the same rows under
pytest-benchmark, and `python -m bench report` turns either result into a page. In the order in which a number passes
through them:

- `workloads`: the table of named calls; `inputs`, `rpn_inputs` and `mask_inputs` draw arguments, `boxes` the boxes
- `providers`: the Triton op and what it has to beat (torchvision, the PyTorch reference, torch.compile);
  `rpn_providers` and `mask_providers` have torchvision's way for the region proposal network and the mask branch
- `gate`: no time without a correct result; `parts`: what of a batch it looks at
- `timing`: device events and wall clock, in interleaved rounds
- `measure`: one call with all its providers, from the gate to rows; `repeats` compares the bits of a backward's runs,
  `floors` (with `roi_floors`, `rpn_floors`, `mask_floors`) counts what it cannot do without; `memory` knows a provider
  that ran out of it
- `study` (with `worker`) and `test_ops` (with `conftest` and `recording`): who calls `measure`, and where the rows go
- `results`: rows to a table, with `verdicts`, the roof (`floors`, `ceilings`) and what is stale (`sources`)
- `report`, `plots`, `memory_plots`, `tables`, `status`: the table for people

Apart from these: `resources` reads what the compilers make of the kernels, without a GPU; `predict` (with `sass`, and
`predict_roi`, `predict_rpn` and `predict_mask`) what they should take, from counts; `ncu` (with `profile_call`) what a
GPU's counters say; `overhead` what a small call costs the host; `step_profile` where a whole step's time goes; `follow`
and `demo` train with the kernels beside the reference; `mask_study` compares three forms of the mask loss.
"""
