"""Model sizes, and the values that all stages of a size share.

Every table has one row per group of sizes; a row named after a size wins over the row of
its group. The paper's values come first. Groups:

gpt3       GPT-3's shapes `125m` to `175b` (Brown et al., 2020, table 2.1). The paper uses
           1.3b, 6b and 175b; the other sizes take the values of its 1.3b.
imported   a model that `scripts/import_hf.py` has written to runs/NAME/pretrain; NAME is
           its size. Most of its values are the paper's for 1.3b.
smollm2    the import that `experiments/smollm2.py` trains with LoRA on two cores.
small      real text on a laptop.
simulated  `micro`, `milli` and `centi`: minutes on two cores in the simulated world, in
           place of the paper's 1.3b, 6b and 175b.
tiny       seconds, for tests, in the simulated world.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import ml_collections
from ml_collections import config_dict

from instructax.config import ConfigError
from instructax.simulation.write import RESPONSES_PER_PROMPT

T = TypeVar("T")

GROUPS = {
    "125m": "gpt3",
    "350m": "gpt3",
    "760m": "gpt3",
    "1.3b": "gpt3",
    "2.7b": "gpt3",
    "6b": "gpt3",
    "175b": "gpt3",
    "small": "small",
    "micro": "simulated",
    "milli": "simulated",
    "centi": "simulated",
    "tiny": "tiny",
}
SIZES = tuple(GROUPS)
SIMULATED = ("tiny", "micro", "milli", "centi")  # sizes with a simulated world
FAMILY = ("micro", "milli", "centi")

CONTEXT = 2048  # tokens; of GPT-3 and the paper (appendix C)
MAX_K = RESPONSES_PER_PROMPT[1]  # responses that are ranked together (section 3.5)


class Shape(NamedTuple):
    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int


# Brown et al., table 2.1. For 1.3b the table prints 24 heads of 128, which would need a
# width of 3072 instead of 2048; 16 heads give 1.3b parameters.
SHAPES = {
    "125m": Shape(12, 768, 12, 64),
    "350m": Shape(24, 1024, 16, 64),
    "760m": Shape(24, 1536, 16, 96),
    "1.3b": Shape(24, 2048, 16, 128),
    "2.7b": Shape(32, 2560, 32, 80),
    "6b": Shape(32, 4096, 32, 128),
    "175b": Shape(96, 12288, 96, 128),
    "small": Shape(6, 192, 6, 32),
    "micro": Shape(2, 96, 3, 32),
    "milli": Shape(2, 128, 4, 32),
    "centi": Shape(3, 192, 6, 32),
    "tiny": Shape(2, 32, 2, 16),
}


class ModelRow(NamedTuple):
    vocab_size: int  # GPT-2's BPE has 50257 tokens; the other tokenizers are trained
    max_length: int  # tokens
    positions: str  # learned in GPT-3
    rotary_base: float  # used by rotary positions only
    init_std: float  # 0.02 in GPT-2; narrow models train faster from a larger value


# With learned positions, models as small as the simulated ones take several times as long
# to learn to copy from the prompt as with rotary positions of short wavelengths.
# fmt: off
MODELS = {
    #                     vocab  length   positions  base     init
    "gpt3":      ModelRow(50257, CONTEXT, "learned", 10000.0, 0.02),
    "small":     ModelRow( 8192, 256,     "learned", 10000.0, 0.05),
    "simulated": ModelRow( 1024, 128,     "rotary",    200.0, 0.1),
    "tiny":      ModelRow(  512, 96,      "rotary",    200.0, 0.1),
}
# fmt: on


class ComputeRow(NamedTuple):
    dtype: str  # the paper: 16-bit activations, 32-bit parameters (appendix C)
    decoding_dtype: str  # dtype of the sampler
    remat: str  # "none", "dots" or "full": see ComputeConfig
    head_chunk: int  # positions whose logits exist at a time
    microbatch_rows: int  # packed rows per microbatch and device
    tail_splits: int  # how often the last, partly filled microbatch is halved
    slots: int  # decode slots per device
    compaction_steps: int  # how often the sampler halves its slots once no prompt is left


# CPUs with bfloat16 instructions are up to twice as fast with dtype "bf16_matmul"
# (docs/performance.md). Halving pays off only where a step takes longer than compiling it.
# fmt: off
COMPUTE = {
    #                      dtype      decoding   remat   chunk rows splits slots compactions
    "gpt3":      ComputeRow("bf16",    "bf16",    "full", 128,  1,   1,     32,   0),
    "imported":  ComputeRow("float32", "float32", "full", 128,  1,   1,     32,   0),
    "smollm2":   ComputeRow("float32", "float32", "full", 128,  1,   1,     32,   2),
    "small":     ComputeRow("float32", "float32", "none", 128,  2,   2,     32,   2),
    "simulated": ComputeRow("float32", "float32", "none",  64,  4,   0,     64,   0),
    "tiny":      ComputeRow("float32", "float32", "none", 128,  2,   0,      2,   0),
}
# fmt: on


class DataRow(NamedTuple):
    sequence_tokens: int  # of a packed row
    prompt_tokens: int  # the paper: prompts and responses of up to 1k tokens (appendix C)
    response_tokens: int
    completions: int  # largest K of a ranking
    prefix_characters: int | None  # one prompt per common prefix of this length; None: all
    filter_pii: bool  # drop texts with personal data (section 3.2)
    chat: bool  # format prompts with the chat template of the imported model


# The prompts of the simulated world share prefixes on purpose.
# fmt: off
DATA = {
    #                    sequence prompt response K  prefix pii    chat
    "gpt3":      DataRow(CONTEXT, 1024,  1024, MAX_K, 200,  True,  False),
    "imported":  DataRow(CONTEXT, 1024,  1024, MAX_K, 200,  True,  False),
    "smollm2":   DataRow(1024,     768,   256, 5,     200,  True,  True),
    "small":     DataRow(256,      128,    96, 4,     200,  True,  False),
    "simulated": DataRow(128,       38,    22, MAX_K, None, False, False),
    "tiny":      DataRow(64,        24,    24, MAX_K, None, False, False),
}
# fmt: on

# GPT-2's encoder.json and vocab.bpe for GPT-3's sizes; otherwise a tokenizer.json.
TOKENIZERS = {
    "gpt3": "data/gpt2",
    "imported": "runs/{size}/pretrain/tokenizer.json",
    "smollm2": "runs/{size}/pretrain/tokenizer.json",
    "small": "data/tokenizer.json",
    "simulated": "runs/{size}/world/tokenizer.json",
    "tiny": "runs/{size}/world/tokenizer.json",
}
FILES = {
    "gpt3": "data/{kind}.jsonl.gz",
    "imported": "data/{kind}.jsonl.gz",
    "smollm2": "data/{kind}.jsonl.gz",
    "small": "data/{kind}.jsonl.gz",
    "simulated": "runs/{size}/world/{kind}.jsonl.gz",
    "tiny": "runs/{size}/world/{kind}.jsonl.gz",
}


class MeshRow(NamedTuple):
    fsdp: int
    tensor: int


# What fits: 175b needs 32 × 8 shards, 6b needs 8. The other sizes are replicated.
MESHES = {
    "gpt3": MeshRow(fsdp=1, tensor=1),
    "6b": MeshRow(fsdp=8, tensor=1),
    "175b": MeshRow(fsdp=32, tensor=8),
    "imported": MeshRow(fsdp=1, tensor=1),
    "smollm2": MeshRow(fsdp=1, tensor=1),
    "small": MeshRow(fsdp=1, tensor=1),
    "simulated": MeshRow(fsdp=1, tensor=1),
    "tiny": MeshRow(fsdp=1, tensor=1),
}

# Rank of the low-rank adapters; 0 trains all parameters, as the paper does.
LORA_RANKS = {
    "gpt3": 0,
    "imported": 0,
    "smollm2": 16,
    "small": 0,
    "simulated": 0,
    "tiny": 0,
}


class RunRow(NamedTuple):
    log_every: int  # steps
    evaluate_every: int  # steps
    evaluate_batches: int
    save_every: int  # steps
    watchdog_seconds: float  # compiling the largest models takes minutes


# fmt: off
RUNS = {
    #                  log evaluate batches save  watchdog
    "gpt3":      RunRow( 1,   50,    32,      50, 7200.0),
    "imported":  RunRow( 1,   50,    32,      50, 1800.0),
    "smollm2":   RunRow( 1,  100,     8,      25, 1800.0),
    "small":     RunRow(10,  100,    16,     100, 1800.0),
    "simulated": RunRow(20, 1000,    32,    1000, 1800.0),
    "tiny":      RunRow( 2,    4,    32,       4, 1800.0),
}
# fmt: on


def row(table: Mapping[str, T], size: str) -> T:
    """Returns the row of `size`: its own, or that of its group."""
    if check(size) in table:
        return table[size]
    return table[GROUPS.get(size, "imported")]


def check(size: str) -> str:
    """Returns `size`. Raises ConfigError if there is no such size."""
    if size not in GROUPS and imported_manifest(size) is None:
        raise ConfigError(
            f"size {size!r} must be one of {', '.join(SIZES)}, or the NAME of a model that "
            "scripts/import_hf.py has written to runs/NAME/pretrain: "
            "configs/STAGE.py:SIZE"
        )
    return size


def check_simulated(size: str) -> str:
    """Returns `size`. Raises ConfigError if it has no simulated world."""
    if size not in SIMULATED:
        raise ConfigError(
            f"size {size!r} must be one of {', '.join(SIMULATED)}: only these sizes have a "
            "simulated world"
        )
    return size


def policy_and_reward_sizes(arg: str) -> tuple[str, str]:
    """Sizes of policy and reward model, from `SIZE` or `SIZE,REWARD_SIZE`.

    Unless it is named, the reward model of GPT-3's sizes is 6b (paper, C.2); that of other
    sizes has the size of the policy.
    """
    size, _, reward_size = arg.partition(",")
    if not reward_size:
        reward_size = "6b" if is_gpt3(size) else size
    return check(size), check(reward_size)


def is_gpt3(size: str) -> bool:
    """Whether `size` is one of GPT-3's shapes."""
    return check(size) in GROUPS and GROUPS[size] == "gpt3"


def imported_manifest(size: str) -> dict[str, Any] | None:
    """The manifest that `scripts/import_hf.py` wrote to runs/SIZE/pretrain, or None."""
    path = pathlib.Path(f"runs/{size}/pretrain/manifest.json")
    if size in GROUPS or not path.is_file():
        return None
    from instructax.checkpoints.manifest import upgrade_manifest  # imports jax

    manifest = upgrade_manifest(json.loads(path.read_text()))
    return manifest if manifest.get("stage") == "pretrained" else None


def model(size: str) -> ml_collections.ConfigDict:
    """The architecture: GPT-3's, or that of the imported model."""
    manifest = imported_manifest(size)
    if manifest is not None:
        values = {
            **manifest["model"],
            "window_layers": tuple(manifest["model"]["window_layers"]),
        }
        return ml_collections.ConfigDict(values)
    shape = SHAPES[check(size)]
    values = row(MODELS, size)
    return ml_collections.ConfigDict(
        {
            "vocab_size": values.vocab_size,
            "max_length": values.max_length,
            "num_layers": shape.num_layers,
            "embed_dim": shape.embed_dim,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_heads,
            "head_dim": shape.head_dim,
            "mlp_dim": 4 * shape.embed_dim,
            "norm": "layernorm",
            "norm_epsilon": 1e-5,
            "positions": values.positions,
            "rotary_base": values.rotary_base,
            "rotary_fraction": 1.0,
            "rotary_scaling": None,
            "activation": "gelu",
            "biases": True,
            "qkv_biases": False,
            "qk_norm": False,
            "query_pre_attn_scalar": 0.0,
            "attention_softcap": 0.0,
            "sliding_window": 0,
            "window_layers": (),
            "parallel_residual": False,
            "post_norms": False,
            "scale_embedding": False,
            "tied_embeddings": True,
            "final_logit_softcap": 0.0,
            "init_std": values.init_std,
        }
    )


def compute(size: str) -> ml_collections.ConfigDict:
    """Precision, rematerialization, microbatches and decode slots."""
    values = row(COMPUTE, size)
    return ml_collections.ConfigDict({"attention": "auto", **values._asdict()})


def lora(size: str) -> ml_collections.ConfigDict:
    """Low-rank adapters, which leave hardly any optimizer state."""
    return ml_collections.ConfigDict({"rank": row(LORA_RANKS, size), "alpha": 32.0})


def mesh(size: str, rows: int | None = None) -> ml_collections.ConfigDict:
    """Devices; `data` takes the rest. At most `rows` devices share the rows of a batch."""
    values = row(MESHES, size)
    fsdp = values.fsdp
    if rows is not None:
        fsdp = min(fsdp, rows)
    return ml_collections.ConfigDict({"data": -1, "fsdp": fsdp, "tensor": values.tensor})


def tokenizer(size: str) -> str:
    """Path of the tokenizer."""
    return row(TOKENIZERS, size).format(size=size)


def files(size: str, kind: str) -> tuple[str, ...]:
    """The data files of one kind: text, demonstrations, comparisons or prompts."""
    return (row(FILES, size).format(size=size, kind=kind),)


def chat(size: str) -> bool:
    """Whether prompts are formatted with the chat template of the imported model."""
    return row(DATA, size).chat


def limits(size: str) -> ml_collections.ConfigDict:
    """Lengths in tokens, and the paper's filters of prompts (3.2, A.2 and appendix C)."""
    values = row(DATA, size)
    max_length: Any = model(size).max_length
    sequence = min(values.sequence_tokens, max_length)
    prompt = values.prompt_tokens
    response = values.response_tokens
    if prompt + response > sequence:
        # An imported model with a shorter context: half for prompts, half for responses.
        prompt = sequence // 2
        response = sequence // 2
    # With a placeholder, the command line can set an integer although the value is None.
    prefix = values.prefix_characters
    if prefix is None:
        prefix = config_dict.placeholder(int)
    return ml_collections.ConfigDict(
        {
            "sequence_tokens": sequence,
            "prompt_tokens": prompt,
            "response_tokens": response,
            "completions": values.completions,
            "prefix_characters": prefix,
            "prompts_per_user": 200,  # section 3.2
            "filter_pii": values.filter_pii,
            "splits": (("train", 0.9), ("validation", 0.1)),
            "split_seed": 0,
        }
    )


def adam(learning_rate: float, **changes: float | str) -> ml_collections.ConfigDict:
    """Adam as in the paper (appendix C); the rate is constant unless `changes` say more."""
    values = {
        "learning_rate": learning_rate,
        "schedule": "constant",  # or "cosine", "linear"
        "warmup_steps": 0,
        "warmup_from": 1.0,
        "final_fraction": 1.0,
        "beta1": 0.9,  # appendix C
        "beta2": 0.95,  # appendix C
        "epsilon": 1e-8,  # not in the paper
        "weight_decay": 0.0,  # not in the paper
        "clip_norm": 1.0,  # not in the paper
    }
    return ml_collections.ConfigDict({**values, **changes})


def run(size: str) -> ml_collections.ConfigDict:
    """How often a run logs, evaluates and saves."""
    values = row(RUNS, size)
    return ml_collections.ConfigDict(
        {
            **values._asdict(),
            "keep": 2,
            "best_metric": "",
            "best_mode": "min",
            "tensorboard": False,
            "most_skipped": 3,
        }
    )
