"""Running a job: the one place where side effects happen, in one order."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import jax

from train.config import Config
from train.data import dataset as data
from train.errors import RunFailed, UserError, explained
from train.runs import curves, summary
from train.runs import directory as run_directory
from train.runs import processes as distributed
from train.runs.checkpoints import Checkpoints
from train.runs.files import write_json
from train.runs.log import Logs, Results, read_metrics
from train.runs.stopping import StopRequests
from train.training import inspection
from train.training import steps as states
from train.training.job import Job
from train.training.profiling import Profiler
from train.training.steps import TrainState

SECONDS_PER_DISPATCH = 0.2  # how long a stop request and the progress bar wait, or one step if that is longer

FAR = 1e3  # times the training loss: an evaluation that sees something else than training did


def fit(config: Config, stop: StopRequests) -> dict[str, Any]:
    """Trains a job to its end, or until a stop is requested, and returns its summary.

    Goes on from the newest checkpoint where the run directory has one; a finished job is left as it is.
    Each process of a job calls it; the first one of them writes the files, but for the checkpoints.

    Raises:
      UserError: the run directory or the data cannot be used.
      RunFailed: the loss became NaN or infinite, or the disk is full.
    """
    run_dir, first = Path(config.run_dir), distributed.is_first()
    with distributed.all_or_none("use the run directory"):
        earlier = run_directory.earlier_summary(config)
        if run_directory.is_finished(earlier) and run_directory.same_length(config):
            return earlier
    with distributed.all_or_none("prepare the job"):
        job = Job(config)
        if run_directory.is_finished(earlier) and job.total_steps < earlier["step"]:
            raise UserError(
                f"run_dir = '{run_dir}' holds {earlier['step']} steps of this job, now asked for "
                f"{job.total_steps}; wanted as many or more. Give another --run_dir for a shorter run."
            )
    with contextlib.ExitStack() as stack:
        with distributed.all_or_none("use the run directory"):
            if first:
                run_directory.create(config)
                stack.enter_context(run_directory.locked(run_dir))
        checkpoints = stack.enter_context(Checkpoints(run_dir))
        step = checkpoints.latest_step
        with distributed.all_or_none("begin the run"):
            if step is None:
                _check_that_none_is_gone(run_dir, earlier)
            if first:
                run_directory.begin(config, job.data)
        state = job.initial if step is None else checkpoints.restore(step, job.initial)
        run = _Run(job, checkpoints, stop)
        error = None
        with Logs(run_dir, first_step=step or 0, total_steps=job.total_steps, writes=first) as logs:
            logs.say(summary.heading(job, step))
            try:
                with explained(), Profiler(run_dir, config.profile, writes=first) as profiler:
                    run.train(state, logs, profiler)
            except RunFailed as failure:
                error = failure
            seconds = logs.seconds
        step = checkpoints.latest_step or 0
        finished = step >= job.total_steps or run.stalled(step)
        status = "failed" if error else "finished" if finished else "stopped"
        reached = summary.summarize(run_dir, checkpoints, status, seconds, run.examples_per_second)
        if first:
            curves.draw(run_dir)
            write_json(run_dir / "summary.json", reached)
    if error:
        raise error
    return reached


def _check_that_none_is_gone(run_dir: Path, earlier: dict[str, Any] | None) -> None:
    """Raises a UserError for a run without checkpoints that once had one."""
    # Of the last evaluation the checkpoint may be missing still; those before it were saved.
    saved = sorted({line["step"] for line in read_metrics(run_dir)})[:-1]
    if earlier and earlier["step"]:
        saved.append(earlier["step"])
    if saved:
        raise UserError(
            f"run_dir = '{run_dir}' had reached step {max(saved)}, but its checkpoints are gone. Bring them "
            "back, or give another --run_dir."
        )


class _Run:
    """One session of a job: from where it is to its end, or to a stop."""

    def __init__(self, job: Job, checkpoints: Checkpoints, stop: StopRequests):
        self._job, self._checkpoints, self._stop = job, checkpoints, stop
        self._steps, self._seconds = 0, 0.0  # of training, without those that compile
        self._warned = False

    @property
    def examples_per_second(self) -> float | None:
        """The rate of training, without compilation, evaluation and saving."""
        return self._steps * self._job.config.batch_size / self._seconds if self._steps else None

    def stalled(self, step: int) -> bool:
        """Tells whether the evaluations up to this step have stopped getting better."""
        config = self._job.config
        done, best = (at // config.eval_every for at in (step, self._checkpoints.best_step or 0))
        return 0 < config.early_stopping <= done - best

    def train(self, state: TrainState, logs: Logs, profiler: Profiler) -> None:
        """Takes steps, evaluates and saves, in this order, until the end, a stop, or a failure."""
        job, config = self._job, self._job.config
        step, epoch, at_once, compiled = int(state.step), None, 1, False
        if step == 0:
            self._inspect(state, logs)
        while step < job.total_steps and not self.stalled(step):
            if epoch != step // job.steps_per_epoch:
                epoch = step // job.steps_per_epoch
                order = data.order(config.seed, epoch, len(job.data.train))
                order = distributed.replicate(job.mesh, order) if job.on_device else order
            first = step - epoch * job.steps_per_epoch
            next_eval = min((step // config.eval_every + 1) * config.eval_every, job.total_steps)
            steps = min(at_once, job.steps_per_epoch - first, next_eval - step)
            if compiled:
                steps = profiler.before(steps)

            started = time.perf_counter()
            state = self._take(state, order, first * config.batch_size, steps)
            step = int(state.step)
            seconds = time.perf_counter() - started
            profiler.after(steps)
            if compiled:
                self._steps, self._seconds = self._steps + steps, self._seconds + seconds
            compiled = True

            if int(state.failed_at) != states.NEVER:
                raise self._failure(f"the loss of step {int(state.failed_at)}")
            logs.advance(step)
            wanted = max(1, min(2 * at_once, round(steps / seconds * SECONDS_PER_DISPATCH)))
            # Every process has to take the same steps, and to stop after the same one.
            signal, slowest = distributed.largest(self._stop.received or 0, -min(wanted, 2**20))
            at_once = -slowest
            if signal and self._stop.received is None:
                self._stop.received = signal
            if step == next_eval:
                state = self._evaluate_and_save(state, logs)
            elif signal:
                self._checkpoints.save(state, None)
            if signal:
                break

    def _take(self, state: TrainState, order: Any, start: int, steps: int) -> TrainState:
        job, size = self._job, self._job.config.batch_size
        if job.on_device:
            return states.train_steps(job.recipe, state, job.source, order, start, steps, loop=job.loop)
        for at in range(start, start + steps * size, size):
            batch = distributed.shard(job.mesh, job.data.train.take(order[at : at + size]))
            state = states.train_on_batch(job.recipe, state, job.source._replace(examples=batch))
        return state

    def _evaluate_and_save(self, state: TrainState, logs: Logs) -> TrainState:
        job, step = self._job, int(state.step)
        results: Results = {"train": jax.device_get(state.sums).means()}
        for name in ("validation", "test"):
            split = getattr(job.data, name)
            if len(split):
                results[name] = job.evaluate(state.evaluated, split)
        logs.results(step, step / job.steps_per_epoch, results)
        for split, values in results.items():
            if not math.isfinite(values["loss"]):
                raise self._failure(f"the {split} loss after step {step}")
            if values["loss"] > FAR * max(1, results["train"]["loss"]) and not self._warned:
                self._warned = True
                logs.say(
                    f"warning: the {split} loss is {values['loss']:.1e}, in training it was "
                    f"{results['train']['loss']:.1e}. Running statistics of batch norm do not describe these "
                    "inputs, as when they vary by 1e19 or more: the variance is then beyond float32, and "
                    "left out of the running statistics. Scale the data."
                )
        self._inspect(state, logs)
        state = state._replace(sums=distributed.replicate(job.mesh, states.no_sums()))
        self._checkpoints.save(state, results.get("validation"))
        return state

    def _inspect(self, state: TrainState, logs: Logs) -> None:
        if self._job.config.inspect:
            logs.inspection(int(state.step), inspection.inspect(self._job, state))

    def _failure(self, what: str) -> RunFailed:
        step = self._checkpoints.latest_step
        newest = "There is no checkpoint yet" if step is None else f"Step {step} is saved"
        return RunFailed(f"{what} is not finite. {newest}. Try a lower optimizer.learning_rate.")
