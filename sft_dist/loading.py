"""The model that a run trains: read whole or straight into shards, with its adapter, in the form its backend wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_dist import adapters, fsdp2, straight
from sft_dist.backend import Backend
from sft_dist.config import Recipe
from sft_dist.heads import Head, auto_class, draw_head, is_head, prepared_config
from sft_dist.models import load_config, load_model
from sft_dist.shape import whole_weights
from sft_dist.tensor_files import TensorFiles, tensor_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_dist.world import World


def load_trained_model(
    path: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    world: World,
    bf16: bool,
    say: Callable[[str], None],
    head: Head = "causal",
) -> Any:
    """The model of a recipe, with an adapter where it has one, sharded where the backend shards weights.

    `head`: of a causal language model, or that of a reward model, which is drawn where the files have none.
    All ranks call it together, when the process group is there. Raises :class:`UserError`.
    """
    _set_up(backend)
    found = _straight(path, recipe, tokenizer, backend, head)
    if isinstance(found, _Straight):
        model = (_fsdp2 if backend.kind == "fsdp2" else _zero3)(found, recipe, backend, world, bf16)
        if head == "causal":
            _generation_config(model, path, recipe)
    else:
        if found:
            say(f"weights: each process reads all of them first ({found})")
        model = _whole(path, recipe, tokenizer, backend, world, bf16, head)
    adapters.draw(model, recipe.train.seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _set_up(backend: Backend) -> None:
    """What has to be there before a model is loaded, and the training arguments do not do on a CPU."""
    if backend.kind == "fsdp2":
        fsdp2.announce_to_accelerate()
    if backend.kind == "deepspeed":
        import deepspeed

        # Of torch's group, which is there. Without it DeepSpeed takes this for the only process.
        deepspeed.init_distributed(auto_mpi_discovery=False)


@dataclass(frozen=True)
class _Straight:
    """What it takes to read weights straight into shards: the files, and where each weight is in them.

    `model`: without values, on the meta device, with that `head`. `make` makes another.
    """

    files: TensorFiles
    place: dict[str, str]
    model: Any
    make: Callable[[], Any]
    head: Head


def _straight(
    path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, backend: Backend, head: Head
) -> _Straight | str:
    """That, or why it cannot be; an empty reason where nothing is sharded."""
    if not backend.shards_weights:
        return ""
    if recipe.peft.load_in_4bit:
        return "they are quantised while they are read"
    if recipe.peft.use_dora:
        return "DoRA begins with the norms of whole rows"
    if backend.kind == "deepspeed" and (backend.node_shards or recipe.parallel.offload_nvme_path):
        return "DeepSpeed places them a second time"
    files = tensor_files(path, recipe.model.model_revision)
    if files is None:
        return "they are no safetensors"
    make = _maker(path, recipe, head)
    with whole_weights():
        model = straight.build(make, straight.without_values())
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        return "the embeddings grow with the tokenizer"
    place = straight.places(model, files, optional=is_head if head == "reward" else None)
    if place is None:
        return "their names in the files are not those of the model"
    return _Straight(files, place, model, make, head)


def _maker(path: str, recipe: Recipe, head: Head) -> Callable[[], Any]:
    config = prepared_config(load_config(path, recipe.model), head)
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.model.dtype)}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation

    def make() -> Any:
        return auto_class(head).from_config(config, trust_remote_code=recipe.model.trust_remote_code, **options)

    return make


def _fsdp2(found: _Straight, recipe: Recipe, backend: Backend, world: World, bf16: bool) -> Any:
    model = adapters.wrap(found.model, recipe.peft, backend, found.head)
    _shard(model, recipe, backend, world, bf16)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    fsdp2.materialize(model, device)
    straight.fill_fsdp2(model.named_parameters(), found.files, found.place)
    draw_head(_headless(model, found), recipe.train.seed)
    return model


def _zero3(found: _Straight, recipe: Recipe, backend: Backend, _: World, __: bool) -> Any:
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config, prevent_arange_dtype_change

    settings = deepspeed_config()
    # Left to itself transformers would gather every layer once more, to draw values that are read from files anyhow.
    with whole_weights(), prevent_arange_dtype_change():
        bare = straight.build(found.make, deepspeed.zero.Init(config_dict_or_path=settings))
    straight.fill_zero3(bare.named_parameters(), found.files, found.place)
    draw_head(_headless(bare, found), recipe.train.seed)
    return adapters.wrap(bare, recipe.peft, backend, found.head)


def _headless(model: Any, found: _Straight) -> list[tuple[str, Any]]:
    """The weights of a head that the files do not have."""
    named = model.named_parameters()
    return [(n, p) for n, p in named if is_head(n) and straight.plain_name(n) not in found.place]


def _whole(
    path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, backend: Backend, world: World, bf16: bool,
    head: Head,
) -> Any:  # fmt: skip
    quantized = None
    if recipe.peft.load_in_4bit:
        dtype = getattr(torch, recipe.model.dtype)
        quantized = adapters.quantization_config(recipe.peft, dtype, bf16, backend)
    model = load_model(path, recipe.model, tokenizer, quantized, head, recipe.train.seed)
    adapters.keep_quantised(model)
    model = adapters.wrap(model, recipe.peft, backend, head)
    if backend.kind == "fsdp2":
        _shard(model, recipe, backend, world, bf16)
    return model


def _shard(model: Any, recipe: Recipe, backend: Backend, world: World, bf16: bool) -> None:
    mesh = fsdp2.make_mesh(world.size, world.local_size, backend.node_shards)
    checkpointing = None
    if recipe.train.gradient_checkpointing:
        checkpointing = {"use_reentrant": False} | (recipe.train.gradient_checkpointing_kwargs or {})
    fsdp2.shard(model, mesh, bf16, checkpointing)


def _generation_config(model: Any, path: str, recipe: Recipe) -> None:
    from transformers import GenerationConfig

    base = model.get_base_model() if recipe.peft.use_peft else model
    try:
        base.generation_config = GenerationConfig.from_pretrained(path, revision=recipe.model.model_revision)
    except OSError:
        base.generation_config = GenerationConfig.from_model_config(base.config)
