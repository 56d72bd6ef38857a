"""A training job, from its config to its last checkpoint: all side effects are here, in one order."""

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from train import data
from train.config import Config, NormName
from train.errors import RunFailed, UserError, explained
from train.models import NORMS
from train.runs import curves, directory, processes
from train.runs.checkpoints import Checkpoints, digest
from train.runs.files import write_json
from train.runs.log import Log, Results
from train.runs.stopping import StopRequests
from train.runs.summary import Summary, read_metrics, summarize
from train.training import losses, steps
from train.training.inspection import inspect
from train.training.job import Job, load_data, prepare
from train.training.state import ALL_FINITE, TrainState, from_items, no_sums, to_items
from train.training.trained.evaluation import TrainedNetwork, load_best
from train.training.trained.recalibration import recalibrate_best

SECONDS_PER_DISPATCH = 0.2  # how long a stop request and the progress bar wait, or one step if that is longer
FAR = 1e3  # times the training loss: beyond it, an evaluation sees other inputs than training did


def fit(config: Config, stop: StopRequests) -> Summary:
    """Train a job to its end, or until a stop is requested, and return its summary.

    A job resumes from the newest checkpoint in its run directory, if there is one; a finished job is left as
    it is. Every process of a job calls this; all of them write the checkpoints, and the primary one the rest.

    Raises:
      UserError: the run directory or the data cannot be used, or the processes were started differently.
      RunFailed: the loss became NaN or infinite, or the disk or the memory is full.
    """
    run_dir, primary = Path(config.run_dir), processes.is_primary()
    processes.check_same_job(config)
    # Decoding images may take an hour. Several processes stop together, which they agree on later.
    stoppable = stop.at_once if jax.process_count() == 1 else contextlib.nullcontext
    with processes.raise_on_all("use the run directory"):
        earlier = directory.earlier_summary(config)
        if earlier and earlier.finished and directory.has_same_length(config):
            with stoppable():
                _check_same_data(config)
            return earlier
    with processes.raise_on_all("read the data"), stoppable():
        dataset = load_data(config)
    # Before the processes run programs, in which those of other data would wait for each other.
    processes.check_equal({"the data's fingerprint": dataset.fingerprint})
    with processes.raise_on_all("prepare the job"):
        job = prepare(config, directory.as_described(run_dir, dataset))
        _check_not_shorter(job, earlier)
    if config.init_from is not None:
        processes.check_equal({"the weights of init_from": digest(job.initial.variables)})
    with contextlib.ExitStack() as stack:
        with processes.raise_on_all("use the run directory"):
            if primary:
                stack.enter_context(directory.created_and_locked(run_dir))
            earlier = directory.earlier_summary(config)  # another job may have begun there meanwhile
            _check_not_shorter(job, earlier)
        checkpoints = stack.enter_context(Checkpoints(run_dir))
        step = checkpoints.latest_step
        with processes.raise_on_all("go on with the run"):
            if step is None:
                _check_checkpoints_present(run_dir, earlier)
            directory.check_same_data(run_dir, job.data.fingerprint)
        state = job.initial
        if step is not None:  # before the run's files say that it is longer, which a refusal would leave
            state = from_items(checkpoints.restore(step, to_items(state)), like=state)
        with processes.raise_on_all("begin the run"):
            if primary:
                directory.begin(config, job.data)
        log = stack.enter_context(
            Log(run_dir, first_step=step or 0, total_steps=job.step_config.total_steps, writes=primary)
        )
        log.print("\n".join([_heading(job, step), *job.notes]))
        speed, error, finished = Speed(), None, False
        try:
            with explained():
                train(job, state, checkpoints, log, stop, speed)
                finished = _is_finished(job, checkpoints, checkpoints.latest_step or 0)
                if finished and config.recalibrate and NORMS[config.model.norm].pools:
                    finished = _recalibrate(job, log, stop)
        except RunFailed as failure:
            error = failure
        status = "failed" if error else "finished" if finished else "stopped"
        rate = speed.steps * config.batch_size / speed.seconds if speed.steps else None
        summary = summarize(run_dir, checkpoints, status, log.seconds, rate)
        if primary:
            # A disk that has failed the job may be too full for these files too.
            ignored = [OSError] if error else []
            with contextlib.suppress(*ignored):
                curves.draw(run_dir)
                write_json(run_dir / "summary.json", dataclasses.asdict(summary))
    if error:
        raise error
    return summary


def _check_same_data(config: Config) -> None:
    """Raise a UserError if the data of a finished job were replaced; they may be gone."""
    run_dir = Path(config.run_dir)
    found = data.fingerprint(config.data, loss=config.model.loss, cache=directory.data_cache(run_dir))
    if found is not None:
        directory.check_same_data(run_dir, found)


@dataclass
class Speed:
    """How fast a session trains, without compilation, evaluation and saving."""

    steps: int = 0
    seconds: float = 0.0


def train(
    job: Job, state: TrainState, checkpoints: Checkpoints, log: Log, stop: StopRequests, speed: Speed
) -> None:
    """Take steps, evaluate and save, in this order, until the end, a stop, or a failure."""
    config, per_epoch, total = job.config, job.steps_per_epoch, job.step_config.total_steps
    step, epoch, order, at_once, compiled = int(state.step), -1, None, 1, False
    profiler, left_to_trace = contextlib.ExitStack(), config.profile
    if step == 0:
        _inspect(job, state, log)
    with profiler:
        while not _is_finished(job, checkpoints, step):
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                order = data.order(config.seed, epoch, len(job.data.train))
                order = processes.replicate(job.step_config.mesh, order) if job.on_device else order
            first = step - epoch * per_epoch
            next_eval = min((step // config.eval_every + 1) * config.eval_every, total)
            count = min(at_once, per_epoch - first, next_eval - step)
            if compiled and left_to_trace:
                if left_to_trace == config.profile and processes.is_primary():
                    profiler.enter_context(jax.profiler.trace(str(Path(config.run_dir) / "profile")))
                count = min(count, left_to_trace)

            started = time.perf_counter()
            state = _take(job, state, order, first * config.batch_size, count)
            step = int(state.step)  # waits for the devices
            seconds = time.perf_counter() - started

            if compiled:
                speed.steps, speed.seconds = speed.steps + count, speed.seconds + seconds
                left_to_trace -= min(count, left_to_trace)
                if not left_to_trace:
                    profiler.close()
            compiled = True
            if int(state.nonfinite_step) != ALL_FINITE:
                raise _not_finite(f"the loss of step {int(state.nonfinite_step)}", checkpoints)
            log.advance(step)
            fitting = max(1, min(2 * at_once, round(count / seconds * SECONDS_PER_DISPATCH)))
            # All processes have to take the same steps, and to stop after the same one.
            at_once, signal = processes.agree(fitting, stop)
            if step == next_eval:
                state = _evaluate_and_save(job, state, checkpoints, log)
            elif signal:
                checkpoints.save(step, to_items(state), None)
            if signal:
                break


def _recalibrate(job: Job, log: Log, stop: StopRequests) -> bool:
    """Recalibrate the best checkpoint of a job, and return whether that was done before a stop."""
    run_dir = Path(job.config.run_dir)
    log.print(f"recalibrating over {len(job.data.train):,} training examples")
    best = load_best(run_dir, recalibrated=False, mesh=job.step_config.mesh)
    stopped = lambda: bool(processes.agree(0, stop).signal)
    return recalibrate_best(run_dir, best, job.data, stopped) is not None


def _take(job: Job, state: TrainState, order: Any, start: int, count: int) -> TrainState:
    """Take `count` steps on the rows `order[start:]`: of the data on the devices, or batch by batch."""
    size, mesh = job.config.batch_size, job.step_config.mesh
    if job.on_device:
        return steps.train_steps(job.step_config, state, job.inputs, order, start, count, loop=job.loop)
    for at in range(start, start + count * size, size):
        batch = processes.shard(mesh, job.data.train.take(order[at : at + size]))
        state = steps.train_on_batch(job.step_config, state, job.inputs._replace(examples=batch))
    return state


def _check_not_shorter(job: Job, earlier: Summary | None) -> None:
    """Raise a UserError for a job that would end before the finished run that it goes on from."""
    config, steps = job.config, job.step_config.total_steps
    if earlier and earlier.finished and steps < (earlier.step or 0):
        length = "steps" if config.epochs is None else f"epochs = {config.epochs:g}"
        raise UserError(
            f"{length}: expected at least the {earlier.step} steps that run_dir = '{config.run_dir}' holds, "
            f"got {steps}. Give another --run_dir for a shorter run."
        )


def _check_checkpoints_present(run_dir: Path, earlier: Summary | None) -> None:
    """Raise a UserError for a run without checkpoints that once had one."""
    # A kill may have come between the last evaluation and its checkpoint; those before it were saved.
    saved = sorted({line["step"] for line in read_metrics(run_dir)})[:-1]
    if earlier and earlier.step:
        saved.append(earlier.step)
    if saved:
        raise UserError(
            f"run_dir = '{run_dir}' had reached step {max(saved)}, but its checkpoints are gone. Restore "
            "them, or give another --run_dir."
        )


def _is_finished(job: Job, checkpoints: Checkpoints, step: int) -> bool:
    """Return whether a job is at its end, or its evaluations have stopped getting better."""
    every, patience = job.config.eval_every, job.config.early_stopping
    evaluations_since_best = step // every - (checkpoints.best_step or 0) // every
    return step >= job.step_config.total_steps or 0 < patience <= evaluations_since_best


def _evaluate_and_save(job: Job, state: TrainState, checkpoints: Checkpoints, log: Log) -> TrainState:
    """Log how good the state is, save it, and return it with new sums for the next line of the log."""
    config, step = job.step_config, int(state.step)
    trained = TrainedNetwork(
        config.network, config.loss, config.mesh, state.evaluated, job.inputs.preprocessing
    )
    results: Results = {"train": config.loss.metrics(jax.device_get(state.sums))}
    for name, split in (("validation", job.data.validation), ("test", job.data.test)):
        if len(split):
            results[name] = trained.evaluate(split, job.config.data.renderings)
    log.results(step, step / job.steps_per_epoch, results)
    for split, values in results.items():
        if not math.isfinite(values["loss"]):
            raise _not_finite(f"the {split} loss after step {step}", checkpoints)
    _warn_if_far(config.model.norm, results, log)
    _inspect(job, state, log)
    state = state._replace(sums=processes.replicate(config.mesh, no_sums(config)))
    validation = results.get("validation")
    checkpoints.save(step, to_items(state), validation and losses.ranking(config.loss, validation))
    return state


def _warn_if_far(norm: NormName, results: Results, log: Log) -> None:
    train = results["train"]["loss"]
    for split, values in results.items():
        if NORMS[norm].over_batch and values["loss"] > FAR * max(1, train):
            log.print_once(
                f"warning: the {split} loss is {values['loss']:.1e}, in training it was {train:.1e}. Running "
                "statistics of batch norm do not describe these inputs, as after batches of one example, or "
                "when inputs vary by 1e19 or more: the variance is then beyond float32, and left out of the "
                "running statistics. Use larger batches, or scale the data."
            )


def _inspect(job: Job, state: TrainState, log: Log) -> None:
    if job.config.inspect:
        log.inspection(int(state.step), inspect(job.step_config, job.data, job.inputs, state))


def _not_finite(what: str, checkpoints: Checkpoints) -> RunFailed:
    step = checkpoints.latest_step
    newest = "There is no checkpoint yet" if step is None else f"Step {step} is saved"
    return RunFailed(f"{what} is not finite. {newest}. Try a lower optimizer.learning_rate.")


def _heading(job: Job, step: int | None) -> str:
    config, mesh = job.config, job.step_config.mesh
    sizes = [f"{len(getattr(job.data, split)):,} {split}" for split in ("train", "validation", "test")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(job.initial.variables.params))
    devices = f"{mesh.size} x " * (mesh.size > 1) + jax.devices()[0].device_kind
    resumed = "" if step is None else f", going on from step {step:,}"
    return (
        f"data   {config.data.name}: {', '.join(sizes)} examples\n"
        f"model  {config.model.name}: {parameters:,} parameters, norm {config.model.norm}\n"
        f"run    {job.step_config.total_steps:,} steps of {config.batch_size} on {devices}{resumed}"
    )
