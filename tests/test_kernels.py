"""Claims about kernels.py. The truth is always float64 autograd over the plain expression, never the code under test.

Each claim is tested for both implementations: "torch", the twins, and "triton", the kernels. The kernels are compiled
where there is a GPU, and run in Triton's interpreter elsewhere. BLOCK is 64 here, so a row of a few hundred columns has
several blocks.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_kernels
import kernels
from conftest import a_batch
from kernels import fused_linear_logprob_kl, fused_logprob_kl
from searchr1 import kl_k1, kl_k2, kl_k3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent
INF = float("inf")
need_triton = pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is missing; unproved: the kernels are right")


def python(code, **environment):
    """Start code in a new process, since Triton reads TRITON_INTERPRET when kernels.py is imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True)


@pytest.fixture(scope="module", autouse=True)
def compiling(tmp_path_factory):
    """The process of the slowest test. It starts with the first test of this file and runs beside the others."""
    with python(COMPILE, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as process:
        yield process
        process.kill()


@pytest.fixture(params=["torch", pytest.param("triton", marks=need_triton)])
def impl(request, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def expression(logits, target, ref_logits, temperature=1.0):
    """The plain float64 expression: log_softmax, gather, sums over the vocabulary."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    ref_logp = torch.log_softmax(ref_logits.double() / temperature, -1)
    entropy = -torch.where(logp > -1e6, logp.exp() * logp, 0.0).sum(-1)
    kl = torch.where(logp > -1e6, logp.exp() * (logp - ref_logp), 0.0).sum(-1)
    pick = lambda x: x.gather(-1, target[..., None])[..., 0]
    return pick(logp), entropy, kl, pick(ref_logp)


def rand(*shape, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE)


def integers(high, *shape):
    return torch.randint(high, shape).to(DEVICE)


def close(got, want, atol=2e-5, rtol=0.0):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


def gradients(outputs, upstream, *inputs):
    """Gradients of sum_k upstream_k * output_k. Log-prob, entropy and KL have different upstream gradients."""
    return torch.autograd.grad(sum((u * x).sum() for u, x in zip(upstream, outputs)), inputs)


def compare_logits(logits, target, ref_logits, temperature, impl, atol=2e-5, rtol=0.0):
    """Compare all four values with float64, and the gradient of the three that have one."""
    upstream = rand(3, *target.shape)
    logits64 = logits.detach().double().requires_grad_()
    logits = logits.detach().requires_grad_()
    want = expression(logits64, target, ref_logits, temperature)
    got = fused_logprob_kl(logits, target, None, ref_logits, temperature, impl)
    for g, x in zip(got, want):
        assert g.dtype == torch.float32
        close(g, x)
    close(*gradients(got, upstream, logits), *gradients(want, upstream, logits64), atol, rtol)


# ----- Values and gradients -----


@pytest.mark.parametrize("vocabulary, temperature", [(1, 0.6), (7, 0.6), (129, 1.0), (129, 0.6), (500, 0.6)])
def test_values_and_gradients_equal_the_float64_expression(vocabulary, temperature, impl):
    """Claim: log-prob, entropy, exact KL, the reference's log-prob and the gradients equal those of float64 within
    2e-5. This holds for a vocabulary of one token, and for one that ends inside a block.
    Fails if, in a kernel: a sum is not re-based when the maximum rises (`tl.exp(shift) * s` -> `s`), or a moment is not
    (`u + s * shift` -> `u`; `shift - shift_y` -> `shift`); a column past the end counts (`other=float("-inf")` ->
    `other=0.0`); the last block is left out (`range(0, columns, BLOCK)` -> `range(0, columns - BLOCK + 1, BLOCK)`); the
    gradient lacks 1 / T (`* inverse_T` taken out of dx); the entropy or the KL has the wrong sign in it
    (`inner -= g_kl` -> `inner += g_kl`; in the twin `inner - g_kl` -> `inner + g_kl`); the target's column is off by
    one (`column + first_column ==` -> `column + first_column + 1 ==`).
    """
    logits, ref_logits = rand(5, vocabulary, scale=2), rand(5, vocabulary, scale=2)
    compare_logits(logits, integers(vocabulary, 5), ref_logits, temperature, impl)


@pytest.mark.parametrize("chunk", [None, 50])
def test_the_linear_path_equals_the_float64_expression_slice_by_slice(chunk, impl):
    """Claim: the four numbers and the gradients of hidden states and weight are those of the whole vocabulary, however
    it is cut into slices. Here a slice may end in the middle of a block.
    Fails if: the state of the earlier slices is not added to a slice (`s += tl.exp(shift) * s_before` taken out;
    likewise u, w, sy) or not re-based (`s += tl.exp(shift) * s_before` -> `s += s_before`; in the twin
    `torch.exp(shift) * s + share[1]` -> `s + share[1]`); the target is not counted from the slice's first column
    (`- first_column` taken out); d_weight is written to the wrong rows (`d_weight[v : v + chunk]` ->
    `d_weight[:chunk]`).
    """
    n, V, D = 6, 129, 12
    hidden, weight, ref_hidden, ref_weight = rand(n, D), rand(V, D, scale=0.5), rand(n, D), rand(V, D, scale=0.5)
    target, upstream = integers(V, n), rand(3, n)
    hidden.requires_grad_(), weight.requires_grad_()
    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = fused_linear_logprob_kl(hidden, weight, target, None, ref_hidden, ref_weight, 0.6, chunk, impl=impl)
    want = expression(hidden64 @ weight64.T, target, ref_hidden.double() @ ref_weight.double().T, 0.6)
    for g, x in zip(got, want):
        close(g, x)
    for g, x in zip(gradients(got, upstream, hidden, weight), gradients(want, upstream, hidden64, weight64)):
        close(g, x)


@pytest.mark.parametrize("head", ["one lm_head", "two lm_heads"])
def test_one_pass_with_a_reference_equals_two_passes_and_the_kl_over_all_tokens(head, impl):
    """Claim: one call with a reference gives the log-prob and entropy of a call for the policy, and the log-prob of a
    call for the reference. Its kl is sum_a p_a (ln p_a - ln q_a) over all tokens a, in float64, and the gradients of
    logp and of kl, each by itself, are float64's. The lm_head is trained; the reference has its own or the same one
    (adapters), and no gradient comes from the reference in either case.
    Fails if: the reference's logits are made with the policy's lm_head (`slice_of_logits(ref_rows, ref_weight` ->
    `slice_of_logits(ref_rows, weight`, forward or backward); the KL's gradient lacks its constant
    (`g_kl * (kl + torch.log(s) - torch.log(sy))` -> `g_kl * kl`); backward forgets the reference (`if g_kl is None:` ->
    `if True:`); ref_logp is the policy's (`(y_a - my)` -> `(x_a - m)` in finish_state).
    """
    n, V, D, T = 5, 7, 4, 0.7
    hidden, weight, ref_hidden = rand(n, D).requires_grad_(), rand(V, D).requires_grad_(), rand(n, D)
    ref_weight = weight if head == "one lm_head" else rand(V, D)
    target, mask = integers(V, n), torch.tensor([1, 1, 0, 1, 1], device=DEVICE)
    score = lambda *a: fused_linear_logprob_kl(*a, temperature=T, chunk=3, impl=impl)
    out = score(hidden, weight, target, mask, ref_hidden, ref_weight)
    policy, reference = score(hidden, weight, target, mask), score(ref_hidden, ref_weight, target, mask)
    for one_pass, two_passes in zip((out.logp, out.entropy, out.ref_logp), (*policy[:2], reference.logp)):
        close(one_pass, two_passes, atol=1e-6)
    assert not out.ref_logp.requires_grad

    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logp64 = torch.log_softmax(hidden64 @ weight64.T / T, -1)
    logq64 = torch.log_softmax(ref_hidden.double() @ ref_weight.detach().double().T / T, -1)
    kl64 = sum(logp64[:, a].exp() * (logp64[:, a] - logq64[:, a]) for a in range(V))
    close(out.kl, kl64 * mask)
    upstream = rand(n)
    for got, want in ((out.logp, logp64[torch.arange(n), target]), (out.kl, kl64)):
        got = torch.autograd.grad((upstream * got).sum(), (hidden, weight), retain_graph=True)
        want = torch.autograd.grad((upstream * mask * want).sum(), (hidden64, weight64), retain_graph=True)
        for g, w in zip(got, want):
            close(g, w)


@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_logits_lose_nothing_but_the_rounding_of_the_result(dtype, ulp, impl):
    """Claim: with bf16 or fp16 logits the values still equal those of float64 within 2e-5. The gradient has the dtype
    of the logits and is within one unit in the last place. (One, not a half: the interpreter truncates where a GPU
    rounds.)
    Fails if: the twin subtracts in the dtype of the logits (`x_nc.float() - m_n[:, None]` ->
    `x_nc - m_n[:, None].to(x_nc.dtype)`), or the kernel rounds e (`e = tl.exp(z)` ->
    `e = tl.exp(z).to(tl.float16).to(tl.float32)`).
    """
    logits, ref_logits = rand(5, 129, scale=2).to(dtype), rand(5, 129, scale=2).to(dtype)
    compare_logits(logits, integers(129, 5), ref_logits, 1.0, impl, atol=1e-6, rtol=ulp)


def test_logits_of_ten_thousand_keep_their_digits(impl):
    """Claim: logits near +1e4, near -1e4 and a mixture of both are as exact as small ones.
    Fails if: finish_state subtracts a log-sum-exp (`(x_a - m) / temperature - torch.log(s)` ->
    `x_a / temperature - (m / temperature + torch.log(s))`), which has lost three digits of ln s; new_state starts the
    maxima at 0 (`LOWEST` -> `0`), so that the sum of a row near -1e4 is 0.
    """
    noise = torch.tensor([[0.0, 1.5, -2.0, 0.25, 1.0, -0.75] * 20]).to(DEVICE)  # exact in fp32, also beside 1e4
    logits = torch.cat([noise + 1e4, noise - 1e4, torch.where(noise > 0.5, noise + 1e4, noise - 1e4)])
    compare_logits(logits, torch.tensor([7, 7, 7]).to(DEVICE), noise.repeat(3, 1), 1.0, impl)
    target = torch.tensor([0]).to(DEVICE)  # 20000 below the best token
    got = fused_logprob_kl(logits[2:], target, impl=impl).logp
    close(got, expression(logits[2:], target, noise)[0], atol=2e-3, rtol=1e-7)


def test_blocks_of_minus_infinity_are_probability_zero(impl):
    """Claim: whole blocks of -inf, or of the lowest finite number that many use in its place, change nothing for the
    other columns and get gradient 0, wherever in the row they are. Nothing becomes NaN.
    Fails if: LOWEST is -inf (`LOWEST = -1e30` -> `LOWEST = float("-inf")`); differences does not clamp
    (`.clamp_min_(LOWEST)` taken out); the kernel does not (`tl.maximum((x - m_new) * inverse_T, LOWEST_IN_KERNEL)` ->
    `(x - m_new) * inverse_T`).
    """
    logits, ref_logits = rand(4, 256), rand(4, 256)
    alive = torch.ones(4, 256, dtype=torch.bool, device=DEVICE)
    alive[0, :128] = alive[1, 64:200] = alive[2, 130:] = alive[3, :192] = False
    target = torch.tensor([200, 10, 129, 255], device=DEVICE)
    for low in (-INF, torch.finfo(torch.float32).min):
        x = torch.where(alive, logits, low).requires_grad_()
        y = torch.where(alive, ref_logits, low)
        upstream = rand(3, 4)
        got = fused_logprob_kl(x, target, None, y, 1.0, impl)
        (dx,) = gradients(got, upstream, x)
        assert (dx[~alive] == 0).all()
        for i in range(4):  # each row by itself, with the dead columns cut out
            x64 = logits[i][alive[i]].double().requires_grad_()
            place = alive[i][: target[i]].sum()
            want = expression(x64, place, ref_logits[i][alive[i]])
            for g, w in zip(got, want):
                close(g[i], w)
            close(dx[i][alive[i]], gradients(want, upstream[:, i], x64)[0])


def test_a_sure_policy_has_no_entropy_and_no_gradient(impl):
    """Claim: where p is close to 1, log-prob, entropy and gradient are finite and equal those of float64 within 2e-6.
    Fails if: finish_state adds 1e-5 to s "for safety" (`torch.log(s) - u / s` -> `torch.log(s + 1e-5) - u / s`).
    """
    logits = torch.zeros(2, 129, device=DEVICE).requires_grad_()
    with torch.no_grad():
        logits[0, 100], logits[1, 3] = 30.0, 12.0
    target = torch.tensor([100, 3], device=DEVICE)
    logits64 = logits.detach().double().requires_grad_()
    got = fused_logprob_kl(logits, target, impl=impl)
    want = expression(logits64, target, torch.zeros_like(logits64))
    ones = torch.ones(2, 2, device=DEVICE)
    close(got.logp, want[0], atol=2e-6)
    close(got.entropy, want[1], atol=2e-6)
    close(*gradients(got, ones, logits), *gradients(want[:2], ones, logits64), atol=2e-6)


@pytest.mark.parametrize("layout", ["shifted", "transposed", "every second column", "expanded", "padded vocabulary"])
def test_inputs_need_not_be_contiguous(layout, impl):
    """Claim: views give the same as their contiguous copies, gradients included.
    Fails if: a kernel assumes that rows follow each other without gaps (`row * x_stride` -> `row * columns`, in either
    kernel; likewise y_stride), or that columns do (`t.stride(1) == 1 else t.contiguous()` -> `True else t` in run).
    """
    shape, view = {
        "shifted": ((2, 4, 100), lambda t: t[:, :-1]),
        "transposed": ((100, 2, 3), lambda t: t.permute(1, 2, 0)),
        "every second column": ((2, 3, 200), lambda t: t[:, :, ::2]),
        "expanded": ((1, 3, 100), lambda t: t.expand(2, 3, 100)),
        "padded vocabulary": ((2, 3, 130), lambda t: t[:, :, :100]),
    }[layout]
    base = rand(*shape).requires_grad_()
    target, upstream = integers(100, 2, 3), rand(3, 2, 3)
    base64 = base.detach().double().requires_grad_()
    ref = view(base.detach().flip(-1) * 0.5)
    got = fused_logprob_kl(view(base), target, None, ref, 1.0, impl)
    want = expression(view(base64), target, ref)
    for g, x in zip(got, want):
        close(g, x)
    close(*gradients(got, upstream, base), *gradients(want, upstream, base64))


# ----- The mask -----


@pytest.mark.parametrize("level", ["logits", "linear"])
def test_nothing_leaks_out_of_masked_rows(level, impl):
    """Claim: NaN and inf in masked rows change no output and no gradient. Those rows get exactly 0 in both. A mask of 0
    means the same as a target of -100.
    Fails if: run ignores the mask (`(target != IGNORE_INDEX) & (mask != 0)` -> `target != IGNORE_INDEX`) or the -100
    (-> `mask != 0`); slice_of_logits takes the wrong rows (`rows[index_n]` -> `rows[: len(index_n)]`); a kernel reads
    row i instead of the i-th active row (`tl.load(rows_ptr + i)` -> `i.to(tl.int64)`).
    """
    n, V, D = 8, 100, 6
    rows = rand(n, V if level == "logits" else D)
    weight, ref_rows, ref_weight = rand(V, D), rand(*rows.shape), rand(V, D)
    target, mask = integers(V, n), torch.tensor([1, 0, 0, 1, 0, 1, 1, 0], device=DEVICE)
    ignored = torch.where(mask == 1, target, -100)
    garbage = torch.tensor([float("nan"), INF, -INF], device=DEVICE).repeat(n, rows.shape[1])[:, : rows.shape[1]]
    dirty, ref_dirty = (torch.where(mask[:, None] == 1, clean, garbage) for clean in (rows, ref_rows))
    results = []
    for x, y, t, m in (
        (rows, ref_rows, target, mask),
        (dirty, ref_dirty, target, mask.bool()),
        (dirty, ref_dirty, ignored, None),
        (dirty, ref_dirty, ignored, torch.ones_like(mask)),
    ):
        x, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if level == "logits":
            out = fused_logprob_kl(x, t, m, y, impl=impl)
        else:
            out = fused_linear_logprob_kl(x, w, t, m, y, ref_weight, chunk=40, impl=impl)
        torch.stack(out[:3]).sum().backward()
        assert (torch.stack(out)[:, mask == 0] == 0).all() and (x.grad[mask == 0] == 0).all()
        assert (torch.stack(out)[:, mask == 1] != 0).all() and (x.grad[mask == 1] != 0).any(1).all()
        results.append((*out, x.grad, w.grad))
    for clean, *others in zip(*results):
        assert clean is None or all(torch.equal(clean, other) for other in others)


@pytest.mark.parametrize("n", [0, 3])
def test_no_active_row_gives_zeros_and_zero_gradients(n, impl):
    """Claim: a batch without rows, or one whose rows are all masked, is no error. Outputs and gradients are 0.
    Fails if: default_chunk divides by n (`max(1, n)` -> `n`).
    """
    hidden, weight = rand(n, 4).requires_grad_(), rand(9, 4).requires_grad_()
    logits, target = rand(n, 9).requires_grad_(), integers(9, n)
    nothing = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    for out in (
        fused_linear_logprob_kl(hidden, weight, target, nothing, impl=impl),
        fused_logprob_kl(logits, target, nothing, impl=impl),
    ):
        out.logp.sum().backward()
        assert all(x.shape == (n,) and (x == 0).all() for x in out)
    assert all((t.grad == 0).all() for t in (hidden, weight, logits))


def test_products_are_made_for_the_rows_that_count_and_no_others(monkeypatch, impl):
    """Claim: masked rows are in no product with the lm_head. Rows with zero upstream gradient are in no product of the
    backward pass. A frozen lm_head costs no product for its gradient, an unused KL none for the reference.
    Fails if: slice_of_logits multiplies all rows (`rows[index_n]` -> `rows`); `wanted_n &` is taken out;
    `ctx.needs_input_grad[1]` -> `True`; the reference stays (`if g_kl is None:` -> `if False:`).
    """
    products, matmul = [], kernels.matmul_fp32
    monkeypatch.setattr(kernels, "matmul_fp32", lambda a, b: products.append((*a.shape, b.shape[1])) or matmul(a, b))
    V, D = 30, 5
    hidden, weight, target = rand(10, D).requires_grad_(), rand(V, D).requires_grad_(), integers(V, 10)
    mask = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0, 1], device=DEVICE)  # six rows
    upstream = torch.tensor([1.0, 0, -2, 5, 5, 5, 0, 1, 5, 0], device=DEVICE)  # three of them
    logp = fused_linear_logprob_kl(hidden, weight, target, mask, hidden, weight, chunk=16, impl=impl).logp
    assert products == [(6, D, 16)] * 2 + [(6, D, 14)] * 2  # two slices, policy and reference
    products.clear()
    (logp * upstream).sum().backward()
    # A slice: logits, d_hidden, d_weight.
    assert products == [(3, D, 16), (3, 16, D), (16, 3, D), (3, D, 14), (3, 14, D), (14, 3, D)]
    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = expression(hidden64 @ weight64.T, target, torch.zeros(10, V, device=DEVICE))[0]
    (want * upstream * mask).sum().backward()
    close(hidden.grad, hidden64.grad)
    close(weight.grad, weight64.grad)
    logp = fused_linear_logprob_kl(hidden, weight.detach(), target, mask, chunk=16, impl=impl).logp
    products.clear()
    (logp * upstream).sum().backward()
    assert products == [(3, D, 16), (3, 16, D), (3, D, 14), (3, 14, D)]


def test_skipping_slices_stays_within_its_bound_and_tau_zero_is_lossless(impl):
    """Claim: with tau, the gradient of a row of logits is off by at most tau * slices / T in L1 norm; for entropy and
    KL this times the largest |ln p + H| or |ln p - ln q - KL| among the skipped columns. With tau = 0 it is not off at
    all.
    Fails if: the mass of a slice is not re-based to the final maximum
    (`* torch.exp((share[:, 0] - state[0]) / temperature)` taken out) or not divided by the sum (`/ state[1]` taken
    out); the target's own slice may be skipped (`| own_Kn` taken out).
    """
    n, V, chunk, T = 6, 64 if impl == "torch" else 24, 4, 0.5  # the interpreter takes 30 ms a launch
    spread = torch.linspace(1, 3, n, device=DEVICE)[:, None]  # the first rows are flat, the last ones peaked
    hidden, ref_hidden = spread * rand(n, V), rand(n, V)  # the lm_head is the identity: hidden states are logits
    target, eye = integers(V, n), torch.eye(V, device=DEVICE)
    grads = {}
    for tau in (None, 0.0, 1e-3):
        h = hidden.clone().requires_grad_()
        cut = V if tau is None else chunk
        out = fused_linear_logprob_kl(h, eye, target, None, ref_hidden, eye, T, cut, tau or 0.0, impl)
        grads[tau] = [torch.autograd.grad(x.sum(), h, retain_graph=True)[0].double() for x in out[:3]]
    logp, logq = (torch.log_softmax(x.double() / T, -1) for x in (hidden, ref_hidden))
    p, slices = logp.exp(), torch.arange(V // chunk, device=DEVICE)
    kept = (p.view(n, -1, chunk).sum(-1) > 1e-3) | (slices == target[:, None] // chunk)  # what may not be skipped
    kept = kept.repeat_interleave(chunk, 1)
    entropy, kl = -(p * logp).sum(-1, keepdim=True), (p * (logp - logq)).sum(-1, keepdim=True)
    factors = torch.ones_like(p), logp + entropy, logp - logq - kl
    for exact, lossless, skipped, factor in zip(*grads.values(), factors):
        close(lossless, exact)
        close(skipped, exact * kept)
        error, bound = (skipped - exact).abs().sum(1), 1e-3 * V / chunk / T * (factor.abs() * ~kept).amax(1)
        assert error.max() > 1e-4 and (error <= bound + 1e-5).all()  # something was skipped, within the bound


# ----- Precision and memory of the linear path -----


def test_bf16_models_get_fp32_logits_and_gradients_that_are_summed_in_fp32(impl):
    """Claim: bf16 hidden states and weight give log-probs that are good to 1e-5, not to 3e-2. The gradient of the
    hidden states is a sum over 16 slices. It is off by less than 0.4 % in norm: the rounding of dlogits and of the
    result.
    Fails if: matmul_fp32 multiplies in bf16 (`a.float() @ b.float()` -> `(a @ b).float()`); the sum over the slices is
    rounded to bf16 each time (`d_rows.index_add_(` -> `d_rows = d_rows.to(rows.dtype).float().index_add_(`).
    """
    n, V, D = 6, 512, 64
    hidden, weight, target = rand(n, D).bfloat16().requires_grad_(), rand(V, D, scale=0.25).bfloat16(), integers(V, n)
    out = fused_linear_logprob_kl(hidden, weight, target, chunk=32, impl=impl)
    hidden64 = hidden.detach().double().requires_grad_()
    want = expression(hidden64 @ weight.double().T, target, torch.zeros(n, V, device=DEVICE))
    close(out.logp, want[0], atol=1e-5)
    out.logp.sum().backward()
    want[0].sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad.double() - hidden64.grad).norm() < 4e-3 * hidden64.grad.norm()


def test_bf16_units_multiply_bf16_numbers_only():
    """Claim: inside bf16_units(bf16) a CPU may multiply fp32 copies on its bf16 units; fp32 numbers, which these would
    round, are multiplied as before. Afterwards the switch is what it was, even if the product failed.
    Fails if: the switch is thrown for every dtype (`"bf16" if dtype == torch.bfloat16 else before` -> `"bf16"`), or
    stays thrown (its last line is taken out, or stands behind the `yield` without `finally`).
    """
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    with kernels.bf16_units(torch.float32):
        assert switch.fp32_precision == before != "bf16"
    with pytest.raises(ZeroDivisionError), kernels.bf16_units(torch.bfloat16):
        assert switch.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert switch.fp32_precision == before


def test_autocast_and_fp32_master_weights_do_not_round_the_logits(impl):
    """Claim: the result inside torch.autocast equals the one outside. bf16 hidden states work with an fp32 weight,
    whose gradient is fp32.
    Fails if: matmul_fp32 leaves autocast as it is (`torch.autocast(a.device.type, enabled=False)` ->
    `contextlib.nullcontext()`); on a GPU also if `b = b.to(a.dtype)` is taken out.
    """
    hidden, weight, target = rand(5, 16), rand(70, 16).requires_grad_(), integers(70, 5)
    plain = fused_linear_logprob_kl(hidden, weight, target, impl=impl).logp
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(fused_linear_logprob_kl(hidden, weight, target, impl=impl).logp, plain)
    fused_linear_logprob_kl(hidden.bfloat16(), weight, target, impl=impl).logp.sum().backward()
    rounded = weight.detach().bfloat16().double().requires_grad_()
    want = expression(hidden.bfloat16().double() @ rounded.T, target, torch.zeros(5, 70, device=DEVICE))[0]
    want.sum().backward()
    assert weight.grad.dtype == torch.float32
    close(weight.grad, rounded.grad, atol=5e-3, rtol=2**-7)  # dlogits were rounded to bf16


def test_no_wall_of_logits(monkeypatch):
    """Claim: log-probs and gradients of 4096 rows take at most a tenth of the memory of the plain expression, beyond
    the inputs (vocabulary 32768, 64 dimensions, 45 % of the rows active). Every allocation and release is counted. The
    plain expression is measured with 128 rows and taken 32 times: it holds three tensors of rows x vocabulary.
    Fails if: default_chunk takes the whole vocabulary as one slice (`columns = ` -> `columns = 1000 * `).
    """
    monkeypatch.setitem(kernels.SLICE_BYTES, "cuda", kernels.SLICE_BYTES["cpu"])
    case = lambda rows: bench_kernels.example(rows, 32768, 64, device=DEVICE)
    peak = lambda f, rows: bench_kernels.peak_memory(bench_kernels.backward_of(f, case(rows)), DEVICE)
    eager = 32 * peak(bench_kernels.eager_logprob, 128)
    assert eager >= 3 * 4096 * 32768 * 4  # so every allocation was counted
    assert peak(lambda *a: fused_linear_logprob_kl(*a).logp, 4096) <= eager / 10


# ----- KL estimators -----


def test_k1_k2_and_k3_of_sampled_tokens_agree_with_the_exact_kl(impl):
    """Claim: summed over all tokens of a vocabulary of five, E[k1] = E[k3] = KL exactly, E[k2] = KL to third order, and
    k3 >= 0 for each token. The kernel's exact KL is the same number.
    Fails if: kl_k3 has the ratio upside down (`ref_logprobs - logprobs` -> `logprobs - ref_logprobs`), or computes
    exp(r) - r - 1; ref_logp is the policy's (`(y_a - my)` -> `(x_a - m)` in finish_state).
    """
    x, tokens = rand(1, 5), torch.arange(5, device=DEVICE)
    for distance in (0.1, 1.0):
        y = x + distance * rand(1, 5)
        out = fused_logprob_kl(x.expand(5, 5), tokens, ref_logits=y.expand(5, 5), impl=impl)  # row t scores token t
        logp, logq = torch.log_softmax(x.double(), -1)[0], torch.log_softmax(y.double(), -1)[0]
        p, exact = logp.exp(), (logp.exp() * (logp - logq)).sum()
        close(out.kl, exact.expand(5), atol=1e-6)
        for k, tolerance in ((kl_k1, 1e-6), (kl_k2, distance * exact), (kl_k3, 1e-6)):
            assert abs((p * k(out.logp, out.ref_logp)).sum() - exact) < tolerance
        assert (kl_k3(logp, logq) >= 0).all() and (kl_k1(logp, logq) < 0).any()
    near = -torch.logspace(-8, 0, 1000)  # fp32, down to differences that exp(r) - 1 cannot resolve
    assert (kl_k3(near, torch.zeros(1000)) >= 0).all() and (kl_k3(torch.zeros(1000), near) >= 0).all()


# ----- Which implementation runs, and mistakes -----


def test_mistakes_are_named():
    """Claim: a target outside the vocabulary, a temperature of 0, shapes that do not match, half a reference, and an
    implementation that does not exist are refused with a message that names the mistake.
    Fails if: run does not check the target (`if len(index_n) and` -> `if False and`; a wrong number would follow) or
    the shapes (`rows.shape[:-1] == mask.shape` -> `mask.shape`).
    """
    logits, target = torch.randn(3, 7), torch.tensor([0, 1, 2])
    for arguments, message in (
        ({"target": torch.tensor([0, 7, 1])}, "0..7 outside the vocabulary of 7"),
        ({"target": target, "temperature": 0.0}, "temperature=0.0"),
        ({"target": target, "impl": "cuda"}, "impl='cuda'"),
        ({"target": torch.tensor([0, 1])}, r"rows \[3, 7\], target \[2\]"),
        ({"target": target, "mask": torch.ones(3, 1)}, r"mask \[3, 1\]"),
        ({"target": target, "ref_logits": logits[:2]}, r"reference's rows \[2, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_logprob_kl(logits, **arguments)
    with pytest.raises(ValueError, match="belong together"):
        fused_linear_logprob_kl(torch.randn(3, 4), torch.randn(7, 4), target, ref_hidden=torch.randn(3, 4))


def test_auto_takes_the_kernels_on_a_gpu_only_and_says_what_triton_lacks(monkeypatch):
    """Claim: "auto" means the twins on a CPU, even where the kernels could be interpreted, and the compiled kernels on
    a GPU. "triton" is refused where the kernels cannot run.
    Fails if: resolve_impl ignores interpreted() (`and not interpreted()` taken out) or the device (`tensor.is_cuda and`
    taken out).
    """
    cpu, gpu = torch.zeros(1), type("OnGPU", (), {"is_cuda": True, "device": "cuda:0"})()
    monkeypatch.setattr(kernels, "HAVE_TRITON", True)
    for interpreted in (True, False):
        monkeypatch.setattr(kernels, "interpreted", lambda: interpreted)
        assert kernels.resolve_impl("auto", cpu) is False and kernels.resolve_impl("auto", gpu) is not interpreted
        assert kernels.resolve_impl("triton", gpu) is True and kernels.resolve_impl("torch", gpu) is False
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.resolve_impl("triton", cpu)
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    assert kernels.resolve_impl("auto", gpu) is False
    with pytest.raises(ValueError, match="needs the package triton"):
        kernels.resolve_impl("triton", gpu)


def test_without_triton_the_file_imports_and_computes(monkeypatch):
    """Claim: without the package triton, kernels.py can be imported and the twins do the work.
    Fails if: a kernel is defined outside `if HAVE_TRITON`; interpreted() does not ask first (`HAVE_TRITON and` taken
    out).
    """
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.HAVE_TRITON and not alone.interpreted()
    logp = alone.fused_logprob_kl(torch.zeros(1, 4), torch.tensor([2])).logp
    assert logp.item() == pytest.approx(-1.3862944)


COMPILE = """
import json, subprocess, tempfile
from pathlib import Path
import triton, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, tensors, capability, logits, reference):
    signature = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(tensors, "*fp32")
    signature |= {"x_ptr": logits, "y_ptr": logits, "rows_ptr": "*i64", "target_ptr": "*i64", "inverse_T": "fp32"}
    constants = {"BLOCK": kernels.BLOCK} | ({} if reference else {"y_ptr": None})
    signature |= dict.fromkeys(constants, "constexpr")
    place = lambda name: (kernel.arg_names.index(name),)
    aligned = {name for name, kind in signature.items() if kind[0] in "*i"} - {"n", "first_column"}
    source = ASTSource(
        kernel,
        signature,
        {place(name): value for name, value in constants.items()},
        {place(name): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})

def dump(binary, flag):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout

for kernel, tensors in (
    (kernels.statistics_kernel, ["state_ptr", "share_ptr"]),
    (kernels.gradient_kernel, ["numbers_ptr", "out_ptr"]),
):
    for capability, logits, reference in ((89, "*fp32", True), (90, "*bf16", False)):
        binary = compiled(kernel, tensors, capability, logits, reference)
        usage, code = dump(binary, "-res-usage"), dump(binary, "-sass")
        no_spill = "STACK:0 " in usage and "LOCAL:0 " in usage
        print(json.dumps([kernel.__name__, capability, no_spill, "LDG.E.128" in code]))
"""


@need_triton
def test_the_kernels_compile_for_real_gpus_without_spilling(compiling):
    """Claim: for an RTX 4090 (compute capability 8.9) and an H100 (9.0) both kernels compile, keep everything in
    registers, and read 16 bytes a thread at a time. Only a GPU can show what they compute there, and how fast.
    Fails if: a program has too many columns (`BLOCK, WARPS = 2048, 4` -> `BLOCK, WARPS = 65536, 4`: registers spill),
    or a kernel contains what only the interpreter accepts (`tl.load(state_ptr)` -> `state_ptr[0]`).
    """
    out, error = compiling.communicate()
    assert compiling.returncode == 0, error
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 4 and all(no_spill and wide for _, _, no_spill, wide in lines), lines


# ----- The benchmark -----

REASONS = ("is not installed", "needs a GPU", "needs a newer torch")
SMALL = "--rows 40 --vocabulary 300 --dim 16 --dtype float32 --repeats 1 --skip compile".split()


def table(capsys):
    """The rows of the printed table, each a list of cells, without header and rule."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if row[0] != "implementation"]


@pytest.mark.parametrize("peers", [[], ["--peers"]])
def test_the_benchmark_runs_and_its_rows_are_right(peers, capsys):
    """Claim: tests/bench_kernels.py prints a row for each implementation, with its errors: three rows without options,
    all of them with --peers. A row that cannot run says why.
    Fails if: a row's log-probs have another mask or sign (`torch.where(mask, logp, 0.0)` -> `logp` in eager_logprob),
    or a missing package is not named (`importlib.util.find_spec(package)` -> `True`).
    """
    bench_kernels.main(SMALL + peers)
    rows = table(capsys)
    measured, others = [row for row in rows if row[2]], [row for row in rows if not row[2]]
    titles = {"ours, PyTorch twin", "eager, all rows"} | ({"eager, compacted by hand"} if peers else set())
    assert titles <= {row[0] for row in measured}
    errors = [(row[0], row[4].split()[0], row[5]) for row in measured]
    assert all(float(error) < 1e-5 and float(gradient) < 1e-5 for _, error, gradient in errors), errors
    assert (others or DEVICE == "cuda") and all(row[1].endswith(REASONS) for row in others)
    assert peers or len(rows) == 3


def test_saved_hidden_states_are_those_of_the_longest_rows_and_can_be_measured(tokenizer, model, tmp_path, capsys):
    """Claim: save_case writes the longest rows of a batch. Hidden states, weight, targets, mask and temperature give
    the log-probs that the sampler saw, and --cases measures them without error.
    Fails if: save_case takes the shortest rows (`descending=True` -> `descending=False`), or load_case forgets the
    temperature (`/ case["temperature"]` taken out).
    """
    (batch, _), path = a_batch(tokenizer, model), str(tmp_path / "case.pt")
    bench_kernels.save_case(model, batch, 1.0, path, tokens=300)
    L = int(batch.lengths_B.max())
    rows = batch.lengths_B.argsort(descending=True, stable=True)[: 300 // L]
    arguments = bench_kernels.load_case(path, "cpu")
    assert arguments[3].sum() == batch.mask_BT[rows].sum() > 20
    want = batch.old_logprobs_BT[rows, : L - 1].flatten()
    close(bench_kernels.eager_logprob(*arguments), want, atol=1e-5)
    bench_kernels.main(["--cases", path, "--repeats", "1", "--skip", "compile", "tau"])
    measured = [row for row in table(capsys) if row[2]]
    assert len(measured) >= 3 and all(float(row[4].split()[0]) < 1e-5 > float(row[5]) for row in measured)
    torch.save(torch.load(path) | {"temperature": 2.0}, path)
    want = bench_kernels.eager_logprob(*arguments, temperature=2.0)
    close(bench_kernels.eager_logprob(*bench_kernels.load_case(path, "cpu")), want, atol=1e-5)
