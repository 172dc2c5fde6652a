"""The method once more, in plain NumPy float64, for tests to compare with.

Written from the paper alone: dense gradients, true shapes, SVDs of explicit unfoldings, no capacity, no masks, no JAX.
A kernel is ``(core, factors)`` with a NumPy core ``(r_1, ..., r_d)`` and a list of ``(n_i, r_i)`` bases, ``None`` for a
whole mode. ``grad`` is the gradient of the loss with respect to the dense kernel, a function
``(n_1, ..., n_d) -> (n_1, ..., n_d)``.
"""

import math

import numpy as np

EPSILON = np.finfo(np.float64).eps


# Multilinear algebra


def unfold(tensor, mode):
    """``Mat_i``: the slices of one mode as rows."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix, mode, shape):
    """``Ten_i``, the inverse of ``Mat_i``; the size of the mode itself is read from the matrix."""
    rest = [n for axis, n in enumerate(shape) if axis != mode]
    return np.moveaxis(matrix.reshape(matrix.shape[0], *rest), 0, mode)


def mode_product(tensor, matrix, mode):
    """``tensor ×_i matrix``; ``None`` is the identity."""
    if matrix is None:
        return tensor
    return fold(matrix @ unfold(tensor, mode), mode, tensor.shape)


def mode_products(tensor, matrices, skip=None):
    """``tensor ×_{j != skip} A_j``."""
    for mode, matrix in enumerate(matrices):
        if mode != skip:
            tensor = mode_product(tensor, matrix, mode)
    return tensor


def transposes(matrices):
    return [None if matrix is None else matrix.T for matrix in matrices]


def to_dense(core, factors):
    """``C ×_i U_i``, equation (2)."""
    return mode_products(core, factors)


def random_orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def replace_singular_values(tensor, mode, values):
    left, _, right = np.linalg.svd(unfold(tensor, mode), full_matrices=False)
    return fold((left * values) @ right, mode, tensor.shape)


def tucker_random(shape, rank, singular_values=None, seed=0, whole=(), sweeps=20_000):
    """A random kernel of the given Tucker rank, the singular values of its unfoldings prescribed if asked for.

    ``singular_values`` is one sequence for all modes (cut to each rank) or one per mode; every mode's is scaled to unit
    norm, because all unfoldings share the Frobenius norm. ``whole`` names the modes without a factor (of rank ``n_i``).
    """
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(rank)
    factors = [None if i in whole else random_orthonormal(rng, n, r) for i, (n, r) in enumerate(zip(shape, rank))]
    if singular_values is None:
        return core, factors
    if np.ndim(singular_values[0]) == 0:
        singular_values = [singular_values] * len(rank)
    wanted = [np.asarray(values, float)[:r] for values, r in zip(singular_values, rank)]
    wanted = [values / np.linalg.norm(values) for values in wanted]
    core = mode_products(core, [np.diag(values / values[0]) for values in wanted])
    for _ in range(sweeps):
        for mode, values in enumerate(wanted):
            core = replace_singular_values(core, mode, values)
        found = [np.linalg.svd(unfold(core, mode), compute_uv=False)[: len(v)] for mode, v in enumerate(wanted)]
        if all(np.all(np.abs(f - v) <= 1e-9 * v + 100 * EPSILON) for f, v in zip(found, wanted)):
            return core, factors
    raise RuntimeError(f"no core of shape {tuple(rank)} with singular values {wanted} found in {sweeps} sweeps")


# The tangent space


def frame(core, factors):
    """``Q_i`` and ``K_i = U_i S_i`` with ``Mat_i(C)^T = Q_i S_i^T`` (lines 2, 3); ``None`` for whole modes."""
    Q, K = [], []
    for mode, factor in enumerate(factors):
        if factor is None:
            Q.append(None)
            K.append(None)
            continue
        q, s_transposed = np.linalg.qr(unfold(core, mode).T)
        Q.append(q)
        K.append(factor @ s_transposed.T)
    return Q, K


def k_gradient(dense_gradient, factors, Q, mode):
    """``∇_{K_i} L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i) = Mat_i(∇_W L ×_{j != i} U_j^T) Q_i``."""
    return unfold(mode_products(dense_gradient, transposes(factors), skip=mode), mode) @ Q[mode]


def core_gradient(dense_gradient, factors):
    """``∇_C L(C ×_j U_j) = ∇_W L ×_j U_j^T``."""
    return mode_products(dense_gradient, transposes(factors))


def projected_gradient(core, factors, dense):
    """``P(W) G``, the orthogonal projection of a dense tensor onto the tangent space at ``W`` (equations (3)-(7))."""
    Q, _ = frame(core, factors)
    tangent = to_dense(core_gradient(dense, factors), factors)
    for mode, factor in enumerate(factors):
        if factor is None:
            continue
        k = k_gradient(dense, factors, Q, mode)
        k = k - factor @ (factor.T @ k)
        increment = fold(k @ Q[mode].T, mode, core.shape)
        tangent = tangent + mode_products(increment, factors, skip=mode)
    return tangent


# Truncation


def truncated_rank(values, norm, share, spare=0, criterion="tail"):
    """How many of the descending singular values to keep: at least one, never those that are rounding errors.

    ``"tail"``: the smallest rank whose tail ``sqrt(sum of squares dropped)`` is at most ``share * norm`` (the paper);
    ``"each"``: drop the values that are at most ``share * norm`` one by one. ``spare`` more are kept if there are any.
    """
    if criterion == "tail":
        tails = np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0))  # tails[r]: the error of keeping r
        rank = int(np.argmax(tails <= share * norm))
    else:
        rank = int(np.sum(values > share * norm))
    nonzero = int(np.sum(values > 4 * EPSILON * norm))
    return max(1, min(rank + spare, nonzero))


def truncate(core, tau, whole=(), spare=0, criterion="tail"):
    """Line 11, a sequential HOSVD with ``||C - C^|| <= tau ||C||``: returns the smaller core and one basis per mode.

    Every mode that is not whole may lose ``tau ||C|| / sqrt(their number)``; a matrix is truncated once, by all of tau.
    """
    norm = np.linalg.norm(core)
    modes = [mode for mode in range(core.ndim) if mode not in whole]
    matrix = core.ndim == 2 and not whole
    share = tau if matrix else tau / math.sqrt(max(len(modes), 1))
    bases = [None] * core.ndim
    if matrix:
        left, values, right = np.linalg.svd(core, full_matrices=False)
        rank = truncated_rank(values, norm, share, spare, criterion)
        return np.diag(values[:rank]), [left[:, :rank], right[:rank].T]
    for mode in modes:
        left, values, _ = np.linalg.svd(unfold(core, mode), full_matrices=False)
        bases[mode] = left[:, : truncated_rank(values, norm, share, spare, criterion)]
        core = mode_product(core, bases[mode].T, mode)
    return drop_dependent(core, bases, modes)


def drop_dependent(core, bases, modes):
    """Removes slices that later truncations made dependent, without loss: until ``r_i <= prod_{j != i} r_j``."""
    for mode in modes * len(modes):
        others = core.size // core.shape[mode]
        if core.shape[mode] > others:
            left = np.linalg.svd(unfold(core, mode), full_matrices=False)[0]
            core, bases[mode] = mode_product(core, left.T, mode), bases[mode] @ left
    return core, bases


# Integrators


def range_basis(matrix, threshold=1e-12):
    """An orthonormal basis of the range, numerically dependent directions dropped."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > threshold * values[0]] if values[0] > 0 else left[:, :0]


def augmented_basis(K, U):
    """Lines 6 and 7: an orthonormal basis of the range of ``[K_i | U_i]``, which the scale of K does not change."""
    return range_basis(np.hstack([K / max(np.linalg.norm(K, 2), np.finfo(float).tiny), U]))


def algorithm1_step(core, factors, grad, learning_rate, tau, adaptive=True, spare=0, criterion="tail"):
    """Algorithm 1 with plain gradient descent as the descent step of lines 4 and 9."""
    whole = [mode for mode, factor in enumerate(factors) if factor is None]
    dense_gradient = grad(to_dense(core, factors))
    Q, K = frame(core, factors)
    new_factors = []
    for mode, factor in enumerate(factors):
        if factor is None:
            new_factors.append(None)
            continue
        stepped = K[mode] - learning_rate * k_gradient(dense_gradient, factors, Q, mode)
        new_factors.append(augmented_basis(stepped, factor) if adaptive else np.linalg.qr(stepped)[0])
    overlaps = [None if new is None else new.T @ old for new, old in zip(new_factors, factors)]
    start = mode_products(core, overlaps)
    new_core = start - learning_rate * core_gradient(grad(to_dense(start, new_factors)), new_factors)
    if not adaptive:
        return new_core, new_factors
    new_core, bases = truncate(new_core, tau, whole, spare, criterion)
    return new_core, [None if new is None else new @ basis for new, basis in zip(new_factors, bases)]


def parallel_step(core, factors, grad, learning_rate, tau, spare=0, criterion="tail"):
    """The parallel integrator of Ceruti, Kusch, Lubich and Sulz (2024) for Tucker tensors: one gradient for all steps.

    Before truncation it is exactly ``W - h P(W) ∇L(W)``: core and blocks are the coordinates of that tangent step.
    """
    whole = [mode for mode, factor in enumerate(factors) if factor is None]
    dense_gradient = grad(to_dense(core, factors))
    Q, _ = frame(core, factors)
    new_factors, blocks = [], []
    for mode, factor in enumerate(factors):
        if factor is None:
            new_factors.append(None)
            blocks.append(None)
            continue
        delta = -learning_rate * k_gradient(dense_gradient, factors, Q, mode)
        outside = delta - factor @ (factor.T @ delta)
        outside = outside - factor @ (factor.T @ outside)
        size = np.linalg.norm(delta, 2)
        new = range_basis(outside) if np.linalg.norm(outside, 2) > 1e-14 * size else outside[:, :0]
        new_factors.append(np.hstack([factor, new]))
        blocks.append(fold(new.T @ delta @ Q[mode].T, mode, core.shape))
    old = tuple(slice(0, r) for r in core.shape)
    augmented = np.zeros([r if u is None else u.shape[1] for r, u in zip(core.shape, new_factors)])
    augmented[old] = core - learning_rate * core_gradient(dense_gradient, factors)
    for mode, block in enumerate(blocks):
        if block is not None:
            augmented[(*old[:mode], slice(core.shape[mode], None), *old[mode + 1 :])] = block
    new_core, bases = truncate(augmented, tau, whole, spare, criterion)
    return new_core, [None if new is None else new @ basis for new, basis in zip(new_factors, bases)]


# Dense training


def gradient_descent(weights, grad, learning_rate, steps):
    """``W <- W - h ∇L(W)``."""
    for _ in range(steps):
        weights = weights - learning_rate * grad(weights)
    return weights


def heavy_ball(weights, grad, learning_rate, momentum, steps):
    """``V <- beta V + ∇L(W)``, ``W <- W - h V``, the convention of ``optax.sgd(h, momentum=beta)``."""
    velocity = np.zeros_like(weights)
    for _ in range(steps):
        velocity = momentum * velocity + grad(weights)
        weights = weights - learning_rate * velocity
    return weights
