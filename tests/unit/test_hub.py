"""What the hub says becomes one line; a hub that cannot be reached is not a fault of the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import hub


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception | Path], None]:
    """Lets the hub answer every download with an error, or with a file."""
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))

    def set_answer(answer: Exception | Path) -> None:
        def download(*_: object, **__: object) -> str:
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: download())

    return set_answer


def http_error(kind: str) -> Exception:
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
    return getattr(errors, kind)("no", response=response)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "it is gated: accept its licence on the hub and set HF_TOKEN"),
        ("RepositoryNotFoundError", "no such model on the hub, or no right to read it (set HF_TOKEN); mend the name"),
        ("RevisionNotFoundError", "no such revision on the hub; mend it"),
    ],
)
def test_what_the_hub_refuses_is_a_fault(answered: Callable[..., None], kind: str, said: str) -> None:
    answered(http_error(kind))
    assert hub.model_config("a/b", "main").fault == said
    fault = hub.dataset("a/b", None).fault
    assert fault == said.replace("model", "data set")


def test_a_hub_that_does_not_answer_leaves_the_question_open(answered: Callable[..., None]) -> None:
    answered(OSError("connection reset"))
    assert hub.model_config("a/b", "main") == hub.Answer()
    assert hub.dataset("a/b", None) == hub.Answer()


def test_a_model_on_the_hub_tells_its_configuration(answered: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    answered(file)
    found = hub.model_config("facebook/opt-1.3b", "main")
    assert (found.where, found.config) == ("is on the hub", {"architectures": ["OPTForCausalLM"]})


def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("asked"))
    assert not hub.reachable()


def test_a_proxy_counts_as_a_way_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")
    assert hub.reachable()
