"""The errors krontune raises for a user's mistake: what was got, what is allowed, what to do."""


class KrontuneError(ValueError):
    """Base of all of them; also a ValueError, so that generic handlers keep working."""


class ShapeError(KrontuneError):
    """Sizes that do not fit together, such as a factor shape that does not divide a weight."""


class ConfigError(KrontuneError):
    """A setting that is out of range, unknown, or contradicts another."""


class CheckpointError(KrontuneError):
    """An adapter file that is damaged, of another format, or made for another base model."""
