"""Finished policies side by side on held-out data: scores, win rate, KL, text loss; the
reward model's accuracy.

Command:   python scripts/train.py --config configs/evaluate.py:micro --workdir runs/micro/evaluate
Hardware:  micro: two cores, half a minute.
Expect:    micro: the score rises from GPT to SFT to PPO.
"""

import ml_collections

from configs import sizes


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A comparison of GPT, SFT, PPO and PPO-ptx, plain and by the two ways that train
    nothing more.

    `arg` is SIZE, or SIZE,SCORER for a reward model of another size.
    """
    size, scorer = sizes.policy_and_scorer(arg)
    folder = f"runs/{size}"
    return ml_collections.ConfigDict(
        {
            "stage": "evaluate",
            "seed": 0,
            "policies": (
                ("GPT", f"{folder}/pretrain", "plain"),
                *(
                    ()
                    if size in sizes.RECIPES
                    else (("GPT prompted", f"{folder}/pretrain", "few-shot"),)
                ),
                ("SFT", f"{folder}/sft", "plain"),
                ("best-of-n", f"{folder}/sft", "best-of"),
                ("PPO", f"{folder}/ppo", "plain"),
                ("PPO-ptx", f"{folder}/ppo-ptx", "plain"),
            ),
            "reference": "SFT",
            "reward_parent": f"runs/{scorer}/reward",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "reward_model": sizes.model(scorer),
            "compute": sizes.compute(size),
            "mesh": sizes.mesh(size),
            "data": {
                "prompts": sizes.files(size, "prompts"),
                "text": sizes.files(size, "text"),
                "comparisons": (("labelers", sizes.files(size, "comparisons")),),
                "demonstrations": sizes.files(size, "demonstrations"),
                "chat": size in sizes.RECIPES,
                "limits": sizes.limits(size),
                "folder": f"{folder}/rows",
            },
            "batch_size": {"tiny": 8, "small": 32}.get(size, 64),
            "prompts": {"tiny": 16, "small": 256}.get(size, 600),
            "batches": 32,
            "temperature": 1.0,
            "best_of": 4 if size == "tiny" else 16,
            "shots": 1 if size == "tiny" else 3,
            "prefixes": 2 if size == "tiny" else 8,
        }
    )
