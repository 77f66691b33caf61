"""The model that a run trains: read whole or straight into shards, with its adapter, in the form its backend wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from sft_dist import adapters, fsdp2, straight
from sft_dist.backend import Backend
from sft_dist.config import Recipe
from sft_dist.models import load_config, load_model
from sft_dist.shape import whole_weights
from sft_dist.tensor_files import tensor_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_dist.trainers.sft import World


def load_trained_model(
    path: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    world: World,
    bf16: bool,
    say: Callable[[str], None],
) -> Any:
    """The model of a recipe, with an adapter where it has one, sharded where the backend shards weights.

    All ranks call it together, when the process group is there. Raises :class:`UserError`.
    """
    _set_up(backend)
    how = straight_reason(path, recipe, tokenizer, backend)
    if how is None and backend.kind == "fsdp2":
        model = _fsdp2_straight(path, recipe, backend, world, bf16)
    elif how is None and backend.stage == 3:
        model = adapters.wrap(_zero3_straight(path, recipe), recipe.peft, backend)
    else:
        if how:
            say(f"weights: each process reads all of them first ({how})")
        quantized = None
        if recipe.peft.load_in_4bit:
            dtype = getattr(torch, recipe.model.dtype)
            quantized = adapters.quantization_config(recipe.peft, dtype, bf16, backend)
        model = load_model(path, recipe.model, tokenizer, quantized)
        adapters.keep_quantised(model)
        model = adapters.wrap(model, recipe.peft, backend)
        if backend.kind == "fsdp2":
            fsdp2.shard(model, _mesh(backend, world), bf16, _checkpointing(recipe))
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


def straight_reason(path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, backend: Backend) -> str | None:
    """Why weights cannot be read straight into shards; empty where nothing is sharded; None where they can be."""
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
    with whole_weights():
        model = _build(path, recipe, straight.without_values())
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        return "the embeddings grow with the tokenizer"
    if straight.places(model, files) is None:
        return "their names in the files are not those of the model"
    return None


def _build(path: str, recipe: Recipe, where: Any) -> Any:
    config = load_config(path, recipe.model)
    options: dict[str, Any] = {}
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation

    def make() -> Any:
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, recipe.model.dtype),
            trust_remote_code=recipe.model.trust_remote_code,
            **options,
        )

    model = straight.build(make, where)
    model.tie_weights()
    return model


def _fsdp2_straight(path: str, recipe: Recipe, backend: Backend, world: World, bf16: bool) -> Any:
    files = tensor_files(path, recipe.model.model_revision)
    bare = _build(path, recipe, straight.without_values())
    assert files is not None
    place = straight.places(bare, files)
    assert place is not None
    model = adapters.wrap(bare, recipe.peft, backend)
    fsdp2.shard(model, _mesh(backend, world), bf16, _checkpointing(recipe))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    fsdp2.materialize(model, device)
    straight.fill_fsdp2(model.named_parameters(), files, place)
    _generation_config(bare, path, recipe)
    return model


def _zero3_straight(path: str, recipe: Recipe) -> Any:
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config, prevent_arange_dtype_change

    files = tensor_files(path, recipe.model.model_revision)
    settings = deepspeed_config()
    # Left to itself transformers would gather every layer once more, to draw values that are read from files anyhow.
    with whole_weights(), prevent_arange_dtype_change():
        model = _build(path, recipe, deepspeed.zero.Init(config_dict_or_path=settings))
    assert files is not None
    place = straight.places(model, files)
    assert place is not None
    straight.fill_zero3(model.named_parameters(), files, place)
    _generation_config(model, path, recipe)
    return model


def _generation_config(model: Any, path: str, recipe: Recipe) -> None:
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(path, revision=recipe.model.model_revision)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(model.config)


def _mesh(backend: Backend, world: World) -> Any:
    return fsdp2.make_mesh(world.size, world.local_size, backend.node_shards)


def _checkpointing(recipe: Recipe) -> dict[str, Any] | None:
    if not recipe.train.gradient_checkpointing:
        return None
    return {"use_reentrant": False} | (recipe.train.gradient_checkpointing_kwargs or {})
