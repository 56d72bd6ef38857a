"""Apply any update rule to running moments, with the guards that `jbn.batch_norm` promises."""

import jax
import jax.numpy as jnp
import numpy as np

from jbn._dtypes import arithmetic_dtype
from jbn._running import UpdateRule, cumulative, ema, keep, pooled
from jbn._statistics import Moments, cast, select


def apply_update_rule(
    update: UpdateRule, running: Moments, batch: Moments, size: int | None = None
) -> Moments:
    """Apply an update rule as `jbn.batch_norm` does.

    The rule computes in float32 at least; the result has the dtypes of `running` and carries no gradient. A
    feature keeps its running moments if it had no samples, or if the batch's or the new moments are not
    finite. `size` is the batch's count if it is known while tracing and the same for all features.
    """
    if type(update) is keep:
        return running
    batch = jax.lax.stop_gradient(batch)
    if type(update) in (ema, cumulative, pooled) and not isinstance(getattr(update, "decay", 0), jax.Array):
        # One number, which the compiler knows not to be 0.
        count = batch.count if size is None else jnp.asarray(size, batch.count.dtype)
        return _apply_once(update, running, batch._replace(count=count))
    return _apply(update, running, batch)


def _apply(update, running, batch):
    if jnp.iscomplexobj(batch.mean) and not jnp.iscomplexobj(running.mean):
        raise ValueError(
            f"running.mean has dtype {running.mean.dtype}, but x is complex; expected a complex one, as made "
            "by jbn.init(features, dtype=jnp.complex64), or by a module with param_dtype=jnp.complex64."
        )
    wide = arithmetic_dtype(running.mean, batch.mean)
    old, batch = cast(running, wide), cast(batch, wide)
    usable = (batch.count > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(batch.var)
    # Where the batch is not usable, the rule sees the running moments twice.
    new = update(old, select(usable, batch, old)._replace(count=batch.count))
    if not isinstance(new, Moments):
        raise TypeError(f"update={update!r} returned a {type(new).__name__}; expected jbn.Moments.")
    shapes = [np.shape(leaf) for leaf in new]
    if not set(shapes) <= {(), running.mean.shape}:
        raise ValueError(
            f"update={update!r} returned leaves of shapes {shapes}; expected {running.mean.shape}, as given."
        )
    new = jax.tree.map(lambda leaf, old: jnp.asarray(leaf).astype(old.dtype), new, running)
    return select(usable & jnp.isfinite(new.mean) & jnp.isfinite(new.var), new, running)


# Traced once for all layers of one shape.
_apply_once = jax.jit(_apply, static_argnums=0)
