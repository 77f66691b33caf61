"""The model that a run trains: read whole or straight into shards, with its adapter, in the form its backend wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Part:
    """A model that is being loaded, alone or as a part of a larger module.

    Under FSDP2 it has no values before `fill` is called: it is sharded first. Elsewhere there is nothing to fill.
    """

    model: Any
    fill: Callable[[], None] = lambda: None


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
    part = begin(path, recipe, tokenizer, backend, bf16, say, head)
    finish(part.model, [part], recipe, backend, world, bf16)
    return part.model


def begin(
    path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, backend: Backend, bf16: bool,
    say: Callable[[str], None], head: Head = "causal",
) -> Part:  # fmt: skip
    """Load a model as far as it can be before it is sharded (see :func:`load_trained_model`, and :func:`finish`)."""
    _set_up(backend)
    found = _straight(path, recipe, tokenizer, backend, head)
    if isinstance(found, _Straight):
        part = (_fsdp2 if backend.kind == "fsdp2" else _zero3)(found, recipe, backend)
        if head == "causal":
            _generation_config(part.model, path, recipe)
    else:
        if found:
            say(f"weights: each process reads all of them first ({found})")
        part = Part(_whole(path, recipe, tokenizer, backend, bf16, head))
    part.model.config.pad_token_id = tokenizer.pad_token_id
    return part


def finish(
    model: Any, parts: Sequence[Part], recipe: Recipe, backend: Backend, world: World, bf16: bool,
    context_fn: Callable[[], tuple[Any, Any]] | None = None,
) -> None:  # fmt: skip
    """Shard a model, of which `parts` are all that has to be filled, and draw the first values of its adapters.

    `context_fn`: as in `torch.utils.checkpoint`, where activations are recomputed. All ranks call it together.
    """
    if backend.kind == "fsdp2":
        _shard(model, recipe, backend, world, bf16, context_fn)
        cuda = torch.cuda.is_available()
        fsdp2.materialize(model, torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"))
    for part in parts:
        part.fill()
    adapters.draw(model, recipe.train.seed)


def _set_up(backend: Backend) -> None:
    """What has to be there before a model is loaded, and the training arguments do not do on a CPU."""
    if backend.kind == "fsdp2":
        fsdp2.announce_to_accelerate()
    if backend.kind == "deepspeed":
        import deepspeed

        # Of torch's group, which is there. Without it DeepSpeed takes this for the only process.
        deepspeed.init_distributed(auto_mpi_discovery=False)
        if backend.node_shards:
            from deepspeed.utils import groups

            # It makes the groups within nodes anew for each model, and refuses where there are some.
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


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


def _fsdp2(found: _Straight, recipe: Recipe, backend: Backend) -> Part:
    model = adapters.wrap(found.model, recipe.peft, backend, found.head)

    def fill() -> None:
        straight.fill_fsdp2(model.named_parameters(), found.files, found.place)
        draw_head(_headless(model, found), recipe.train.seed)

    return Part(model, fill)


def _zero3(found: _Straight, recipe: Recipe, backend: Backend) -> Part:
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config, prevent_arange_dtype_change

    settings = deepspeed_config()
    # Left to itself transformers would gather every layer once more, to draw values that are read from files anyhow.
    with whole_weights(), prevent_arange_dtype_change():
        bare = straight.build(found.make, deepspeed.zero.Init(config_dict_or_path=settings))
    straight.fill_zero3(bare.named_parameters(), found.files, found.place)
    draw_head(_headless(bare, found), recipe.train.seed)
    return Part(adapters.wrap(bare, recipe.peft, backend, found.head))


def _headless(model: Any, found: _Straight) -> list[tuple[str, Any]]:
    """The weights of a head that the files do not have."""
    named = model.named_parameters()
    return [(n, p) for n, p in named if is_head(n) and straight.plain_name(n) not in found.place]


def _whole(
    path: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, backend: Backend, bf16: bool, head: Head
) -> Any:
    quantized = None
    if recipe.peft.load_in_4bit:
        dtype = getattr(torch, recipe.model.dtype)
        quantized = adapters.quantization_config(recipe.peft, dtype, bf16, backend)
    model = load_model(path, recipe.model, tokenizer, quantized, head, recipe.train.seed)
    adapters.keep_quantised(model)
    return adapters.wrap(model, recipe.peft, backend, head)


def _shard(
    model: Any, recipe: Recipe, backend: Backend, world: World, bf16: bool,
    context_fn: Callable[[], tuple[Any, Any]] | None,
) -> None:  # fmt: skip
    mesh = fsdp2.make_mesh(world.size, world.local_size, backend.node_shards)
    checkpointing = None
    if recipe.train.gradient_checkpointing:
        checkpointing = {"use_reentrant": False} | (recipe.train.gradient_checkpointing_kwargs or {})
        checkpointing |= {} if context_fn is None else {"context_fn": context_fn}
    fsdp2.shard(model, mesh, bf16, checkpointing)


def _generation_config(model: Any, path: str, recipe: Recipe) -> None:
    from transformers import GenerationConfig

    base = model.get_base_model() if recipe.peft.use_peft else model
    try:
        base.generation_config = GenerationConfig.from_pretrained(path, revision=recipe.model.model_revision)
    except OSError:
        base.generation_config = GenerationConfig.from_model_config(base.config)
