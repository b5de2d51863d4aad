"""Compatibility with transformers: its models give our logits, and its classes read our
exports. Run with `./scripts/test.sh interop`.

Every model is tiny, with large parameters that are nowhere zero and sizes that all differ.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tests.support import stages, tiny_models
from tests.support.scoring import sequence_scores

from instructax import sharding
from instructax.data.tokenizer import load_tokenizer, pad_vocab, save_tokenizer
from instructax.generation.sampler import generate
from instructax.models.attention import positions_from_mask
from instructax.models.init import abstract_params
from instructax.models.kv_cache import init_cache
from instructax.models.logprobs import compute_logits
from instructax.models.pretrained.gguf_file import LAYER_TENSORS, OTHER_TENSORS
from instructax.models.pretrained.hf_configs import read_config, write_config
from instructax.models.pretrained.hf_folder import open_tensors, read_hf_json
from instructax.models.pretrained.load import read_params
from instructax.models.pretrained.save import export_tensors
from instructax.models.transformer import Transformer, head_kernel
from instructax.serving.policy import open_policy
from instructax.sharding import MeshConfig
from instructax.stages import pretrained
from instructax.types import Params, Prompts, Rollouts

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
GPT2 = {
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 44,
    "n_positions": 48,
    "vocab_size": 37,
    "eos_token_id": 0,
}
GEMMA2 = {
    **GROUPED,
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 7,
    "sliding_window": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**GPT2, "bos_token_id": 0}),
    "gpt2 untied": (
        "gpt2",
        {
            **GPT2,
            "bos_token_id": 0,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
    ),
    "pythia": (
        "gpt_neox",
        {**SIZES, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.34}},
    ),
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
    "llama tied, stretched": (
        "llama",
        {**GROUPED, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama linear, biases": (
        "llama",
        {
            **GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0},
        },
    ),
    "mistral": (
        "mistral",
        {**GROUPED, "sliding_window": 5, "rope_parameters": {"rope_theta": 50.0}},
    ),
    "qwen2": (
        "qwen2",
        {**SIZES, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 50.0}},
    ),
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
    "qwen3": (
        "qwen3",
        {**GROUPED, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 50.0}},
    ),
    "gemma": ("gemma", GROUPED),
    "gemma2": (
        "gemma2",
        {**GEMMA2, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma2 untied": (
        "gemma2",
        {**GEMMA2, "attn_logit_softcapping": None, "tie_word_embeddings": False},
    ),
}
LENGTHS = (12, 7, 3)
COLUMNS = 12


def transformers_model(case: str) -> Any:
    """A random transformers model."""
    kind, values = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
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


def load_folder(
    folder: Path, mesh: jax.sharding.Mesh | None = None
) -> tuple[Transformer, Params]:
    """The network loaded from a folder."""
    family, config = read_config(read_hf_json(folder / "config.json"))
    model = Transformer(config, tiny_models.compute(), "tokens")
    abstract = abstract_params(model, mesh or mesh_of())
    params = read_params(open_tensors(folder), family, config, abstract, source=folder)
    return model, params


def batch_of(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded tokens and their mask."""
    prompts = tiny_models.ragged_prompts(LENGTHS, columns=COLUMNS, vocab_size=vocab_size)
    return np.asarray(prompts.tokens), np.asarray(prompts.mask)


def their_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.asarray(positions_from_mask(jnp.asarray(mask)))
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        )
    return out.logits.float().numpy()


def our_logits(
    model: Transformer, params: Params, tokens: np.ndarray, mask: np.ndarray, cached: bool
) -> np.ndarray:
    inputs = (
        jnp.asarray(tokens),
        jnp.asarray(mask, jnp.int32),
        positions_from_mask(jnp.asarray(mask)),
    )
    kernel = head_kernel(model.config, params)

    def logits(hidden):
        return compute_logits(hidden, kernel, model.config.final_logit_softcap)

    if not cached:
        return np.asarray(
            jax.jit(lambda p: logits(model.apply({"params": p}, *inputs)[0]))(params)
        )
    step = jax.jit(
        lambda p, cache, *columns: model.apply({"params": p}, *columns, cache=cache)
    )
    cache = init_cache(model.config, model.compute, *tokens.shape)
    found = []
    for start, end in ((0, 8), *((i, i + 1) for i in range(8, COLUMNS))):
        hidden, cache = step(params, cache, *(x[:, start:end] for x in inputs))
        found.append(np.asarray(logits(hidden)))
    return np.concatenate(found, axis=1)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Any, Path]:
    model = transformers_model(request.param)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("cached", [False, True])
def test_logits_equal_those_of_transformers(case, cached):
    theirs, folder = case
    model, params = load_folder(folder)
    tokens, mask = batch_of(model.config.vocab_size)
    expected = their_logits(theirs, tokens, mask)
    found = our_logits(model, params, tokens, mask, cached)
    assert np.std(expected[mask]) > 0.1
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-4)


def words(folder: Path) -> None:
    """Writes a tokenizer of 30 words, with end token 0, to `folder`. It has fewer ids than
    the models have embedding rows."""
    tokens = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 30)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="w1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))


def test_exports_are_read_by_transformers_and_by_us(case, tmp_path):
    """Import, export and import again give the same parameters bit for bit, and
    transformers generates the same tokens as our sampler."""
    theirs, folder = case
    words(folder)
    pretrained.import_model(str(folder), tmp_path / "run", fsdp=1, tensor=1)
    report = pretrained.export_run(
        str(tmp_path / "run"), tmp_path / "out", dtype="float32", verify=True
    )
    assert "logits differ by at most 0" in report
    pretrained.import_model(str(tmp_path / "out"), tmp_path / "again", fsdp=1, tensor=1)
    models = [
        open_policy(tmp_path / name, tiny_models.compute()) for name in ("run", "again")
    ]
    (model, params, tokenizer), (again, same, other) = models
    assert model.config == again.config and tokenizer.hash == other.hash
    jax.tree.map(np.testing.assert_array_equal, params, same)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert type(loaded) is type(theirs) and loaded.dtype == torch.float32
    tokens, mask = batch_of(model.config.vocab_size)
    expected = their_logits(theirs, tokens, mask)[mask]
    np.testing.assert_allclose(
        their_logits(loaded, tokens, mask)[mask], expected, rtol=1e-5, atol=1e-5
    )

    text = "w3 w4 w17 w5"
    # AutoTokenizer uses Qwen's own class for every qwen2 model, whatever the folder says.
    qwen = model.config.qkv_biases
    auto = transformers.PreTrainedTokenizerFast if qwen else transformers.AutoTokenizer
    reader = auto.from_pretrained(tmp_path / "out")
    ids = reader(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.encode(text).tolist() == [3, 4, 17, 5]
    assert reader.eos_token_id == tokenizer.eos_id == 0
    longer = loaded.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[
        0, 4:
    ].tolist()
    prompts = Prompts(
        tokens=jnp.asarray(ids.numpy(), jnp.int32), mask=jnp.ones((1, 4), bool)
    )
    keys = jax.random.split(jax.random.key(0), 1)
    ours = generate(model, params, prompts, keys, length=8, temperature=0.0, eos_id=0)
    assert longer == np.asarray(ours.responses)[0][np.asarray(ours.mask)[0]].tolist()


@pytest.mark.parametrize(
    "config",
    [
        tiny_models.gpt_config(head_dim=4),
        tiny_models.neox_config(
            head_dim=4, rotary_fraction=1.0, parallel_residual=False, activation="gelu"
        ),
        tiny_models.llama_config(),
        tiny_models.gemma_config(),
    ],
    ids=["gpt", "world", "llama", "gemma"],
)
def test_scores_are_those_of_sequence_classification(config, tmp_path):
    """The score is at the last non-padding token, wherever it is, and includes the head's
    bias."""
    words(tmp_path)
    config = dataclasses.replace(config, vocab_size=37)
    model = Transformer(config, tiny_models.compute(), "scalar")
    params = tiny_models.random_params(model)
    params["scalar_head"]["bias"] = jnp.float32(0.77)
    run = stages.write_finished_run(tmp_path / "run", config, params, str(tmp_path))
    manifest = json.loads((run / "manifest.json").read_text()) | {
        "stage": "reward_model",
        "head": "scalar",
    }
    tokenizer = pad_vocab(load_tokenizer(str(tmp_path)), 37)
    manifest["tokenizer"]["hash"] = tokenizer.hash
    (run / "manifest.json").write_text(json.dumps(manifest))
    save_tokenizer(tokenizer, str(run / "tokenizer.json"))
    report = pretrained.export_run(str(run), tmp_path / "out", dtype="float32", verify=True)
    assert "scores differ by at most" in report

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    raw = read_hf_json(tmp_path / "out" / "config.json")
    left = raw.get(pretrained.SCORE_BIAS, 0.0)
    assert left == pytest.approx(0.0 if config.norm == "layernorm" else 0.77)
    assert raw["pad_token_id"] == 30 and theirs.config.num_labels == 1
    rng = np.random.default_rng(1)
    lengths = (7, 4, 2)
    prompts = tiny_models.ragged_prompts((3, 5, 1), columns=5, vocab_size=30)
    mask = np.arange(7)[None, :] < np.array(lengths)[:, None]
    responses = rng.integers(30, size=mask.shape).astype(np.int32)
    zeros = jnp.zeros(mask.shape)
    rollouts = Rollouts(
        prompts=prompts,
        responses=jnp.asarray(responses),
        mask=jnp.asarray(mask),
        logprobs=zeros,
        ended=zeros[:, 0] > 0,
    )
    ours = np.asarray(sequence_scores(model, params, rollouts))
    for row in range(3):
        prompt = np.asarray(prompts.tokens)[row, np.asarray(prompts.mask)[row]]
        text = [*prompt.tolist(), *responses[row, : lengths[row]].tolist()]
        for pad in (0, 3):  # padding on the right, as users of the class do
            ids = torch.tensor([text + [30] * pad])
            with torch.no_grad():
                score = theirs(
                    input_ids=ids, attention_mask=(ids != 30).long()
                ).logits.item()
            assert score + left == pytest.approx(ours[row], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_gguf_files_give_the_same_model(arch, tmp_path):
    """llama.cpp permutes the query and key rows of Llama only. Includes a float16 tensor
    and a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    config = tiny_models.llama_config(
        vocab_size=260, tied_embeddings=arch == "qwen3", qk_norm=arch == "qwen3"
    )
    params = tiny_models.random_params(Transformer(config, tiny_models.compute(), "tokens"))
    params["embedding"] = params["embedding"].astype(jnp.float16).astype(jnp.float32)
    family = write_config(config)[0]
    assert family == arch
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rotary_base)
    vocab = json.loads(load_tokenizer("bytes").content)["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(vocab, key=vocab.get), "he"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(256)
    writer.add_chat_template("{{ messages }}")
    back = {theirs: ours for ours, theirs in {**LAYER_TENSORS, **OTHER_TENSORS}.items()}
    for name, tensor in export_tensors(params, family, config, "float32"):
        layer, part, kind = re.fullmatch(
            r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", name
        ).groups()
        heads = {
            "self_attn.q_proj": config.num_heads,
            "self_attn.k_proj": config.num_kv_heads,
        }.get(part)
        if heads and arch == "llama":  # the permutation of llama.cpp's converter
            tensor = (
                tensor.reshape(heads, 2, -1, tensor.shape[-1])
                .swapaxes(1, 2)
                .reshape(tensor.shape)
            )
        named = f"{'' if layer is None else f'blk.{layer}.'}{back[part]}.{kind}"
        writer.add_tensor(
            named, tensor.astype(np.float16) if named == "token_embd.weight" else tensor
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    pretrained.import_model(
        str(tmp_path / "model.gguf"), tmp_path / "run", fsdp=1, tensor=1
    )
    model, found, tokenizer = open_policy(tmp_path / "run", tiny_models.compute())
    assert (
        dataclasses.replace(
            model.config, init_std=config.init_std, norm_epsilon=config.norm_epsilon
        )
        == config
    )
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert tokenizer.encode("hehe!").tolist() == [257, 257, 33] and (
        tokenizer.eos_id,
        tokenizer.size,
    ) == (256, 260)
    assert (
        tmp_path / "run" / "source" / "chat_template.jinja"
    ).read_text() == "{{ messages }}"


def test_a_gguf_file_of_another_kind_is_one_line(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match=r"general\.architecture = 'mamba' is not supported, only llama, qwen2, qwen3",
    ):
        pretrained.import_model(
            str(tmp_path / "model.gguf"), tmp_path / "run", fsdp=1, tensor=1
        )
    (tmp_path / "model.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match="is damaged or no GGUF file"):
        pretrained.import_model(
            str(tmp_path / "model.gguf"), tmp_path / "run", fsdp=1, tensor=1
        )
