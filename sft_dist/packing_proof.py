"""The proof, on the loaded model and before its first step, that packed documents do not see each other.

A few short documents are packed and given alone. Logits and gradients must be the same but for round-off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sft_dist.attention import Way, feed, text_config, ways
from sft_dist.data.collate import PackedCollator, PaddingCollator
from sft_dist.data.masking import IGNORE
from sft_dist.modelinfo import max_positions

if TYPE_CHECKING:
    from torch import Tensor

_SEED = 20
_SHORT_WINDOW = 256  # tokens; a document beyond a longer window would cost more than it tells
# Round-off grows with depth and width: the gradients of a model of 30 layers differ by 4e-5 for a batch of another
# shape alone. So much more than that is allowed, up to a limit: attention leaks more than 1e-2, and a convolution's
# leak of 1e-4 shows when the documents before are exchanged.
_MARGIN, _MOST = 10, 1e-3
_FLEX_BLOCK = 128  # tokens, in which flex attention masks

_Packs = list[list[dict[str, list[int]]]]


@dataclass(frozen=True)
class Errors:
    """How far packed documents are from the same documents alone: max|packed - alone| / max|alone|.

    `logits`: over all tokens. `gradients`: over all trained parameters, of a mean loss over trained tokens.
    `exchanged`: logits of each row's last document, when the documents before it get other tokens.
    """

    logits: float
    gradients: float
    exchanged: float

    def within(self, limits: Limits) -> bool:
        """Whether they are round-off. A NaN is not."""
        return (
            self.logits <= limits.logits and self.gradients <= limits.gradients and self.exchanged <= limits.exchanged
        )


@dataclass(frozen=True)
class Limits:
    """The largest :class:`Errors` that are taken for round-off."""

    logits: float
    gradients: float
    exchanged: float


@dataclass(frozen=True)
class Trial:
    """What came of a way: its errors, or the reason why the model could not be fed so."""

    way: Way
    errors: Errors | None
    reason: str = ""


@dataclass(frozen=True)
class Proof:
    """The ways that were tried, in order, and the one that is exact, if any."""

    architecture: str
    limits: Limits
    trials: tuple[Trial, ...]

    @property
    def way(self) -> Way | None:
        """The first exact way."""
        return next((trial.way for trial in self.trials if self.exact(trial)), None)

    def exact(self, trial: Trial) -> bool:
        """Whether a way was possible and differs by round-off alone."""
        return trial.errors is not None and trial.errors.within(self.limits)

    def line(self) -> str:
        """The outcome in a line for people."""
        first = self.trials[0]
        if first.errors is not None and self.exact(first):
            logits, gradients = first.errors.logits, first.errors.gradients
            return f"packing exact: {first.way.value}, {logits:.0e} (logits), {gradients:.0e} (gradients)"
        leaks = any(trial.errors is not None and not self.exact(trial) for trial in self.trials)
        told = [self._told(trial) for trial in self.trials]
        if self.way is None:
            told.append("no way is exact")
        return f"packing {'leaks' if leaks else 'fails'} on {self.architecture}: {'; '.join(told)}"

    def _told(self, trial: Trial) -> str:
        if trial.errors is None:
            return f"{trial.way.value} not possible ({trial.reason})"
        if self.exact(trial):
            return f"{trial.way.value} exact: {max(trial.errors.logits, trial.errors.gradients):.0e}"
        return f"{trial.way.value} {trial.errors.logits:.2g}"


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that is taken for round-off.

    fp32: small models come out at 1e-7 to 1e-6 and leaks of attention above 1e-2. Half precision: four units in the
    last place of the largest value, for a long row and a short one are summed in other orders. That is coarse, which
    is why the documents before it may change a document by a tenth of it only: with a mask they change nothing at all.
    """
    return {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def prove(model: Any, candidates: Sequence[Way] | None = None, autocast: torch.dtype | None = None) -> Proof:
    """Try the ways (those of :func:`ways`, unless given) in order on a loaded model until one is exact.

    For a model whose weights are whole: before it is wrapped or sharded. Runs on this process alone, where the
    weights are, and needs room for one gradient of each trained parameter. `autocast`: the precision to run in, for
    flash attention over fp32 weights, which it does not take; else fp32 weights are proven in fp32, without TF32.
    Gradient checkpointing is proven with where it is on. Grads, random states and modes are left as they were.
    """
    packs = _packs(model)
    trials: list[Trial] = []
    with _undisturbed(model):
        limits = _limits(model, tolerance(autocast or _coarsest(model)), packs, autocast)
        for way in candidates or ways(model):
            trials.append(_try(model, way, packs, autocast))
            errors = trials[-1].errors
            if errors is not None and errors.within(limits):
                break
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Proof(type(base).__name__, limits, tuple(trials))


def _limits(model: Any, tolerated: float, packs: _Packs, autocast: torch.dtype | None) -> Limits:
    """What is round-off on this model: what becomes of the same documents, not packed but padded in one batch."""
    device = model.get_input_embeddings().weight.device
    rows = [row for pack in packs for row in pack]
    batch = {name: tensor.to(device) for name, tensor in PaddingCollator(pad_token_id=0)(rows).items()}
    kept = batch["attention_mask"] > 0

    def padded() -> Tensor:
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return logits.float()[kept]

    try:
        logits, gradients = _compare(model, packs, autocast, padded)
    except Exception:  # a model that takes no padding is held to the tolerance
        return Limits(tolerated, tolerated, tolerated / 10)
    most = max(_MOST, 3 * tolerated)
    # In this order of arguments a NaN, which compares as false, leaves the tolerance.
    return Limits(
        logits=min(max(tolerated, _MARGIN * logits), most),
        gradients=min(max(tolerated, _MARGIN * gradients), most),
        exchanged=tolerated / 10,
    )


def _try(model: Any, way: Way, packs: _Packs, autocast: torch.dtype | None) -> Trial:
    device = model.get_input_embeddings().weight.device
    batch = {name: tensor.to(device) for name, tensor in PackedCollator(pad_token_id=0)(packs).items()}
    last = _last_documents(batch)
    found: list[Tensor] = []

    def packed() -> Tensor:
        found.append(_packed(model, batch, way))
        return found[0]

    try:
        logits, gradients = _compare(model, packs, autocast, packed)
        with _precision(autocast, device):
            exchanged = _packed(model, _with_others(batch, model), way)
    except Exception as error:  # whatever a forward makes of arguments that it was not written for
        return Trial(way, None, f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}")
    return Trial(way, Errors(logits, gradients, exchanged=_difference(exchanged[last], found[0][last])))


def _compare(
    model: Any, packs: _Packs, autocast: torch.dtype | None, other: Callable[[], Tensor]
) -> tuple[float, float]:
    """How far logits (tokens, vocabulary) of all documents, and gradients of their loss, are from those alone."""
    device = model.get_input_embeddings().weight.device
    rows = [row for pack in packs for row in pack]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _clear(trained)
    with _precision(autocast, device):
        alone = torch.cat([_alone(model, row["input_ids"], device) for row in rows])
        _loss(alone, rows).backward()  # type: ignore[no-untyped-call]
        scale = _largest(trained)
        logits = other()
        # Subtracted where the first gradients are, the second ones need no room of their own.
        (-_loss(logits, rows)).backward()  # type: ignore[no-untyped-call]
    return _difference(logits, alone), (_largest(trained) / scale).item()


def _precision(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if autocast is None else torch.autocast(device.type, autocast)


def _packs(model: Any) -> _Packs:
    """Two rows of random documents of uneven length, the second row shorter than the first.

    One document is of one token, and one is longer than a short sliding window and than a block of flex attention,
    as far as the model has positions.
    """
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None) or 0
    longest = max(
        13,
        window + 9 if window <= _SHORT_WINDOW else 0,
        _FLEX_BLOCK + 3 if _is_flex(model) else 0,
    )
    longest = min(longest, max_positions(config.to_dict()) or longest)
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = model.get_input_embeddings().num_embeddings

    def document(length: int) -> dict[str, list[int]]:
        ids: list[int] = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return {"input_ids": ids, "labels": ids}

    return [[document(length) for length in lengths] for lengths in ((5, 1, longest, 4), (7, 2, 8))]


def _alone(model: Any, ids: list[int], device: torch.device) -> Tensor:
    """Logits (tokens, vocabulary) of a document in a batch of its own, fed as in an evaluation."""
    tokens = torch.tensor([ids], device=device)
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return logits[0].float()


def _packed(model: Any, batch: dict[str, Tensor], way: Way) -> Tensor:
    """Logits (tokens, vocabulary) of all documents in a packed batch, in the order of their rows."""
    # The loss is taken below, the same for packed and alone.
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**feed(unlabelled, way, model.config, model.dtype)).logits.float()
    kept = batch["document_ids"] > 0
    return logits[0] if way is Way.VARLEN else logits[kept]


def _loss(logits: Tensor, rows: list[dict[str, list[int]]]) -> Tensor:
    """The mean over trained tokens of documents laid end to end; the first token of each is predicted by nothing."""
    labels = torch.tensor([label for row in rows for label in (IGNORE, *row["labels"][1:])], device=logits.device)
    return functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE)


def _with_others(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The batch with other tokens in all documents but the last of each row."""
    ids, documents = batch["input_ids"], batch["document_ids"]
    vocabulary = model.get_input_embeddings().num_embeddings
    others = (ids + vocabulary // 2) % vocabulary
    return batch | {"input_ids": ids.where(documents == documents.amax(1, keepdim=True), others)}


def _last_documents(batch: dict[str, Tensor]) -> Tensor:
    documents = batch["document_ids"]
    return (documents == documents.amax(1, keepdim=True))[documents > 0]


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _largest(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The largest absolute gradient of all, on the CPU: a model may be spread over devices. NaN if any is NaN."""
    found = [p.grad.abs().max().float().cpu() for p in parameters if p.grad is not None]
    return torch.stack(found).max()


def _clear(parameters: Iterable[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _coarsest(model: torch.nn.Module) -> torch.dtype:
    """The least precise type that a forward computes in: of weights, and of what 4-bit weights are unpacked to."""
    found: set[torch.dtype] = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    own = (getattr(module, "compute_dtype", None) for module in model.modules())
    found |= {dtype for dtype in own if isinstance(dtype, torch.dtype)}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Neither chance nor coarse arithmetic inside, and everything as it was afterwards."""
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad(), _no_tf32(), _no_chance(model):
            # The library checkpoints in training mode only.
            model.train(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        if _is_flex(model):
            # Torch compiles flex attention for so many shapes and then runs it with all scores in memory. The shapes
            # of the proof shall not count.
            torch.compiler.reset()


def _is_flex(model: Any) -> bool:
    return str(text_config(model.config)._attn_implementation) == "flex_attention"


@contextmanager
def _no_chance(model: Any) -> Iterator[None]:
    """Dropout of every kind at zero: its modules, and the rates that models keep as numbers."""
    found = [
        (owner, name, rate)
        for owner in (*model.modules(), text_config(model.config))
        for name, rate in vars(owner).items()
        if isinstance(rate, float) and ("drop" in name or "jitter" in name or name == "p")
    ]
    try:
        for owner, name, _ in found:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, rate in found:
            setattr(owner, name, rate)


@contextmanager
def _no_tf32() -> Iterator[None]:
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
