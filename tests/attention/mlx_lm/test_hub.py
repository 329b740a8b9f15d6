"""Models by name on the hub: the hub's own client, against a server of this machine, or none."""

import json
import socket

import pytest

pytest.importorskip("huggingface_hub", reason="mlx-lm is not installed")

from huggingface_hub import constants

from attention import UsageError
from attention.mlx_lm import hub
from attention.mlx_lm.configuration import find_model
from fatui.cli.main import main
from tests.support.marks import slow
from tests.support.model_hub import hub_of
from tests.support.tiny_models import SIZES, tiny

NAME = "some-org/tiny"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the hub's cache in a folder of the test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    return made


@pytest.mark.parametrize(
    ("text", "named"),
    [("org/name", True), ("Org-1/Name.2-4bit", True), ("name", False), ("./a", False), ("/a/b", False), ("~/a", False)],
)
def test_a_name_on_the_hub_has_one_slash(text, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_name(text) is named


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not hub.is_hub_name("org/name")


@pytest.mark.thorough
def test_a_model_of_the_hub_is_found_in_its_cache_afterwards(folder, monkeypatch):
    with hub_of(NAME, folder) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert (hub.download(NAME, only_configuration=True) / "config.json").is_file()
    assert find_model(NAME).layers == SIZES["num_hidden_layers"]
    assert hub.cached_folder(NAME, hub.CONFIGURATION) == find_model(NAME).folder


@pytest.mark.slow
def test_a_model_that_the_hub_has_not_is_one_line(folder, monkeypatch):
    with hub_of(NAME, folder) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UsageError, match="has no such model, or a private one") as caught:
            hub.download("some-org/other")
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UsageError, match=r"has not answered for 0\.2 s"):
            hub.download(NAME, look_up_s=0.2)


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["model", slow("finetune"), slow("stream")])
def test_without_a_network_a_name_is_one_line_and_code_2(command, capsys):
    assert main([command, NAME]) == 2
    looking, problem = capsys.readouterr().err.splitlines()
    assert looking == f"fatui: looking for '{NAME}' on the hub"
    assert "127.0.0.1:1 cannot be reached" in problem
    assert problem.endswith("bundled names, folders and models downloaded before need no network")


def test_an_engine_takes_no_model_that_is_not_in_the_cache():
    with pytest.raises(UsageError, match="'some-org/tiny' is neither a folder nor in the hub's cache on this machine"):
        find_model(NAME)


@pytest.mark.slow
def test_a_measured_model_needs_no_network_again(folder, monkeypatch, capsys):
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(tiny("llama").parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "README.md").write_text("not needed")
    words = ["model", NAME, "--prompt", "16", "--generate", "2", "--seconds", "0.1", "--impl", "mlx"]
    with hub_of(NAME, folder) as (address, requested):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert main(words) == 0
        assert not [path for path in requested if path.endswith("README.md")]  # mlx-lm's choice of files
    assert "looking for" in capsys.readouterr().err
    assert main(words) == 0
    assert "looking for" not in capsys.readouterr().err
