"""The parts of the recipe that belong to one stage each: reward model, DPO and PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sft_dist.config_base import NAMED, Location, Name, Section, SourceName

Share = Annotated[float, Field(ge=0, le=1)]
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
LossTypes = Annotated[
    list[LossType],
    Field(min_length=1),
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=list[LossType] | LossType
    ),
]


class RewardSection(Section):
    """The reward model (`stage: reward`), under the names of TRL's `RewardConfig`."""

    center_rewards_coefficient: NonNegativeFloat | None = None
    """Weight of the squared sum of a pair's rewards, which keeps them around zero (Eisenstein et al. 2023); 0.01 is
    usual. Unset: rewards have no zero of their own."""
    disable_dropout: bool = True
    """Train without dropout, that of an adapter included."""


class DPOSection(Section):
    """Direct preference optimisation (`stage: dpo`), under the names of TRL's `DPOConfig`."""

    beta: PositiveFloat = 0.1
    """How closely the model is held to the reference: higher is closer. For `ipo` it is the paper's tau."""
    loss_type: LossTypes = Field(default=["sigmoid"])
    """The loss, or several that are summed (see docs/dpo.md for the formulas)."""
    loss_weights: Annotated[list[float], Field(min_length=1)] | None = None
    """The weight of each of several losses; unset: 1 each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the labels that are taken to be wrong, for `robust`, `exo_pair`, `aot` and `aot_unpaired`."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference that the losses of reward differences are derived from (f-DPO)."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of `alpha_divergence`."""
    ld_alpha: Share | None = None
    """Weight of the tokens beyond the length of the shorter side (LD-DPO); unset: 1, as in DPO."""
    use_weighting: bool = False
    """Weight each pair by how likely the policy is to write it (WPO)."""
    discopop_tau: PositiveFloat = 0.05
    """Temperature of `discopop`."""
    disable_dropout: bool = True
    """Train without dropout, that of the adapter among it; what policy and reference say is then no draw."""
    ref_model: Location | None = None
    """Reference model, of the policy's architecture and tokenizer; unset: the policy as it begins. With
    `peft.use_peft` it is the model with its adapter off."""
    ref_model_revision: Name = "main"
    """Branch, tag or commit of a hub reference."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities once, beforehand, and keep them in the cache: no reference takes memory
    while training."""
    precompute_ref_batch_size: PositiveInt | None = None
    """Pairs per process that are given to the reference at once; unset: `train.per_device_train_batch_size`."""


class RewardSource(Section):
    """One of several rewards: a model or a function, and its weight in the sum."""

    model: Location | None = None
    """A sequence-classification model with one label: a folder, such as a reward run's `model`, or a hub id."""
    function: Name | None = None
    """`package.module:function`, which takes lists `prompts` and `completions` and gives a number for each."""
    weight: float = 1.0
    """What the reward is multiplied by."""


class PPOSection(Section):
    """Proximal policy optimisation (`stage: ppo`), under the names that TRL's `PPOConfig` had."""

    reward: Name | None = None
    """A reward model (folder or hub id), or a function as `package.module:function`; several: `ppo.rewards`."""
    rewards: Annotated[dict[SourceName, RewardSource], NAMED] | None = None
    """Several rewards, each under a name of yours, summed by their weights."""
    retokenize: bool = False
    """Give a reward model of another tokenizer the text anew; off: such a model is refused."""
    value_model: Literal["separate", "shared"] = "separate"
    """A value model of its own, begun from the reward model, or a head on the policy."""
    value_model_name_or_path: Location | None = None
    """What the value model begins from; unset: the first reward model, or else the policy."""
    rollout_batch_size: PositiveInt | None = None
    """Prompts of a rollout over all processes; unset: `ppo.num_mini_batches` global batches."""
    num_mini_batches: PositiveInt | None = None
    """Optimizer steps that a rollout is dealt out to, in each of its epochs; unset: 1, or what
    `ppo.rollout_batch_size` comes to."""
    num_ppo_epochs: PositiveInt = 4
    """Passes over a rollout."""
    rollout_micro_batch_size: PositiveInt | None = None
    """Prompts per process that are answered at once; unset: `train.per_device_eval_batch_size`."""
    response_length: PositiveInt = 128
    """Longest response in tokens."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; the policy that is trained is that of the temperature. 0 is greedy, for tests."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL penalty against the reference, the first one where it is adaptive."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the penalty per token (Schulman 2020): log-ratio, half its square, or the unbiased positive one."""
    kl_target: PositiveFloat | None = None
    """KL in nats per response that the penalty is steered to (Ziegler et al. 2019); unset: it stays fixed."""
    kl_horizon: PositiveInt = 10000
    """Episodes in which the adaptive penalty can change by a factor of e at most by a fifth."""
    gamma: Share = 1.0
    """Discount."""
    lam: Share = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: PositiveFloat = 0.2
    """Clipping range of the policy's probability ratio."""
    cliprange_value: PositiveFloat | None = 0.2
    """Clipping range of values around those of the rollout; unset: values are not clipped."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a rollout to variance one."""
    whiten_advantages: bool = True
    """Scale the advantages of a rollout to mean zero and variance one."""
    reward_norm: bool = False
    """Scale the rewards of responses by the mean and deviation of all so far."""
    reward_clip: PositiveFloat | None = None
    """Largest absolute reward of a response, after `ppo.reward_norm`."""
    missing_eos_penalty: NonNegativeFloat | None = None
    """Taken off the reward of a response that does not end within `ppo.response_length`."""
    length_target: PositiveInt | None = None
    """Tokens of a response beyond which `ppo.length_penalty` is taken off for each."""
    length_penalty: NonNegativeFloat = 0.0
    """Reward taken off for each token beyond `ppo.length_target`."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the loss on the records of `ppo.ptx_dataset_name` (PPO-ptx, Ouyang et al. 2022)."""
    ptx_dataset_name: Location | None = None
    """Records that are trained on as in SFT beside the rollouts: a name, folder or file as `data.dataset_name`."""
    ptx_dataset_train_split: Name = "train"
    """Split of them."""
    max_kl: PositiveFloat | None = None
    """KL in nats per response beyond which it has run away."""
    on_max_kl: Literal["stop", "lower_lr"] = "stop"
    """What is done then: stop with the last checkpoint, or halve the learning rate for as long as it lasts."""
    target_kl: PositiveFloat | None = None
    """KL to the rollout's own policy, in nats per token, beyond which the rest of its updates are left out."""
    alarm_window: Annotated[int, Field(ge=2)] = 10
    """Rollouts over which reward, length, repetition and KL are compared for the reward-hacking alarms."""
    alarm_length_factor: Annotated[float, Field(gt=1)] = 2.0
    """Alarm where the mean length leaves the first window's by this factor while the reward rises."""
    alarm_repetition: Share = 0.5
    """Alarm where this share of a response's 4-grams are repeated ones, on average, while the reward rises."""
    samples_per_rollout: NonNegativeInt = 8
    """Responses of each rollout that are kept with their rewards in `rollouts/`."""
    generator: Literal["transformers", "vllm"] = "transformers"
    """What generates the responses; vllm needs a GPU and to be installed."""
