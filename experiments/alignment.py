"""The paper's central claims in small, in the embedded world whose true utility is known
(sections 4.1 and 4.2).

Command:   python scripts/experiment.py experiments/alignment.py:micro --workdir runs/micro
           python scripts/experiment.py experiments/alignment.py:family --workdir runs/family
Hardware:  micro: two cores, seven minutes; family: two cores, 36 runs, an hour.
Expect:    GPT < GPT prompted < SFT < PPO in true win rate; PPO-ptx keeps what pretraining taught (`docs/alignment.md`).
Read it:   `report/index.html`: figure 1 and its kin, the claims one by one, and all answers side by side.

`micro` is one size. `family` is the three sizes that stand for 1.3B, 6B and 175B, with
reward and value networks of the middle one as in the paper, and the runs of its side
claims: SFT that goes on, labelers who never waver, and tuning on public tasks (FLAN, T0).
No stage sees the true utility: labelers do, through their noise and tastes, and the report.
"""

from pathlib import Path
from typing import Any

from configs import sizes

from instructax.config import require
from instructax.experiment import RunSpec
from instructax.report import write
from instructax.report.results import HELD_OUT_LABELERS, LABELERS

MIDDLE = "milli"  # the size of the family's reward and value networks
# Answers to each prompt that are compared, mostly by SFT, some by an early PPO policy
# (section 3.2): a reward model that has seen none of those is easily exploited. A family
# shares them.
EARLY_ANSWERS = {"sft": 8, "pretrain": 1}
ANSWERS = {"sft": 6, "ppo-early": 3, "pretrain": 1}
EARLY = {"round": 0, "prompts": 1200}
POLICIES = (
    ("GPT", "pretrain", "plain"),
    ("GPT prompted", "pretrain", "few-shot"),
    ("SFT", "sft", "plain"),
    ("best-of-n", "sft", "best-of"),
    ("PPO", "ppo", "plain"),
    ("PPO-ptx", "ppo-ptx", "plain"),
)
TUNED = ("FLAN/T0", "flan", "plain")
GPT_PROMPT_TOKENS = 64  # of the prompts that were sent to GPT, which bring an example
OVERFIT_STEPS, OVERFIT_EVERY = (
    4800,
    300,
)  # of SFT that goes on; an epoch has about 520 steps


def get_runs(arg: str, root: str) -> list[RunSpec]:
    """The runs in order; `arg` is a size of the world or `family`, or either with a seed,
    `micro,1`; `root` is the experiment's workdir."""
    members, _, seed = arg.partition(",")
    allowed = (*sizes.SIMULATED, "family")
    require(
        members in allowed,
        f"size {members!r} must be one of {', '.join(allowed)}: experiments/alignment.py:SIZE",
    )
    require(
        not seed or seed.isdecimal(),
        f"seed {seed!r} must be a whole number: experiments/alignment.py:SIZE,SEED",
    )
    runs = family(root) if members == "family" else alone(members, root)
    return [
        RunSpec(run.name, run.config, {**run.overrides, "seed": int(seed or 0)})
        for run in runs
    ]


def alone(size: str, root: str) -> list[RunSpec]:
    """One size, with a reward model of its own size."""
    return [
        *world(size),
        *supervised(size, "", root),
        *judged(size, root, {"": 1}, "", EARLY_ANSWERS, "-early", **EARLY),
        early(size, size, "", root),
        *judged(size, root, {"": 1}, "", ANSWERS, ""),
        *aligned(size, size, "", root),
        *measured(size, size, "", root, POLICIES),
    ]


def family(root: str) -> list[RunSpec]:
    """Three sizes, one reward model, and the side claims."""
    folders = {size: f"{size}/" for size in sizes.FAMILY}
    share = {folder: len(folders) for folder in folders.values()}
    runs = world(MIDDLE)
    for size, folder in folders.items():
        runs += [*supervised(size, folder, root), tuned(size, folder, root)]
    runs += judged(MIDDLE, root, share, f"{MIDDLE}/", EARLY_ANSWERS, "-early", **EARLY)
    runs += [early(size, MIDDLE, folder, root) for size, folder in folders.items()]
    runs += judged(MIDDLE, root, share, f"{MIDDLE}/", ANSWERS, "")
    for size, folder in folders.items():
        runs += aligned(size, MIDDLE, folder, root)
        runs += measured(size, MIDDLE, folder, root, (*POLICIES, TUNED))
    return [
        *runs,
        *judged(MIDDLE, root, share, f"{MIDDLE}/", ANSWERS, "-quiet", noise=0.0),
        *overfitted(MIDDLE, f"{MIDDLE}/", root),
    ]


def common(root: str) -> dict[str, Any]:
    """What all stages that read tokens share."""
    return {"tokenizer": f"{root}/world/tokenizer.json", "data.folder": f"{root}/rows"}


def files(root: str, *kinds: str) -> dict[str, tuple[str, ...]]:
    """Overrides that name files of the world."""
    return {f"data.{kind}": (f"{root}/world/{kind}.jsonl.gz",) for kind in kinds}


def world(size: str) -> list[RunSpec]:
    """The world that all sizes live in."""
    return [RunSpec("world", f"configs/world.py:{size}", {})]


def supervised(size: str, folder: str, root: str) -> list[RunSpec]:
    """GPT, and the policy that PPO starts from."""
    parent = {"parent": f"{root}/{folder}pretrain"}
    return [
        RunSpec(
            f"{folder}pretrain",
            f"configs/pretrain.py:{size}",
            common(root) | files(root, "text"),
        ),
        RunSpec(
            f"{folder}sft",
            f"configs/sft.py:{size}",
            common(root) | files(root, "text", "demonstrations") | parent,
        ),
    ]


def tuned(size: str, folder: str, root: str) -> RunSpec:
    """GPT tuned on public tasks, as FLAN and T0 are, with the values of SFT."""
    overrides = {
        "parent": f"{root}/{folder}pretrain",
        "data.demonstrations": (f"{root}/world/public.jsonl.gz",),
    }
    return RunSpec(
        f"{folder}flan",
        f"configs/sft.py:{size}",
        common(root) | files(root, "text") | overrides,
    )


def judged(
    size: str,
    root: str,
    share: dict[str, int],
    folder: str,
    answers: dict[str, int],
    suffix: str,
    **changes: Any,
) -> list[RunSpec]:
    """Comparisons of what the policies in the folders of `share` answer, and the reward
    model, of `size` and from the SFT policy in `folder`, that learns from them."""
    asked = tuple(
        (f"{root}/{place}{run}", -(-count // parts))
        for place, parts in share.items()
        for run, count in answers.items()
    )
    return [
        RunSpec(
            f"collect{suffix}",
            f"configs/collect.py:{size}",
            {"world": f"{root}/world", "policies": asked, **changes},
        ),
        RunSpec(
            f"reward{suffix}",
            f"configs/reward_model.py:{size}",
            {
                **common(root),
                **files(root, "demonstrations"),
                "parent": f"{root}/{folder}sft",
                "data.comparisons": (f"{root}/collect{suffix}/comparisons.jsonl.gz",),
            },
        ),
    ]


def rewarded(
    size: str, scorer: str, folder: str, root: str, name: str, reward: str, **changes: Any
) -> RunSpec:
    """PPO-ptx, or with changes something else, against the reward model in the folder
    `reward`."""
    parents = {"policy_parent": f"{root}/{folder}sft", "reward_parent": f"{root}/{reward}"}
    overrides = common(root) | files(root, "prompts", "text") | parents | changes
    return RunSpec(f"{folder}{name}", f"configs/ppo.py:{size},{scorer}", overrides)


def early(size: str, scorer: str, folder: str, root: str) -> RunSpec:
    """The PPO policy whose answers are compared with those of SFT."""
    return rewarded(size, scorer, folder, root, "ppo-early", "reward-early", ptx_coef=0.0)


def aligned(size: str, scorer: str, folder: str, root: str) -> list[RunSpec]:
    """PPO and PPO-ptx."""
    return [
        rewarded(size, scorer, folder, root, "ppo", "reward", ptx_coef=0.0),
        rewarded(size, scorer, folder, root, "ppo-ptx", "reward"),
    ]


def measured(
    size: str,
    scorer: str,
    folder: str,
    root: str,
    policies: tuple[tuple[str, str, str], ...],
    suffix: str = "",
) -> list[RunSpec]:
    """All policies of a size side by side: on held-out prompts, on those sent to GPT, and
    on the public tasks."""
    places = tuple((name, f"{root}/{folder}{run}", how) for name, run, how in policies)
    return [
        RunSpec(
            f"{folder}evaluate{suffix}",
            f"configs/evaluate.py:{size},{scorer}",
            {
                **common(root),
                **files(root, "prompts", "text", "demonstrations"),
                "policies": places,
                "reward_parent": f"{root}/reward",
                "data.comparisons": (
                    (LABELERS, (f"{root}/collect/comparisons.jsonl.gz",)),
                    (HELD_OUT_LABELERS, (f"{root}/collect/held_out.jsonl.gz",)),
                ),
            },
        ),
        RunSpec(
            f"{folder}evaluate-gpt{suffix}",
            f"configs/evaluate.py:{size},{scorer}",
            {
                **common(root),
                "policies": tuple(place for place in places if place[2] == "plain"),
                "reward_parent": f"{root}/reward",
                "data.prompts": (f"{root}/world/gpt_prompts.jsonl.gz",),
                "data.limits.prompt_tokens": GPT_PROMPT_TOKENS,
                "data.text": (),
                "data.comparisons": (),
                "data.demonstrations": (),
            },
        ),
        RunSpec(
            f"{folder}tasks{suffix}",
            f"configs/public_tasks.py:{size}",
            {
                "tokenizer": f"{root}/world/tokenizer.json",
                "world": f"{root}/world",
                # FLAN/T0 has been tuned on these tasks.
                "policies": tuple(
                    (name, place)
                    for name, place, how in places
                    if how == "plain" and name != TUNED[0]
                ),
            },
        ),
    ]


def overfitted(size: str, folder: str, root: str) -> list[RunSpec]:
    """The SFT baseline of the paper's appendix C.1, many epochs long, and the reward
    model's score on its way."""
    run = f"{folder}sft-overfit"
    steps = range(OVERFIT_EVERY, OVERFIT_STEPS + 1, OVERFIT_EVERY)
    keeping = {
        "evaluate_every": OVERFIT_EVERY,
        "save_every": OVERFIT_EVERY,
        "keep": len(steps),
    }
    overrides = {f"run.{name}": value for name, value in keeping.items()} | {
        "epochs": 0.0,
        "steps": OVERFIT_STEPS,
    }
    overrides |= {"parent": f"{root}/{folder}pretrain"}
    policies = (
        ("SFT", "sft", "plain"),
        *((f"step {step}", f"sft-overfit@{step}", "plain") for step in steps),
    )
    return [
        RunSpec(
            run,
            f"configs/sft.py:{size},baseline",
            common(root) | files(root, "demonstrations") | overrides,
        ),
        measured(size, size, folder, root, policies, "-overfit")[0],
    ]


def report(root: Path) -> None:
    """Writes the report, and prints its table and where it is."""
    print(f"report: {write([root], root / 'report')}")
