"""The one family of exceptions: every error a user can cause is an AntiphonError with a plain sentence."""


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
