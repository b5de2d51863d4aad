"""PPO and PPO-ptx (paper, section 3.5, Eq. 2 and C.4).

Command:   python scripts/train.py --config configs/ppo.py:micro --workdir runs/micro/ppo-ptx
           python scripts/train.py --config configs/ppo.py:micro --config.ptx_coef=0.0 --workdir runs/micro/ppo
Hardware:  micro: two cores, half a minute; 1.3b with a 6b reward model: 16 accelerators; 175b: 256.
Expect:    micro: scores rise from 0 to between 0.5 and 0.9, by the seed, while kl stays near 1 nat.

The learning rates are those that the paper's figure 38 shows to be best with ptx (the text
names none). Without ptx the paper's runs diverge above 8.05e-6; its best were 3.74e-6,
2.55e-6 and 2.55e-6.
"""

import ml_collections

from configs import sizes


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A run of PPO-ptx; with ptx_coef 0, of PPO. `arg` is SIZE, or SIZE,SCORER for a reward
    model of another size."""
    size, scorer = sizes.policy_and_scorer(arg)
    folder = f"runs/{size}"
    paper = sizes.paper(size)
    rollouts, minibatches, ptx_rows, steps = {
        "tiny": (8, 2, 2, 4),
        **dict.fromkeys(sizes.FAMILY, (128, 4, 8, 40)),
        "small": (64, 4, 8, 40),
        "smollm2": (32, 4, 2, 100),
    }.get(
        size,
        (512, 8, 512, 500),  # 256k episodes, 8 pretraining rows for each (C.4)
    )
    rate = {
        "tiny": 1e-3,
        **dict.fromkeys(sizes.FAMILY, 3e-4),
        "small": 3e-5,
        "smollm2": 3e-5,
        "175b": 2.55e-6,
    }.get(size, 1.18e-5)
    value_rate = {
        "tiny": 1e-3,
        **dict.fromkeys(sizes.FAMILY, 5e-4),
        "small": 5e-5,
        "smollm2": 5e-5,
        "175b": 5e-6,
    }.get(size, 9e-6)  # C.4
    limits = sizes.limits(size)
    if size in sizes.RECIPES:  # what is sampled costs most
        limits.sequence_tokens, limits.prompt_tokens, limits.response_tokens = 512, 256, 128
    warmup = {"warmup_steps": 10, "warmup_from": 0.1}  # iterations, of the peak, C.4
    return ml_collections.ConfigDict(
        {
            "stage": "ppo",
            "seed": 0,
            "policy_parent": f"{folder}/sft",
            "reward_parent": f"runs/{scorer}/reward",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "reward_model": sizes.model(scorer),
            "compute": sizes.compute(size),
            "lora": sizes.lora(size),
            "mesh": sizes.mesh("6b" if paper and size != "175b" else size),
            "optimizer": sizes.adam(rate, **warmup),
            "value_optimizer": sizes.adam(value_rate, **warmup),
            "data": {
                "prompts": sizes.files(size, "prompts"),
                "text": sizes.files(size, "text"),
                "chat": size in sizes.RECIPES,
                "limits": limits,
                "folder": f"{folder}/rows",
            },
            "steps": steps,  # iterations
            "batch_size": rollouts,
            "minibatches": minibatches,
            "inner_epochs": 1,  # C.4
            "old_logprobs": "scorer",  # "sampler" saves a forward pass; its rounding is then in the ratio
            "ptx_rows": ptx_rows,  # per optimizer step
            "temperature": 1.0,  # C.4
            "kl_coef": 0.02
            if paper
            else 0.2,  # C.4; its unit is the scale of the scores, which each reward model has its own of
            "ptx_coef": 27.8
            if paper
            else 1.0,  # C.4; a mean per token here, so small sizes need another scale
            "clip": 0.2,  # C.4
            "value_clip": 0.2,  # not in the paper; as in its ancestors
            "discount": 1.0,  # C.4
            "lambda_": 0.95,  # not in the paper; as in its ancestors
            "ema_decay": 0.992
            if paper
            else 0.95,  # C.4; a run of 4000 optimizer steps; the small sizes take few
            "no_eos_penalty": 1.0,  # not in the paper; its ancestors score such responses -1
            "whiten_rewards": False,
            "whiten_advantages": True,  # not in the paper; as in its ancestors
            "tolerance": 0.03
            if paper
            else 1e-4,  # nats, mean over tokens; bf16_matmul and bf16, or float32
            "samples": 8 if paper else rollouts,
            "run": sizes.run(size),
        }
    )
