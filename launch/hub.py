"""What the hub or its local cache knows of a model or a data set, without loading either. Free of torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sft_dist.config import ModelSection
from sft_dist.errors import UserError


@dataclass(frozen=True)
class Answer:
    """`where` it was found (empty: nowhere that can be reached), its `config`, or the `fault` the hub named."""

    where: str = ""
    config: dict[str, Any] | None = None
    fault: str | None = None


def local_config(path: Path, model: ModelSection, key: str) -> dict[str, Any]:
    """The configuration of a model directory whose weights are there. Raises :class:`UserError`."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{key}: {path} holds no config.json, so it is no model directory; name one")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {file}: not readable: {error}; copy the model anew") from error
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise UserError(f"{key}: {path} holds no tokenizer; copy its tokenizer.json there")
    if not list(path.glob("*.safetensors")):
        pickles = list(path.glob("*.bin"))
        if not pickles:
            raise UserError(f"{key}: {path} holds no weights (*.safetensors); copy them there")
        if not model.allow_pickle_weights:
            raise UserError(f"{key}: {path} holds .bin weights only; set model.allow_pickle_weights=true to read them")
    return config


def model_config(name: str, revision: str) -> Answer:
    """The configuration of a hub model, from the cache or from the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return Answer("is in the cache", json.loads(Path(cached).read_text(encoding="utf-8")))

    def ask() -> Answer:
        file = hf_hub_download(name, "config.json", revision=revision)
        return Answer("is on the hub", json.loads(Path(file).read_text(encoding="utf-8")))

    return _asked(ask, "model")


def dataset(name: str, revision: str | None) -> Answer:
    """Whether a hub data set can be had, from the cache of `datasets` or from the hub."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or f"{_home()}/datasets")
    if (cache / name.replace("/", "___")).is_dir():
        return Answer("is in the cache")

    def ask() -> Answer:
        from huggingface_hub import HfApi

        HfApi().dataset_info(name, revision=revision, timeout=10)
        return Answer("is on the hub")

    return _asked(ask, "data set")


def _home() -> str:
    return (
        os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))}/huggingface"
    )


def _asked(ask: Callable[[], Answer], what: str) -> Answer:
    """The hub's answer; one without `where` when it cannot be reached."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not reachable():
        return Answer()
    try:
        return ask()
    except GatedRepoError:
        return Answer(fault="it is gated: accept its licence on the hub and set HF_TOKEN")
    except RepositoryNotFoundError:
        return Answer(fault=f"no such {what} on the hub, or no right to read it (set HF_TOKEN); mend the name")
    except RevisionNotFoundError:
        return Answer(fault="no such revision on the hub; mend it")
    except HFValidationError:
        return Answer(fault="neither a path that exists nor a name the hub could have; mend it")
    except LocalEntryNotFoundError:
        return Answer()
    except EntryNotFoundError:
        return Answer(fault=f"the repository holds no config.json, so it is no {what} for transformers; name another")
    except (HfHubHTTPError, OSError):
        return Answer()


def reachable() -> bool:
    """Whether the hub answers at all; its client would go on trying for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True
