"""Our adapters against peft's: the same base weights, the same adapter weights, the same inputs.

    pip install peft        (for this comparison only; nothing else here needs it)
    python tests/bench_lora.py [--hidden 512] [--layers 4] [--rank 16] [--tokens 1024] [--repeats 5]

Both wrap every linear layer of the body. Prints the largest differences of hidden states and of the adapters' gradients,
beside those of float64 (the same model and adapters), and the time of a pass forward and back, medians, in turn; then the
time of one decoding step, a token a row against keys and values of 256.
"""

import argparse
import copy
import sys
from pathlib import Path

import peft
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels
import train

FAMILIES = {
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "Llama": (LlamaConfig, LlamaForCausalLM),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pair(family, flags, device, dtype):
    """(ours, peft's, {layer: (A, B) of ours, A, B of theirs}): one random base, one set of adapters."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    base = model(
        config(
            vocab_size=4096, hidden_size=flags.hidden, intermediate_size=4 * flags.hidden, num_hidden_layers=flags.layers,
            num_attention_heads=8, num_key_value_heads=2, head_dim=flags.hidden // 8, max_position_embeddings=4096,
        )
    ).to(device).eval()  # fmt: skip
    for p in base.parameters():
        p.data = p.data.to(dtype)
    ours = train.adapt(copy.deepcopy(base), ("policy",), flags.rank, 2 * flags.rank)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=flags.rank, lora_alpha=2 * flags.rank, target_modules=LINEARS), autocast_adapter_dtype=False
    ).eval()
    named, layers = dict(theirs.base_model.model.named_modules()), {}
    for name, layer in ours.named_modules():
        if isinstance(layer, train.Adapted):
            torch.nn.init.normal_(layer.B["policy"], std=0.02)
            same = named[name].lora_A["default"].weight, named[name].lora_B["default"].weight
            for mine, other in zip((layer.A["policy"], layer.B["policy"]), same):
                other.data.copy_(mine.data)
            layers[name] = ((layer.A["policy"], layer.B["policy"]), same)
    return ours, theirs.base_model.model, layers


def forward_backward(model, ids):
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.float().sin().sum().backward()
    return hidden.detach()


def decoding(model, rows, width=256):
    """A call that takes one decoding step; the cache is cut back after it."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(rows, width, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def step():
        model.base_model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def main():
    parser = argparse.ArgumentParser(description="Our adapters against peft's.")
    for name, value in {"hidden": 512, "layers": 4, "rank": 16, "tokens": 1024, "rows": 16, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    print(
        f"hidden {flags.hidden}, {flags.layers} layers, rank {flags.rank}, 4 rows of {flags.tokens // 4} tokens; decoding: {flags.rows} rows"
    )
    print(
        "| model | dtype | outputs: ours - peft | ours - fp64 | peft - fp64 | gradients: ours - peft | ours - fp64 | peft - fp64 | ours, ms | peft, ms | ratio | decoding, ms | peft, ms | ratio |"
    )
    print("|" + "---|" * 14)
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs, layers = pair(family, flags, device, dtype)
            ids = torch.randint(4096, (4, flags.tokens // 4), device=device)
            exact = copy.deepcopy(ours)
            for p in exact.parameters():
                p.data = p.data.double()
            outputs = [forward_backward(model, ids).double() for model in (ours, theirs, exact)]
            gradients = {"ours": [], "peft": [], "fp64": []}
            for name, (mine, other) in layers.items():
                wanted = exact.get_submodule(name)
                for who, tensors in zip(gradients, (mine, other, (wanted.A["policy"], wanted.B["policy"]))):
                    gradients[who] += [t.grad.double() for t in tensors]
            # Of gradients, whose sizes differ from layer to layer: largest difference over the tensor's largest entry.
            apart = lambda a, b: max(
                ((x - y).abs().max() / z.abs().max()).item() for x, y, z in zip(gradients[a], gradients[b], gradients["fp64"])
            )
            differences = [(outputs[i] - outputs[j]).abs().max().item() for i, j in ((0, 1), (0, 2), (1, 2))]
            differences += [apart(a, b) for a, b in (("ours", "peft"), ("ours", "fp64"), ("peft", "fp64"))]
            del exact
            times = []
            for calls in (
                [lambda m=m: forward_backward(m, ids) for m in (ours, theirs)],
                [decoding(m, flags.rows) for m in (ours, theirs)],
            ):
                times.append([kernels.seconds(call, device, flags.repeats) * 1000 for call in calls])
            cells = [f"{d:.1e}" for d in differences] + [f"{x:.1f}" for a, b in times for x in (a, b)]
            cells[8:8], cells[11:11] = [f"{times[0][0] / times[0][1]:.2f}"], [f"{times[1][0] / times[1][1]:.2f}"]
            print(f"| {family} | {str(dtype)[6:]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
