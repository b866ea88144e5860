"""The one family of exceptions: every error a user can cause is an AntiphonError with a plain sentence."""

from __future__ import annotations


class AntiphonError(Exception):
    """Base of everything Antiphon raises on purpose; its text is one sentence that names the fix."""


class ConfigError(AntiphonError):
    """A config.json that is missing a field, has an impossible value or describes another kind of model."""


class WeightsError(AntiphonError):
    """A checkpoint whose tensors are missing, surplus, misshapen, truncated or not safetensors."""


class AudioError(AntiphonError):
    """Audio that cannot be read or used: not a sound file, empty, too short, too long, not finite."""


class InputError(AntiphonError):
    """A request that cannot be met: unknown voice, malformed message, no tokenizer, impossible option."""


class CapacityError(AntiphonError):
    """A conversation that has outgrown its cache or the model's context."""


class BusyError(AntiphonError):
    """One conversation more than the machine, or a server, keeps in time.

    `retry_after` is the number of seconds after which it is worth asking again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @classmethod
    def of(cls, capacity: int, retry_after: float) -> BusyError:
        """As many conversations as this machine keeps in time are being held."""
        return cls(
            f"{capacity} conversations are being held, as many as this machine keeps in time; "
            f"try again in {retry_after:.0f} seconds",
            retry_after,
        )
