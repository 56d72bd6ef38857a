"""What a job can do, but hardly anyone wants it to."""

from train.config import Config
from train.models import NORMS


def likely(config: Config) -> list[str]:
    """Return a sentence for each choice of a config that looks like a mistake."""
    frozen, norm = config.model.frozen, config.model.norm
    has_statistics, found = NORMS[norm].over_batch, []
    if frozen == "body" and config.init_from is None:
        found.append(
            "model.frozen = 'body' without init_from: all but the last layer stays as it is drawn at random. "
            "Give init_from."
        )
    elif frozen != "none" and has_statistics and config.init_from is None:
        found.append(
            f"model.frozen = {frozen!r} without init_from: running statistics stay at mean 0 and variance 1, "
            "with which nothing is normalized. Give init_from."
        )
    if config.recalibrate and not has_statistics:
        found.append(f"recalibrate = true with model.norm = {norm!r}, which has no running statistics.")
    elif config.recalibrate and frozen != "none":
        found.append(
            f"recalibrate = true with model.frozen = {frozen!r}: the running statistics that training keeps, "
            "and that the weights are trained for, are replaced at the end."
        )
    return found
