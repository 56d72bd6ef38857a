"""Batch normalization in NumPy float64, feature by feature: slow, obvious, and independent of `jbn`."""

import numpy as np


def features(x, axis):
    """Yields, for each feature, an index into per-feature arrays and one that selects its samples in `x`."""
    axes = sorted(a % x.ndim for a in np.atleast_1d(axis))
    for index in np.ndindex(*(x.shape[a] for a in axes)):
        samples = [slice(None)] * x.ndim
        for a, i in zip(axes, index):
            samples[a] = i
        yield index, tuple(samples)


def moments(x, axis=-1, mask=None):
    """Returns mean, biased variance and total weight, in the features' shape."""
    x = wide(x)
    weights = np.broadcast_to(np.float64(1 if mask is None else mask), x.shape)
    shape = tuple(x.shape[a] for a in sorted(a % x.ndim for a in np.atleast_1d(axis)))
    mean, var, count = np.zeros(shape, x.dtype), np.zeros(shape), np.zeros(shape)
    for index, samples in features(x, axis):
        counted = weights[samples] > 0
        values, w = x[samples][counted], weights[samples][counted]
        count[index] = w.sum()
        if count[index]:
            mean[index] = np.average(values, weights=w)
            var[index] = np.average(np.abs(values - mean[index]) ** 2, weights=w)
    return mean, var, count


def normalize(x, mean, var, scale=None, bias=None, axis=-1, epsilon=1e-5):
    """Normalizes with given moments."""
    y, mean, var = wide(x), wide(mean), wide(var)
    for index, samples in features(y, axis):
        y[samples] = (y[samples] - mean[index]) / np.sqrt(var[index] + epsilon)
        y[samples] = y[samples] * (1 if scale is None else wide(scale)[index])
        y[samples] = y[samples] + (0 if bias is None else wide(bias)[index])
    return y


def batch_norm(x, scale=None, bias=None, axis=-1, epsilon=1e-5, mask=None):
    """Normalizes with the batch's own moments."""
    mean, var, _ = moments(x, axis, mask)
    return normalize(x, mean, var, scale, bias, axis, epsilon)


def gradients(x, dy, scale=None, axis=-1, epsilon=1e-5, mask=None):
    """Returns what training gives `x`, scale and bias, when `dy` is what comes back for the output."""
    mean, var, count = moments(x, axis, mask)
    weights = np.broadcast_to(np.float64(1 if mask is None else mask), x.shape)
    x, dx = wide(x), wide(dy)
    dscale, dbias = np.zeros(mean.shape, mean.dtype), np.zeros(mean.shape, mean.dtype)
    for index, samples in features(x, axis):
        inverse_sd = 1 / np.sqrt(var[index] + epsilon)
        normalized, back = (x[samples] - mean[index]) * inverse_sd, dx[samples]
        dscale[index], dbias[index] = np.sum(back * normalized), np.sum(back)
        # A sample moves the mean and the variance by its share.
        share = weights[samples] / (count[index] or 1)
        back = back - share * dbias[index] - share * normalized * dscale[index]
        dx[samples] = back * inverse_sd * (1 if scale is None else wide(scale)[index])
    return dx, dscale, dbias


def corrections(x, mean, var, r_max, d_max, axis=-1, epsilon=1e-5, mask=None):
    """Returns r and d of batch renormalization, towards the running mean and variance given."""
    of_batch = moments(x, axis, mask)
    sd = np.sqrt(wide(var) + epsilon)
    r = np.clip(np.sqrt(of_batch[1] + epsilon) / sd, 1 / r_max, r_max)
    d = (of_batch[0] - wide(mean)) / sd
    far = np.abs(d) > d_max
    return r, np.where(far, d_max * d / np.where(far, np.abs(d), 1), d)


def batch_renorm(x, mean, var, r_max, d_max, scale, bias, axis=-1, epsilon=1e-5, mask=None):
    """Normalizes with the batch's own moments, corrected towards the running ones given."""
    r, d = corrections(x, mean, var, r_max, d_max, axis, epsilon, mask)
    y = batch_norm(x, axis=axis, epsilon=epsilon, mask=mask)
    for index, samples in features(y, axis):
        y[samples] = (y[samples] * r[index] + d[index]) * wide(scale)[index] + wide(bias)[index]
    return y


def wide(x):
    """Copies to float64, or complex128."""
    return np.array(x, np.complex128 if np.iscomplexobj(x) else np.float64)
