"""Running a job: the one place where side effects happen, in one order."""

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import data, models, optim, report, run_directory
from train import state as states
from train.checkpoint import Checkpoints
from train.config import Config, UserError, total_steps
from train.logs import Logs, Results, read_metrics
from train.state import TrainState
from train.stopping import StopRequests

EVAL_BATCH = 512
SECONDS_PER_DISPATCH = 0.2  # how long a stop request and the progress bar wait, or one step if that is longer


class RunFailed(Exception):
    """The job itself went wrong: its loss is no number any more."""


class Job:
    """What a config stands for, built: data, network, optimizer, and the state at step 0."""

    def __init__(self, config: Config):
        self.config = config
        self.data = data.load(config.data)
        self.steps_per_epoch = data.steps_per_epoch(len(self.data.train.labels), config.batch_size)
        self.total_steps = total_steps(config, self.steps_per_epoch)
        self.model = models.build(config.model, self.data.train.inputs.shape[1:], self.data.classes)
        self.optimizer = optim.build(config.optimizer, self.total_steps)
        example = self.data.train.inputs[:1]
        self.initial = states.create(self.model, self.optimizer, config.seed, example)
        self.loop = states.loops_well(self.model, example)

    def evaluate(self, state: TrainState, split: data.Split) -> dict[str, float]:
        """Returns loss and accuracy over a split, each example counted once."""
        batches = data.eval_batches(split, EVAL_BATCH)
        parts = [states.eval_step(self.model, state.params, state.batch_stats, batch) for batch in batches]
        totals = (np.sum(leaves, dtype=np.float64) for leaves in zip(*jax.device_get(parts)))
        return states.Sums(*totals).means()


def fit(config: Config, stop: StopRequests) -> dict[str, Any]:
    """Trains a job to its end, or until a stop is requested, and returns its summary.

    Goes on from the newest checkpoint where the run directory has one; a finished job is left as it is.

    Raises:
      UserError: the run directory or the data cannot be used.
      RunFailed: the loss became NaN or infinite.
    """
    run_dir = Path(config.run_dir)
    earlier = run_directory.earlier_summary(config)
    if run_directory.is_finished(earlier) and run_directory.same_length(config):
        return earlier
    job = Job(config)
    if run_directory.is_finished(earlier) and job.total_steps < earlier["step"]:
        raise UserError(
            f"run_dir = '{run_dir}' holds {earlier['step']} steps of this job, now asked for "
            f"{job.total_steps}; wanted as many or more. Give another --run_dir for a shorter run."
        )
    run_directory.create(config)
    with run_directory.locked(run_dir), Checkpoints(run_dir) as checkpoints:
        run_directory.begin(config)
        step = checkpoints.latest_step
        state = job.initial if step is None else checkpoints.restore(step, job.initial)
        error = None
        with Logs(run_dir, first_step=step or 0, total_steps=job.total_steps) as logs:
            logs.say(_heading(job, step))
            try:
                _train(job, state, checkpoints, logs, stop)
            except RunFailed as failure:
                error = failure
            seconds = logs.seconds
        finished = (checkpoints.latest_step or 0) >= job.total_steps
        status = "failed" if error else "finished" if finished else "stopped"
        summary = _summary(run_dir, checkpoints, status, seconds)
        report.draw_curves(run_dir)
        run_directory.write_json(run_dir / "summary.json", summary)
    if error:
        raise error
    return summary


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run on the test split."""
    job = Job(run_directory.read_config(run_dir))
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.best_step
        if step is None:
            raise UserError(f"'{run_dir}' has no checkpoint yet; train it first.")
        state = checkpoints.restore_model(step, job.initial)
    examples = len(job.data.test.labels)
    return {"split": "test", "step": step, **job.evaluate(state, job.data.test), "examples": examples}


def _train(job: Job, state: TrainState, checkpoints: Checkpoints, logs: Logs, stop: StopRequests) -> None:
    config, examples = job.config, len(job.data.train.labels)
    train = jax.device_put(job.data.train)
    step, epoch, at_once = int(state.step), None, 1
    while step < job.total_steps:
        if epoch != step // job.steps_per_epoch:
            epoch = step // job.steps_per_epoch
            order = jnp.asarray(data.order(config.seed, epoch, examples))
        first = step - epoch * job.steps_per_epoch
        next_eval = min((step // config.eval_every + 1) * config.eval_every, job.total_steps)
        steps = min(at_once, job.steps_per_epoch - first, next_eval - step)

        started = time.perf_counter()
        batches = {"start": first * config.batch_size, "steps": steps, "batch_size": config.batch_size}
        state = states.train_steps(job.model, job.optimizer, state, train, order, **batches, loop=job.loop)
        step = int(state.step)
        rate = steps / (time.perf_counter() - started)
        at_once = max(1, min(2 * at_once, round(rate * SECONDS_PER_DISPATCH)))

        if int(state.failed_at) != states.NEVER:
            raise _failure(f"the loss of step {int(state.failed_at)}", checkpoints)
        logs.advance(step)
        stopping = stop.received is not None
        if step == next_eval:
            results = _results(job, state)
            logs.results(step, step / job.steps_per_epoch, results)
            for split, values in results.items():
                if not math.isfinite(values["loss"]):
                    raise _failure(f"the {split} loss after step {step}", checkpoints)
            state = state._replace(sums=states.no_sums())
            checkpoints.save(state, results.get("validation"))
        elif stopping:
            checkpoints.save(state, None)
        if stopping:
            break


def _failure(what: str, checkpoints: Checkpoints) -> RunFailed:
    newest = (
        "There is no checkpoint yet" if (step := checkpoints.latest_step) is None else f"Step {step} is saved"
    )
    return RunFailed(f"{what} is not finite. {newest}. Try a lower optimizer.learning_rate.")


def _results(job: Job, state: TrainState) -> Results:
    results = {"train": state.sums.means()}
    for name in ("validation", "test"):
        split = getattr(job.data, name)
        if len(split.labels):
            results[name] = job.evaluate(state, split)
    return results


def _heading(job: Job, step: int | None) -> str:
    sizes = [f"{len(getattr(job.data, split).labels):,} {split}" for split in ("train", "validation", "test")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(job.initial.params))
    lines = [
        f"data   {job.config.data.name}: {', '.join(sizes)} examples",
        f"model  {job.config.model.name}: {parameters:,} parameters, norm {job.config.model.norm}",
        f"run    {job.total_steps:,} steps of {job.config.batch_size} on {jax.devices()[0].device_kind}",
    ]
    return "\n".join(lines) + ("" if step is None else f", going on from step {step:,}")


def _summary(run_dir: Path, checkpoints: Checkpoints, status: str, seconds: float) -> dict[str, Any]:
    tests = {line["step"]: line for line in read_metrics(run_dir) if line["split"] == "test"}
    best = tests.get(checkpoints.best_step, {})
    return {
        "status": status,
        "step": checkpoints.latest_step,
        "best_step": checkpoints.best_step,
        "test_accuracy": best.get("accuracy"),
        "test_loss": best.get("loss"),
        "best_test_accuracy": max((line["accuracy"] for line in tests.values()), default=None),
        "wall_seconds": round(seconds, 3),
    }
