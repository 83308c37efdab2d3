"""Building blocks of streams: pure functions from streams to streams, which can be nested in YAML.

    >>> from cl.data.sources import digits
    >>> stream = permute(copies(digits(), num_tasks=3))
    >>> [task.name for task in repeat(stream, visits=[0, 1, 0])]
    ['permutation 1', 'permutation 2', 'permutation 1 again']

Each takes a stream, or a dataset as a stream of one task, and returns a new stream. Tasks are built when they are
needed, arrays are shared, and random draws depend on a seed and on the task alone. Label noise, missing labels and
subsets concern training examples only; validation and test sets stay as they are.
"""

from cl.compose.base import Source, copies
from cl.compose.inputs import corrupt, permute, permute_pixels, rotate, transform, turn
from cl.compose.labels import hide_labels, label_noise, label_scarcity, long_tail, relabel, subsample
from cl.compose.tasks import concat, partition, reorder, repeat, resize

__all__ = [
    "Source",
    "concat",
    "copies",
    "corrupt",
    "hide_labels",
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
