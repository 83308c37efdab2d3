"""What holds for every test: the models are tiny, so a second thread costs more than it brings."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

collect_ignore = ["clusters"]  # scripts that CI calls where Slurm and Ray are installed
