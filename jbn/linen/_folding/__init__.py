"""Norms that become part of the layers before them: which, how, and running without them."""
