"""Tools for trained models, as far as they need no Flax. The layers know nothing of them."""
