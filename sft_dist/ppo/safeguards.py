"""What watches over a PPO run: KL that runs away, and rewards that rise while the responses go to ruin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_dist.config_stages import PPOSection
from sft_dist.errors import UserError

_WATCHED = ("objective/scores", "objective/kl", "completions/mean_length", "completions/repetition")


class Safeguards:
    """Judges each rollout by its statistics (see `sft_dist.ppo.rollout.statistics_of`), alike on all ranks."""

    def __init__(self, settings: PPOSection) -> None:
        self.settings = settings
        self.lr_factor = 1.0
        self._history: list[dict[str, float]] = []
        self._sounding: set[str] = set()

    def judge(self, number: int, told: Mapping[str, float]) -> list[str]:
        """Lines to people about a rollout. Raises :class:`UserError` where the run has to end."""
        self._history.append({name: told[name] for name in _WATCHED})
        lines = self._kl(number, told["objective/kl"])
        alarms = self._alarms()
        lines += [f"rollout {number}: alarm: {why}" for name, why in alarms.items() if name not in self._sounding]
        self._sounding = set(alarms)
        return lines

    @property
    def alarms(self) -> int:
        """How many alarms sound."""
        return len(self._sounding)

    def _kl(self, number: int, kl: float) -> list[str]:
        """The learning rate is halved in each rollout that has run away, and doubled back in each that has not."""
        limit = self.settings.max_kl
        if limit is None:
            return []
        if kl <= limit:
            self.lr_factor = min(1.0, self.lr_factor * 2)
            return []
        if self.settings.on_max_kl == "stop":
            raise UserError(
                f"ppo.max_kl: rollout {number}: the KL to the reference is {kl:.3g} nats, above {limit:g}; raise "
                "ppo.kl_coef or lower train.learning_rate, or set ppo.on_max_kl=lower_lr, and resume"
            )
        self.lr_factor /= 2
        return [f"rollout {number}: KL {kl:.3g} nats, above {limit:g}: the learning rate times {self.lr_factor:g}"]

    def _alarms(self) -> dict[str, str]:
        """What the responses have come to while the reward rose from the first window to the last one."""
        window = self.settings.alarm_window
        if len(self._history) < 2 * window:
            return {}
        first, last = (
            {name: sum(one[name] for one in part) / window for name in _WATCHED}
            for part in (self._history[:window], self._history[-window:])
        )
        if last["objective/scores"] <= first["objective/scores"]:
            return {}
        rose = f"the reward rose from {first['objective/scores']:.3g} to {last['objective/scores']:.3g} while "
        found = {}
        factor, long, short = (
            self.settings.alarm_length_factor,
            last["completions/mean_length"],
            first["completions/mean_length"],
        )
        if long > short * factor or long < short / factor:
            found["length"] = f"{rose}responses went from {short:.0f} to {long:.0f} tokens"
        if last["completions/repetition"] > self.settings.alarm_repetition:
            found["repetition"] = f"{rose}{last['completions/repetition']:.0%} of 4-grams came to be repeated ones"
        bound = self.settings.max_kl or (self.settings.kl_target and 2 * self.settings.kl_target)
        if bound and last["objective/kl"] > bound:
            found["kl"] = f"{rose}KL came to {last['objective/kl']:.3g} nats, above {bound:g}"
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        window = self.settings.alarm_window
        # The windows between the first and the last are not looked at again.
        kept = self._history if len(self._history) <= 2 * window else self._history[:window] + self._history[-window:]
        return {"lr_factor": self.lr_factor, "history": kept, "sounding": sorted(self._sounding)}

    def load_state(self, held: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.lr_factor, self._history = held["lr_factor"], list(held["history"])
        self._sounding = set(held["sounding"])
