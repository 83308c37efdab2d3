"""Building blocks of streams: pure functions from streams to streams, which YAML can nest.

    >>> from cl.data.sources import digits
    >>> stream = permute(copies(digits(), num_tasks=3))
    >>> [task.name for task in repeat(stream, visits=[0, 1, 0])]
    ['permutation 1', 'permutation 2', 'permutation 1 again']

Each takes a stream, or a dataset as a stream of one task, and leaves it as it is. Tasks are made when they are needed,
arrays are shared, and draws are functions of a seed and of the task. What changes training labels or drops rows leaves
validation and test sets alone.
"""

from cl.compose.base import Source, copies
from cl.compose.inputs import corrupt, permute, permute_pixels, rotate, transform, turn
from cl.compose.labels import label_noise, label_scarcity, long_tail, relabel, subsample
from cl.compose.tasks import concat, partition, reorder, repeat, resize

__all__ = [
    "Source",
    "concat",
    "copies",
    "corrupt",
    "label_noise",
    "label_scarcity",
    "long_tail",
    "partition",
    "permute",
    "permute_pixels",
    "relabel",
    "reorder",
    "repeat",
    "resize",
    "rotate",
    "subsample",
    "transform",
    "turn",
]
