"""Workloads, timing and reports: how fast the detection ops are, against what, and on which machine.

`pytest bench --benchmark-only --benchmark-json=RESULTS.json` measures, `python -m bench report RESULTS.json`
turns the result into a page. The pieces, in the order in which a number passes through them:

- `workloads`: named, seeded inputs with realistic box distributions
- `providers`: the Triton op and what it has to beat (torchvision, the PyTorch reference, torch.compile)
- `gate`: no time without a correct result
- `timing`: device events on a GPU, a wall clock on a CPU, fed into pytest-benchmark
- `results`, `plots`, `report`: from the JSON to a table, figures, a verdict
"""
