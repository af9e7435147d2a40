"""Why the registry refuses a write: what is stored is then as it was. Status codes are foreign_errors."""

from __future__ import annotations


class RegistryError(Exception):
    """A write that the registry refuses; nothing was changed."""


class NameTaken(RegistryError):
    """A model of this name exists."""


class UnknownModel(RegistryError):
    """No model of this name is registered."""


class ChangedMeanwhile(RegistryError):
    """What is stored is no longer what the change was made from."""


class DefinedInConfig(RegistryError):
    """The model is the configuration file's to change."""


class UnknownKey(RegistryError):
    """No client key has this id."""


class KeyIsOver(RegistryError):
    """The client key was revoked or has expired."""
