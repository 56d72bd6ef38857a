"""Other libraries' names for the arguments of a batch norm, for errors that say the name here."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

# PyTorch, Keras, Haiku and Equinox. Of each name, how to say it here: the first that the callee has.
NAMES = {
    "eps": ["epsilon"],
    "affine": ["use_scale and use_bias"],
    "elementwise_affine": ["use_scale and use_bias"],
    "channelwise_affine": ["use_scale and use_bias"],
    "center": ["use_bias"],
    "create_offset": ["use_bias"],
    "create_scale": ["use_scale"],
    "scale": ["use_scale"],
    "bias": ["use_bias"],
    "gamma": ["scale", "params=jbn.Params(gamma, beta)"],
    "weight": ["scale", "params=jbn.Params(weight, bias)"],
    "beta": ["bias", "params=jbn.Params(gamma, beta)"],
    "offset": ["bias", "params=jbn.Params(scale, offset)"],
    "gamma_initializer": ["scale_init"],
    "beta_initializer": ["bias_init"],
    "offset_init": ["bias_init"],
    "moving_mean_initializer": ["mean_init"],
    "moving_variance_initializer": ["var_init"],
    "decay_rate": ["momentum", "update=jbn.ema(decay_rate)"],
    "decay": ["momentum", "update=jbn.ema(decay)"],
    "momentum": ["update=jbn.ema(momentum)", "decay"],
    "training": ["train", "use_running_average=not training"],
    "train": ["use_running_average=not train"],
    "is_training": ["train=is_training", "use_running_average=not is_training"],
    "inference": ["train=not inference", "use_running_average=inference"],
    "deterministic": ["train=not deterministic", "use_running_average=deterministic"],
    "use_running_average": ["train=not use_running_average"],
    "track_running_stats": [
        "use_running_average=False in evaluation too, where batches have to do without running statistics",
        "train=True in evaluation too, where batches have to do without running statistics",
    ],
    "running_mean": ["running=jbn.Moments(running_mean, running_var)"],
    "running_var": ["running=jbn.Moments(running_mean, running_var)"],
    "num_batches_tracked": ["running=jbn.Moments(mean, var, count)", "update, with a rule that counts"],
    "cross_replica_axis": ["axis_name"],
    "synchronized": ["axis_name"],
    "process_group": ["axis_index_groups"],
    "data_format": ["axis"],
    "channel_axis": ["axis"],
    "num_features": ["axis, whose size is the number of features"],
    "features": ["num_features", "axis, whose size is the number of features"],
}


def explain_names(f: Callable[..., Any]) -> Callable[..., Any]:
    """Has a function say what an argument is called here, when it is called by another library's name."""
    accepted = inspect.signature(f).parameters

    @functools.wraps(f)
    def checked(*args, **kwargs):
        for name in kwargs.keys() & NAMES.keys() - accepted.keys():
            for here in NAMES[name]:
                if here.replace(",", " ").replace("=", " ").split()[0] in accepted:
                    raise TypeError(f"got {name}={kwargs[name]!r}, another library's name; expected {here}.")
        return f(*args, **kwargs)

    return checked
