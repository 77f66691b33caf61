"""Proximal policy optimisation (`stage: ppo`): prompts, and rewards for the responses that the model gives to them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from sft_dist.attention import Way, text_config
from sft_dist.checkpoints.keeper import Held
from sft_dist.data.account import summary_lines
from sft_dist.data.prompts import prepare_prompts, room_for_prompts
from sft_dist.data.rows import Prepared, rows_of
from sft_dist.data.template import stop_token_ids
from sft_dist.errors import UserError
from sft_dist.metrics_file import rewind_metrics
from sft_dist.packing_choice import packed_way
from sft_dist.ppo.loading import load_actors
from sft_dist.ppo.names import reward_names
from sft_dist.ppo.plan import Plan, plan_of
from sft_dist.ppo.ptx import Ptx
from sft_dist.ppo.report import write_report
from sft_dist.ppo.rewards import functions_of, model_rewards, refuse_other_value
from sft_dist.ppo.roller import Prompts, Reward, Roller
from sft_dist.saving import save_model
from sft_dist.stages import Setting
from sft_dist.trainers.arguments import training_arguments
from sft_dist.trainers.ordered import digest_of_rows
from sft_dist.trainers.ppo import Measured, PPOTrainer

if TYPE_CHECKING:
    from sft_dist.ppo.vllm import VLLM


class PPOStage:
    """See :class:`sft_dist.stages.Stage`."""

    trainer: PPOTrainer
    plan: Plan

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.functions = functions_of(setting.recipe.ppo)
        self.models = model_rewards(setting.recipe, setting.tokenizer, setting.path)
        refuse_other_value(setting.recipe, setting.tokenizer)

    def prepare_data(self) -> list[str]:
        """The prompts that are trained on and those held out."""
        s = self.setting
        self.train, self.held_out = prepare_prompts(s.recipe, s.template, room_for_prompts(s.recipe, s.limit))
        self.ptx = self._ptx_rows()
        parts = [("train", self.train.account)]
        parts += [("held out", self.held_out.account)] if self.held_out else []
        parts += [("ptx", self.ptx.account)] if self.ptx else []
        return [line for name, account in parts for line in summary_lines(name, account)]

    def make_trainer(self) -> None:
        """The trainer around policy, value, reference and reward models."""
        s = self.setting
        hidden = s.config.get_text_config().hidden_size
        args = training_arguments(TrainingArguments, s.recipe, s.run, s.world, s.bf16, s.bar, s.backend, hidden)
        actors = load_actors(s, self.models)
        self.trainer = PPOTrainer(actors, args, s.recipe.ppo, s.tokenizer, s.backend, s.run.rollouts)

    def arrange(self, held: Held | None, ending: ExitStack) -> None:
        """How prompts are dealt out to rollouts, and these to steps."""
        s, trainer, settings = self.setting, self.trainer, self.setting.recipe.ppo
        self.plan = plan = plan_of(s.recipe, len(self.train.rows), trainer.rows_per_step)
        if s.world.is_main:
            rewind_metrics(s.run.rollouts / "rollouts.jsonl", held.manifest.step if held else -1)
        every: list[Reward] = [*self.functions, *self.models]
        by_name = {reward.name.name: reward for reward in every}
        rewards = [by_name[name.name] for name in reward_names(settings)]
        stops = stop_token_ids(s.template)
        roller = partial(Roller, trainer, settings, s.tokenizer, stops, rewards, plan.seed, vllm=self._vllm())
        ptx = Ptx(self.ptx.rows, plan.rows, plan.seed, trainer.pad) if self.ptx else None
        digest = digest_of_rows(self.train.rows, plan.rollout, plan.mini_batches, plan.epochs)
        held_out = Prompts(self.held_out.rows) if self.held_out else None
        trainer.arrange(plan, Prompts(self.train.rows), held_out, roller, digest, ptx)
        trainer.model.policy.generation_config.eos_token_id = stops
        trainer.model.way = self._way()
        s.say(plan_line(plan))

    def measure(self, when: str) -> Measured | None:
        """Rewards, KL and lengths of the responses to the held-out prompts."""
        if self.held_out is None:
            return None
        self.setting.say(f"measuring {when} training: {len(self.held_out.rows)} held-out prompts to answer")
        return self.trainer.measured(self.setting.recipe.eval.num_prompts)

    def save(self) -> None:
        """The policy, or its adapter."""
        save_model(self.trainer.model.policy, self.setting)

    def report(self, after: Measured | None, seconds: float) -> None:
        """Summary, curves and samples."""
        write_report(self.setting, self.trainer, self.train.account, after, seconds)

    def _way(self) -> Way | None:
        """How packed rows are fed. It is proven on the policy, so the value has to be a model of the same kind."""
        s, actors = self.setting, self.trainer.model
        wanted = s.recipe.data.packing
        if wanted and actors.value is not None and not same_kind(actors.policy, actors.value):
            fault = f"the value model ({type(actors.value).__name__}) is of another architecture than the policy"
            if wanted == "required":
                raise UserError(f"data.packing: {fault}, and packing is required; set data.packing=false")
            s.say(f"rows stay unpacked: {fault}")
            return None
        return packed_way(actors.policy, wanted, s.bf16, s.say, s.backend.shards_weights)

    def _vllm(self) -> VLLM | None:
        s = self.setting
        if s.recipe.ppo.generator != "vllm":
            return None
        from sft_dist.ppo.vllm import VLLM

        return VLLM(self.trainer.model.policy, self.trainer.accelerator, s.tokenizer, s.limit)

    def _ptx_rows(self) -> Prepared | None:
        s, settings = self.setting, self.setting.recipe.ppo
        if settings.ptx_dataset_name is None:
            return None
        data = s.recipe.data.model_copy(
            update={"dataset_name": settings.ptx_dataset_name, "mixture": None, "format": "auto", "formatting": None}
        )
        split = settings.ptx_dataset_train_split
        return rows_of(data, s.template, s.limit, split, "ppo.ptx_dataset_name")


def same_kind(one: Any, other: Any) -> bool:
    """Whether two models have the same layers and attention, of whatever size."""
    configs = [text_config(model.config) for model in (one, other)]
    return len({(config.model_type, config._attn_implementation) for config in configs}) == 1


def plan_line(plan: Plan) -> str:
    """What the rollouts will be, in a line for people."""
    return (
        f"rollouts: {plan.rollouts} of {plan.rollout} prompts, {plan.epochs} epochs over each in {plan.mini_batches} "
        f"mini-batches of {plan.rows}: {plan.steps} steps over {plan.prompts:,} prompts"
    )
