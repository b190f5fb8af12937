import json
import re
import subprocess
import sys

import pytest

import headscope

HEAVY = ("torch", "transformers", "anywidget", "starlette", "uvicorn", "obstore", "safetensors", "rich", "numpy")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str) -> set[str]:
    """Which of the heavy packages a fresh Python has after that code."""
    after = f"\nimport sys, json\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    return set(json.loads(run(code + after).splitlines()[-1]))


def test_importing_headscope_is_light() -> None:
    assert loaded("import headscope") == set()


def test_this_test_can_fail() -> None:
    assert {"torch", "numpy"} <= loaded("import headscope\nheadscope.watch")


def test_reading_needs_no_torch() -> None:
    found = loaded("import headscope\nheadscope.open_trial\nheadscope.Trial")
    assert "numpy" in found
    assert not found & {"torch", "transformers", "anywidget", "starlette", "rich"}


def test_all_names_are_there() -> None:
    for name in headscope.__all__:
        found = getattr(headscope, name)
        assert found.__name__.lower() == name.lower()
        assert found.__doc__, f"{name} is not documented"
    assert sorted(headscope.__all__) == headscope.__all__
    assert len(headscope.__all__) <= 12


@pytest.mark.parametrize(
    "first",
    [
        "headscope.watch",
        "from headscope.watch import Watch",
    ],
)
def test_watch_stays_callable_whatever_is_imported(first: str) -> None:
    code = f"import headscope\n{first}\nfrom headscope import watch\n"
    code += "print(type(headscope.watch), headscope.watch is watch)"
    assert run(code) == "<class 'type'> True\n"


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert re.fullmatch(r"\d+\.\d+\.\d+", headscope.__version__)
    assert version("headscope") == headscope.__version__


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'headscope' has no attribute 'wach'; it has .*open_trial, replay, watch$"
    ):
        headscope.wach  # noqa: B018


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import headscope
"""


@pytest.mark.parametrize("name", ["HeadscopeCallback", "replay", "watch"])
def test_without_torch_watch_says_what_to_install(name: str) -> None:
    code = BLOCKED.format(blocked="torch")
    code += f"""
try:
    headscope.{name}
except headscope.errors.Missing as problem:
    assert isinstance(problem, ImportError)
    assert isinstance(problem.__cause__, ModuleNotFoundError)
    print(problem)
"""
    assert run(code) == (
        f"headscope.{name} needs PyTorch, which is not installed: pip install torch "
        f"(see 'Install' in the README for CPU and GPU builds)\n"
    )


def test_without_torch_a_run_can_be_read() -> None:
    code = BLOCKED.format(blocked="torch") + "print(headscope.open_trial('no such folder').steps())"
    assert run(code) == "[]\n"


def test_another_missing_package_is_not_called_torch() -> None:
    code = BLOCKED.format(blocked="obstore")
    code += """
try:
    headscope.open_trial
except ModuleNotFoundError as problem:
    print(problem.name, type(problem).__name__)
"""
    assert run(code) == "obstore ModuleNotFoundError\n"
