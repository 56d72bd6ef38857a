"""What training changes: every variable of a network, or some of them, as `model.frozen` says."""

from typing import Any

import jax

from train.config import Model
from train.models.network import Network, Variables


def learning(config: Model, network: Network, variables: Variables) -> Variables:
    """Mark what training changes: a Boolean for each parameter and each running statistic."""
    params, batch_stats = variables
    if config.frozen == "norms":
        of_params = _outside_norms(params)
    elif config.frozen == "body":
        of_params = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == network.head, params)
    else:
        of_params = jax.tree.map(lambda _: True, params)
    return Variables(of_params, jax.tree.map(lambda _: config.frozen == "none", batch_stats))


def _outside_norms(params: Any) -> Any:
    """Mark the parameters that are no norm's: every norm has a scale, and nothing else has."""
    return {
        name: _outside_norms(value) if isinstance(value, dict) else "scale" not in params
        for name, value in params.items()
    }
