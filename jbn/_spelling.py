"""Other libraries' names for the arguments of a batch norm, so that errors can say what to pass here."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Names in PyTorch, Keras, Haiku, Equinox and sbx, and what to pass here: the first that the callee accepts.
_GROUPS = [
    ("eps", ["epsilon"]),
    ("affine elementwise_affine channelwise_affine", ["use_scale and use_bias"]),
    ("scale create_scale", ["use_scale"]),
    ("bias center create_offset", ["use_bias"]),
    ("gamma", ["scale", "params=jbn.Params(gamma, beta)"]),
    ("weight", ["scale", "params=jbn.Params(weight, bias)"]),
    ("beta", ["bias", "params=jbn.Params(gamma, beta)"]),
    ("offset", ["bias", "params=jbn.Params(scale, offset)"]),
    ("gamma_initializer", ["scale_init"]),
    ("beta_initializer offset_init", ["bias_init"]),
    ("moving_mean_initializer", ["mean_init"]),
    ("moving_variance_initializer", ["var_init"]),
    ("decay", ["momentum", "update=jbn.ema(decay)"]),
    ("decay_rate", ["momentum", "update=jbn.ema(decay_rate)"]),
    ("momentum", ["update=jbn.ema(momentum)", "decay"]),
    ("train", ["use_running_average=not train"]),
    ("training", ["train", "use_running_average=not training"]),
    ("is_training", ["train=is_training", "use_running_average=not is_training"]),
    ("inference", ["train=not inference", "use_running_average=inference"]),
    ("deterministic", ["train=not deterministic", "use_running_average=deterministic"]),
    ("use_running_average", ["train=not use_running_average"]),
    (
        "track_running_stats",
        [
            "use_running_average=False in evaluation too, which then uses no running statistics",
            "train=True in evaluation too, which then uses no running statistics",
        ],
    ),
    ("running_mean running_var", ["running=jbn.Moments(running_mean, running_var)"]),
    ("num_batches_tracked", ["running=jbn.Moments(mean, var, count)", "update, with a rule that counts"]),
    ("cross_replica_axis synchronized", ["axis_name"]),
    ("process_group", ["axis_index_groups"]),
    ("data_format channel_axis", ["axis"]),
    ("rmax", ["r_max"]),
    ("dmax", ["d_max"]),
    ("renorm_clipping", ["renorm=(rmax, dmax)", "r_max and d_max"]),
    ("renorm_momentum", ["momentum", "update=jbn.ema(renorm_momentum)"]),
    ("warm_up_steps", ["plain", "renorm=jbn.renorm_limits(plain=warm_up_steps, r_steps=0, d_steps=0)"]),
    ("num_features", ["axis, whose size is the number of features"]),
    ("features", ["num_features", "axis, whose size is the number of features"]),
]
NAMES = {name: here for names, here in _GROUPS for name in names.split()}


def explain_names(f: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that an argument by another library's name is an error with the name here."""
    accepted = inspect.signature(f).parameters

    @functools.wraps(f)
    def checked(*args, **kwargs):
        for name in kwargs.keys() & NAMES.keys() - accepted.keys():
            for here in NAMES[name]:
                if here.replace(",", " ").replace("=", " ").split()[0] in accepted:
                    raise TypeError(f"got {name}={kwargs[name]!r}, another library's name; expected {here}.")
        return f(*args, **kwargs)

    return checked


def check_option_names(options: Mapping[str, Any], accepted: Collection[str]) -> None:
    """Raise a TypeError for options that a layer does not have."""
    for name in options.keys() - set(accepted):
        if near := difflib.get_close_matches(name, accepted, n=1):
            expected = near[0]
        else:
            names = [here.partition("=")[0] for here in NAMES.get(name, [])]
            expected = next((here for here in names if here in accepted), ", ".join(sorted(accepted)))
        raise TypeError(f"got an option {name!r}, which a BatchNorm does not have; expected {expected}.")
