"""Architectures by size, and the values that all stages of a size share.

`tiny` (seconds, for tests) and the family `micro`, `milli`, `centi` (minutes on two cores;
in place of the paper's 1.3b, 6b and 175b) live in the embedded world; `small` is for real
text on a laptop; the others have GPT-3's shapes (Brown et al., 2020, table 2.1), which the
paper used: 1.3b, 6b and 175b (appendix C). The table prints 24 heads of 128 for 1.3b, which
would make 1.5b of a width of 2048: 16 make 1.3b. A model that `scripts/import_hf.py` has
put into runs/NAME/pretrain is a size of its own, NAME; its stages have the values of the
paper's 1.3b, but for the recipe `smollm2`.
"""

import json
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from instructax.config import ConfigError

# name: (layers, width, heads, head_dim)
GPT3 = {
    "125m": (12, 768, 12, 64),
    "350m": (24, 1024, 16, 64),
    "760m": (24, 1536, 16, 96),
    "1.3b": (24, 2048, 16, 128),
    "2.7b": (32, 2560, 32, 80),
    "6b": (32, 4096, 32, 128),
    "175b": (96, 12288, 96, 128),
}
FAMILY = {"micro": (2, 96, 3, 32), "milli": (2, 128, 4, 32), "centi": (3, 192, 6, 32)}
SMALL = {"tiny": (2, 32, 2, 16), **FAMILY, "small": (6, 192, 6, 32)}
WORLDS = ("tiny", *FAMILY)  # the sizes that live in the embedded world
SIZES = (*SMALL, *GPT3)
RECIPES = (
    "smollm2",
)  # imports with values of their own, for a night on two cores: `experiments/smollm2.py`

# Ids of the tokenizers trained for them; GPT-2's: 50257.
VOCABULARY = {"tiny": 512, **dict.fromkeys(FAMILY, 1024), "small": 8192}
CONTEXT = {"tiny": 96, **dict.fromkeys(FAMILY, 128), "small": 256}  # tokens; GPT-3's: 2048


def imported(size: str) -> dict[str, Any]:
    """What `scripts/import_hf.py` says of the model in runs/SIZE/pretrain; {} if it put
    none there."""
    manifest = pathlib.Path(f"runs/{size}/pretrain/manifest.json")
    if size in SIZES or not manifest.is_file():
        return {}
    from instructax.checkpoints.manifest import upgrade_manifest  # imports jax

    found = upgrade_manifest(json.loads(manifest.read_text()))
    return found if found.get("stage") == "pretrained" else {}


def check(size: str) -> str:
    """Returns `size`; raises ValueError if there is none of that name."""
    if size not in SIZES and not imported(size):
        raise ConfigError(
            f"size {size!r} must be one of {', '.join(SIZES)}, or the NAME of a model that scripts/import_hf.py has put "
            "into runs/NAME/pretrain: give it as configs/STAGE.py:SIZE"
        )
    return size


def policy_and_scorer(arg: str) -> tuple[str, str]:
    """Sizes of policy and reward model: SIZE,SCORER, or SIZE with 6b for the paper's sizes
    (C.2), else the same."""
    size, _, scorer = arg.partition(",")
    return check(size), check(scorer or ("6b" if paper(size) else size))


def paper(size: str) -> bool:
    """Whether `size` has one of GPT-3's shapes."""
    return check(size) in GPT3


def model(size: str) -> ml_collections.ConfigDict:
    """The architecture: GPT-3's.

    The world's models have rotary positions of short wavelengths: with learned ones, models
    as small as these take several times as long to find out how to copy from their prompt.
    """
    if found := imported(size):
        return ml_collections.ConfigDict(
            {**found["model"], "window_layers": tuple(found["model"]["window_layers"])}
        )
    layers, width, heads, head_dim = {**SMALL, **GPT3}[check(size)]
    return ml_collections.ConfigDict(
        {
            "vocab_size": VOCABULARY.get(size, 50257),
            "max_length": CONTEXT.get(size, 2048),
            "num_layers": layers,
            "embed_dim": width,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": head_dim,
            "mlp_dim": 4 * width,
            "norm": "layernorm",
            "norm_epsilon": 1e-5,
            "positions": "rotary" if size in WORLDS else "learned",
            "rotary_base": 200.0 if size in WORLDS else 10000.0,
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
            # GPT-2's; small widths train faster from a larger one.
            "init_std": 0.02 if paper(size) else 0.05 if size == "small" else 0.1,
        }
    )


def compute(size: str) -> ml_collections.ConfigDict:
    """The paper computed in 16 bits with 32-bit parameters (appendix C). float32 elsewhere;
    CPUs that multiply bfloat16 are up to twice as fast at large sizes with "bf16_matmul"
    (`docs/performance.md`)."""
    return ml_collections.ConfigDict(
        {
            "dtype": "bf16" if paper(size) else "float32",
            "decoding_dtype": "bf16" if paper(size) else "float32",
            "attention": "auto",
            "remat": "full" if paper(size) or imported(size) else "none",
            "head_chunk": 64 if size in FAMILY else 128,
            # As many as fit at the paper's sizes; at the others as many as are fastest.
            "microbatch_rows": 1
            if paper(size) or imported(size)
            else 4
            if size in FAMILY
            else 2,
            # Down to half a row, but where a run takes little longer than compiling.
            "tail_splits": 1
            if paper(size) or imported(size)
            else 2
            if size == "small"
            else 0,
            "slots": 2 if size == "tiny" else 64 if size in FAMILY else 32,
            "compaction_steps": 2 if size == "small" or size in RECIPES else 0,
        }
    )


def lora(size: str) -> ml_collections.ConfigDict:
    """Low-rank adapters: none but in the recipes, where they leave hardly any optimizer
    state."""
    return ml_collections.ConfigDict({"rank": 16 if size in RECIPES else 0, "alpha": 32.0})


def mesh(size: str) -> ml_collections.ConfigDict:
    """Devices: 175b in 32 × 8 pieces, 6b in 8; the others are copied to all there are."""
    fsdp, tensor = {"175b": (32, 8), "6b": (8, 1)}.get(size, (1, 1))
    return ml_collections.ConfigDict({"data": -1, "fsdp": fsdp, "tensor": tensor})


def tokenizer(size: str) -> str:
    """GPT-2's BPE files for the paper's sizes, an imported model's own, else a trained one."""
    if size in WORLDS:
        return f"runs/{size}/world/tokenizer.json"
    if imported(size):
        return f"runs/{size}/pretrain/tokenizer.json"
    return "data/gpt2" if paper(size) else "data/tokenizer.json"


def limits(size: str) -> ml_collections.ConfigDict:
    """Lengths in tokens and the paper's prompt hygiene (sections 3.2 and A.2, appendix C)."""
    lengths = {
        "tiny": (64, 24, 24),
        **dict.fromkeys(FAMILY, (128, 38, 22)),
        "small": (256, 128, 96),
    }
    sequence, prompt, response = lengths.get(size, (2048, 1024, 1024))
    if size in RECIPES:
        sequence, prompt, response = 1024, 768, 256
    elif found := imported(size):
        sequence = min(2048, found["model"]["max_length"])
        prompt = response = sequence // 2
    return ml_collections.ConfigDict(
        {
            "sequence_tokens": sequence,
            "prompt_tokens": prompt,
            "response_tokens": response,
            "completions": {"small": 4, "smollm2": 5}.get(
                size, 9
            ),  # K; short contexts fit few
            # The world's prompts repeat on purpose.
            "prefix_characters": config_dict.placeholder(int) if size in WORLDS else 200,
            "prompts_per_user": 200,
            "filter_pii": size not in WORLDS,
            "splits": (("train", 0.9), ("validation", 0.1)),
            "split_seed": 0,
        }
    )


def adam(learning_rate: float, **changes: float | str) -> ml_collections.ConfigDict:
    """Adam as the paper has it (appendix C), at a constant rate; what it leaves open is
    neutral unless changed."""
    values = {
        "learning_rate": learning_rate,
        "schedule": "constant",
        "warmup_steps": 0,
        "warmup_from": 1.0,
        "final_fraction": 1.0,
        "beta1": 0.9,  # C
        "beta2": 0.95,  # C
        "epsilon": 1e-8,  # not in the paper
        "weight_decay": 0.0,  # not in the paper
        "clip_norm": 1.0,  # not in the paper
    }
    return ml_collections.ConfigDict({**values, **changes})


def files(size: str, kind: str) -> tuple[str, ...]:
    """Where a size's data lie: in the world of its size, or in the user's own folder
    `data`."""
    return (
        f"runs/{size}/world/{kind}.jsonl.gz" if size in WORLDS else f"data/{kind}.jsonl.gz",
    )


def run(size: str) -> ml_collections.ConfigDict:
    """How often to print, evaluate and save, in steps."""
    log, evaluate, save = {
        "tiny": (2, 4, 4),
        "small": (10, 100, 100),
        "smollm2": (1, 100, 25),
    }.get(size, (1, 50, 50))
    if size in FAMILY:
        log, evaluate, save = 20, 1000, 1000
    return ml_collections.ConfigDict(
        {
            "log_every": log,
            "evaluate_every": evaluate,
            "evaluate_batches": {"small": 16, "smollm2": 8}.get(size, 32),
            "save_every": save,
            "keep": 2,
            "best_metric": "",
            "tensorboard": False,
            "most_skipped": 3,
            "watchdog_seconds": 7200.0
            if paper(size)
            else 1800.0,  # compiling the largest takes minutes
        }
    )
