"""Metrics, as functions of tensors: one file for each kind.

- `transfer`: all metrics of the transfer matrix R alone.
- `inside_tasks`: metrics of evaluations inside the tasks.
- `against_experts`: comparisons with experts, joint learners and other methods.
- `lifelong`: the suite of l2metrics and its log format.
- `costs`: memory, samples and operations. `composite`: scores of single papers. `calibration`: calibration errors.
- `features`: probes of frozen features, and CKA. `transferability`: forecasts of transfer from features and labels.
- `statistics`: intervals, tests, ranks and correlations over seeds and streams.
- `checks`: the conversion and the checks of inputs. `scalar`: a metric with its definition.

Every function is pure, except two that write logs. It computes in float64 on the CPU, from tensors or plain sequences;
`features` and `calibration_bins` compute on the device of their inputs instead. It returns NaN, never 0, if the
quantity is undefined or an input that it reads is NaN. In formulas and arguments, tasks are numbered from 1.
"""
