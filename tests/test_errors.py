import pytest

from headscope import errors
from headscope.errors import nearest, shorten


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], "none"),
        ([0], "0"),
        ([0, 50, 100], "0, 50, 100"),
        (range(6), "0, 1, 2, 3, 4, 5"),
        (range(7), "0, 1, 2, 3, ... 6 (7 in all)"),
        (["a"] * 1000, "a, a, a, a, ... a (1000 in all)"),
    ],
)
def test_lists_are_shortened_with_their_count(items: list[object], text: str) -> None:
    assert shorten(items) == text


def test_how_many_are_shown_can_be_chosen() -> None:
    assert shorten(range(9), most=4) == "0, 1, ... 8 (9 in all)"
    assert shorten(iter("abcd"), most=4) == "a, b, c, d"


def test_the_nearest_name_is_offered_or_nothing() -> None:
    names = ["layer.0.q", "layer.0.k", "loss"]
    assert nearest("layer.0.qq", names) == "; nearest is 'layer.0.q'"
    assert nearest("zzz", names) == ""
    assert nearest("loss", []) == ""


def test_kinds_are_what_callers_catch() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    ours = {kind for kind in kinds if kind.__module__ == errors.__name__}
    assert {kind for kind in ours if not issubclass(kind, errors.HeadscopeError)} == {errors.HeadscopeWarning}
    assert issubclass(errors.NoSuchStep, LookupError)
    assert issubclass(errors.NoSuchName, LookupError)
    assert issubclass(errors.Missing, ImportError)
    assert issubclass(errors.HeadscopeWarning, UserWarning)
    assert all(kind.__doc__ for kind in ours)
