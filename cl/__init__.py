"""clsim: streams of tasks, strategies that learn them, and transfer matrices that can be trusted."""

__version__ = "0.1.0"
