"""Exceptions of this package.

RouterCoreError
├── InvalidInput (ValueError)      a value that the caller can correct
│   ├── InvalidProfile             wrong length, errors outside [0, 1], negative labels
│   ├── InvalidPrice               negative, NaN or infinite
│   ├── InvalidArtifact            missing file, broken manifest, digest that does not match
│   ├── InvalidValidationSet       a line of a JSONL file; the message names the line
│   └── InvalidOutcomes            a line of an outcomes file, or a model in it; the message names which
├── MapMismatch                    a profile or map measured with another cluster map or embedder
├── WorkerLost                     a worker process was killed
├── Interrupted                    the caller stopped the work
└── NoEligibleModel                every candidate was ruled out; carries the reason per model
"""

from collections.abc import Mapping


class RouterCoreError(Exception):
    """The base class of all exceptions that this package raises on purpose."""


class InvalidInput(RouterCoreError, ValueError):
    """A value that the caller can correct; the message says which and how."""


class InvalidProfile(InvalidInput):
    """Error rates or label weights that cannot be a profile."""


class InvalidPrice(InvalidInput):
    """A price that is negative, NaN or infinite. An unknown price is None, never 0."""


class InvalidArtifact(InvalidInput):
    """A folder that is not a cluster map, or whose digest does not match its manifest."""


class InvalidValidationSet(InvalidInput):
    """A validation set that cannot be used; the message names the line."""


class InvalidOutcomes(InvalidInput):
    """An outcomes file or its prices that cannot be used; the message names the line or the model."""


class MapMismatch(RouterCoreError):
    """Two parts that were made for different cluster maps or embedders."""


class WorkerLost(RouterCoreError):
    """A worker process was killed, most often because memory ran out."""


class Interrupted(RouterCoreError):
    """Work that the caller stopped."""


class NoEligibleModel(RouterCoreError):
    """No candidate is left. `reasons` maps each ruled-out model to the reason."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
