"""Log-probabilities, entropy and KL of the tokens that the policy wrote, without the wall of logits.

The losses need log pi(a) [Eq. 2, Eq. 3] and the KL to the reference [Eq. 1, Eq. 3] at each response token; the metrics
need the entropy too. All are functions of one row of logits x_1..x_V. With a real model these rows fill the memory, not
the weights: one fp32 copy of 8192 rows over Qwen's vocabulary takes 8192 * 151936 * 4 bytes = 4.6 GiB, and the usual
expression (`log_softmax`, `gather`, autograd) holds three at its peak. More than half of the rows are masked anyway.

This file (1) drops masked rows BEFORE it multiplies by the lm_head, (2) walks over the vocabulary in slices and keeps
running statistics of each row, so that no [N, V] tensor ever exists, and (3) computes the gradient from a closed
formula, for which it makes each slice of logits a second time instead of storing it.

    1. the derivation
    2. statistics of a slice    statistics_twin, statistics_kernel    for the forward pass
    3. gradient of a slice      gradient_twin, gradient_kernel        for the backward pass
    4. the autograd function    RowsToLogprob                         the loop over the slices
    5. the two entry points     fused_logprob_kl takes logits, fused_linear_logprob_kl hidden states and the lm_head

Each Triton kernel has a twin in PyTorch: the specification, and what runs on a CPU. Both are tested against float64.

Shapes: N rows (leading dimensions are flattened), n active rows, R rows of a tensor of logits (N or n), V vocabulary,
c columns of a slice, K slices, D hidden. All sums are fp32, whatever dtype the inputs have.

    python tests/bench_kernels.py      time, memory and error of this file and of the usual expression
"""

import contextlib
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: there the twins do everything
    triton = None

HAVE_TRITON = triton is not None
IGNORE_INDEX = -100  # a target of -100 marks a masked row, as in torch's cross_entropy
LOWEST = -1e30  # stands in for -inf, where inf - inf would be NaN: e^{-1e30} is exactly 0, and 0 * -1e30 is 0
# Columns a program reads at a time, and its warps of 32 threads: 2048 / 128 = 16 numbers in each thread's registers.
BLOCK, WARPS = 2048, 4
# Bytes of a slice of fp32 logits. On a GPU: efficient to multiply, small beside the model. On a CPU: fits the cache.
SLICE_BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}

# PITFALL: Hugging Face has a package of this name, too. Where it is installed, transformers takes this file for it and
# imports these names. Here they do nothing: what they decorate stays as it is.
HUGGING_FACE = """CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties
get_kernel kernelize register_kernel_mapping replace_kernel_forward_from_hub use_kernel_forward_from_hub
use_kernel_mapping use_kernelized_func""".split()

def __getattr__(name):
    if name not in HUGGING_FACE:
        raise AttributeError(f"kernels.py has no {name}")
    return lambda *_, **__: lambda decorated: decorated

class LogprobKL(NamedTuple):
    """Four fp32 tensors in the shape of `target`. Masked positions are exactly 0 and carry no gradient."""

    logp: torch.Tensor  # log pi(target), nats
    entropy: torch.Tensor  # H(pi), nats
    kl: torch.Tensor  # exact KL(pi || reference), summed over the whole vocabulary, nats; 0 without a reference
    ref_logp: torch.Tensor  # log pi_ref(target), nats, never differentiated; 0 without a reference

def interpreted():
    """True if the kernels run in Triton's interpreter: slowly, but on any machine. For that, TRITON_INTERPRET=1 must be
    set before this file is imported: Triton reads the variable when a kernel is defined, not when it is launched."""
    return HAVE_TRITON and not isinstance(statistics_kernel, triton.runtime.JITFunction)

# ----- 1. The derivation -----
#
# Take one row of logits x, to be divided by the temperature T. Let m be its maximum, z_j = (x_j - m)/T and
# s = sum_j e^{z_j}. Then p_j = e^{z_j} / s. The reference's row y has its own my, zy_j and sy, and q_j = e^{zy_j} / sy.
# It follows that
#
#     log p_a = z_a - ln s
#     H       = -sum p ln p        = ln s - u/s                     where u = sum_j e^{z_j} z_j
#     KL      = sum p (ln p - ln q) = w/s - ln s + ln sy            where w = sum_j e^{z_j} (z_j - zy_j)
#
# So one pass collects the state of a row, eight numbers: m, s, u, my, sy, w, and the target's logits x_a and y_a.
# Whenever the maximum rises from m to m', the sums so far are re-based by e^{z'} = e^z e^shift with shift = (m - m')/T,
# and likewise with shift_y for the reference [online softmax: Milakov and Gimelshein 2018]:
#
#     s' = e^shift s        u' = e^shift (u + s shift)        w' = e^shift (w + s (shift - shift_y))
#
# PITFALL: do not store the log-sum-exp m/T + ln s and subtract it from x/T later. Near 1e4, fp32 numbers are 1e-3
# apart. A difference to the maximum keeps its digits, and u and w are sums of such differences.
#
# Now the gradient. From dp_i/dx_j = p_i (1[i=j] - p_j) / T follows
#
#     d log p_a / dx_j = (1[j=a] - p_j) / T
#     d H       / dx_j = -p_j (ln p_j + H) / T                      the +1 of (p ln p)' drops out, as sum_i dp_i = 0
#     d KL      / dx_j =  p_j (ln p_j - ln q_j - KL) / T            the same; the reference is frozen
#
# Let g_logp, g_H and g_KL be the gradients of the loss with respect to the three. With ln p_j = z_j - ln s and
# ln q_j = zy_j - ln sy, their sum is one expression:
#
#     dx_j = [ g_logp 1[j=a] - p_j ( b + g_H z_j - g_KL (z_j - zy_j) ) ] / T
#     b    = g_logp + g_H (H - ln s) + g_KL (KL + ln s - ln sy)     one number a row
#
# PITFALL: a masked row may hold NaN, and 0 * NaN is NaN. Multiplying by the mask would let it through. Here rows are
# selected by index, and a masked row is never read.

def new_state(n, device):
    """State before the first column, fp32 [8, n]: m, s, u, x_a, my, sy, w, y_a. Maxima start at LOWEST, not at -inf."""
    return torch.tensor([LOWEST, 0, 0, 0, LOWEST, 0, 0, 0], device=device)[:, None].repeat(1, n)

def finish_state(state, temperature, with_reference):
    """State after the last column, fp32 [8, n] -> (logp, entropy, kl, ref_logp), fp32 [n] each."""
    m, s, u, x_a, my, sy, w, y_a = state
    logp, entropy = (x_a - m) / temperature - torch.log(s), torch.log(s) - u / s
    if not with_reference:
        return logp, entropy, torch.zeros_like(s), torch.zeros_like(s)
    return logp, entropy, w / s - torch.log(s) + torch.log(sy), (y_a - my) / temperature - torch.log(sy)

# ----- 2. Statistics of one slice: the twin, then the kernel -----

def differences(x_nc, m_n, temperature):
    """z = (x - m) / T as a new fp32 tensor, at least LOWEST, so that a logit of -inf gives e^z z = 0 and not NaN."""
    z_nc = x_nc.float() - m_n[:, None]
    return (z_nc if temperature == 1 else z_nc.div_(temperature)).clamp_min_(LOWEST)

def statistics_twin(x_Rc, y_Rc, rows_n, target_n, state, share, first_column, temperature):
    """Add the columns [first_column, first_column + c) to the state of each active row.

    x_Rc, y_Rc   logits of the policy and of the reference, any float dtype; y_Rc None without a reference
    rows_n       int64, which rows of x and y are active; None if all are
    target_n     int64, each target's column in the whole vocabulary
    state        fp32 [8, n] in the order of new_state, updated in place
    share        fp32 [2, n], written: the maximum so far, and the sum of this slice's e^z relative to it"""
    m, s, u, x_a, my, sy, w, y_a = state
    pick = lambda t_Rc: t_Rc if rows_n is None else t_Rc[rows_n]
    x_nc = pick(x_Rc)
    share[0] = torch.maximum(m, x_nc.amax(1).float())
    shift = (m - share[0]) / temperature
    z_nc = differences(x_nc, share[0], temperature)
    e_nc = z_nc.exp()
    share[1] = e_nc.sum(1)
    column_n = target_n - first_column
    here = (column_n >= 0) & (column_n < x_nc.shape[1])  # the target lies in this slice
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
    # Triton compiles a kernel anew for each set of constants, and for some properties of its integers (is it 1? is it
    # divisible by 16?). The number of active rows changes with every batch, so it must not be such a property.
    jit = triton.jit(do_not_specialize=["n", "first_column"])
    LOWEST_IN_KERNEL = tl.constexpr(LOWEST)

    @jit
    def statistics_kernel(x_ptr, y_ptr, rows_ptr, target_ptr, state_ptr, share_ptr, x_stride, y_stride, n, columns,
                          first_column, inverse_T, BLOCK: tl.constexpr):  # fmt: skip
        """One program a row. It walks over the row's c columns, BLOCK at a time, and keeps the state in registers. The
        pointers are the tensors of statistics_twin. Code for a y_ptr or rows_ptr of None is not even compiled."""
        i = tl.program_id(0)
        # PITFALL: int64 before the product. Row 30000 of 152k columns starts beyond 2^31.
        row = i.to(tl.int64) if rows_ptr is None else tl.load(rows_ptr + i)
        x_ptr += row * x_stride
        state_ptr += i
        m_before, s_before, u_before = tl.load(state_ptr), tl.load(state_ptr + n), tl.load(state_ptr + 2 * n)
        m, s, u = m_before, 0.0, 0.0  # s, u and w are sums over this slice alone until the loop is over
        if y_ptr is not None:
            y_ptr += row * y_stride
            my_before, sy_before = tl.load(state_ptr + 4 * n), tl.load(state_ptr + 5 * n)
            w_before = tl.load(state_ptr + 6 * n)
            my, sy, w = my_before, 0.0, 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            # A column past the end reads as -inf: probability 0. From here on all arithmetic is fp32.
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
        tl.store(share_ptr + i, m)
        tl.store(share_ptr + n + i, s)
        # Re-base the state of the earlier slices once, and add it to this slice.
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
        # Only one slice holds the target. In all others these loads and stores do nothing.
        column_a = tl.load(target_ptr + i) - first_column
        here = (column_a >= 0) & (column_a < columns)
        tl.store(state_ptr + 3 * n, tl.load(x_ptr + column_a, mask=here, other=0.0).to(tl.float32), mask=here)
        if y_ptr is not None:
            tl.store(state_ptr + 7 * n, tl.load(y_ptr + column_a, mask=here, other=0.0).to(tl.float32), mask=here)

# ----- 3. Gradient of one slice: the twin, then the kernel -----

def gradient_twin(x_Rc, y_Rc, rows_n, target_n, numbers, out_Rc, first_column, temperature):
    """Write d(loss)/d(logits) of one slice into the active rows of out_Rc, any float dtype. numbers, fp32 [7, n]: what
    the formula needs of a row: m, ln s, b, g_logp, g_H, my, g_KL. The other arguments are as in statistics_twin."""
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
    def gradient_kernel(x_ptr, y_ptr, rows_ptr, target_ptr, numbers_ptr, out_ptr, x_stride, y_stride, n, columns,
                        first_column, inverse_T, BLOCK: tl.constexpr):  # fmt: skip
        """One program for BLOCK columns of a row: the statistics are complete, so the columns are independent. The
        pointers are the tensors of gradient_twin; out must be contiguous."""
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
            inner -= g_kl * (z - tl.maximum((y - my) * inverse_T, LOWEST_IN_KERNEL))
        is_target = column + first_column == tl.load(target_ptr + i)
        dx = (tl.where(is_target, g_logp, 0.0) - tl.exp(z - log_s) * inner) * inverse_T
        tl.store(out_ptr + row * columns + column, dx, mask=inside)

# ----- 4. The autograd function: a loop over the slices -----

def matmul_fp32(a, b):
    """a [n, D] @ b [D, c] -> fp32 [n, c]. b is converted to the dtype of a. PITFALL: a bf16 result would round the
    logits, which costs up to 0.03 in a log-probability. A product of two bf16 numbers is exact in fp32, so an fp32
    result equals that of an fp32 lm_head with the same bf16 weights."""
    with torch.autocast(a.device.type, enabled=False):  # autocast would round inputs or result to bf16 again
        b = b.to(a.dtype)  # fp32 master weights under bf16 hidden states: only a slice is converted at a time
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)
        with bf16_units(a.dtype):
            return a.float() @ b.float()

@contextlib.contextmanager
def bf16_units(dtype):
    """Inside, fp32 copies of bf16 numbers are multiplied on the CPU's bf16 units, if it has any: as exact (see above),
    and two to three times as fast. For any other dtype nothing changes: fp32 numbers would be rounded to bf16."""
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        switch.fp32_precision = before

def slice_of_logits(rows, weight, index_n, v, chunk):
    """Columns [v, v + chunk) of the active rows -> (their logits [R, c], which of those R rows are active or None)."""
    if rows is None:  # no reference
        return None, None
    if weight is None:
        return rows[:, v : v + chunk], index_n  # a view: masked rows stay in it, unread
    return matmul_fp32(rows[index_n], weight[v : v + chunk].T), None

def launch(kernel, grid, x_Rc, y_Rc, rows_n, target_n, state_or_numbers, share_or_out, first_column, temperature):
    """Run a kernel on one slice. The arguments after the grid are those of its twin."""
    x_stride, y_stride = x_Rc.stride(0), 0 if y_Rc is None else y_Rc.stride(0)
    with torch.cuda.device_of(x_Rc):  # PITFALL: Triton launches on the current GPU, which may not be the tensor's
        kernel[grid](x_Rc, y_Rc, rows_n, target_n, state_or_numbers, share_or_out, x_stride, y_stride, len(target_n),
                     x_Rc.shape[1], first_column, 1 / temperature, BLOCK=BLOCK, num_warps=WARPS)  # fmt: skip

class RowsToLogprob(torch.autograd.Function):
    """The active rows index_n of `rows` -> (logp, entropy, kl, ref_logp), fp32 [n] each. `rows` are logits [N, V] and
    weight is None, or hidden states [N, D] and weight is the lm_head's [V, D]."""

    @staticmethod
    def forward(ctx, rows, weight, ref_rows, ref_weight, index_n, target_n, temperature, chunk, tau, use_triton):
        vocabulary, n = rows.shape[1] if weight is None else weight.shape[0], len(index_n)
        starts = range(0, vocabulary, chunk)
        state = new_state(n, rows.device)
        share = torch.empty(len(starts), 2, n, device=rows.device)
        for k, v in enumerate(starts if n else ()):  # a kernel cannot be launched for no rows
            x, active = slice_of_logits(rows, weight, index_n, v, chunk)
            y, _ = slice_of_logits(ref_rows, ref_weight, index_n, v, chunk)
            arguments = x, y, active, target_n, state, share[k], v, temperature
            if use_triton:
                launch(statistics_kernel, (n,), *arguments)
            else:
                statistics_twin(*arguments)
        outputs = finish_state(state, temperature, ref_rows is not None)
        # The probability of each slice under each row. It decides what the backward pass may skip.
        mass_Kn = share[:, 1] * torch.exp((share[:, 0] - state[0]) / temperature) / state[1]
        ctx.save_for_backward(rows, weight, ref_rows, ref_weight, index_n, target_n, state, mass_Kn, *outputs[1:3])
        ctx.settings = temperature, chunk, tau, use_triton, starts
        ctx.mark_non_differentiable(outputs[3])
        ctx.set_materialize_grads(False)  # the gradient of an output that the loss does not use is then None
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, g_kl, _):
        rows, weight, ref_rows, ref_weight, index_n, target_n, state, mass_Kn, entropy, kl = ctx.saved_tensors
        temperature, chunk, tau, use_triton, starts = ctx.settings
        m, s, _, _, my, sy, _, _ = state
        if g_kl is None:
            ref_rows = None  # only the gradient of the KL needs the reference's logits
        g_logp, g_entropy, g_kl = (torch.zeros_like(s) if g is None else g for g in (g_logp, g_entropy, g_kl))
        b = g_logp + g_entropy * (entropy - torch.log(s))
        if ref_rows is not None:
            b = b + g_kl * (kl + torch.log(s) - torch.log(sy))
        numbers = torch.stack([m, torch.log(s), b, g_logp, g_entropy, my, g_kl])
        # Rows without upstream gradient are skipped, and slices of probability <= tau, except the target's (1[j=a]).
        wanted_n = (g_logp != 0) | (g_entropy != 0) | (g_kl != 0)
        own_Kn = target_n // chunk == torch.arange(len(starts), device=rows.device)[:, None]
        live_Kn = wanted_n & ((mass_Kn > tau) | own_Kn)
        live = live_Kn.nonzero()[:, 1].split(live_Kn.sum(1).tolist())  # waits for the GPU, once a pass
        if weight is None:  # each slice is written into its columns of the result
            d_rows = rows.new_zeros(rows.shape)
        else:  # PITFALL: here the K slices add up, in fp32. A sum in bf16 would be rounded K times.
            d_rows = torch.zeros(len(index_n), rows.shape[1], device=rows.device)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for v, live_n in zip(starts, live):
            if not len(live_n):
                continue
            x, active = slice_of_logits(rows, weight, index_n[live_n], v, chunk)
            y, _ = slice_of_logits(ref_rows, ref_weight, index_n[live_n], v, chunk)
            dx = d_rows[:, v : v + chunk] if weight is None else torch.empty_like(x, dtype=rows.dtype)
            arguments = x, y, active, target_n[live_n], numbers[:, live_n], dx, v, temperature
            if use_triton:
                launch(gradient_kernel, (len(live_n), triton.cdiv(x.shape[1], BLOCK)), *arguments)
            else:
                gradient_twin(*arguments)
            if weight is not None and ctx.needs_input_grad[0]:
                d_rows.index_add_(0, live_n, matmul_fp32(dx, weight[v : v + chunk]))
            if d_weight is not None:  # one product writes this slice of the weight's gradient, once
                d_weight[v : v + chunk] = matmul_fp32(dx.T, rows[index_n[live_n]]).to(weight.dtype)
        if weight is not None:
            d_rows = torch.zeros_like(rows).index_copy_(0, index_n, d_rows.to(rows.dtype))
        return d_rows, d_weight, *[None] * 8

# ----- 5. The two entry points -----

def resolve_impl(impl, tensor):
    """impl -> True for the kernels, False for the twins; "auto": kernels on a GPU. ValueError if it cannot run here."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl!r}: must be 'auto', 'triton' or 'torch'")
    if impl == "auto":
        return HAVE_TRITON and tensor.is_cuda and not interpreted()
    if impl == "triton" and not (HAVE_TRITON and (tensor.is_cuda or interpreted())):
        needs = "the package triton, and a GPU or TRITON_INTERPRET=1 set before kernels is imported"
        raise ValueError(f"impl='triton' with a tensor on {tensor.device} needs {needs}; use 'auto'")
    return impl == "triton"

def default_chunk(n, vocabulary, device_type):
    """Columns of a slice of n fp32 rows: as many as fit into SLICE_BYTES, in whole BLOCKs if at least one fits."""
    columns = SLICE_BYTES.get(device_type, SLICE_BYTES["cpu"]) // (4 * max(1, n))
    return min(vocabulary, max(1, columns // BLOCK * BLOCK or columns))

def run(rows, weight, ref_rows, ref_weight, target, mask, temperature, chunk, tau, impl):
    """Check and flatten the inputs, select the active rows, compute, and give the results the shape of `target`."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    mask = torch.ones_like(target) if mask is None else mask
    if not rows.shape[:-1] == mask.shape == target.shape:
        shapes = f"rows {list(rows.shape)}, target {list(target.shape)}, mask {list(mask.shape)}"
        raise ValueError(f"shapes do not match: {shapes}; rows need one more dimension than target, mask the same")
    if ref_rows is not None and ref_rows.shape[:-1] != target.shape:
        raise ValueError(f"the reference's rows {list(ref_rows.shape)} do not match target {list(target.shape)}")
    vocabulary = rows.shape[-1] if weight is None else weight.shape[0]
    index_n = ((target != IGNORE_INDEX) & (mask != 0)).reshape(-1).nonzero()[:, 0]
    target_n = target.reshape(-1)[index_n]
    if len(index_n) and (target_n.min() < 0 or target_n.max() >= vocabulary):
        raise ValueError(f"target {int(target_n.min())}..{int(target_n.max())} outside the vocabulary of {vocabulary}")
    # PITFALL: `logits[:, :-1]` is not contiguous, so reshape copies all of it. Callers should shift target and mask.
    rows, ref_rows = (t if t is None else t.reshape(-1, t.shape[-1]) for t in (rows, ref_rows))
    use_triton = resolve_impl(impl, rows)
    if use_triton and weight is None:  # the kernel reads neighbouring columns, and all of them in one launch
        rows, ref_rows = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (rows, ref_rows))
        chunk = vocabulary
    chunk = chunk or default_chunk(len(index_n), vocabulary, rows.device.type)
    settings = temperature, chunk, tau, use_triton
    outputs = RowsToLogprob.apply(rows, weight, ref_rows, ref_weight, index_n, target_n, *settings)
    zeros = torch.zeros(target.numel(), device=rows.device)
    return LogprobKL(*(zeros.index_copy(0, index_n, output).view(target.shape) for output in outputs))

def fused_logprob_kl(logits, target, mask=None, ref_logits=None, temperature=1.0, impl="auto"):
    """Logits that exist already -> LogprobKL: log-prob of the target, entropy, exact KL, the reference's log-prob.

    logits       float [..., V]; the row at a position scores the token that `target` holds at the same position
    target       int64 [...]; IGNORE_INDEX means the same as mask 0
    mask         bool or 0/1 [...]; None takes all rows
    ref_logits   float [..., V] of the frozen reference, or None
    impl         "triton", "torch" or "auto", as in resolve_impl
    Gradients reach `logits` from logp, entropy and kl. ValueError for a temperature <= 0, shapes that do not match, a
    target outside the vocabulary, or an impl that is unknown or cannot run."""
    return run(logits, None, ref_logits, None, target, mask, temperature, None, 0.0, impl)

def fused_linear_logprob_kl(hidden, weight, target, mask=None, ref_hidden=None, ref_weight=None, temperature=1.0,
                            chunk=None, tau=0.0, impl="auto"):  # fmt: skip
    """Hidden states and the lm_head's weight -> the same LogprobKL. The logits never exist as a whole.

    hidden, weight           float [..., D] and [V, D]; gradients reach both, unless the weight is frozen
    ref_hidden, ref_weight   of the frozen reference, both or neither; they cost one more product per slice
    chunk                    columns of a slice; None leaves it to SLICE_BYTES
    tau                      the backward pass skips the slices of a row whose probability is <= tau. The row's gradient
                             is off by at most |g_logp| * tau * ceil(V / chunk) / T in L1 norm; for entropy and KL
                             this times the largest |ln p + H| or |ln p - ln q - KL| among the skipped columns
    Target, mask, impl and errors are those of fused_logprob_kl."""
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight belong together: give both or neither")
    return run(hidden, weight, ref_hidden, ref_weight, target, mask, temperature, chunk, tau, impl)
