"""What the compiler makes of every kernel: registers, spills, vector loads, atomics, occupancy. No GPU is needed.

`mrcnn-bench resources` compiles and writes the tables in `reports/resources`; the tests compile again and refuse
what got worse. In the order in which a number comes about:

- `calls`: the op calls whose launches are recorded
- `worker`: a process that compiles them for one target, started by `measure`
- `nvidia`, `amd`: what the assembly says; `occupancy`: what that leaves room for
- `row`, `table`: one kernel's numbers, and the committed JSON and Markdown
- `gate`: what must not get worse
"""

from .measure import measure_resources
from .row import Row

__all__ = ["Row", "measure_resources"]
