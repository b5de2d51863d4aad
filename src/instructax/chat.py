"""Answers prompts with a finished policy: what `scripts/sample.py` types."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax import clock, sharding, training
from instructax.configuration import construct, require
from instructax.data.schema import opened
from instructax.lineage import STAGES, open_run
from instructax.model import ComputeConfig, ModelConfig, Transformer
from instructax.runlog import printable
from instructax.sampling import generate
from instructax.sharding import MeshConfig
from instructax.tokenizer import Tokenizer, load_tokenizer
from instructax.types import Prompts


def open_policy(path: str | Path, compute: ComputeConfig) -> tuple[Transformer, Any, Tokenizer]:
    """(network, parameters, tokenizer) of the finished run at `path`, on the first device, as its manifest says."""
    run = open_run(path, "--workdir")
    manifest = run.manifest
    require(
        manifest["stage"] in STAGES["tokens"],
        f"{path} holds a run of stage {manifest['stage']!r}; only {' and '.join(STAGES['tokens'])} runs answer prompts",
    )
    model = Transformer(construct(ModelConfig, manifest["model"], "model"), compute, "tokens")
    tokenizer = load_tokenizer(str(run.workdir / "tokenizer.json"))
    require(
        tokenizer.hash == manifest["tokenizer"]["hash"],
        f"{run.workdir / 'tokenizer.json'} has changed since the run was trained: restore it",
    )
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1])
    return model, run.load(training.abstract_params(model, mesh)), tokenizer


def answerer(
    model: Transformer, params: Any, tokenizer: Tokenizer, *, length: int, temperature: float, seed: int
) -> Callable[[str, int], str]:
    """A function from (prompt, number of the sample) to the answer; compiles once for each power of two of length."""
    sample = jax.jit(partial(generate, model, length=length, eos_id=tokenizer.eos_id))
    room = model.config.max_length - length
    require(room > 0, f"length = {length} must be below the model's {model.config.max_length} tokens")

    def answer(prompt: str, number: int) -> str:
        ids = tokenizer.encode(opened(prompt))
        require(0 < len(ids) <= room, f"the prompt has {len(ids)} tokens; between 1 and {room} are possible")
        padded = min(room, 1 << int(len(ids) - 1).bit_length())
        tokens, mask = np.zeros((1, padded), np.int32), np.zeros((1, padded), bool)
        tokens[0, -len(ids) :], mask[0, -len(ids) :] = ids, True
        keys = clock.sample_keys(clock.step_key(seed, "evaluate", 0), jnp.array([number]))
        prompts = Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))
        rollouts = sample(params, prompts, keys, temperature=jnp.float32(temperature))
        response = np.asarray(rollouts.responses[0])[np.asarray(rollouts.mask[0])]
        return tokenizer.decode(response[:-1] if bool(rollouts.ended[0]) else response)

    return answer


def talk(path: str | Path, prompts: Iterable[str], *, length: int, temperature: float, seed: int, dtype: Any) -> None:
    """Prints an answer to each prompt; one that cannot be read is answered with the reason."""
    one = {"part_rows": 1, "part_halvings": 0, "slots": 1}
    compute = ComputeConfig(dtype=dtype, decoding=dtype, remat="none", head_chunk=length, **one)
    answer = answerer(*open_policy(path, compute), length=length, temperature=temperature, seed=seed)
    for number, prompt in enumerate(prompts):
        try:
            print(printable(answer(prompt, number)), flush=True)
        except ValueError as error:
            print(f"({error})", flush=True)
