"""`mrcnn-bench step`: the whole training step, and inference, beside torchvision's.

| file | holds |
| --- | --- |
| workload | images, targets, weights and proposals: the same for every provider |
| torchvision_baseline | torchvision's training step and inference, in its layouts, dtypes and torch.compile |
| ours | this project's, from a plain eager step to one CUDA graph |
| providers | what is measured, as data: baselines, ladder, ablation, inference, loader, check |
| inference | this project's inference, to masks at the images' size |
| phases, clocks, measure | rounds of steps, milliseconds by phase, memory, waits, SM clock |
| measure_provider | all of that for one provider, beside its best baseline |
| kernels_in_trace | launches, waits and device time by group of kernels, from a profiler's trace |
| bitwise | captured against not captured, bit for bit |
| loader_row | the step fed by the real loader |
| record, run | step.jsonl, which a killed run goes on from, and what to measure next |
| report, report_tables, command | README.md and the command |
"""
