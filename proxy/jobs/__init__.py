"""Profiling: validation prompts put to a model, graded, checkpointed, and summed up in a profile."""
