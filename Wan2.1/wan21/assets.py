"""What a run needs besides code: weights, and the tokenizer that belongs to them."""

from dataclasses import dataclass

from wan21.models import ModelSpec
from wan21.options import Options
from wan21.runtime import Runtime
from wan21.text.tokenizer import Tokenizer
from wan21.weights.checkpoint import CheckpointWeights
from wan21.weights.components import Weights
from wan21.weights.inspect import inspect_folder
from wan21.weights.random import RandomWeights


@dataclass(frozen=True)
class Assets:
    """Where weights come from, the tokenizer, and both in a few words for the record."""

    weights: Weights
    tokenizer: Tokenizer
    description: str


def open_assets(spec: ModelSpec, options: Options, runtime: Runtime) -> Assets:
    """From the checkpoint folder, or random weights and the built-in tokenizer where there is none.

    Raises:
        CheckpointError: the folder is not what the task needs.
    """
    if options.ckpt_dir is None:
        weights = RandomWeights(spec, options.weights_seed, runtime.generator)
        return Assets(
            weights, Tokenizer.built_in(max_tokens=spec.text.text_len), f"random (seed {options.weights_seed})"
        )
    facts = inspect_folder(options.ckpt_dir, spec)
    tokenizer = Tokenizer.from_folder(facts.tokenizer_folder, max_tokens=spec.text.text_len)
    return Assets(CheckpointWeights(facts), tokenizer, f"checkpoint {facts.fingerprint[:12]}")
