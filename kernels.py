"""Log-probabilities, entropy and KL of the tokens that the policy wrote, without the wall of logits.

Every quantity of the paper's loss is a function of one row of logits x_1..x_V per response token: log pi(a), the
entropy of pi, the KL divergence to the reference. For a real model the rows are the problem, not the weights. One copy
of 8192 rows of Qwen's vocabulary is 8192 * 151936 * 4 bytes = 4.6 GiB in fp32, and the usual expression (`log_softmax`,
`gather`, autograd) holds three at its peak, 14 GiB: the result that it saved, the gradient of that, and the gradient of
the logits. More than half of those rows are prompt, padding or retrieved passages, which the mask throws away.

So this file (1) drops masked rows BEFORE the product with the lm_head, (2) walks the vocabulary in slices and keeps
running statistics per row, so that nothing of size [N, V] ever exists, and (3) computes the gradient by one closed
formula, making each slice of logits a second time instead of storing what autograd would store. What remains at that
size, with 45 % of the rows active: 64 MiB for a slice, 32 for its gradient in bf16, about 90 for the hidden states
and their gradient. The gradient of the lm_head's weight, if it is trained, is 594 MiB with any method.

    1. derivation, state of a row
    2. statistics      statistics_twin, statistics_kernel    what a row's state gains from one slice of logits
    3. gradient        gradient_twin, gradient_kernel        d(loss)/d(logits) of one slice, in closed form
    4. one autograd function for both levels
    5. the entrances   fused_logprob_kl            logits exist already
                       fused_linear_logprob_kl     the training path: hidden states and the lm_head's weight, no logits
    6. a table         python kernels.py

A twin is the kernel in PyTorch: the specification, and what runs on a CPU. Twin and kernel are each tested against
float64, never only against each other. Matrix products are cuBLAS's: only what surrounds them is worth writing by hand.

Shapes: N rows (any leading shape is flattened), n rows left after masking, V vocabulary, c columns of a slice,
D hidden, K slices. Everything that is summed is summed in fp32, whatever the inputs are.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the twins do everything there
    triton = None

HAVE_TRITON = triton is not None
IGNORE_INDEX = -100  # a target of -100 is a masked row, as in torch's cross_entropy
LOWEST = -1e30  # stands for -inf where inf - inf would be NaN: e^{-1e30} is exactly 0 and 0 * -1e30 is 0
# Columns a program works on at a time, and its warps of 32 threads: 2048 / 128 = 16 numbers in each thread's registers.
BLOCK, WARPS = 2048, 4
# A slice of fp32 logits: large enough that a GPU's product is efficient, small enough to be no memory to speak of. On
# a CPU it should rather stay in the cache.
SLICE_BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}


class LogprobKL(NamedTuple):
    """Four fp32 tensors in the shape of `target`; masked positions are exactly 0 and carry no gradient."""

    logp: torch.Tensor  # log pi(target), nats
    entropy: torch.Tensor  # H(pi), nats
    kl: torch.Tensor  # exact KL(pi || reference) over the whole vocabulary, nats; 0 without a reference
    ref_logp: torch.Tensor  # log pi_ref(target), nats, never differentiated; 0 without a reference


def interpreted():
    """True if the kernels run in Triton's interpreter, on any machine, slowly: TRITON_INTERPRET=1 was set before this
    file was imported (the variable is read where a kernel is defined, not where it is launched)."""
    return HAVE_TRITON and not isinstance(statistics_kernel, triton.runtime.JITFunction)


# ----- 1. What is computed, and the state of a row -----
#
# Logits are divided by the temperature T. With m the row's maximum, z_j = (x_j - m)/T and s = sum_j e^{z_j}, so that
# p_j = e^{z_j} / s; for the reference's logits y likewise with maximum my, zy and sy, so that q_j = e^{zy_j} / sy:
#
#     log p_a = z_a - ln s                                          u = sum_j e^{z_j} z_j
#     H       = -sum p ln p        = ln s - u/s                     w = sum_j e^{z_j} (z_j - zy_j)
#     KL      = sum p (ln p - ln q) = w/s - ln s + ln sy
#
# m, s, u, w, my, sy and the logits of the target x_a, y_a are the state: eight numbers a row, however long the row is.
# They are gathered in one pass, as the maximum is not known before the end: when it moves from m to m', everything is
# re-based by e^{z'} = e^z e^shift, with shift = (m - m')/T and shift_y likewise [online softmax: Milakov, Gimelshein 2018]:
#
#     s' = e^shift s        u' = e^shift (u + s shift)        w' = e^shift (w + s (shift - shift_y))
#
# Differences to the maximum are kept, never the log-sum-exp lse = m/T + ln s: for logits near 1e4, `x - lse` subtracts
# two fp32 numbers that are rounded at 1e-3. For the same reason u and w are sums of differences.
#
# Gradient. From dp_i/dx_j = p_i (1[i=j] - p_j) / T:
#
#     d log p_a / dx_j = (1[j=a] - p_j) / T
#     d H       / dx_j = -p_j (ln p_j + H) / T                      (-sum_i dp_i = 0: the "+1" of (p ln p)' drops out)
#     d KL      / dx_j =  p_j (ln p_j - ln q_j - KL) / T            (the reference is frozen)
#
# With ln p_j = z_j - ln s and g_logp, g_H, g_KL from above in the graph, one expression serves all three:
#
#     dx_j = [ g_logp 1[j=a] - p_j ( b + g_H z_j - g_KL (z_j - zy_j) ) ] / T
#     b    = g_logp + g_H (H - ln s) + g_KL (KL + ln s - ln sy)     one number a row
#
# A masked row is never read: rows are selected by index, not multiplied by the mask, since 0 * NaN is NaN.


def new_state(n, device):
    """The neutral state, fp32 [8, n]: rows m, s, u, x_a, my, sy, w, y_a. Maxima start at LOWEST, not at -inf."""
    return torch.tensor([LOWEST, 0, 0, 0, LOWEST, 0, 0, 0], device=device)[:, None].repeat(1, n)


def finish_state(state, temperature, with_reference):
    """State over the whole vocabulary [8, n] -> (logp, entropy, kl, ref_logp), fp32 [n] each."""
    m, s, u, x_a, my, sy, w, y_a = state
    logp, entropy = (x_a - m) / temperature - torch.log(s), torch.log(s) - u / s
    if not with_reference:
        return logp, entropy, torch.zeros_like(s), torch.zeros_like(s)
    return logp, entropy, w / s - torch.log(s) + torch.log(sy), (y_a - my) / temperature - torch.log(sy)


# ----- 2. Statistics of one slice: the twin, the kernel -----


def differences(x_nc, m_n, temperature):
    """z = (x - m) / T as a new fp32 tensor, LOWEST at the least, so that a logit of -inf gives e^z z = 0 and not NaN."""
    z_nc = x_nc.float() - m_n[:, None]
    return (z_nc if temperature == 1 else z_nc.div_(temperature)).clamp_min_(LOWEST)


def statistics_twin(x_Rc, y_Rc, rows_n, target_n, state, share, first_column, temperature):
    """Take the columns [first_column, first_column + c) of the active rows into their state.

    x_Rc, y_Rc   logits of the policy and of the reference (or None), [R, c], any float type
    rows_n       int64 [n], the active rows of x and y, or None for all of them
    target_n     int64 [n], the target's column in the whole vocabulary
    state        fp32 [8, n] as in new_state, changed in place
    share        fp32 [2, n], written: the maximum so far, and this slice's part of s relative to it
    """
    m, s, u, x_a, my, sy, w, y_a = state
    pick = lambda t_Rc: t_Rc if rows_n is None else t_Rc[rows_n]
    x_nc = pick(x_Rc)
    share[0] = torch.maximum(m, x_nc.amax(1).float())
    shift = (m - share[0]) / temperature
    z_nc = differences(x_nc, share[0], temperature)
    e_nc = z_nc.exp()
    share[1] = e_nc.sum(1)
    column_n = target_n - first_column
    here = (column_n >= 0) & (column_n < x_nc.shape[1])
    column_n = column_n.clamp(0, x_nc.shape[1] - 1)[:, None]
    x_a.copy_(torch.where(here, x_nc.gather(1, column_n)[:, 0].float(), x_a))
    if y_Rc is not None:
        y_nc = pick(y_Rc)
        new_my = torch.maximum(my, y_nc.amax(1).float())
        shift_y = (my - new_my) / temperature
        zy_nc = differences(y_nc, new_my, temperature)
        sy.copy_(torch.exp(shift_y) * sy + zy_nc.exp().sum(1))
        w.copy_(torch.exp(shift) * (w + s * (shift - shift_y)) + (e_nc * (z_nc - zy_nc)).sum(1))
        y_a.copy_(torch.where(here, y_nc.gather(1, column_n)[:, 0].float(), y_a))
        my.copy_(new_my)
    u.copy_(torch.exp(shift) * (u + s * shift) + e_nc.mul_(z_nc).sum(1))
    s.copy_(torch.exp(shift) * s + share[1])
    m.copy_(share[0])


if HAVE_TRITON:
    # A kernel is compiled anew for each combination of its constants and of some properties of its integers (is it
    # divisible by 16?). How many rows are active changes from batch to batch and must not recompile anything.
    jit = triton.jit(do_not_specialize=["n", "first_column"])
    LOWEST_IN_KERNEL = tl.constexpr(LOWEST)

    @jit
    def statistics_kernel(
        x_ptr,  # logits of the policy [R, c], fp32, bf16 or fp16; a row starts every x_stride elements
        y_ptr,  # logits of the reference [R, c], or None: then all that concerns it is not even compiled
        rows_ptr,  # int64 [n], or None
        target_ptr,  # int64 [n]
        state_ptr,  # fp32 [8, n]
        share_ptr,  # fp32 [2, n]
        x_stride,
        y_stride,
        n,
        columns,
        first_column,
        inverse_T,
        BLOCK: tl.constexpr,
    ):
        """One program a row: it walks the row's c columns, BLOCK at a time, and keeps the state in registers."""
        i = tl.program_id(0)
        # int64 before the product: row 30000 of 152k columns starts beyond 2^31.
        row = i.to(tl.int64) if rows_ptr is None else tl.load(rows_ptr + i)
        x_ptr += row * x_stride
        state_ptr += i
        m_before, s_before, u_before = tl.load(state_ptr), tl.load(state_ptr + n), tl.load(state_ptr + 2 * n)
        m, s, u = m_before, 0.0, 0.0  # s, u, w of this slice alone; the state joins them at the end
        if y_ptr is not None:
            y_ptr += row * y_stride
            my_before, sy_before, w_before = tl.load(state_ptr + 4 * n), tl.load(state_ptr + 5 * n), tl.load(state_ptr + 6 * n)
            my, sy, w = my_before, 0.0, 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            # A column past the end reads as -inf, which is probability 0. Arithmetic is fp32 from here on.
            x = tl.load(x_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, 0))
            shift = (m - m_new) * inverse_T
            z = tl.maximum((x - m_new) * inverse_T, LOWEST_IN_KERNEL)
            e = tl.exp(z)
            if y_ptr is not None:
                y = tl.load(y_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
                my_new = tl.maximum(my, tl.max(y, 0))
                shift_y = (my - my_new) * inverse_T
                zy = tl.maximum((y - my_new) * inverse_T, LOWEST_IN_KERNEL)
                sy = tl.exp(shift_y) * sy + tl.sum(tl.exp(zy), 0)
                w = tl.exp(shift) * (w + s * (shift - shift_y)) + tl.sum(e * (z - zy), 0)
                my = my_new
            u = tl.exp(shift) * (u + s * shift) + tl.sum(e * z, 0)
            s = tl.exp(shift) * s + tl.sum(e, 0)
            m = m_new
        # The state of the slices before this one, re-based once, plus this slice.
        tl.store(share_ptr + i, m)
        tl.store(share_ptr + n + i, s)
        shift = (m_before - m) * inverse_T
        if y_ptr is not None:
            shift_y = (my_before - my) * inverse_T
            w += tl.exp(shift) * (w_before + s_before * (shift - shift_y))
            sy += tl.exp(shift_y) * sy_before
            tl.store(state_ptr + 4 * n, my)
            tl.store(state_ptr + 5 * n, sy)
            tl.store(state_ptr + 6 * n, w)
        u += tl.exp(shift) * (u_before + s_before * shift)
        s += tl.exp(shift) * s_before
        tl.store(state_ptr, m)
        tl.store(state_ptr + n, s)
        tl.store(state_ptr + 2 * n, u)
        # The target lies in one slice only: in the others nothing is loaded and nothing stored.
        column_a = tl.load(target_ptr + i) - first_column
        here = (column_a >= 0) & (column_a < columns)
        tl.store(state_ptr + 3 * n, tl.load(x_ptr + column_a, mask=here, other=0.0).to(tl.float32), mask=here)
        if y_ptr is not None:
            tl.store(state_ptr + 7 * n, tl.load(y_ptr + column_a, mask=here, other=0.0).to(tl.float32), mask=here)


def add_statistics(x_Rc, y_Rc, rows_n, target_n, state, share, first_column, temperature, use_triton):
    """statistics_kernel or its twin; arguments as in statistics_twin."""
    if not use_triton:
        return statistics_twin(x_Rc, y_Rc, rows_n, target_n, state, share, first_column, temperature)
    n, y_stride = len(target_n), 0 if y_Rc is None else y_Rc.stride(0)
    with torch.cuda.device_of(x_Rc):  # Triton launches on the current GPU, which need not be the tensor's
        statistics_kernel[(n,)](
            x_Rc, y_Rc, rows_n, target_n, state, share, x_Rc.stride(0), y_stride, n, x_Rc.shape[1], first_column,
            1 / temperature, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


# ----- 3. Gradient of one slice: the twin, the kernel -----


def gradient_twin(x_Rc, y_Rc, rows_n, target_n, numbers, out_Rc, first_column, temperature):
    """Write d(loss)/d(logits) of one slice into the active rows of out_Rc (any float type); other arguments as above.

    numbers   fp32 [7, n], what a row needs: m, ln s, b, g_logp, g_H, my, g_KL
    """
    m, log_s, b, g_logp, g_entropy, my, g_kl = numbers
    pick = lambda t_Rc: t_Rc if rows_n is None else t_Rc[rows_n]
    z_nc = differences(pick(x_Rc), m, temperature)
    p_nc = (z_nc - log_s[:, None]).exp_()
    inner = b[:, None]
    if g_entropy.any():
        inner = inner + g_entropy[:, None] * z_nc
    if y_Rc is not None:
        inner = inner - g_kl[:, None] * (z_nc - differences(pick(y_Rc), my, temperature))
    dx_nc = p_nc.mul_(-inner / temperature)
    column_n = target_n - first_column
    here = ((column_n >= 0) & (column_n < dx_nc.shape[1])).nonzero()[:, 0]
    dx_nc[here, column_n[here]] += g_logp[here] / temperature
    out_Rc[slice(None) if rows_n is None else rows_n] = dx_nc.to(out_Rc.dtype)


if HAVE_TRITON:

    @jit
    def gradient_kernel(
        x_ptr,  # logits [R, c]
        y_ptr,  # [R, c] or None
        rows_ptr,  # int64 [n] or None
        target_ptr,  # int64 [n]
        numbers_ptr,  # fp32 [7, n]
        out_ptr,  # [R, c] without gaps, any float type
        x_stride,
        y_stride,
        n,
        columns,
        first_column,
        inverse_T,
        BLOCK: tl.constexpr,
    ):
        """One program for BLOCK columns of a row: the statistics are known, so no column waits for another."""
        i = tl.program_id(0)
        row = i.to(tl.int64) if rows_ptr is None else tl.load(rows_ptr + i)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        numbers_ptr += i
        m, log_s, b = tl.load(numbers_ptr), tl.load(numbers_ptr + n), tl.load(numbers_ptr + 2 * n)
        g_logp, g_entropy = tl.load(numbers_ptr + 3 * n), tl.load(numbers_ptr + 4 * n)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.maximum((x - m) * inverse_T, LOWEST_IN_KERNEL)
        inner = b + g_entropy * z
        if y_ptr is not None:
            my, g_kl = tl.load(numbers_ptr + 5 * n), tl.load(numbers_ptr + 6 * n)
            y = tl.load(y_ptr + row * y_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
            zy = tl.maximum((y - my) * inverse_T, LOWEST_IN_KERNEL)
            inner -= g_kl * (z - zy)
        is_target = column + first_column == tl.load(target_ptr + i)
        dx = (tl.where(is_target, g_logp, 0.0) - tl.exp(z - log_s) * inner) * inverse_T
        tl.store(out_ptr + row * columns + column, dx, mask=inside)


def write_gradient(x_Rc, y_Rc, rows_n, target_n, numbers, out_Rc, first_column, temperature, use_triton):
    """gradient_kernel or its twin; arguments as in gradient_twin."""
    if not use_triton:
        return gradient_twin(x_Rc, y_Rc, rows_n, target_n, numbers, out_Rc, first_column, temperature)
    n, columns, y_stride = len(target_n), x_Rc.shape[1], 0 if y_Rc is None else y_Rc.stride(0)
    with torch.cuda.device_of(x_Rc):
        gradient_kernel[(n, triton.cdiv(columns, BLOCK))](
            x_Rc, y_Rc, rows_n, target_n, numbers, out_Rc, x_Rc.stride(0), y_stride, n, columns, first_column,
            1 / temperature, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


# ----- 4. Both levels as one autograd function -----


def matmul_fp32(a, b):
    """a @ b with an fp32 result. Products of two bf16 numbers are exact in fp32, so this equals an fp32 head run on
    bf16 weights; rounding the logits to bf16 would cost up to 0.03 in a log-probability."""
    with torch.autocast(a.device.type, enabled=False):  # which would round the inputs, or the result, to bf16 again
        b = b.to(a.dtype)  # fp32 master weights under bf16 hidden states: only a slice of them is ever converted
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def slice_of_logits(rows, weight, index_n, v, chunk):
    """Columns [v, v + chunk) of the active rows: (logits, which of their rows are active or None for all)."""
    if rows is None:  # no reference
        return None, None
    if weight is None:
        return rows[:, v : v + chunk], index_n  # a view: masked rows stay where they are and are not read
    return matmul_fp32(rows[index_n], weight[v : v + chunk].T), None


class RowsToLogprob(torch.autograd.Function):
    """The active rows index_n of `rows` -> (logp, entropy, kl, ref_logp) [n]. Rows are logits [N, V] with weight None,
    or hidden states [N, D] with the lm_head's weight [V, D]."""

    @staticmethod
    def forward(ctx, rows, weight, ref_rows, ref_weight, index_n, target_n, temperature, chunk, tau, use_triton):
        vocabulary, n = rows.shape[1] if weight is None else weight.shape[0], len(index_n)
        starts = range(0, vocabulary, chunk)
        state = new_state(n, rows.device)
        share = torch.empty(len(starts), 2, n, device=rows.device)
        for k, v in enumerate(starts if n else ()):  # a grid of no programs cannot be launched
            x, active = slice_of_logits(rows, weight, index_n, v, chunk)
            y, _ = slice_of_logits(ref_rows, ref_weight, index_n, v, chunk)
            add_statistics(x, y, active, target_n, state, share[k], v, temperature, use_triton)
        outputs = finish_state(state, temperature, ref_rows is not None)
        # Probability that a row gives to each slice, [K, n]: what the backward pass may skip.
        mass_Kn = share[:, 1] * torch.exp((share[:, 0] - state[0]) / temperature) / state[1]
        ctx.save_for_backward(rows, weight, ref_rows, ref_weight, index_n, target_n, state, mass_Kn, outputs[1], outputs[2])
        ctx.settings = temperature, chunk, tau, use_triton, starts
        ctx.mark_non_differentiable(outputs[3])
        ctx.set_materialize_grads(False)  # an output that the loss does not use has the gradient None
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, g_kl, _):
        rows, weight, ref_rows, ref_weight, index_n, target_n, state, mass_Kn, entropy, kl = ctx.saved_tensors
        temperature, chunk, tau, use_triton, starts = ctx.settings
        m, s, _, _, my, sy, _, _ = state
        if g_kl is None:
            ref_rows = None  # the reference's logits matter to the gradient of the KL only
        g_logp, g_entropy, g_kl = (torch.zeros_like(s) if g is None else g for g in (g_logp, g_entropy, g_kl))
        b = g_logp + g_entropy * (entropy - torch.log(s))
        if ref_rows is not None:
            b = b + g_kl * (kl + torch.log(s) - torch.log(sy))
        numbers = torch.stack([m, torch.log(s), b, g_logp, g_entropy, my, g_kl])
        # A row costs nothing without a gradient from above, and nothing in a slice where it has no probability.
        wanted_n = (g_logp != 0) | (g_entropy != 0) | (g_kl != 0)
        own_Kn = target_n // chunk == torch.arange(len(starts), device=rows.device)[:, None]
        live_Kn = wanted_n & ((mass_Kn > tau) | own_Kn)
        live = live_Kn.nonzero()[:, 1].split(live_Kn.sum(1).tolist())  # the only place that waits for the GPU
        # Level 1 writes into the rows of the result; level 2 sums n rows in fp32 over the slices: adding K slices up in
        # bf16 would round K times.
        d_rows = rows.new_zeros(rows.shape) if weight is None else torch.zeros(len(index_n), rows.shape[1], device=rows.device)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for v, live_n in zip(starts, live):
            if not len(live_n):
                continue
            x, active = slice_of_logits(rows, weight, index_n[live_n], v, chunk)
            y, _ = slice_of_logits(ref_rows, ref_weight, index_n[live_n], v, chunk)
            dx = d_rows[:, v : v + chunk] if weight is None else torch.empty_like(x, dtype=rows.dtype)
            write_gradient(x, y, active, target_n[live_n], numbers[:, live_n], dx, v, temperature, use_triton)
            if weight is None:
                continue
            if ctx.needs_input_grad[0]:
                d_rows.index_add_(0, live_n, matmul_fp32(dx, weight[v : v + chunk]))
            if d_weight is not None:  # each slice of the weight's gradient is written once, by one product
                d_weight[v : v + chunk] = matmul_fp32(dx.T, rows[index_n[live_n]]).to(weight.dtype)
        if weight is not None:
            d_rows = torch.zeros_like(rows).index_copy_(0, index_n, d_rows.to(rows.dtype))
        return d_rows, d_weight, None, None, None, None, None, None, None, None


def resolve_impl(impl, tensor):
    """'auto' -> the kernels where they are compiled for the tensor's GPU, the twins everywhere else. ValueError for an
    impl that does not exist or cannot run."""
    if impl == "auto":
        return HAVE_TRITON and tensor.is_cuda and not interpreted()
    if impl not in ("triton", "torch"):
        raise ValueError(f"impl={impl!r}: must be 'auto', 'triton' or 'torch'")
    if impl == "triton" and not HAVE_TRITON:
        raise ValueError("impl='triton': the package triton is not installed; use 'auto' or 'torch'")
    if impl == "triton" and not (tensor.is_cuda or interpreted()):
        raise ValueError(
            f"impl='triton' with a tensor on {tensor.device}: needs a GPU, or TRITON_INTERPRET=1 set before kernels is imported"
        )
    return impl == "triton"


def run(rows, weight, ref_rows, ref_weight, target, mask, temperature, chunk, tau, impl):
    """Check, flatten, select the active rows, compute, and put the results back in the shape of `target`."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if rows.shape[:-1] != target.shape or (mask is not None and mask.shape != target.shape):
        shapes = f"rows {list(rows.shape)}, target {list(target.shape)}, mask {None if mask is None else list(mask.shape)}"
        raise ValueError(f"shapes do not match: {shapes}; rows need one more dimension than target, mask the same")
    if ref_rows is not None and ref_rows.shape[:-1] != target.shape:
        raise ValueError(f"the reference's rows {list(ref_rows.shape)} do not match target {list(target.shape)}")
    vocabulary = rows.shape[-1] if weight is None else weight.shape[0]
    active = target != IGNORE_INDEX if mask is None else (target != IGNORE_INDEX) & (mask != 0)
    index_n = active.reshape(-1).nonzero()[:, 0]
    target_n = target.reshape(-1)[index_n]
    if len(index_n) and (target_n.min() < 0 or target_n.max() >= vocabulary):
        raise ValueError(f"target {int(target_n.min())}..{int(target_n.max())} outside the vocabulary of {vocabulary}")
    # PITFALL: `logits[:, :-1]` is not contiguous, and to flatten it copies [N, V]. Shift target and mask instead.
    flat = lambda t: None if t is None else t.reshape(-1, t.shape[-1])
    rows, ref_rows = flat(rows), flat(ref_rows)
    use_triton = resolve_impl(impl, rows)
    if use_triton and weight is None:  # a program reads its row side by side
        rows, ref_rows = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (rows, ref_rows))
        chunk = vocabulary  # and all of it, in one launch
    chunk = chunk or default_chunk(len(index_n), vocabulary, rows.device.type)
    outputs = RowsToLogprob.apply(rows, weight, ref_rows, ref_weight, index_n, target_n, temperature, chunk, tau, use_triton)
    full = (torch.zeros(target.numel(), device=rows.device).index_copy(0, index_n, output) for output in outputs)
    return LogprobKL(*(f.view(target.shape) for f in full))


def default_chunk(n, vocabulary, device_type):
    """Columns of a slice: as many as fit into SLICE_BYTES at 4 n bytes each, whole blocks where it is more than one."""
    columns = SLICE_BYTES.get(device_type, SLICE_BYTES["cpu"]) // (4 * max(1, n))
    return min(vocabulary, max(1, columns // BLOCK * BLOCK or columns))


# ----- 5. The two entrances -----


def fused_logprob_kl(logits, target, mask=None, ref_logits=None, temperature=1.0, impl="auto"):
    """Log-prob of `target`, entropy and exact KL from logits that exist already.

    logits      [..., V] float; the row at a position scores the token in `target` at that position
    target      [...] long; -100 is the same as mask 0
    mask        [...] bool or 0/1, or None for all rows
    ref_logits  [..., V] of the frozen reference, or None
    Returns LogprobKL, fp32 [...]. ValueError on a temperature <= 0, an unknown impl, a target outside the vocabulary.
    """
    return run(logits, None, ref_logits, None, target, mask, temperature, None, 0.0, impl)


def fused_linear_logprob_kl(
    hidden, weight, target, mask=None, ref_hidden=None, ref_weight=None, temperature=1.0, chunk=None, tau=0.0, impl="auto"
):
    """The same four numbers from hidden states [..., D] and the lm_head's weight [V, D]; logits never exist as a whole.

    ref_hidden, ref_weight   of the frozen reference, both or neither; costs one more product per slice
    chunk                    vocabulary columns of a slice; None: SLICE_BYTES decides
    tau                      the backward pass skips (row, slice) pairs whose probability is <= tau. 0 skips only what
                             underflowed to 0 and is lossless. Otherwise a row of dlogits is off, in L1 norm, by at most
                             |g_logp| * tau * ceil(V / chunk) / T, where g_logp is the gradient from above (for entropy
                             and KL times the largest |ln p + H| or |ln p - ln q - KL| of what is skipped)
    Gradients reach `hidden` and, unless it is frozen, `weight`. Errors as in fused_logprob_kl.
    """
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight belong together: give both or neither")
    return run(hidden, weight, ref_hidden, ref_weight, target, mask, temperature, chunk, tau, impl)


# ----- 6. A table: python kernels.py -----


def eager_logprob(hidden, weight, target, mask, temperature=1.0):
    """What everyone writes first: all rows through the lm_head, log_softmax, gather. Returns the log-probs only."""
    logits = (hidden @ weight.T).float() / temperature
    logp = torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
    return torch.where(mask, logp, 0.0)


def example(n, vocabulary, dim, active=0.45, peak=15.0, dtype=torch.float32, device="cpu"):
    """Synthetic (hidden [n, dim], weight [vocabulary, dim], target [n], mask [n]); the first two ask for gradients.

    The logits of a row are N(0, 1), but for the target's, which stands higher: by 0 to 2 * peak, evenly spread over the
    rows. With a vocabulary of 152k a target 8 above has a probability of 0.01, 15 above 0.9; with peak 0 the policy is flat.
    """
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocabulary, dim, generator=g, device=device) / dim**0.5
    target = torch.randint(vocabulary, (n,), generator=g, device=device)
    height = 2 * peak * torch.rand(n, 1, generator=g, device=device)
    hidden = torch.randn(n, dim, generator=g, device=device) + height * weight[target]
    mask = torch.rand(n, generator=g, device=device) < active
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, mask


def float64_logprob(hidden, weight, target, rows):
    """log-probs of some rows in float64, the expression of eager_logprob; the yardstick of every error."""
    logits = hidden.detach()[rows].double() @ weight.detach().double().T
    return torch.log_softmax(logits, -1).gather(-1, target[rows, None])[:, 0]


def seconds(call, device, repeats=3):
    """Median seconds of call() after a warm-up; on a GPU by its own clock and with its L2 cache flushed before."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # 256 MiB: more than any L2
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory(call, device):
    """The most bytes that call() held at once, beyond what was there before: by the CUDA allocator's own count, or by
    adding up every allocation and release that torch's profiler saw on the CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(itertools.accumulate(changes, initial=0))


def backward_of(logprob, arguments):
    """A call that takes the gradient of -sum(log-probs) and throws it away again."""
    hidden, weight = arguments[:2]

    def call():
        hidden.grad = weight.grad = None
        (-logprob(*arguments).sum()).backward()
        hidden.grad = weight.grad = None

    return call


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, vocabulary, dim, dtype = (8192, 151936, 2048, torch.bfloat16) if device == "cuda" else (4096, 32768, 256, torch.float32)
    arguments = example(n, vocabulary, dim, dtype=dtype, device=device)
    rows = arguments[3].nonzero()[:64, 0]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; N {n}, V {vocabulary}, D {dim}, {dtype}, {int(arguments[3].sum())} rows active")
    print(f"{'log-probs of the target':26}{'forward':>10}{'+ backward':>12}{'peak MiB':>10}{'error':>10}")
    ours = lambda impl: lambda *a: fused_linear_logprob_kl(*a, impl=impl).logp
    for title, logprob in {
        "ours, Triton": ours("triton"),
        "ours, PyTorch twin": ours("torch"),
        "eager, all rows": eager_logprob,
    }.items():
        if title == "ours, Triton" and (device == "cpu" or interpreted()):
            print(f"{title:26}  needs a GPU")
            continue
        both = backward_of(logprob, arguments)
        with torch.no_grad():
            error = (logprob(*arguments)[rows].double() - float64_logprob(*arguments[:3], rows)).abs().max()
            forward = seconds(lambda: logprob(*arguments), device)
        print(f"{title:26}{forward:9.3f}s{seconds(both, device):11.3f}s{peak_memory(both, device) / 2**20:10.0f}{error:10.1e}")
    print("The first two also give the entropy. Peak: beyond the inputs. Error: largest, against float64, over 64 rows.")


if __name__ == "__main__":
    main()
