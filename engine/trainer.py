"""The training run: the step over an effective batch, the epochs, and resuming.

An effective batch is the unit of everything: its loss is the mean over its labelled tokens on all
ranks and accumulation steps (docs/specification.md, section 7), and at its end a run may be saved,
stopped and resumed. Evaluation, files and console output are left to their modules.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import numpy as np
import torch

from coconut import Coconut
from dataset import (
    Collator,
    Curriculum,
    SpecialIds,
    StagedRecords,
    TokenizedRecords,
    draw_stages,
    effective_batches,
    micro_batches,
)
from engine import checkpoint, distributed, parallel, run_dir
from engine.config import Config
from engine.console import epoch_line, progress_bar
from engine.evaluation import Evaluation, autocast, evaluate, write_predictions
from engine.loader import batch_loader
from engine.metadata import ORIGIN_FIELDS, Metadata, Position, trajectory
from engine.signals import listen_for_signals
from engine.tracking import Tracker
from utils import RunFailed, Stopped, UserError, atomic_write_text, log

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) out of `total_steps`.

    Rises linearly over `warmup_steps`; then stays, or falls to 0 along half a cosine.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def parameter_groups(model: Coconut, weight_decay: float) -> list[dict]:
    """AdamW's groups: the base model, which decays, and what Coconut adds to it, which does not."""
    groups = [{"params": list(model.base_causallm.parameters()), "weight_decay": weight_decay}]
    extra = list(model.extra_parameters().values())
    return groups + ([{"params": extra, "weight_decay": 0.0}] if extra else [])


class Trainer:
    """One training run on this rank.

    model: the Coconut module on its device, wrapped by parallel.parallelize.
    metadata: the content of a checkpoint's coconut.json, except for stage and epoch.
    state: the training state to resume from, or None.
    """

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        tokenizer,
        train_records: TokenizedRecords,
        val_records: TokenizedRecords,
        curriculum: Curriculum,
        metadata: Metadata,
        tracker: Tracker,
        state: checkpoint.TrainingState | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.ids = SpecialIds.of(tokenizer)
        self.train_records = train_records
        self.val_records = val_records
        self.curriculum = curriculum
        self.metadata = metadata
        self.tracker = tracker
        self.device = distributed.device()
        self.effective_batch_size = config.records_per_step(distributed.world_size())
        self.steps_per_epoch = -(-len(train_records) // self.effective_batch_size)
        self.total_steps = (config.num_epochs - config.resume) * self.steps_per_epoch
        self.model = model
        self.optimizer = torch.optim.AdamW(
            parameter_groups(parallel.unwrap(model), config.weight_decay),
            lr=config.lr,
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            fused=True,
        )
        self.position = Position(epoch=config.resume)
        self.figures = {}  # of the last evaluation
        self.last_saved_s = time.monotonic()
        token = torch.tensor([[self.ids.eos]], device=self.device)
        parallel.arrange_buckets(model, token, torch.ones_like(token))
        if state is not None:
            self._resume_from(state)

    def run(self) -> None:
        """Train and evaluate every remaining epoch.

        Raises: RunFailed for a loss or gradient that is not finite; Stopped after a signal.
        """
        if self.position.epoch >= self.config.num_epochs:
            log.info(f"all {self.config.num_epochs} epochs are done: nothing to train")
        try:
            with listen_for_signals() as self.requests:
                while self.position.epoch < self.config.num_epochs:
                    self._run_epoch(self.position.epoch)
        except Exception as error:
            done = self.position
            error.add_note(f"after optimizer step {done.optimizer_step} (epoch {done.epoch})")
            raise

    def _run_epoch(self, epoch: int) -> None:
        stage = self.curriculum.stage(epoch)
        if self.position.steps_done == 0:
            self._reset_optimizer_if_due(epoch)
        if self.position.steps_done < self.steps_per_epoch:
            self._train_epoch(epoch, stage)
            self._save_state()
        began = time.perf_counter()
        outcome = self._evaluate(stage, self._stop_evaluation_if_asked)
        self.figures = outcome.figures
        seconds = time.perf_counter() - began
        is_best = self.position.finish_evaluation(stage, outcome.figures["acc"], seconds)
        self._store(epoch, stage, outcome, is_best, seconds)
        train_loss = self.position.loss_sum / self.position.steps_done
        log.info(epoch_line(epoch, train_loss, outcome.figures, self.position.seconds, seconds))
        self.position.start_epoch()
        if not self.config.debug and distributed.is_main():
            checkpoint.update_trainer(
                self.config.run_dir, self.position.optimizer_step, self.state_dict()
            )
        (stop,) = distributed.sum_over_ranks([float(self.requests.stop > 0)])
        if stop and self.position.epoch < self.config.num_epochs:
            self._stop()

    def _train_epoch(self, epoch: int, stage: int) -> None:
        """All optimizer steps of the epoch that are not done yet."""
        records, config = self.train_records, self.config
        stages = draw_stages(
            self.curriculum, records.num_steps, epoch, config.uniform_prob, config.seed
        )
        staged = StagedRecords.of(records, self.curriculum, stages)
        effective = effective_batches(len(records), self.effective_batch_size, config.seed, epoch)
        steps = [
            (indices, self._micro_batches(indices, staged))
            for indices in effective[self.position.steps_done :]
        ]
        loader = self._batches_of_this_rank(staged, effective, steps)
        if self.position.optimizer_step == 0 and distributed.is_main():
            self._log_examples(Collator(staged, self.ids), effective[0])
        bar = progress_bar(
            len(effective), f"epoch {epoch} stage {stage}", initial=self.position.steps_done
        )
        self.model.train()
        for indices, shares_of_ranks in steps:
            began = time.perf_counter()
            num_labels = int(staged.num_labels[indices].sum())
            num_tokens = int(staged.prompt_lengths[indices].sum()) + num_labels
            num_passes = [self._num_passes(staged, shares) for shares in shares_of_ranks]
            batches = [next(loader) for _ in shares_of_ranks]
            try:
                loss, norm = self.train_step(batches, num_labels, num_passes)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(batches) from error
            seconds = time.perf_counter() - began
            self.position.finish_step(loss, seconds)
            bar.set_postfix_str(f"loss {loss:.4f}, {num_tokens / seconds:.0f} tok/s")
            bar.update()
            self._after_step(epoch, stage, loss, norm, num_tokens / seconds)
        bar.close()

    def _batches_of_this_rank(
        self, staged: StagedRecords, effective: list[np.ndarray], steps: list[tuple]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's micro-batches of all `steps`, in order."""
        # Sharded ranks need a column for every pass that the longest chain of thoughts takes.
        min_width = self._num_passes(staged, effective) or 1
        own = [shares[distributed.rank()] for _, parts in steps for shares in parts]
        return iter(
            batch_loader(
                Collator(staged, self.ids, min_width=min_width),
                own,
                self.config.num_workers,
                self.device.type == "cuda",
            )
        )

    def _micro_batches(self, indices: np.ndarray, staged: StagedRecords) -> list[list[np.ndarray]]:
        """The shares of all ranks in each micro-batch of the effective batch `indices`."""
        return micro_batches(
            indices,
            staged,
            self.config.batch_size_training,
            distributed.world_size(),
            self.config.tokens_per_micro_batch,
        )

    def _num_passes(self, staged: StagedRecords, shares: list[np.ndarray]) -> int | None:
        """How many passes every rank takes over a micro-batch; None where ranks need not agree.

        shares: the records of each rank.
        """
        if not parallel.is_sharded(self.model):
            return None
        reads_in_passes = parallel.unwrap(self.model).reads_in_passes
        return 1 + reads_in_passes * int(staged.num_latents[np.concatenate(shares)].max())

    def train_step(
        self, batches: list[dict], num_labels: int, num_passes: list[int | None]
    ) -> tuple[float, float]:
        """One optimizer step over this rank's micro-batches: (loss, gradient norm), global.

        num_labels: labelled tokens in the effective batch, on all ranks and micro-batches; the
            gradient is that of their mean cross-entropy, however the batch is split.
        num_passes: for each micro-batch, from `_num_passes`.

        Raises: RunFailed before the step where loss or gradient norm is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.position.optimizer_step, self.total_steps)
        loss = torch.zeros((), device=self.device)  # this rank's share of it
        for number, (batch, passes) in enumerate(zip(batches, num_passes, strict=True), start=1):
            with parallel.gradient_sync(self.model, enabled=number == len(batches)):
                share = self._loss_share(batch, num_labels, passes)
                # Both DDP and FSDP average over ranks, but the sum is needed.
                (share * distributed.world_size()).backward()
            loss += share.detach()
        norm = parallel.gradient_norm(self.model)
        (total_loss,) = distributed.sum_over_ranks([loss.item()])
        if not (math.isfinite(total_loss) and math.isfinite(norm.item())):
            self._fail_non_finite(batches, total_loss, norm.item())
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.config.max_grad_norm, norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total_loss, norm.item()

    def _loss_share(self, batch: dict, num_labels: int, num_passes: int | None) -> torch.Tensor:
        """() what a micro-batch adds to the mean loss over the effective batch's `num_labels`."""
        # Made on the CPU, so that within a step the host never waits for the device.
        layout = parallel.unwrap(self.model).layout(
            batch["input_ids"], batch["attention_mask"], batch["labels"], num_passes
        )
        batch = {key: t.to(self.device, non_blocking=True) for key, t in batch.items()}
        with autocast(self.config.bf16, self.device):
            output = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=batch["labels"],
                position_ids=batch["position_ids"],
                layout=layout,
            )
        return output.loss * (len(output.logits) / num_labels)

    def _after_step(
        self, epoch: int, stage: int, loss: float, norm: float, tokens_per_second: float
    ) -> None:
        """Log the step; evaluate, save or stop where that is due."""
        self.tracker.log(
            {
                "train/epoch": epoch,
                "train/epochs_done": epoch + self.position.steps_done / self.steps_per_epoch,
                "train/step": self.position.optimizer_step,
                "train/loss": loss,
                "train/stage": stage,
                "train/lr": self.optimizer.param_groups[0]["lr"],
                "train/grad_norm": norm,
                "train/tokens_per_second": tokens_per_second,
            },
            step=self.position.optimizer_step,
        )
        if self.position.steps_done == self.steps_per_epoch:
            return  # the end of the epoch evaluates, saves and stops
        if self._step_evaluation_is_due():
            self._evaluate_within_epoch(epoch, stage)
        stop, save = distributed.sum_over_ranks(
            [float(self.requests.stop > 0), float(self._save_is_due())]
        )
        if stop or save:
            self._save_state()
        if stop:
            self._stop()

    def _step_evaluation_is_due(self) -> bool:
        """Whether eval_every_steps asks for an evaluation after this step."""
        every = self.config.eval_every_steps
        return every is not None and self.position.optimizer_step % every == 0

    def _evaluate_within_epoch(self, epoch: int, stage: int) -> None:
        """Make the evaluation of eval_every_steps and log it; nothing else of the run changes."""
        began = time.perf_counter()
        figures = self._evaluate(stage, lambda: None).figures
        self.position.eval_seconds += time.perf_counter() - began
        self.tracker.log(_step_figures(figures, epoch), step=self.position.optimizer_step)

    def _save_is_due(self) -> bool:
        """Whether rank 0's clock or a SIGUSR1 asks for a save after this step."""
        minutes = self.config.save_every_minutes
        elapsed_s = time.monotonic() - self.last_saved_s
        on_time = minutes is not None and distributed.is_main() and elapsed_s > 60 * minutes
        return on_time or self.requests.save

    def _stop(self) -> None:
        if self.config.debug:
            raise Stopped("stopped; debug: true saves nothing")
        raise Stopped(
            f"stopped after optimizer step {self.position.optimizer_step}, state saved; the same"
            " command continues from here"
        )

    def _reset_optimizer_if_due(self, epoch: int) -> None:
        """Drop AdamW's moments where reset_optimizer says so; the learning rate is unaffected."""
        if epoch == self.config.resume:
            return
        changed = self.curriculum.stage(epoch) != self.curriculum.stage(epoch - 1)
        reset = self.config.reset_optimizer
        if reset == "epoch" or (reset == "stage" and changed):
            self.optimizer.state.clear()

    def _evaluate(self, stage: int, before_batch: Callable[[], None]) -> Evaluation:
        return evaluate(
            parallel.unwrap(self.model),
            self.tokenizer,
            self.val_records,
            self.curriculum,
            stage,
            batch_size=self.config.batch_size_eval or self.config.batch_size_training,
            max_new_tokens=self.config.max_new_tokens,
            bf16=self.config.bf16,
            num_workers=self.config.num_workers,
            progress_bar=progress_bar,
            before_batch=before_batch,
        )

    def _stop_evaluation_if_asked(self) -> None:
        """Stop if a signal asked for it; the state is saved, and the next start evaluates again.

        Several ranks finish the evaluation: one that stopped alone would leave the others waiting.
        """
        if self.requests.stop and distributed.world_size() == 1:
            self._stop()

    def _store(
        self, epoch: int, stage: int, outcome: Evaluation, is_best: bool, seconds: float
    ) -> None:
        """Predictions, checkpoint and figures of a finished epoch.

        seconds: what its evaluation took.
        """
        config = self.config
        window_weights = self._window_weights()
        if not config.debug:
            if outcome.predictions is not None:
                path = config.run_dir / f"predictions_{epoch}.jsonl"
                with run_dir.writing(config.run_dir, path.name):
                    write_predictions(path, outcome.predictions)
            if is_best or not config.save_only_improve:
                checkpoint.save_checkpoint(
                    config.run_dir / f"checkpoint_{epoch + 1}",
                    self.model,
                    self.tokenizer,
                    self.metadata.at(stage, epoch, window_weights).model_dump(),
                )
                if config.keep_checkpoints is not None and distributed.is_main():
                    run_dir.prune_checkpoints(
                        config.run_dir,
                        epoch + 1,
                        config.keep_checkpoints,
                    )
        figures = {f"eval/{name}": value for name, value in outcome.figures.items()}
        if self._step_evaluation_is_due():
            figures |= _step_figures(outcome.figures, epoch)
        if window_weights is not None:
            figures["train/window_weights"] = window_weights
        figures |= {
            "eval/epoch": epoch,
            "eval/best_acc": self.position.best_accuracy,
            "eval/seconds": seconds,
            "train/seconds": self.position.seconds,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.tracker.log(figures, step=self.position.optimizer_step)

    def _window_weights(self) -> list[float] | None:
        """The learned weights of the window as they are now; None where they are fixed."""
        if self.config.latent_weights != "learned":
            return None
        coconut = parallel.unwrap(self.model)
        with parallel.gathered_parameters(coconut):
            return coconut.window_weights

    def _log_examples(self, collator: Collator, indices: np.ndarray) -> None:
        """Log the first examples as the model sees them."""
        rows = [
            [int(index), self.tokenizer.decode(collator[np.array([index])]["input_ids"][0])]
            for index in indices[:4]
        ]
        self.tracker.table("data_table", ["record", "text"], rows)

    def state_dict(self) -> dict:
        """What a training state stores of this run besides tensors, as StoredTrainer reads it."""
        return {
            "position": self.position.state_dict(),
            "metadata": self.metadata.model_dump(),
            "trajectory": trajectory(
                self.config,
                distributed.world_size(),
                self.train_records.sha256,
                self.val_records.sha256,
            ),
            "first_epoch": self.config.resume,
            "origin": {name: getattr(self.config, name) for name in ORIGIN_FIELDS},
            "wandb_id": self.tracker.wandb_id,
        }

    def _save_state(self) -> None:
        self.last_saved_s = time.monotonic()
        self.requests.save = False
        if self.config.debug:
            return
        checkpoint.save_state(
            self.config.run_dir,
            self.position.optimizer_step,
            self.model,
            self.optimizer,
            self.tokenizer,
            self.state_dict(),
        )

    def _resume_from(self, state: checkpoint.TrainingState) -> None:
        """Continue from `state` as if the run had never stopped.

        Raises: UserError when its tensors are not this run's.
        """
        self.position = Position(**state.trainer["position"])
        try:
            is_complete = checkpoint.load_state(state, self.model, self.optimizer)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Both are RuntimeErrors, but no fault of the state.
            if isinstance(error, torch.OutOfMemoryError) or distributed.is_lost_contact(error):
                raise
            raise UserError(
                f"{state.folder}: its tensors or generators are not this run's ({error!r}); remove"
                " it to resume from an earlier state"
            ) from error
        if not is_complete:
            log.info("more processes than before: the new ones start with fresh random generators")
        with run_dir.writing(self.config.run_dir, "metrics.jsonl"):
            self.tracker.truncate(self.position.optimizer_step, self.position.epoch)

    def _out_of_memory(self, batches: list[dict]) -> RunFailed:
        """The error for a step over these micro-batches that does not fit the device."""
        tokens = max(batch["input_ids"].numel() for batch in batches)
        return RunFailed(
            f"out of memory at optimizer step {self.position.optimizer_step}; write"
            f" tokens_per_micro_batch: {tokens // 2} or a smaller batch_size_training (with"
            " effective_batch_size the gradient stays the same), or parallel: fsdp for several GPUs"
        )

    def _fail_non_finite(self, batches: list[dict], loss: float, norm: float) -> None:
        """Save this rank's part of the batch for inspection; end the run before the step."""
        step = self.position.optimizer_step
        where = "nothing saved (debug: true)"
        if not self.config.debug:
            name = f"nonfinite_step{step}_rank{distributed.rank()}.json"
            path = self.config.run_dir / name
            content = [{key: t.tolist() for key, t in batch.items()} for batch in batches]
            try:
                atomic_write_text(path, json.dumps(content))
                where = f"the batch is in {path}"
            except OSError as error:
                where = f"the batch could not be written ({error.strerror or error})"
        raise RunFailed(
            f"loss {loss} or gradient norm {norm} is not finite at optimizer step {step}"
            f" (epoch {self.position.epoch}); the weights were not changed, {where}"
        )


def _step_figures(figures: dict, epoch: int) -> dict:
    """The figures of an evaluation that eval_every_steps logs."""
    names = ("acc", "acc_low", "acc_high", "loss", "stage")
    return {f"eval_step/{name}": figures[name] for name in names} | {"eval_step/epoch": epoch}
