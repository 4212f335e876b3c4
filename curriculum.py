"""The curriculum of SPEC section 3: epoch -> stage -> how many steps go and how many latents come.

Plain integers only. Which tokens a stage's example holds is dataset.py's business; drawing random
stages (`uniform_prob`) is too, because it needs a generator.
Source: Coconut, arXiv 2412.06769, section 3 (multi-stage training).
"""

from dataclasses import dataclass

METHODS_WITHOUT_STAGES = ("cot", "no_cot")


@dataclass(frozen=True)
class Curriculum:
    """The schedule of one run.

    method: "coconut", "cot", "no_cot" or "no_thoughts".
    c_thought: latent positions per latent step.
    enabled: False is the paper's "w/o curriculum": every epoch is the last stage.
    """

    method: str
    c_thought: int
    epochs_per_stage: int
    max_latent_stage: int
    pad_latent_to_max: bool
    enabled: bool = True

    @property
    def last_stage(self) -> int:
        """The stage past `max_latent_stage`, in which no reasoning text is left."""
        return 0 if self.method in METHODS_WITHOUT_STAGES else self.max_latent_stage + 1

    def stage(self, epoch: int) -> int:
        """The stage that acts in `epoch` (counted from 0)."""
        if not self.enabled:
            return self.last_stage
        return min(epoch // self.epochs_per_stage, self.last_stage)

    def plan(self, stage: int, num_steps: int) -> tuple[int, int]:
        """(dropped steps, latent positions) of a record of `num_steps` steps at `stage`."""
        if self.method == "cot":
            return 0, 0
        if self.method == "no_cot":
            return num_steps, 0
        dropped = num_steps if stage > self.max_latent_stage else min(stage, num_steps)
        if self.method == "no_thoughts":
            return dropped, 0
        latent_steps = min(stage, self.max_latent_stage)
        if not self.pad_latent_to_max:
            latent_steps = min(latent_steps, num_steps)
        return dropped, latent_steps * self.c_thought
