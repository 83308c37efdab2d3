"""Metrics that need more than the transfer matrix, one file a family; those of R alone are in `cl.metrics.transfer`.

`inside_tasks`: evaluations inside the tasks. `against_experts`: experts, joint learners and other methods to compare
    with.
`lifelong`: the suite of l2metrics and its log format. `costs`: memory, samples and operations. `composite`: scores
of single papers. `calibration`: what a confidence is worth. `features`: probes of frozen features and CKA.
`checks`: what all of them ask of their input.

Apart from two that write logs, every function is pure; but for `features` and `calibration_bins`, which stay
where the data lie, it computes in float64 on the CPU, from tensors or plain sequences. It returns NaN, never 0,
when a quantity is undefined or an input that it reads is NaN. Tasks are numbered from 1 in formulas and arguments.
"""
