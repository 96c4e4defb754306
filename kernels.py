"""Log-probabilities, entropy and KL of the tokens that the policy wrote, without the wall of logits.

Every quantity of the paper's loss is a function of one row of logits x_1..x_V per response token: log pi(a), the
entropy of pi, the KL divergence to the reference. For a real model the rows are the problem: 8192 positions of a
vocabulary of 152k are 4.6 GiB in fp32, and the usual expression (`log_softmax`, `gather`, autograd) holds three or
four such tensors. More than half of those rows are prompt, padding or retrieved passages that the mask throws away.

So this file (1) drops masked rows BEFORE the product with the lm_head, (2) walks the vocabulary in slices and keeps
running statistics per row, so that nothing of size [N, V] ever exists, and (3) computes the gradient by one closed
formula, recomputing each slice, instead of storing what autograd would store.

    update_statistics   running max, sum, entropy and KL terms of each row, one vocabulary slice at a time
    slice_gradient      d(loss)/d(logits) of one slice, in closed form
    fused_logprob_kl           when the logits exist already
    fused_linear_logprob_kl    the training path: hidden states and the lm_head's weight in, no logits

Shapes: N rows (any leading shape is flattened), n rows left after masking, V vocabulary, c columns of a slice,
D hidden. Everything that is summed is summed in fp32, whatever the inputs are.

Derivation. With logits divided by the temperature T, m the row's maximum, s = sum e^{(x-m)/T}, p = e^{(x-m)/T} / s,
y the reference's logits with maximum n and sum z:

    log p_a = (x_a - m)/T - ln s                                 d log p_a / dx_j = (1[j=a] - p_j) / T
    H       = ln s - sum e^{(x-m)/T} (x-m)/T / s                 d H       / dx_j = -p_j (ln p_j + H) / T
    KL(p|q) = sum p_j ((x_j-m) - (y_j-n))/T - ln s + ln z        d KL      / dx_j =  p_j (ln p_j - ln q_j - KL) / T

Differences (x - m) are kept, never the log-sum-exp itself: for logits near 1e4, `x - logsumexp` loses three digits.

    python -m pytest -q tests/test_kernels.py
"""

from typing import NamedTuple

import torch

IGNORE_INDEX = -100  # a target of -100 is a masked row, as in torch's cross_entropy
LOWEST = -1e30  # stands for -inf where inf - inf would be NaN: e^{-1e30} is exactly 0 and 0 * -1e30 is 0
SLICE_ELEMENTS = 2**24  # default n * c of one slice: 64 MiB of fp32

HAVE_TRITON = False  # this file holds the PyTorch specification only; a Triton kernel would be compared against it


class LogprobKL(NamedTuple):
    """Four fp32 tensors in the shape of `target`; masked positions are exactly 0 and carry no gradient."""

    logp: torch.Tensor  # log pi(target), nats
    entropy: torch.Tensor  # H(pi), nats
    kl: torch.Tensor  # exact KL(pi || reference) over the whole vocabulary, nats; 0 without a reference
    ref_logp: torch.Tensor  # log pi_ref(target), nats, never differentiated; 0 without a reference


def interpreted():
    """True where Triton kernels would run in Triton's interpreter; there are none here, so False."""
    return False


# ----- 1. Statistics of a row, one slice at a time -----


def new_statistics(rows, with_reference, device):
    """Neutral start: maxima at LOWEST, sums at 0. fp32 [rows] each."""
    names = ["max", "sum", "moment", "target"] + (["ref_max", "ref_sum", "ref_moment", "ref_target"] if with_reference else [])
    return {name: torch.full((rows,), LOWEST if name.endswith("max") else 0.0, device=device) for name in names}


def differences(x_nc, max_n, temperature):
    """(x - max) / T as a new fp32 tensor, with LOWEST / T at the least, so that -inf times e^-inf is 0 and not NaN."""
    z_nc = (x_nc.float() - max_n[:, None]).clamp_min_(LOWEST)
    return z_nc if temperature == 1 else z_nc.div_(temperature)


def update_statistics(stats, x_nc, y_nc, target_n, first_column, temperature):
    """Take in the columns [first_column, first_column + c) of every row; returns this slice's share of `sum`, [n].

    x_nc, y_nc: logits of the policy and (or None) of the reference, [n, c], any float type. With z = (x - m)/T:
    sum = sum e^z, moment = sum e^z z, ref_moment = sum e^z (z - z_ref). When the maximum moves by `shift` (in units of
    T), sums are re-based, e^{z'} = e^z e^shift, and moments also gain sum * shift.
    """
    new_max = torch.maximum(stats["max"], x_nc.amax(1).float())
    shift = (stats["max"] - new_max) / temperature
    z_nc = differences(x_nc, new_max, temperature)
    e_nc = z_nc.exp()
    slice_sum = e_nc.sum(1)
    if y_nc is not None:
        new_ref_max = torch.maximum(stats["ref_max"], y_nc.amax(1).float())
        ref_shift = (stats["ref_max"] - new_ref_max) / temperature
        zy_nc = differences(y_nc, new_ref_max, temperature)
        stats["ref_sum"] = torch.exp(ref_shift) * stats["ref_sum"] + zy_nc.exp().sum(1)
        rebased = stats["ref_moment"] + stats["sum"] * (shift - ref_shift)
        stats["ref_moment"] = torch.exp(shift) * rebased + (e_nc * (z_nc - zy_nc)).sum(1)
        stats["ref_max"] = new_ref_max
    stats["moment"] = torch.exp(shift) * (stats["moment"] + stats["sum"] * shift) + e_nc.mul_(z_nc).sum(1)
    stats["sum"] = torch.exp(shift) * stats["sum"] + slice_sum
    stats["max"] = new_max
    column_n = target_n - first_column
    here = (column_n >= 0) & (column_n < x_nc.shape[1])
    column_n = column_n.clamp(0, x_nc.shape[1] - 1)[:, None]
    stats["target"] = torch.where(here, x_nc.gather(1, column_n)[:, 0].float(), stats["target"])
    if y_nc is not None:
        stats["ref_target"] = torch.where(here, y_nc.gather(1, column_n)[:, 0].float(), stats["ref_target"])
    return slice_sum


def finish_statistics(stats, temperature):
    """Statistics over the whole row -> (logp, entropy, kl, ref_logp), fp32 [n] each."""
    log_sum = torch.log(stats["sum"])
    logp = (stats["target"] - stats["max"]) / temperature - log_sum
    entropy = log_sum - stats["moment"] / stats["sum"]
    if "ref_max" not in stats:
        return logp, entropy, torch.zeros_like(logp), torch.zeros_like(logp)
    ref_log_sum = torch.log(stats["ref_sum"])
    kl = stats["ref_moment"] / stats["sum"] - log_sum + ref_log_sum
    return logp, entropy, kl, (stats["ref_target"] - stats["ref_max"]) / temperature - ref_log_sum


# ----- 2. The gradient of a slice, in closed form -----


def slice_gradient(x_nc, y_nc, target_n, first_column, max_n, log_sum_n, ref_max_n, weights, temperature):
    """d(loss)/dx [n, c] in fp32 from the upstream gradients of logp, entropy and KL.

    One expression serves all three, with z = (x - m)/T and z_ref likewise, b = g_logp + g_H (H - ln s) + g_KL (KL + ln s - ln s_ref):
        dx_j = [ g_logp 1[j=a] - p_j ( b + g_H z_j - g_KL (z_j - z_ref_j) ) ] / T
    `weights` is (g_logp, g_H, g_KL, b), each [n].
    """
    g_logp, g_entropy, g_kl, b = weights
    z_nc = differences(x_nc, max_n, temperature)
    p_nc = (z_nc - log_sum_n[:, None]).exp_()
    inner = b[:, None]
    if g_entropy.any():
        inner = inner + g_entropy[:, None] * z_nc
    if y_nc is not None:
        inner = inner - g_kl[:, None] * (z_nc - differences(y_nc, ref_max_n, temperature))
    dx_nc = p_nc.mul_(-inner / temperature)
    column_n = target_n - first_column
    rows = ((column_n >= 0) & (column_n < x_nc.shape[1])).nonzero()[:, 0]
    dx_nc[rows, column_n[rows]] += g_logp[rows] / temperature
    return dx_nc


# ----- 3. Both levels as one autograd function -----


def matmul_fp32(a, b):
    """a @ b with an fp32 result. Products of two bf16 numbers are exact in fp32, so this equals an fp32 head run on
    bf16 weights; rounding the logits to bf16 would cost up to 0.03 in a log-probability."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _RowsToLogprob(torch.autograd.Function):
    """Active rows only. `weight` None: `rows` are logits [n, V]; else `rows` are hidden states [n, D]."""

    @staticmethod
    def forward(ctx, rows, weight, ref_rows, ref_weight, target_n, temperature, chunk, tau):
        vocabulary = rows.shape[1] if weight is None else weight.shape[0]
        stats = new_statistics(len(rows), ref_rows is not None, rows.device)
        slices, maxima, sums = range(0, vocabulary, chunk), [], []
        for v in slices:
            x_nc, y_nc = _logits(rows, weight, v, chunk), _logits(ref_rows, ref_weight, v, chunk)
            sums.append(update_statistics(stats, x_nc, y_nc, target_n, v, temperature))
            maxima.append(stats["max"])
        outputs = finish_statistics(stats, temperature)
        # Probability mass of each slice, [slices, n]: what the backward pass may skip.
        mass = torch.stack(sums) * torch.exp((torch.stack(maxima) - stats["max"]) / temperature) / stats["sum"]
        ref_max, ref_sum = (stats["ref_max"], stats["ref_sum"]) if ref_rows is not None else (None, None)
        ctx.save_for_backward(
            rows, weight, ref_rows, ref_weight, target_n, mass, stats["max"], stats["sum"], ref_max, ref_sum, outputs[1], outputs[2]
        )
        ctx.temperature, ctx.chunk, ctx.tau, ctx.slices = temperature, chunk, tau, slices
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    def backward(ctx, g_logp, g_entropy, g_kl, _):
        rows, weight, ref_rows, ref_weight, target_n, mass, max_n, sum_n, ref_max, ref_sum, entropy, kl = ctx.saved_tensors
        log_sum_n = torch.log(sum_n)
        b = g_logp + g_entropy * (entropy - log_sum_n)
        if ref_rows is not None:
            b = b + g_kl * (kl + log_sum_n - torch.log(ref_sum))
        wanted = (g_logp != 0) | (g_entropy != 0) | (g_kl != 0)  # a row without upstream gradient costs nothing
        d_rows = torch.zeros_like(rows, dtype=torch.float32)
        d_weight = torch.zeros_like(weight) if weight is not None and ctx.needs_input_grad[1] else None
        for k, v in enumerate(ctx.slices):
            live = wanted & ((mass[k] > ctx.tau) | ((target_n >= v) & (target_n < v + ctx.chunk)))
            live = live.nonzero()[:, 0]
            pick = lambda t: None if t is None else t[live]
            x_nc, y_nc = _logits(rows[live], weight, v, ctx.chunk), _logits(pick(ref_rows), ref_weight, v, ctx.chunk)
            weights = (g_logp[live], g_entropy[live], g_kl[live], b[live])
            dx_nc = slice_gradient(
                x_nc, y_nc, target_n[live], v, max_n[live], log_sum_n[live], pick(ref_max), weights, ctx.temperature
            )
            if weight is None:
                d_rows[live, v : v + ctx.chunk] = dx_nc
                continue
            dx_nc, w_cD = dx_nc.to(rows.dtype), weight[v : v + ctx.chunk]
            d_rows.index_add_(0, live, matmul_fp32(dx_nc, w_cD))
            if d_weight is not None:  # each slice of the weight's gradient is written once, by one product
                d_weight[v : v + ctx.chunk] = matmul_fp32(dx_nc.T, rows[live]).to(weight.dtype)
        return d_rows.to(rows.dtype), d_weight, None, None, None, None, None, None


def _logits(rows, weight, v, chunk):
    """Columns [v, v + chunk) of the logits of `rows`, or None where there are no rows (no reference)."""
    if rows is None:
        return None
    return rows[:, v : v + chunk] if weight is None else matmul_fp32(rows, weight[v : v + chunk].T)


def _run(rows, weight, ref_rows, ref_weight, target, mask, temperature, chunk, tau, impl):
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl={impl!r}: this file has the PyTorch implementation; use 'auto' or 'torch'")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    vocabulary = rows.shape[-1] if weight is None else weight.shape[0]
    active = target.reshape(-1) != IGNORE_INDEX
    if mask is not None:
        active = active & (mask.reshape(-1) != 0)
    # Masked rows are selected away, never multiplied by 0: 0 * NaN is NaN, and a leak there is silent.
    index = active.nonzero()[:, 0]
    target_n = target.reshape(-1)[index]
    if len(index) and (target_n.min() < 0 or target_n.max() >= vocabulary):
        raise ValueError(f"target {int(target_n.min())}..{int(target_n.max())} outside the vocabulary of {vocabulary}")
    select = lambda t: None if t is None else t.reshape(-1, t.shape[-1])[index]
    chunk = chunk or max(1, min(vocabulary, SLICE_ELEMENTS // max(1, len(index))))
    ref_rows = None if ref_rows is None else select(ref_rows).detach()
    outputs = _RowsToLogprob.apply(select(rows), weight, ref_rows, ref_weight, target_n, temperature, chunk, tau)
    flat = [torch.zeros(target.numel(), device=rows.device).index_copy(0, index, output) for output in outputs]
    return LogprobKL(*(f.view(target.shape) for f in flat))


# ----- 4. The two entrances -----


def fused_logprob_kl(logits, target, mask=None, ref_logits=None, temperature=1.0, impl="auto"):
    """Log-prob of `target`, entropy and exact KL from logits that exist already.

    logits      [..., V] float; the row at a position scores the token in `target` at that position
    target      [...] long; -100 is the same as mask 0
    mask        [...] bool or 0/1, or None for all rows
    ref_logits  [..., V] of the frozen reference, or None
    Returns LogprobKL, fp32 [...]. ValueError on a temperature <= 0, an unknown impl, a target outside the vocabulary.
    """
    return _run(logits, None, ref_logits, None, target, mask, temperature, None, 0.0, impl)


def fused_linear_logprob_kl(
    hidden, weight, target, mask=None, ref_hidden=None, ref_weight=None, temperature=1.0, chunk=None, tau=0.0, impl="auto"
):
    """The same four numbers from hidden states [..., D] and the lm_head's weight [V, D]; logits never exist as a whole.

    ref_hidden, ref_weight   of the frozen reference, both or neither; costs one more product per slice
    chunk                    vocabulary columns of a slice; None picks as many as fit into 64 MiB
    tau                      the backward pass skips (row, slice) pairs whose probability is <= tau. 0 skips only what
                             underflowed to 0 and is lossless. A row of dlogits is off by at most |g_logp| * tau *
                             ceil(V / chunk) in L1 norm (for entropy and KL times |ln p + H| and |ln p/q - KL|)
    Gradients reach `hidden` and, unless it is frozen, `weight`. Errors as in fused_logprob_kl.
    """
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight belong together: give both or neither")
    return _run(hidden, weight, ref_hidden, ref_weight, target, mask, temperature, chunk, tau, impl)
