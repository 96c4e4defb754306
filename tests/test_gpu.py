"""The CUDA path, proved without a GPU: graphs that are captured and replayed, tensors on wrong devices, memory.

A CUDA graph is emulated: capturing runs the step three times, a replay runs its kernels and no Python, over the
addresses that it saw. On a machine with a GPU the same cases run with real graphs.
"""

import ast
import contextlib
import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from conftest import sampled, shaped
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import engine
import eval as evaluation
import kernels
import models
import searchr1
import train
from models import Adapted, adam, adapt, make_models, role, trained

ROOT = Path(models.__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def emulator(policy):
    """engine.captured as a GPU does it. A replay finds every Python attribute of slots and adapters as it was at the
    capture, writes into the tensor that it wrote into before, and must find weights, keys, values where they were."""
    layers = [layer for layer in policy.modules() if isinstance(layer, Adapted)]

    def captured(run, slots):
        out = [run() for _ in range(3)][-1]
        held = lambda: (*policy.parameters(), *(store for layer in slots.layers for store in layer))
        addresses = lambda: [t.data_ptr() for t in held()]
        state = lambda: (vars(slots) | {"lengths": list(slots.lengths)}, [layer.role for layer in layers])
        then, places = state(), addresses()

        def put(attributes, roles):
            vars(slots).update(attributes)
            for layer, name in zip(layers, roles):
                layer.role = name

        def replay():
            assert addresses() == places, "a real graph would read freed memory"
            now = dict(vars(slots)), [layer.role for layer in layers]
            put(*then)
            out.copy_(run())
            put(*now)
            return out

        return replay

    return captured


@pytest.fixture()
def graphs(model, monkeypatch):
    """(policy, slots): make slots over which every decoding step is a graph: a real one, or an emulated one."""

    def slots(policy, count, length=200):
        if DEVICE == "cpu":
            monkeypatch.setattr(engine, "captured", emulator(policy))
        return engine.Slots(policy, count, length, static=True)

    return model.to(DEVICE), slots


def same(got, want):
    """Rollouts with equal ids and masks, and with log-probs that differ by rounding."""
    for g, w in zip(got, want, strict=True):
        assert (g.ids, g.response_mask, g.searches, g.answer) == (w.ids, w.response_mask, w.searches, w.answer)
        assert g.logprobs == pytest.approx(w.logprobs, abs=2e-5)
    return got


# ----- Graphs -----


@pytest.mark.parametrize("slots", [12, 5, 1])
def test_rollouts_over_graphs_are_the_plain_ones(graphs, tokenizer, slots):
    """Claim: groups of four (or single rollouts) over all slots, over too few, over some that stay empty and over one:
    ids, mask, searches and log-probs equal those without graphs, for growing widths and leaving rows.
    Fails if: block.places_nT is not copied into the static inputs (replayed), capturing writes into keys (`inputs[2] =`
    dropped), or one width serves all steps (`return rows, quarter` in graph_shape).
    """
    policy, make = graphs
    how = {"group_size": 4 if slots >= 4 else 1, "max_new_tokens": 30}
    want = sampled(policy, tokenizer, 0.0, slots=slots, **how)
    slots = make(policy, slots)
    same(sampled(policy, tokenizer, 0.0, slots=slots, **how), want)
    assert slots.graphs and slots.steps and len({width for _, width in slots.steps}) > 1


def test_a_shape_that_is_new_gives_what_its_graph_gives(graphs, tokenizer):
    """Claim: the first token of a graph's shape, at which it is captured, has the very log-prob that a replay gives.
    Otherwise a resumed run, which captures at other tokens, would not be the uninterrupted run, bit for bit.
    Fails if: checked returns the plain step (`wanted if wrong else replayed(...)` -> `wanted`).
    """
    policy, make = graphs
    slots = make(policy, 12)
    new, again = (sampled(policy, tokenizer, 0.0, slots=slots, max_new_tokens=30) for _ in range(2))
    assert slots.steps and [r.logprobs for r in new] == [r.logprobs for r in again]


@pytest.mark.parametrize("method", ["cot", "ircot", "search-o1", "search-r1"])
def test_each_method_over_graphs_is_the_plain_one(graphs, tokenizer, method):
    """Claim: CoT, IRCoT and Search-o1, whose calls begin on prompts of their own in the same slots, and Search-R1.
    Fails if: a graph serves rows that it was not made for (`len(ids_n1)` -> `1` in decode), or restart does nothing.
    """
    policy, make = graphs
    texts = ["who is kinake?", "what is born?", "can you name the mayor of gugoton?"]
    questions = [searchr1.Question(str(i), text, ("gugoton",)) for i, text in enumerate(texts)]
    settings = searchr1.Settings(3, 12, 40, 300, invalid_message="paper")
    find = lambda queries, k: [[evaluation.Passage("0", "x", "kinake lives in gugoton.")]] * len(queries)
    ask = lambda slots: evaluation.evaluate(policy, tokenizer, questions, find, settings, method, slots=slots)[1]
    slots = make(policy, 3, 300)
    same(ask(slots), ask(None))
    assert slots.graphs and slots.steps


def test_two_sets_of_slots_and_two_roles_side_by_side(graphs, tokenizer):
    """Claim: policy and reference of one adapted model, each with slots of its own, as in rejection sampling, give what
    they give without graphs, in turn and again.
    Fails if: all Slots share one dict of graphs (`steps`): a graph has one role for ever, as the last line shows.
    """
    policy, make = graphs
    adapt(policy, ("policy",), 3, 30.0)
    for layer in policy.modules():
        if isinstance(layer, Adapted):
            torch.nn.init.normal_(layer.B["policy"], std=0.3)
    slots, want = {}, {}
    for name in ("policy", None):
        slots[name] = make(policy, 8)
        with role(policy, name):
            want[name] = sampled(policy, tokenizer, 0.0)
    assert [r.ids for r in want["policy"]] != [r.ids for r in want[None]]
    for name in ("policy", None, "policy", None):
        with role(policy, name):
            same(sampled(policy, tokenizer, 0.0, slots=slots[name]), want[name])
    with role(policy, None):  # and this is what goes wrong with one set of slots
        assert [r.ids for r in sampled(policy, tokenizer, 0.0, slots=slots["policy"])] != [r.ids for r in want[None]]


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (3, torch.float32), (0, torch.bfloat16)])
def test_an_optimiser_step_between_two_rollouts_is_seen_by_the_graphs(graphs, tokenizer, rank, dtype):
    """Claim: full weights, adapters and bf16 weights with fp32 masters are changed where the graphs read them.
    Fails if: write_back replaces a weight (`p.data = master.to(p.dtype)`) instead of copying into it.
    """
    policy, make = graphs
    policy = policy.to(dtype)
    if rank:
        adapt(policy, ("policy",), rank, 30.0)
    slots = make(policy, 8)
    before = sampled(policy, tokenizer, 0.0, slots=slots)
    weights = trained(policy, "policy")
    optimizer = adam(weights, 0.05, train.Config())
    for p in weights.values():
        torch.nn.init.normal_(p)  # a gradient from anywhere
    (policy(input_ids=torch.tensor([before[0].ids], device=DEVICE)).logits.float() ** 2).mean().backward()
    optimizer.step()
    after, plain = sampled(policy, tokenizer, 0.0, slots=slots), sampled(policy, tokenizer, 0.0)
    assert slots.graphs and [r.ids for r in after] != [r.ids for r in before]
    for g, w in zip(after, plain):  # in bf16 another width rounds otherwise, so compare up to the first other token
        n = next((i for i, (a, b) in enumerate(zip(g.ids, w.ids)) if a != b), len(w.ids))
        assert n == len(w.ids) or (dtype == torch.bfloat16 and n > w.prompt_length + 1)
        assert g.logprobs[:n] == pytest.approx(w.logprobs[:n], abs=2e-5 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("fault", ["no key is written", "another row's output", "the capture fails", "memory runs out"])
def test_a_graph_that_is_wrong_is_found_and_the_run_goes_on_without(model, tokenizer, monkeypatch, capsys, fault):
    """Claim: a graph is compared with the plain step when it is made. If it writes no keys, mixes up rows, or cannot be
    captured, one line says so, no further graph is made, and the rollouts are the plain ones.
    Fails if: the plain step comes before the replay in checked (its keys hide the fault), or apart is not compared.
    """
    calls = []

    def captured(run, slots):
        calls.append(run)
        if fault == "the capture fails":
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        if fault == "memory runs out":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if fault == "another row's output":
            return lambda: run().roll(1, 0)
        fixed = run.__closure__  # the Block whose places the graph writes to
        (block,) = [cell.cell_contents for cell in fixed if isinstance(cell.cell_contents, engine.Block)]
        block.places_nT = block.places_nT.clone()  # the hidden column, whatever is put into the inputs later
        return run

    want = sampled(model, tokenizer, 0.0)
    monkeypatch.setattr(engine, "captured", captured)
    slots = engine.Slots(model, 5, 200, static=True)
    same(sampled(model, tokenizer, 0.0, slots=slots), want)
    said = "".join(capsys.readouterr())
    assert len(calls) == 1 and not slots.graphs and said.count("CUDA graphs are off") == 1 == said.count("\n")


def test_a_capture_that_fails_leaves_its_stream(monkeypatch):
    """Claim: torch.cuda.graph stays on the capture stream if ending a capture fails; captured goes back to the stream
    that it came from.
    Fails if: `torch.cuda.set_stream(now)` goes.
    """
    current, now, own = [], mock.Mock(), mock.Mock()

    @contextlib.contextmanager
    def graph(graph, pool, stream):
        current.append(stream)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {"current_stream": lambda device: now, "stream": lambda stream: contextlib.nullcontext(), "graph": graph}
    for name, fake in (fakes | {"CUDAGraph": mock.Mock, "set_stream": current.append}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    slots = mock.Mock(device=torch.device("cuda"), stream=own)
    with pytest.raises(RuntimeError, match="during capture"):
        engine.captured(lambda: None, slots)
    assert current == [own, now]


def test_without_graphs_none_is_made(model, tokenizer, monkeypatch):
    """Claim: Slots(graphs=False), which --no-cuda-graphs asks for, decodes over the static buffers step by step.
    Fails if: feed does not look at slots.graphs (`slots.graphs and place` -> `slots.static and place`).
    """
    monkeypatch.setattr(engine, "captured", None)
    slots = engine.Slots(model, 5, 200, static=True, graphs=False)
    same(sampled(model, tokenizer, 0.0, slots=slots), sampled(model, tokenizer, 0.0))
    assert not slots.steps


def test_there_are_at_most_twelve_shapes_of_graphs(model):
    """Claim: for every number of rows and every width there is a graph that holds them, three numbers of rows and four
    widths at the most, models.GRAPHS of the memory table; the width is a quarter of the buffer too large at most.
    Fails if: another number of rows is allowed, or the width is not cut to the visible columns.
    """
    for count, length in ((64, 256), (20, 256), (5, 37), (1, 9)):
        slots = engine.Slots(model, count, length, static=True)
        shapes = {(n, w): engine.graph_shape(slots, n, w) for n in range(1, count + 1) for w in range(1, length + 1)}
        for (n, w), (rows, width) in shapes.items():
            assert n <= rows <= count and w <= width <= min(length, w + -(-length // 4))
        assert len(set(shapes.values())) <= models.GRAPHS


class Reads(TorchDispatchMode):
    """Notes the memory that was there before, and is read."""

    def __init__(self):
        super().__init__()
        self.made, self.outside = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = lambda values: [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
        self.outside += [StorageWeakRef(s) for s in storages((args, kwargs)) if s._cdata not in self.made]
        out = func(*args, **kwargs or {})
        self.made |= {s._cdata for s in storages(out)}
        return out


def test_a_graph_reads_only_what_lives_as_long_as_its_slots(model, monkeypatch):
    """Claim: a graph keeps addresses and not tensors, so whatever a captured step reads is still there when everything
    but slots and weights is gone. With row numbers of its own it read freed memory at the first real card.
    Fails if: decode gives its Block a new tensor of row numbers (`slots.numbers[:rows]` -> `slots.numbers[:rows] + 0`).
    """
    reads = Reads()

    def checked(policy, slots, shape, inputs, run, block, ids_n1):
        slots.steps[shape] = inputs, None
        with reads:
            return run()[: len(ids_n1)]

    monkeypatch.setattr(engine, "checked", checked)
    slots = engine.Slots(model, 3, 40, static=True)
    with torch.no_grad():
        for blocks in ([[1, 2, 3], [4, 5]], [[6], [7]]):
            engine.feed(model, slots, [0, 1], blocks)
    assert len(reads.outside) > len(list(model.parameters()))
    assert not any(storage.expired() for storage in reads.outside)


# ----- Wrong devices, found without a device -----
# FakeTensorMode makes CUDA tensors without memory, in any build of torch, and refuses to mix them with CPU tensors.


class FakeCard(TorchFunctionMode):
    """A card without a card: inside, tensors on "cuda" are FakeTensors, which have no memory and refuse to mix with
    those of the CPU. Indexing, and a few methods, want a real build of torch; they are spelled out in ops that do
    not."""

    SPELLED_OUT = {
        torch.Tensor.__invert__: torch.bitwise_not,
        torch.Tensor.contiguous: lambda t: t.clone(memory_format=torch.contiguous_format),
        torch.Tensor.copy_: torch.ops.aten.copy_,
        torch.Tensor.to: lambda t, *a, **how: torch.ops.aten._to_copy(
            t, **{"dtype" if isinstance(where, torch.dtype) else "device": where for where in a}, **how
        ),
        torch.Tensor.float: lambda t: torch.ops.aten._to_copy(t, dtype=torch.float32),
    }

    def __enter__(self):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.SPELLED_OUT:
            return self.SPELLED_OUT[func](*args, **kwargs or {})
        if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return func(*args, **kwargs or {})
        view, index, *value = args
        index = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
            at = next(n for n, i in enumerate(index) if i is Ellipsis)
            index[at : at + 1] = [slice(None)] * (view.dim() - len([i for i in index if i is not None]) + 1)
        dim, tensors = 0, []
        for i in index:
            if isinstance(i, int):
                view = view.select(dim, i)
                continue
            if isinstance(i, slice):
                view = torch.ops.aten.slice(view, dim, i.start, i.stop)
            elif i is None:
                view = view.unsqueeze(dim)
            tensors += [None] * (dim - len(tensors)) + [i if isinstance(i, torch.Tensor) else None]
            dim += 1
        if any(t is not None for t in tensors):
            put = torch.ops.aten.index_put_
            return put(view, tensors, torch.as_tensor(value[0])) if value else torch.ops.aten.index(view, tensors)
        return torch.ops.aten.copy_(view, torch.as_tensor(value[0])) if value else view

    @staticmethod
    def of(model):
        """The model with every parameter and buffer on the card."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        new = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        tensors[name] = torch.nn.Parameter(new) if tensors is module._parameters else new
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return model


@pytest.mark.parametrize("kind, rank", [("Qwen2", 3), ("Qwen3", 0), ("Llama", 3)])
def test_bodies_adapters_critic_and_logprobs_stay_on_the_card(kind, rank):
    """Claim: bf16 bodies with fused norms, adapters of two roles, the critic, log-probs of policy and reference: every
    tensor is on the card, in the dtype that it should have.
    Fails if: new_state makes its tensor without `device=`.
    """
    networks = make_models(shaped(kind, dtype=torch.bfloat16), train.Config(algo="ppo", lora_rank=rank))
    models.fuse_norms(networks.policy)
    with FakeCard(), torch.no_grad():
        for network in (networks.policy, networks.reference, networks.critic):
            FakeCard.of(network)
        ids_BL = torch.tensor([[1, 2, 3, 4, 5, 6, 7]] * 3, device="cuda")
        with role(networks.reference, None):
            hidden_BTD, weight_VD, targets_BT = searchr1.head_inputs(networks.reference, ids_BL)
        with role(networks.critic, "critic"):
            values_BT = networks.critic(ids_BL)
        state = kernels.new_state(18, hidden_BTD.device)
        x_nV = kernels.matmul_fp32(hidden_BTD.flatten(0, 1), weight_VD.T)
        kernels.statistics_twin(x_nV, x_nV, None, targets_BT.flatten(), state, torch.empty_like(state[:2]), 0, 0.7)
        out = kernels.finish_state(state, 0.7, True)
    assert hidden_BTD.dtype == torch.bfloat16 and hidden_BTD.device.type == "cuda"
    assert all(t.device.type == "cuda" and t.dtype == torch.float32 for t in (*out, values_BT, x_nV))


def test_advantages_and_losses_stay_on_the_card():
    """Claim: rewards at the end, GAE, whitening, group advantages, all losses and KLs make no tensor on the CPU.
    Fails if: rewards_at_end makes its zeros without `device=`.
    """
    with FakeCard():
        kinds = torch.float32, torch.float32, torch.bool
        old_BT, new_BT, mask_BT = (torch.empty(4, 6, dtype=kind, device="cuda") for kind in kinds)
        rewards_BT = searchr1.rewards_at_end(torch.empty(4, device="cuda"), mask_BT)
        advantages_BT, returns_BT = searchr1.gae(rewards_BT, old_BT, mask_BT)
        results = [searchr1.whiten(advantages_BT, mask_BT), searchr1.group_advantages(rewards_BT.sum(1), 2)]
        results += searchr1.policy_loss(new_BT, old_BT, advantages_BT, mask_BT)
        results += [searchr1.value_loss(new_BT, old_BT, returns_BT, mask_BT), searchr1.token_mean(new_BT, mask_BT)]
        results += [kl(new_BT, old_BT) for kl in (searchr1.kl_k1, searchr1.kl_k2, searchr1.kl_k3)]
    assert all(t.device.type == "cuda" for t in results)


def test_a_batch_is_made_on_the_card():
    """Claim: all that collate makes for a card lies there.
    Fails if: collate leaves a field out of its `.to(device)`.
    """
    r = searchr1.Rollout("q", [1, 2, 3], [False, True, True], [0.0, -1.0, -1.0], 1)
    with FakeCard():
        fields = [t for t in vars(searchr1.collate([r, r], torch.device("cuda"))).values() if t is not None]
    assert len(fields) == 4 and all(t.device.type == "cuda" for t in fields)


def test_blocks_hidden_states_and_samples_stay_on_the_card():
    """Claim: a prompt and then single tokens, fed to a bf16 model over static buffers, and what is drawn from their
    logits: Slots, Block, feed and sample make no tensor on the CPU.
    Fails if: place makes its table, or hidden_states its mask, without `device=`.
    """
    policy = shaped("Qwen2", dtype=torch.bfloat16)
    slots = engine.Slots(policy, 4, 32, static=True, graphs=False)
    slots.device = torch.device("cuda")
    with FakeCard(), torch.no_grad():
        FakeCard.of(policy)
        for blocks in ([[1, 2, 3], [4]], [[5], [6]]):
            logits_nV = engine.feed(policy, slots, [0, 1], blocks)
            for temperature in (0, 0.7, 1):
                draws_n = torch.empty(2, dtype=torch.float64, device="cuda")
                ids_n, logprobs_n = engine.sample(logits_nV, temperature, draws_n)
                assert ids_n.device.type == logprobs_n.device.type == "cuda" and ids_n.shape == (2,)


def test_the_fake_card_refuses_a_tensor_of_the_cpu():
    """Claim: these tests can fail: a sum with a tensor of the CPU, or a condition from there, is an error, as on a real
    card.
    Fails if: FakeCard.__enter__ does not enter its FakeTensorMode.
    """
    with FakeCard():
        x = torch.empty(3, 4, device="cuda")
        for wrong in (lambda: x + torch.empty(3, 4), lambda: torch.where(torch.empty(3, 4) > 0, x, x)):
            with pytest.raises(RuntimeError, match="same device|two different devices"):
                wrong()


# ----- Fused norms -----


def test_fused_norms_are_the_norms(tokenizer):
    """Claim: with fuse_norms the hidden states of Llama, Qwen2 and Qwen3 are the same up to rounding, gradients, too; a
    copy (the reference) has its own norms.
    Fails if: fuse_norms leaves out the weight, or takes torch's own epsilon.
    """
    for kind in ("Qwen2", "Qwen3", "Llama"):
        plain, ids = shaped(kind), torch.randint(100, (2, 9))
        fused = copy.deepcopy(plain)
        for a, b in zip(plain.modules(), fused.modules()):
            if hasattr(a, "variance_epsilon"):
                torch.nn.init.normal_(a.weight)
                b.weight.data.copy_(a.weight)
                a.variance_epsilon = b.variance_epsilon = 0.1
        models.fuse_norms(fused)
        again = copy.deepcopy(fused)
        for p in again.base_model.norm.parameters():
            torch.nn.init.zeros_(p)
        want, got = (m.base_model(input_ids=ids).last_hidden_state for m in (plain, fused))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert (again.base_model(input_ids=ids).last_hidden_state == 0).all()
        for hidden in (want, got):
            hidden.sin().sum().backward()
        for p, q in zip(plain.base_model.parameters(), fused.base_model.parameters()):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-3)


class Kernels(TorchDispatchMode):
    """Counts the ops that are not views. On a GPU each of them is at least one kernel; of a call in WHOLE it is one."""

    WHOLE = (torch.nn.functional.rms_norm, torch.nn.functional.scaled_dot_product_attention)

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.inside = 0, False
        for call in self.WHOLE:
            monkeypatch.setattr(torch.nn.functional, call.__name__, self.counted(call))

    def counted(self, call):
        def once(*args, **how):
            self.count, self.inside = self.count + 1, True
            out = call(*args, **how)
            self.inside = False
            return out

        return once

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = "_unsafe_view", "expand", "reshape"
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not (self.inside or view or func._schema.name.removeprefix("aten::") in views)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "kind, rank, plain, fused",
    [("Qwen2", 0, 40, 26), ("Llama", 0, 40, 26), ("Qwen3", 0, 56, 28), ("Qwen2", 3, 54, 40), ("Llama", 3, 54, 40)],
)
def test_a_decoding_step_starts_so_many_kernels_a_layer(monkeypatch, kind, rank, plain, fused):
    """Claim: models.STEP_KERNELS and ADAPTER_KERNELS are what a bf16 step starts in a layer, two more for Qwen3's norms
    of queries and keys; without fused norms it starts 14 more (Qwen3: 28).
    Fails if: Adapted adds its product in another kernel (`+` instead of `addmm_`), or fuse_norms does nothing.
    """

    def count(layers, fuse):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        policy = shaped(kind, dtype=torch.bfloat16, num_hidden_layers=layers, **heads)
        if fuse:
            models.fuse_norms(policy)
        if rank:
            adapt(policy, ("policy",), rank, 6.0)
        slots = engine.Slots(policy, 4, 64, static=True)
        with torch.no_grad():
            engine.feed(policy, slots, [0, 1, 2, 3], [[1, 2]] * 4)
            ids_n1, _, block = slots.place(range(4), [[1]] * 4)
            with monkeypatch.context() as patched, Kernels(patched) as kernels:
                engine.hidden_states(policy, block, ids_n1)
        return kernels.count

    assert [count(3, fuse) - count(2, fuse) for fuse in (False, True)] == [plain, fused]
    more = 2 * (kind == "Qwen3")
    assert fused == models.STEP_KERNELS + more + models.ADAPTER_KERNELS * bool(rank)
    assert count(2, True) <= 2 * fused + 20  # beside the layers: positions, the mask, the last norm


# ----- What a GPU machine may lack, or have too much of -----


def test_hugging_faces_package_kernels_beside_kernels_py_is_harmless():
    """Claim: where Hugging Face's package `kernels` is installed, transformers takes this repository's file for it. All
    that the installed transformers then imports is there, and decorates nothing: the model classes are its own.
    Fails if: __getattr__ goes from kernels.py, or a name from HUGGING_FACE.
    """
    folder = Path(transformers.__file__).parent / "integrations/hub_kernels.py"
    imports = [node for node in ast.walk(ast.parse(folder.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [name.name for node in imports if node.module == "kernels" for name in node.names]
    assert len(names) > 10
    for name in names:
        assert getattr(kernels, name)("RMSNorm")(FakeCard) is FakeCard
    with pytest.raises(AttributeError, match="kernels.py has no fused$"):
        kernels.fused


def test_without_a_compiler_one_line_says_so_before_anything_is_trained(monkeypatch):
    """Claim: the kernels are launched once when the models are made; what Triton says without gcc is one line.
    Fails if: try_kernels catches OSError only.
    """
    models.try_kernels("cpu")

    def launch(*args):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(models, "fused_logprob_kl", launch)
    with pytest.raises(engine.Mistake, match="Triton cannot build .* C compiler.*; install gcc or clang"):
        models.try_kernels("cpu")


@pytest.mark.parametrize(
    "wish, device, has_bf16, want",
    [
        ("auto", "cpu", None, torch.float32), ("bf16", "cpu", None, torch.bfloat16),
        ("auto", "mps", None, torch.float32),
        ("auto", "cuda", True, torch.bfloat16), ("fp32", "cuda:0", True, torch.float32),
        ("auto", "cuda", False, torch.float32), ("bf16", "cuda", False, torch.float32),
    ],
)  # fmt: skip
def test_a_card_without_bf16_gets_fp32_and_a_line(monkeypatch, capsys, wish, device, has_bf16, want):
    """Claim: bf16 by default where a GPU computes in it. A T4, which only pretends to, gets fp32, and a line says so.
    Fails if: weights_dtype asks with including_emulation=True, or a CPU gets bf16 by default.
    """

    def supported(including_emulation=True):
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert data.weights_dtype(wish, device) == want
    assert capsys.readouterr().out.count("no bf16") == (has_bf16 is False)
