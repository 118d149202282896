"""Errors whose message is meant for a person: one sentence, what is wrong (file, id) and what to do.

The command line prints these without a traceback; anything else that is raised is a bug.
"""

from __future__ import annotations


class DataError(ValueError):
    """Something in a dataset (annotation file, image folder, image) cannot be used as it is."""


class CheckpointError(ValueError):
    """A checkpoint file is missing, damaged, or does not fit the model it is loaded into."""


class ConfigError(ValueError):
    """A setting has an impossible value, or two settings contradict each other."""


class TrainingStopped(Exception):
    """A run was asked to stop and did, at a step boundary; the message says how it goes on."""


class GraphError(RuntimeError):
    """A CUDA graph could not be captured, and CUDA cannot be used any more; the message says what to run instead."""
