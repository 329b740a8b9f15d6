"""Functions replaced while something is registered."""

import sys
from types import ModuleType

import pytest

from attention.monitoring import patch_points
from attention.monitoring.patch_points import PatchPoint


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A loaded module with a function, and another that has imported it."""
    home, user = ModuleType("home_of_call"), ModuleType("user_of_call")
    vars(home)["call"] = vars(user)["call"] = lambda: "original"
    monkeypatch.setitem(sys.modules, "home_of_call", home)
    monkeypatch.setitem(sys.modules, "user_of_call", user)
    return home


def test_a_held_function_is_looked_for_once(home: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    found = patch_points._bindings
    monkeypatch.setattr(patch_points, "_bindings", lambda *what: searches.append(what) or found(*what))
    point, user, original = PatchPoint(home, "call"), sys.modules["user_of_call"], home.call
    with point.held():
        for answer in ("first", "second"):
            point.add(interceptor=lambda answer=answer: answer)
            assert (home.call(), user.call()) == (answer, answer)
            point.remove(interceptor=point._interceptors[-1])
            assert user.call() == "original"
        assert len(searches) == 1
    assert home.call is user.call is original
    assert len(searches) == 2


def test_a_registration_outlives_a_hold(home: ModuleType) -> None:
    point, original = PatchPoint(home, "call"), home.call
    with point.held():
        point.add(interceptor=lambda: "mine")
    assert home.call() == "mine"
    point.remove(interceptor=point._interceptors[-1])
    assert home.call is original


def test_other_names_are_looked_for_in_mlx_lm_alone(home: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlx_lm.of_call", "mlx_lm_of_others"):
        module = ModuleType(name)
        vars(module)["renamed"] = home.call
        monkeypatch.setitem(sys.modules, name, module)
    found = [names["__name__"] for names, name in patch_points._bindings(home.call, home, "call") if name == "renamed"]
    assert found == ["mlx_lm.of_call"]
