"""Our adapters against peft's: the same base weights, the same adapter weights, the same inputs.

    pip install peft        (for this comparison only; nothing else here needs it)
    python tests/bench_lora.py [--hidden 512] [--layers 4] [--rank 16] [--tokens 1024] [--repeats 5]

Both wrap every linear layer of the body. The columns: the largest differences of hidden states and of the adapters'
gradients, between ours and peft's and of each from float64 (the same model and adapters); milliseconds of a pass
forward and back, and of one decoding step, a token a row against keys and values of 256. Times are medians.
"""

import argparse
import copy
import sys
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_kernels import seconds
from models import Adapted, adapt, fuse_norms

FAMILIES = ("Qwen2", "Qwen3", "Llama")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLUMNS = (
    "model", "dtype", "outputs: ours - peft", "ours - fp64", "peft - fp64", "gradients: ours - peft", "ours - fp64",
    "peft - fp64", "ours, ms", "peft, ms", "ratio", "decoding, ms", "peft, ms", "ratio",
)  # fmt: skip


def pair(family, flags, device, dtype):
    """(ours, peft's, {layer: (A, B of ours), (A, B of peft's)}): one random base, one set of adapters."""
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(
        vocab_size=4096, hidden_size=flags.hidden, intermediate_size=4 * flags.hidden, num_hidden_layers=flags.layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=flags.hidden // 8, max_position_embeddings=4096,
    )  # fmt: skip
    base = getattr(transformers, family + "ForCausalLM")(config).to(device).eval()
    for p in base.parameters():
        p.data = p.data.to(dtype)
    ours = adapt(copy.deepcopy(base), ("policy",), flags.rank, 2 * flags.rank)
    how = peft.LoraConfig(r=flags.rank, lora_alpha=2 * flags.rank, target_modules=LINEARS)
    theirs = peft.get_peft_model(base, how, autocast_adapter_dtype=False).eval().base_model.model
    named, layers = dict(theirs.named_modules()), {}
    for name, layer in ours.named_modules():
        if isinstance(layer, Adapted):
            torch.nn.init.normal_(layer.B["policy"], std=0.02)
            mine = layer.A["policy"], layer.B["policy"]
            other = named[name].lora_A["default"].weight, named[name].lora_B["default"].weight
            for source, target in zip(mine, other):
                target.data.copy_(source.data)
            layers[name] = mine, other
    return ours, theirs, layers


def forward_backward(model, ids):
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden if hidden.dtype == torch.float64 else hidden.float()).sin().sum().backward()
    return hidden.detach()


def decoding(model, rows, width=256):
    """A call that takes one decoding step; the cache is cut back after it."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.zeros(rows, width, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def step():
        model.base_model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def differences(ours, theirs, layers, ids):
    """Six largest differences: outputs and gradients, each ours - peft, ours - float64, peft - float64."""
    exact = copy.deepcopy(ours)
    fuse_norms(exact)  # transformers computes norms in fp32, whatever the weights are
    for p in exact.parameters():
        p.data = p.data.double()
    outputs = [forward_backward(model, ids).double() for model in (ours, theirs, exact)]
    gradients = [[], [], []]
    for name, (mine, other) in layers.items():
        wanted = exact.get_submodule(name)
        for found, tensors in zip(gradients, (mine, other, (wanted.A["policy"], wanted.B["policy"]))):
            found += [t.grad.double() for t in tensors]

    def apart(i, j):  # sizes differ from layer to layer, so over the largest entry of the exact gradient
        triples = zip(gradients[i], gradients[j], gradients[2])
        return max(((a - b).abs().max() / c.abs().max()).item() for a, b, c in triples)

    pairs = ((0, 1), (0, 2), (1, 2))
    return [(outputs[i] - outputs[j]).abs().max().item() for i, j in pairs] + [apart(i, j) for i, j in pairs]


def main():
    parser = argparse.ArgumentParser(description="Our adapters against peft's.")
    for name, value in {"hidden": 512, "layers": 4, "rank": 16, "tokens": 1024, "rows": 16, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    sizes = f"hidden {flags.hidden}, {flags.layers} layers, rank {flags.rank}, 4 rows of {flags.tokens // 4} tokens"
    print(f"{sizes}; decoding: {flags.rows} rows")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs, layers = pair(family, flags, device, dtype)
            ids = torch.randint(4096, (4, flags.tokens // 4), device=device)
            cells = [family, str(dtype)[6:]] + [f"{d:.1e}" for d in differences(ours, theirs, layers, ids)]
            passes = [lambda m=m: forward_backward(m, ids) for m in (ours, theirs)]
            for calls in (passes, [decoding(m, flags.rows) for m in (ours, theirs)]):
                mine, other = (seconds(call, device, flags.repeats) * 1000 for call in calls)
                cells += [f"{mine:.1f}", f"{other:.1f}", f"{mine / other:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
