"""Claims about the networks of a run: adapters as roles of one base, fp32 masters, gradient checkpointing, presets, and
memory told in advance."""

import copy
import dataclasses
import os
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import bench_gpu
import models
import searchr1
import train
from bench_kernels import peak_memory
from conftest import a_batch, shaped
from engine import Mistake, Slots, feed
from models import Adapted, adam, adapt, make_models, merged_state, predict_memory, predicted_peak, role, trained

FAMILIES = ("Qwen2", "Qwen3", "Llama")
ROOT = Path(models.__file__).parent


def grow(model):
    """Adapters as after some training: no B is 0."""
    for layer in model.modules():
        for name in layer.B if isinstance(layer, Adapted) else ():
            torch.nn.init.normal_(layer.B[name], std=0.1)


def grown(policy):
    """`policy` with grown adapters of rank 3 for both roles; alpha / rank is 2."""
    adapt(policy, ("policy", "critic"), rank=3, alpha=6)
    grow(policy)
    return policy


def with_sums(base, adapted, name):
    """`base` in float64 with the weights W + 2 B A of role `name`: what an adapted model is, by definition."""
    want = copy.deepcopy(base).double()
    with torch.no_grad():
        for key, layer in adapted.named_modules():
            if isinstance(layer, Adapted):
                want.get_submodule(key).weight += 2 * layer.B[name].double() @ layer.A[name].double()
    return want


# ----- Roles [D14] -----


@pytest.mark.paper
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapted_model_is_the_model_with_the_sums_as_its_weights(kind):
    """Claim: at first every role answers as the base does, bit for bit, and role None always does. Later policy and
    critic are the float64 models with the weights W + alpha/rank B A, each with its own, in outputs and in gradients.
    Fails if: `alpha=self.scale` is dropped in Adapted.forward, or one role's B is multiplied with another's A.
    """
    base, ids = shaped(kind), torch.arange(24).view(2, 12)
    answer = lambda model: model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    fresh = adapt(copy.deepcopy(base), ("policy", "critic"), 3, 6)
    for name in ("policy", "critic"):
        with role(fresh, name):
            assert torch.equal(answer(fresh), answer(base))
    adapted = grown(copy.deepcopy(base))
    assert not any(isinstance(m, torch.nn.Linear) for m in adapted.base_model.modules())
    with role(adapted, None):
        assert torch.equal(answer(adapted), answer(base))
    layers = {name: m for name, m in adapted.named_modules() if isinstance(m, Adapted)}
    assert len(layers) == 14
    for name in ("policy", "critic"):
        want = with_sums(base, adapted, name)
        with role(adapted, name):
            torch.testing.assert_close(answer(adapted).double(), answer(want), atol=2e-5, rtol=1e-4)
            answer(adapted).sin().sum().backward()
        answer(want).sin().sum().backward()
        assert {key for key, p in adapted.named_parameters() if p.grad is not None} == set(trained(adapted, name))
        for key, m in layers.items():  # by the chain rule, from the gradient of W
            dW, A, B = want.get_submodule(key).weight.grad, m.A[name].double(), m.B[name].double()
            torch.testing.assert_close(m.A[name].grad.double(), 2 * B.T @ dW, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(m.B[name].grad.double(), 2 * dW @ A.T, atol=1e-4, rtol=1e-3)
        adapted.zero_grad()


def test_only_the_upper_layers_get_adapters_and_nothing_below_is_kept_for_them():
    """Claim: with `upper` 2 of 4 layers, all linear layers of the two highest and no others are adapted. The hidden
    states that enter them need no gradient, so the backward pass ends there; predict_memory counts no more.
    Fails if: adapt takes the lowest layers (`[-upper:]` -> `[:upper]`), or predict_memory all of them.
    """
    policy = shaped("Qwen3", num_hidden_layers=4)
    memory = predict_memory(policy, train.Config(lora_rank=3, lora_layers=2))
    networks = make_models(policy, train.Config(lora_rank=3, lora_layers=2))
    adapted = {name for name, m in policy.named_modules() if isinstance(m, Adapted)}
    assert len(adapted) == 14 and all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in adapted)
    entered = []
    for layer in policy.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].requires_grad))
    policy(input_ids=torch.arange(6)[None])
    assert entered == [False, False, False, True]
    assert memory["adapters"] == sum(4 * p.numel() for p in trained(networks.policy, "policy").values())
    all_layers = predict_memory(shaped("Qwen3", num_hidden_layers=4), train.Config(lora_rank=3))
    assert memory["adapters"] == all_layers["adapters"] / 2 and memory["activations"] < 0.6 * all_layers["activations"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_merged_checkpoint_answers_like_the_policy(kind, tied, tmp_path):
    """Claim: what is saved of an adapted policy is an ordinary folder: it has the names of the base model and no
    adapter, and the logits of the loaded model are those of the unmerged policy to 1e-5.
    Fails if: merged_state leaves out the scale, merges the critic's adapter, or keeps the adapters' own tensors.
    """
    base, ids = shaped(kind, tied), torch.arange(24).view(2, 12)
    policy = grown(copy.deepcopy(base))
    base.save_pretrained(tmp_path / "base")
    policy.save_pretrained(tmp_path / "merged", state_dict=merged_state(policy))
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("base", "merged")]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        got, want, before = (model(input_ids=ids).logits for model in (merged, policy, base))
    assert names[0] == names[1] and (want - before).abs().max() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.paper
def test_on_one_base_the_reference_is_the_base_and_the_critic_has_its_own_adapter(tokenizer, model):
    """Claim: [Eq. 1, Eq. 2] phase 4 of PPO with adapters scores the reference with all adapters off, and the values
    with the critic's, whatever the policy has become: float64 models with the sums as weights say the same. So does the
    KL that phase 6 computes for a loss, exact and sampled.
    Fails if: one of the two `role(models.reference, None)` goes, or `role(models.critic, "critic")` in token_rewards.
    """
    batch, rewards = a_batch(tokenizer, model)
    config = train.Config(algo="ppo", lora_rank=3, lora_alpha=6.0, kl_in="reward")
    networks = make_models(copy.deepcopy(model), config)
    grow(networks.policy)
    torch.nn.init.normal_(networks.critic.head.weight)
    train.token_rewards(networks, batch, rewards, config)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=batch.ids_BL).logits[:, :-1]
        body = with_sums(model, networks.policy, "critic").base_model
        values = body(input_ids=batch.ids_BL).last_hidden_state[:, :-1] @ networks.critic.head.weight[0].double()
        policy = with_sums(model, networks.policy, "policy")(input_ids=batch.ids_BL).logits[:, :-1].log_softmax(-1)
    reference = logits.log_softmax(-1)
    own = lambda x_BTV: x_BTV.gather(-1, batch.ids_BL[:, 1:, None])[..., 0] * batch.mask_BT
    torch.testing.assert_close(batch.ref_logprobs_BT.double(), own(reference), atol=1e-4, rtol=0)
    for row, length in enumerate(batch.lengths_B - 1):
        torch.testing.assert_close(batch.values_BT[row, :length].double(), values[row, :length], atol=1e-4, rtol=1e-4)
    _, kl = train.new_logprobs(networks, batch, dataclasses.replace(config, kl_in="loss"))
    exact = searchr1.token_mean((policy.exp() * (policy - reference)).sum(-1), batch.mask_BT)
    k3 = searchr1.token_mean(searchr1.kl_k3(own(policy), own(reference)), batch.mask_BT)
    assert (kl["kl_exact"].item(), kl["kl"].item()) == pytest.approx((exact.item(), k3.item()), rel=1e-3)
    assert exact > 0.01


# ----- Gradient checkpointing -----


def ppo_step(policy, batch, **values):
    """One PPO update of grown adapters and head, by plain SGD at a rate of 1 -> (Models, {name: change})."""
    values |= {"warmup_steps": 0, "critic_lr_warmup_steps": 0, "critic_warmup_steps": 0, "minibatches": 1}
    config = train.Config(algo="ppo", lr=1.0, critic_lr=1.0, kl_coef=0.5, max_grad_norm=1e9, **values)
    networks, before, after = make_models(policy, config), {}, {}
    sgd = lambda network: torch.optim.SGD(network.parameters(), lr=1.0)
    networks.learners = [(name, network, sgd(network)) for name, network, _ in networks.learners]
    torch.manual_seed(1)
    grow(networks.policy)
    torch.nn.init.normal_(networks.critic.head.weight)  # from 0 nothing would reach the body
    for found in (before, after):
        for name, network, _ in networks.learners:
            found |= {(name, key): p.detach().clone() for key, p in trained(network, name).items()}
        if found is before:
            train.update(networks, batch, 1, config, random.Random(0))
    return networks, {key: after[key] - before[key] for key in after}


@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_checkpointing_changes_the_memory_and_not_the_gradients(tokenizer, model, rank):
    """Claim: with --gradient-checkpointing PPO's update moves policy and critic as without it, adapters or not. No
    layer is put into training mode, and autograd holds less than half.
    Fails if: backward() of the value loss stands outside `with role(models.critic, "critic")` in update: the forward
    pass that it repeats is then the policy's.
    """
    batch, _ = a_batch(tokenizer, model)
    moved, kept = [], []
    for on in (False, True):
        networks, change = ppo_step(copy.deepcopy(model), batch, lora_rank=rank, gradient_checkpointing=on)
        moved.append(change)
        assert not any(m.training for m in networks.policy.modules()) and networks.critic.body.training is False
        saved = {}  # storages that autograd keeps
        note = lambda t: saved.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            hidden, *_ = searchr1.head_inputs(networks.policy, batch.ids_BL)
        weights = {p.untyped_storage().data_ptr() for p in networks.policy.parameters()}
        kept.append(sum(size for at, size in saved.items() if at not in weights))
    assert moved[0].keys() == moved[1].keys() and {name for name, _ in moved[0]} == {"policy", "critic"}
    of_critic = [change for (_, key), change in moved[0].items() if ".critic" in key or "body" in key]
    assert max(change.abs().max() for change in of_critic) > 1e-3
    for key, change in moved[0].items():
        torch.testing.assert_close(moved[1][key], change, atol=1e-5, rtol=1e-4, msg=str(key))
    assert kept[1] < 0.5 * kept[0]


# ----- fp32 masters -----


@pytest.mark.paper
def test_a_bf16_weight_moves_at_the_papers_learning_rate_only_with_an_fp32_master():
    """Claim: 200 Adam steps at 1e-6 leave a bf16 weight of 0.02 where it was. With a master it moves 2e-4 down, at its
    old address. Gradients of micro-batches are added up in fp32: 1 + 512 times 2^-9 is 2; in bf16 it stays 1.
    Fails if: adam() gives the optimiser the parameters themselves, or hand_over adds up in p.grad.
    """
    p = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    start, address = p.detach().clone(), p.data_ptr()
    bare = torch.optim.AdamW([p], lr=1e-6, weight_decay=0.0)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        bare.step()
    assert torch.equal(p, start)
    p.grad = None
    optimizer = adam({"p": p}, 1e-6, train.Config())
    (master,) = optimizer.param_groups[0]["params"]
    for _ in range(200):
        p.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(master, start.float() - 2e-4, atol=2e-6, rtol=0)
    assert torch.equal(p, master.bfloat16()) and p.data_ptr() == address and p.dtype == torch.bfloat16
    p.sum().backward()
    for _ in range(512):
        (p * 2**-9).sum().backward()
    assert p.grad is None and torch.equal(master.grad, torch.full((4,), 2.0))


# ----- Memory, told in advance -----


def test_predicted_keys_and_values_are_the_buffers_bytes(model):
    """Claim: "keys and values" of predict_memory is what the static buffers of a GPU hold, and what those of a CPU grow
    to at the most.
    Fails if: the extra column or the values are forgotten (`* 2 *` dropped), query heads are counted, or rejection
    sampling's second set is left out; or Slots.place grows without a bound.
    """
    held = 0
    for static, count in ((True, 3), (False, 150)):
        slots = Slots(model, 8, 200, static=static)
        with torch.no_grad():
            feed(model, slots, [0], [[3] * count])
        before, held = held, sum(store.nbytes for layer in slots.layers for store in layer)
        assert before in (0, held)
    assert predict_memory(model, train.Config(slots=8, max_length=200))["keys and values"] == held
    for algo in ("rejection", "format"):  # a second set, for the base model
        memory = predict_memory(model, train.Config(algo=algo, slots=8, max_length=200))
        assert memory["keys and values"] == 2 * held


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (0, torch.bfloat16), (3, torch.bfloat16)])
def test_predicted_weights_adapters_and_optimiser_states_are_the_tensors_bytes(tokenizer, model, rank, dtype):
    """Claim: the first lines of the memory table are exact: PPO with adapters and full, in fp32 and bf16.
    Fails if: predict_memory counts the tied head twice, gives the critic no second adapter, or forgets one of Adam's
    means.
    """
    policy = shaped("Qwen3", True, dtype, len(tokenizer))
    config = train.Config(algo="ppo", lora_rank=rank, critic_warmup_steps=0, minibatches=1)
    memory = predict_memory(policy, config)
    networks = make_models(policy, config)
    train.update(networks, a_batch(tokenizer, model)[0], 9, config, random.Random(0))
    total = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    weights = {id(p): p for m in (networks.policy, networks.reference, networks.critic) for p in m.parameters()}
    names = ("weights", "reference's weights", "critic's weights", "critic's head", "adapters")
    assert sum(memory[name] for name in names) == total(weights.values())
    optimizers = [optimizer for _, _, optimizer in networks.learners]
    masters = [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
    assert memory["fp32 masters"] == total(p for p in masters if id(p) not in weights)
    assert memory["gradients"] == total(masters)
    states = [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    assert memory["Adam"] == total(t for t in states if t.dim())  # without the number of steps, 4 bytes a tensor


def test_memory_is_predicted_for_a_config_that_does_not_say_how_wide_the_mlp_is():
    """Claim: GPT-2's config has no intermediate_size; its MLP is four times as wide as the model, and counted so. It has
    no torch.nn.Linear either: adapters are refused in one line.
    Fails if: predict_memory reads c.intermediate_size alone, or takes another width, or adapt returns a model in which
    nothing is trained.
    """
    policy = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50))
    unsaid = predict_memory(policy, train.Config())
    policy.config.intermediate_size = policy.transformer.h[0].mlp.c_fc.nf
    assert predict_memory(policy, train.Config()) == unsaid
    with pytest.raises(Mistake, match="--lora-rank 8: GPT2LMHeadModel has no linear layers to adapt"):
        adapt(policy, ("policy",), 8, 16.0)


@pytest.mark.parametrize("rank, checkpointing, kind", [(0, False, "Qwen2"), (4, False, "Qwen3"), (4, True, "Llama")])
def test_predicted_activations_are_near_what_a_forward_and_backward_pass_holds(kind, rank, checkpointing):
    """Claim: the peak of one micro-batch's pass forward and back is within 25 % of activations + log-probs + gradients.
    Fails if: predict_memory forgets the MLP's four tensors, or counts all layers in full with gradient checkpointing.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    policy = shaped(kind, True, vocabulary=1000, **sizes, num_key_value_heads=2, head_dim=16)
    config = train.Config(
        lora_rank=rank, gradient_checkpointing=checkpointing, micro_batch_tokens=1024, max_length=256
    )
    memory = predict_memory(policy, config)
    networks, ids = make_models(policy, config), torch.randint(1000, (4, 256))

    def call():
        searchr1.token_logprobs(networks.policy, ids, torch.ones(4, 255)).logp.sum().backward()
        networks.learners[0][2].zero_grad()

    call()
    update = {"gradients", "activations", "log-probs", "one layer"}
    predicted, _ = predicted_peak({name: count * (name in update) for name, count in memory.items()})
    assert predicted == pytest.approx(peak_memory(call, "cpu"), rel=0.25)


# ----- Presets -----


def resolved(preset, algo):
    """What `python train.py --preset PRESET --algo ALGO` runs with, as a dict."""
    given = {"preset": preset, "algo": algo, "output_dir": "none"}
    if preset == "real":
        given |= {"model": "m", "train_data": "q", "corpus": "p"}
    return dataclasses.asdict(train.parse_config(given))


def test_every_preset_fits_a_card_of_24_gb_as_the_readme_says():
    """Claim: for the models' true shapes predict_memory stays below 22.0 GiB in every algorithm, with graphs, context,
    an encoder and an index of 1.05 GiB on the card. The table of the README has its figures. A card
    without bf16 has room for the 0.5B model with adapters in 15 GiB less its context. --preset laptop fits a card of
    6 GB with bf16, and 8 GB without.
    Fails if: a preset's slots are doubled, or the table is not brought up to date.
    """
    readme = (ROOT / "README.md").read_text().splitlines()
    for preset in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "llama-3.2-3b"):
        family, shape = bench_gpu.SHAPES[preset]
        with torch.device("meta"):
            config = getattr(transformers, family + "Config")(**shape)
            model = getattr(transformers, family + "ForCausalLM")(config).bfloat16()
        peaks = []
        for algo in ("grpo", "ppo", "reinforce", "sft", "rejection"):
            memory = predict_memory(model, train.Config(**resolved(preset, algo)), 1.05 * 2**30)
            assert memory["CUDA graphs"] and memory["context, workspaces"]
            peaks.append(predicted_peak(memory)[0] / 2**30)
        assert max(peaks) < 22.0, (preset, peaks)
        grpo, ppo = (f"{peak:.1f}" for peak in peaks[:2])
        (row,) = [line for line in readme if line.startswith(f"| `{preset}` |")]
        assert f"{grpo} / {ppo} GiB" in row, (preset, peaks)
        if preset == "qwen2.5-0.5b":
            configs = [train.Config(**resolved("laptop", algo)) for algo in ("grpo", "ppo", "format")]
            laptop = lambda: [predict_memory(model, config) for config in configs]
            assert max(predicted_peak(memory)[0] for memory in laptop()) < 5.5 * 2**30  # bf16: a card of 6 GB
            model.float()
            assert max(predicted_peak(memory)[0] for memory in laptop()) < 8e9
            small = train.Config(**resolved(preset, "grpo") | {"lora_rank": 32})
            peak = predicted_peak(predict_memory(model, small, 1.05 * 2**30))[0] / 2**30
            assert peak < 14 and f"takes fp32: {peak:.1f} GiB" in models.__doc__


@pytest.mark.paper
def test_the_paper_preset_is_the_official_script():
    """Claim: --preset paper has the values of the official v0.2 scripts and of the paper's appendix, PPO and GRPO.
    Fails if: any of them is changed in PAPER, PAPER_ONE, REAL or the defaults of train.Config.
    """
    both = {
        "model": "Qwen/Qwen2.5-7B", "train_data": "nq+hotpotqa", "steps": 1005, "batch_size": 512, "lr": 1e-6,
        "critic_lr": 1e-5, "warmup_steps": 286, "critic_lr_warmup_steps": 15, "critic_warmup_steps": 0,
        "cooldown": 0, "adam_beta2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0, "clip_eps": 0.2,
        "value_clip": 0.5, "gamma": 1.0, "lam": 1.0, "kl_coef": 0.001, "kl": "k3", "entropy_coef": 0.001,
        "reward": "em", "temperature": 1.0, "max_turns": 4, "max_new_tokens": 500, "max_obs_length": 500,
        "max_length": 4096, "top_k": 3, "invalid_message": "official", "recompute_old_logprobs": True,
        "lora_rank": 0, "no_mask": False,
    }  # fmt: skip
    for algo, own in (
        ("grpo", {"group_size": 5, "minibatches": 10, "kl_in": "loss"}),  # 2560 rollouts in mini-batches of 256
        ("ppo", {"group_size": 1, "minibatches": 2, "kl_in": "reward"}),
    ):
        config = resolved("paper", algo)
        assert {name: config[name] for name in both | own} == both | own


# What the run without flags has, and what six presets have instead.
TINY = {
    "preset": "tiny", "algo": "grpo", "seed": 0, "world_seed": 0, "model": "", "train_data": "", "eval_data": "",
    "corpus": "", "encoder": "hashed", "search_patience": 300, "output_dir": "none", "resume": "", "device": "auto",
    "dtype": "auto",
    "lora_rank": 0, "lora_layers": 0, "lora_alpha": 32.0, "gradient_checkpointing": False, "slots": 0,
    "no_cuda_graphs": False, "steps": 160, "until_learned": True, "batch_size": 48, "group_size": 5, "minibatches": 4,
    "micro_batch_tokens": 4096, "lr": 5e-4, "critic_lr": 1e-3, "warmup_steps": 5,
    "critic_lr_warmup_steps": 5, "critic_warmup_steps": 3, "cooldown": 15, "adam_beta2": 0.95, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "clip_eps": 0.2, "value_clip": 0.5, "gamma": 1.0, "lam": 1.0, "kl_coef": 0.001,
    "kl_in": "loss", "kl": "k3", "entropy_coef": 0.0, "reward": "em", "temperature": 1.0, "max_turns": 3,
    "max_new_tokens": 14, "max_obs_length": 64, "max_length": 256, "top_k": 3, "invalid_message": "paper",
    "no_search": False, "no_mask": False, "shuffle_rewards": False, "recompute_old_logprobs": False,
    "eval_every": 20, "eval_limit": 400, "save_every": 0, "clip_high": 0.0, "prompt": "official", "redraws": 0,
    "easy_first": False, "keep": 2, "stop_on_collapse": False, "wandb": "",
}  # fmt: skip
ONE_CARD = {
    "train_data": "hotpotqa", "corpus": "contexts", "encoder": "intfloat/e5-base-v2", "gradient_checkpointing": True,
    "slots": 64, "batch_size": 16, "minibatches": 1, "micro_batch_tokens": 8192, "cooldown": 0,
    "critic_warmup_steps": 0, "adam_beta2": 0.999, "weight_decay": 0.01, "max_turns": 4, "max_new_tokens": 500,
    "max_obs_length": 500, "max_length": 4096, "invalid_message": "official", "recompute_old_logprobs": True,
    "eval_every": 50, "eval_limit": 100, "save_every": 50,
}  # fmt: skip
LITERAL = {
    "tiny/grpo": {},
    "laptop/format": {
        "model": "Qwen/Qwen2.5-0.5B-Instruct", "train_data": "hotpotqa", "corpus": "bm25:contexts", "lora_rank": 32,
        "lora_layers": 12, "lora_alpha": 64.0, "steps": 20, "batch_size": 8, "group_size": 1, "minibatches": 1,
        "lr": 1e-4, "micro_batch_tokens": 2048, "recompute_old_logprobs": True, "critic_lr": 5e-4, "cooldown": 0,
        "adam_beta2": 0.99, "kl_coef": 0.0,
        "reward": "em+f1", "max_turns": 2, "max_new_tokens": 64, "max_obs_length": 120, "max_length": 448, "top_k": 1,
        "warmup_steps": 4, "eval_every": 20, "eval_limit": 100, "save_every": 5, "clip_high": 0.28, "prompt": "short",
        "easy_first": True,
    },
    "tiny/rejection": {"batch_size": 96, "minibatches": 1, "kl_coef": 0.0, "steps": 60, "until_learned": False},
    "qwen2.5-3b/ppo": ONE_CARD | {
        "model": "Qwen/Qwen2.5-3B", "steps": 300, "warmup_steps": 86, "lora_rank": 32, "lora_alpha": 64.0, "lr": 1e-5,
        "critic_lr": 1e-4, "batch_size": 80, "group_size": 1, "kl_in": "reward", "slots": 56,
    },
    "qwen2.5-0.5b/sft": ONE_CARD | {
        "model": "Qwen/Qwen2.5-0.5B", "steps": 400, "warmup_steps": 114, "critic_lr_warmup_steps": 6, "lr": 1e-5,
        "critic_lr": 1e-5, "group_size": 1, "kl_coef": 0.0, "recompute_old_logprobs": False,
    },
    "llama-3.2-3b/grpo": ONE_CARD | {
        "model": "meta-llama/Llama-3.2-3B", "steps": 300, "warmup_steps": 86, "lora_rank": 32, "lora_alpha": 64.0,
        "lr": 1e-5, "critic_lr": 1e-4, "slots": 20, "micro_batch_tokens": 4096,
    },
    "paper/ppo": ONE_CARD | {
        "model": "Qwen/Qwen2.5-7B", "train_data": "nq+hotpotqa", "corpus": "http://127.0.0.1:8000/retrieve",
        "encoder": "hashed", "steps": 1005, "warmup_steps": 286, "critic_lr_warmup_steps": 15, "batch_size": 512,
        "group_size": 1, "minibatches": 2, "lr": 1e-6, "critic_lr": 1e-5, "entropy_coef": 0.001, "kl_in": "reward",
        "slots": 256, "eval_every": 100, "eval_limit": 1000, "save_every": 100,
    },
}  # fmt: skip


def test_what_a_preset_switches_on_a_flag_switches_off():
    """Claim: every switch that is on in some preset has a --no- form.
    Fails if: only the switches that are on in train.py's own defaults have one, as once.
    """
    on = {name for values in models.PRESETS.values() for name, value in values.items() if value is True}
    assert {"easy_first", "gradient_checkpointing", "recompute_old_logprobs"} <= on
    for name in on:
        assert train.parse_flags([f"--no-{name.replace('_', '-')}"]) == {name: False}


@pytest.mark.parametrize("name", LITERAL)
def test_a_preset_is_these_values(name):
    """Claim: --preset NAME --algo ALGO sets exactly the values that stand here, all of them.
    Fails if: a value of one of these seven presets or any default of train.Config is changed, or one of the seven is
    given another one's dict.
    """
    preset, algo = name.split("/")
    config = resolved(preset, algo)
    assert config == TINY | {"preset": preset, "algo": algo} | LITERAL[name]


@pytest.mark.parametrize("preset", ["real", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "llama-3.2-3b", "paper"])
def test_an_algorithm_changes_the_same_values_of_every_preset(preset):
    """Claim: every preset exists with every algorithm, --algo format with laptop only. Of a real model's preset PPO and
    REINFORCE change the size of a group to 1 and the number of questions to that of the rollouts; fine-tuning changes
    what it has no use for, and its rate.
    Fails if: one entry of PRESETS goes, or is built on the dict of another algorithm.
    """
    names, algos = train.CHOICES["preset"], train.CHOICES["algo"]
    assert resolved("laptop", "rejection")["reward"] == "em"
    learn = [algo for algo in algos if algo != "format"]  # the cold start is for small models
    assert set(models.PRESETS) == {f"{name}/{algo}" for name in names for algo in learn} | {"laptop/format"}
    grpo = resolved(preset, "grpo")
    paper = preset == "paper"  # 512 rollouts of 512 questions, 2560 of as many
    one = {"group_size": 1, "minibatches": 2} if paper else {"group_size": 1, "batch_size": 80}
    imitated = {"kl_coef": 0.0, "recompute_old_logprobs": False, "lr": 1e-4 if grpo["lora_rank"] else 1e-5}
    imitated |= {"minibatches": 1} if paper else {}
    changes = {"ppo": one | {"kl_in": "reward"}, "reinforce": one, "rejection": imitated}
    changes["sft"] = imitated | {"group_size": 1}
    # Slots give way to two full models, to a second adapter, and to rejection sampling's second set.
    ppo = {"qwen2.5-0.5b": {"slots": 24, "micro_batch_tokens": 4096}, "qwen2.5-3b": {"slots": 56}}
    rejection = {"qwen2.5-1.5b": {"slots": 32}, "qwen2.5-3b": {"slots": 24}, "llama-3.2-3b": {"slots": 10}}
    changes["ppo"] |= ppo.get(preset, {})
    changes["rejection"] = imitated | rejection.get(preset, {})
    for algo, change in changes.items():
        differs = {name: value for name, value in resolved(preset, algo).items() if value != grpo[name]}
        assert differs == change | {"algo": algo}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_goes_back_to_the_system(monkeypatch):
    """Claim: after give_back, blocks that were freed below one that lives no longer count for the process. Where the C
    library has no malloc_trim nothing happens.
    Fails if: `libc.malloc_trim(0)` is dropped, or hasattr is not asked.
    """
    held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    blocks = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each
    last, full = blocks.pop(), held()
    del blocks
    models.give_back()
    assert full - held() > 150 * 2**20 and last.all()
    monkeypatch.setattr(models.ctypes, "CDLL", lambda name: object())
    models.give_back()
