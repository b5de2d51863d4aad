"""The paper's central claims at small scale, in a world with a known true utility.

Command:   python scripts/experiment.py experiments/alignment.py:micro --workdir runs/micro
           python scripts/experiment.py experiments/alignment.py:family \\
               --workdir runs/family
Hardware:  micro: two cores, seven minutes; family: two cores, 36 runs, one hour.
Expect:    GPT < GPT prompted < SFT < PPO in true win rate, and PPO-ptx loses less than PPO
           on public tasks (`docs/alignment.md`).
Read it:   `report/index.html` has the paper's figures, each claim with its measurement, and
           all responses side by side.

`micro`, or another size, trains one size. `family` trains the three sizes that stand for
1.3B, 6B and 175B, with reward and value models of the middle size as in the paper. It
also has the runs of the side claims: SFT for many epochs, labelers without noise, and GPT
tuned on public tasks (FLAN, T0). A seed may follow the size: `micro,1`.

No stage sees the true utility. The report reads it, and the simulated labelers perceive it
with noise and biases (paper, sections 4.1 and 4.2).
"""

from pathlib import Path
from typing import Any

from configs import collect, evaluate, sizes

from instructax.config import require
from instructax.experiment import RunSpec
from instructax.report import write_report
from instructax.report.results import HELD_OUT_LABELERS, LABELERS

# The size of the family's reward and value models.
MIDDLE_SIZE = "milli"

# Workdir of a policy -> its responses to each prompt that labelers compare. Most responses
# are by SFT and some by an early PPO policy (section 3.2): PPO easily exploits a reward
# model that was trained without such responses. The sizes of a family share the responses.
EARLY_RESPONSES = collect.RESPONSES
RESPONSES = {"sft": 6, "ppo-early": 3, "pretrain": 1}
# The first round of comparisons, which trains the reward model of the early PPO policy.
EARLY_ROUND = {"round": 0, "prompts": 1200}

# One more of the policies that are evaluated, of the form of `evaluate.POLICIES`.
PUBLIC_TASK_POLICY = ("FLAN/T0", "flan", "plain")

# Prompts that were sent to GPT contain an example, so they are longer.
GPT_PROMPT_TOKENS = 64

# Steps of the long SFT run and of its evaluations; an epoch has about 520 steps.
OVERFIT_STEPS = 4800
OVERFIT_EVERY = 300


def get_runs(arg: str, root: str) -> list[RunSpec]:
    """Returns the runs in order.

    Args:
      arg: a size of the simulated world or `family`, optionally with a seed: `micro,1`.
      root: the workdir of the experiment.
    """
    size, _, seed = arg.partition(",")
    allowed = (*sizes.SIMULATED, "family")
    require(
        size in allowed,
        f"size {size!r} must be one of {', '.join(allowed)}: experiments/alignment.py:SIZE",
    )
    require(
        not seed or seed.isdecimal(),
        f"seed {seed!r} must be a whole number: experiments/alignment.py:SIZE,SEED",
    )
    runs = family(root) if size == "family" else single_size(size, root)
    with_seed = []
    for run in runs:
        overrides = {**run.overrides, "seed": int(seed or 0)}
        with_seed.append(RunSpec(run.name, run.config, overrides))
    return with_seed


def single_size(size: str, root: str) -> list[RunSpec]:
    """Returns the runs of one size, with a reward model of the same size."""
    weights = {"": 1}
    return [
        world(size),
        *supervised(size, "", root),
        *reward_model(size, root, weights, "", EARLY_RESPONSES, "-early", **EARLY_ROUND),
        early_ppo(size, size, "", root),
        *reward_model(size, root, weights, "", RESPONSES, ""),
        *aligned(size, size, "", root),
        *evaluations(size, size, "", root, evaluate.POLICIES),
    ]


def family(root: str) -> list[RunSpec]:
    """Returns the runs of three sizes with one reward model, and of the side claims."""
    folders = {size: f"{size}/" for size in sizes.FAMILY}
    middle = folders[MIDDLE_SIZE]
    # Every size gives a third of the responses.
    shares = {folder: len(folders) for folder in folders.values()}

    runs = [world(MIDDLE_SIZE)]
    for size, folder in folders.items():
        runs += supervised(size, folder, root)
        runs.append(tuned_on_public_tasks(size, folder, root))

    runs += reward_model(
        MIDDLE_SIZE, root, shares, middle, EARLY_RESPONSES, "-early", **EARLY_ROUND
    )
    for size, folder in folders.items():
        runs.append(early_ppo(size, MIDDLE_SIZE, folder, root))

    runs += reward_model(MIDDLE_SIZE, root, shares, middle, RESPONSES, "")
    for size, folder in folders.items():
        runs += aligned(size, MIDDLE_SIZE, folder, root)
        policies = (*evaluate.POLICIES, PUBLIC_TASK_POLICY)
        runs += evaluations(size, MIDDLE_SIZE, folder, root, policies)

    # Side claims: labelers without noise, and SFT for many epochs.
    runs += reward_model(MIDDLE_SIZE, root, shares, middle, RESPONSES, "-quiet", noise=0.0)
    runs += overfitted_sft(MIDDLE_SIZE, middle, root)
    return runs


def common(root: str) -> dict[str, Any]:
    """Returns the overrides of all stages that read tokens."""
    return {"tokenizer": f"{root}/world/tokenizer.json", "data.folder": f"{root}/rows"}


def data_files(root: str, *kinds: str) -> dict[str, tuple[str, ...]]:
    """Returns the overrides that name files of the simulated world."""
    return {f"data.{kind}": (f"{root}/world/{kind}.jsonl.gz",) for kind in kinds}


def world(size: str) -> RunSpec:
    """Returns the run that writes the world, which all sizes share."""
    return RunSpec("world", f"configs/world.py:{size}", {})


def supervised(size: str, folder: str, root: str) -> list[RunSpec]:
    """Returns the runs of GPT and of SFT, the policy that PPO starts from."""
    pretrain = {**common(root), **data_files(root, "text")}
    sft = {
        **common(root),
        **data_files(root, "text", "demonstrations"),
        "parent": f"{root}/{folder}pretrain",
    }
    return [
        RunSpec(f"{folder}pretrain", f"configs/pretrain.py:{size}", pretrain),
        RunSpec(f"{folder}sft", f"configs/sft.py:{size}", sft),
    ]


def tuned_on_public_tasks(size: str, folder: str, root: str) -> RunSpec:
    """Returns the run that tunes GPT on public tasks, as FLAN and T0 are tuned.

    It has the hyperparameters of SFT.
    """
    overrides = {
        **common(root),
        **data_files(root, "text"),
        "parent": f"{root}/{folder}pretrain",
        "data.demonstrations": (f"{root}/world/public.jsonl.gz",),
    }
    return RunSpec(f"{folder}flan", f"configs/sft.py:{size}", overrides)


def reward_model(
    size: str,
    root: str,
    shares: dict[str, int],
    folder: str,
    responses: dict[str, int],
    suffix: str,
    **changes: Any,
) -> list[RunSpec]:
    """Returns the runs that collect comparisons and train a reward model on them.

    Args:
      size: size of the reward model.
      root: the workdir of the experiment.
      shares: folder of a size -> by how many sizes the responses are divided.
      folder: folder of the size whose SFT policy initializes the reward model.
      responses: workdir of a policy -> its responses to each prompt, over all sizes.
      suffix: ends the names of both runs.
      **changes: further overrides of the collection.
    """
    policies = []
    for policy_folder, num_sizes in shares.items():
        for policy, count in responses.items():
            # Rounded up, so that every size gives at least one response.
            policies.append((f"{root}/{policy_folder}{policy}", -(-count // num_sizes)))

    comparisons = {"world": f"{root}/world", "policies": tuple(policies), **changes}
    train = {
        **common(root),
        **data_files(root, "demonstrations"),
        "parent": f"{root}/{folder}sft",
        "data.comparisons": (f"{root}/collect{suffix}/comparisons.jsonl.gz",),
    }
    return [
        RunSpec(f"collect{suffix}", f"configs/collect.py:{size}", comparisons),
        RunSpec(f"reward{suffix}", f"configs/reward_model.py:{size}", train),
    ]


def ppo(
    size: str,
    value_size: str,
    folder: str,
    root: str,
    name: str,
    reward: str,
    **changes: Any,
) -> RunSpec:
    """Returns a run of PPO-ptx, or of a variant given by `changes`.

    Args:
      size: size of the policy.
      value_size: size of the reward and value models.
      folder: folder of the policy's size.
      root: the workdir of the experiment.
      name: name of the run.
      reward: workdir of the reward model.
      **changes: further overrides.
    """
    overrides = {
        **common(root),
        **data_files(root, "prompts", "text"),
        "policy_parent": f"{root}/{folder}sft",
        "reward_parent": f"{root}/{reward}",
        **changes,
    }
    return RunSpec(f"{folder}{name}", f"configs/ppo.py:{size},{value_size}", overrides)


def early_ppo(size: str, value_size: str, folder: str, root: str) -> RunSpec:
    """Returns the run of the PPO policy whose responses are compared with those of SFT."""
    return ppo(size, value_size, folder, root, "ppo-early", "reward-early", ptx_coef=0.0)


def aligned(size: str, value_size: str, folder: str, root: str) -> list[RunSpec]:
    """Returns the runs of PPO and PPO-ptx."""
    return [
        ppo(size, value_size, folder, root, "ppo", "reward", ptx_coef=0.0),
        ppo(size, value_size, folder, root, "ppo-ptx", "reward"),
    ]


def evaluations(
    size: str,
    value_size: str,
    folder: str,
    root: str,
    policies: tuple[tuple[str, str, str], ...],
) -> list[RunSpec]:
    """Returns the runs that compare the policies of a size.

    They compare responses to validation prompts and to prompts that were sent to GPT, and
    the results of the public tasks.
    """
    workdirs = tuple((name, f"{root}/{folder}{run}", how) for name, run, how in policies)
    plain = tuple(policy for policy in workdirs if policy[2] == "plain")
    # FLAN/T0 has been tuned on the public tasks.
    untuned = tuple(
        (name, workdir) for name, workdir, _ in plain if name != PUBLIC_TASK_POLICY[0]
    )

    gpt_prompts = {
        **common(root),
        "policies": plain,
        "reward_parent": f"{root}/reward",
        "data.prompts": (f"{root}/world/gpt_prompts.jsonl.gz",),
        "data.limits.prompt_tokens": GPT_PROMPT_TOKENS,
        "data.text": (),
        "data.comparisons": (),
        "data.demonstrations": (),
    }
    public_tasks = {
        "tokenizer": f"{root}/world/tokenizer.json",
        "world": f"{root}/world",
        "policies": untuned,
    }
    config = f"configs/evaluate.py:{size},{value_size}"
    return [
        evaluation(size, value_size, folder, root, policies),
        RunSpec(f"{folder}evaluate-gpt", config, gpt_prompts),
        RunSpec(f"{folder}tasks", f"configs/public_tasks.py:{size}", public_tasks),
    ]


def evaluation(
    size: str,
    value_size: str,
    folder: str,
    root: str,
    policies: tuple[tuple[str, str, str], ...],
    suffix: str = "",
) -> RunSpec:
    """Returns the run that evaluates policies on validation prompts."""
    overrides = {
        **common(root),
        **data_files(root, "prompts", "text", "demonstrations"),
        "policies": tuple(
            (name, f"{root}/{folder}{run}", how) for name, run, how in policies
        ),
        "reward_parent": f"{root}/reward",
        "data.comparisons": (
            (LABELERS, (f"{root}/collect/comparisons.jsonl.gz",)),
            (HELD_OUT_LABELERS, (f"{root}/collect/held_out.jsonl.gz",)),
        ),
    }
    name = f"{folder}evaluate{suffix}"
    return RunSpec(name, f"configs/evaluate.py:{size},{value_size}", overrides)


def overfitted_sft(size: str, folder: str, root: str) -> list[RunSpec]:
    """Returns the runs of an SFT baseline of many epochs (paper, appendix C.1).

    The reward model scores its saved steps.
    """
    steps = range(OVERFIT_EVERY, OVERFIT_STEPS + 1, OVERFIT_EVERY)
    overrides = {
        **common(root),
        **data_files(root, "demonstrations"),
        "parent": f"{root}/{folder}pretrain",
        "epochs": 0.0,
        "steps": OVERFIT_STEPS,
        "run.evaluate_every": OVERFIT_EVERY,
        "run.save_every": OVERFIT_EVERY,
        "run.keep": len(steps),
    }
    policies = [("SFT", "sft", "plain")]
    for step in steps:
        policies.append((f"step {step}", f"sft-overfit@{step}", "plain"))
    return [
        RunSpec(f"{folder}sft-overfit", f"configs/sft.py:{size},baseline", overrides),
        evaluation(size, size, folder, root, tuple(policies), "-overfit"),
    ]


def report(root: Path) -> None:
    """Writes the report and prints its location."""
    print(f"report: {write_report([root], root / 'report')}")
