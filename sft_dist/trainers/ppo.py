"""PPO on transformers' trainer: rollouts between its steps, and the loss of a mini-batch of one in each.

A rollout is made behind the last step of the one before it, so that a checkpoint between two steps holds all that the
next step needs: the rollout with its log-probabilities, values and rewards, the weight of the KL penalty and the
moments of the rewards. Gradients are means over the tokens of the whole mini-batch, whatever the micro-batches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from sft_dist.backend import Backend
from sft_dist.config_stages import PPOSection
from sft_dist.errors import UserError
from sft_dist.metrics_file import append
from sft_dist.ppo.actors import Actors
from sft_dist.ppo.batches import batch_of
from sft_dist.ppo.formulas import AdaptiveKL, Moments, approximate_kl, policy_losses, value_losses
from sft_dist.ppo.plan import Places, PlacesInOrder, Plan
from sft_dist.ppo.ptx import Ptx
from sft_dist.ppo.roller import Prompts, Roller
from sft_dist.ppo.rollout import Rollout, from_document, samples_of, settle, statistics_of, to_document
from sft_dist.ppo.safeguards import Safeguards
from sft_dist.sums import Sums
from sft_dist.trainers.ordered import Ordered
from sft_dist.trainers.resumable import EvaluationStopped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLLOUT = "rollout.json"
# What is summed over the tokens of a step, and logged as the mean of the steps since the last record.
_SUMS = ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "policy/approxkl_avg", "policy/clipfrac_avg",
         "val/clipfrac_avg", "val/ratio", "loss/ptx_avg")  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Means over the responses to some prompts, and some of the responses."""

    numbers: dict[str, float]
    samples: list[dict[str, Any]]


class _RolloutLeft(Exception):
    """A rollout was left for a signal; it is made anew, alike, when the run goes on."""


class _Loss(Trainer):  # type: ignore[misc]
    """The loss of PPO in transformers' trainer, below what judges and counts."""

    control: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The part of the mini-batch's loss that these rows have."""
        found = self.loss_of(model, inputs["places"].tolist())
        return (found, None) if return_outputs else found

    def loss_of(self, model: Any, places: list[int]) -> torch.Tensor:
        """See :class:`PPOTrainer`."""
        raise NotImplementedError

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """What the policy comes to on the held-out prompts, as `PREFIX_reward` and the like."""
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.held_out_numbers().items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def held_out_numbers(self) -> dict[str, float]:
        """See :class:`PPOTrainer`."""
        raise NotImplementedError


class PPOTrainer(Ordered, _Loss):
    """Trains the policy and the value of :class:`Actors`. `arrange` comes before `train()`."""

    def __init__(
        self, model: Actors, args: TrainingArguments, settings: PPOSection, tokenizer: PreTrainedTokenizerBase,
        backend: Backend, folder: Path,
    ) -> None:  # fmt: skip
        self.begin_counting(backend)
        self.settings, self.folder = settings, folder
        self.pad = int(tokenizer.pad_token_id)
        self.safeguards = Safeguards(settings)
        self.kl = AdaptiveKL(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.moments = Moments()
        self.rollout: Rollout | None = None
        self.ptx: Ptx | None = None
        # On no device, where they are asked for at each step.
        self.sums: Sums = Sums((len(_SUMS),), torch.device("cpu"))
        self._summed_steps = 0
        # What each rollout came to, by the step that it was made behind.
        self._told: list[tuple[int, dict[str, float]]] = []
        self._clock = {"time/rollout": 0.0, "time/generation": 0.0}
        self._left_out = False
        super().__init__(
            model=model, args=args, train_dataset=[0], eval_dataset=[0], processing_class=tokenizer,
            data_collator=_collate,
        )  # fmt: skip

    def arrange(
        self,
        plan: Plan,
        prompts: Prompts,
        held_out: Prompts | None,
        roller: Callable[..., Roller],
        digest: str,
        ptx: Ptx | None,
    ) -> None:
        """Settle what is trained on. `roller`: makes it, given what to call between batches and at every token."""
        self.plan, self.prompts, self.held_out, self.ptx = plan, prompts, held_out, ptx
        self.args.max_steps = plan.steps
        self.train_dataset = Places(plan)
        self.order_rows(lambda: PlacesInOrder(plan), digest, None)  # type: ignore[arg-type, return-value]
        self.roller = roller(self._between, lambda: self.survival.watchdog.sign_of_life())
        self._mini: tuple[int, list[int]] = (-1, [])

    # Rollouts.

    def on_training_begins(self) -> None:
        """As the base class; then the first rollout, unless a checkpoint has brought one."""
        super().on_training_begins()
        if self.rollout is None:
            self._roll()

    def on_step_ends(self, control: Any) -> None:
        """As the base class; then the rollout of the next step, where that begins one."""
        super().on_step_ends(control)
        step = self.state.global_step
        self._summed_steps += 1
        if step % self.plan.steps_per_rollout == 0:
            self.rollout = None
            if step < self.plan.steps and self.survival.stopping is None:
                self._roll()
                if self.rollout is None:
                    control.should_evaluate, control.should_save = False, True

    def _roll(self) -> None:
        """Make the next rollout, unless a signal asks to stop."""
        began, generating = time.perf_counter(), self.roller.seconds
        number = self.state.global_step // self.plan.steps_per_rollout
        try:
            rollout = self._rolled(self.prompts, self.plan.prompts_of(number), number)
        except _RolloutLeft:
            return
        told = settle(rollout, self.settings, self.kl, self.moments)
        self.rollout, self._left_out = rollout, False
        self._keep(rollout, told)
        self._told.append((self.state.global_step, told))
        self._clock["time/rollout"] += time.perf_counter() - began
        self._clock["time/generation"] += self.roller.seconds - generating
        try:
            lines = self.safeguards.judge(number, told)
        except UserError:
            self.survival.end_steps()
            raise
        for line in lines:
            self.survival.tell(line)

    def _rolled(self, prompts: Prompts, rows: list[int], number: int, tag: int = 0) -> Rollout:
        training = self.model.training
        self.model.eval()
        try:
            return self.roller.roll(number, prompts, rows, tag)
        finally:
            self.model.train(training)

    def measured(self, samples: int) -> Measured | None:
        """What the policy comes to on the held-out prompts, all ranks together, and so many samples."""
        if self.held_out is None:
            return None
        # Of the same chances at every time, which are others than those of the rollouts.
        rollout = self._rolled(self.held_out, list(range(len(self.held_out))), number=0, tag=1)
        kept = samples_of(rollout, samples, self.processing_class.decode, self.held_out.where)
        return Measured(statistics_of(rollout), kept)

    def held_out_numbers(self) -> dict[str, float]:
        """The means over the held-out prompts, by the last part of their names."""
        try:
            found = self.measured(0)
        except _RolloutLeft as left:
            raise EvaluationStopped from left
        assert found is not None
        names = {"scores": "reward", "mean_length": "length"}
        return {names.get(last := name.rpartition("/")[2], last): value for name, value in found.numbers.items()}

    def _between(self) -> None:
        self.survival.watchdog.sign_of_life()
        if self.survival.within_training and self.survival.asked_to_stop():
            raise _RolloutLeft

    def _keep(self, rollout: Rollout, told: Mapping[str, float]) -> None:
        """Write samples of the rollout, and its numbers, for people to look at."""
        if self.args.process_index:
            return
        # A full disk is no reason to stop.
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            kept = samples_of(
                rollout, self.settings.samples_per_rollout, self.processing_class.decode, self.prompts.where
            )
            lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept)
            (self.folder / f"samples-{rollout.number:06d}.jsonl").write_text(lines, encoding="utf-8")
            numbers = {"rollout": rollout.number, "step": self.state.global_step, **told}
            append(self.folder / "rollouts.jsonl", (json.dumps(numbers) + "\n").encode())

    # Updates.

    def on_step_begins(self) -> None:
        """As the base class; a learning rate that is lowered for KL that has run away."""
        super().on_step_begins()
        if self.safeguards.lr_factor != 1.0:
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate * self.safeguards.lr_factor

    def mini_batch(self) -> list[int]:
        """The responses of the step, the longest first, so that those of like length share a micro-batch."""
        step = self.state.global_step
        if self._mini[0] != step:
            assert self.rollout is not None
            sizes = [len(a) + len(b) for a, b in zip(self.rollout.prompts, self.rollout.responses, strict=True)]
            self._mini = (step, sorted(self.plan.mini_batch(step), key=lambda row: (-sizes[row], row)))
        return self._mini[1]

    def loss_of(self, model: Any, places: list[int]) -> torch.Tensor:
        """The loss of the responses at these places of the mini-batch; for a filler, zero that knows all weights."""
        device, rollout, settings = self.args.device, self.rollout, self.settings
        filler = rollout is None or places[0] < 0
        rows = [] if filler else [self.mini_batch()[place] for place in places]
        prompts = [rollout.prompts[row] for row in rows] if rollout and rows else [[self.pad]]
        responses = [rollout.responses[row] for row in rows] if rollout and rows else [[self.pad]]
        batch = batch_of(prompts, responses, self.pad, self.model.way is not None)
        batch = {name: value.to(device) for name, value in batch.items()}
        step = self.state.global_step
        ptx = None if self.ptx is None else self.ptx.batch(step, places, device)
        out = model("train", batch=batch, entropy=settings.entropy_coef > 0, ptx=ptx and ptx.inputs)
        if rollout is None or filler:
            nothing: torch.Tensor = 0.0 * (out["log_probs"].sum() + out["values"].sum())
            return nothing
        width = batch["responses"].shape[1]
        old, values, advantages, returns = (
            tensor[rows, :width].to(device)
            for tensor in (rollout.log_probs, rollout.values, rollout.advantages, rollout.returns)
        )
        mask = batch["mask"]
        tokens = sum(len(rollout.responses[row]) for row in self.mini_batch())

        def share(per_token: torch.Tensor) -> torch.Tensor:
            return torch.where(mask, per_token, 0.0).sum() / max(tokens, 1)

        policy, policy_clipped = policy_losses(out["log_probs"], old, advantages, settings.cliprange)
        value, value_clipped = value_losses(out["values"], values, returns, settings.cliprange_value)
        parts = [
            share(policy), share(value), share(out["entropy"]), share(approximate_kl(out["log_probs"], old)),
            share(policy_clipped.float()), share(value_clipped.float()), share(torch.exp(out["log_probs"] - old)),
        ]  # fmt: skip
        parts.append(ptx.loss(out["ptx_log_probs"]) if ptx is not None else torch.zeros((), device=device))
        loss = parts[0] + settings.vf_coef * parts[1] - settings.entropy_coef * parts[2] + settings.ptx_coef * parts[7]
        self.sums.values += torch.stack([part.detach() for part in parts]).double().cpu()
        # The trainer takes the mean over micro-batches and ranks of what are parts of one mean.
        scaled: torch.Tensor = loss * (self.args.world_size * self.current_gradient_accumulation_steps)
        return scaled

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As the base class; updates that have gone beyond `ppo.target_kl` are left out."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if self.settings.target_kl is not None and self.accelerator.sync_gradients and self.rollout is not None:
            moved = float(self.sums.of_step()[_SUMS.index("policy/approxkl_avg")])
            (total,) = self.survival.keeper.together.total([moved])
            self._left_out = self._left_out or total > self.settings.target_kl
            self._gate.closed = self._gate.closed or self._left_out
        return found

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._gate.closed = self._gate.closed or self._left_out
        return norm

    def _deal_with(self, event: Any) -> None:
        self._summed_steps -= 1
        super()._deal_with(event)

    def count_tokens(self, batches: list[Any]) -> tuple[int, int]:
        """As the base class: prompts and responses, of which the latter are trained."""
        assert self.rollout is not None
        rows = [self.mini_batch()[place] for batch in batches for place in batch["places"].tolist()]
        learned = sum(len(self.rollout.responses[row]) for row in rows)
        return learned + sum(len(self.rollout.prompts[row]) for row in rows), learned

    def samples_of_step(self) -> list[str]:
        """As the base class."""
        # Asked behind the step, which has moved the count on.
        rollout, step = self.rollout, self.state.global_step - 1
        rows = self.plan.mini_batch(step) if rollout is not None else []
        return [self.prompts.where(rollout.rows[row]) for row in rows] if rollout else []

    # What is logged and kept.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the steps and of the rollouts since the last record, and where the time went."""
        if "loss" in logs:
            together = self.survival.keeper.together
            sums = self.sums.take(lambda own: torch.tensor(together.total(own.tolist()), dtype=torch.float64))
            logs |= {name: value / max(self._summed_steps, 1) for name, value in zip(_SUMS, sums, strict=True)}
            if self.ptx is None:
                del logs["loss/ptx_avg"]
            # A rollout made behind this step is one of the next steps, as it is where a run stops in between.
            told = [numbers for step, numbers in self._told if step < self.state.global_step]
            for name in told[0] if told else ():
                logs[name] = sum(one[name] for one in told) / len(told)
            logs |= {**self._clock, "alarms": self.safeguards.alarms}
            self._summed_steps, self._told = 0, self._told[len(told) :]
            self._clock = dict.fromkeys(self._clock, 0.0)
        super().log(logs, start_time)

    def documents(self) -> dict[str, str]:
        """The rollout that is being trained on."""
        return {} if self.rollout is None else {ROLLOUT: to_document(self.rollout)}

    def loop_state(self) -> dict[str, Any]:
        """As the base class; what rollouts hand on, and what is not logged yet."""
        return {
            **super().loop_state(),
            "kl_coef": self.kl.coefficient,
            "moments": vars(self.moments),
            "safeguards": self.safeguards.state(),
            "summed_steps": self._summed_steps,
            "told": self._told,
            "left_out": self._left_out,
        }

    def load_loop_state(self, own: Mapping[str, Any], every: list[Mapping[str, Any]]) -> None:
        """As the base class."""
        super().load_loop_state(own, every)
        self.kl.coefficient = own["kl_coef"]
        self.moments = Moments(**own["moments"])
        self.safeguards.load_state(own["safeguards"])
        self._summed_steps, self._told = own["summed_steps"], [(step, numbers) for step, numbers in own["told"]]
        self._left_out = own["left_out"]
        assert self._held is not None
        file = self._held.path / ROLLOUT
        self.rollout = from_document(file.read_text(encoding="utf-8")) if file.exists() else None


def _collate(places: list[int]) -> dict[str, torch.Tensor]:
    return {"places": torch.tensor(places)}
