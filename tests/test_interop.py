"""Against transformers itself: its models' logits as ours, and our exports in its classes; `./scripts/test.sh interop`.

Every model is tiny, its parameters are large and nowhere zero, and its sizes differ from one another.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from instructax import sharding, training
from instructax.model import Transformer, head_kernel, init_cache, positions_of
from instructax.pretrained.configs import read_config
from instructax.pretrained.folder import open_tensors, read_json
from instructax.pretrained.reading import read_params
from instructax.sharding import MeshConfig
from instructax.types import Params
from instructax.vocabulary import logits_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 44, "n_positions": 48, "vocab_size": 37, "eos_token_id": 0}
GEMMA2 = {**GROUPED, "num_hidden_layers": 4, "query_pre_attn_scalar": 7, "sliding_window": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**GPT2, "bos_token_id": 0}),
    "gpt2 untied": ("gpt2", {**GPT2, "bos_token_id": 0, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "pythia": ("gpt_neox", {**SIZES, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.34}}),
    "neox": (
        "gpt_neox",
        {
            **SIZES,
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 1.0},
        },
    ),
    "llama": ("llama", {**GROUPED, "rope_parameters": {"rope_theta": 50.0}}),
    "llama tied, stretched": ("llama", {**GROUPED, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama linear, biases": (
        "llama",
        {
            **GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0},
        },
    ),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 5, "rope_parameters": {"rope_theta": 50.0}}),
    "qwen2": ("qwen2", {**SIZES, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 50.0}}),
    "qwen2 windows": (
        "qwen2",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**GROUPED, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 50.0}}),
    "gemma": ("gemma", GROUPED),
    "gemma2": ("gemma2", {**GEMMA2, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma2 untied": ("gemma2", {**GEMMA2, "attn_logit_softcapping": None, "tie_word_embeddings": False}),
}
LENGTHS, COLUMNS = (12, 7, 3), 12


def theirs_of(case: str) -> Any:
    """A random model of transformers."""
    kind, values = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or "ln_" in name else 0.0
            if kind.startswith("gemma"):
                centre = 0.0  # stored less 1
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    return model


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(config, jax.devices()[: data * fsdp * tensor])


def ours_of(folder: Path, mesh: jax.sharding.Mesh | None = None) -> tuple[Transformer, Params]:
    """A folder as our network."""
    family, config = read_config(read_json(folder / "config.json"))
    model = Transformer(config, small.compute(), "tokens")
    abstract = training.abstract_params(model, mesh or mesh_of())
    return model, read_params(open_tensors(folder), family, config, abstract)


def batch_of(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded tokens and their mask."""
    prompts = small.ragged_prompts(LENGTHS, columns=COLUMNS, vocab_size=vocab_size)
    return np.asarray(prompts.tokens), np.asarray(prompts.mask)


def their_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.asarray(positions_of(jnp.asarray(mask)))
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        )
    return out.logits.float().numpy()


def our_logits(model: Transformer, params: Params, tokens: np.ndarray, mask: np.ndarray, cached: bool) -> np.ndarray:
    inputs = jnp.asarray(tokens), jnp.asarray(mask, jnp.int32), positions_of(jnp.asarray(mask))
    kernel = head_kernel(model.config, params)

    def logits(hidden):
        return logits_of(hidden, kernel, model.config.logit_cap)

    if not cached:
        return np.asarray(jax.jit(lambda p: logits(model.apply({"params": p}, *inputs)[0]))(params))
    step = jax.jit(lambda p, cache, *columns: model.apply({"params": p}, *columns, cache=cache))
    cache, found = init_cache(model.config, model.compute, *tokens.shape), []
    for start, end in ((0, 8), *((i, i + 1) for i in range(8, COLUMNS))):
        hidden, cache = step(params, cache, *(x[:, start:end] for x in inputs))
        found.append(np.asarray(logits(hidden)))
    return np.concatenate(found, axis=1)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Any, Path]:
    model = theirs_of(request.param)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("cached", [False, True])
def test_logits_are_theirs(case, cached):
    theirs, folder = case
    model, params = ours_of(folder)
    tokens, mask = batch_of(model.config.vocab_size)
    expected, found = their_logits(theirs, tokens, mask), our_logits(model, params, tokens, mask, cached)
    assert np.std(expected[mask]) > 0.1
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-4)
