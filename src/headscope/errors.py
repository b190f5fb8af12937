"""What can go wrong, by name. Every message says what was asked, what there is, and what to do."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class HeadscopeError(Exception):
    """Anything that Headscope raises on purpose."""


class NoSuchStep(HeadscopeError, LookupError):
    """A step that is not in the run (yet)."""


class NoSuchName(HeadscopeError, LookupError):
    """A tensor, layer, mode or example that is not in the run."""


class StoreError(HeadscopeError):
    """A file that is damaged or cannot be written; the message names it."""


class NotSupported(HeadscopeError):
    """Something that Headscope does not do, with what can be done instead."""


class Missing(HeadscopeError, ImportError):
    """An optional package that is not installed, with the command that installs it."""


class TrainerGone(HeadscopeError):
    """Waiting is of no use: training ended, failed, or gives no sign."""


class HeadscopeWarning(UserWarning):
    """Something that is not captured or not right; training goes on."""


def shorten(items: Iterable[object], most: int = 6) -> str:
    """The items as text; beyond `most` only the ends and the count."""
    shown = [str(item) for item in items]
    if len(shown) <= most:
        return ", ".join(shown) or "none"
    return f"{', '.join(shown[: most - 2])}, ... {shown[-1]} ({len(shown)} in all)"


def nearest(asked: str, names: Sequence[str]) -> str:
    """A hint at the most similar name, or nothing."""
    close = get_close_matches(asked, names, n=1, cutoff=0.5)
    return f"; nearest is {close[0]!r}" if close else ""
