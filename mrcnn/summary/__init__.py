"""What flows through the model: every stage's tensors, parameters and FLOPs, traced without computing anything.

The model that is traced is the one that trains, on tensors that have shapes but no values, and the stages are watched
from outside by forward hooks: nothing here repeats what a stage does.

- `trace`: runs the model; `watch`: the hooks
- `record`: what is found; `notes`: the sentences about it; `table`: how it is printed
"""

from .record import NamedTensor, Stage, Summary
from .table import summary_table
from .trace import parse_image_size, summarize

__all__ = ["NamedTensor", "Stage", "Summary", "parse_image_size", "summarize", "summary_table"]
