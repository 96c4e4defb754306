"""What several test files share: the files under test on the path, a small random model, a small world."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. The variable is read when kernels.py is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub; with no network the question would take 20 seconds
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from retrieval import build_index


def random_model(tokenizer, seed=0, loud=(), layers=2):
    """A random Qwen3 over the tokenizer's vocabulary. Tokens in `loud` get a tripled row in the lm_head, so
    that a model that has learned nothing still opens and closes tags now and then."""
    torch.manual_seed(seed)
    config = data.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64,
        tie_word_embeddings=False, initializer_range=0.3, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    model = data.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for token in loud:
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] *= 3
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return data.make_tokenizer()


@pytest.fixture(scope="session")
def world():
    return data.make_world(0)


@pytest.fixture(scope="session")
def engine(world):
    return build_index(world.passages)


@pytest.fixture()
def model(tokenizer):
    return random_model(tokenizer, loud=("<search>", "</search>", "<answer>", "</answer>"))
